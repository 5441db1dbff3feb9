"""Conversations -> windows: each model reads its own chat template and learns what the assistant says.

A conversation is a JSON list of `{"role", "content"}`. A model reads all of it as its template puts it; only contents
that are learned from are predicted and aligned, in order, as one stream of bytes. For every such content the stream
has a slot (the space that some tokenizers put before a text), the content's bytes, and one pseudo-byte for the end of
the turn, which both models mark in their own way. All other tokens have role MARKER: they are read and are no targets.
"""

import bisect
import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import jinja2
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from .pairing import ANY_MODEL, SIDES, ModelFacts, PairEncoder, Piece
from .validation import expect_texts
from .vocabulary import END, MARKER, Reading, TokenTable

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""For a tokenizer without a chat template: role names in plain words, end of text after the assistant's."""

MARK, BREAK = "\U0010fffd", "\U0010fffc"
"""Private characters: around the alias of a control token, and between texts that no token may join. In contents they
become U+FFFD."""


class ConversationError(ValueError):
    """A conversation that a chat template refuses, or changes so that its contents cannot be found."""

    document: str | None = None
    """Its name, where it has one."""


_REMEDY = (
    "Leave such conversations out, or give the tokenizer a template that takes them and writes contents as they are."
)


@contextmanager
def named(document: str) -> Iterator[None]:
    """A `ConversationError` raised inside is about this document."""
    try:
        yield
    except ConversationError as error:
        error.document = document
        raise


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that can be talked with: it has a chat template, and its end of text is the end of the assistant's turn.

    So generation stops there, and the ends of turn of two models are each other's counterparts as ends of text are.
    Where the template puts no control token behind the assistant's text, the end of text stays what it is.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
    behind = _behind_an_answer(tokenizer)
    tokenizer.eos_token = next(filter(behind.startswith, _control_tokens(tokenizer)), tokenizer.eos_token)
    return tokenizer


def ends_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template puts the tokenizer's end of text behind what the assistant says."""
    return tokenizer.eos_token is not None and _behind_an_answer(tokenizer).startswith(tokenizer.eos_token)


