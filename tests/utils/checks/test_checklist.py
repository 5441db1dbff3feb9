"""The checklist as it is printed."""

import io
import sys
from typing import NamedTuple

import pytest

from utils.checks.checklist import Check, Measured, Row, above, at_least, at_most, below, equal_to, near, run, within
from utils.errors import UserError


def measured(passed: bool, doubtful: bool = False) -> Check:
    """Return the check of a measurement that is judged already."""
    result = Measured("3", "2 to 4", passed, doubtful)
    return Row("name", lambda: result, hint="do this").check()


def test_value_and_allowed_range_are_printed_and_the_hint_only_on_failure(capsys):
    assert run(["Title", measured(True)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["Title", "  ✓ name: 3  [2 to 4]"]
    assert run([measured(True), measured(False)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  ✗ name: 3  [2 to 4]", "      → do this"]
    assert lines[-2].startswith("1 of 2 checks passed") and lines[-1] == "Not ready: name."


def test_what_may_be_meant_so_is_shown_with_its_hint_and_fails_nothing(capsys):
    assert run([measured(True), measured(True, doubtful=True)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  ? name: 3  [2 to 4]", "      → do this"]
    assert lines[-2].startswith("2 of 2 checks passed") and lines[-1] == "Ready to train, if this is meant so: name."


def test_a_terminal_without_those_characters_gets_words(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run([measured(True), measured(False)])
    out.flush()
    text = out.buffer.getvalue().decode()
    assert "  ok name: 3" in text and "  FAILED name: 3" in text and "-> do this" in text


def test_a_user_error_in_a_check_is_its_value_and_between_checks_goes_through():
    def fails() -> Measured:
        raise UserError("no such\nfolder")

    done = Row("name", fails, hint="hint").check()
    assert done.value == "no such folder" and not done.passed

    def items():
        yield measured(True)
        raise UserError("mistake")

    with pytest.raises(UserError):
        run(items())


class Numbers(NamedTuple):
    first: float
    second: tuple[float, ...]


def row(first: float, second: tuple[float, ...]) -> Check:
    """Return the check of two numbers under ranges of their own."""
    limits = {"first": within(0.5, 2, "nats"), "second": below(1e-4)}
    shows = "{first:.1f} and {second[0]:.0e}"
    return Row("name", lambda: Numbers(first, second), shows=shows, allowed=limits, hint="do this").check()


def test_numbers_are_shown_by_the_template_and_judged_by_every_range():
    done = row(1.0, (1e-5, 2e-5))
    assert done == Check("name", "1.0 and 1e-05", "0.5 to 2 nats, below 1e-4", True, "do this")
    assert not row(3.0, (1e-5,)).passed
    assert not row(1.0, (1e-5, 1e-3)).passed


@pytest.mark.parametrize(
    ("limits", "text", "inside", "outside"),
    [
        (within(0.05, 2), "0.05 to 2", (0.05, 1.0, 2.0), (0.04, 2.1)),
        (below(1e-2), "below 1e-2", (0.0, -1.0), (1e-2, 1.0)),
        (above(0), "above 0", (1e-9,), (0.0, -1.0)),
        (at_least(0.95, "ln V"), "0.95 ln V or more", (0.95, 3.0), (0.94,)),
        (at_most(2), "2 or less", (2.0, -3.0), (2.1,)),
        (equal_to(6), "6", (6.0,), (5.0, 7.0)),
        (near(1, 0.05), "within 0.05 of 1", (0.96, 1.04), (0.9, 1.1)),
    ],
)
def test_a_range_admits_what_it_says_and_never_nan(limits, text, inside, outside):
    assert limits.text == text
    assert all(limits.admits(number) for number in inside)
    assert not any(limits.admits(number) for number in (*outside, float("nan")))


def test_a_measurement_gets_the_subjects_that_its_row_names():
    add = Row("sum", lambda a, b: Measured(f"{a + b}", "any", passed=True), on=("b", "a"))
    assert add.check({"a": "1", "b": "2", "c": "3"}).value == "21"
