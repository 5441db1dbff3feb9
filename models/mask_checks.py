"""Replacements for checks that transformers makes of its inputs before it builds attention masks.

Each of these checks reads a value of a tensor (do positions jump, is the mask all ones), for which the host waits until
the GPU has computed everything before it: once and more a forward. Their answers are known here beforehand: the caller
says whether rows hold several texts, and a causal text is only ever padded behind its end.

The checks are private functions of `transformers.masking_utils`, named here as in version 5.23. One that a version does
not have is left out, and a forward is then correct, only slower. Tests compare states and gradients with those of the
untouched checks bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import masking_utils

PACKED_CHECK = "find_packed_sequence_indices"
"""Check of transformers: position ids -> the text of each token in a row of several, or None for rows of one text."""
CAUSAL_CHECK = "_ignore_causal_mask_sdpa"
"""Check of transformers: (mask, ...) -> True if causal attention needs no mask but the kernel's own."""
ENCODER_CHECK = "_ignore_bidirectional_mask_sdpa"
"""Check of transformers: (mask, ...) -> True if an encoder's attention needs no mask."""

CHECKS = (PACKED_CHECK, CAUSAL_CHECK, ENCODER_CHECK)


def no_packed_texts(position_ids: Tensor) -> None:
    """Return None, the answer for rows that hold one text each, without a look at the positions."""
    return None


def packed_texts(position_ids: Tensor) -> Tensor:
    """Return [B, S] the text of each token, for rows of several texts whose positions start anew."""
    return (position_ids == 0).cumsum(-1)


def without_causal_mask(check: Callable[..., bool]) -> Callable[..., bool]:
    """Return the check of a causal mask, asked as if there were no mask.

    Padding lies behind the text, where causal attention does not look. BART makes itself a mask of ones.
    """

    def is_causal_mask_needless(mask: Tensor | None, *args: Any, **options: Any) -> bool:
        return check(None, *args, **options)

    return is_causal_mask_needless


def with_encoder_mask(check: Callable[..., bool]) -> Callable[..., bool]:
    """Return the check of an encoder's mask that keeps every mask: one is given only where there is padding."""

    def is_encoder_mask_needless(mask: Tensor | None, *args: Any, **options: Any) -> bool:
        if mask is not None:
            return False
        return check(None, *args, **options)

    return is_encoder_mask_needless


@contextmanager
def without_mask_checks(is_packed: bool = False) -> Iterator[None]:
    """Replace the checks for the duration of a forward; also usable as a decorator.

    Only for rows that are padded on the right, and for encoders that get a mask only with padding.

    Args:
        is_packed: rows hold several texts, whose positions start anew; else one each.
    """
    functions = vars(masking_utils)
    originals = {name: functions[name] for name in CHECKS if name in functions}

    # Another version of transformers may not have all of them.
    replacements: dict[str, Callable] = {}
    if PACKED_CHECK in originals:
        replacements[PACKED_CHECK] = packed_texts if is_packed else no_packed_texts
    if CAUSAL_CHECK in originals:
        replacements[CAUSAL_CHECK] = without_causal_mask(originals[CAUSAL_CHECK])
    if ENCODER_CHECK in originals:
        replacements[ENCODER_CHECK] = with_encoder_mask(originals[ENCODER_CHECK])

    # Put back also after an error: other code in this process wants the checks.
    try:
        functions.update(replacements)
        yield
    finally:
        functions.update(originals)
