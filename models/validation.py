"""Checks of what a caller hands in: got, expected and, where it is not plain from these, the remedy."""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from numbers import Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, InstanceOf, ValidationError, create_model


class Validated:
    """Base of the configuration dataclasses: an instance has only values that its annotations admit.

    Types, literals and ranges are those of the annotations, and numbers are finite. Numbers of NumPy and torch become
    Python's; nothing else is converted, so that an instance holds what it was given.

    Raises:
        ValueError: with every wrong field.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)
    """For those who build an instance from plain values."""

    def __post_init__(self) -> None:
        kind = type(self)
        for name, value in vars(self).items():
            object.__setattr__(self, name, as_plain(value))

        try:
            _fields_of(kind).model_validate(vars(self))
        except ValidationError as error:
            raise ValueError(f"{kind.__name__}: {_wrong_fields(error)}") from None


def as_plain(value: Any) -> Any:
    """Return a number of NumPy or torch as Python's, and anything else as it is."""
    is_number = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if is_number else value


@functools.cache
def _fields_of(kind: type) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    fields = {name: (_of_instances(hint), ...) for name, hint in hints.items()}
    return create_model(kind.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)


def _of_instances(hint: Any) -> Any:
    """The annotation, in which a dataclass stands for its instances alone.

    A mapping that pydantic would make an instance of stays one here, and unknown keys in it would go unnoticed.
    """
    if is_dataclass(hint):
        return InstanceOf[hint]
    if get_origin(hint) in (Union, UnionType):
        return Union[tuple(_of_instances(branch) for branch in get_args(hint))]  # noqa: UP007
    return hint


def _wrong_fields(error: ValidationError) -> str:
    """One phrase for each wrong field; the branches of a union, which are all wrong, are joined."""
    expected: dict[str, list[str]] = {}
    values = {}

    for item in error.errors(include_url=False):
        field, *inside = item["loc"]
        place = ".".join([field, *(str(part) for part in inside if isinstance(part, int))])
        values.setdefault(place, item["input"])
        expected.setdefault(place, []).append(item["msg"].removeprefix("Input should be "))

    return "; ".join(f"{place}: got {values[place]!r}, expected {' or '.join(expected[place])}" for place in expected)


def expect(what: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise a TypeError if a value is of another kind.

    Args:
        what: the value's name, for the message.
        expected: the kind in words, and how one comes by it.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{what}: got {_kind_of(value)}, expected {expected}")


def expect_count(what: str, value: Any, least: int, remedy: str = "") -> int:
    """Return a whole number of at least `least`; one of NumPy or torch as Python's.

    Args:
        what: the value's name, for the message.
        remedy: for one that is too small, where that does not say what to do.

    Raises:
        TypeError: not a whole number.
        ValueError: too small.
    """
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{what}: got {value!r}, expected a whole number of at least {least}")

    if count < least:
        raise ValueError(f"{what}: got {count}, expected at least {least}{remedy and f'; {remedy}'}")
    return count


def expect_number(what: str, value: Any) -> float:
    """Return a finite number of at least 0, as a float.

    Args:
        what: the value's name, for the message.

    Raises:
        TypeError: no number.
        ValueError: negative or not finite.
    """
    number = as_plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{what}: got {value!r}, expected a number of at least 0")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{what}: got {number}, expected a finite number of at least 0")
    return float(number)


def expect_texts(texts: Any, documents: Any) -> None:
    """Check texts, and their names where they are given, before they are cut into windows.

    Raises:
        TypeError: a single text, whose characters would be taken for texts; or something that is no text.
        ValueError: not one name for each text.
    """
    expected = "a list of texts, one a document"
    if isinstance(texts, str | bytes | Mapping):
        raise TypeError(f"texts: got {_kind_of(texts)}, expected {expected}; put it in brackets: [text]")
    expect("texts", texts, Sequence, expected)

    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{number}]: got {_kind_of(text)}, expected a str")

    if documents is None:
        return
    if not isinstance(documents, str):
        expect("documents", documents, Sequence, "a list with one name for each text, or None")
    if isinstance(documents, str) or len(documents) != len(texts):
        names = repr(documents) if isinstance(documents, str) else f"{len(documents)} names"
        raise ValueError(f"documents: got {names} for {len(texts)} texts, expected a list with one name for each text")

    for number, name in enumerate(documents):
        if not isinstance(name, str):
            raise TypeError(f"documents[{number}]: got {_kind_of(name)}, expected a str; str(name) makes one")


def _kind_of(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
