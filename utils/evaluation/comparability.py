"""Comparability of two models' bits per byte: they compare only if the tokens of both say the whole text."""

from collections.abc import Mapping
from typing import Any

MOST_UNSPELT = 0.01
"""Share of a text's bytes that a model's tokens may leave out before its bits per byte no longer compare."""


def unspelt_share(described: Mapping[str, Any]) -> float:
    """Return the share of the text's bytes that a model's tokens do not say.

    Args:
        described: the model's metrics, from `HeldOut.describe`; 0 where they do not tell, as in reports of older
            versions.
    """
    unspelt = described.get("unspelt_bytes", 0)
    if not unspelt:
        return 0.0
    return unspelt / described["bytes"]


def unspelt_text(models: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the reason why the bits per byte of models do not compare, or None where they do.

    A model whose tokens leave text out (unknown words, spaces, line breaks) is not asked to predict it, so that its
    bits per byte are too low.

    Args:
        models: name of each, as the reason calls it -> its metrics on one text.
    """
    lossy = []
    for name, described in models.items():
        share = unspelt_share(described)
        if share > MOST_UNSPELT:
            lossy.append(f"{share:.1%} (by the {name}'s tokens)")

    if not lossy:
        return None
    return (
        f"{' and '.join(lossy)} of the text's bytes are left out, as unknown words or as dropped spaces and line "
        "breaks: bits per byte of student and teacher do not compare"
    )
