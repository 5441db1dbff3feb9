"""Settings as plain values, nested or by dotted key."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_plain(instance: Any) -> Any:
    """Return dataclasses, tuples and paths as dicts, lists and strings: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(instance) and not isinstance(instance, type):
        return {field.name: to_plain(getattr(instance, field.name)) for field in dataclasses.fields(instance)}
    if isinstance(instance, dict):
        return {key: to_plain(value) for key, value in instance.items()}
    if isinstance(instance, list | tuple):
        return [to_plain(value) for value in instance]
    if isinstance(instance, Path):
        return str(instance)
    return instance


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key, such as `training.seed`.

    Args:
        prefix: dotted path of `values` itself, with its dot.
    """
    by_key: dict[str, Any] = {}
    for key, value in values.items():
        # a ramp, `{points: [...]}`, is one value and stays whole
        is_section = isinstance(value, Mapping) and "points" not in value
        if is_section:
            by_key.update(flatten(value, prefix=f"{prefix}{key}."))
        else:
            by_key[f"{prefix}{key}"] = value
    return by_key
