"""Conversations -> windows: each model reads its own chat template and learns what it must write itself.

A conversation is JSON (`messages`). A model reads all of it as its template puts it. What is learned of an answer is
all that the model must write behind its own generation prompt, to the end of its turn (`chat_template`). What both
models write there, contents (of tool calls see `call_text`), is aligned, in order, as one stream of bytes
(`chat_places`); what surrounds it is learned from the text alone, or only read (`chat_side`).

Where a template writes an answer otherwise once it has become history (without its thinking), the answer is learned in
a piece of its own that ends with it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from ..validation import expect_texts
from .call_text import Written, name_fields
from .chat_places import places_of
from .chat_side import ChatSide
from .chat_template import REMEDY, ConversationError, Rendering, Segment, named, segments
from .chat_turns import on_date, reads_clock
from .messages import BREAK, MARK, Conversation, Message, Outline, answers_of, cleaned
from .tokens import MARKER, Reading
from .windows import ANY_MODEL, SIDES, ModelFacts, PairEncoder, Piece

FORMAT = 2
"""Version of what windows of conversations hold: a part of their fingerprint."""


class _Version(NamedTuple):
    """A conversation as one of the models reads it."""

    messages: list[Message]
    outline: Outline
    numbers: dict[int, int]
    """Numbers of the student's messages -> those of the same messages here."""

    @property
    def fields(self) -> list[tuple[str, ...]]:
        """Texts that are said, by message."""
        return [message.fields for message in self.messages]


class Understood(NamedTuple):
    """A conversation taken apart in a way that both templates write as it is."""

    versions: list[_Version]
    """As student and teacher read it."""
    renderings: list[list[Written]]
    """Pairs, one rendering for each side: the whole conversation, then answers that are learned alone."""


class Changed(NamedTuple):
    """A rendering in which a template does not write what is said as it is."""

    side: ChatSide
    rendering: Rendering
    version: _Version


class Unwritten(NamedTuple):
    """Parts of conversations that a model's chat template leaves out."""

    side: str
    part: str
    """Such as: system messages."""

    def note(self, times: int, count: int) -> str:
        """Return a warning: in `times` of `count` conversations there are such parts."""
        return (
            f"the {self.side}'s chat template does not write {self.part}: {times:,} of {count:,} "
            "conversations are read without them"
        )


class _Way(NamedTuple):
    """A way of taking the messages of a conversation apart; see `Message.of`."""

    strip: bool
    cut: bool


_AS_IT_IS = _Way(strip=False, cut=False)

MOST_OUTLINES = 1000
"""Outlines of conversations of which it is remembered what templates leave out."""


def _take_apart(conversation: Conversation, way: _Way) -> list[_Version]:
    """Return a conversation as each of the models reads it."""
    tools = _as_json(conversation.tools)
    variables = _as_json(conversation.variables)
    versions = []
    for index in range(len(SIDES)):
        rows = conversation.of_side(index)
        messages = [Message.of(message, strip=way.strip, cut=way.cut) for message in rows]
        outline = Outline(tuple(message.shape for message in messages), tools, variables)
        versions.append(_Version(messages, outline, conversation.counterparts(index)))
    return versions


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if value else ""


@dataclass(frozen=True)
class ConversationSettings:
    """Settings of how conversations are learned."""

    learn_from: Literal["completions", "all"] = "completions"
    """The assistant's messages, or every one."""
    learn_reasoning: bool = True
    """False: the thinking before an answer is read, and not learned."""
    today: date | None = None
    """The day for templates that write it."""


class _Cut(NamedTuple):
    """The end of a piece."""

    byte: int
    """Of the stream."""
    counts: list[int]
    """Tokens of student and teacher before it."""


