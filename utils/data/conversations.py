"""Conversations of data sets, checked and written as JSON.

Their messages may be in the form of `messages` or of ShareGPT. Nothing that would change what is learned is dropped in
silence: it is refused, or noted as not read.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ..errors import UserError
from . import tool_calls
from .kinds import as_text, kind_of

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets keep the thinking before an answer."""
THINKING = re.compile(r"\s*(?:<think>)?.*?</think>\s*", re.DOTALL)
"""Thinking in front of an answer, in its content."""
TAGGED_THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
"""More thinking behind it."""
THINKING_PARTS = ("thinking", "reasoning")
"""Types of the parts of a content that are thinking."""
TEMPLATE_VALUES = "chat_template_kwargs"
"""Column of values for the variables of chat templates, of both models."""
TEACHER_MESSAGES = "teacher_messages"
"""Column of the conversation as the teacher reads it."""
SYSTEM = "system"
"""Column of a system message, beside the messages or the prompt; also the role of such a message."""
SPEAKER_KEYS = ("role", "from", "speaker", "author")
"""Keys of a message that say who speaks."""
TEXT_KEYS = ("content", "value", "text", "parts")
"""Keys of a message that hold what is said."""
CALL_SPEAKERS = ("function_call", "tool_call")
"""Speakers of messages whose text is the JSON of a call."""
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    **dict.fromkeys(CALL_SPEAKERS, "assistant"),
}
"""Speakers by the names that exports and data sets have for them, and the roles that they are."""

INSTRUCTION = "instruction"
"""Column of Alpaca's format that is the prompt."""
INPUT = "input"
"""Column of Alpaca's format: what the instruction is about; empty where it says all itself."""
HISTORY = "history"
"""Column of Alpaca's format with earlier turns, which is not supported."""

LEARNED_KEYS = ("weight", "train", "trainable", "training")
"""Keys of a message that say whether it is learned: 1 or 0."""
UNSUPPORTED_MASKS = ("mask", "masked", "loss_mask", "train_detail")
"""Keys of a message by which other programs choose what is learned, each in its own sense."""
LOSS = "loss"
"""Key of a message by which others say whether it is learned."""

KNOWN_KEYS = frozenset((*SPEAKER_KEYS, *TEXT_KEYS, *LEARNED_KEYS, LOSS, *tool_calls.CALLS, *REASONING))
"""Keys of a message that are read, or refused where they say something."""


# ---------------------------------------------------------------- conversations


@dataclass
class Unread:
    """Names that were met in data and are not read."""

    columns: set[str] = field(default_factory=set)
    """Of tables."""
    keys: set[str] = field(default_factory=set)
    """Of messages."""

    def __str__(self) -> str:
        parts = []
        if self.columns:
            parts.append(f"columns not read: {', '.join(sorted(self.columns))}")
        if self.keys:
            parts.append(f"keys of messages not read: {', '.join(sorted(self.keys))}")
        return "; ".join(parts)


