"""Advice that fails costs the advice, in one line, and never the run."""

import json

import pytest

from utils.advice import advice, reason
from utils.errors import RunError, UserError
from utils.logs.step_logger import StepLogger
from utils.report import html, report
from utils.run_layout import CURVES, REPORT_HTML, REPORT_MD

RESULTS = {"student": {"bits_per_byte": 1.0}, "run": {"steps": 2}}


def test_what_fails_is_one_line_without_a_traceback(caplog):
    with advice("forecast"):
        raise AttributeError("no\nsetter")
    [record] = caplog.records
    assert record.getMessage() == "no forecast, because of AttributeError: no setter" and record.exc_info is None


@pytest.mark.parametrize("error", [UserError("a mistake"), RunError("a full disk"), KeyboardInterrupt()])
def test_what_says_itself_what_is_wrong_passes(error):
    with pytest.raises(type(error)), advice("forecast"):
        raise error


def test_a_reason_is_short_and_never_empty():
    assert reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 1000))) < 330


@pytest.mark.parametrize(
    ("function", "lost"),
    [("draw_curves", CURVES), ("markdown", REPORT_MD), ("curves_as_svg", "curves in report.html")],
)
def test_a_report_without_what_cannot_be_drawn_is_still_written(function, lost, tmp_path, monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("cannot")

    monkeypatch.setattr(report, function, broken)
    report.write_report(tmp_path, RESULTS)
    assert json.loads((tmp_path / "evaluation_report.json").read_text())["run"] == {"steps": 2}
    assert (tmp_path / REPORT_HTML).is_file() and f"no {lost}, because of RuntimeError: cannot" in caplog.text


def test_a_page_that_cannot_be_made_leaves_the_other_files(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(html, "page", lambda *args, **options: 1 / 0)
    report.write_report(tmp_path, RESULTS)
    assert (tmp_path / REPORT_MD).is_file() and "no report.html, because of ZeroDivisionError" in caplog.text


def test_a_summary_that_cannot_be_printed_ends_nothing(monkeypatch, caplog):
    monkeypatch.setattr(report, "summary_table", lambda results: 1 / 0)
    report.print_summary(RESULTS)
    assert "no summary on the console" in caplog.text


class BrokenDisplay:
    """Cannot estimate how long the run takes."""

    calls = 0
    panel = None

    def begin(self, *args, **options):
        return object()

    def update(self, task, done):
        self.calls += 1
        raise OverflowError("too long")

    def close(self):
        pass


def test_a_progress_display_that_fails_is_given_up_once(caplog):
    display = BrokenDisplay()
    logger = StepLogger(None, 10, progress=display)
    logger.begin(0)
    for step in (1, 2, 3):
        logger.progress(step)
    assert display.calls == 1 and caplog.text.count("no further progress display") == 1
