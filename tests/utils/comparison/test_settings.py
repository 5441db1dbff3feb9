"""Settings that differ are named, and those apart that no result depends on."""

import json

import pytest

from tests.utils.comparison.conftest import shown_of
from utils.comparison.runs import read_runs
from utils.comparison.settings import differing_settings


def test_settings_that_differ_are_named_and_the_folders_own_are_not(place):
    ramp = {"points": [[0, 0.1], [1, 0.7]]}
    common = {"training": {"seed": 1}, "resume": "auto"}
    one = place("a", 1.0, settings={**common, "curriculum": {"kd": {"weight": 0.7}}, "output_dir": "x"})
    two = place("b", 1.0, settings={**common, "curriculum": {"kd": {"weight": ramp}}, "output_dir": "y", "new": 1})
    three = place("c", 1.0)
    found = differing_settings(read_runs([one, two, three]))
    assert found == {"curriculum.kd.weight": ["0.7", json.dumps(ramp), "?"]}


def test_what_no_result_depends_on_is_named_apart(place, tmp_path, capsys):
    common = {"training": {"seed": 1, "save_every": 10}, "logging": {"every": 1}}
    other = {"training": {"seed": 1, "save_every": 20}, "logging": {"every": 2}}
    names = [place("a", 1.0, settings=common), place("b", 0.9, settings=other)]
    assert differing_settings(read_runs(names)) == {}
    shown = shown_of(names, tmp_path, capsys)
    assert "without an effect on the result: logging.every, training.save_every" in shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["/home/me/models/small", "/home/me/models/large"], ["…/small", "…/large"]),
        ([["/a/b/x.txt", "/a/b/y.txt"], ["/a/b/c/z.txt"]], ["…/x.txt, …/y.txt", "…/c/z.txt"]),
        (["owner/small", "owner/large"], ["…/small", "…/large"]),
        (["owner/small", "/a/large"], ["owner/small", "/a/large"]),
        (["/a/x", "/b/x"], ["/a/x", "/b/x"]),
        ([None, "/a/x"], ["null", "/a/x"]),
        ([0.1, 0.2], ["0.1", "0.2"]),
    ],
)
def test_folders_that_all_values_share_are_cut(place, values, shown):
    names = [place(f"r{number}", 1.0, settings={"data": {"train": value}}) for number, value in enumerate(values)]
    assert differing_settings(read_runs(names)) == {"data.train": shown}
