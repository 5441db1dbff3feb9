"""The progress display of a command: a bar of one line where a person may watch, a panel below the cell of a notebook,
else a status line now and then.

A saved notebook keeps every byte a child process wrote, carriage returns included, and its child sees
a terminal of 80 x 24, so `isatty()` does not tell whether a person watches. Hence one line, drawn at
most every two seconds on a terminal, a status line after a minute of silence elsewhere, and both slow down in a long
run, so that what a run writes is bounded whatever its length.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import IO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..machine.jupyter import in_kernel
from .lines import clock_time
from .notebook import Panel
from .terminal import console, line_columns, person_may_watch
from .time_left import STEPS, Kind, TimeLeft

BAR_SECONDS = 2.0
LINE_SECONDS = 60.0
"""Seconds between two draws, at least, of the bar and of the status line."""

BAR_DRAWS = 5000
STATUS_LINES = 500
"""How often each is drawn in a run, at most: the interval grows with the expected length of the run."""

NARROWEST_BAR = 3
WIDEST_BAR = 40
"""Columns of the bar."""


@dataclass
class Task:
    """A stretch of work that is shown: training, or the measurement of a model."""

    label: str
    total: int
    kind: Kind
    unit: str
    done: int
    """Units that are done, those of earlier sessions included."""
    began: float
    noted: float
    """Time at which `done` was last set; the time of tasks within this one moves it on."""
    is_begun: bool = False
    """Something was noted."""


class Bar:
    """The one line below the log that is drawn anew, by rich."""

    def __init__(self, on: Console) -> None:
        self.on = on
        self._live: Live | None = None

    def show(self, before: str, share: float, after: str) -> None:
        """Draw the line: words, a bar that is filled to a share, words."""
        columns = line_columns() - len(before) - len(after) - 2
        row = Table.grid(padding=(0, 1))
        cells: list[Text | ProgressBar] = [Text(before, no_wrap=True)]
        if columns >= NARROWEST_BAR:
            cells.append(ProgressBar(total=1.0, completed=share, width=min(columns, WIDEST_BAR)))
        cells.append(Text(after, no_wrap=True))
        row.add_row(*cells)
        self._draw(row)

    def clear(self) -> None:
        """Leave an empty line, which the log goes on above."""
        if self._live is not None:
            self._draw(Text(""))

    def stop(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._draw(Text(""))
            self._live.stop()
            self._live = None

    def _draw(self, content: Table | Text) -> None:
        if self._live is None:
            # Not transient: what is then written moves the cursor up, which a saved notebook does not understand.
            self._live = Live(console=self.on, auto_refresh=False)
            self._live.start()
            # A command that is killed leaves a terminal as it was.
            self.on.show_cursor(True)
        self._live.update(content, refresh=True)


@cache
def terminal_bar() -> Bar:
    """Return the bar of the process's console."""
    return Bar(console())