class ChatEncoder(PairEncoder):
    """Conversations -> windows, as `PairEncoder` for documents.

    The tokenizers are those that `chat_tokenizer` gives. A conversation is never cut but at its end, where it is longer
    than a window: at the last common boundary that fits.

    Args:
        learn_from: completions: what the assistant says; all: every message's content.
        today: the day for templates that write the date; by default that on which the encoder is made.
        learn_reasoning: False: the thinking before an answer is read by both models, and not learned.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        learn_from: Literal["completions", "all"] = "completions",
        today: date | None = None,
        facts: ModelFacts = ANY_MODEL,
        *,
        learn_reasoning: bool = True,
    ) -> None:
        super().__init__(student_tokenizer, teacher_tokenizer, max_length, facts)
        self.learn_from = learn_from
        self.learn_reasoning = learn_reasoning
        self._end_is_start = (False, False)  # a conversation starts as its template says

        # Without a clock in the templates nothing depends on the day.
        day = today or date.today()
        if reads_clock(student_tokenizer) or reads_clock(teacher_tokenizer):
            self.day = day
        pair = [on_date(tokenizer, day) for tokenizer in (student_tokenizer, teacher_tokenizer)]
        self.sides = []
        for name, tokenizer, table in zip(SIDES, pair, self.tables, strict=True):
            self.sides.append(ChatSide(name, tokenizer, table, learn_reasoning=learn_reasoning))
        self._tags_are_tokens = any("</think>" in side.aliases for side in self.sides)
        self._messages_left_out: dict[tuple, list[tuple[int, int | None, Unwritten]]] = {}

        templates = [tokenizer.chat_template for tokenizer in pair]
        settings = [learn_from] if learn_reasoning else [learn_from, "reasoning is read"]
        depends_on = json.dumps([FORMAT, self.fingerprint, *settings, *templates])
        self.fingerprint = hashlib.sha256(depends_on.encode()).hexdigest()

    def windows(
        self,
        texts: list[str],
        documents: list[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Pack conversations into windows; see `PairEncoder.windows`.

        `left_out` counts bytes to learn from that lie behind a window's length.

        Raises:
            ConversationError: a template refuses a conversation, or what it makes of it is not understood.
        """
        expect_texts(texts, documents)
        pieces = []
        left_out = 0
        names = documents or [""] * len(texts)
        for name, text in zip(names, texts, strict=True):
            with named(name):
                conversation = self._understood(Conversation.parse(text))
                for renderings in conversation.renderings:
                    piece, bytes_behind = self._rendered_piece(name, renderings)
                    left_out += bytes_behind
                    if piece is not None:
                        pieces.append(piece)
        return self.packed(pieces, left_out)

    def prompt(
        self,
        conversation: str,
        side: str,
    ) -> tuple[str, list[int]]:
        """Return the question that a conversation ends with, as a model is asked to answer it.

        Returns:
            the content before the last answer (or other message), and the token ids of all before that answer.
        """
        # The answer to ask for: the last one that is learned, or the last one, or the last message.
        parsed = Conversation.parse(conversation)
        answers = answers_of(parsed.messages)
        learned = [number for number in answers if message_is_learned(parsed.messages[number])]
        last = max(learned or answers, default=len(parsed.messages) - 1)

        # All that is learned of the conversation is this answer: the prompt is what stands before it.
        understood = self._understood(parsed, [last])
        renderings = next(pair for pair in understood.renderings if pair[0].rendering.stretches)
        index = SIDES.index(side)
        pieces = self._segments(renderings)[index]
        contents = [piece.field for piece in pieces if piece.stretch == 0 and piece.field is not None]
        ids = self.sides[index].prompt(pieces, contents, stretch=0)

        version = understood.versions[index]
        before = version.numbers[last] - 1
        question = version.messages[before].as_dict()["content"] if before >= 0 else ""
        return question, ids

    # ------------------------------------------------------------ warnings

    def notes(self, texts: Iterable[str]) -> list[str]:
        """Return warnings about conversations, each once: parts of them that a template does not write.

        Conversations that a template does not take are left to `windows`, which tells where they are.
        """
        losses: Counter[str] = Counter()
        unwritten: Counter[Unwritten] = Counter()
        variables: Counter[str] = Counter()
        count = 0
        for text in texts:
            count += 1
            conversation = Conversation.parse(text)
            variables.update(conversation.variables or ())
            try:
                unwritten.update(self._unwritten(conversation))
                # only these can get lost otherwise; most conversations have none, and need no renderings
                if any(word in text for word in ("reasoning_content", "</think>", "tool_calls")):
                    losses.update(set(self._losses(self._understood(conversation))))
            except ConversationError:
                continue

        notes = [kind.note(times, count) for kind, times in sorted(unwritten.items())]
        for name, times in sorted(variables.items()):
            if not any(side.template.reads(name) for side in self.sides):
                where = f"in {times:,} of {count:,} conversations"
                notes.append(f"chat_template_kwargs: neither chat template reads {name!r} ({where})")
        for loss, times in sorted(losses.items()):
            notes.append(f"{loss} (in {times:,} of {count:,} conversations)")
        return notes

    def _unwritten(self, conversation: Conversation) -> set[Unwritten]:
        """Return what a template leaves out of a conversation, of the messages that say something.

        Where answers are learned in pieces of their own, a message is left out only if no piece has it.
        """
        versions = _take_apart(conversation, _AS_IT_IS)
        learned = self._learned(conversation.messages)

        # Whether a message is written does not depend on what it says: one rendering for all with these roles.
        key = (*(version.outline for version in versions), tuple(learned))
        if key not in self._messages_left_out:
            if len(self._messages_left_out) >= MOST_OUTLINES:
                self._messages_left_out.clear()
            self._messages_left_out[key] = self._left_out_of(versions, learned)

        left_out = set()
        for index, number, kind in self._messages_left_out[key]:
            # schemas belong to no message
            if number is None or conversation.of_side(index)[number]["content"].strip():
                left_out.add(kind)
        return left_out

    def _left_out_of(
        self,
        versions: Sequence[_Version],
        learned: Sequence[int],
    ) -> list[tuple[int, int | None, Unwritten]]:
        """List what no rendering of a side has: (side, number of a message, what it is).

        Raises:
            ConversationError: a template refuses these messages.
        """
        self._require_taken(versions)
        pairs = self._layout(versions, learned)

        left_out: list[tuple[int, int | None, Unwritten]] = []
        for index, (side, version) in enumerate(zip(self.sides, versions, strict=True)):
            # a message may be in the whole conversation or in one that ends with an answer
            written = {message for pair in pairs for message, _ in pair[index].places()}
            for number, shape in enumerate(version.outline.shapes):
                if shape.fields and number not in written:
                    left_out.append((index, number, Unwritten(side.name, f"{shape.role} messages")))
            if version.outline.tools and not side.template.writes_tools(version.outline):
                left_out.append((index, None, Unwritten(side.name, "the tools that may be called")))
        return left_out

    def _losses(self, conversation: Understood) -> Iterator[str]:
        """Yield a warning for each part of a learned message that a template leaves out."""
        for renderings in conversation.renderings:
            for side, (rendering, _) in zip(self.sides, renderings, strict=True):
                written = set(rendering.places())
                for stretch in rendering.stretches:
                    shape = rendering.outline.shapes[stretch.message]
                    missing = {number for number in range(shape.fields) if (stretch.message, number) not in written}
                    if shape.reasoning_field in missing:
                        yield _thinking_left_out(side.name)
                    if rendering.lacks_calls(stretch):
                        yield _calls_left_out(side.name)
                    if shape.calls and shape.content_field in missing:
                        yield _content_left_out(side.name)

    # ------------------------------------------------------------ conversation -> renderings

    def _understood(
        self,
        conversation: Conversation,
        learned: Sequence[int] | None = None,
    ) -> Understood:
        """Return a conversation in the first way of reading it that both templates write as it is.

        The white space around contents goes where a template drops it; thinking becomes a field of its own where a
        template moves it or has tokens for its tags.

        Args:
            learned: the messages to learn; by default as they and `learn_from` say.

        Raises:
            ConversationError: a template refuses these messages, or changes what is said.
        """
        clean = self._clean(conversation)
        if learned is None:
            learned = self._learned(clean.messages)

        for way in self._ways([*clean.messages, *(clean.teacher_messages or [])]):
            versions = _take_apart(clean, way)
            renderings, changed = self._renderings(versions, learned)
            if changed is None:
                return Understood(versions, renderings)

        # In every way one of the templates changes something: the error shows what it does in the last one.
        raise self._changed(changed)

    def _ways(self, messages: Sequence[dict[str, Any]]) -> list[_Way]:
        """Return ways of taking messages apart, the preferred one first."""
        whole = [_AS_IT_IS, _Way(strip=True, cut=False)]
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        if not any("</think>" in answer for answer in answers):
            return whole

        # In contents the tags would be text: where they are tokens, the template's part must hold them.
        cut = [_Way(strip=False, cut=True), _Way(strip=True, cut=True)]
        if not self.learn_reasoning:
            return cut  # to know where it ends
        return cut + whole if self._tags_are_tokens else whole + cut

    @staticmethod
    def _changed(changed: Changed) -> ConversationError:
        """Return an error that shows what a template makes of what is said."""
        messages = changed.version.messages
        difference = changed.side.template.difference(changed.rendering, changed.version.fields)

        whose = "the text around the contents"
        if difference.message is not None:
            whose = f"message {difference.message} ({messages[difference.message].shape.role})"
        return ConversationError(
            f"the {changed.side.name}'s chat template changes what is said in a conversation of {_roles(messages)}: "
            f"expected {whose} to be written {_shortened(difference.expected)}, got {_shortened(difference.written)}. "
            f"The conversation begins: {_beginning(messages)}. {REMEDY}"
        )

    def _learned(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Return the numbers of the messages that are learned from."""
        return [number for number, message in enumerate(messages) if self._is_learned(message)]

    def _is_learned(self, message: dict[str, Any]) -> bool:
        is_of_kind = message["role"] == "assistant" or self.learn_from == "all"
        return is_of_kind and message_is_learned(message)

    def _clean(self, conversation: Conversation) -> Conversation:
        """Return the conversation with texts that both models are given alike."""
        teacher_messages = conversation.teacher_messages
        return replace(
            conversation,
            messages=cleaned(conversation.messages, self._clean_text),
            teacher_messages=None if teacher_messages is None else cleaned(teacher_messages, self._clean_text),
            tools=tuple(cleaned(conversation.tools, self._clean_text)),
        )

    def _clean_text(self, text: str) -> str:
        return re.sub(f"[{MARK}{BREAK}]", "\ufffd", self.canonical(text))

    def _renderings(
        self, versions: Sequence[_Version], learned: Sequence[int]
    ) -> tuple[list[list[Written]], Changed | None]:
        """Return pairs of renderings in which all that is learned is learned once.

        Returns:
            the pairs, and None; or [], and the rendering in which a template changes what is said.
        """
        self._require_taken(versions)
        self._require_counterparts(versions[1], learned)

        pairs = []
        for renderings in self._layout(versions, learned):
            pair = []
            for side, version, rendering in zip(self.sides, versions, renderings, strict=True):
                with self._refusing(side, version.messages):
                    fields = side.template.fields_as_written(rendering, version.fields)
                if fields is None:
                    return [], Changed(side, rendering, version)
                self._require_all_once(side, rendering, version.messages)
                pair.append(Written(rendering, fields))
            pairs.append(pair)
        return pairs, None

    @staticmethod
    def _require_counterparts(teacher: _Version, learned: Sequence[int]) -> None:
        """Refuse messages of the teacher's own that lack something of what is learned."""
        missing = [number for number in learned if number not in teacher.numbers]
        if missing:
            raise ConversationError(
                f"teacher_messages: message {missing[0]} of the student's is learned, and the teacher has no message "
                "for it. Expected teacher_messages that end with the same answers, and data.learn_from=completions."
            )

    def _layout(self, versions: Sequence[_Version], learned: Sequence[int]) -> list[list[Rendering]]:
        """Return pairs of renderings: the whole conversation, and up to each answer that is learned alone."""
        shapes = versions[0].outline.shapes
        answers = [number for number in learned if shapes[number].role == "assistant"]
        others = [number for number in learned if shapes[number].role != "assistant"]

        # Per side, each answer as a model is asked for it: as the last message.
        as_last: list[dict[int, Rendering]] = []
        for side, version in zip(self.sides, versions, strict=True):
            with self._refusing(side, version.messages):
                asked = {}
                for number in answers:
                    asked[number] = side.template.answer(version.outline.first(version.numbers[number] + 1))
                as_last.append(asked)

        # Answers that stay as they are when the conversation goes on are learned in one rendering of it.
        remaining = set(answers)
        for side, version, asked in zip(self.sides, versions, as_last, strict=True):
            for number, answer in asked.items():
                if not side.template.remains(answer, version.outline):
                    remaining.discard(number)

        together = []
        for side, version, asked in zip(self.sides, versions, as_last, strict=True):
            in_place = [asked[number] for number in sorted(remaining)]
            contents = [version.numbers[number] for number in others]
            together.append(side.template.whole(version.outline, in_place, contents))

        # Every other answer needs a rendering that ends with it.
        pairs = []
        for number in answers:
            if number not in remaining:
                pairs.append([asked[number] for asked in as_last])
        if pairs and not together[0].stretches:
            return pairs  # nothing is learned of the whole conversation
        return [together, *pairs]

    def _require_taken(self, versions: Sequence[_Version]) -> None:
        """Refuse messages that one of the templates does not take, before anything is made of them."""
        for side, version in zip(self.sides, versions, strict=True):
            with self._refusing(side, version.messages):
                side.template.marked(version.outline)

            # There they would be tokens: only what is said is read as text.
            for text in version.outline.fixed_texts():
                control = side.controls.search(text)
                if control is not None and control[0].strip():
                    raise ConversationError(
                        f"the schemas of tools, or the names in a call, hold {control[0]!r}, which is a control token "
                        f"of the {side.name}'s. Expected text; leave it out. The conversation begins: "
                        f"{_beginning(version.messages)}."
                    )

    @contextmanager
    def _refusing(self, side: ChatSide, messages: Sequence[Message]) -> Iterator[None]:
        """Raise what a template refuses inside as an error about these messages."""
        try:
            yield
        except jinja2.TemplateError as error:
            raise ConversationError(
                f"the {side.name}'s chat template refuses a conversation of {_roles(messages)}: {error}. "
                f"It begins: {_beginning(messages)}. {REMEDY}"
            ) from error

    def _require_all_once(
        self,
        side: ChatSide,
        rendering: Rendering,
        messages: Sequence[Message],
    ) -> None:
        """Check that a rendering has the messages once and in order, and of what is learned all that is said.

        Raises:
            ConversationError: it has not.
        """
        learned = [stretch.message for stretch in rendering.stretches]
        places = rendering.places()
        answers = [place for place in places if place[0] in learned]
        is_repeated = len(answers) != len(set(answers))
        self._require_all_written(side, rendering, messages)

        # A template may move a system message, unless it is learned.
        order = []
        for number, _ in places:
            if number in learned or rendering.outline.shapes[number].role != "system":
                order.append(number)

        if is_repeated or order != sorted(order):
            raise self._not_followed(side, messages)

    def _require_all_written(
        self,
        side: ChatSide,
        rendering: Rendering,
        messages: Sequence[Message],
    ) -> None:
        """Check that a rendering has all that is learned.

        The student must write thinking and calls to learn them; of a teacher that does not, `notes` warns.

        Raises:
            ConversationError: it has not.
        """
        is_student = side is self.sides[0]
        places = set(rendering.places())
        for stretch in rendering.stretches:
            shape = rendering.outline.shapes[stretch.message]
            missing = {number for number in range(shape.fields) if (stretch.message, number) not in places}

            if shape.content_field in missing:
                if not shape.calls:
                    raise self._not_followed(side, messages)
                if is_student:
                    raise self._lost(
                        messages, "the text beside the tool calls of an answer", "Take the text out of such answers"
                    )
            if not is_student:
                continue

            # Thinking under a key of its own is what many templates leave out, and `notes` tells it.
            is_in_content = shape.contents > 1
            if is_in_content and shape.reasoning_field in missing and self.learn_reasoning:
                raise self._lost(
                    messages,
                    "the thinking (<think>...</think>) of an answer",
                    "Take the thinking out of the answers (--set data.reasoning=drop)",
                )
            if rendering.lacks_calls(stretch):
                remedy = "Leave such conversations out, or give each call an answer of its own"
                raise self._lost(messages, "tool calls, all or some of them,", remedy)

    @staticmethod
    def _not_followed(side: ChatSide, messages: Sequence[Message]) -> ConversationError:
        return ConversationError(
            f"the {side.name}'s chat template leaves out, repeats or moves messages of a conversation of "
            f"{_roles(messages)}; expected each once and in order. It begins: {_beginning(messages)}. {REMEDY}"
        )

    @staticmethod
    def _lost(messages: Sequence[Message], part: str, remedy: str) -> ConversationError:
        """Return an error about a part of answers that the student's template does not write."""
        return ConversationError(
            f"the student's chat template leaves out {part} in a conversation of {_roles(messages)}, which would not "
            f"be learned. It begins: {_beginning(messages)}. {remedy}, or give the tokenizer a template that writes it."
        )

    # ------------------------------------------------------------ renderings -> piece of a window

    def _rendered_piece(
        self,
        name: str,
        renderings: Sequence[Written],
    ) -> tuple[Piece | None, int]:
        """Cut a rendering to a window.

        Returns:
            the piece, and 0; or None, and the number of bytes to learn from that do not fit.
        """
        pieces = self._segments(renderings)
        places = places_of(pieces, len(renderings[0].rendering.stretches))
        if not places:
            return None, 0

        # Contents in the stream of bytes.
        contents = [content for place in places for content in place.contents]
        begins = np.array([content.begin for content in contents], dtype=np.int64)
        sizes = np.array([content.size for content in contents], dtype=np.int64)
        size = int(sizes.sum())

        pair = []
        for side, side_pieces in zip(self.sides, pieces, strict=True):
            pair.append(side.read(side_pieces, places))
        if any(reading.roles[:1] != MARKER for reading in pair):
            return None, size  # a template that puts nothing before what is learned to predict it from

        # A conversation that is longer than a window loses its end.
        cut = _Cut(places[-1].end + 1, [len(reading.ids) for reading in pair])
        whole = max(cut.counts) <= self.max_length
        if not whole:
            cut = self._last_cut(pair)
            if cut is None:
                return None, size

        # Bytes of contents before the cut; a content may be cut in its middle.
        text_bytes = int((cut.byte - begins).clip(0, sizes).sum())
        slots = [byte for place in places for byte in place.slots()]
        readings = []
        unspelt = []
        for number, reading in enumerate(pair):
            readings.append(reading.part(0, cut.counts[number]))
            unspelt.append(text_bytes - self._spelt_bytes(number, readings[number], slots))

        piece = Piece(
            document=name,
            readings=readings,
            first_byte=0,
            last_byte=cut.byte,
            text_bytes=text_bytes,
            unspelt=(unspelt[0], unspelt[1]),
            left_out=size - text_bytes,
            whole=whole,
        )
        return piece, 0

    def _segments(self, pair: Sequence[Written]) -> list[list[Segment]]:
        """Return the segments of a pair of renderings; what both models write has the same names."""
        pieces = [segments(rendering, fields) for rendering, fields in pair]
        return name_fields(pair, pieces, [side.controls for side in self.sides])

    def _last_cut(self, pair: Sequence[Reading]) -> _Cut | None:
        """Return the last common end of both readings that fits into a window; None where none does."""
        cuts = _common_ends(pair)
        cuts = cuts[(cuts[:, 1:] <= self.max_length).all(1)]
        if not len(cuts):
            return None
        byte, *counts = cuts[-1].tolist()
        return _Cut(byte, counts)


def message_is_learned(message: dict[str, Any]) -> bool:
    """Return whether a message, as conversations are handed in, may be learned from."""
    return message.get("weight", 1) != 0


def _common_ends(pair: Sequence[Reading]) -> np.ndarray:
    """Return the places where a conversation can end.

    Returns:
        [C, 3] byte of the stream, student tokens and teacher tokens up to it.
    """
    student, teacher = pair
    student_tokens = np.flatnonzero(student.roles != MARKER)
    teacher_tokens = np.flatnonzero(teacher.roles != MARKER)

    student_ends = student.ends[student_tokens]
    teacher_ends = teacher.ends[teacher_tokens]
    ends, i, j = np.intersect1d(student_ends, teacher_ends, return_indices=True)
    columns = [ends, student_tokens[i] + 1, teacher_tokens[j] + 1]
    return np.stack(columns, axis=1).astype(np.int64)


# ---------------------------------------------------------------- words for messages


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message.shape.role for message in messages)


def _beginning(messages: Sequence[Message]) -> str:
    """Return the begin of a conversation in quotes, by which it is found in a file."""
    contents = [message.fields[0] for message in messages if message.fields]
    return repr(" ".join(contents)[:80])


def _shortened(text: str, length: int = 120) -> str:
    """Return a text in quotes; of a long one both ends, because a change may be at either."""
    if len(text) <= length:
        return repr(text)
    half = length // 2
    return f"{text[:half]!r} ... {text[-half:]!r}"


def _thinking_left_out(name: str) -> str:
    """Return the warning that a model's conversations are written without thinking."""
    learned = "without the teacher" if name == "teacher" else "without it"
    return (
        f"thinking before answers (reasoning_content, <think>) is not written in the {name}'s conversations: answers "
        f"are learned {learned}"
    )


def _calls_left_out(name: str) -> str:
    """Return the warning that a model's conversations are written without tool calls."""
    return f"tool calls are not written in the {name}'s conversations: they are learned without the {name}"


def _content_left_out(name: str) -> str:
    """Return the warning that a model's conversations are written without the text beside tool calls."""
    return f"the text beside tool calls is not written in the {name}'s conversations: it is learned without the {name}"
