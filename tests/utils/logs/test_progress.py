"""One line of progress: drawn rarely enough, never wider than the terminal, with the time that the command takes."""

import io
import re
from itertools import pairwise

import pytest

from utils.logs import progress
from utils.logs.progress import Progress

ESCAPES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """Says that it is a terminal, as the child of a notebook does."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def draws(stream: io.StringIO) -> list[str]:
    """Return the texts that the bar's line showed, one after the other."""
    plain = ESCAPES.sub("", stream.getvalue()).replace("\n", "\r")
    return [line.rstrip() for line in plain.split("\r") if line.strip()]


def run_until(step: int, total: int, stream, *, deadline: float | None = None, after: dict | None = None) -> Progress:
    """A step every second."""
    clock = Clock()
    display = Progress(stream, clock=clock, deadline=None if deadline is None else clock.now + deadline)
    display.time_left.expect({"step": total}, after or {})
    task = display.begin("training", total, "step")
    for done in range(1, step + 1):
        clock.now += 1.0
        display.update(task, done)
    return display


def test_a_status_line_has_step_share_and_time_left():
    stream = io.StringIO()
    run_until(120, 1000, stream)
    assert stream.getvalue().splitlines() == [
        "training: step 60/1,000 (6.0%), 15 min 40 s left",
        "training: step 120/1,000 (12.0%), 14 min 40 s left",
    ]


def test_a_limit_that_comes_before_the_end_is_told_with_the_step_it_comes_at():
    stream = io.StringIO()
    run_until(120, 1000, stream, deadline=600)
    assert stream.getvalue().splitlines()[-1] == (
        "training: step 120/1,000 (12.0%), 8 min 00 s left, limit in 8 min 00 s, about at step 600"
    )


@pytest.mark.parametrize(("columns", "limited"), [(40, False), (80, True), (400, True)])
def test_a_wide_terminal_shows_more_than_a_narrow_one(monkeypatch, columns, limited):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    run_until(12101, 25_000, stream, deadline=50_000)
    line = draws(stream)[-1]
    assert len(line) < min(columns, 120)
    assert line.startswith("training 121") and "3:3" in line and ("limit in 10:3" in line) == limited


@pytest.mark.parametrize(("kind", "most", "least"), [("terminal", 520, 400), ("batch", 60, 40)])
def test_the_display_alone_is_bounded_over_100_hours(monkeypatch, kind, most, least):
    monkeypatch.setattr(progress, "BAR_DRAWS", 500)
    monkeypatch.setattr(progress, "STATUS_LINES", 50)
    if kind == "batch":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    clock, stream = Clock(), Terminal()
    display = Progress(stream, clock=clock)
    display.time_left.expect({"step": 10_000}, {})
    task = display.begin("training", 10_000, "step")
    for step in range(1, 10_001):
        clock.now += 36.0
        display.update(task, step)
    display.close()
    assert least < len(draws(stream)) < most
    assert len(stream.getvalue().encode()) < 300 * most
    assert ("\r" in stream.getvalue()) == (kind == "terminal")


def test_a_terminal_is_drawn_on_at_most_every_two_seconds_and_a_file_every_minute():
    for stream, interval in ((Terminal(), 2.0), (io.StringIO(), 60.0)):
        clock, drawn = Clock(), []
        display = Progress(stream, clock=clock)
        task = display.begin("training", 10_000, "step")
        for step in range(1, 3000):
            clock.now += 0.1
            before = stream.tell()
            display.update(task, step)
            if stream.tell() > before:
                drawn.append(clock.now)
        gaps = [b - a for a, b in pairwise(drawn)]
        assert min(gaps) >= interval - 1e-6 and max(gaps) < interval + 0.2


def test_a_line_of_the_log_puts_the_next_status_line_off():
    clock, stream = Clock(), io.StringIO()
    display = Progress(stream, clock=clock)
    task = display.begin("training", 1000, "step")
    for step in range(1, 100):
        clock.now += 1.0
        display.update(task, step)
        if step == 50:
            display.line_written()
    assert stream.getvalue() == ""


def test_what_is_quickly_done_is_not_shown():
    clock, stream = Clock(), Terminal()
    display = Progress(stream, clock=clock)
    clock.now += 100.0
    with display.over("student on held-out text", 4, "student window") as note:
        for _ in range(4):
            clock.now += 0.4
            note(1)
    assert stream.getvalue() == ""


def test_an_evaluation_is_shown_in_place_of_training_and_is_no_part_of_its_pace():
    clock, stream = Clock(), io.StringIO()
    display = Progress(stream, clock=clock)
    display.time_left.expect({"step": 100, "student window": 20}, {"student window": 10})
    task = display.begin("training", 100, "step")
    for step in range(1, 11):
        clock.now += 1.0
        display.update(task, step)
    with display.over("student on held-out text", 10, "student window") as note:
        for _ in range(10):
            clock.now += 30.0
            note(1)
    clock.now += 1.0
    display.update(task, 11)
    assert display.seconds_left() == pytest.approx(89 + 20 * 30)
    assert stream.getvalue().splitlines()[0] == "student on held-out text: window 2/10 (20.0%), 15 min 30 s left"


def test_before_training_only_the_time_of_the_task_is_known():
    clock, stream = Clock(), io.StringIO()
    display = Progress(stream, clock=clock)
    with display.over("teacher on held-out text", 10, "teacher window") as note:
        for _ in range(3):
            clock.now += 30.0
            note(1)
    assert stream.getvalue() == "teacher on held-out text: window 2/10 (20.0%), 4 min 00 s for this\n"
    assert display.seconds_left() is None


def test_work_can_be_ended_between_two_parts():
    class Ended(BaseException):
        pass

    parts = []

    def check() -> None:
        if len(parts) == 2:
            raise Ended

    display = Progress(io.StringIO(), check=check)
    with pytest.raises(Ended), display.over("samples", 5, "token") as note:
        for part in range(5):
            parts.append(part)
            note(1)
    assert parts == [0, 1]


def test_no_line_of_the_bar_is_wider_than_80_columns():
    clock, stream = Clock(), Terminal()
    display = Progress(stream, clock=clock, deadline=clock.now + 20_000)
    display.time_left.expect({"step": 250}, {})
    task = display.begin("a label of many words " * 3, 250, "step")
    for step in range(1, 251):
        clock.now += 100.0
        display.update(task, step)
    display.close()
    assert max(map(len, draws(stream))) < 80
