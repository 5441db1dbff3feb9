"""Order of windows and micro-batches: a pure function of seed, epoch and step, so that a resumed run repeats none."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np


@dataclass(frozen=True)
class BatchGeometry:
    """Division of an optimizer step into micro-batches and among processes."""

    global_batch: int
    """Windows per optimizer step, over all processes."""
    micro_batch: int
    """Windows per forward pass of one process, at most."""
    processes: int = 1
    """Processes that share a step."""
    rank: int = 0
    """Number of this process, from 0."""


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Optimizer steps in which n windows are seen once; the last one may be short."""
    return ceil(n / global_batch)


def micro_batches_in_step(n: int, step: int, *, global_batch: int, micro_batch: int, processes: int) -> int:
    """Micro-batches that each process works through in a step of an epoch: the same number for all processes."""
    windows = min(global_batch, n - step * global_batch)
    return ceil(windows / (micro_batch * processes))


Replaced = Mapping[tuple[int, int], int | None]
"""(step of the epoch, slot of the step) -> the index of another window in its place; None: no window."""


def step_batches(
    n: int,
    geometry: BatchGeometry,
    *,
    seed: int,
    epoch: int,
    steps: range | None = None,
    replaced: Replaced | None = None,
) -> Iterator[list[int]]:
    """Window indices of one process for one epoch, micro-batch by micro-batch.

    Step s consumes order[s * global_batch : (s + 1) * global_batch] of the epoch's permutation, whatever
    `micro_batch` and `processes` are. It is cut into `micro_batches_in_step` micro-batches a process, as even as
    can be, none above `micro_batch`. With several processes, micro-batches of a short last step can be empty.

    Args:
        steps: of the epoch; None: all.
        replaced: slots of steps that do not have their window; None: every slot has.
    """
    order = permutation(n, seed, epoch)
    global_batch = geometry.global_batch
    processes = geometry.processes

    for step in range(steps_per_epoch(n, global_batch)) if steps is None else steps:
        step_windows = _windows_of_step(order, step, global_batch, replaced)
        per_process = micro_batches_in_step(
            n, step, global_batch=global_batch, micro_batch=geometry.micro_batch, processes=processes
        )

        # Dealt out in turn: the processes' shares differ by one window a micro-batch at most.
        micro_batches = np.array_split(step_windows, per_process * processes)
        for indices in micro_batches[geometry.rank :: processes]:
            yield indices[indices >= 0].tolist()


def _windows_of_step(order: np.ndarray, step: int, global_batch: int, replaced: Replaced | None) -> np.ndarray:
    """Return the window index of each slot of a step; -1 for a slot without a window."""
    windows = order[step * global_batch : (step + 1) * global_batch]
    if not replaced:
        return windows

    windows = windows.copy()
    for slot in range(len(windows)):
        if (step, slot) in replaced:
            index = replaced[step, slot]
            windows[slot] = -1 if index is None else index
    return windows


@lru_cache(maxsize=2)
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order of n items in an epoch: [n] int64, a pure function of its arguments.

    Items are sorted by the raw output of a bit generator, which NumPy promises never to change;
    `Generator.permutation` comes without that promise, and a resumed run may meet another NumPy.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    # A stable sort: equal outputs, however rare, must not be ordered by the sorting algorithm of the day.
    order = np.argsort(bits.random_raw(n), kind="stable")
    order.setflags(write=False)  # it is kept, for rounds of few steps ask for it again and again
    return order
