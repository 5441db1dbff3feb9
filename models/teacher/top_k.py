"""The largest logits of each row, and the mass of the others."""

import torch
from torch import Tensor

from ..validation import expect_count

BLOCKS = 8
"""Into how many interleaved parts a row is cut to find its largest entries; see `exact_top_k`."""


def _top(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(columns [r, k] of the largest, their log-probabilities [r, k], log mass of the others [r], log of the sum [r]).

    The logits [r, V] are overwritten: they are the largest thing there is.
    """
    top, columns = exact_top_k(logits, top_k)
    peak = top[:, 0].clamp_min(torch.finfo(logits.dtype).min)
    # summed over what is left, not total - sum: exact also where it is tiny
    rest = logits.sub_(peak[:, None]).exp_().scatter_(1, columns, 0.0).sum(1)
    log_sum = (peak + (rest + (top - peak[:, None]).exp().sum(1)).log()).clamp_min(torch.finfo(logits.dtype).min)
    return columns, top - log_sum[:, None], peak + rest.log() - log_sum, log_sum


def exact_top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(the k largest of each row [r, k], largest first, their columns): `torch.topk`, faster on long rows.

    A row is cut into `BLOCKS` parts that lie upon each other: the largest of each pile of `BLOCKS` entries is found
    first, then the k piles with the largest of these, by the same means. None of the k largest is elsewhere: an entry
    of another pile is no larger than k entries, one in each of those. Among equals the choice is free.
    """
    k = expect_count("k", k, 1)
    width = values.shape[1] // BLOCKS
    if width < 2 * k:
        return values.topk(k)
    piles = values[:, : BLOCKS * width].unflatten(1, (BLOCKS, width))
    _, pile = exact_top_k(piles.amax(1), k)
    heights = torch.arange(0, BLOCKS * width, width, device=values.device)
    leftover = torch.arange(BLOCKS * width, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([(pile[:, None] + heights[:, None]).flatten(1), leftover], 1)
    top, at = values.gather(1, columns).topk(k)
    return top, columns.gather(1, at)
