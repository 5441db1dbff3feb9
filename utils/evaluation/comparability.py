"""Comparability of two models' bits per byte: only if the tokens of both say the whole text."""

from collections.abc import Mapping
from typing import Any

MOST_UNSPELT = 0.01
"""Share of a text's bytes that a model's tokens may leave out before its bits per byte no longer compare."""


def unspelt_share(described: Mapping[str, Any]) -> float:
    """Share of the text's bytes that a model's tokens do not say, from what `HeldOut.describe` tells of the model.

    0 where nothing is known of it, as in reports of older versions.
    """
    unspelt = described.get("unspelt_bytes", 0)
    return unspelt / described["bytes"] if unspelt else 0.0


def unspelt_text(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why the bits per byte of models do not compare, or None where they do.

    A model whose tokens leave text out (unknown words, spaces, line breaks) is not asked to predict it, so that its
    bits per byte are too low.

    Args:
        models: how each is called -> its metrics on one text.
    """
    shares = {name: unspelt_share(described) for name, described in models.items()}
    lossy = [f"{share:.1%} (by the {name}'s tokens)" for name, share in shares.items() if share > MOST_UNSPELT]
    if not lossy:
        return None
    return (
        f"{' and '.join(lossy)} of the text's bytes are left out, as unknown words or as dropped spaces and line "
        "breaks: bits per byte of student and teacher do not compare"
    )
