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
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from tqdm import tqdm

BAR_SECONDS = 2.0
LINE_SECONDS = 30.0
"""Seconds between two draws, at least, of the bar and of the status line."""

BAR_DRAWS = 5000
STATUS_LINES = 1500
"""How often each is drawn in a run, at most: the interval grows with the expected length of the run."""

WIDEST = 140
"""Columns of the whole line, at most."""

NARROWEST_BAR = 3
"""Columns of the bar in it, at least."""


def person_may_watch(stream: IO[str]) -> bool:
    """Return whether a moving bar makes sense on `stream`: a terminal, and not a notebook that runs unattended.

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
        self.total = total
        self.start = start
        self.stream = stream if stream is not None else sys.stdout
        self.clock = clock
        self.deadline = deadline
        self.unit = unit

        self.first: int | None = None
        self.bar: tqdm | None = None
        self.as_bar = person_may_watch(self.stream)
        self.began = clock()
        self.drawn = self.began

    def update(self, step: int, status: Mapping[str, str] | None = None) -> None:
        """Say that `step` optimizer steps are done; draws only when it is time.

        Args:
            status: name -> value, the most important first: a narrow terminal shows as many as it has room for.
        """
        now = self.clock()
        # Time counts from here: what was done before the first step is not its speed.
        if self.first is None:
            self.first = step
            self.began = now
            self.drawn = now

        is_last = step >= self.total
        if now - self.drawn < self._interval(step, now) and not is_last:
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
        """Return the seconds between two draws."""
        expected = (now - self.began) + self._seconds_left(step, now)
        if self.as_bar:
            return max(BAR_SECONDS, expected / BAR_DRAWS)
        return max(LINE_SECONDS, expected / STATUS_LINES)

    def _seconds_left(self, step: int, now: float) -> float:
        """Return the seconds the remaining steps will take at the pace so far; 0 before there is one."""
        done = step - (self.first or 0)
        if done <= 0:
            return 0.0
        return (now - self.began) * (self.total - step) / done

    # --- a bar ------------------------------------------------------------------------------------------------------

    def _draw_bar(self, step: int, now: float, words: Sequence[str]) -> None:
        """Draw the bar with the times and as many of `words` as fit into the terminal."""
        if self.bar is None:
            self.bar = self._new_bar()
        # One column less than there are: a full line folds.
        self.bar.ncols = min(shutil.get_terminal_size().columns, WIDEST) - 1

        times = []
        seconds_left = self._seconds_left(step, now)
        if seconds_left > 0:
            times.append(f"{tqdm.format_interval(seconds_left)} left")
        if self.deadline is not None and step < self.total:
            times.append(f"limit {tqdm.format_interval(max(self.deadline - now, 0))}")

        columns = self.bar.ncols - len(f"100% || {step}/{self.total} ") - NARROWEST_BAR
        self.bar.desc = _first_that_fit([*times, *words], columns)
        self.bar.update(step - self.bar.n)

    def _new_bar(self) -> tqdm:
        """Return a bar that is drawn by our own clock: tqdm's intervals are switched off."""
        return tqdm(
            total=self.total,
            initial=self.start,
            file=self.stream,
            mininterval=0,
            miniters=1,
            delay=1e-9,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {desc}",
        )

    # --- a status line ----------------------------------------------------------------------------------------------

    def _write_line(self, step: int, now: float, words: Sequence[str]) -> None:
        """Write one line that stays."""
        share = step / max(self.total, 1)
        parts = [f"{self.unit} {step:,}/{self.total:,} ({share:.1%})", duration(now - self.began)]

        seconds_left = self._seconds_left(step, now)
        if seconds_left > 0:
            parts.append(f"{duration(seconds_left)} left")
        if self.deadline is not None and step < self.total:
            parts.append(self._limit(step, max(self.deadline - now, 0), seconds_left))
        print(", ".join([*parts, *words]), file=self.stream, flush=True)

    def _limit(self, step: int, limit: float, seconds_left: float) -> str:
        """Return the seconds until the run is stopped, and the step it will have reached if that is not the last."""
        text = f"limit in {duration(limit)}"
        if 0 < limit < seconds_left:
            reached = step + int((self.total - step) * limit / seconds_left)
            # Not "step 0", which a run that has only begun would be said to reach.
            if reached:
                text += f", about at step {reached:,}"
        return text


def _first_that_fit(words: Sequence[str], columns: int) -> str:
    """Return the first words, with spaces between, up to the first that does not fit."""
    line = ""
    for word in words:
        if len(line) + len(word) + 1 > columns:
            break
        line = f"{line} {word}" if line else word
    return line


def status_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what the display shows of a logged step: loss, raw terms that have a weight, speed, rate, memory."""
    status = {"loss": _short(record.get("loss"))}
    for name, term in record["terms"].items():
        if term["weight"]:
            status[name] = _short(term["raw"])

    # Units short, for a narrow terminal.
    speed = record.get("tokens_per_second")
    if speed is not None:
        status["tok/s"] = f"{speed / 1000:.1f}k" if speed >= 1000 else f"{speed:.0f}"
    status["lr"] = f"{record['lr']:.1e}"
    memory = record.get("peak_memory_mb")
    if memory is not None:
        status["mem"] = f"{memory / 1024:.1f}G" if memory >= 1000 else f"{memory:.0f}M"
    return status


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds as `"2 h 05 min"`, `"3 min 20 s"`, `"12 s"`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
