"""Order of windows by difficulty: a pure function of scores, seed and step, that opens the easiest ones first."""

from collections import Counter

import numpy as np
import pytest

from models.config import Ramp
from models.curriculum import value_at
from utils.data.batch_order import BatchGeometry, Pacing, order_of_epoch, permutation, step_batches

N = 60
STEPS = 12
"""Of 5 windows, in an epoch of which `RAMP` is one third."""
SCORES = np.random.default_rng(0).permutation(N)
BY_EASE = np.argsort(SCORES)
RAMP = Ramp(((0.0, 0.2), (0.5, 1.0)))
FIRST_WINDOWS = [16, 22, 3, 29, 11, 7, 51, 46]
"""Of the seed 3 under `RAMP`."""


def pacing(schedule, total_steps=3 * STEPS):
    """Return a pacing by `SCORES` under a schedule over a run."""
    return Pacing(BY_EASE, lambda step: value_at(schedule, step / total_steps))


def of_step(order, step):
    """Return the windows of a step."""
    return order[step * 5 : (step + 1) * 5]


def test_no_window_is_drawn_before_it_is_open():
    by_difficulty = pacing(RAMP)
    for epoch in range(2):
        order = order_of_epoch(N, 3, epoch, global_batch=5, pacing=by_difficulty)
        for step in range(STEPS):
            is_open = BY_EASE[: int(np.ceil(by_difficulty.share(epoch * STEPS + step) * N - 1e-9))]
            assert set(of_step(order, step)) <= set(is_open)


def test_an_open_window_comes_again_only_after_all_others():
    """A fifth of 60 windows is 12: the first 12 places hold each once, and so do the 12 after them."""
    order = order_of_epoch(N, 0, 0, global_batch=5, pacing=pacing(0.2))
    for begin in range(0, N, 12):
        assert sorted(order[begin : begin + 12]) == sorted(BY_EASE[:12])


def test_a_pacing_as_fast_as_the_epoch_shows_every_window_once():
    """In the run of one epoch that opens windows faster than they are seen, none is seen twice."""
    order = order_of_epoch(N, 0, 0, global_batch=5, pacing=pacing(Ramp(((0.0, 0.3), (0.9, 1.0))), STEPS))
    assert sorted(order) == list(range(N))
    assert np.mean(SCORES[order[:15]]) < 20 < 40 < np.mean(SCORES[order[-15:]])


def test_windows_that_are_closed_again_do_not_come():
    falling = pacing(Ramp(((0.0, 1.0), (1.0, 0.1))), STEPS)
    order = order_of_epoch(N, 1, 0, global_batch=5, pacing=falling)
    assert SCORES[order[-5:]].max() < 12 and len(order) == N
    # they open again
    wave = pacing(Ramp(((0.0, 1.0), (0.3, 0.1), (0.5, 1.0))), STEPS)
    seen = Counter(order_of_epoch(N, 1, 0, global_batch=5, pacing=wave).tolist())
    assert max(seen) >= 50 and all(seen[window] <= 2 for window in BY_EASE[6:])


@pytest.mark.parametrize("epoch", [0, 2])
def test_with_all_windows_open_the_order_is_the_permutation(epoch):
    assert (order_of_epoch(N, 7, epoch, global_batch=5, pacing=pacing(1.0)) == permutation(N, 7, epoch)).all()
    assert (order_of_epoch(N, 7, 2, global_batch=5, pacing=pacing(RAMP)) == permutation(N, 7, 2)).all()


def test_an_order_is_a_pure_function_of_seed_and_epoch():
    """Another object of the same scores and schedule, as after a resume, gives the same; another seed does not."""
    order = order_of_epoch(N, 3, 0, global_batch=5, pacing=pacing(RAMP))
    assert (order == order_of_epoch(N, 3, 0, global_batch=5, pacing=pacing(RAMP))).all()
    assert (order != order_of_epoch(N, 4, 0, global_batch=5, pacing=pacing(RAMP))).any()
    # not by NumPy's word alone: an older run must be continued under a newer NumPy
    assert order[:8].tolist() == FIRST_WINDOWS


def test_processes_and_micro_batches_change_no_step():
    steps = []
    for micro_batch, processes in ((6, 1), (2, 1), (3, 2), (1, 3)):
        batches = []
        for rank in range(processes):
            geometry = BatchGeometry(6, micro_batch, processes, rank)
            batches.append(list(step_batches(N, geometry, seed=5, epoch=0, pacing=pacing(RAMP), steps=range(2, 4))))
        windows = np.concatenate([np.concatenate(of_rank) for of_rank in batches])
        per_step = 6 * 2
        assert len(windows) == per_step
        steps.append(Counter(windows.tolist()))
    assert all(step == steps[0] for step in steps)
