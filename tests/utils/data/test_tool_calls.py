"""Calls of functions and their schemas, in the forms that data sets have."""

import pytest

from utils.config.settings import template_values
from utils.data.tool_calls import calls, schemas
from utils.errors import UserError

SCHEMA = {"name": "find", "parameters": {"type": "object"}}
WRAPPED = {"type": "function", "function": SCHEMA}
FUNCTION = {"name": "find", "arguments": {"place": "Ulm"}}
CALL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [WRAPPED]},
        {"tools": [SCHEMA]},
        {"functions": [SCHEMA], "tools": None},
        {"tools": '[{"name": "find", "parameters": {"type": "object"}}]'},
        {"tools": ['{"name": "find", "parameters": {"type": "object"}}']},
        {"tools": [{"type": "function", "function": {**SCHEMA, "strict": None}}]},
    ],
)
def test_schemas_in_every_form_are_one(row):
    assert schemas("data.jsonl:1", row) == [WRAPPED]


@pytest.mark.parametrize("nothing", [None, "", "[]", [], "null"])
def test_an_empty_column_has_no_schemas(nothing):
    assert schemas("data.jsonl:1", {"tools": nothing}) == []


@pytest.mark.parametrize(
    "message",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": [FUNCTION]},
        {"tool_calls": '[{"name": "find", "arguments": {"place": "Ulm"}}]'},
        {"tool_calls": [{"name": "find", "arguments": '{"place": "Ulm"}'}]},
        {"tool_calls": [{"name": "find", "parameters": {"place": "Ulm"}}]},
        {"tool_calls": [], "function_call": FUNCTION},
        {"tool_calls": [{"name": "find", "arguments": {"place": "Ulm", "way": None}}]},
    ],
)
def test_calls_in_every_form_are_one(message):
    assert calls("data.jsonl:1", message) == [CALL]


def test_a_null_in_json_is_an_argument():
    (call,) = calls("", {"tool_calls": [{"name": "find", "arguments": '{"place": null}'}]})
    assert call["function"]["arguments"] == {"place": None}


def test_a_call_keeps_its_id():
    assert calls("", {"tool_calls": [{**CALL, "id": "a1"}]}) == [{**CALL, "id": "a1"}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "expected JSON, got '{'"),
        ([{"arguments": {}}], "expected a call with the 'name' of a function"),
        (
            [{"name": "find", "arguments": [1]}],
            "the arguments of find as an object, or JSON of one, got a list",
        ),
        ([3], "expected a call with the 'name' of a function and its 'arguments', got 3"),
    ],
)
def test_something_else_is_refused_with_its_place(value, message):
    with pytest.raises(UserError, match=rf"data\.jsonl:1, its 'tool_calls'.*{message}"):
        calls("data.jsonl:1", {"tool_calls": value})


def test_values_for_templates_are_numbers_switches_or_texts():
    settings = ["enable_thinking=false", "effort=high", "depth=2", "none=null", "url=a=b"]
    expected = {"enable_thinking": False, "effort": "high", "depth": 2, "none": "null", "url": "a=b"}
    assert template_values(settings) == expected
