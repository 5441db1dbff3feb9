"""Records of a run, read back: lines of metrics.jsonl, and warnings of train.log."""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..run_layout import LOG

log = logging.getLogger(__name__)

OWN_TEXT = "own_text"
"""`split` of the records of texts that the student wrote to learn from them."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return all whole records of a `metrics.jsonl`; a line cut short by a kill is left out."""
    return [record for record in read_lines(path) if record is not None]


def read_lines(path: str | Path) -> list[dict[str, Any] | None]:
    """Return the record of each line of a `metrics.jsonl`, None for a line that holds none.

    Empty lines are left out, and so is a last line that was cut short by a kill.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    *complete, last = text.split("\n")
    records = [_record_of(line) for line in complete if line.strip()]

    # A line without an end was cut short by a kill, or is whole but for its end.
    last_record = _record_of(last)
    if last_record is not None:
        records.append(last_record)
    return records


def _record_of(line: str) -> dict[str, Any] | None:
    """Return the record that a line holds, None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
        return None
    return record if isinstance(record, dict) else None


def is_training(record: Mapping[str, Any]) -> bool:
    """Return True for the record of training steps."""
    return "terms" in record


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Return True for the record of an evaluation; not for that of texts that the student wrote."""
    return "terms" not in record and "bits_per_byte" in record


def is_own_text(record: Mapping[str, Any]) -> bool:
    """Return True for the record of texts that the student wrote to learn from them."""
    return record.get("split") == OWN_TEXT


def read_warnings(folder: Path) -> list[str]:
    """Return the first lines of what the sessions of a run warned of in its train.log, each once."""
    file = folder / LOG
    if not file.is_file():
        return []

    # The date and level in front are those of `console.setup_logging`.
    text = file.read_text(encoding="utf-8", errors="replace")
    messages = re.findall(r"^[\d-]{10} [\d:]{8} (?:WARNING|ERROR|CRITICAL) +(.*)$", text, flags=re.MULTILINE)
    return list(dict.fromkeys(messages))


def json_safe(value: Any) -> Any:
    """Return `value` with NaN and infinity, which are not JSON, as None; tuples and the like become lists."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
