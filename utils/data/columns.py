"""Contents of a table's rows: plain text, a prompt and its completion, or a conversation.

Conversations may be in the form of `messages`, of ShareGPT (`conversations`) or of Alpaca (`instruction`, `output`).

`Columns` chooses the columns of a table that hold documents; `Conversation` checks the messages of a row and writes
them as JSON. Nothing that would change what is learned is dropped in silence: it is refused, or noted as not read.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import UserError

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets keep the thinking before an answer."""
UNSUPPORTED_BESIDE = ("tools", "functions", "chat_template_kwargs")
"""Columns that change what a conversation means, and that nothing here honours."""
SYSTEM = "system"
"""Column of a system message, beside the messages or the prompt; also the role of such a message."""
SHAREGPT = "conversations"
"""Column of ShareGPT's format: lists of messages with `from` and `value`."""
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "system": "system",
}
"""Speakers of ShareGPT's format, and the roles that they are."""

INSTRUCTION = "instruction"
"""Column of Alpaca's format that is the prompt."""
OUTPUT = "output"
"""Column of Alpaca's format that is the completion."""
INPUT = "input"
"""Column of Alpaca's format: what the instruction is about; empty where it says all itself."""
HISTORY = "history"
"""Column of Alpaca's format with earlier turns, which is not supported."""
TOOL_CALLS = ("tool_calls", "function_call")
"""Keys of a message that calls tools, which is not supported."""

LEARNED_KEYS = ("weight", "train", "trainable", "training")
"""Keys of a message that say whether it is learned: 1 or 0."""
UNSUPPORTED_MASKS = ("mask", "masked", "loss_mask", "train_detail")
"""Keys of a message by which other programs choose what is learned, each in its own sense."""
LOSS = "loss"
"""Key of a message by which others say whether it is learned."""

KNOWN_KEYS = frozenset(("role", "content", *LEARNED_KEYS, LOSS, *TOOL_CALLS, *REASONING))
"""Keys of a message that are read, or refused where they say something."""


# ---------------------------------------------------------------- texts


def as_text(place: str, value: Any) -> str:
    """Return a value that should be a text; None is an empty one.

    Raises:
        UserError: it is no text.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"{place}: expected text, got {type(value).__name__}. Name a column of texts: --set data.text_column=NAME."
        )

    # JSON can hold half a surrogate pair, which has no UTF-8: no hash and no tokenizer would take it.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: character {error.start} is half of a surrogate pair, which is no text. Repair the file."
        ) from None
    return value


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

    def text(self, place: str, learn_from: str, unread: Unread | None = None) -> str:
        """Return JSON of a list of `{"role", "content"}`; empty if there is nothing to learn from.

        A message may have `reasoning_content` besides, the thinking before an answer, and `weight`: 0 where it is read
        and not learned.

        Args:
            place: of the row, for messages.
            learn_from: `all` learns from every message, else from those of the assistant.
            unread: takes note of keys that are not read.

        Raises:
            UserError: something else than messages with a role and a text, or what would be lost: tools, images.
        """
        rows = self.messages
        if not isinstance(rows, list) or not rows:
            got = type(rows).__name__
            if isinstance(rows, list):
                got += " of length 0"
            raise UserError(f"{place}: expected a list of messages, each with 'role' and 'content', got {got}.")

        self._refuse_unsupported(place)
        self._refuse_masked(place)
        messages = [_message(f"{place}, message {number}", row, unread) for number, row in enumerate(rows)]

        # Answers in the prompt are examples to read, as a completion is what the row teaches.
        if learn_from != "all":
            for message in messages[: self.prompted]:
                if message["role"] == "assistant":
                    message["weight"] = 0

        messages = self._system_message(place, messages) + messages
        if any(_teaches(message, learn_from) for message in messages):
            return json.dumps(messages, ensure_ascii=False)
        return ""

    def _refuse_unsupported(self, place: str) -> None:
        """Refuse columns that change what is said or asked, and that nothing here reads.

        Raises:
            UserError: one of them holds something.
        """
        for column in (*UNSUPPORTED_BESIDE, HISTORY):
            # Tables write an empty list of tools in all these ways.
            if self.beside.get(column) not in (None, [], {}, "", "[]", "{}"):
                raise UserError(
                    f"{place}: column {column!r} changes what the conversation means, and is not supported. Leave such "
                    "rows out, or the column, if the conversations are to be learned without it."
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


def _teaches(message: Mapping[str, Any], learn_from: str) -> bool:
    """Tell whether there is something to learn from a message."""
    is_learned = learn_from == "all" or message["role"] == "assistant"
    return is_learned and message.get("weight", 1) != 0 and bool(message["content"].strip())


def _message(place: str, message: Any, unread: Unread | None) -> dict[str, Any]:
    """Return the keys of a message that are read.

    Raises:
        UserError: it has no role and text, or holds more that would change what it means.
    """
    if _is_sharegpt(message):
        message = _renamed(place, message)
    _require_role_and_content(place, message)

    for key in TOOL_CALLS:
        if message.get(key):
            raise UserError(f"{place}: it calls tools ({key!r}), which is not supported. Leave such conversations out.")

    role = message["role"]
    content = _joined_parts(place, message["content"])
    for key, value in (("role", role), ("content", content)):
        if not isinstance(value, str):
            raise UserError(f"{place}: expected text as its {key}, got {type(value).__name__}.")
    result: dict[str, Any] = {"role": as_text(place, role), "content": as_text(place, content)}

    # Data sets that were merged may have several of these keys, all but one of them empty.
    reasoning = [message[key] for key in REASONING if message.get(key)]
    if reasoning:
        result["reasoning_content"] = as_text(f"{place}, its thinking", reasoning[0])

    _refuse_masks(place, message)
    if not _is_learned(place, message):
        result["weight"] = 0

    if unread is not None:
        present = {key for key, value in message.items() if value is not None}
        unread.keys |= {str(key) for key in present - KNOWN_KEYS}
    return result


def _require_role_and_content(place: str, message: Any) -> None:
    """Check that a message is an object with these two keys.

    Raises:
        UserError: it is not.
    """
    if not isinstance(message, dict):
        got = type(message).__name__
    elif not {"role", "content"} <= message.keys():
        got = f"the keys {', '.join(map(str, message))}"
    else:
        return
    raise UserError(f"{place}: expected an object with 'role' and 'content' (or 'from' and 'value'), got {got}.")


def _is_sharegpt(message: Any) -> bool:
    """Return whether a message is in ShareGPT's form. A table may have both forms of keys, one of them empty."""
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return False
    return message.get("role") is None and message.get("content") is None


