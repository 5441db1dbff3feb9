"""Log of a run's steps: `metrics.jsonl`, a line a logged step, the progress display, and trackers.

Every message goes through `logging`; `console.setup_logging` sends it to a rich console and to `train.log`.
"""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from ..advice import advice
from ..errors import RunError
from ..files import write_text
from ..run_layout import METRICS
from .lines import evaluation_line, own_text_line, sample_line, training_line
from .notebook import Panel
from .progress import Progress, Task
from .records import is_evaluation, is_own_text, is_training, json_safe, read_metrics
from .time_left import Kind

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """An experiment tracker, such as `trackers.Tracking`."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics.jsonl; must not raise."""

    def close(self) -> None:
        """End the run there."""


class StepLogger:
    """Writes `metrics.jsonl`, a line a logged step and the progress display of one run.

    Step numbers count finished optimizer steps: the first one that can be logged is `every`.

    Args:
        output_dir: folder of the run; None writes no file.
        total_steps: optimizer steps of the whole run.
        every: a step is logged when its number is a multiple of this, and the last one is.
        main_process: False makes every method but `due` do nothing.
        tracker: also gets every record.
        progress: the display of the command; None makes one on standard output.
        kind: of the steps, for the time that they take.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        total_steps: int,
        every: int = 100,
        *,
        main_process: bool = True,
        tracker: Tracker | None = None,
        progress: Progress | None = None,
        kind: Kind = "step",
    ) -> None:
        self.total_steps = total_steps
        self.every = every
        self.main_process = main_process
        self.path = None if output_dir is None else Path(output_dir) / METRICS
        self.kind = kind
        self.display = progress or Progress(shown=main_process)
        self.tracker = tracker
        self._owns_display = progress is None
        self._task: Task | None = None
        self._file: IO[str] | None = None

    def due(self, step: int) -> bool:
        """Return whether `step` is to be logged: known before the step, so that no other step measures anything."""
        return step > 0 and (step % self.every == 0 or step == self.total_steps)

    # --- records ----------------------------------------------------------------------------------------------------

    def training(self, record: Mapping[str, Any]) -> None:
        """Log the steps since the last record, whose keys DESIGN.md lists for training."""
        if not self.main_process:
            return

        # The record first: lines are for people, and may fail without harm.
        self._append(record)
        with advice(f"line about step {record['step']}"):
            if self.display.panel is not None:
                self.display.panel.training(record, self.total_steps)
            line = partial(training_line, record, self.total_steps, self.display.seconds_left())
            self._log(line(), screen=line)
            self.display.line_written()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Log one evaluation: `step, split, loss, perplexity, bits_per_byte, tokens, bytes`, and perhaps `sample`."""
        if not self.main_process:
            return

        self._append(record)
        with advice(f"line about the evaluation at step {record['step']}"):
            if self.display.panel is not None:
                self.display.panel.evaluation(record)
            self._log(evaluation_line(record))
            if record.get("sample"):
                line = partial(sample_line, record["sample"])
                self._log(line(), screen=line)
            self.display.line_written()

    def own_text(self, record: Mapping[str, Any]) -> None:
        """Log the figures of texts that the student wrote, as `utils.on_policy.rounds` records them; once a step."""
        # A run that goes on where a round begins has measured its texts before.
        if not self.main_process or self._has(record["step"], is_own_text):
            return

        self._append(record)
        with advice(f"line about the student's own text at step {record['step']}"):
            line = partial(own_text_line, record)
            self._log(line(), screen=line)
            self.display.line_written()

    def _log(self, message: str, screen: Callable[[int], str] | None = None) -> None:
        """Log a line, which the console leaves out where a panel shows the same.

        Args:
            screen: the line for a console of so many columns; None: the message.
        """
        log.info(message, extra={"screen": screen, "is_in_panel": self.display.panel is not None})

    def has_evaluation(self, step: int) -> bool:
        """Return whether the file has an evaluation at this step. Call it in the main process, which writes it."""
        return self._has(step, is_evaluation)

    def _has(self, step: int, is_meant: Callable[[Mapping[str, Any]], bool]) -> bool:
        """Return whether the file has a record of a kind at this step."""
        if self.path is None or not self.path.exists():
            return False
        return any(is_meant(record) and record.get("step") == step for record in read_metrics(self.path))

    def truncate_after(self, step: int) -> None:
        """Drop what a killed run logged after `step`, and a line it left half-written; called before a resume there."""
        if not self.main_process or self.path is None or not self.path.exists():
            return

        self._close_file()
        records = [record for record in read_metrics(self.path) if record.get("step", 0) <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def _append(self, record: Mapping[str, Any]) -> None:
        """Write a record to the file, then to the tracker.

        Raises:
            RunError: the file cannot be written.
        """
        if self.path is None:
            return

        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Line by line, so that a kill costs at most the last record.
                self._file = self.path.open("a", encoding="utf-8", buffering=1)
            self._file.write(json.dumps(json_safe(record), allow_nan=False) + "\n")
        except OSError as error:
            with suppress(OSError):  # what is left in the buffer has no place either
                self._close_file()
            raise RunError(
                f"{self.path} cannot be written: {error.strerror or error}. The newest checkpoint is kept; free some "
                "space there, then the same command continues from it."
            ) from error

        if self.tracker is not None:
            self.tracker.log(record)

    # --- display ----------------------------------------------------------------------------------------------------

    def begin(self, done: int) -> None:
        """Tell the display that steps are taken from here on; `done` were taken before."""
        # A run in which nothing else is planned ends with its last step.
        if self._owns_display:
            self.display.time_left.expect({self.kind: self.total_steps - done}, {})
        if self.display.panel is not None:
            self._begin_panel(self.display.panel)
        self._task = self.display.begin("training", self.total_steps, self.kind, done=done)

    def _begin_panel(self, panel: Panel) -> None:
        """Begin a table, with what the sessions before this one logged."""
        panel.begin()
        if self.path is None or not self.path.exists():
            return
        with advice("table of earlier sessions"):
            for record in read_metrics(self.path):
                if is_training(record):
                    panel.training(record, self.total_steps)
                elif is_evaluation(record):
                    panel.evaluation(record)

    def progress(self, step: int) -> None:
        """Tell the display that `step` steps are done. Cheap: call it at every step."""
        if self._task is None:
            return

        # Given up for good if it fails: it would fail at every step.
        task = self._task
        self._task = None
        with advice("further progress display"):
            self.display.update(task, step)
            self._task = task

    def close(self) -> None:
        """Close the file, the display and the tracker."""
        self._close_file()
        if self.tracker is not None:
            self.tracker.close()
        if self._task is not None:
            self.display.end(self._task)
        if self._owns_display:
            self.display.close()

    def _close_file(self) -> None:
        # Forgotten even where it cannot be closed, on a full disk.
        file = self._file
        self._file = None
        if file is not None:
            file.close()
