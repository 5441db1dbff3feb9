"""Columns of a table that hold its documents: plain text, a prompt and its completion, or a conversation.

Conversations may be in the form of `messages`, of ShareGPT (`conversations`) or of Alpaca (`instruction`, `output`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UserError
from . import tool_calls
from .conversations import (
    HISTORY,
    INPUT,
    INSTRUCTION,
    LEARNED_KEYS,
    LOSS,
    SYSTEM,
    TEACHER_MESSAGES,
    TEMPLATE_VALUES,
    Conversation,
    Unread,
    as_messages,
)
from .kinds import as_text

OUTPUT = "output"
"""Column of Alpaca's format that is the completion."""
SHAREGPT = "conversations"
"""Column of ShareGPT's format: lists of messages with `from` and `value`."""
OTHER_LISTS = ("conversation", "dialogue", "dialog")
"""Other columns that hold lists of messages in data sets; read where a table has nothing else."""
BESIDE = (*tool_calls.TOOLS, TEMPLATE_VALUES, TEACHER_MESSAGES)
"""Columns that belong to a conversation, beside its messages."""


class Routed(NamedTuple):
    """A document, and which teachers it is for."""

    document: Any
    route: str


def _route(value: Any) -> str:
    """Return a value of a column as a route; empty where the row has none."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@dataclass(frozen=True)
class Columns:
    """Names of the columns that may hold a document.

    The first of these that a table has is read: the named `text`, and nothing else where it is named; else `messages`;
    else `conversations`; else `prompt` and `completion`; else `instruction` and `output`; else a column `text`; else
    another list of messages (`OTHER_LISTS`).
    """

    text: str | None = None
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    tokenizer: str | None = None
    """Name of the tokenizer that decodes the columns of captures."""
    route: str | None = None
    """Column that says which teachers a row is for; where one is named, every document is `Routed`."""
    unread: Unread = field(default_factory=Unread, compare=False)
    """Takes note of columns that are met and not read."""

    def document_columns(self, place: str, names: Iterable[str]) -> list[str]:
        """Return the columns of a table that hold a document.

        Args:
            names: of all its columns.

        Raises:
            UserError: there are none.
        """
        names = list(names)
        if self.text:
            choices = [[self.text]]
            expected = f"{self.text!r}"
        else:
            choices = [
                *([column] for column in self._lists_of_messages),
                *self._pairs,
                ["text"],
                *([name] for name in OTHER_LISTS),
            ]
            pairs = ", or ".join(f"{prompt!r} and {completion!r}" for prompt, completion in self._pairs)
            expected = f"'text', {', '.join(map(repr, self._lists_of_messages))}, or {pairs}"

        for choice in choices:
            if set(choice) <= set(names):
                return choice
        raise UserError(
            f"{place}: no column {expected}. Columns found: {', '.join(map(str, names)) or 'none'}. Name yours: "
            "--set data.text_column=NAME (or data.messages_column, data.prompt_column and data.completion_column)."
        )

    def columns_to_read(self, place: str, names: Iterable[str]) -> list[str]:
        """Return the columns to read: those of `document_columns`, and what belongs to a conversation beside them.

        Args:
            names: of all columns of the table.

        Raises:
            UserError: see `document_columns`.
        """
        names = list(names)
        columns = list(self.document_columns(place, names))
        checked: list[str] = []
        if self._is_conversation(columns):
            beside = [SYSTEM, *BESIDE]
            if len(columns) == 2:
                beside += [INPUT, HISTORY]
            columns += [name for name in beside if name in names and name not in columns]

            # Read to be refused where they say that a row is not learned, and named among the unread otherwise.
            checked = [name for name in (*LEARNED_KEYS, LOSS) if name in names and name not in columns]

        if self.route in names and self.route not in columns:
            columns.append(self.route)
        self.unread.columns.update(str(name) for name in names if name not in columns)
        return [*columns, *checked]

    def document(self, place: str, names: Sequence[str], values: Sequence[Any]) -> Any:
        """Return the document of a row: a text, a `Conversation`, or None for an empty one; `Routed` with a route.

        Args:
            place: of the row, for messages.
            names: of the columns that `columns_to_read` chose.
            values: of the row in these columns.

        Raises:
            UserError: a part of a prompt is no text.
        """
        row = dict(zip(names, values, strict=True))
        document = self._document(place, names, row)
        return document if self.route is None else Routed(document, _route(row.get(self.route)))

    def _document(self, place: str, names: Sequence[str], row: Mapping[str, Any]) -> Any:
        """Return the document of a row without its route."""
        # A prompt without its completion, or the other way round, teaches nothing.
        columns = self.document_columns(place, names)
        if any(row[name] is None for name in columns):
            return None
        if not self._is_conversation(columns):
            return row[columns[0]]

        beside = {name: value for name, value in row.items() if name not in columns}
        if len(columns) == 1:
            return Conversation(row[columns[0]], beside)

        question, answer = (row[name] for name in columns)
        if columns[0] == INSTRUCTION:
            question = _instruction(place, question, beside.pop(INPUT, None))
        prompt = as_messages("user", question)
        completion = as_messages("assistant", answer)
        return Conversation([*prompt, *completion], beside, prompted=len(prompt))

    def _is_conversation(self, columns: Sequence[str]) -> bool:
        if self.text:
            return False
        return len(columns) == 2 or columns[0] in (*self._lists_of_messages, *OTHER_LISTS)

    @property
    def _lists_of_messages(self) -> tuple[str, ...]:
        """Columns that hold whole conversations, the preferred one first."""
        return tuple(dict.fromkeys((self.messages, SHAREGPT)))

    @property
    def _pairs(self) -> list[list[str]]:
        """Columns of a question and its answer, the preferred ones first."""
        pairs = [[self.prompt, self.completion], [INSTRUCTION, OUTPUT]]
        return pairs if pairs[0] != pairs[1] else pairs[:1]


def _instruction(place: str, instruction: Any, subject: Any) -> Any:
    """Return the prompt of a row in Alpaca's form: the instruction, and behind a blank line what it is about.

    Raises:
        UserError: there is a subject, and one of both is no text.
    """
    if subject is None or subject == "":
        return instruction
    parts = [as_text(f"{place}, column {INSTRUCTION!r}", instruction), as_text(f"{place}, column {INPUT!r}", subject)]
    return "\n\n".join(part for part in parts if part.strip())
