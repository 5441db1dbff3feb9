"""What a run says while it runs: train.log, metrics.jsonl, the tagged lines, what the progress display shows.

Every message goes through `logging`; `setup_logging` sends it to a rich console and to `train.log`.
`StepLogger` owns what is said at a logged step. Nothing here prints during evaluation.
"""

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ..advice import advice
from ..errors import RunError, UserError
from ..files import write_text
from ..parallel.processes import rank
from ..run_layout import LOG, METRICS
from .progress import Progress, person_may_watch, status_of

log = logging.getLogger(__name__)

OWN_LOGGERS = ("curriculum_distillation", "models", "utils", "train", "verify_fixes", "__main__")
"""Loggers of this project, which speak from INFO on; everybody else only from WARNING on."""

ROUTER_TERMS = ("feat", "rel", "attn", "layer", "contr")
REPEATS = 3
"""A library's warning is shown this often, however often it is raised."""

_TAG_STYLES = {
    "[CURRICULUM]": "cyan",
    "[KD]": "magenta",
    "[ROUTING]": "blue",
    "[LM]": "green",
    "[TOTAL]": "bold",
    "[Eval]": "bold yellow",
    "[learned]": "bold green",
    "[read]": "dim",
}


# --- logging --------------------------------------------------------------------------------------------------------


@cache
def console() -> Console:
    """Return the one console of the process; it writes to whatever `sys.stdout` is at that moment.

    Text is shown as it is: names of folders, settings and what models write may look like rich's markup or emoji.
    """
    return Console(highlight=False, markup=False, emoji=False)


def setup_logging(output_dir: str | Path | None, level: str | int = "INFO", main_process: bool = True) -> None:
    """Send log records to the console and to `output_dir/train.log` (appended to, so a resume continues it).

    Args:
        output_dir: created if missing; None keeps the log on the console only.
        level: of this project's own loggers; libraries are heard from WARNING on.
        main_process: the other processes of a run write no file, and nothing but errors, with their number.

    Calling it again replaces the earlier set-up, for instance to move from one run to the next.
    """
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "_of_this_project", False)]:
        root.removeHandler(handler)
        handler.close()
    file = Path(output_dir) / LOG if output_dir is not None and main_process else None
    handlers: list[logging.Handler] = [_ConsoleHandler(file, "" if main_process else f"process {rank()}: ")]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A file name that is no UTF-8 has characters that UTF-8 lacks.
        to_file = _File(file, encoding="utf-8", errors="backslashreplace")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
        handlers.append(to_file)
    for handler in handlers:
        handler._of_this_project = True  # type: ignore[attr-defined]
        handler.addFilter(_LimitRepeats())
        root.addHandler(handler)
    root.setLevel(logging.WARNING if main_process else logging.ERROR)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(level if main_process else logging.ERROR)
    logging.captureWarnings(True)
    _join_libraries()


def _join_libraries() -> None:
    """transformers logs through our handlers; no library draws progress bars where a bar would be kept."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    if not person_may_watch(sys.stdout):
        import datasets

        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


class _ConsoleHandler(logging.Handler):
    """One record, one line (the terminal may fold it, a captured log does not), never through the bar.

    Args:
        file: the log that has the tracebacks. None: there is none, so that of an unexpected failure is shown.
        prefix: of every line.
    """

    def __init__(self, file: Path | None, prefix: str = "") -> None:
        super().__init__()
        self.file, self.prefix = file, prefix

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with tqdm.external_write_mode(file=console().file):
                console().print(self._render(record), soft_wrap=True)
        except Exception:
            self.handleError(record)

    def _render(self, record: logging.LogRecord) -> Text:
        text = Text()
        text.append(time.strftime("%H:%M:%S ", time.localtime(record.created)), "dim")
        if record.levelno >= logging.WARNING:
            style = "bold red" if record.levelno >= logging.ERROR else "yellow"
            text.append(f"{record.levelname.capitalize()}: {self.prefix}", style)
        unexpected = (
            record.exc_info and record.exc_info[1] and not isinstance(record.exc_info[1], (UserError, RunError))
        )
        message = _without_traceback(record.getMessage()) if unexpected and self.file else record.getMessage()
        tag, space, rest = message.partition(" ")
        text.append(tag, _TAG_STYLES.get(tag, ""))
        text.append(space + rest)
        if unexpected and self.file:
            text.append(f"\n  The traceback is in {self.file}")
        elif unexpected:
            text.append("\n" + logging.Formatter().formatException(record.exc_info))
        return text


def _without_traceback(message: str) -> str:
    """A data worker's error has the worker's traceback in its text: the lines around it say what happened."""
    before, found, after = message.partition("Original Traceback (most recent call last):")
    return f"{before.strip()} {after.strip().splitlines()[-1]}" if found and after.strip() else message


class _File(logging.FileHandler):
    """A log that cannot be written, on a full disk, does not fill the console with tracebacks of its own."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _LimitRepeats(logging.Filter):
    """Lets a library say the same thing `REPEATS` times only: one warning per step would fill the log."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.split(".", 1)[0] in OWN_LOGGERS:
            return True
        key = (record.name, re.sub(r"\d+", "#", record.getMessage()[:200]))
        self.seen[key] = self.seen.get(key, 0) + 1
        return self.seen[key] <= REPEATS


def learned_lines(
    ids: Sequence[int], learned: Sequence[bool], decode: Callable[[list[int]], str], most: int = 10, width: int = 160
) -> list[str]:
    """What is learned from, of one window: a head line, and a line for each run of tokens that are learned or only
    read, at most `most` of them, each with the first and last characters of its text."""
    lines = [f"what is learned from: {sum(map(bool, learned))} of {len(ids)} tokens of the student's first window"]
    runs = [
        (key, [i for _, i in run]) for key, run in groupby(zip(map(bool, learned), ids, strict=True), itemgetter(0))
    ]
    for key, run in runs[:most]:
        text = repr(decode(run))[1:-1]
        text = text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"
        lines.append(f"{'[learned]' if key else '[read]   '} {text}")
    if len(runs) > most:
        lines.append(f"and {len(runs) - most} more such parts")
    return lines


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


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All whole records of a `metrics.jsonl`; a line cut short by a kill is left out."""
    return [record for record in read_lines(path) if record is not None]


