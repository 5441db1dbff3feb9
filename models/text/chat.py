"""Conversations -> windows: each model reads its own chat template and learns what it must write itself.

A conversation is a JSON list of `{"role", "content"}`, perhaps with `reasoning_content` (thinking before an answer) and
`weight` (0: read, not learned). A model reads all of it as its template puts it. What is learned of an answer is all
that the model must write behind its own generation prompt, to the end of its turn (`chat_template`). What both models
write there, contents, is aligned, in order, as one stream of bytes. For every such content the stream has a slot (the
space that some tokenizers put before a text), the content's bytes, and one pseudo-byte for the end of the turn, which
both models mark in their own way; one more slot before and behind a content where a template writes markup there. Such
markup has role WRITTEN: it is learned from the text alone. All other tokens have role MARKER: they are read and are no
targets.

Where a template writes an answer otherwise once it has become history (without its thinking), the answer is learned in
a piece of its own that ends with it.
"""

import bisect
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from ..validation import expect_texts
from .chat_template import (
    BREAK,
    MARK,
    REMEDY,
    ChatTemplate,
    ConversationError,
    Message,
    Rendering,
    Segment,
    Shape,
    control_tokens,
    named,
    on_date,
    reads_clock,
    segments,
)
from .tokens import END, MARKER, WRITTEN, Reading, TokenTable
from .windows import ANY_MODEL, SIDES, ModelFacts, PairEncoder, Piece

FORMAT = 2
"""Version of what windows of conversations hold: a part of their fingerprint."""

Field = tuple[int, int]
"""(message, number) of something that is said in a conversation."""


class Markup(NamedTuple):
    """Markup of one model beside the contents of a stretch that both models write."""

    before: tuple[str, ...]
    """Before each of the contents, from the content before it on."""
    behind: str
    """Behind the last one, up to the end of the turn."""


@dataclass(frozen=True)
class Place:
    """Place of a learned stretch in the stream of bytes, for both models."""

    contents: tuple[Field, ...]
    """What both models write, in order."""
    sizes: tuple[int, ...]
    """Their bytes."""
    leads: tuple[int, ...]
    """First byte of the slots before each."""
    begins: tuple[int, ...]
    """First byte of each."""
    end: int
    """The pseudo-byte of the turn's end."""
    ends_alike: bool
    """Whether the end of one model's turn tells about the other's: both write the same before it."""

    def slots(self) -> list[int]:
        """Return the bytes before the contents, where a space that a token has in front of a content may lie."""
        return [byte for lead, begin in zip(self.leads, self.begins, strict=True) for byte in range(lead, begin)]


