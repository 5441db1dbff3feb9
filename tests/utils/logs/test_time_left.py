"""The time left is that of the whole command, from what was measured."""

import pytest

from utils.logs.time_left import TimeLeft


def test_nothing_is_known_before_the_first_step_and_of_nothing():
    time_left = TimeLeft()
    assert time_left.seconds() is None
    time_left.expect({"step": 10, "student window": 4}, {})
    time_left.done("student window", 2, 2.0)
    assert time_left.seconds() is None
    time_left.done("step", 1, None)  # the first step is no measure
    assert time_left.seconds() is None
    time_left.done("step", 1, 3.0)
    assert time_left.seconds() == pytest.approx(8 * 3.0 + 2 * 1.0)


def test_every_stage_counts():
    time_left = TimeLeft()
    time_left.done("teacher window", 10, 20.0)
    time_left.done("student window", 10, 10.0)
    training = {"step": 100, "student window": 20, "token": 30}
    after = {"student window": 10, "agreement window": 10, "token": 10, "step alone": 50}
    time_left.expect(training, after)
    time_left.done("step", 1, 4.0)
    windows = 30 * 1.0 + 10 * (2.0 + 1.0)
    assert time_left.seconds() == pytest.approx((99 + 50) * 4.0 + windows)  # nothing is known of tokens

    time_left.done("token", 10, 1.0)
    time_left.done("step alone", 10, 20.0)
    assert time_left.seconds() == pytest.approx(99 * 4.0 + 40 * 2.0 + windows + 30 * 0.1)


def test_a_limit_ends_training_and_not_what_follows_it():
    time_left = TimeLeft()
    time_left.expect({"step": 100}, {"student window": 10})
    time_left.done("student window", 0, 0.0)
    time_left.paces["student window"].units, time_left.paces["student window"].seconds = 1, 2.0
    time_left.done("step", 1, 5.0)
    assert time_left.seconds(limit=60.0) == pytest.approx(60.0 + 20.0)
    assert time_left.seconds(limit=-1.0) == pytest.approx(20.0)


def test_work_of_training_is_done_before_that_after_it():
    time_left = TimeLeft()
    time_left.expect({"student window": 4}, {"student window": 6})
    time_left.done("student window", 4, 4.0)
    assert (time_left.training["student window"], time_left.after["student window"]) == (0, 6)
    time_left.done("student window", 7, 7.0)
    assert time_left.after["student window"] == 0
