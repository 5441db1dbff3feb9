"""Contents of a table's rows: plain text, a prompt and its completion, or a conversation."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UserError


def as_text(place: str, value: Any) -> str:
    """A value that should be a text; None is an empty one.

    Raises:
        UserError: it is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{place}: expected text, got {type(value).__name__}. Name a column of texts: --set data.text_column=NAME."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: character {error.start} is half of a surrogate pair, which is no text. Repair the file."
        ) from None
    return value


REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets keep the thinking before an answer."""
UNSUPPORTED_BESIDE = ("tools", "functions", "chat_template_kwargs")
"""Columns that change what a conversation means, and that nothing here honours."""
SYSTEM = "system"
INPUT = "input"
"""Column of Alpaca's format: a part of what is asked, beside a prompt."""

LEARNED_KEYS = ("weight", "train", "trainable", "training")
"""Keys of a message that say whether it is learned: 1 or 0."""
UNSUPPORTED_MASKS = ("mask", "masked", "loss_mask", "train_detail")
"""Keys of a message by which other programs choose what is learned, each in its own sense."""
LOSS = "loss"
"""Key of a message by which others say whether it is learned."""


@dataclass
class Unread:
    """Keys that were met in data and are not read."""

    columns: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    """Of messages."""

    def __str__(self) -> str:
        parts = [f"columns not read: {', '.join(sorted(self.columns))}"] if self.columns else []
        if self.keys:
            parts.append(f"keys of messages not read: {', '.join(sorted(self.keys))}")
        return "; ".join(parts)


class Conversation(NamedTuple):
    """A value that should be a list of messages."""

    messages: Any
    beside: Mapping[str, Any] = {}
    """Other columns of the row that belong to it."""
    prompted: int = 0
    """The first messages, which are the prompt of a completion: answers among them are read, not learned."""

    def text(self, place: str, learn_from: str, unread: Unread | None = None) -> str:
        """JSON of a list of `{"role", "content"}`; empty if there is nothing to learn from.

        A message may have `reasoning_content` besides, the thinking before an answer, and `weight`: 0 where it is read
        and not learned.

        Args:
            unread: takes note of keys that are not read.

        Raises:
            UserError: something else than messages with a role and a text, or what would be lost: tools, images.
        """
        messages = self.messages
        if not isinstance(messages, list) or not len(messages):
            got = f"{type(messages).__name__}{' of length 0' * isinstance(messages, list)}"
            raise UserError(f"{place}: expected a list of messages, each with 'role' and 'content', got {got}.")

        self._refuse_unsupported(place)
        self._refuse_masked(place)
        kept = [_message(f"{place}, message {number}", message, unread) for number, message in enumerate(messages)]
        if learn_from != "all":
            for message in kept[: self.prompted]:
                if message["role"] == "assistant":
                    message["weight"] = 0

        kept = self._system(place, kept) + kept

        for message in kept:
            answers = learn_from == "all" or message["role"] == "assistant"
            if answers and message.get("weight", 1) and message["content"].strip():
                return json.dumps(kept, ensure_ascii=False)
        return ""

    def _refuse_unsupported(self, place: str) -> None:
        """Refuse columns that change what is said or asked, and that nothing here reads.

        Raises:
            UserError: one of them holds something.
        """
        for column in UNSUPPORTED_BESIDE:
            if self.beside.get(column) not in (None, [], {}, "", "[]", "{}"):
                raise UserError(
                    f"{place}: column {column!r} changes what the conversation means, and is not supported. Leave such "
                    "rows out, or the column, if the conversations are to be learned without it."
                )

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
            value = self.beside.get(column)
            if _means_no(value):
                raise UserError(
                    f"{place}: column {column!r} is {value!r}, which says that the row is not to be learned. Leave "
                    "such rows out, or the column, if they are to be learned; a single message is masked by a key of "
                    "its own, 'weight': 0."
                )

    def _system(self, place: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The message that the column `system` stands for, where there is one."""
        system = as_text(f"{place}, column {SYSTEM!r}", self.beside.get(SYSTEM))
        if not system.strip():
            return []
        if messages[0]["role"] != SYSTEM:
            return [{"role": SYSTEM, "content": system}]
        if messages[0]["content"].strip() == system.strip():
            return []
        raise UserError(
            f"{place}: column {SYSTEM!r} and the first message are different system messages. Expected one of them."
        )


def _message(place: str, message: Any, unread: Unread | None) -> dict[str, Any]:
    """Keys that are read of a message.

    Raises:
        UserError: it has no role and text, or holds more that would change what it means.
    """
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        got = f"the keys {', '.join(map(str, message))}" if isinstance(message, dict) else type(message).__name__
        raise UserError(f"{place}: expected an object with 'role' and 'content', got {got}.{_from_value(message)}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise UserError(f"{place}: it calls tools ({key!r}), which is not supported. Leave such conversations out.")

    content = _joined_parts(place, message["content"])
    for key, value in (("role", message["role"]), ("content", content)):
        if not isinstance(value, str):
            raise UserError(f"{place}: expected text as its {key}, got {type(value).__name__}.")
    read = {"role": as_text(place, message["role"]), "content": as_text(place, content)}

    reasoning = [message[key] for key in REASONING if message.get(key)]
    if reasoning:
        read["reasoning_content"] = as_text(f"{place}, its thinking", reasoning[0])
    _refuse_masks(place, message)
    if not _is_learned(place, message):
        read["weight"] = 0
    if unread is not None:
        known = {"role", "content", *LEARNED_KEYS, LOSS, "tool_calls", "function_call", *REASONING}
        unread.keys |= {str(key) for key, value in message.items() if key not in known and value is not None}
    return read


def _joined_parts(place: str, content: Any) -> Any:
    """A content that comes as a list of parts, as one text.

    Raises:
        UserError: a part is no text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type", "something") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                f"{place}: its content holds a part that is no text ({kind}). Leave such conversations out."
            )
        texts.append(text)
    return "".join(texts)


