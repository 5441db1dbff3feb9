"""Configuration: frozen dataclasses, and how YAML and flags become one with every mistake reported at once.

Defaults live in the dataclasses and nowhere else. `build` works for any tree of dataclasses, so
`train.py` can join the ones below with those of the other tower.
"""

import dataclasses
import difflib
import logging
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from .error_messages import describe, dotted, shown
from .yaml_files import _did_you_mean

log = logging.getLogger(__name__)

T = TypeVar("T")


# ---------------------------------------------------------------------------------------------- YAML


# ------------------------------------------------------------------------------------------ building


def build(schema: type[T], values: dict[str, Any], *, source: str) -> T:
    """An instance of the dataclass `schema` from nested plain values.

    Args:
        source: where the values come from, for the message.

    Raises:
        UserError: every mistake at once, each with its dotted path, what was got, what is expected, and
            for an unknown key the nearest known one.
    """
    problems: list[str] = []
    cleaned = _without_unknown(schema, values, "", dict(_leaves(schema)), problems)
    while True:
        try:
            instance = _adapter(schema).validate_python(cleaned)
            break
        except ValidationError as error:
            problems += [line for line in describe(error, cleaned) if line not in problems]
            if not _take_out(error, cleaned):
                break
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise UserError(f"{count} in the configuration ({source}):\n" + "\n".join(f"  - {p}" for p in problems))
    return instance


@cache
def _adapter(schema: type[T]) -> TypeAdapter[T]:
    """Make the validator of a schema, which takes far longer than to use it."""
    return TypeAdapter(schema)


def _take_out(error: ValidationError, values: dict[str, Any]) -> bool:
    """Remove wrong values, so that the default stands in and what they hid can be checked. False: none removed."""
    removed = False
    for item in error.errors(include_url=False, include_input=False):
        *path, last = dotted(item["loc"], values).split(".")
        inner: Any = values
        for part in path:
            if not isinstance(inner, dict) or part not in inner:
                break
            if not isinstance(inner[part], dict):  # inside a list: the list goes
                last = part
                break
            inner = inner[part]
        if isinstance(inner, dict) and last in inner:
            del inner[last]
            removed = True
    return removed


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass an annotation admits: itself, or a member of a union."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for arg in get_args(annotation) if (found := _dataclass_in(arg))), None)
    return None


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, last key) of every key of a schema."""
    for name, annotation in get_type_hints(schema, include_extras=True).items():
        yield f"{prefix}{name}", name
        if (inner := _dataclass_in(annotation)) is not None:
            yield from _leaves(inner, f"{prefix}{name}.")


def _without_unknown(schema: type, values: Any, prefix: str, known: dict[str, str], problems: list[str]) -> Any:
    """A copy of `values` without unknown keys, which are added to `problems`."""
    if not isinstance(values, dict):
        return values
    hints = get_type_hints(schema, include_extras=True)
    cleaned = {}
    for key, value in values.items():
        if key not in hints:
            near = _did_you_mean(str(key), hints, prefix) or _did_you_mean_elsewhere(str(key), known)
            problems.append(f"{prefix}{key}: unknown key (got {shown(value)}){near}")
            continue
        inner = _dataclass_in(hints[key])
        cleaned[key] = value if inner is None else _without_unknown(inner, value, f"{prefix}{key}.", known, problems)
    return cleaned


def _did_you_mean_elsewhere(word: str, known: dict[str, str]) -> str:
    paths = [path for path, leaf in known.items() if leaf == word] or [
        path for path, leaf in known.items() if difflib.get_close_matches(word, [leaf], cutoff=0.8)
    ]
    return f"; did you mean {' or '.join(paths[:3])}?" if paths else ""