class _Side:
    """One model's reading of conversations."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, table: TokenTable) -> None:
        self.name, self.tokenizer, self.table = name, tokenizer, table
        self.template = ChatTemplate(name, tokenizer)
        self.aliases = {token: f"{MARK}{n}{MARK}" for n, token in enumerate(control_tokens(tokenizer))}

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

    def tokenise(self, pieces: Sequence[Segment], contents: Iterable[Field]) -> "Tokens":
        """Tokenise a rendering as the tokenizer reads the whole text.

        Only where a token would lie across the begin or the end of what is learned, or of a content (but for one space
        in front that the model writes itself), these are read apart, as they are when the model answers.
        """
        for apart in (False, True):
            tokens = self._tokenise(pieces, set(contents), apart)
            self._require_rows(tokens.ids)
            if not tokens.joined(self.table):
                break
        return tokens

    def _require_rows(self, ids: list[int]) -> None:
        """Refuse a template that writes special tokens which the model has no row for."""
        beyond = [i for i in ids if i >= self.table.rows]
        if beyond:
            raise ConversationError(
                f"the {self.name}'s chat template writes {self.tokenizer.convert_ids_to_tokens(beyond[0])!r}, token "
                f"{beyond[0]:,}, but its model has only {self.table.rows:,} rows. Expected a template of tokens that "
                "the model has; give the model rows with resize_token_embeddings, or another template."
            )

    def _tokenise(self, pieces: Sequence[Segment], contents: set[Field], apart: bool) -> "Tokens":
        text, spans, edges = "", [], []
        for number, piece in enumerate(pieces):
            before = pieces[number - 1] if number else piece
            after = pieces[number + 1] if number + 1 < len(pieces) else piece
            aligned = piece.field in contents
            at_begin = aligned or (piece.stretch is not None and piece.stretch != before.stretch)
            at_end = aligned and (after.stretch != piece.stretch or after.field not in contents)

            text += BREAK * (apart and at_begin)
            begin = len(text)
            text += self._controls.sub(lambda m: self.aliases[m[0]], piece.text) if piece.field is None else piece.text
            spans.append((begin, len(text)))
            if at_begin:
                edges.append(Edge(begin, _may_begin_with_space(piece, before, aligned)))
            if at_end:
                edges.append(Edge(len(text), False))
                text += BREAK * apart

        encoding = self._backend.encode(text, add_special_tokens=False)
        ids, offsets = [], []
        for i, span in zip(encoding.ids, encoding.offsets, strict=True):
            if i != self._break:
                ids.append(i)
                offsets.append(span)
        return Tokens(text, ids, offsets, spans, edges)

    def read(self, pieces: Sequence[Segment], places: Sequence[Place]) -> Reading:
        """All tokens of a rendering, what is learned of it on the stream's bytes."""
        tokens = self.tokenise(pieces, [field for place in places for field in place.contents])
        writer = _Writer(self.table, tokens)
        for number, place in enumerate(places):
            indices = [n for n, piece in enumerate(pieces) if piece.stretch == number]
            writer.stretch(pieces, indices, place)
        return writer.reading()

    def prompt(self, pieces: Sequence[Segment], contents: Sequence[Field], stretch: int) -> list[int]:
        """The ids of all that stands before a stretch."""
        tokens = self.tokenise(pieces, contents)
        first = next(n for n, piece in enumerate(pieces) if piece.stretch == stretch)
        return tokens.ids[: _within(tokens.offsets, *tokens.spans[first]).start]


class Edge(NamedTuple):
    """A place in a text that no token may lie across."""

    at: int
    after_space: bool
    """But one may begin with the space before it."""


