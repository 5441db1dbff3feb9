"""The terminal that a run writes to: the one rich console, its columns, and whether a person may watch."""

import os
import re
import shutil
import sys
from functools import cache
from typing import IO

from rich.console import Console

CAPTURED_COLUMNS = 120
"""Columns of a line where nobody says how many there are: in a file, a pipe, a saved notebook. No line is longer."""

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # commands of the terminal, but for tab and line end
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of what follows
    "\u2028\u2029\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # other line ends, and marks that nobody sees
    "\ud800-\udfff]"  # halves of characters, from names of files that are no UTF-8
)


def printable(text: str) -> str:
    """Return a text in which what would command the terminal, or hide or turn what follows, is written as an escape.

    Texts, names of files and what models write go through this on their way to a screen. What joins letters and emoji
    stays as it is.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def console() -> Console:
    """Return the console of the process; it writes to whatever `sys.stdout` is at that moment.

    Text is shown as it is: names of folders, settings and what models write may look like rich's markup or emoji.
    """
    return _console(_is_terminal(sys.stdout))


@cache
def _console(_to_terminal: bool) -> Console:
    """Return the one console for terminals, or the one for everything else.

    A console looks once at where it writes to, when it is made: that of a terminal would go on writing colours into a
    file or a notebook's cell that takes the place of `sys.stdout`.
    """
    # In a notebook rich would make a display of HTML of each line.
    return Console(highlight=False, markup=False, emoji=False, force_jupyter=False)


def line_columns() -> int:
    """Return the columns that a line may have to stay in one row."""
    columns = shutil.get_terminal_size((CAPTURED_COLUMNS, 24)).columns
    # One column less than there are: a full line folds.
    return min(columns, CAPTURED_COLUMNS) - 1


def person_may_watch(stream: IO[str] | None) -> bool:
    """Return whether a moving bar makes sense on `stream`: a terminal, and not a notebook that runs unattended.

    `KAGGLE_KERNEL_RUN_TYPE=Batch` is Kaggle's "Save & Run All".
    """
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch" or os.environ.get("TERM") == "dumb":
        return False
    return _is_terminal(stream)


def _is_terminal(stream: IO[str] | None) -> bool:
    """Return whether `stream` is a terminal; None is what a program without a console has in its place."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
