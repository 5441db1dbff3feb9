"""The windows of a step that the student writes itself: as many as the share says, the same in every process."""

from itertools import pairwise

import pytest

from utils.on_policy.slots import own_slots


@pytest.mark.parametrize("windows", [1, 3, 8, 17])
def test_a_share_of_zero_is_no_slot_and_of_one_is_every_slot(windows):
    for step in range(50):
        assert own_slots(0.0, step, windows) == []
        assert own_slots(1.0, step, windows) == list(range(windows))


@pytest.mark.parametrize(("share", "windows"), [(0.1, 4), (0.5, 8), (0.37, 3), (0.9, 16)])
def test_the_share_is_right_in_the_mean_and_nearly_right_in_every_step(share, windows):
    counts = [len(own_slots(share, step, windows)) for step in range(1000)]
    assert abs(sum(counts) / 1000 - share * windows) < 0.01
    assert max(counts) - min(counts) <= 1


def test_slots_are_different_ones_spread_over_the_step():
    for step in range(100):
        slots = own_slots(0.5, step, 16)
        assert len(set(slots)) == 8 and slots == sorted(slots) and max(slots) < 16
        assert all(1 <= later - earlier <= 3 for earlier, later in pairwise(slots))


def test_over_many_steps_every_slot_has_its_turn():
    seen = {slot for step in range(40) for slot in own_slots(0.2, step, 8)}
    assert seen == set(range(8))
