"""Count of the windows that a loader really yields in an epoch: none may be lost, and none may come twice."""

from collections.abc import Sequence
from dataclasses import dataclass

from .batch_order import BatchGeometry, step_batches
from .loader import WindowRows, loader
from .windows import Window, window_key


@dataclass(frozen=True)
class Delivery:
    """Windows that a loader yielded in one epoch, counted."""

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
        """Windows that never came."""
        return self.expected - (self.delivered - self.repeated)


class _NumberedRows(WindowRows):
    """Index and content hash of every window, so that what comes out of the loader can be told apart."""

    def __getitem__(self, index: int) -> tuple[int, bytes]:  # type: ignore[override]  # counted, not collated
        return index, window_key(self.windows[index])


def delivery(
    windows: Sequence[Window],
    *,
    micro_batch: int,
    num_workers: int,
    processes: int = 1,
    seed: int = 0,
    epoch: int = 0,
) -> Delivery:
    """Run an epoch of the loader, for every process with so many workers, and count what comes out."""
    # The loader collates with `list`: a batch is then its numbered rows.
    rows = _NumberedRows(windows)
    delivered: list[tuple[int, bytes]] = []
    for rank in range(processes):
        geometry = BatchGeometry(
            global_batch=micro_batch * processes,
            micro_batch=micro_batch,
            processes=processes,
            rank=rank,
        )
        batches = step_batches(len(windows), geometry, seed=seed, epoch=epoch)
        for batch in loader(rows, batches, list, num_workers):
            # None: a short last step leaves this process an empty micro-batch.
            if batch is not None:
                delivered += batch

    contents = dict(delivered)  # index -> hash: a window that came twice counts once
    return Delivery(
        expected=len(windows),
        delivered=len(delivered),
        repeated=len(delivered) - len(contents),
        identical=len(contents) - len(set(contents.values())),
    )
