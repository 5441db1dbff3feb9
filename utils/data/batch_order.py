"""Order of windows and micro-batches: a pure function of seed, epoch and step, so that a resumed run repeats none."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np

PACED = 1
"""Tells the random numbers of an order with a pacing from those of the permutation."""
DRAWN_AT_ONCE = 1024
"""Random numbers that are taken from the bit generator in one go."""


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


@dataclass(frozen=True, eq=False)
class Pacing:
    """Windows by difficulty, and the share of them that each step of a run draws from."""

    by_ease: np.ndarray
    """[windows] int64, numbers of the windows from the easiest to the hardest."""
    share: Callable[[int], float]
    """Optimizer step of the run, counted from 0 -> share of the windows that is open, from the easiest."""


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
    pacing: Pacing | None = None,
) -> Iterator[list[int]]:
    """Window indices of one process for one epoch, micro-batch by micro-batch.

    Step s consumes order[s * global_batch : (s + 1) * global_batch] of the epoch's order, whatever `micro_batch` and
    `processes` are. It is cut into `micro_batches_in_step` micro-batches a process, as even as can be, none above
    `micro_batch`. With several processes, micro-batches of a short last step can be empty.

    Args:
        steps: of the epoch; None: all.
        replaced: slots of steps that do not have their window; None: every slot has.
        pacing: of windows that are not all open from the first step on.
    """
    global_batch = geometry.global_batch
    order = order_of_epoch(n, seed, epoch, global_batch=global_batch, pacing=pacing)
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


@lru_cache(maxsize=2)
def order_of_epoch(n: int, seed: int, epoch: int, *, global_batch: int, pacing: Pacing | None = None) -> np.ndarray:
    """Order of n windows in an epoch: [n] int64, a pure function of its arguments.

    Without a pacing, and where all windows are open in the whole epoch, it is their permutation.
    """
    if pacing is None:
        return permutation(n, seed, epoch)

    # At least one window is open, and the rounding of 0.3 * 10 opens no further one.
    steps = steps_per_epoch(n, global_batch)
    shares = [pacing.share(epoch * steps + step) for step in range(steps)]
    opened = [min(n, max(1, ceil(share * n - 1e-9))) for share in shares]
    if min(opened) == n:
        return permutation(n, seed, epoch)

    places = _paced_places(n, opened, global_batch, np.random.SeedSequence([seed, epoch, PACED]))
    order = pacing.by_ease[places]
    order.setflags(write=False)
    return order


def _paced_places(n: int, opened: list[int], global_batch: int, seed: np.random.SeedSequence) -> np.ndarray:
    """Draw an epoch of places in the order of difficulty: [n] int64, each once before an open one comes twice.

    A place enters the pool once in a pass, and leaves it once, so that an epoch costs O(n), whatever its steps.

    Args:
        opened: places that are open in each step, from the easiest.
    """
    draws = _draws(seed)
    is_new = np.ones(n, dtype=bool)  # neither seen in this pass nor in the pool
    pool: list[int] = []
    places: list[int] = []
    open_before = 0

    for open_now in opened:
        pool += _newly(is_new, open_before, open_now)
        open_before = open_now

        for _ in range(min(global_batch, n - len(places))):
            place = _draw(pool, draws, open_now, is_new)
            # Where all open ones were seen, they begin anew.
            if place is None:
                is_new[:open_now] = True
                pool += _newly(is_new, 0, open_now)
                place = _draw(pool, draws, open_now, is_new)
            places.append(place)
    return np.array(places, dtype=np.int64)


def _draws(seed: np.random.SeedSequence) -> Iterator[int]:
    """Yield random 64-bit numbers without end: the raw output of a bit generator, which NumPy promises not to change.

    As in `permutation`.
    """
    bits = np.random.PCG64(seed)
    while True:
        yield from bits.random_raw(DRAWN_AT_ONCE).tolist()


def _newly(is_new: np.ndarray, begin: int, end: int) -> list[int]:
    """Return the places of a stretch that enter the pool, and note that they do."""
    entering = begin + np.flatnonzero(is_new[begin:end])
    is_new[entering] = False
    return entering.tolist()


def _draw(pool: list[int], draws: Iterator[int], open_now: int, is_new: np.ndarray) -> int | None:
    """Take a random open place out of the pool; None: it holds none."""
    while pool:
        # The last one takes the place of the one that goes: no other has to move.
        number = next(draws) % len(pool)
        pool[number], pool[-1] = pool[-1], pool[number]
        place = pool.pop()
        if place < open_now:
            return place

        # It was closed while it waited, and may be opened again.
        is_new[place] = True
    return None
