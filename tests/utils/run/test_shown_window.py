"""The report shows a window that the run learned from, or says that it did not."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils.config.settings import TrainingConfig
from utils.data.batch_order import Pacing, order_of_epoch
from utils.on_policy.slots import own_slots
from utils.run.shown_window import ShownWindow, shown_window

WINDOWS = 23
TRAINING = TrainingConfig(batch_size=2, gradient_accumulation_steps=2, seed=7)


def job(pacing: Pacing | None = None, stream: object = None) -> SimpleNamespace:
    return SimpleNamespace(
        config=SimpleNamespace(training=TRAINING),
        accelerator=SimpleNamespace(num_processes=1),
        windows=range(WINDOWS),
        window_count=WINDOWS,
        pacing=pacing,
        stream=stream,
    )


def rounds(share) -> SimpleNamespace:
    """Texts of the student in a share of the windows of each step."""

    def slots(plan, first, end):
        return [SimpleNamespace(number=number) for number in own_slots(share(first), first, plan.global_batch)]

    return SimpleNamespace(slots=slots)


def learned(pacing: Pacing | None = None) -> np.ndarray:
    return order_of_epoch(WINDOWS, TRAINING.seed, 0, global_batch=4, pacing=pacing)


def test_it_is_the_first_window_of_the_first_step():
    assert shown_window(job(), None, 3) == ShownWindow(learned()[0], 1)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_open_where_the_text_is_opened_from_the_easiest_on(seed):
    by_ease = np.random.default_rng(seed).permutation(WINDOWS)
    pacing = Pacing(by_ease, lambda step: 0.1)
    shown = shown_window(job(pacing), None, 3)
    assert shown == ShownWindow(learned(pacing)[0], 1) and shown.index in by_ease[:3]


def test_it_is_none_in_whose_place_the_student_wrote():
    half = shown_window(job(), rounds(lambda step: 0.5), 3)
    replaced = own_slots(0.5, 0, 4)
    assert half == ShownWindow(next(w for n, w in enumerate(learned()[:4]) if n not in replaced), 1)

    late = shown_window(job(), rounds(lambda step: 1.0 if step < 2 else 0.0), 3)
    assert late == ShownWindow(learned()[8], 3)


@pytest.mark.parametrize(("share", "steps"), [(1.0, 3), (0.0, 0)])
def test_where_no_step_learned_from_the_text_none_is_told(share, steps):
    assert shown_window(job(), rounds(lambda step: share), steps) == ShownWindow(learned()[0], None)


def test_of_a_stream_nobody_can_tell_the_step():
    assert shown_window(job(stream=object()), None, 3).step is None
