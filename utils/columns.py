"""What the rows of a table hold: plain text, a prompt and its completion, or a conversation."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import UserError


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


class Conversation(NamedTuple):
    """A value that should be a list of messages."""

    messages: Any

    def text(self, place: str, learn_from: str) -> str:
        """JSON of a list of `{"role", "content"}`; empty if there is nothing to learn from.

        Raises:
            UserError: something else than messages with a role and a text.
        """
        messages = self.messages
        if not isinstance(messages, list) or not len(messages):
            got = f"{type(messages).__name__}{' of length 0' * isinstance(messages, list)}"
            raise UserError(f"{place}: expected a list of messages, each with 'role' and 'content', got {got}.")
        kept = []
        for number, message in enumerate(messages):
            there = f"{place}, message {number}"
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                got = (
                    f"the keys {', '.join(map(str, message))}" if isinstance(message, dict) else type(message).__name__
                )
                raise UserError(f"{there}: expected an object with 'role' and 'content', got {got}.")
            if message.get("tool_calls"):
                raise UserError(f"{there}: it calls tools, which is not supported. Leave such conversations out.")
            for key in ("role", "content"):
                if not isinstance(message[key], str):
                    raise UserError(f"{there}: expected text as its {key}, got {type(message[key]).__name__}.")
            kept.append({key: as_text(there, message[key]) for key in ("role", "content")})
        learned = any(m["content"].strip() for m in kept if learn_from == "all" or m["role"] == "assistant")
        return json.dumps(kept, ensure_ascii=False) if learned else ""


def said(conversation: str) -> str:
    """What the messages of a conversation, as `Conversation.text` writes it, say."""
    return "".join(message["content"] for message in json.loads(conversation))


@dataclass(frozen=True)
class Columns:
    """Which columns hold a document: one of messages, or a prompt and its completion, or one of text; whichever of
    these are there, in this order. Where `text` is named, that one."""

    text: str | None = None
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"

    def among(self, place: str, found: Iterable[str]) -> list[str]:
        """The columns to read.

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

    def document(self, names: Sequence[str], values: Sequence[Any]) -> Any:
        """The value of the columns that `among` chose."""
        if None in values:
            return None
        if len(values) == 2:
            roles = zip(("user", "assistant"), values, strict=True)
            return Conversation([{"role": role, "content": content} for role, content in roles])
        return Conversation(values[0]) if names[0] == self.messages != self.text else values[0]
