from pathlib import Path

import pytest

from utils.paths import user_path


@pytest.mark.parametrize(
    ("name", "meant"), [("~/a", "/home/me/a"), ("a/~", "a/~"), (Path("a"), "a"), ("~nobody-of-that-name/a",) * 2]
)
def test_a_home_is_filled_in_where_it_is_known(monkeypatch, name, meant):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert user_path(name) == Path(meant)
