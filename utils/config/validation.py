"""Checks of settings that a program hands in, by the rules that hold for those of a file."""

import functools
from dataclasses import is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, InstanceOf, ValidationError, create_model

from .error_messages import describe


class Validated:
    """Base of the configuration dataclasses: an instance has only values that its annotations admit.

    Types, literals and ranges are those of the annotations, and numbers are finite. Nothing is converted, so that an
    instance holds what it was given.

    Raises:
        ValueError: with every wrong field.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False, extra="forbid")
    """For `config.build`, which makes an instance from plain values."""

    def __post_init__(self) -> None:
        kind = type(self)
        try:
            _fields_of(kind).model_validate(vars(self))  # type: ignore[arg-type]
        except ValidationError as error:
            problems = "; ".join(map(str, describe(error, vars(self))))
            raise ValueError(f"{kind.__name__}: {problems}") from None


@functools.cache
def _fields_of(kind: type) -> type[BaseModel]:
    """Return a pydantic model with the fields of a dataclass, which converts nothing."""
    hints = get_type_hints(kind, include_extras=True)
    fields = {name: (_instances_only(hint), ...) for name, hint in hints.items()}  # ...: every field is required
    return create_model(kind.__name__, __config__=ConfigDict(strict=True, allow_inf_nan=False), **fields)


def _instances_only(hint: Any) -> Any:
    """Return the annotation, in which a dataclass stands for its instances alone.

    A mapping that pydantic would make an instance of stays one here, and unknown keys in it would go unnoticed.
    """
    if is_dataclass(hint):
        return InstanceOf[hint]

    if get_origin(hint) in (Union, UnionType):
        members = tuple(_instances_only(member) for member in get_args(hint))
        return Union[members]  # noqa: UP007 (the operator takes no tuple)
    return hint
