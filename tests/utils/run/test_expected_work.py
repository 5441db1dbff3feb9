"""Everything that a command does is in its time left."""

from types import SimpleNamespace

import pytest

from utils.config.settings import EvaluationConfig
from utils.logs.time_left import TimeLeft
from utils.run.expected_work import expect_training


def expected(done: int = 0, *, has_teacher: bool = True, processes: int = 1, **evaluation) -> TimeLeft:
    """Return the work that is expected of a run with 100 steps, 10 windows and two samples of 8 tokens."""
    job = SimpleNamespace(
        config=SimpleNamespace(
            evaluation=EvaluationConfig(samples=2, new_tokens=8, **evaluation),
            compares_without_teacher=evaluation.get("without_teacher", False),
        ),
        held_out=SimpleNamespace(windows=range(10)),
        accelerator=SimpleNamespace(num_processes=processes),
    )
    time_left = TimeLeft()
    expect_training(time_left, job, SimpleNamespace(total_steps=100), done, has_teacher=has_teacher)
    return time_left


def test_a_training_has_its_evaluations_and_is_followed_by_the_final_one():
    time_left = expected(every=25)
    assert time_left.training == {"step": 100, "student window": 40, "token": 32}
    assert time_left.after == {"student window": 10, "agreement window": 10, "token": 16, "model file": 2}


@pytest.mark.parametrize(("done", "evaluations"), [(0, 3), (29, 3), (30, 2), (99, 0)])
def test_what_earlier_sessions_did_is_not_expected_again(done, evaluations):
    time_left = expected(done, every=30)
    assert (time_left.training["step"], time_left.training["student window"]) == (100 - done, 10 * evaluations)
    assert time_left.after["student window"] == 20  # the last step is no multiple of 30


def test_windows_are_shared_by_the_processes():
    assert expected(processes=4).after["agreement window"] == 3


def test_the_comparison_is_a_second_training_and_expects_no_third():
    time_left = expected(without_teacher=True, every=50)
    assert time_left.after["step alone"] == 100
    assert time_left.after["student window"] == 10 + (20 + 10 + 10)
    alone = expected(has_teacher=False, without_teacher=True, every=50)
    assert alone.training == {"step alone": 100, "student window": 20, "token": 16}
    assert "step alone" not in alone.after and not alone.after["agreement window"] and "model file" not in alone.after
