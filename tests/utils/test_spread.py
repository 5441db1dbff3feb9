"""Items that stand for many: as many as are asked for, from the first to the last."""

import pytest

from utils.spread import spread


@pytest.mark.parametrize("count", range(40))
def test_items_are_spread_from_the_first_to_the_last(count):
    chosen = spread(range(count), 16)
    assert len(chosen) == len(set(chosen)) == min(count, 16)
    assert chosen == sorted(chosen)
    assert not count or (chosen[0], chosen[-1]) == (0, count - 1)
