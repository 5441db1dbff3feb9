"""What a run says while it runs: train.log, metrics.jsonl, the tagged lines, what the progress display shows.

Every message goes through `logging`; `setup_logging` sends it to a rich console and to `train.log`.
`StepLogger` owns what is said at a logged step. Nothing here prints during evaluation.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..advice import advice
from ..errors import RunError
from ..files import write_text
from ..run_layout import METRICS
from .lines import evaluation_line, training_lines
from .progress import Progress, status_of
from .records import json_safe, read_metrics

log = logging.getLogger(__name__)


# --- logging --------------------------------------------------------------------------------------------------------


# --- steps ----------------------------------------------------------------------------------------------------------


class StepLogger:
    """Writes `metrics.jsonl`, the tagged lines and the progress display of one run.

    Step numbers count finished optimizer steps: the first one that can be logged is `every`.

    Args:
        output_dir: folder of the run; None writes no file.
        total_steps: optimizer steps of the whole run.
        every: a step is logged when its number is a multiple of this, and the last one is.
        start_step: steps already done (resume).
        main_process: False makes every method but `due` do nothing.
        tracker: also gets every record: has `log(record)` and `close()`.
        deadline: `time.monotonic()` at which the run is stopped, for the display.
        progress: the display; None makes one on standard output.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        total_steps: int,
        every: int = 100,
        *,
        start_step: int = 0,
        main_process: bool = True,
        tracker: Any = None,
        deadline: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.total_steps, self.every, self.main_process = total_steps, every, main_process
        self.path = Path(output_dir) / METRICS if output_dir is not None else None
        self.display = progress or (Progress(total_steps, start_step, deadline=deadline) if main_process else None)
        self.tracker = tracker
        self._file: IO[str] | None = None
        self._status: dict[str, str] = {}

    def due(self, step: int) -> bool:
        """Whether `step` is to be logged: known beforehand, so that only then anything is measured."""
        return step > 0 and (step % self.every == 0 or step == self.total_steps)

    def training(self, record: Mapping[str, Any], weights: Mapping[str, float] | None = None) -> None:
        """Log one step: `record` has the keys that DESIGN.md lists for training.

        Args:
            weights: weights of all terms, for [CURRICULUM]; by default those in `record["terms"]`.
        """
        if not self.main_process:
            return
        self._append(record)
        with advice(f"lines about step {record['step']}"):
            for line in training_lines(record, self.total_steps, weights):
                log.info(line)
            self._status = status_of(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Log one evaluation: `step, split, loss, perplexity, bits_per_byte, tokens, bytes`."""
        if self.main_process:
            self._append(record)
            with advice(f"line about the evaluation at step {record['step']}"):
                log.info(evaluation_line(record))

    def progress(self, step: int) -> None:
        """Tell the display that `step` steps are done. Cheap: call it at every step."""
        if self.display is None:
            return
        display, self.display = self.display, None
        with advice("further progress display"):  # nor its estimates of time
            display.update(step, self._status)
            self.display = display

    def has_evaluation(self, step: int) -> bool:
        """Whether the file has an evaluation at this step. Ask in the main process, which writes it."""
        if self.path is None or not self.path.exists():
            return False
        return any("terms" not in record and record.get("step") == step for record in read_metrics(self.path))

    def truncate_after(self, step: int) -> None:
        """Before a resume at `step`: drop what a killed run logged after it, and a line it left half-written."""
        if not self.main_process or self.path is None or not self.path.exists():
            return
        self._close_file()
        kept = [json.dumps(record) for record in read_metrics(self.path) if record.get("step", 0) <= step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def close(self) -> None:
        """Close the file, the display and the tracker."""
        self._close_file()
        if self.tracker is not None:
            self.tracker.close()
        if self.display is not None:
            self.display.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
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

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
