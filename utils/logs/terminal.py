"""The terminal that a run writes to: the one rich console, its columns, and whether a person may watch."""

import os
import shutil
from functools import cache
from typing import IO

from rich.console import Console

CAPTURED_COLUMNS = 120
"""Columns of a line where nobody says how many there are: in a file, a pipe, a saved notebook. No line is longer."""


@cache
def console() -> Console:
    """Return the one console of the process; it writes to whatever `sys.stdout` is at that moment.

    Text is shown as it is: names of folders, settings and what models write may look like rich's markup or emoji.
    """
    # In a notebook rich would make a display of HTML of each line.
    return Console(highlight=False, markup=False, emoji=False, force_jupyter=False)


def line_columns() -> int:
    """Return the columns that a line may have to stay in one row."""
    columns = shutil.get_terminal_size((CAPTURED_COLUMNS, 24)).columns
    # One column less than there are: a full line folds.
    return min(columns, CAPTURED_COLUMNS) - 1


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
