"""Messages for wrong settings: pydantic's errors in the words of somebody who wrote YAML or flags."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from ..errors import shorten

LONGEST_VALUE = 80
"""Characters of a wrong value that are quoted."""


def describe(error: ValidationError, values: Any) -> list[str]:
    """Return one line for each wrong value.

    Of a union's branches only those are named that the value could have meant.

    Args:
        values: what was validated; it tells keys from pydantic's names of union branches.
    """
    items_by_path: dict[str, list[dict]] = {}
    for item in error.errors(include_url=False):
        path = dotted(item["loc"], values)
        items_by_path.setdefault(path, []).append(item)

    lines = []
    for path, items in items_by_path.items():
        # A ramp with mistakes inside was also tried as a number, and the mistakes inside say more.
        has_inner_mistakes = any(other.startswith(f"{path}.") for other in items_by_path)
        if not has_inner_mistakes:
            message = _describe_value(items)
            lines.append(f"{path}: {message}" if path else message)
    return lines


def _describe_value(items: list[dict]) -> str:
    """Return what is wrong with one value.

    Args:
        items: pydantic's errors about it, one for each branch of a union.
    """
    # Whoever writes a mapping did not mean the number that would also be admitted here.
    if isinstance(items[0]["input"], dict) and len(items) > 1:
        items = [item for item in items if not item["type"].startswith("float")]

    kind = items[0]["type"]
    if kind == "value_error":
        return items[0]["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return "missing"

    value = items[0]["input"]
    if kind == "finite_number":
        # Words such as "inf" are read as numbers, and it is the number that is refused.
        value = float(value)
    expectations = dict.fromkeys(_expectation(item) for item in items)
    return f"got {shown(value)}, expected {' or '.join(expectations)}"


def _expectation(item: dict) -> str:
    """Return the phrase that follows "expected" for one of pydantic's errors."""
    kind = item["type"]

    if kind == "dataclass_type":
        is_ramp = item["ctx"]["class_name"] == "Ramp"
        return "a mapping {points: [[progress, value], ...]}" if is_ramp else "a mapping"

    if kind in ("string_too_short", "too_short") and isinstance(item["input"], str):
        return "a name that is not empty"

    # names are checked as instances of str (see `settings.Name`), which is nothing a user knows
    if kind == "is_instance_of" and item["ctx"]["class"] == "str":
        return "a valid string"

    return item["msg"].removeprefix("Input should be ").split(", unable")[0]


def dotted(location: tuple, values: Any) -> str:
    """Return the dotted path of an error, without pydantic's names of union branches, which are no keys of `values`.

    Args:
        location: pydantic's path: keys, positions in lists and names of branches.
        values: what was validated.
    """
    parts = []
    inner = values
    for part in location:
        is_present_key = isinstance(inner, dict) and part in inner
        is_missing_key = isinstance(inner, dict) and isinstance(part, str) and _is_key(part)
        is_branch = isinstance(part, str) and not is_present_key and not is_missing_key
        if is_branch:
            continue

        parts.append(str(part))
        is_position = isinstance(inner, list | tuple) and isinstance(part, int) and part < len(inner)
        if is_present_key or is_position:
            inner = inner[part]
    return ".".join(parts)


def _is_key(part: str) -> bool:
    """Tell the name of a missing key from that of a union branch (a class or a built-in type)."""
    is_builtin_type = part in ("float", "int", "str", "bool", "list", "tuple")
    return part.islower() and part.isidentifier() and not is_builtin_type


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut where it is long."""
    return shorten(repr(value), LONGEST_VALUE)


def did_you_mean(word: str, candidates: Iterable[Any], prefix: str = "") -> str:
    """Return the end of a message about an unknown word: the nearest known one.

    Args:
        prefix: dotted path, with its dot, of the section that the candidates are keys of. With it, and nothing near,
            the candidates are listed.
    """
    names = [str(candidate) for candidate in candidates]
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.6)

    if nearest:
        return f"; did you mean {prefix}{nearest[0]}?"
    if prefix:
        return f"; known here: {', '.join(names)}"
    return ""
