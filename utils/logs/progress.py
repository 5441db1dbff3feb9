"""The one progress display of a run: a bar of one line where a person may watch, else a status line now and then.

A saved notebook keeps every byte a child process wrote, carriage returns included, and its child sees
a terminal of 80 x 24, so `isatty()` does not tell whether a person watches. Hence one display, drawn at
most every two seconds on a terminal, a status line every 30 s elsewhere, and both slow down in a long
run, so that what a run writes is bounded whatever its length.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from tqdm import tqdm

BAR_SECONDS, LINE_SECONDS = 2.0, 30.0
BAR_DRAWS, STATUS_LINES = 5000, 1500
"""How often the display is drawn at most: the interval grows with the expected length of the run."""

WIDEST, NARROWEST_BAR = 140, 3
"""Columns of the whole line, at most, and of the bar in it, at least."""


def person_may_watch(stream: IO[str]) -> bool:
    """Whether a moving bar makes sense on `stream`: a terminal, and not a notebook that runs unattended.

    `KAGGLE_KERNEL_RUN_TYPE=Batch` is Kaggle's "Save & Run All".
    """
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch" or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


class Progress:
    """The display.

    The interval between two draws is the larger of `BAR_SECONDS` (`LINE_SECONDS`) and the expected
    duration of the run over `BAR_DRAWS` (`STATUS_LINES`): 12 hours cost about 0.5 MB in a notebook.

    Args:
        total: optimizer steps of the run.
        start: steps already done (resume).
        stream: where to draw; None: standard output.
        clock: monotonic seconds.
        deadline: when, by that clock, the run is stopped; None: never.
        unit: what is counted, where it is not optimizer steps.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        deadline: float | None = None,
        unit: str = "step",
    ) -> None:
        self.total, self.start, self.clock, self.deadline, self.unit = total, start, clock, deadline, unit
        self.first: int | None = None
        self.stream = stream if stream is not None else sys.stdout
        self.bar: tqdm | None = None
        self.as_bar = person_may_watch(self.stream)
        self.began = self.drawn = clock()

    def update(self, step: int, status: Mapping[str, str] | None = None) -> None:
        """Say that `step` optimizer steps are done; draws only when it is time.

        Args:
            status: name -> value, the most important first: a narrow terminal shows as many as it has room for.
        """
        now = self.clock()
        if self.first is None:  # time counts from here: what was done before the first step is not its speed
            self.first, self.began, self.drawn = step, now, now
        if now - self.drawn < self._interval(step, now) and step < self.total:
            return
        self.drawn = now
        words = [f"{name} {value}" for name, value in (status or {}).items()]
        if self.as_bar:
            self._draw_bar(step, now, words)
        else:
            self._write_line(step, now, words)

    def close(self) -> None:
        """Leave the display as it stands and end its line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _interval(self, step: int, now: float) -> float:
        shortest, draws = (BAR_SECONDS, BAR_DRAWS) if self.as_bar else (LINE_SECONDS, STATUS_LINES)
        expected = (now - self.began) + self._left(step, now)
        return max(shortest, expected / draws)

    def _left(self, step: int, now: float) -> float:
        """Seconds the remaining steps will take at the pace so far; 0 before there is one."""
        done = step - (self.first or 0)
        return (now - self.began) * (self.total - step) / done if done > 0 else 0.0

    def _draw_bar(self, step: int, now: float, words: list[str]) -> None:
        if self.bar is None:
            # Drawn by our own clock: tqdm's intervals are switched off.
            self.bar = tqdm(
                total=self.total,
                initial=self.start,
                file=self.stream,
                mininterval=0,
                miniters=1,
                delay=1e-9,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {desc}",
            )
        # One column less than there are: a full line folds.
        self.bar.ncols = min(shutil.get_terminal_size().columns, WIDEST) - 1
        times = [f"{tqdm.format_interval(left)} left"] if (left := self._left(step, now)) > 0 else []
        if self.deadline is not None and step < self.total:
            times.append(f"limit {tqdm.format_interval(max(self.deadline - now, 0))}")
        room = self.bar.ncols - len(f"100% || {step}/{self.total} ") - NARROWEST_BAR
        shown = ""
        for word in [*times, *words]:
            if len(shown) + len(word) + 1 > room:
                break
            shown = f"{shown} {word}" if shown else word
        self.bar.desc = shown
        self.bar.update(step - self.bar.n)

    def _write_line(self, step: int, now: float, words: list[str]) -> None:
        left = self._left(step, now)
        parts = [f"{self.unit} {step:,}/{self.total:,} ({step / max(self.total, 1):.1%})", duration(now - self.began)]
        if left > 0:
            parts.append(f"{duration(left)} left")
        if self.deadline is not None and step < self.total:
            limit = max(self.deadline - now, 0)
            reached = step + int((self.total - step) * limit / left) if 0 < limit < left else None
            parts.append(f"limit in {duration(limit)}" + (f", about at step {reached:,}" if reached else ""))
        print(", ".join([*parts, *words]), file=self.stream, flush=True)


def status_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What the display shows of a logged step: loss, raw terms that have a weight, speed, learning rate, memory."""
    terms = {name: term["raw"] for name, term in record["terms"].items() if term["weight"]}
    status = {name: _short(value) for name, value in {"loss": record.get("loss"), **terms}.items()}
    if (speed := record.get("tokens_per_second")) is not None:
        status["tok/s"] = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    status["lr"] = f"{record['lr']:.1e}"
    if (memory := record.get("peak_memory_mb")) is not None:
        status["mem"] = f"{memory / 1024:.1f}G" if memory >= 1000 else f"{memory:.0f}M"
    return status


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`"2 h 05 min"`, `"3 min 20 s"`, `"12 s"`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
