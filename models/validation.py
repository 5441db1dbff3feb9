"""Checks of values that a caller hands in: got, expected and, where it is not plain from these, the remedy."""

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

    __pydantic_config__ = ConfigDict(allow_inf_nan=False, extra="forbid")
    """For those who build an instance from plain values."""

    def __post_init__(self) -> None:
        # Frozen dataclasses refuse plain assignment, also here.
        kind = type(self)
        for name, value in vars(self).items():
            object.__setattr__(self, name, as_plain(value))

        try:
            _model_of(kind).model_validate(vars(self))  # type: ignore[arg-type]
        except ValidationError as error:
            raise ValueError(f"{kind.__name__}: {_describe_wrong_fields(error)}") from None


def as_plain(value: Any) -> Any:
    """Return a number of NumPy or torch as Python's, and anything else as it is."""
    is_number = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if is_number else value


@functools.cache
def _model_of(kind: type) -> type[BaseModel]:
    """Return a pydantic model with the fields of a dataclass."""
    annotations = get_type_hints(kind, include_extras=True)
    fields = {name: (_only_instances(annotation), ...) for name, annotation in annotations.items()}
    return create_model(kind.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)


def _only_instances(annotation: Any) -> Any:
    """Return an annotation in which a dataclass stands for its instances alone.

    A mapping that pydantic would make an instance of stays one here, and unknown keys in it would go unnoticed.
    """
    if is_dataclass(annotation):
        return InstanceOf[annotation]
    if get_origin(annotation) in (Union, UnionType):
        branches = tuple(_only_instances(branch) for branch in get_args(annotation))
        return Union[branches]  # noqa: UP007
    return annotation


def _describe_wrong_fields(error: ValidationError) -> str:
    """Return one phrase for each wrong field; the branches of a union, which are all wrong, are joined."""
    values: dict[str, Any] = {}
    expected: dict[str, list[str]] = {}

    for item in error.errors(include_url=False):
        field, *inside = item["loc"]
        # Names in a location are branches of a union, numbers are places in a list.
        indices = [str(part) for part in inside if isinstance(part, int)]
        place = ".".join([field, *indices])
        values.setdefault(place, item["input"])
        expected.setdefault(place, []).append(item["msg"].removeprefix("Input should be "))

    return "; ".join(f"{place}: got {values[place]!r}, expected {' or '.join(expected[place])}" for place in expected)


def expect(
    name: str,
    value: Any,
    kind: type | tuple[type, ...],
    expected: str,
) -> None:
    """Raise a TypeError if a value is of another kind.

    Args:
        name: the value's name, for the message.
        value: the value to check.
        kind: the type that it must have, or several.
        expected: the kind in words, and how one comes by it.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {_kind_of(value)}, expected {expected}")


def expect_count(
    name: str,
    value: Any,
    least: int,
    remedy: str = "",
) -> int:
    """Return a whole number of at least `least`; one of NumPy or torch as Python's.

    Args:
        name: the value's name, for the message.
        value: the value to check.
        least: the smallest number that is allowed.
        remedy: for one that is too small, where that does not say what to do.

    Raises:
        TypeError: not a whole number.
        ValueError: too small.
    """
    # True is a whole number to Python, but never meant as one.
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, expected a whole number of at least {least}")

    if count < least:
        advice = f"; {remedy}" if remedy else ""
        raise ValueError(f"{name}: got {count}, expected at least {least}{advice}")
    return count


def expect_number(name: str, value: Any) -> float:
    """Return a finite number of at least 0, as a float.

    Args:
        name: the value's name, for the message.
        value: the value to check.

    Raises:
        TypeError: no number.
        ValueError: negative or not finite.
    """
    number = as_plain(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name}: got {value!r}, expected a number of at least 0")
    if not (math.isfinite(number) and float(number) >= 0):
        raise ValueError(f"{name}: got {number}, expected a finite number of at least 0")
    return float(number)


def expect_texts(texts: Any, documents: Any) -> None:
    """Check texts, and their names where they are given, before they are cut into windows.

    Args:
        texts: a list of texts, one a document.
        documents: a list with one name for each text, or None.

    Raises:
        TypeError: a single text, whose characters would be taken for texts; or something that is no text.
        ValueError: not one name for each text.
    """
    expected = "a list of texts, one a document"
    if isinstance(texts, str | bytes | Mapping):
        raise TypeError(f"texts: got {_kind_of(texts)}, expected {expected}; put it in brackets: [text]")
    expect("texts", texts, Sequence, expected)

    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}]: got {_kind_of(text)}, expected a str")

    if documents is not None:
        _expect_names(documents, count=len(texts))


def _expect_names(documents: Any, count: int) -> None:
    """Check that there is one name for each text."""
    # A single name is a sequence too, of characters: it is refused by itself, whatever its length.
    if isinstance(documents, str):
        raise ValueError(f"documents: got {documents!r} for {count} texts, expected a list with one name for each text")

    expect("documents", documents, Sequence, "a list with one name for each text, or None")
    if len(documents) != count:
        raise ValueError(
            f"documents: got {len(documents)} names for {count} texts, expected a list with one name for each text"
        )

    for index, name in enumerate(documents):
        if not isinstance(name, str):
            raise TypeError(f"documents[{index}]: got {_kind_of(name)}, expected a str; str(name) makes one")


def _kind_of(value: Any) -> str:
    """Return the type of a value in words."""
    return "None" if value is None else f"a {type(value).__name__}"
