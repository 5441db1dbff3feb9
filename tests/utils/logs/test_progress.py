"""One line of progress: everything on it that there is room for, drawn rarely enough."""

import io
from itertools import pairwise

import pytest

from utils.logs.progress import Progress, status_of


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
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


def record(**changes) -> dict:
    def term(raw: float, weight: float) -> dict:
        return {"raw": raw, "weight": weight, "weighted": raw * weight, "count": 9}

    return {
        "step": 100,
        "loss": 1.55401,
        "lr": 2.15e-3,
        "tokens_per_second": 7059.4,
        "peak_memory_mb": 13517.0,
        "terms": {"kd": term(0.3669, 0.7), "span": term(0.02, 0.0), "lm": term(4.3239, 0.3)},
        **changes,
    }


def last_draw(stream: io.StringIO) -> str:
    return stream.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[-1]


def run_until(step: int, total: int, stream, deadline: float | None = None) -> None:
    """A step every second."""
    clock = Clock()
    display = Progress(total, stream=stream, clock=clock, deadline=None if deadline is None else clock.now + deadline)
    for done in range(1, step + 1):
        display.update(done, status_of(record()))
        clock.now += 1.0
    display.close()


def test_the_status_has_loss_terms_with_a_weight_speed_learning_rate_and_memory():
    shown = {"loss": "1.55", "kd": "0.367", "lm": "4.32", "tok/s": "7.1k", "lr": "2.2e-03", "mem": "13.2G"}
    assert status_of(record()) == shown and list(status_of(record())) == list(shown)
    other = status_of(record(loss=None, tokens_per_second=85.2, peak_memory_mb=None))
    assert other["loss"] == "-" and other["tok/s"] == "85" and "mem" not in other


def test_a_status_line_has_everything_on_it():
    stream = io.StringIO()
    run_until(121, 1000, stream, deadline=7200)
    assert stream.getvalue().splitlines()[-1] == (
        "step 121/1,000 (12.1%), 2 min 00 s, 14 min 39 s left, limit in 1 h 58 min, "
        "loss 1.55, kd 0.367, lm 4.32, tok/s 7.1k, lr 2.2e-03, mem 13.2G"
    )


def test_a_limit_that_comes_before_the_end_is_told_with_the_step_it_comes_at():
    stream = io.StringIO()
    run_until(121, 1000, stream, deadline=600)
    assert "14 min 39 s left, limit in 8 min 00 s, about at step 601," in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(("columns", "shown"), [(80, 0), (100, 1), (140, 2), (400, 2)])
def test_a_wide_terminal_shows_more_than_a_narrow_one(monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    run_until(12101, 25_000, stream, deadline=50_000)
    line = last_draw(stream)
    assert len(line) <= min(columns, 140) - 1
    assert "12101/25000 3:34:59 left limit 10:31:40 loss 1.55 kd 0.367 lm 4.32" in line
    assert sum(word in line for word in ("lr 2.2e-03", "mem 13.2G")) == shown


def test_at_80_columns_all_of_it_is_there_in_a_run_of_an_hour():
    stream = Terminal()
    run_until(121, 1000, stream)
    assert last_draw(stream).endswith("121/1000 14:39 left loss 1.55 kd 0.367 lm 4.32 tok/s 7.1k lr 2.2e-03")


@pytest.mark.parametrize(("kind", "most", "least"), [("terminal", 5200, 4000), ("batch", 1500, 1000)])
def test_the_display_alone_is_bounded_over_100_hours(monkeypatch, kind, most, least):
    if kind == "batch":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    clock, stream = Clock(), Terminal()
    display = Progress(100_000, stream=stream, clock=clock)
    for step in range(1, 100_001):
        clock.now += 3.6
        display.update(step, {"loss": "3.21", "tok/s": "12.3k"})
    display.close()
    draws = stream.getvalue().count("\r" if kind == "terminal" else "\n")
    assert least < draws < most
    assert len(stream.getvalue().encode()) < 130 * most
    assert ("\r" in stream.getvalue()) == (kind == "terminal")


def test_a_terminal_is_drawn_on_at_most_every_two_seconds_and_a_file_every_thirty(monkeypatch):
    for stream, interval in ((Terminal(), 2.0), (io.StringIO(), 30.0)):
        clock, drawn = Clock(), []
        display = Progress(10_000, stream=stream, clock=clock)
        for step in range(1, 3000):
            clock.now += 0.1
            before = stream.tell()
            display.update(step)
            if stream.tell() > before:
                drawn.append(clock.now)
        gaps = [b - a for a, b in pairwise(drawn)]
        assert min(gaps) >= interval - 1e-6 and max(gaps) < interval + 0.2


def test_the_time_left_follows_the_steps_not_what_came_before_them():
    clock, stream = Clock(), io.StringIO()
    display = Progress(1000, 400, stream=stream, clock=clock)
    clock.now += 3600  # the teacher is measured
    for step in range(401, 501):
        display.update(step)
        clock.now += 1.0
    assert stream.getvalue().splitlines()[-1] == "step 491/1,000 (49.1%), 1 min 30 s, 8 min 29 s left"


def test_no_line_of_the_bar_is_wider_than_80_columns():
    clock, stream = Clock(), Terminal()
    display = Progress(25_000, stream=stream, clock=clock)
    for step in range(1, 25_001):
        clock.now += 1.0
        display.update(step, {"loss": "3.2101", "tokens/s": "123,456", "something": "x" * 100})
    display.close()
    assert max(len(draw) for draw in stream.getvalue().replace("\n", "\r").split("\r")) < 80