class Progress:
    """The display of a command, and the time that it still takes.

    Args:
        stream: where to draw; None: standard output, or in the kernel of a notebook a panel below the cell.
        clock: monotonic seconds.
        deadline: when, by that clock, training is stopped; None: never.
        check: called after each part of the work that `over` shows; may raise to end it.
        shown: False: only times are measured, as in all processes but the main one.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        deadline: float | None = None,
        check: Callable[[], None] | None = None,
        shown: bool = True,
    ) -> None:
        self.stream = stream
        self.clock = clock
        self.deadline = deadline
        self.check = check
        self.shown = shown
        self.time_left = TimeLeft()
        self.panel = Panel() if shown and stream is None and in_kernel() else None
        self._tasks: list[Task] = []
        self._drawn = clock()
        self._began = self._drawn

    # --- work -------------------------------------------------------------------------------------------------------

    @contextmanager
    def over(self, label: str, total: int, kind: Kind, unit: str = "window") -> Iterator[Callable[[int], None]]:
        """Show work while the context lasts; yields a function that takes the number of units that were just done."""
        task = self.begin(label, total, kind, unit)

        def note(units: int) -> None:
            self.update(task, task.done + units)
            if self.check is not None:
                self.check()

        try:
            yield note
        finally:
            self.end(task)

    def begin(self, label: str, total: int, kind: Kind, unit: str = "step", done: int = 0) -> Task:
        """Start to show work; a task that is under way is shown again after it.

        Args:
            done: units that an earlier session has done.
        """
        now = self.clock()
        # What is quickly done is not shown at all.
        if not self._tasks:
            self._drawn = now
        task = Task(label, total, kind, unit, done, began=now, noted=now)
        self._tasks.append(task)
        return task

    def update(self, task: Task, done: int) -> None:
        """Note that `done` units of a task are done; draws only when it is time."""
        now = self.clock()
        # The first step has what is only done once, and is no measure of the others.
        is_typical = task.is_begun or task.kind not in STEPS
        self.time_left.done(task.kind, done - task.done, now - task.noted if is_typical else None)
        task.is_begun = True
        task.done = done
        task.noted = now

        if self.shown and now - self._drawn >= self._interval(now):
            self._drawn = now
            if self.panel is not None:
                self._draw_panel(self.panel, task, now)
            elif self._is_bar:
                self._draw_bar(task, now)
            else:
                self._write_line(task, now)

    def end(self, task: Task) -> None:
        """Show a task no longer."""
        if task not in self._tasks:
            return
        self._tasks.remove(task)

        # What lay within another task is no part of that one's pace.
        for outer in self._tasks:
            outer.noted += self.clock() - task.began
        if self.panel is not None:
            self._rest(self.panel)
        elif self.shown and self._is_bar:
            self._bar.clear()

    def line_written(self) -> None:
        """Note that the log has a line about where the run is: no status line is due for a while."""
        if self.panel is None and not self._is_bar:
            self._drawn = self.clock()

    def close(self) -> None:
        """Show nothing any more."""
        self._tasks.clear()
        if self.panel is not None:
            self._rest(self.panel)
        elif self.shown and self._is_bar:
            self._bar.stop()

    # --- time -------------------------------------------------------------------------------------------------------

    def seconds_left(self) -> float | None:
        """Return the seconds that the whole command still takes; None: not known yet."""
        return self.time_left.seconds(self._limit(self.clock()))

    def _limit(self, now: float) -> float | None:
        """Return the seconds until training is stopped; None: it is not."""
        return None if self.deadline is None else max(self.deadline - now, 0.0)

    def _interval(self, now: float) -> float:
        """Return the seconds between two draws."""
        expected = (now - self._began) + (self.seconds_left() or 0.0)
        if self.panel is not None or self._is_bar:
            return max(BAR_SECONDS, expected / BAR_DRAWS)
        return max(LINE_SECONDS, expected / STATUS_LINES)

    def _times(self, task: Task, now: float, written: Callable[[float], str]) -> list[str]:
        """Return what is said of time: what the command still takes, or else this task; and the limit.

        Args:
            written: seconds -> text.
        """
        times = []
        whole = self.time_left.seconds(self._limit(now))
        pace = self.time_left.pace(task.kind)
        if whole is not None:
            times.append(f"{written(whole)} left")
        elif pace is not None:
            times.append(f"{written(pace * (task.total - task.done))} for this")

        limit = self._limit(now)
        if limit is not None and task.kind in STEPS:
            times.append(f"limit in {written(limit)}")
            # The step is worth a word only where the limit is what ends the training.
            if pace and limit < pace * (task.total - task.done):
                times.append(f"about at step {task.done + int(limit / pace):,}")
        return times

    # --- drawing ----------------------------------------------------------------------------------------------------

    @property
    def _is_bar(self) -> bool:
        """A person may watch."""
        return person_may_watch(self.stream or sys.stdout)

    @cached_property
    def _bar(self) -> Bar:
        if self.stream is None:
            return terminal_bar()
        return Bar(Console(file=self.stream, highlight=False, markup=False, emoji=False))

    def _draw_bar(self, task: Task, now: float) -> None:
        """Draw the bar between what is done and the times, as many as fit."""
        before = f"{task.label} {task.done}/{task.total}"
        times = self._times(task, now, clock_time)
        while times and len(before) + len(", ".join(times)) + NARROWEST_BAR + 2 > line_columns():
            times.pop()
        self._bar.show(before[: line_columns()], task.done / max(task.total, 1), ", ".join(times))

    def _draw_panel(self, panel: Panel, task: Task, now: float) -> None:
        """Draw the panel with what is done and the times."""
        state = f"{task.label}: {task.unit} {task.done:,} of {task.total:,}"
        panel.draw(", ".join([state, *self._times(task, now, clock_time)]), task.done / max(task.total, 1))

    def _rest(self, panel: Panel) -> None:
        """Draw the panel without work, once none is under way."""
        if not self._tasks:
            panel.rest()

    def _write_line(self, task: Task, now: float) -> None:
        """Write one line that stays."""
        share = task.done / max(task.total, 1)
        parts = [f"{task.label}: {task.unit} {task.done:,}/{task.total:,} ({share:.1%})"]
        parts += self._times(task, now, duration)
        print(", ".join(parts), file=self.stream or sys.stdout, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as `"2 h 05 min"`, `"3 min 20 s"`, `"12 s"`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s"
