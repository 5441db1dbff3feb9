"""The day on which a run reads its conversations: some chat templates write the date.

One day for a whole run, however often it is interrupted, and for all runs that share a teacher cache: the signals in it
are found by what the teacher read. The day stands among what a checkpoint and a cache were made from.
"""

import json
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from ..config.protocols import RunConfig
from ..paths import user_path
from .store import MANIFEST

IDENTITY = "conversation_date"
"""Its name in what checkpoints and teacher caches depend on."""


class Day(NamedTuple):
    """A day, and where it comes from."""

    day: date
    reason: str
    """Where it comes from, for the log."""


def choose(config: RunConfig) -> Day:
    """Return the day for a run: that of the checkpoint it goes on from, or of its teacher cache, or today.

    Args:
        config: `output_dir`, `resume` and `cache.folder`.
    """
    # a checkpoint comes first: what it goes on from was read on its day
    for state in _checkpoint_states(Path(config.output_dir), config.resume):
        started = _day_in(state, lambda content: content["fingerprint"])
        if started is not None:
            return Day(started, "the day on which this run began")

    if config.cache.folder is not None:
        folder = user_path(config.cache.folder)
        cached = _day_in(folder / MANIFEST, lambda content: content["built_from"])
        if cached is not None:
            return Day(cached, f"the day of the teacher cache {folder}")
    return Day(date.today(), "the day on which this run begins")


def _checkpoint_states(output: Path, resume: str) -> Iterator[Path]:
    """Yield the files that say what checkpoints were made from: of the run itself, and of where it goes on from."""
    yield from output.glob("checkpoints/step-*/state.json")
    if resume in ("auto", "never"):
        return

    # `--resume` takes a checkpoint, a folder of checkpoints or a run
    path = user_path(resume)
    yield path / "state.json"
    for pattern in ("step-*/state.json", "checkpoints/step-*/state.json"):
        yield from path.glob(pattern)


def _day_in(file: Path, part: Callable[[Any], Any]) -> date | None:
    """Return the day in a part of a JSON file; None where there is none.

    A damaged file is no error here: whoever uses it tells what is wrong with it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return date.fromisoformat(part(content)[IDENTITY])
    except (OSError, ValueError, KeyError, TypeError):
        return None
