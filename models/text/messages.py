"""Conversations taken apart: what is said in them (fields), and the outline around it, as chat templates read both.

A conversation arrives as JSON: a list of messages, or an object with `messages` and what belongs to them (`tools`,
`chat_template_kwargs`, `teacher_messages`). A message has `role` and `content`, perhaps `reasoning_content` (thinking
before an answer), `tool_calls`, `tool_call_id` and `name` (of a result), and `weight` (0: read, not learned).

Fields are what a mark can stand for: the content, the thinking, and the texts among the arguments of tool calls. All
else of a message (its role, names of functions, numbers, keys) is its shape.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

MARK = "\U0010fffd"
"""Private character around the alias of a control token or the number of a content; in contents it becomes U+FFFD."""

BREAK = "\U0010fffc"
"""Private character between texts that no token may join; in contents it becomes U+FFFD."""

PLACEHOLDER = re.compile(f"{MARK}(\\d+)\\.(\\d+){MARK}")
"""Text in place of a content: the number of its message, and its own in the message."""

THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
"""Thinking and the answer behind it, as models write them; the opening tag may stand in the generation prompt."""

_ARGUMENT = re.compile(f"{BREAK}(\\d+){BREAK}")
"""Text in the arguments of a shape's tool calls, in place of a field."""


# ---------------------------------------------------------------- conversations as they arrive


@dataclass(frozen=True)
class Conversation:
    """A conversation, as it is handed in."""

    messages: list[dict[str, Any]]
    """As the student reads them."""
    teacher_messages: list[dict[str, Any]] | None = None
    """As the teacher reads them, where it knows more; its last answers are the student's."""
    tools: tuple[Any, ...] = ()
    """Schemas of the functions that the assistant may call."""
    variables: Mapping[str, Any] | None = None
    """Values for the chat templates of both models (`chat_template_kwargs`)."""

    @classmethod
    def parse(cls, text: str) -> "Conversation":
        """Return the conversation that JSON describes."""
        value = json.loads(text)
        if isinstance(value, list):
            return cls(value)
        return cls(
            messages=value["messages"],
            teacher_messages=value.get("teacher_messages"),
            tools=tuple(value.get("tools", ())),
            variables=value.get("chat_template_kwargs"),
        )

    def of_side(self, index: int) -> list[dict[str, Any]]:
        """Return the messages as student (0) or teacher (1) reads them."""
        if index == 1 and self.teacher_messages is not None:
            return self.teacher_messages
        return self.messages

    def counterparts(self, index: int) -> dict[int, int]:
        """Return the number of each of the student's messages among those that a side reads.

        Where the teacher has messages of its own, answers correspond from the last one backwards, and no others.
        """
        if index == 0 or self.teacher_messages is None:
            return {number: number for number in range(len(self.messages))}

        pair = [answers_of(messages) for messages in (self.messages, self.teacher_messages)]
        return dict(zip(*(reversed(answers) for answers in pair), strict=False))


