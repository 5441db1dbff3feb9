"""The day on which a run reads its conversations: some chat templates write the date.

One day for a whole run, however often it is interrupted, and for all runs that share a teacher cache: the signals in it
are found by what the teacher read.
"""

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from .atomic import write_text
from .paths import user_path
from .run_folder import CONVERSATION_DATE
from .teacher_cache import MANIFEST

IDENTITY = "conversation_date"
"""Its name in what checkpoints and teacher caches depend on."""


class Day(NamedTuple):
    """A day, and where it comes from."""

    day: date
    reason: str


def choose(config: Any) -> Day:
    """Return the day for a run: that of the checkpoints it goes on from, or of its teacher cache, or today.

    Args:
        config: `output_dir`, `resume` and `cache.folder`.
    """
    output = Path(config.output_dir)
    started = _first(folder for folder in (output, *_resumed(config.resume)) if _has_checkpoints(folder))
    if started is not None:
        return Day(started, "the day on which this run began")

    cache = None if config.cache.folder is None else user_path(config.cache.folder)
    if cache is not None and (cached := _of_cache(cache)) is not None:
        return Day(cached, f"the day of the teacher cache {cache}")
    return Day(date.today(), "today")


def keep(folder: Path, day: str) -> None:
    """Write down the day of the run in a folder."""
    write_text(folder / CONVERSATION_DATE, f"{day}\n")


def _resumed(resume: str) -> list[Path]:
    """Folders that may be that of the run which a checkpoint's path belongs to."""
    if resume in ("auto", "never"):
        return []
    path = user_path(resume).absolute()
    return [path, *list(path.parents)[:2]]


def _has_checkpoints(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("step-*"))


def _first(folders: Iterable[Path]) -> date | None:
    for folder in folders:
        try:
            return date.fromisoformat((folder / CONVERSATION_DATE).read_text(encoding="utf-8").strip())
        except (OSError, ValueError):  # no template wrote the date, or the file was lost
            continue
    return None


def _of_cache(folder: Path) -> date | None:
    """The day that a teacher cache was built for; what is wrong with a cache is told where it is opened."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return date.fromisoformat(manifest["built_from"][IDENTITY])
    except (OSError, ValueError, KeyError, TypeError):
        return None
