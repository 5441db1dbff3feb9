"""Messages for wrong settings: pydantic's errors in the words of somebody who wrote YAML or flags."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from ..errors import shorten

LONGEST_VALUE = 80
"""Characters of a wrong value that are quoted."""


class Contradiction(NamedTuple):
    """A mistake between settings, each of which is right."""

    section: str
    """Section that decides it: a mistake in there may be the cause."""

    message: str
    """With what to do about it."""


class Contradictions(ValueError):
    """Everything in which settings contradict one another."""

    def __init__(self, contradictions: Sequence[Contradiction]) -> None:
        super().__init__("; ".join(contradiction.message for contradiction in contradictions))
        self.contradictions = contradictions


class Mistake(NamedTuple):
    """A mistake in the settings."""

    path: str
    """Dotted; empty: in the whole, as where two sections contradict each other."""

    message: str
    """What is wrong with the value."""

    section: str = ""
    """Of a mistake in the whole: the section whose mistakes may be its cause."""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def describe(error: ValidationError, values: Any, keys: Sequence[str] = ()) -> list[Mistake]:
    """Return every mistake that a validation names.

    Of a union's branches only those are named that the value could have meant.

    Args:
        values: what was validated; it tells keys from pydantic's names of union branches.
        keys: every dotted key that there is, for hints at the nearest one.
    """
    items_by_path: dict[str, list[dict]] = {}
    for item in error.errors(include_url=False):
        path = ".".join(map(str, key_path(item["loc"], values)))
        items_by_path.setdefault(path, []).append(item)

    mistakes = []
    for path, items in items_by_path.items():
        cause = items[0].get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            mistakes += [Mistake(path, each.message, each.section) for each in cause.contradictions]
            continue

        # A ramp with mistakes inside was also tried as a number, and the mistakes inside say more.
        has_inner_mistakes = any(other.startswith(f"{path}.") for other in items_by_path)
        if items[0]["type"] in ("unexpected_keyword_argument", "invalid_key"):
            mistakes.append(Mistake(path, f"unknown key (got {shown(items[0]['input'])}){_nearest_key(path, keys)}"))
        elif not has_inner_mistakes:
            mistakes.append(Mistake(path, _describe_value(items)))
    return mistakes


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

    if kind == "too_long" and item["ctx"]["field_type"] == "Tuple":
        return f"{item['ctx']['max_length']} values"

    if kind in ("int_type", "float_type") and isinstance(item["input"], dict) and "points" in item["input"]:
        return f"{item['msg'].removeprefix('Input should be ')} (it takes no ramp)"

    # names are checked as instances of str (see `settings.Name`), which is nothing a user knows
    if kind == "is_instance_of" and item["ctx"]["class"] == "str":
        return "a valid string"

    return item["msg"].removeprefix("Input should be ").split(", unable")[0]


def key_path(location: tuple, values: Any) -> list[Any]:
    """Return the keys and positions that lead to an error, without pydantic's names of union branches.

    Args:
        location: pydantic's path: keys, positions in lists and names of branches, which are no keys of `values`.
        values: what was validated.
    """
    path = []
    inner = values
    for part in location:
        is_present_key = isinstance(inner, dict) and part in inner
        is_missing_key = isinstance(inner, dict) and isinstance(part, str) and _is_key(part)
        is_branch = isinstance(part, str) and not is_present_key and not is_missing_key
        if is_branch:
            continue

        path.append(part)
        is_position = isinstance(inner, list | tuple) and isinstance(part, int) and part < len(inner)
        if is_present_key or is_position:
            inner = inner[part]
    return path


def _is_key(part: str) -> bool:
    """Tell the name of a missing key from that of a union branch (a class or a built-in type)."""
    is_builtin_type = part in ("float", "int", "str", "bool", "list", "tuple")
    return part.islower() and part.isidentifier() and not is_builtin_type


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut where it is long."""
    return shorten(repr(value), LONGEST_VALUE)


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """Return the end of a message about an unknown word: the nearest known one, or nothing.

    Args:
        prefix: dotted path, with its dot, of the section that the candidates are keys of.
    """
    nearest = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""


def _nearest_key(path: str, keys: Sequence[str]) -> str:
    """Return the end of a message about an unknown key: one like it beside it, else one of that name elsewhere."""
    parent, dot, word = path.rpartition(".")
    prefix = parent + dot
    siblings = [key.removeprefix(prefix) for key in keys if key.rpartition(".")[0] == parent]

    elsewhere = [key for key in keys if key.rpartition(".")[2] == word]
    if not elsewhere:
        elsewhere = [key for key in keys if difflib.get_close_matches(word, [key.rpartition(".")[2]], cutoff=0.8)]

    if hint := did_you_mean(word, siblings, prefix):
        return hint
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere[:3])}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""