def answers_of(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the messages that the assistant says."""
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def cleaned(value: Any, clean: Callable[[str], str]) -> Any:
    """Return a value of JSON in which every text is cleaned."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {clean(key): cleaned(item, clean) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item, clean) for item in value]
    return value


# ---------------------------------------------------------------- messages


class Shape(NamedTuple):
    """All of a message but the texts of its fields, which are what is said in it.

    Its fields are, in this order, those of the content, the thinking and the texts among the arguments of its calls.
    """

    role: str
    literals: tuple[str, ...]
    """Texts of the content around its fields: one more than there are fields in it."""
    has_reasoning: bool = False
    """Whether a field behind those of the content is the thinking, under a key of its own."""
    calls: str = ""
    """JSON of the tool calls, with numbered places in their arguments; empty: it calls none."""
    arguments: int = 0
    """Texts among the arguments of the calls, each of which is a field."""
    others: tuple[tuple[str, str], ...] = ()
    """Other keys of the message and their values: the name of a function and the id of its call."""

    @property
    def contents(self) -> int:
        """Number of fields that the content has."""
        return len(self.literals) - 1

    @property
    def content_field(self) -> int | None:
        """Number of the field that is the content, behind any thinking in it."""
        return self.contents - 1 if self.contents else None

    @property
    def reasoning_field(self) -> int | None:
        """Number of the field that is the thinking."""
        if self.contents > 1:
            return 0
        return self.contents if self.has_reasoning else None

    @property
    def first_argument(self) -> int:
        """Number of the first field that is a text of the arguments."""
        return self.contents + self.has_reasoning

    @property
    def fields(self) -> int:
        """Number of all fields."""
        return self.first_argument + self.arguments

    def message(self, fields: Sequence[str], *, arguments_as_text: bool = False) -> dict[str, Any]:
        """Return the message with these fields, as templates read it.

        Args:
            arguments_as_text: the arguments of a call are JSON, not an object.
        """
        content = self.literals[0]
        for field, literal in zip(fields, self.literals[1:], strict=False):
            content += field + literal

        message: dict[str, Any] = {"role": self.role, "content": content, **dict(self.others)}
        if self.has_reasoning:
            thinking = fields[self.contents]
            message |= {"reasoning_content": thinking, "thinking": thinking}
        if self.calls:
            calls = _filled(json.loads(self.calls), fields[self.first_argument :])
            message["tool_calls"] = _with_text_arguments(calls) if arguments_as_text else calls
        return message

    def marks(self, number: int) -> list[str]:
        """Return marks for its fields, `number` being its place in the conversation."""
        return [f"{MARK}{number}.{field}{MARK}" for field in range(self.fields)]


def _filled(value: Any, texts: Sequence[str]) -> Any:
    """Return a value of JSON with texts in the numbered places of it."""

    def fill(text: str) -> str:
        return _ARGUMENT.sub(lambda place: texts[int(place[1])], text)

    return cleaned(value, fill)


def _with_text_arguments(calls: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tool calls whose arguments are JSON."""
    result = []
    for call in calls:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        result.append(call | {"function": call["function"] | {"arguments": arguments}})
    return result


class _Arguments:
    """Texts among the arguments of tool calls, taken out of them."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def without_texts(self, value: Any) -> Any:
        """Return a value of JSON with numbered places for its texts; empty ones stay, as templates may leave them out.

        Keys stay, because templates and models look for them.
        """
        if isinstance(value, str) and value:
            self.texts.append(value)
            return f"{BREAK}{len(self.texts) - 1}{BREAK}"
        if isinstance(value, dict):
            return {key: self.without_texts(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.without_texts(item) for item in value]
        return value


def _calls_without_texts(calls: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return JSON of tool calls with places for the texts of their arguments, and these texts."""
    taken = _Arguments()
    shapes = []
    for call in calls:
        arguments = taken.without_texts(call["function"]["arguments"])
        shapes.append(call | {"function": call["function"] | {"arguments": arguments}})
    return json.dumps(shapes, ensure_ascii=False), taken.texts


class Message(NamedTuple):
    """A message, taken apart into the texts that are said in it and the shape around them."""

    shape: Shape
    fields: tuple[str, ...]

    @classmethod
    def of(
        cls,
        message: dict[str, Any],
        *,
        strip: bool,
        cut: bool,
    ) -> "Message":
        """Take a message apart.

        Args:
            strip: leave out the white space around its content.
            cut: make the thinking in an assistant's content, and the answer behind it, fields of their own.
        """
        role = message["role"]
        content = message["content"]
        reasoning = message.get("reasoning_content")
        if strip:
            content = content.strip()
            reasoning = None if reasoning is None else reasoning.strip()

        literals: tuple[str, ...] = ("", "")
        fields: tuple[str, ...] = (content,)
        thought = THOUGHT.fullmatch(content) if cut and role == "assistant" else None
        if thought is not None:
            opening, thinking, closing, answer = thought.groups()
            literals = (opening, closing, "")
            fields = (thinking, answer)

        calls = ""
        texts: list[str] = []
        if message.get("tool_calls"):
            calls, texts = _calls_without_texts(message["tool_calls"])

            # Templates write a call without a content otherwise than one behind a content.
            if not content:
                literals, fields = ("",), ()

        if reasoning is not None:
            fields = (*fields, reasoning)
        shape = Shape(
            role=role,
            literals=literals,
            has_reasoning=reasoning is not None,
            calls=calls,
            arguments=len(texts),
            others=tuple((key, message[key]) for key in ("name", "tool_call_id") if key in message),
        )
        return cls(shape, (*fields, *texts))

    def as_dict(self) -> dict[str, Any]:
        """Return the message, as templates read it."""
        return self.shape.message(self.fields)


# ---------------------------------------------------------------- outlines


@dataclass(frozen=True)
class Outline:
    """All that a template reads of a conversation but what is said in it."""

    shapes: tuple[Shape, ...]
    tools: str = ""
    """JSON of the schemas of functions; empty where there are none."""
    variables: str = ""
    """JSON of values for the template; empty where there are none."""

    def first(self, count: int) -> "Outline":
        """Return the outline of the first messages."""
        return replace(self, shapes=self.shapes[:count])

    def without_tools(self) -> "Outline":
        """Return the outline of the same messages without schemas."""
        return replace(self, tools="")

    def fixed_texts(self) -> Iterator[str]:
        """Yield the texts of data that templates write as a part of the outline: of schemas, and of calls."""
        yield from _texts_in(json.loads(self.tools or "[]"))
        for shape in self.shapes:
            yield from _texts_in(json.loads(shape.calls or "[]"))
            yield from (value for _, value in shape.others)


def _texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts_in(item)