def _refuse_masks(place: str, message: Mapping[str, Any]) -> None:
    """Refuse keys that may say that a message, or a part of it, is not learned.

    Raises:
        UserError: the message has one.
    """
    masks = [key for key in UNSUPPORTED_MASKS if message.get(key) not in (None, [], {}, "")]
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
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise UserError(f"{place}: expected 0 or 1 as its {key}, got {value!r}.")
        learned = learned and bool(value)
    return learned


def _from_value(message: Any) -> str:
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return ""
    return " Rename 'from' and 'value' to these, and what 'from' says (human, gpt) to user and assistant."


def _as_messages(role: str, value: Any) -> list[Any]:
    """Return a prompt or a completion as messages: those that it is a list of, or one of this role."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return value
    return [{"role": role, "content": value}]


def text_of_messages(conversation: str) -> str:
    """Return the words of all messages of a conversation, which is JSON as `Conversation.text` writes it."""
    texts = []
    for message in json.loads(conversation):
        texts += [message.get("reasoning_content", ""), message["content"]]
    return "".join(texts)


@dataclass(frozen=True)
class Columns:
    """Columns that hold a document: one of messages, or a prompt and its completion, or one of text; those that are
    there, in this order. Where `text` is named, that one."""

    text: str | None = None
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    unread: Unread = field(default_factory=Unread, compare=False)
    """Takes note of columns that are met and not read."""

    def among(self, place: str, found: Iterable[str]) -> list[str]:
        """The columns that hold a document.

        Raises:
            UserError: there are none.
        """
        found = list(found)
        ways = [[self.text]] if self.text else [[self.messages], [self.prompt, self.completion], ["text"]]
        for names in ways:
            if set(names) <= set(found):
                return names
        expected = (
            f"{self.text!r}" if self.text else f"'text', {self.messages!r}, or {self.prompt!r} and {self.completion!r}"
        )
        raise UserError(
            f"{place}: no column {expected}. Columns found: {', '.join(map(str, found)) or 'none'}. Name yours: "
            "--set data.text_column=NAME (or data.messages_column, data.prompt_column and data.completion_column)."
        )

    def to_read(self, place: str, found: Iterable[str]) -> list[str]:
        """The columns to read: those of `among`, and what belongs to a conversation beside them.

        Raises:
            UserError: see `among`.
        """
        found = list(found)
        names = self.among(place, found)
        checked: list[str] = []
        if self._of_conversation(names):
            beside = [SYSTEM, *UNSUPPORTED_BESIDE]
            if self.prompt in names:
                beside.append(INPUT)
            names = [*names, *(name for name in beside if name in found and name not in names)]
            checked = [name for name in (*LEARNED_KEYS, LOSS) if name in found and name not in names]

        self.unread.columns.update(str(name) for name in found if name not in names)
        return [*names, *checked]

    def document(self, names: Sequence[str], values: Sequence[Any]) -> Any:
        """The value of the columns that `to_read` chose."""
        row = dict(zip(names, values, strict=True))
        chosen = self.among("", names)
        if any(row[name] is None for name in chosen):
            return None
        if not self._of_conversation(chosen):
            return row[chosen[0]]
        beside = {name: value for name, value in row.items() if name not in chosen}
        if len(chosen) == 1:
            return Conversation(row[self.messages], beside)
        prompt = _as_messages("user", row[self.prompt])
        completion = _as_messages("assistant", row[self.completion])
        return Conversation([*prompt, *completion], beside, prompted=len(prompt))

    def _of_conversation(self, names: Sequence[str]) -> bool:
        return not self.text and (self.messages in names or self.completion in names)
