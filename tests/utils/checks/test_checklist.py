"""How the checklist is printed."""

import io
import sys

import pytest

from utils.checks.checklist import DOUBTFUL, check, run
from utils.errors import UserError


@check("name", "do this")
def measured(passed: bool) -> tuple:
    return "3", "2 to 4", passed


def test_value_and_allowed_range_are_printed_and_the_hint_only_on_failure(capsys):
    assert run(["Title", measured(True)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["Title", "  ✓ name: 3  [2 to 4]"]
    assert run([measured(True), measured(False)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["  ✗ name: 3  [2 to 4]", "      → do this"]
    assert lines[-2].startswith("1 of 2 checks passed") and lines[-1] == "Not ready: name."


def test_what_may_be_meant_so_is_shown_with_its_hint_and_fails_nothing(capsys):
    assert run([measured(True), measured(DOUBTFUL)]) == 0
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
    @check("name", "hint")
    def fails() -> tuple:
        raise UserError("no such\nfolder")

    assert fails().value == "no such folder" and not fails().passed

    def items():
        yield measured(True)
        raise UserError("mistake")

    with pytest.raises(UserError):
        run(items())
