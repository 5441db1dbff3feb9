"""From windows to micro-batches: in which order, by whom they are made, and what really comes out.

    windows --step_batches--> indices of every micro-batch --loader--> batches

What comes when is a pure function of the seed, the epoch and the position: a resumed run sees what an uninterrupted
one would have seen.
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
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..machine.stop_signals import ignore_stop_signals, stop_signals_delayed
from . import batch_order


class _Rows(Dataset):
    """Windows one by one, so that a row does not depend on which others were asked for with it."""

    def __init__(self, windows: Sequence[dict]) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.windows[index]


def _as_array(tensor: torch.Tensor) -> tuple[Callable, tuple]:
    return torch.from_numpy, (tensor.numpy(),)


class _Parcel:
    """A batch on its way from a worker: one tensor, whatever it holds.

    Left to itself, torch passes every tensor by a file of its own, and asks the worker for each, which costs the
    receiver more time than making the batch. (Plain bytes do not fit into a pipe at once: a worker that is killed
    while it writes leaves a reader that waits for ever.)
    """

    def __init__(self, batch: Any) -> None:
        packed = io.BytesIO()
        pickler = pickle.Pickler(packed, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: _as_array}
        pickler.dump(batch)
        self.packed = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)

    def opened(self) -> Any:
        return pickle.loads(self.packed.numpy())

    def pin_memory(self) -> Any:
        """What the pinning thread of a `DataLoader` calls."""
        batch = self.opened()
        return batch if batch is None else batch.pin_memory()


@dataclass(frozen=True)
class _Collate:
    collate: Callable[[list[dict]], Any]

    def __call__(self, windows: list[dict]) -> Any:
        batch = self.collate(windows) if windows else None
        return batch if get_worker_info() is None else _Parcel(batch)


_END = object()


def some_batches(
    windows: Sequence[dict], collate: Callable[[list[dict]], Any], count: int, size: int, seed: int
) -> list[Any]:
    """At most `count` windows in batches of `size`, the same ones in every process."""
    chosen = batch_order.permutation(len(windows), seed, 0)[:count].tolist()
    return [collate([windows[i] for i in chosen[at : at + size]]) for at in range(0, len(chosen), size)]


def loader(
    windows: Sequence[dict],
    batches: Iterable[list[int]],
    collate: Callable[[list[dict]], Any],
    num_workers: int = 0,
    pin: bool = False,
    at_once: int = 1,
) -> Iterator[Any]:
    """One collated batch per list of indices, in their order; None for an empty list.

    Windows are fetched and collated by the workers, each batch by one of them, or by a thread where there are none,
    while `at_once` batches are worked on, those that are taken in one go. Does not draw from the global random
    generators, so that the number of loaders a run has used up does not change what it computes.
    """
    data_loader = DataLoader(
        _Rows(windows),
        batch_sampler=list(batches),
        collate_fn=_Collate(collate),
        num_workers=num_workers,
        worker_init_fn=_start_worker if num_workers else None,
        prefetch_factor=max(2, ceil(at_once / num_workers)) if num_workers else None,
        pin_memory=pin,
        generator=torch.Generator().manual_seed(0),
    )
    if num_workers:
        yield from _from_workers(data_loader)
    else:
        yield from _from_thread(data_loader, at_once)


def _from_workers(data_loader: DataLoader) -> Iterator[Any]:
    """Batches that worker processes make.

    They are taken in this thread, the one that torch tells of a worker that was killed.
    """
    with stop_signals_delayed():
        arriving = iter(data_loader)

    for batch in arriving:
        yield batch.opened() if isinstance(batch, _Parcel) else batch


def _from_thread(data_loader: DataLoader, at_once: int) -> Iterator[Any]:
    """Batches that a thread makes while the `at_once` batches before are worked on."""
    arriving = iter(data_loader)
    thread = ThreadPoolExecutor(1, "batches")

    try:
        waiting = deque(thread.submit(next, arriving, _END) for _ in range(at_once))

        while (batch := waiting.popleft().result()) is not _END:
            waiting.append(thread.submit(next, arriving, _END))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


def _start_worker(worker: int) -> None:
    ignore_stop_signals()


@atexit.register
def _kill_workers() -> None:
    """Kill the worker processes that are left when the interpreter ends.

    Left to itself, `multiprocessing` sends them SIGTERM at that point, which they ignore, and waits for them for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
