"""Settings as plain values, nested or by dotted key."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_plain(instance: Any) -> Any:
    """Dataclasses, tuples and paths as dicts, lists and strings: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(instance) and not isinstance(instance, type):
        return {f.name: to_plain(getattr(instance, f.name)) for f in dataclasses.fields(instance)}
    if isinstance(instance, dict):
        return {key: to_plain(value) for key, value in instance.items()}
    if isinstance(instance, list | tuple):
        return [to_plain(value) for value in instance]
    return str(instance) if isinstance(instance, Path) else instance


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key; a ramp, which is one value, stays whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and "points" not in value
        found |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