def tokenizers_for_chat(
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> tuple[dict[str, PreTrainedTokenizerBase], list[str]]:
    """`chat_tokenizer` of each, by role; and what their own templates lack, in words."""
    found, lacking = {}, []
    for role, tokenizer in tokenizers.items():
        if not tokenizer.chat_template:
            lacking.append(f'{role}: no chat template, so conversations are written with "User:" and "Assistant:"')
        found[role] = chat_tokenizer(tokenizer)
        if not ends_turns(found[role]):
            lacking.append(f"{role}: its chat template marks no end of the assistant's turn: no model learns to stop")
    return found, lacking


def _behind_an_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    return _parts(tokenizer, ["user", "assistant"])[-1]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Longest first: special tokens, and added ones that the template writes."""
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or token.content in template}
    return sorted(found, key=lambda token: (-len(token), token))


def _render(tokenizer: PreTrainedTokenizerBase, roles: list[str], contents: Sequence[str]) -> str:
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _parts(tokenizer: PreTrainedTokenizerBase, roles: list[str]) -> list[str]:
    """What the template makes of messages, in parts: its own text at even places, numbers of contents at odd ones."""
    rendered = _render(tokenizer, roles, [f"{MARK}{n}{MARK}" for n in range(len(roles))])
    return re.split(f"{MARK}(\\d+){MARK}", rendered)


class _Side:
    """One model's reading of conversations."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, table: TokenTable) -> None:
        self.name, self.tokenizer, self.table = name, tokenizer, table
        self.aliases = {token: f"{MARK}{n}{MARK}" for n, token in enumerate(_control_tokens(tokenizer))}

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_backend", "_break", "_controls")}

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with other names for its control tokens, so that in contents the usual names are text."""
        spec, renamed = self.table.spec, lambda token: self.aliases.get(token, token)
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = {renamed(token): i for token, i in vocab.items()}
        else:
            vocab = [[renamed(token), score] for token, score in vocab]
        added = [token | {"content": renamed(token["content"])} for token in spec["added_tokens"]]
        model = spec["model"] | {"vocab": vocab}
        if model.get("unk_token"):
            model["unk_token"] = renamed(model["unk_token"])
        other = {"model": model, "added_tokens": added, "post_processor": None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec | other))
        backend.add_tokens([tokenizers.AddedToken(BREAK, normalized=False)])
        return backend

    @functools.cached_property
    def _break(self) -> int:
        return self._backend.token_to_id(BREAK)

    @functools.cached_property
    def _controls(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, self.aliases)) or "(?!)")

    def parts(self, roles: list[str], contents: list[str]) -> list[str] | None:
        """As `_parts`; None if the template does not leave the contents as they are.

        Raises:
            ConversationError: the template refuses these messages.
        """
        try:
            parts = _parts(self.tokenizer, roles)
            rendered = _render(self.tokenizer, roles, contents)
        except jinja2.TemplateError as error:
            raise ConversationError(
                f"the {self.name}'s chat template refuses a conversation of {', '.join(roles)}: {error}. It begins: "
                f"{_beginning(contents)}. {_REMEDY}"
            ) from error
        filled = "".join(contents[int(part)] if n % 2 else part for n, part in enumerate(parts))
        return parts if filled == rendered else None

    def tokenise(self, parts: list[str], contents: list[str], learned: Sequence[int]) -> tuple[list[int], list, dict]:
        """(ids, first character and end of each, characters of each learned content); the characters count from the
        text's begin.

        As the tokenizer reads the whole text. Only where a token would join a learned content and what is beside it
        (but for one space in front) are the two read apart, as they are when the model answers.
        """
        for between in ("", BREAK):
            text, spans = "", {}
            for n, part in enumerate(parts):
                if n % 2 == 0:
                    text += self._controls.sub(lambda found: self.aliases[found[0]], part)
                    continue
                edge = between if int(part) in learned else ""
                begin = len(text) + len(edge)
                text += edge + contents[int(part)] + edge
                if int(part) in learned:
                    spans[int(part)] = (begin, len(text) - len(edge))
            encoding = self._backend.encode(text, add_special_tokens=False)
            kept = [n for n, i in enumerate(encoding.ids) if i != self._break]
            ids, offsets = [encoding.ids[n] for n in kept], [encoding.offsets[n] for n in kept]
            self._require_rows(ids)
            if not any(self._joined(text, ids, offsets, *span) for span in spans.values()):
                break
        return ids, offsets, spans

    def _require_rows(self, ids: list[int]) -> None:
        """Refuse a template that writes special tokens which the model has no row for."""
        beyond = [i for i in ids if i >= self.table.rows]
        if beyond:
            raise ConversationError(
                f"the {self.name}'s chat template writes {self.tokenizer.convert_ids_to_tokens(beyond[0])!r}, token "
                f"{beyond[0]:,}, but its model has only {self.table.rows:,} rows. Expected a template of tokens that "
                "the model has; give the model rows with resize_token_embeddings, or another template."
            )

    def _joined(self, text: str, ids: list[int], offsets: list, begin: int, end: int) -> bool:
        """Whether a token lies across the begin or the end of text[begin:end]."""
        across = [n for n, (lo, hi) in enumerate(offsets) if lo < begin < hi or lo < end < hi]
        space = begin < end and text[begin - 1 : begin] == " "
        return any(
            not space or offsets[n][0] != begin - 1 or offsets[n][1] > end or self.table.bytes[ids[n]][:1] != b" "
            for n in across
        )

    def prompt(self, parts: list[str], contents: list[str], answer: int) -> list[int]:
        """The ids of all that stands before a content."""
        ids, offsets, spans = self.tokenise(parts, contents, [answer])
        return ids[: _within(offsets, *spans[answer]).start]

    def read(self, parts: list[str], contents: list[str], learned: Sequence[int]) -> Reading:
        """All tokens of a conversation, those of learned contents and their ends on the stream's bytes."""
        ids, offsets, spans = self.tokenise(parts, contents, learned)
        starts, roles = np.zeros(len(ids), dtype=np.int64), np.full(len(ids), MARKER, dtype=np.int8)
        ends, done, slot = starts.copy(), 0, 0
        for content in learned:
            begin = spans[content][0]
            held = _within(offsets, *spans[content])
            starts[done : held.start] = ends[done : held.start] = slot
            inside = [(max(lo - begin, 0), hi - begin) for lo, hi in offsets[held]]
            reading = self.table.place(contents[content], ids[held], inside)
            starts[held], ends[held], roles[held] = reading.starts + slot + 1, reading.ends + slot + 1, reading.roles
            done = held.stop
            slot += 1 + len(contents[content].encode())
            if done < len(ids) and ids[done] == self.table.end_of_text:
                starts[done], ends[done], roles[done] = slot, slot + 1, END
                done += 1
            slot += 1
        starts[done:] = ends[done:] = slot
        return Reading(np.array(ids, dtype=np.int64), starts, ends, roles)


def _beginning(contents: Sequence[str]) -> str:
    """By which a conversation is found in a file."""
    return repr(" ".join(contents)[:80])


def _within(offsets: list[tuple[int, int]], begin: int, end: int) -> slice:
    """The tokens of the text's characters from `begin` to `end`."""
    first = bisect.bisect_right(offsets, begin, key=lambda token: token[1])
    return slice(first, max(first, bisect.bisect_left(offsets, end, key=lambda token: token[0])))


class ChatEncoder(PairEncoder):
    """Conversations -> windows, as `PairEncoder` for documents.

    The tokenizers are those that `chat_tokenizer` gives. A conversation is never cut but at its end, where it is longer
    than a window: at the last common boundary that fits.

    Args:
        learn_from: completions: what the assistant says; all: every message's content.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        learn_from: Literal["completions", "all"] = "completions",
        facts: ModelFacts = ANY_MODEL,
    ) -> None:
        super().__init__(student_tokenizer, teacher_tokenizer, max_length, facts)
        self.learn_from = learn_from
        self._end_is_start = (False, False)  # a conversation starts as its template says
        pair = (student_tokenizer, teacher_tokenizer)
        self.sides = [_Side(*of) for of in zip(SIDES, pair, self.tables, strict=True)]
        own = json.dumps([self.fingerprint, learn_from, *(tokenizer.chat_template for tokenizer in pair)])
        self.fingerprint = hashlib.sha256(own.encode()).hexdigest()

    def windows(self, texts: list[str], documents: list[str] | None = None) -> list[dict[str, Any]]:
        """Pack conversations into windows; see `PairEncoder.windows`.

        `left_out` counts bytes to learn from that lie behind a window's length.

        Raises:
            ConversationError: a template refuses a conversation, or what it makes of it is not understood.
        """
        expect_texts(texts, documents)
        pieces, left_out = [], 0
        for name, text in zip(documents or [""] * len(texts), texts, strict=True):
            with named(name):
                piece, lost = self._piece(name, text)
            left_out += lost
            if piece is not None:
                pieces.append(piece)
        return self.packed(pieces, left_out)

    def prompt(self, conversation: str, side: str) -> tuple[str, list[int]]:
        """What the assistant (or else anybody) says last in a conversation: the content before it, and the token ids
        of all before it, as a model is asked to answer."""
        roles, contents, parts = self._understood(json.loads(conversation))
        answer = max((n for n, role in enumerate(roles) if role == "assistant"), default=len(roles) - 1)
        index = SIDES.index(side)
        return contents[answer - 1] if answer else "", self.sides[index].prompt(parts[index], contents, answer)

    def _understood(self, messages: list[dict]) -> tuple[list[str], list[str], list[list[str]]]:
        """(roles, contents, parts for each side); without the white space around contents where a template drops it."""
        roles = [message["role"] for message in messages]
        contents = [re.sub(f"[{MARK}{BREAK}]", "\ufffd", self.canonical(message["content"])) for message in messages]
        for given in (contents, [content.strip() for content in contents]):
            parts = [side.parts(roles, given) for side in self.sides]
            if None not in parts:
                return roles, given, parts
        name = SIDES[parts.index(None)]
        raise ConversationError(
            f"the {name}'s chat template changes what is said in a conversation of {', '.join(roles)}, so that it "
            f"cannot be found in the result; the conversation begins: {_beginning(contents)}. {_REMEDY}"
        )

    def _piece(self, name: str, conversation: str) -> tuple[Piece | None, int]:
        """As much of a conversation as fits into a window, and the bytes to learn from that do not."""
        roles, contents, parts = self._understood(json.loads(conversation))
        learned = [n for n, role in enumerate(roles) if role == "assistant" or self.learn_from == "all"]
        for side, found in zip(self.sides, parts, strict=True):
            if [int(n) for n in found[1::2] if int(n) in learned] != learned:
                raise ConversationError(
                    f"the {side.name}'s chat template leaves out, repeats or moves messages of a conversation of "
                    f"{', '.join(roles)}; expected each once and in order. It begins: {_beginning(contents)}. {_REMEDY}"
                )
        pair = [side.read(found, contents, learned) for side, found in zip(self.sides, parts, strict=True)]
        sizes = np.array([len(contents[n].encode()) for n in learned], dtype=np.int64)
        slots = np.cumsum([0, *(sizes + 2)])
        size, keep = int(sizes.sum()), [len(reading.ids) for reading in pair]
        if not learned or any(reading.roles[:1] != MARKER for reading in pair):
            return None, size  # nothing to learn, or a template that puts nothing before it to predict it from
        end, whole = int(slots[-1]), max(keep) <= self.max_length
        if not whole:
            cuts = _common_ends(pair)
            cuts = cuts[(cuts[:, 1:] <= self.max_length).all(1)]
            if not len(cuts):
                return None, size
            end, *keep = cuts[-1].tolist()
        text_bytes = int((end - slots[:-1] - 1).clip(0, sizes).sum())
        readings = [reading.part(0, count) for reading, count in zip(pair, keep, strict=True)]
        spelt = [self._spelt(side, reading, slots[:-1]) for side, reading in enumerate(readings)]
        piece = Piece(
            document=name,
            readings=readings,
            first_byte=0,
            last_byte=end,
            text_bytes=text_bytes,
            unspelt=(text_bytes - spelt[0], text_bytes - spelt[1]),
            left_out=size - text_bytes,
            whole=whole,
        )
        return piece, 0


def _common_ends(pair: list[Reading]) -> np.ndarray:
    """[C, 3] places where a conversation can end: byte of the stream, student tokens and teacher tokens up to it."""
    at = [np.flatnonzero(reading.roles != MARKER) for reading in pair]
    ends, i, j = np.intersect1d(*(reading.ends[a] for reading, a in zip(pair, at, strict=True)), return_indices=True)
    return np.stack([ends, at[0][i] + 1, at[1][j] + 1], axis=1).astype(np.int64)
