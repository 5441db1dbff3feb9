"""The largest logits of each row, and the mass of the others.

Shapes: r rows of logits, V vocabulary, k tokens of each row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..validation import expect_count

BLOCKS = 8
"""Interleaved parts into which a row is cut to find its largest entries; see `exact_top_k`."""


class TopK(NamedTuple):
    """Most probable tokens of some distributions, and what is left of each."""

    ids: Tensor
    """[r, k] columns of the largest logits, the largest first."""
    log_probs: Tensor
    """[r, k] their log-probabilities."""
    log_tail: Tensor
    """[r] log mass of all other columns."""
    log_sum: Tensor
    """[r] log of the sum of the exponentials of all logits."""

    def rows(self, index: Tensor) -> "TopK":
        """Return a copy of some rows."""
        return TopK(
            ids=self.ids[index],
            log_probs=self.log_probs[index],
            log_tail=self.log_tail[index],
            log_sum=self.log_sum[index],
        )


def join_top_k(parts: Sequence[TopK]) -> TopK:
    """Return the rows of all parts."""
    return TopK(
        ids=torch.cat([part.ids for part in parts]),
        log_probs=torch.cat([part.log_probs for part in parts]),
        log_tail=torch.cat([part.log_tail for part in parts]),
        log_sum=torch.cat([part.log_sum for part in parts]),
    )


def take_top_k(logits: Tensor, k: int) -> TopK:
    """Return the k largest of each row and overwrite the logits [r, V], which are too large to be copied."""
    top, columns = exact_top_k(logits, k)
    least = torch.finfo(logits.dtype).min
    peak = top[:, 0].clamp_min(least)

    # Summed over what is left, not total - sum: exact also where it is tiny.
    masses = logits.sub_(peak[:, None]).exp_()
    rest = masses.scatter_(1, columns, 0.0).sum(1)
    top_sum = (top - peak[:, None]).exp().sum(1)
    log_total = (rest + top_sum).log()
    log_sum = (peak + log_total).clamp_min(least)

    return TopK(
        ids=columns,
        log_probs=top - log_sum[:, None],
        log_tail=peak + rest.log() - log_sum,
        log_sum=log_sum,
    )


def exact_top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row [r, k], largest first, and their columns: `torch.topk`, faster on long rows.

    A row is cut into `BLOCKS` parts that lie upon each other: the largest of each pile of `BLOCKS` entries is found
    first, then the k piles with the largest of these, by the same means. None of the k largest is elsewhere: an entry
    of another pile is no larger than k entries, one in each of those. Among equals the choice is free.
    """
    k = expect_count("k", k, 1)
    width = values.shape[1] // BLOCKS
    if width < 2 * k:
        return values.topk(k)

    # The k best piles, by the largest entry of each.
    piles = values[:, : BLOCKS * width].unflatten(1, (BLOCKS, width))
    _, pile = exact_top_k(piles.amax(1), k)

    # Candidates: every entry of these piles, and the few columns at the end that lie in no pile.
    in_blocks = BLOCKS * width
    heights = torch.arange(0, in_blocks, width, device=values.device)
    in_piles = pile[:, None] + heights[:, None]
    leftover = torch.arange(in_blocks, values.shape[1], device=values.device)
    columns = torch.cat([in_piles.flatten(1), leftover.expand(len(values), -1)], 1)

    top, index = values.gather(1, columns).topk(k)
    return top, columns.gather(1, index)
