"""Building of a configuration: nested plain values become frozen dataclasses, with every mistake reported at once.

Defaults live in the dataclasses and nowhere else. `build` works for any tree of
`Validated` dataclasses.
"""

import copy
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import UserError
from .error_messages import Mistake, describe, key_path
from .schema import adapter, keys_of, settings_of
from .yaml_files import get_dotted

T = TypeVar("T")


def build(schema: type[T], values: dict[str, Any], *, source: str) -> T:
    """Return an instance of the dataclass `schema` made from nested plain values.

    Args:
        source: where the values come from, for the message.

    Raises:
        UserError: every mistake at once, each with its dotted path, what was got, what is expected, and
            for an unknown key the nearest known one.
    """
    instance, mistakes = _validate(schema, values)
    _refuse(mistakes, source)
    return instance


def check_values(schema: type, values: dict[str, Any], *, source: str) -> None:
    """Check keys and values as `build` does, but not whether sections contradict one another.

    Raises:
        UserError: as `build`.
    """
    _, mistakes = _validate(schema, values)
    _refuse([mistake for mistake in mistakes if mistake.path], source)


def _refuse(mistakes: list[Mistake], source: str) -> None:
    """Raise a UserError with all mistakes, if there are any."""
    if mistakes:
        count = f"{len(mistakes)} mistakes" if len(mistakes) > 1 else "a mistake"
        lines = "\n".join(f"  - {mistake}" for mistake in mistakes)
        raise UserError(f"{count} in the configuration ({source}):\n{lines}")


def _validate(schema: Any, values: dict[str, Any]) -> tuple[Any, list[Mistake]]:
    """Return an instance and every mistake; with mistakes the instance is of no use."""
    remaining = copy.deepcopy(values)
    _mark_booleans(schema, remaining)
    mistakes: list[Mistake] = []

    # A wrong value hides others: a dataclass is checked as a whole only when each of its fields is right. So wrong
    # values are taken out, their defaults stand in, and the rest is checked again until nothing new is wrong.
    while True:
        try:
            return adapter(schema).validate_python(remaining), _causes(mistakes)
        except ValidationError as error:
            mistakes += [mistake for mistake in describe(error, remaining, keys_of(schema)) if mistake not in mistakes]
            if not _take_out(error, remaining):
                return None, _causes(mistakes)


class _Boolean:
    """A boolean where none is meant, which pydantic takes for no number."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def _mark_booleans(schema: Any, values: dict[str, Any]) -> None:
    """Put a `_Boolean` in place of each boolean, in a setting of nested `values` that has no booleans, in place.

    pydantic would read true and false as the numbers 1 and 0: `curriculum.select: true` would be all positions.
    """
    for key, setting in settings_of(schema).items():
        section, dot, name = key.rpartition(".")
        inner = get_dotted(values, section) if dot else values
        if isinstance(inner, dict) and name in inner and not setting.admits_booleans:
            inner[name] = _marked(inner[name])


def _marked(value: Any) -> Any:
    """Return a value, of which every boolean inside is a `_Boolean`."""
    if isinstance(value, bool):
        return _Boolean(value)
    if isinstance(value, dict):
        return {key: _marked(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(inner) for inner in value]
    return value


def _causes(mistakes: list[Mistake]) -> list[Mistake]:
    """Return the mistakes without those contradictions that a wrong key or value beside them may have made."""
    wrong_keys = {mistake.path for mistake in mistakes if mistake.path}
    wrong_sections = {key.partition(".")[0] for key in wrong_keys}

    causes = []
    for mistake in mistakes:
        # A contradiction belongs to one section, and names the keys of others.
        names_others = not mistake.path and any(_names(mistake.message, key) for key in wrong_keys)
        # A list of several, such as `teachers`, stands in for the section of one.
        section = mistake.section
        is_in_wrong_section = bool(section) and any(wrong in (section, f"{section}s") for wrong in wrong_sections)
        if not is_in_wrong_section and not names_others:
            causes.append(mistake)
    return causes


def _names(message: str, key: str) -> bool:
    """Return whether a message names a key, or one below it; a section alone may be a word of the message."""
    return f"{key}." in message or ("." in key and key in message)


def _take_out(error: ValidationError, values: dict[str, Any]) -> bool:
    """Remove the wrong values of nested dicts in place; return False if there was none to remove."""
    removed = False
    for item in error.errors(include_url=False, include_input=False):
        path = key_path(item["loc"], values)
        if not path:
            continue
        section, key = _owner(path, values)
        if isinstance(section, dict) and key in section:
            del section[key]
            removed = True
    return removed


def _owner(path: list[Any], values: dict[str, Any]) -> tuple[Any, Any]:
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
