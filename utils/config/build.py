"""Building of a configuration: nested plain values become frozen dataclasses, with every mistake reported at once.

Defaults live in the dataclasses and nowhere else. `build` works for any tree of dataclasses, so `train.py` can join
those of `settings` with those of the other tower.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from .error_messages import describe, did_you_mean, dotted, shown

T = TypeVar("T")


def build(schema: type[T], values: dict[str, Any], *, source: str) -> T:
    """Return an instance of the dataclass `schema` made from nested plain values.

    Args:
        source: where the values come from, for the message.

    Raises:
        UserError: every mistake at once, each with its dotted path, what was got, what is expected, and
            for an unknown key the nearest known one.
    """
    problems: list[str] = []
    remaining = _without_unknown(schema, values, prefix="", names=dict(_leaves(schema)), problems=problems)

    # A wrong value hides others: a dataclass is checked as a whole only when each of its fields is right. So wrong
    # values are taken out, their defaults stand in, and the rest is checked again until nothing new is wrong.
    while True:
        try:
            instance = _adapter(schema).validate_python(remaining)  # type: ignore[arg-type]
            break
        except ValidationError as error:
            problems += [line for line in describe(error, remaining) if line not in problems]
            if not _take_out(error, remaining):
                break

    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"{count} in the configuration ({source}):\n{lines}")
    return instance


@cache
def _adapter(schema: type[T]) -> TypeAdapter[T]:
    """Make the validator of a schema, which takes far longer than to use it."""
    return TypeAdapter(schema)


# --------------------------------------------------------------------------------------- wrong values


def _take_out(error: ValidationError, values: dict[str, Any]) -> bool:
    """Remove the wrong values of nested dicts in place; return False if there was none to remove."""
    removed = False
    for item in error.errors(include_url=False, include_input=False):
        path = dotted(item["loc"], values).split(".")
        section, key = _owner(path, values)
        if isinstance(section, dict) and key in section:
            del section[key]
            removed = True
    return removed


def _owner(path: list[str], values: dict[str, Any]) -> tuple[Any, str]:
    """Return the innermost dict on the way to a value, and the key in it under which the value is.

    What lies inside a list is not removed by itself: the key is then that of the whole list.
    """
    *sections, last = path
    inner: Any = values
    for part in sections:
        if not isinstance(inner, dict) or part not in inner:
            break
        if not isinstance(inner[part], dict):
            return inner, part
        inner = inner[part]
    return inner, last


# --------------------------------------------------------------------------------------- unknown keys


def _without_unknown(schema: type, values: Any, *, prefix: str, names: Mapping[str, str], problems: list[str]) -> Any:
    """Return a copy of `values` without unknown keys, which are added to `problems`.

    Args:
        prefix: dotted path of `values` itself, with its dot.
        names: dotted path -> last key, of every key of the whole configuration.
    """
    if not isinstance(values, dict):
        return values

    hints = get_type_hints(schema, include_extras=True)
    cleaned = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in hints:
            hint = did_you_mean(str(key), hints, prefix) or _did_you_mean_elsewhere(str(key), names)
            problems.append(f"{path}: unknown key (got {shown(value)}){hint}")
            continue

        section = _dataclass_in(hints[key])
        if section is None:
            cleaned[key] = value
        else:
            cleaned[key] = _without_unknown(section, value, prefix=f"{path}.", names=names, problems=problems)
    return cleaned


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, last key) of every key of a schema."""
    for name, annotation in get_type_hints(schema, include_extras=True).items():
        yield f"{prefix}{name}", name

        section = _dataclass_in(annotation)
        if section is not None:
            yield from _leaves(section, f"{prefix}{name}.")


def _dataclass_in(annotation: Any) -> type | None:
    """Return the dataclass that an annotation admits: itself, or a member of a union."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return annotation

    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        for member in get_args(annotation):
            section = _dataclass_in(member)
            if section is not None:
                return section
    return None


def _did_you_mean_elsewhere(word: str, names: Mapping[str, str]) -> str:
    """Return the end of a message: keys of any section that are called so, else those with a name like it."""
    paths = [path for path, name in names.items() if name == word]
    if not paths:
        paths = [path for path, name in names.items() if difflib.get_close_matches(word, [name], cutoff=0.8)]

    if not paths:
        return ""
    return f"; did you mean {' or '.join(paths[:3])}?"
