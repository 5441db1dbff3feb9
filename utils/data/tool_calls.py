"""Schemas of functions and calls of them, in the forms that data sets have, as chat templates expect both.

schema: {"type": "function", "function": {"name", "description", "parameters"}}
call: {"type": "function", "id", "function": {"name", "arguments": {...}}}
"""

import json
from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from .kinds import kind_of

TOOLS = ("tools", "functions")
"""Columns of schemas; `functions` is an older form, without the object around each."""
CALLS = ("tool_calls", "function_call")
"""Keys of a message that calls functions; `function_call` is an older form, with one call."""
NOTHING: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {})
"""Values with which tables say that there is none."""


def schemas(place: str, row: Mapping[str, Any]) -> list[Any]:
    """Return the schemas of functions that a row has in the columns `tools` or `functions`.

    Raises:
        UserError: they are something else.
    """
    column = next((name for name in TOOLS if row.get(name) not in NOTHING), None)
    if column is None:
        return []
    where = f"{place}, column {column!r}"
    value = from_json(where, row[column])
    if not isinstance(value, list):
        value = [value]

    tools = []
    for tool in map(_without_nulls, value):
        # A schema may be in JSON of its own.
        tool = from_json(where, tool)
        is_wrapped = isinstance(tool, dict) and isinstance(tool.get("function"), dict)
        function = tool["function"] if is_wrapped else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(
                f"{where}: expected a list of schemas, each an object with the 'name' of a function, or with "
                f"'function' and that in it, got {json.dumps(tool, ensure_ascii=False)[:80]}."
            )
        tools.append(tool if is_wrapped else {"type": "function", "function": tool})
    return tools


def calls(place: str, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the calls of a message.

    Raises:
        UserError: they are something else.
    """
    key = next((name for name in CALLS if message.get(name) not in NOTHING), None)
    if key is None:
        return []
    return parse_calls(f"{place}, its {key!r}", message[key])


def parse_calls(place: str, value: Any) -> list[dict[str, Any]]:
    """Return calls that are a list, one object, or JSON of either.

    Raises:
        UserError: they are something else.
    """
    value = from_json(place, value)
    return [_call(place, call) for call in (value if isinstance(value, list) else [value])]


def _call(place: str, call: Any) -> dict[str, Any]:
    """Return a call in the form that templates expect.

    Raises:
        UserError: it has no name of a function, or its arguments are no object.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(
            f"{place}: expected a call with the 'name' of a function and its 'arguments', got "
            f"{json.dumps(call, ensure_ascii=False)[:80]}."
        )

    # Other programs call them parameters, or have them in JSON, in which a null is meant.
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = from_json(f"{place}, arguments of {function['name']}", arguments or "{}")
    else:
        arguments = _without_nulls(arguments if arguments is not None else {})
    if not isinstance(arguments, dict):
        raise UserError(
            f"{place}: expected the arguments of {function['name']} as an object, or JSON of one, got "
            f"{kind_of(arguments)}."
        )

    result: dict[str, Any] = {"type": "function"}
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result | {"function": {"name": function["name"], "arguments": arguments}}


def from_json(place: str, value: Any) -> Any:
    """Return the value that a text describes, and any other as it is.

    Raises:
        UserError: the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: expected JSON, got {value[:80]!r} ({error}).") from error


def _without_nulls(value: Any) -> Any:
    """Return a value without the nulls that a table has for keys which other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