def read_lines(path: str | Path) -> list[dict[str, Any] | None]:
    """Return the record of each line of a `metrics.jsonl`, None for a line that holds none.

    Empty lines are left out, and so is a last line that was cut short by a kill.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    *ended, last = text.split("\n")
    records = [_record_of(line) for line in ended if line.strip()]

    if (unended := _record_of(last)) is not None:
        records.append(unended)
    return records


def _record_of(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
        return None
    return record if isinstance(record, dict) else None


def read_warnings(folder: Path) -> list[str]:
    """First lines of what the sessions of a run warned of in its train.log, each once."""
    file = folder / LOG
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.findall(r"^[\d-]{10} [\d:]{8} (?:WARNING|ERROR|CRITICAL) +(.*)$", text, flags=re.MULTILINE)
    return list(dict.fromkeys(found))


def training_lines(
    record: Mapping[str, Any], total_steps: int, weights: Mapping[str, float] | None = None
) -> list[str]:
    """The tagged lines of a logged step, one string each."""
    terms = record["terms"]
    step = f"step {record['step']}"
    weights = weights if weights is not None else {name: term["weight"] for name, term in terms.items()}
    lines = [
        f"[CURRICULUM] {step}/{total_steps} progress {record['progress']:.1%} epoch {_number(record['epoch'])}"
        + "".join(f" {name} {weight:.3f}" for name, weight in weights.items())
    ]
    if "kd" in terms:
        coverage = record.get("coverage") or {}
        lines.append(
            f"[KD] {step} {_term(terms['kd'])} nats/token {_number(record.get('kd_nats_per_token'))}"
            f" temperature {_number(record.get('temperature'))} top-k {_number(record.get('top_k'))}"
            f" coverage {_share(coverage.get('anchored'))} depth0 {_share(coverage.get('depth0'))}"
        )
    if "span" in terms:
        lines.append(f"[KD] {step} span {_term(terms['span'])}")
    if routed := [f"{name} {_term(terms[name])}" for name in ROUTER_TERMS if name in terms]:
        lines.append(f"[ROUTING] {step} " + "; ".join(routed))
    if "lm" in terms:
        lines.append(f"[LM] {step} {_term(terms['lm'])} tokens {terms['lm']['count']}")
    lines.append(
        f"[TOTAL] {step} loss {_number(record['loss'])} lr {record['lr']:.2e}"
        f" grad_norm {_number(record.get('grad_norm'))} tokens/s {_number(record.get('tokens_per_second'), 0)}"
        f" memory {_number(record.get('peak_memory_mb'), 0)} MB"
    )
    return lines


def evaluation_line(record: Mapping[str, Any]) -> str:
    """The [Eval] line."""
    return (
        f"[Eval] step {record['step']} {record.get('split', 'eval')} loss {_number(record['loss'])}"
        f" perplexity {_number(record['perplexity'], 2)} bits/byte {_number(record['bits_per_byte'])}"
        f" tokens {record['tokens']} bytes {record['bytes']}"
    )


def _term(term: Mapping[str, Any]) -> str:
    gradient = f" grad_norm {_number(term['grad_norm'])}" if "grad_norm" in term else ""
    return f"raw {_number(term['raw'])} weight {term['weight']:.3f} weighted {_number(term['weighted'])}{gradient}"


def _number(value: float | int | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3e}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def json_safe(value: Any) -> Any:
    """`value` with NaN and infinity, which are not JSON, as None; tuples and the like become lists."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
