"""Settings in which runs differ: those that a result can depend on, and the others."""

import json
import os
from collections.abc import Sequence
from typing import Any

from ..config import resume_rules
from .runs import Run

NAMES_OF_SOURCES = {"teacher.name", "student.name", "data.train"}
IMPORTANT = NAMES_OF_SOURCES | resume_rules.MICRO_BATCH | resume_rules.AS_ASKED_FOR | {"training.max_hours"}
"""Settings that results depend on although a resumed run may have others."""

UNIMPORTANT = resume_rules.FREE_TO_CHANGE - IMPORTANT
"""Settings, or whole sections, that no result depends on."""

OWN_TO_A_RUN = {"output_dir", "resume"}
"""Settings that differ in any two runs."""

MOST_SHOWN = 60
"""Characters of a setting's value."""

UNKNOWN = object()
"""Value of a setting that a run does not have."""


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ and that a result can depend on.

    Returns:
        dotted key -> its value in each run; `?` for a run that does not have it, which alone makes no difference.
    """
    differing = {}
    for key in differing_keys(runs):
        if is_important(key):
            values = [run.settings.get(key, UNKNOWN) for run in runs]
            differing[key] = ["?" if value is UNKNOWN else _shown(value) for value in _without_common_folders(values)]
    return differing


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the keys of all settings that differ, in the order of config.yaml."""
    # A dict as an ordered set.
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = []
    for key in keys:
        values = {json.dumps(run.settings[key], default=str) for run in runs if key in run.settings}
        if len(values) > 1:
            differing.append(key)
    return differing


def is_important(key: str) -> bool:
    """Return True if a result can depend on a setting."""
    return key not in UNIMPORTANT and key.partition(".")[0] not in UNIMPORTANT


def _without_common_folders(values: Sequence[Any]) -> list[Any]:
    """Return the values of a setting without the folders in which all of them are, if they are paths."""
    paths = [path for value in values for path in (value if isinstance(value, list) else [value])]
    paths = [path for path in paths if path is not UNKNOWN]
    if not all(isinstance(path, str) for path in paths):
        return [*values]

    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # absolute ones beside others
        return [*values]
    if shared in ("", os.sep):
        return [*values]

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(path) for path in value]
        return value if value is UNKNOWN else "…" + value[len(shared) :]

    return [cut(value) for value in values]


def _shown(value: Any) -> str:
    """Return the value of a setting as text, cut where it is long."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."
