"""Console and log file of a run: one record, one line, never through the progress bar."""

import logging
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

from rich.text import Text

from ..errors import RunError, UserError
from ..machine.launcher import rank
from ..run_layout import LOG
from .terminal import console, line_columns, person_may_watch, printable

OWN_LOGGERS = ("curriculum_distillation", "models", "utils", "train", "verify_fixes", "__main__")
"""Loggers of this project, which speak from INFO on; everybody else only from WARNING on."""

UNASKED = "bitsandbytes.backends.cpu"
"""Logger that, wherever peft is loaded, asks for a package which 4-bit weights on a CPU would be faster with."""

REPEATS = 3
"""A library's warning is shown this often, however often it is raised."""

DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
"""Of a line of train.log; `records.read_warnings` reads it."""

CLOCK_COLUMNS = 100
"""Columns from which a line has room for the time of day in front; train.log has it always."""

_TAG_STYLES = {
    "[TOTAL]": "bold",
    "[Eval]": "bold yellow",
    "[sample]": "dim",
    "[learned]": "bold green",
    "[read]": "dim",
}


def setup_logging(output_dir: str | Path | None, level: str | int = "INFO", main_process: bool = True) -> None:
    """Send log records to the console and to `output_dir/train.log` (appended to, so a resume continues it).

    Args:
        output_dir: created if missing; None keeps the log on the console only.
        level: from which this project's own loggers are heard on the console; the file also has what they say below
            it, for nobody to act on. Libraries are heard from WARNING on.
        main_process: the other processes of a run write no file, and nothing but errors, with their number.

    Calling it again replaces the earlier set-up, for instance to move from one run to the next. Of libraries only those
    that are loaded join; loading them here would keep a user waiting for the answer to a mistake.
    """
    root = logging.getLogger()
    _remove_handlers(root)

    file = None
    if output_dir is not None and main_process:
        file = Path(output_dir) / LOG
        file.parent.mkdir(parents=True, exist_ok=True)
    prefix = "" if main_process else f"process {rank()}: "

    handlers: list[logging.Handler] = [_ConsoleHandler(file, prefix, level)]
    if file is not None:
        handlers.append(_file_handler(file))
    for handler in handlers:
        handler._of_this_project = True  # type: ignore[attr-defined]
        handler.addFilter(_LimitRepeats())
        root.addHandler(handler)

    # The root's level holds for libraries.
    root.setLevel(logging.WARNING if main_process else logging.ERROR)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG if main_process else logging.ERROR)
    logging.getLogger(UNASKED).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    if "transformers" in sys.modules:
        _join_libraries()


def _remove_handlers(root: logging.Logger) -> None:
    """Remove what an earlier set-up added, and nothing of a notebook's or a test's."""
    handlers = [handler for handler in root.handlers if getattr(handler, "_of_this_project", False)]
    for handler in handlers:
        root.removeHandler(handler)
        handler.close()


def _file_handler(file: Path) -> logging.Handler:
    # A file name that is no UTF-8 has characters that UTF-8 lacks.
    handler = _File(file, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Printable("%(asctime)s %(levelname)-7s %(message)s", DATE_FORMAT))
    return handler


def _join_libraries() -> None:
    """Let transformers log through our handlers, and libraries draw bars of downloads alone, for a person."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()

    # Transformers draws one for every model that is read or written, and switches those of downloads off with it.
    transformers_logging.disable_progress_bar()
    if person_may_watch(sys.stdout):
        enable_progress_bars()
        return

    # A notebook keeps every state of a bar.
    import datasets

    datasets.disable_progress_bars()


class _ConsoleHandler(logging.Handler):
    """One record, one line (the terminal may fold it, a captured log does not), above the bar.

    A record with `extra={"screen": f}` is shown as `f` returns it for the columns that there are, and one with
    `is_in_panel` is not, because the panel of a notebook shows it.

    Args:
        file: the log that has the tracebacks. None: there is none, so that of an unexpected failure is shown.
        prefix: of every line.
        level: from which records are shown.
    """

    def __init__(self, file: Path | None, prefix: str, level: str | int) -> None:
        super().__init__(level)
        self.file = file
        self.prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_in_panel", False):
            return
        try:
            # A terminal would fold a line in the middle of a word; what is captured keeps one line.
            is_captured = not person_may_watch(console().file)
            console().print(self._render(record), soft_wrap=is_captured)
        except Exception:
            self.handleError(record)

    def _render(self, record: logging.LogRecord) -> Text:
        """Return the line of a record: time, level if it is a warning or worse, message."""
        text = Text()
        columns = line_columns()
        if columns >= CLOCK_COLUMNS - 1:
            text.append(time.strftime("%H:%M:%S ", time.localtime(record.created)), "dim")
        if record.levelno >= logging.WARNING:
            style = "bold red" if record.levelno >= logging.ERROR else "yellow"
            text.append(f"{record.levelname.capitalize()}: {self.prefix}", style)

        screen = getattr(record, "screen", None)
        message = screen(columns - len(text)) if screen else record.getMessage()
        is_unexpected = _is_unexpected(record)
        if is_unexpected and self.file:
            message = _without_traceback(message)
        tag, space, rest = printable(message).partition(" ")
        text.append(tag, _TAG_STYLES.get(tag, ""))
        text.append(space + rest)

        # A person needs to know where the traceback is; without a file it would be lost.
        if is_unexpected and self.file:
            text.append(printable(f"\n  The traceback is in {self.file}"))
        elif is_unexpected:
            text.append("\n" + printable(logging.Formatter().formatException(record.exc_info)))
        return text


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Return whether a record tells of an exception that is not one of this project, which says itself what to do."""
    error = record.exc_info[1] if record.exc_info else None
    return error is not None and not isinstance(error, UserError | RunError)


def _without_traceback(message: str) -> str:
    """Return a message without the traceback of a data worker, which a worker's error has in its text."""
    before, heading, after = message.partition("Original Traceback (most recent call last):")
    if not heading or not after.strip():
        return message
    # The lines around it say what happened.
    return f"{before.strip()} {after.strip().splitlines()[-1]}"


class _Printable(logging.Formatter):
    """Lines of a log that a terminal can show."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _File(logging.FileHandler):
    """A log file; if it cannot be written, on a full disk, the console is not filled with tracebacks about that."""

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

        # Numbers in it, such as a step or an address, make no other message.
        key = (record.name, re.sub(r"\d+", "#", record.getMessage()[:200]))
        self.seen[key] = self.seen.get(key, 0) + 1
        return self.seen[key] <= REPEATS