class Conversation(NamedTuple):
    """A value that should be a list of messages."""

    messages: Any
    beside: Mapping[str, Any] = {}
    """Other columns of the row that belong to it."""
    prompted: int = 0
    """Number of first messages that are the prompt of a completion: answers among them are read, not learned."""

    def text(self, place: str, reading: "Reading", unread: Unread | None = None) -> str:
        """Return JSON of a list of `{"role", "content"}`; empty if there is nothing to learn from.

        A message may have `reasoning_content` besides, the thinking before an answer, `tool_calls`, and `weight`: 0
        where it is read and not learned. With tools, values for templates or messages of the teacher's own it is an
        object with `messages` and these.

        Args:
            place: of the row, for messages.
            unread: takes note of keys that are not read.

        Raises:
            UserError: something else than messages with a role and a text, or what would be lost: images.
        """
        self._refuse_unsupported(place)
        self._refuse_masked(place)
        messages = _messages(place, self.messages, reading, unread)

        # Answers in the prompt are examples to read, as a completion is what the row teaches.
        if reading.learn_from != "all":
            for message in messages[: self.prompted]:
                if message["role"] == "assistant":
                    message["weight"] = 0

        messages = self._system_message(place, messages) + messages
        if not any(_teaches(message, reading.learn_from) for message in messages):
            return ""

        beside = {
            "tools": tool_calls.schemas(place, self.beside),
            TEMPLATE_VALUES: self._template_values(place),
            TEACHER_MESSAGES: self._teacher_messages(place, messages, reading, unread),
        }
        beside = {name: value for name, value in beside.items() if value}
        return json.dumps({"messages": messages, **beside} if beside else messages, ensure_ascii=False)

    def _template_values(self, place: str) -> dict[str, Any]:
        """Return the values for the variables of chat templates.

        Raises:
            UserError: they are no object, or would change how conversations are asked for.
        """
        value = self.beside.get(TEMPLATE_VALUES)
        if value in tool_calls.NOTHING:
            return {}
        if isinstance(value, str):
            value = tool_calls.from_json(f"{place}, column {TEMPLATE_VALUES!r}", value)

        taken = {"tools", "messages", "conversation", "chat_template", "add_generation_prompt", "tokenize"}
        if isinstance(value, dict) and (used := sorted(taken & value.keys())):
            raise UserError(
                f"{place}: column {TEMPLATE_VALUES!r} has a value for {used[0]!r}, which chat templates get from "
                "elsewhere. Take it out; the schemas of tools are a column of their own, 'tools'."
            )
        if not isinstance(value, dict):
            raise UserError(
                f"{place}: expected an object of values for the chat templates as column {TEMPLATE_VALUES!r}, such as "
                f'{{"enable_thinking": false}}, got {value!r:.80}.'
            )
        return {name: item for name, item in value.items() if item is not None}

    def _teacher_messages(
        self,
        place: str,
        messages: Sequence[Mapping[str, Any]],
        reading: "Reading",
        unread: Unread | None,
    ) -> list[dict[str, Any]]:
        """Return the messages that the teacher reads in place of these; [] where it reads the same.

        Raises:
            UserError: they do not end with the answers that are learned.
        """
        value = self.beside.get(TEACHER_MESSAGES)
        if value in tool_calls.NOTHING:
            return []
        where = f"{place}, column {TEACHER_MESSAGES!r}"
        if reading.learn_from == "all":
            raise UserError(
                f"{where}: beside messages of the teacher's own only answers can be learned. Expected "
                "data.learn_from=completions."
            )

        result = _messages(where, as_messages("user", value), reading, unread)
        for message in result:
            message.pop("weight", None)

        # A question at the end is answered as the student is to answer it.
        if result[-1]["role"] != "assistant" and messages[-1]["role"] == "assistant":
            answer = {key: item for key, item in messages[-1].items() if key != "weight"}
            result.append(answer)
        _require_same_answers(where, messages, result)
        return result

    def _refuse_unsupported(self, place: str) -> None:
        """Refuse columns that change what is said or asked, and that nothing here reads.

        Raises:
            UserError: one of them holds something.
        """
        if self.beside.get(HISTORY) not in tool_calls.NOTHING:
            raise UserError(
                f"{place}: column {HISTORY!r} changes what the conversation means, and is not supported. Leave such "
                "rows out, or the column, if the conversations are to be learned without it; or write earlier turns "
                "as messages."
            )

        # Alpaca's format: "Translate this" in one column, the text to translate in this one.
        question = self.beside.get(INPUT)
        if question is not None and str(question).strip():
            raise UserError(
                f"{place}: column {INPUT!r} holds a part of what is asked, and is not read beside a prompt. Write it "
                "into the prompt, or leave the column out, if the answer does not depend on it."
            )

    def _refuse_masked(self, place: str) -> None:
        """Refuse a row whose columns say that it is not to be learned.

        Raises:
            UserError: they do.
        """
        for column in (*LEARNED_KEYS, LOSS):
            # A row that is marked as learned is like one without a mark.
            value = self.beside.get(column)
            if _means_no(value):
                raise UserError(
                    f"{place}: column {column!r} is {value!r}, which says that the row is not to be learned. Leave "
                    "such rows out, or the column, if they are to be learned; a single message is masked by a key of "
                    "its own, 'weight': 0."
                )

    def _system_message(self, place: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the message that the column `system` stands for; [] where there is none, or the first one is the same.

        Raises:
            UserError: the column contradicts the first message.
        """
        system = as_text(f"{place}, column {SYSTEM!r}", self.beside.get(SYSTEM))
        if not system.strip():
            return []

        # A table may repeat the column in the first message: the same text is one message.
        if messages[0]["role"] != SYSTEM:
            return [{"role": SYSTEM, "content": system}]
        if messages[0]["content"].strip() == system.strip():
            return []
        raise UserError(
            f"{place}: column {SYSTEM!r} and the first message are different system messages. Expected one of them."
        )


# ---------------------------------------------------------------- messages


class Reading(NamedTuple):
    """Settings of what is learned of conversations."""

    learn_from: Literal["completions", "all"] = "completions"
    """Messages of the assistant, or every one."""
    reasoning: Literal["learn", "read", "drop"] = "learn"
    """Use of the thinking before an answer; `drop` takes it out of the conversation."""


def _teaches(message: Mapping[str, Any], learn_from: str) -> bool:
    """Tell whether there is something to learn from a message."""
    is_learned = learn_from == "all" or message["role"] == "assistant"
    says_something = bool(message["content"].strip()) or "tool_calls" in message
    return is_learned and message.get("weight", 1) != 0 and says_something


def _messages(
    place: str,
    rows: Any,
    reading: Reading,
    unread: Unread | None,
) -> list[dict[str, Any]]:
    """Return messages with the keys that are read.

    Raises:
        UserError: they are no list of messages.
    """
    if not isinstance(rows, list) or not rows:
        got = "an empty list" if isinstance(rows, list) else kind_of(rows)
        raise UserError(f"{place}: expected a list of messages, each with 'role' and 'content', got {got}.")

    messages = [_message(f"{place}, message {number}", row, unread) for number, row in enumerate(rows)]
    if reading.reasoning == "drop":
        for number, message in enumerate(messages):
            _drop_thinking(f"{place}, message {number}", message)
    return messages


def _drop_thinking(place: str, message: dict[str, Any]) -> None:
    """Take the thinking before its answer out of a message.

    Raises:
        UserError: there is nothing but thinking, which was cut short.
    """
    message.pop("reasoning_content", None)
    if message["role"] != "assistant":
        return

    # The first may have no opening tag, which some models are given; others may follow.
    answer = THINKING.sub("", message["content"], count=1)
    answer = TAGGED_THINKING.sub("", answer)
    if answer.lstrip().startswith("<think>"):
        raise UserError(
            f"{place}: its thinking does not end (</think>), so that there is no answer without it. Leave such "
            "conversations out."
        )
    message["content"] = answer


def _require_same_answers(
    place: str,
    messages: Sequence[Mapping[str, Any]],
    teacher_messages: Sequence[Mapping[str, Any]],
) -> None:
    """Check that the teacher's messages end with the answers that the student learns.

    Raises:
        UserError: they do not.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    teacher_answers = [message for message in teacher_messages if message["role"] == "assistant"]
    for number, answer in enumerate(reversed(answers), start=1):
        if answer.get("weight", 1) == 0:
            continue
        same = teacher_answers[-number] if number <= len(teacher_answers) else None
        if same is None or _said(same) != _said(answer):
            got = "no such answer" if same is None else _quoted(same)
            raise UserError(
                f"{place}: expected the answers that are learned at its end, here {_quoted(answer)}, got {got}. Only "
                "what the teacher reads before an answer may differ."
            )


def _said(answer: Mapping[str, Any]) -> tuple[str, Any]:
    """Return what an answer says behind its thinking, and its calls without their ids."""
    calls = [call["function"] for call in answer.get("tool_calls", ())]
    return THINKING.sub("", answer["content"], count=1).strip(), calls


def _thinking(place: str, message: Mapping[str, Any], in_parts: str | None) -> str:
    """Return the thinking before an answer: under one of its keys, or among the parts of the content; or nothing.

    Data sets that were merged may have several of these keys, all but one of them empty, or with the same text.

    Raises:
        UserError: it is no text, or there are several.
    """
    where, remedy = f"{place}, its thinking", "Write it as a text, or leave it out."
    found = [as_text(where, message[key], remedy) for key in REASONING if message.get(key)]
    if in_parts:
        found.append(in_parts)

    texts = list(dict.fromkeys(found))
    if len(texts) > 1:
        raise UserError(
            f"{where}: expected one text, got {len(texts)}: {texts[0]!r:.60} and {texts[1]!r:.60}. Keep one."
        )
    return texts[0] if texts else ""


def _without_thinking(place: str, message: Mapping[str, Any], thinking: str) -> str:
    """Return the content of a message that has its thinking under a key of its own, without a copy of it.

    Raises:
        UserError: the content has other thinking.
    """
    content = message["content"]
    in_content = THINKING.match(content) if message["role"] == "assistant" else None
    if in_content is None:
        return content

    text = in_content[0].strip().removeprefix("<think>").removesuffix("</think>").strip()
    if text and text != thinking.strip():
        raise UserError(
            f"{place}, its thinking: expected one text, got {thinking!r:.60} under a key of its own and {text!r:.60} "
            "in its content. Keep one."
        )
    return content[in_content.end() :]


def _quoted(answer: Mapping[str, Any]) -> str:
    """Return the beginning of what an answer says, and its calls, for a message."""
    said, calls = _said(answer)
    called = f"calls {json.dumps(calls, ensure_ascii=False)[:80]}" if calls else ""
    return " and ".join(part for part in (repr(said[:80]) if said or not calls else "", called) if part)


def _message(place: str, message: Any, unread: Unread | None) -> dict[str, Any]:
    """Return the keys of a message that are read.

    Raises:
        UserError: it has no role and text, or holds more that would change what it means.
    """
    _require_role_and_content(place, message)
    role = _role(place, message)
    content = _first(message, TEXT_KEYS)
    calls = tool_calls.calls(place, message)
    if _speaker(message) in CALL_SPEAKERS:
        calls = tool_calls.parse_calls(f"{place}, its call", content)
        content = None

    # A call needs no text, and a result may be an object.
    thinking, content = _joined_parts(place, content)
    if content is None and calls:
        content = ""
    if role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    if not isinstance(content, str):
        raise UserError(
            f"{place}: expected text as its content, got {kind_of(content)}. Write what is said as a text, or "
            "leave the message out."
        )
    result: dict[str, Any] = {"role": as_text(place, role), "content": as_text(place, content)}

    if thinking := _thinking(place, message, thinking):
        result["reasoning_content"] = thinking
        result["content"] = _without_thinking(place, result, thinking)
    if calls:
        if role != "assistant":
            raise UserError(
                f"{place}: expected calls of tools in messages of the assistant, got them in one of {role}."
            )
        result["tool_calls"] = calls

    # A result names the call that it answers.
    results = [key for key in ("name", "tool_call_id") if role == "tool" and isinstance(message.get(key), str)]
    result |= {key: message[key] for key in results}

    _refuse_masks(place, message)
    if not _is_learned(place, message):
        result["weight"] = 0

    if unread is not None:
        present = {key for key, value in message.items() if value is not None}
        unread.keys |= {str(key) for key in present - KNOWN_KEYS - {*results}}
    return result


def _first(message: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the value of the first of these keys that has one. A table may have several, all but one empty."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _require_role_and_content(place: str, message: Any) -> None:
    """Check that a message is an object with these two keys, or others that mean the same.

    Raises:
        UserError: it is not.
    """
    if not isinstance(message, dict):
        got = type(message).__name__
    elif not {*SPEAKER_KEYS} & message.keys() or not {*TEXT_KEYS, *tool_calls.CALLS} & message.keys():
        got = f"the keys {', '.join(map(str, message))}"
    else:
        return
    raise UserError(f"{place}: expected an object with 'role' and 'content' (or 'from' and 'value'), got {got}.")


def _speaker(message: Mapping[str, Any]) -> Any:
    """Return the name of who speaks, without capitals."""
    name = _first(message, SPEAKER_KEYS)
    return name.lower() if isinstance(name, str) else name


def _role(place: str, message: Mapping[str, Any]) -> str:
    """Return the role of who speaks.

    Raises:
        UserError: nobody knows who speaks.
    """
    speaker = _speaker(message)
    role = message.get("role")
    if isinstance(speaker, str) and speaker in ROLES:
        return ROLES[speaker]

    # Templates may know other roles than those of exports.
    if isinstance(role, str):
        return role
    if role is not None:
        raise UserError(
            f"{place}: expected text as its role, got {kind_of(role)}. Write who speaks, such as user or assistant."
        )
    raise UserError(
        f"{place}: expected {', '.join(ROLES)} as its 'from', got {_first(message, SPEAKER_KEYS)!r}. Rename it to one "
        "of these, or leave such conversations out."
    )


def _joined_parts(place: str, content: Any) -> tuple[str, Any]:
    """Return thinking, and a content that comes as a list of parts as one text, and any other as it is.

    Raises:
        UserError: a part is no text.
    """
    if not isinstance(content, list):
        return "", content

    thinking: list[str] = []
    texts: list[str] = []
    for part in content:
        # A part is a text, or an object of a type: text, image, ...
        text = part
        kind = type(part).__name__
        if isinstance(part, dict):
            kind = str(part.get("type") or "text")
            text = part.get("text")
            if kind in THINKING_PARTS:
                text = _first(part, (*THINKING_PARTS, "text"))

        is_text = not isinstance(part, dict) or kind.endswith("text") or kind in THINKING_PARTS
        if not is_text or not isinstance(text, str):
            raise UserError(
                f"{place}: its content holds a part that is no text ({kind}), which no model here reads. Leave such "
                "conversations out, or the part, if the answers do not depend on it."
            )
        (thinking if kind in THINKING_PARTS else texts).append(text)
    return "".join(thinking), "".join(texts)


def _refuse_masks(place: str, message: Mapping[str, Any]) -> None:
    """Refuse keys that may say that a message, or a part of it, is not learned.

    Raises:
        UserError: the message has one.
    """
    masks = [key for key in UNSUPPORTED_MASKS if message.get(key) not in (None, [], {}, "")]

    # `loss: true` says what is so anyway.
    if message.get(LOSS) not in (None, True):
        masks.append(LOSS)

    if masks:
        raise UserError(
            f"{place}: its key {masks[0]!r} is {message[masks[0]]!r}, which may say that it is not learned, and is not "
            "supported. Say it with 'weight': 0 (read, not learned) or 1, and leave the key out."
        )


def _means_no(value: Any) -> bool:
    """Tell whether a row's value is 0 or false; a table of text has it in words."""
    if isinstance(value, str):
        return value.strip().lower() in ("0", "0.0", "false")
    return isinstance(value, (bool, int, float)) and value == 0


def _is_learned(place: str, message: Mapping[str, Any]) -> bool:
    """Tell whether a message is to be learned, as its keys `weight`, `train`, ... say.

    Raises:
        UserError: they say something else than yes or no.
    """
    learned = True
    for key in LEARNED_KEYS:
        value = message.get(key)
        if value is None:
            continue

        # Shares between 0 and 1 would need a loss that is weighted by message.
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise UserError(f"{place}: expected 0 or 1 as its {key}, got {value!r}.")
        learned = learned and bool(value)
    return learned


def as_messages(role: str, value: Any) -> list[Any]:
    """Return a prompt or a completion as messages: those that it is a list of, or one of this role."""
    # A list of anything else is one content, in parts.
    is_list = isinstance(value, list) and bool(value)
    if is_list and all(isinstance(item, dict) and {*SPEAKER_KEYS} & item.keys() for item in value):
        return value
    return [{"role": role, "content": value}]


def text_of_messages(conversation: str) -> str:
    """Return the words of all messages of a conversation, which is JSON as `Conversation.text` writes it."""
    value = json.loads(conversation)
    texts = []
    for message in value["messages"] if isinstance(value, dict) else value:
        texts += [message.get("reasoning_content", ""), message["content"]]
        for call in message.get("tool_calls", ()):
            texts.append(json.dumps(call["function"], ensure_ascii=False))
    return "".join(texts)