def _renamed(place: str, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message of ShareGPT's form with `role` and `content`.

    Raises:
        UserError: nobody knows who speaks.
    """
    speaker = message["from"]
    role = SHAREGPT_ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(
            f"{place}: expected {', '.join(SHAREGPT_ROLES)} as its 'from', got {speaker!r}. Rename it to one of these, "
            "or leave such conversations out; tools are not supported."
        )

    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    return {"role": role, "content": message["value"], **others}


def _joined_parts(place: str, content: Any) -> Any:
    """Return a content that comes as a list of parts as one text, and any other as it is.

    Raises:
        UserError: a part is no text.
    """
    if not isinstance(content, list):
        return content

    texts = []
    for part in content:
        # A part is a text, or an object of a type: text, image, ...
        text = part
        kind = type(part).__name__
        if isinstance(part, dict):
            kind = part.get("type", "something")
            if part.get("type", "text") == "text":
                text = part.get("text")

        if not isinstance(text, str):
            raise UserError(
                f"{place}: its content holds a part that is no text ({kind}), which no model here reads. Leave such "
                "conversations out, or the part, if the answers do not depend on it."
            )
        texts.append(text)
    return "".join(texts)


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


def _as_messages(role: str, value: Any) -> list[Any]:
    """Return a prompt or a completion as messages: those that it is a list of, or one of this role."""
    # A list of anything else is one content, in parts.
    is_list = isinstance(value, list) and bool(value)
    if is_list and all(isinstance(item, dict) and "role" in item for item in value):
        return value
    return [{"role": role, "content": value}]


def _instruction(place: str, instruction: Any, subject: Any) -> Any:
    """Return the prompt of a row in Alpaca's form: the instruction, and behind a blank line what it is about.

    Raises:
        UserError: there is a subject, and one of both is no text.
    """
    if subject is None or subject == "":
        return instruction
    parts = [as_text(f"{place}, column {INSTRUCTION!r}", instruction), as_text(f"{place}, column {INPUT!r}", subject)]
    return "\n\n".join(part for part in parts if part.strip())


def text_of_messages(conversation: str) -> str:
    """Return the words of all messages of a conversation, which is JSON as `Conversation.text` writes it."""
    texts = []
    for message in json.loads(conversation):
        texts += [message.get("reasoning_content", ""), message["content"]]
    return "".join(texts)


# ---------------------------------------------------------------- columns of a table


@dataclass(frozen=True)
class Columns:
    """Names of the columns that may hold a document.

    The first of these that a table has is read: the named `text`, and nothing else where it is named; else `messages`;
    else `conversations`; else `prompt` and `completion`; else `instruction` and `output`; else a column `text`.
    """

    text: str | None = None
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
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
            choices = [*([column] for column in self._lists_of_messages), *self._pairs, ["text"]]
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
            beside = [SYSTEM, *UNSUPPORTED_BESIDE]
            if len(columns) == 2:
                beside += [INPUT, HISTORY]
            columns += [name for name in beside if name in names and name not in columns]

            # Read to be refused where they say that a row is not learned, and named among the unread otherwise.
            checked = [name for name in (*LEARNED_KEYS, LOSS) if name in names and name not in columns]

        self.unread.columns.update(str(name) for name in names if name not in columns)
        return [*columns, *checked]

    def document(self, place: str, names: Sequence[str], values: Sequence[Any]) -> Any:
        """Return the document of a row: a text, a `Conversation`, or None for an empty one.

        Args:
            place: of the row, for messages.
            names: of the columns that `columns_to_read` chose.
            values: of the row in these columns.

        Raises:
            UserError: a part of a prompt is no text.
        """
        row = dict(zip(names, values, strict=True))
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
        prompt = _as_messages("user", question)
        completion = _as_messages("assistant", answer)
        return Conversation([*prompt, *completion], beside, prompted=len(prompt))

    def _is_conversation(self, columns: Sequence[str]) -> bool:
        if self.text:
            return False
        return len(columns) == 2 or columns[0] in self._lists_of_messages

    @property
    def _lists_of_messages(self) -> tuple[str, ...]:
        """Columns that hold whole conversations, the preferred one first."""
        return tuple(dict.fromkeys((self.messages, SHAREGPT)))

    @property
    def _pairs(self) -> list[list[str]]:
        """Columns of a question and its answer, the preferred ones first."""
        pairs = [[self.prompt, self.completion], [INSTRUCTION, OUTPUT]]
        return pairs if pairs[0] != pairs[1] else pairs[:1]
