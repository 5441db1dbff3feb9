"""The order of windows and micro-batches, as a function of seed, epoch and step."""

from collections.abc import Iterator
from math import ceil

import numpy as np


def steps_per_epoch(n: int, global_batch: int) -> int:
    """Optimizer steps in which n windows are seen once; the last one may be short."""
    return ceil(n / global_batch)


def micro_batches_in_step(n: int, step: int, *, global_batch: int, micro_batch: int, processes: int) -> int:
    """Micro-batches that each process works through in a step of an epoch: the same number for all processes."""
    items = min(global_batch, n - step * global_batch)
    return ceil(items / (micro_batch * processes))


def step_batches(
    n: int,
    *,
    global_batch: int,
    micro_batch: int,
    processes: int = 1,
    rank: int = 0,
    seed: int,
    epoch: int,
    start_step: int = 0,
) -> Iterator[list[int]]:
    """Window indices of one process for one epoch, micro-batch by micro-batch, from a step of the epoch on.

    Step s consumes order[s * global_batch : (s + 1) * global_batch] of the epoch's permutation, whatever
    `micro_batch` and `processes` are. It is cut into `micro_batches_in_step` micro-batches a process, as even as
    can be, none above `micro_batch`. With several processes, micro-batches of a short last step can be empty.
    """
    order = permutation(n, seed, epoch)
    for step in range(start_step, steps_per_epoch(n, global_batch)):
        items = order[step * global_batch : (step + 1) * global_batch]
        per_process = micro_batches_in_step(
            n, step, global_batch=global_batch, micro_batch=micro_batch, processes=processes
        )
        for part in np.array_split(items, per_process * processes)[rank::processes]:
            yield part.tolist()


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Order of n items in an epoch: [n] int64, a pure function of its arguments.

    Items are sorted by the raw output of a bit generator, which NumPy promises never to change;
    `Generator.permutation` comes without that promise, and a resumed run may meet another NumPy.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.argsort(bits.random_raw(n), kind="stable")