class Tokens(NamedTuple):
    """A tokenised text; all but the ids counts characters from its begin."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    spans: list[tuple[int, int]]
    """Of the segments that the text is made of."""
    edges: list[Edge]

    def joined(self, table: TokenTable) -> bool:
        """Tell whether a token lies across one of the edges."""
        for edge in self.edges:
            first = bisect.bisect_right(self.offsets, edge.at, key=lambda token: token[1])
            for i, (begin, end) in zip(self.ids[first:], self.offsets[first:], strict=True):
                if begin >= edge.at:
                    break
                spaced = edge.after_space and begin == edge.at - 1 and self.text[begin] == " "
                if end > edge.at and not (spaced and table.bytes[i][:1] == b" "):
                    return True
        return False


def _may_begin_with_space(piece: Segment, before: Segment, aligned: bool) -> bool:
    """Tell whether the first token of a segment may begin with the last character before it.

    A space of the generation prompt is a token of its own when a model is asked; one that the model writes is not.
    """
    return aligned and bool(piece.text) and piece.stretch == before.stretch


class _Writer:
    """Roles and bytes of the tokens of a rendering, stretch by stretch."""

    def __init__(self, table: TokenTable, tokens: Tokens) -> None:
        self.table, self.tokens = table, tokens
        count = len(tokens.ids)
        self.starts = np.zeros(count, dtype=np.int64)
        self.ends = np.zeros(count, dtype=np.int64)
        self.roles = np.full(count, MARKER, dtype=np.int8)
        self.done = 0
        self.byte = 0

    def stretch(self, pieces: Sequence[Segment], indices: Sequence[int], place: Place) -> None:
        """Place the tokens of a learned stretch, and those between it and the one before."""
        spans = self.tokens.spans
        self._upto(_within(self.tokens.offsets, *spans[indices[0]]).start, MARKER, self.byte)
        where = dict(zip(place.contents, zip(place.leads, place.begins, place.sizes, strict=True), strict=True))

        for index in indices:
            piece = pieces[index]
            if piece.field not in where:
                continue
            lead, begin, size = where[piece.field]
            held = _within(self.tokens.offsets, *spans[index])
            self._upto(held.start, WRITTEN, lead)
            self._content(piece.text, held, spans[index][0], begin)
            self.byte = begin + size

        last = indices[-1]
        if pieces[last].field is None:
            self._end(spans[last], place)
        self.byte = place.end + 1

    def _content(self, text: str, held: slice, first: int, begin: int) -> None:
        """Place the tokens of a content that lies at `begin` in the stream."""
        inside = [(max(lo - first, 0), hi - first) for lo, hi in self.tokens.offsets[held]]
        reading = self.table.place(text, self.tokens.ids[held], inside)
        self.starts[held], self.ends[held] = reading.starts + begin, reading.ends + begin
        self.roles[held] = reading.roles
        self.done = held.stop

    def _end(self, span: tuple[int, int], place: Place) -> None:
        """Place what stands behind the last content of a stretch: markup and, last of all, the end of the turn."""
        held = _within(self.tokens.offsets, *span)
        if held.stop > held.start and self.tokens.ids[held.stop - 1] == self.table.end_of_text and place.ends_alike:
            self._upto(held.stop - 1, WRITTEN, self.byte)
            self.starts[self.done], self.ends[self.done], self.roles[self.done] = place.end, place.end + 1, END
            self.done += 1
        else:
            self._upto(max(held.stop, self.done), WRITTEN, self.byte)

    def _upto(self, stop: int, role: int, byte: int) -> None:
        """Give the tokens before `stop` that have no place yet this role, and no bytes."""
        rest = slice(self.done, max(stop, self.done))
        self.starts[rest] = self.ends[rest] = byte
        self.roles[rest] = role
        self.done = rest.stop

    def reading(self) -> Reading:
        self._upto(len(self.tokens.ids), MARKER, self.byte)
        return Reading(np.array(self.tokens.ids, dtype=np.int64), self.starts, self.ends, self.roles)


def _beginning(contents: Sequence[str]) -> str:
    """By which a conversation is found in a file."""
    return repr(" ".join(contents)[:80])


def _shortened(text: str, length: int = 120) -> str:
    """Return a text in quotes; of a long one both ends, because a change may be at either."""
    if len(text) <= length:
        return repr(text)
    half = length // 2
    return f"{text[:half]!r} ... {text[-half:]!r}"


def _within(offsets: list[tuple[int, int]], begin: int, end: int) -> slice:
    """The tokens of the text's characters from `begin` to `end`."""
    first = bisect.bisect_right(offsets, begin, key=lambda token: token[1])
    return slice(first, max(first, bisect.bisect_left(offsets, end, key=lambda token: token[0])))


# ---------------------------------------------------------------- encoder


class Understood(NamedTuple):
    """A conversation taken apart in a way that both templates write as it is."""

    messages: list[Message]
    renderings: list[list[Rendering]]
    """Pairs, one rendering for each side: the whole conversation, then answers that are learned alone."""

    @property
    def fields(self) -> list[tuple[str, ...]]:
        return [message.fields for message in self.messages]


class Changed(NamedTuple):
    """A rendering in which a template does not write what is said as it is."""

    side: _Side
    rendering: Rendering


