"""metrics.jsonl and warnings, read back."""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..run_layout import LOG

log = logging.getLogger(__name__)


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


def json_safe(value: Any) -> Any:
    """`value` with NaN and infinity, which are not JSON, as None; tuples and the like become lists."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
