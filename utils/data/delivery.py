"""Batches as one tensor each, from worker processes."""

from collections.abc import Sequence
from dataclasses import dataclass

from .batch_order import step_batches
from .loader import _Rows, loader
from .windows import window_key


@dataclass(frozen=True)
class Delivery:
    """What a loader really yielded in one epoch."""

    expected: int
    """Windows in the data."""
    delivered: int
    """Windows yielded."""
    repeated: int
    """Of those, windows that had been yielded before."""
    identical: int
    """Of those, windows with the same content as another one: repeated text in the data."""

    @property
    def missing(self) -> int:
        return self.expected - (self.delivered - self.repeated)


class _Numbered(_Rows):
    def __getitem__(self, index: int) -> tuple[int, bytes]:
        return index, window_key(self.windows[index])


def delivery(
    windows: Sequence[dict],
    *,
    micro_batch: int,
    num_workers: int,
    processes: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> Delivery:
    """Run an epoch of the loader, for every process with so many workers, and count what comes out."""
    seen: list[tuple[int, bytes]] = []
    for rank in range(processes):
        batches = step_batches(
            len(windows),
            global_batch=micro_batch * processes,
            micro_batch=micro_batch,
            processes=processes,
            rank=rank,
            seed=seed,
            epoch=epoch,
        )
        for batch in loader(_Numbered(windows), batches, list, num_workers):
            seen += batch or []
    distinct = {index: content for index, content in seen}
    return Delivery(
        expected=len(windows),
        delivered=len(seen),
        repeated=len(seen) - len(distinct),
        identical=len(distinct) - len(set(distinct.values())),
    )
