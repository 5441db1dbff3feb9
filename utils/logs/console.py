"""Console and log file."""

import logging
import re
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ..errors import RunError, UserError
from ..parallel.processes import rank
from ..run_layout import LOG
from .progress import person_may_watch

log = logging.getLogger(__name__)


OWN_LOGGERS = ("curriculum_distillation", "models", "utils", "train", "verify_fixes", "__main__")
"""Loggers of this project, which speak from INFO on; everybody else only from WARNING on."""


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
