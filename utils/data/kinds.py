"""Kinds of values that files hold: words for them in messages, and the check that one is a text."""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

from ..errors import UserError

OTHER_COLUMN = "Name a column of texts: --set data.text_column=NAME."
"""What to do about a column of something else."""


def kind_of(value: Any) -> str:
    """Return what a value is, in the words of JSON."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, Number):
        return f"the number {value}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "a list"
    return f"a value of type {type(value).__name__}"


def as_text(place: str, value: Any, remedy: str = OTHER_COLUMN) -> str:
    """Return a value that should be a text; None is an empty one.

    Args:
        remedy: what to do about another value.

    Raises:
        UserError: it is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{place}: expected text, got {kind_of(value)}. {remedy}")

    # JSON can hold half a surrogate pair, which has no UTF-8: no hash and no tokenizer would take it.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: character {error.start} is half of a surrogate pair, which is no text. Repair the file."
        ) from None
    return value