class Unwritten(NamedTuple):
    """Messages of a role that a model's chat template leaves out."""

    side: str
    role: str

    def note(self, times: int, count: int) -> str:
        """Return a warning: in `times` of `count` conversations there are such messages."""
        return (
            f"the {self.side}'s chat template does not write {self.role} messages: {times:,} of {count:,} "
            "conversations are read without them"
        )


class ChatEncoder(PairEncoder):
    """Conversations -> windows, as `PairEncoder` for documents.

    The tokenizers are those that `chat_tokenizer` gives. A conversation is never cut but at its end, where it is longer
    than a window: at the last common boundary that fits.

    Args:
        learn_from: completions: what the assistant says; all: every message's content.
        today: the day for templates that write the date; by default that on which the encoder is made.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        learn_from: Literal["completions", "all"] = "completions",
        today: date | None = None,
        facts: ModelFacts = ANY_MODEL,
    ) -> None:
        super().__init__(student_tokenizer, teacher_tokenizer, max_length, facts)
        self.learn_from = learn_from
        self._end_is_start = (False, False)  # a conversation starts as its template says

        day = today or date.today()
        if any(map(reads_clock, (student_tokenizer, teacher_tokenizer))):
            self.day = day
        pair = [on_date(tokenizer, day) for tokenizer in (student_tokenizer, teacher_tokenizer)]
        self.sides = [_Side(*of) for of in zip(SIDES, pair, self.tables, strict=True)]
        self._messages_left_out: dict[tuple, list[tuple[int, Unwritten]]] = {}
        self._tags_are_tokens = any("</think>" in side.aliases for side in self.sides)

        depends_on = [FORMAT, self.fingerprint, learn_from, *(tokenizer.chat_template for tokenizer in pair)]
        self.fingerprint = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()

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
                conversation = self._understood(json.loads(text))
                for renderings in conversation.renderings:
                    piece, lost = self._piece(name, conversation, renderings)
                    left_out += lost
                    if piece is not None:
                        pieces.append(piece)
        return self.packed(pieces, left_out)

    def prompt(self, conversation: str, side: str) -> tuple[str, list[int]]:
        """Find the last answer (or other message) of a conversation: return the content before it, and the token ids
        of all before it, as a model is asked to answer."""
        messages = json.loads(conversation)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [n for n in answers if message_is_learned(messages[n])]
        last = max(learned or answers, default=len(messages) - 1)

        understood = self._understood(messages, [last])
        index = SIDES.index(side)
        renderings = next(pair for pair in understood.renderings if pair[0].stretches)
        pieces = segments(renderings[index], understood.fields)
        ids = self.sides[index].prompt(pieces, [(last, n) for n in range(len(understood.fields[last]))], 0)
        asked = understood.messages[last - 1].as_dict()["content"] if last else ""
        return asked, ids

    def notes(self, texts: Iterable[str]) -> list[str]:
        """List what is worth knowing of conversations before they are learned from, in words, each once.

        Conversations that a template does not take are left to `windows`, which tells where they are.
        """
        lost: Counter[str] = Counter()
        unwritten: Counter[Unwritten] = Counter()
        count = 0
        for text in texts:
            count += 1
            messages = json.loads(text)
            try:
                unwritten.update(self._unwritten(messages))
                if "reasoning_content" in text or "</think>" in text:
                    lost.update(set(self._losses(self._understood(messages))))
            except ConversationError:
                continue

        left_out = [f"{loss} (in {times:,} of {count:,} conversations)" for loss, times in sorted(lost.items())]
        return [kind.note(times, count) for kind, times in sorted(unwritten.items())] + left_out

    def _unwritten(self, messages: list[dict[str, Any]]) -> set[Unwritten]:
        """Return what a template leaves out of a conversation, of the messages that say something.

        Where answers are learned in pieces of their own, a message is left out only if no piece has it.
        """
        taken = [Message.of(message, strip=False, cut=False) for message in messages]
        learned = [n for n, message in enumerate(messages) if self._is_learned(message)]

        # Whether a message is written does not depend on what it says: one rendering for all with these roles.
        key = (tuple(message.shape for message in taken), tuple(learned))
        if key not in self._messages_left_out:
            self._messages_left_out[key] = self._left_out_of(taken, learned)
        return {kind for number, kind in self._messages_left_out[key] if messages[number]["content"].strip()}

    def _left_out_of(self, messages: Sequence[Message], learned: Sequence[int]) -> list[tuple[int, Unwritten]]:
        """List the messages that no rendering of a side has.

        Raises:
            ConversationError: a template refuses these messages.
        """
        shapes = tuple(message.shape for message in messages)
        for side in self.sides:
            with self._refusing(side, messages):
                side.template.marked(shapes)
        pairs = self._layout(shapes, messages, learned)

        left_out = []
        for number, side in enumerate(self.sides):
            written = {message for pair in pairs for message, _ in pair[number].places()}
            for message, shape in enumerate(shapes):
                if message not in written:
                    left_out.append((message, Unwritten(side.name, shape.role)))
        return left_out

    def _losses(self, conversation: Understood) -> Iterable[str]:
        """Name the parts of learned messages that the templates leave out."""
        for renderings in conversation.renderings:
            for side, rendering in zip(self.sides, renderings, strict=True):
                written = set(rendering.places())
                for stretch in rendering.stretches:
                    fields = conversation.fields[stretch.message]
                    if any((stretch.message, n) not in written for n in range(len(fields))):
                        yield _left_out(side.name)

    def _understood(self, messages: list[dict], learned: Sequence[int] | None = None) -> Understood:
        """The conversation; without the white space around contents where a template drops it, and with thinking as a
        field of its own where a template moves it or has tokens for its tags.

        Args:
            learned: the messages to learn; by default as they and `learn_from` say.

        Raises:
            ConversationError: a template refuses these messages, or changes what is said.
        """
        clean = [self._clean(message) for message in messages]
        if learned is None:
            learned = [n for n, message in enumerate(messages) if self._is_learned(message)]

        thinks = any("</think>" in message["content"] for message in clean if message["role"] == "assistant")
        ways = [(False, False), (True, False)]
        if thinks:
            cut = [(False, True), (True, True)]
            ways = [*cut, *ways] if self._tags_are_tokens else [*ways, *cut]

        for strip, cut in ways:
            taken = [Message.of(message, strip=strip, cut=cut) for message in clean]
            renderings, changed = self._renderings(taken, learned)
            if changed is None:
                return Understood(taken, renderings)

        raise self._changed(changed, taken)

    @staticmethod
    def _changed(changed: Changed, messages: Sequence[Message]) -> ConversationError:
        """Return an error that shows what a template makes of what is said."""
        fields = [message.fields for message in messages]
        difference = changed.side.template.difference(changed.rendering, fields)
        roles = ", ".join(message.shape.role for message in messages)

        name = changed.side.name
        whose = "the text around the contents"
        if difference.message is not None:
            whose = f"message {difference.message} ({messages[difference.message].shape.role})"
        return ConversationError(
            f"the {name}'s chat template changes what is said in a conversation of {roles}: expected {whose} "
            f"to be written {_shortened(difference.expected)}, got {_shortened(difference.written)}. "
            f"The conversation begins: {_beginning([message.fields[0] for message in messages])}. {REMEDY}"
        )

    def _is_learned(self, message: dict[str, Any]) -> bool:
        return message_is_learned(message) and (message["role"] == "assistant" or self.learn_from == "all")

    def _clean(self, message: dict[str, Any]) -> dict[str, str]:
        """The message with texts that both models are given alike."""
        texts = {key: message[key] for key in ("content", "reasoning_content") if key in message}
        clean = {key: re.sub(f"[{MARK}{BREAK}]", "\ufffd", self.canonical(text)) for key, text in texts.items()}
        return {"role": message["role"], **clean}

    def _renderings(
        self, messages: Sequence[Message], learned: Sequence[int]
    ) -> tuple[list[list[Rendering]], Changed | None]:
        """Pairs of renderings in which all that is learned is learned once; and the one in which a template changes
        what is said, if one does."""
        shapes = tuple(message.shape for message in messages)
        fields = [message.fields for message in messages]
        for side in self.sides:  # that both take the messages comes first
            with self._refusing(side, messages):
                side.template.marked(shapes)

        pairs = self._layout(shapes, messages, learned)
        for pair in pairs:
            for side, rendering in zip(self.sides, pair, strict=True):
                with self._refusing(side, messages):
                    if not side.template.writes(rendering, fields):
                        return [], Changed(side, rendering)
                self._check(side, rendering, messages)
        return pairs, None

    def _layout(
        self, shapes: tuple[Shape, ...], messages: Sequence[Message], learned: Sequence[int]
    ) -> list[list[Rendering]]:
        """Pairs of renderings: the whole conversation, and up to each answer that is learned alone."""
        answers = [n for n in learned if shapes[n].role == "assistant"]
        others = [n for n in learned if shapes[n].role != "assistant"]
        alone = {}
        for side in self.sides:
            with self._refusing(side, messages):
                alone[side.name] = {n: side.template.answer(shapes[: n + 1]) for n in answers}

        in_place = set(answers)
        for side in self.sides:
            in_place &= {n for n, answer in alone[side.name].items() if side.template.remains(answer, shapes)}
        together = [
            side.template.whole(shapes, [alone[side.name][n] for n in sorted(in_place)], others) for side in self.sides
        ]
        pairs = [[alone[side.name][n] for side in self.sides] for n in answers if n not in in_place]
        return pairs if pairs and not together[0].stretches else [together, *pairs]

    @contextmanager
    def _refusing(self, side: _Side, messages: Sequence[Message]) -> Iterator[None]:
        """Tell what a template refuses as an error about these messages."""
        try:
            yield
        except jinja2.TemplateError as error:
            raise self._refused(side, messages, error) from error

    def _refused(self, side: _Side, messages: Sequence[Message], error: Exception) -> ConversationError:
        roles = ", ".join(message.shape.role for message in messages)
        begins = _beginning([message.fields[0] for message in messages])
        return ConversationError(
            f"the {side.name}'s chat template refuses a conversation of {roles}: {error}. It begins: {begins}. {REMEDY}"
        )

    def _check(self, side: _Side, rendering: Rendering, messages: Sequence[Message]) -> None:
        """Make sure that a rendering has the messages once and in order, and of what is learned all that is said.

        Raises:
            ConversationError: it has not.
        """
        roles = ", ".join(message.shape.role for message in messages)
        begins = _beginning([message.fields[0] for message in messages])
        learned = [stretch.message for stretch in rendering.stretches]
        places = rendering.places()
        order = [n for n, _ in places if n in learned or rendering.shapes[n].role != "system"]
        answers = [place for place in places if place[0] in learned]
        missing = {(n, len(rendering.shapes[n].literals) - 2) for n in learned} - set(answers)
        if missing or order != sorted(order) or len(answers) != len(set(answers)):
            raise ConversationError(
                f"the {side.name}'s chat template leaves out, repeats or moves messages of a conversation of {roles}; "
                f"expected each once and in order. It begins: {begins}. {REMEDY}"
            )

        thought = {(n, 0) for n in learned if len(rendering.shapes[n].literals) > 2} - set(answers)
        if thought and side is self.sides[0]:
            raise ConversationError(
                f"the {side.name}'s chat template leaves out the thinking (<think>...</think>) of an answer in a "
                f"conversation of {roles}, which would not be learned. It begins: {begins}. Take the thinking out of "
                "the answers, or give the tokenizer a template that writes it."
            )

    def _piece(self, name: str, conversation: Understood, renderings: Sequence[Rendering]) -> tuple[Piece | None, int]:
        """Cut a rendering to a window; return the piece, and the number of bytes to learn from that do not fit."""
        fields = conversation.fields
        pieces = [segments(rendering, fields) for rendering in renderings]
        places = _places(pieces, [stretch.message for stretch in renderings[0].stretches])
        begins = np.array([begin for place in places for begin in place.begins], dtype=np.int64)
        sizes = np.array([size for place in places for size in place.sizes], dtype=np.int64)
        size = int(sizes.sum())
        if not places:
            return None, 0

        pair = [side.read(of, places) for side, of in zip(self.sides, pieces, strict=True)]
        keep = [len(reading.ids) for reading in pair]
        if any(reading.roles[:1] != MARKER for reading in pair):
            return None, size  # a template that puts nothing before what is learned to predict it from

        end, whole = places[-1].end + 1, max(keep) <= self.max_length
        if not whole:
            cuts = _common_ends(pair)
            cuts = cuts[(cuts[:, 1:] <= self.max_length).all(1)]
            if not len(cuts):
                return None, size
            end, *keep = cuts[-1].tolist()
        text_bytes = int((end - begins).clip(0, sizes).sum())
        readings = [reading.part(0, count) for reading, count in zip(pair, keep, strict=True)]
        slots = [byte for place in places for byte in place.slots()]
        spelt = [self._spelt_bytes(side, reading, slots) for side, reading in enumerate(readings)]
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


def message_is_learned(message: dict[str, Any]) -> bool:
    """Return whether a message, as conversations are handed in, may be learned from."""
    return message.get("weight", 1) != 0


def _left_out(name: str) -> str:
    learned = "without the teacher" if name == "teacher" else "without it"
    return (
        f"thinking before answers (reasoning_content, <think>) is not written in the {name}'s conversations: answers "
        f"are learned {learned}"
    )


def _places(sides: Sequence[Sequence[Segment]], messages: Sequence[int]) -> list[Place]:
    """Lay the learned stretches of a pair of renderings out as one stream of bytes."""
    places, byte = [], 0
    for number in range(len(messages)):
        stretches = [[piece for piece in pieces if piece.stretch == number] for pieces in sides]
        common = set.intersection(*({piece.field for piece in stretch} for stretch in stretches)) - {None}
        contents = [piece for piece in stretches[0] if piece.field in common]
        markup = [_markup(stretch, common) for stretch in stretches]

        leads, begins, sizes = [], [], []
        for n, piece in enumerate(contents):
            leads.append(byte)
            byte += 1 + any(of.before[n] for of in markup)
            begins.append(byte)
            sizes.append(len(piece.text.encode()))
            byte += sizes[-1]
        byte += any(of.behind for of in markup)
        fields = tuple(piece.field for piece in contents)
        alike = markup[0].behind == markup[1].behind
        places.append(Place(fields, tuple(sizes), tuple(leads), tuple(begins), byte, alike))
        byte += 1
    return places


def _markup(stretch: Sequence[Segment], common: set[Field]) -> Markup:
    """Return the markup beside the contents that both models write; the last segment is the end of the turn, if
    there is one."""
    texts, text = [], ""
    for piece in stretch:
        if piece.field in common:
            texts.append(text)
            text = ""
        else:
            text += piece.text
    ended = len(stretch) > 0 and stretch[-1].field is None
    return Markup(tuple(texts), text.removesuffix(stretch[-1].text) if ended else text)


def _common_ends(pair: list[Reading]) -> np.ndarray:
    """[C, 3] places where a conversation can end: byte of the stream, student tokens and teacher tokens up to it."""
    at = [np.flatnonzero(reading.roles != MARKER) for reading in pair]
    ends, i, j = np.intersect1d(*(reading.ends[a] for reading, a in zip(pair, at, strict=True)), return_indices=True)
    return np.stack([ends, at[0][i] + 1, at[1][j] + 1], axis=1).astype(np.int64)
