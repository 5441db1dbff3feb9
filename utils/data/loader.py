"""Loader: collated micro-batches in a given order, made by worker processes or by a thread.

    windows --step_batches--> indices of every micro-batch --loader--> batches

What comes when is a pure function of the indices: a resumed run sees what an uninterrupted one would have seen.
"""

import atexit
import copyreg
import io
import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..machine.stop_signals import ignore_stop_signals, stop_signals_delayed
from .batch_order import permutation
from .windows import Window

T = TypeVar("T")

Collate = Callable[[list[Window]], Any]
"""Windows of a micro-batch -> the batch."""

_END = object()
"""Stands for the batch after the last one: None is a batch, the empty one."""


class WindowRows(Dataset):
    """Windows fetched one by one, so that a row does not depend on which others come with it.

    Without it a `DataLoader` would ask a table of `datasets` for a whole batch at once.
    """

    def __init__(self, windows: Sequence[Window]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Window:
        return self.windows[index]


def _as_array(tensor: torch.Tensor) -> tuple[Callable, tuple]:
    """Return how pickle is to rebuild a tensor: from the bytes of an array."""
    return torch.from_numpy, (tensor.numpy(),)


class _PackedBatch:
    """A batch on its way from a worker, pickled into one tensor, whatever it holds.

    Left to itself, torch passes every tensor by a file of its own, and asks the worker for each, which costs the
    receiver more time than making the batch. (Plain bytes do not fit into a pipe at once: a worker that is killed
    while it writes leaves a reader that waits for ever.)
    """

    def __init__(self, batch: Any) -> None:
        packed = io.BytesIO()

        # Tensors go as arrays, by a rule of this pickler alone: their own pickling makes an archive for each.
        pickler = pickle.Pickler(packed, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: _as_array}
        pickler.dump(batch)

        self.packed = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)

    def unpack(self) -> Any:
        """Return the batch."""
        return pickle.loads(self.packed.numpy())

    def pin_memory(self) -> Any:
        """Return the batch in pinned memory; the pinning thread of a `DataLoader` calls this."""
        batch = self.unpack()
        if batch is None:
            return None
        return batch.pin_memory()


@dataclass(frozen=True)
class _Collate:
    """Collator that a `DataLoader` calls: packs batches that come from a worker process."""

    collate: Collate

    def __call__(self, windows: list[Window]) -> Any:
        batch = self.collate(windows) if windows else None
        is_in_worker = get_worker_info() is not None
        return _PackedBatch(batch) if is_in_worker else batch


def some_batches(windows: Sequence[Window], collate: Collate, count: int, size: int, seed: int) -> list[Any]:
    """At most `count` windows in batches of `size`, the same ones in every process."""
    indices = permutation(len(windows), seed, 0)[:count].tolist()

    batches = []
    for start in range(0, len(indices), size):
        rows = [windows[index] for index in indices[start : start + size]]
        batches.append(collate(rows))
    return batches


def begun_ahead(batches: Iterable[T], begin: Callable[[T], object], count: int = 8) -> Iterator[T]:
    """Yield batches, each after `begin` was called with it and those next in line.

    A teacher that is elsewhere then works on several at a time.

    Args:
        count: batches ahead.
    """
    waiting: deque[T] = deque()
    for batch in batches:
        begin(batch)
        waiting.append(batch)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def loader(
    windows: Sequence[Window],
    batches: Iterable[list[int]],
    collate: Collate,
    num_workers: int = 0,
    pin: bool = False,
    at_once: int = 1,
) -> Iterator[Any]:
    """One collated batch per list of indices, in their order; None for an empty list.

    Windows are fetched and collated by the workers, each batch by one of them, or by a thread where there are none,
    while `at_once` batches are worked on, those that are taken in one go. Does not draw from the global random
    generators, so that the number of loaders a run has used up does not change what it computes.
    """
    # Workers together hold at least the batches that are taken in one go; two each is torch's default.
    prefetch = max(2, ceil(at_once / num_workers)) if num_workers else None

    data_loader = DataLoader(
        WindowRows(windows),
        batch_sampler=list(batches),
        collate_fn=_Collate(collate),
        num_workers=num_workers,
        worker_init_fn=_start_worker if num_workers else None,
        prefetch_factor=prefetch,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),  # else it would draw a seed from the global one
    )
    if num_workers:
        yield from _from_workers(data_loader)
    else:
        yield from _from_thread(data_loader, at_once)


def _from_workers(data_loader: DataLoader) -> Iterator[Any]:
    """Yield batches that worker processes make.

    They are taken in this thread, the one that torch tells of a worker that was killed.
    """
    with stop_signals_delayed():
        arriving = iter(data_loader)

    for batch in arriving:
        # The pinning thread has unpacked it already where there is one.
        yield batch.unpack() if isinstance(batch, _PackedBatch) else batch


def _from_thread(data_loader: DataLoader, at_once: int) -> Iterator[Any]:
    """Yield batches that a thread makes while the `at_once` batches before are worked on."""
    arriving = iter(data_loader)
    thread = ThreadPoolExecutor(1, "batches")

    try:
        # One comes for each that is taken, so `at_once` batches are always in the making.
        waiting = deque(thread.submit(next, arriving, _END) for _ in range(at_once))

        while (batch := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, arriving, _END))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)  # where the caller takes no further batch


def _start_worker(worker: int) -> None:
    """Leave stop signals to the main process, which ends its workers in order."""
    ignore_stop_signals()


@atexit.register
def _kill_workers() -> None:
    """Kill the worker processes that are left when the interpreter ends.

    Left to itself, `multiprocessing` sends them SIGTERM at that point, which they ignore, and waits for them for ever.
    """
    for process in multiprocessing.active_children():
        # The workers of a `DataLoader` are daemons; other children are not this module's to kill.
        if process.daemon:
            process.kill()
