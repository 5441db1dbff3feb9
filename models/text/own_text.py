"""Text that the student writes itself, as windows: what it is asked to continue, and what is made of its tokens.

The student is graded on the very tokens that it sampled: its text, tokenised again, may have others. The teacher reads
the same bytes in its own tokens, behind its own reading of the same prompt. A prompt is the begin of a window of given
text, up to a character at which a token of either model begins; in a conversation, up to an answer.

A template may write a space before an answer, and a tokenizer make one token of it and the answer's first word. Such a
space is no part of the answer: the other model reads what its own template has there.

What a student writes may be no text: it ends before the first special token and before the first byte that is no
UTF-8. A character whose last bytes are lacking, because the limit cut it off, ends it likewise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .encoder_decoder import SourceEncoder
from .tokens import END, MARKER, TEXT, Reading, TokenTable
from .windows import OWN, SIDES, PairEncoder, _columns, _reading, document_begins


class OwnText(NamedTuple):
    """Text that the student wrote behind a prompt."""

    window: dict[str, Any] | None
    """To learn from, with the columns of `PairEncoder.windows` and `own`; None where nothing can be learned."""
    text: str
    tokens: int
    """Sampled tokens that the text is made of; neither its end, nor what was cut off."""
    ended: bool
    """The student ended it by itself."""
    broken: bool
    """A special token in its middle, or bytes that are no UTF-8, cut it short; the window has an end in their place."""


@dataclass(frozen=True)
class OwnPrompt:
    """The begin of a window, which both models have read before the student writes."""

    student: Reading
    """Its tokens; all have role MARKER."""
    teacher: Reading
    """Likewise."""
    document: str
    """Name of the document, for messages."""
    student_space: bytes = b""
    """Space of the student's template that is a part of the first token of an answer."""
    teacher_space: bytes = b""
    """Likewise of the teacher's."""

    @property
    def student_ids(self) -> list[int]:
        """Tokens that the student has read."""
        return self.student.ids.tolist()

    @property
    def byte(self) -> int:
        """The byte behind it, at which the student's text begins."""
        return int(max(self.student.ends.max(), self.teacher.ends.max()))


def require_own_text(encoder: PairEncoder) -> None:
    """Check that a pair can learn from the student's own text.

    Raises:
        ValueError: the models are encoder-decoders, or the student's tokens do not spell its text.
    """
    if isinstance(encoder, SourceEncoder):
        raise ValueError(
            "on_policy: got encoder-decoder models, expected causal ones, whose text goes on from its prompt; leave "
            "curriculum.on_policy at 0"
        )
    if encoder.tables[0].rules.drops_spaces:
        raise ValueError(
            "on_policy: got a student whose tokenizer drops spaces, so that the bytes of sampled tokens are not known; "
            "expected byte-level BPE, SentencePiece or another that spells the text; leave curriculum.on_policy at 0"
        )


def stop_ids(encoder: PairEncoder) -> tuple[int, ...]:
    """Return the tokens with which the student ends a text: its end of text, or of its turn in conversations."""
    end = encoder.end_of_text[0]
    return () if end is None else (end,)


# ---------------------------------------------------------------------------------- what it is asked to continue


def own_prompt(encoder: PairEncoder, window: Mapping[str, Any], tokens: int, draw: float) -> OwnPrompt | None:
    """Return the begin of a document of a window, for the student to go on from.

    Args:
        encoder: that made the window.
        tokens: of the student, at most; in conversations a prompt is as long as it is.
        draw: in [0, 1), chooses among the documents, or the answers, of the window.

    Returns:
        the prompt; None where the window has no place behind which something could be written.
    """
    student, teacher = (_reading(window, side) for side in SIDES)
    if encoder.prompt is None:
        places = _begins_of_documents(encoder, student, teacher, tokens)
    else:
        places = [_within_document(place, window) for place in _begins_of_answers(encoder, student, teacher)]

    # Both models need room to go on.
    places = [place for place in places if max(place.student.stop, place.teacher.stop) < encoder.max_length]
    if not places:
        return None
    place = places[int(draw * len(places))]
    return OwnPrompt(
        student=_as_read(student.select(place.student)),
        teacher=_as_read(teacher.select(place.teacher)),
        document=str(window["documents"]),
        student_space=place.student_space,
        teacher_space=place.teacher_space,
    )


class _Place(NamedTuple):
    """The tokens of a prompt in a window."""

    student: slice
    teacher: slice
    student_space: bytes = b""
    teacher_space: bytes = b""


def _as_read(reading: Reading) -> Reading:
    """Return tokens that are read and not learned."""
    return reading._replace(roles=np.full(len(reading.ids), MARKER))


def _begins_of_documents(encoder: PairEncoder, student: Reading, teacher: Reading, tokens: int) -> list[_Place]:
    """Return the begins of the documents in a window of plain text, at most half of each."""
    student_table, teacher_table = encoder.tables
    places = []
    for student_part, teacher_part in zip(_documents(student), _documents(teacher), strict=False):
        # Characters at which a token of either model begins, and that something stands before.
        common = np.intersect1d(
            _text_starts(student, student_part, student_table),
            _text_starts(teacher, teacher_part, teacher_table),
        )
        student_tokens = np.searchsorted(student.starts, common)
        teacher_tokens = np.searchsorted(teacher.starts, common)
        has_begun = (student_tokens > student_part.start) & (teacher_tokens > teacher_part.start)

        most = min(tokens, (student_part.stop - student_part.start) // 2)
        fitting = np.flatnonzero(has_begun & (student_tokens - student_part.start <= most))
        if len(fitting):
            last = fitting[-1]
            places.append(
                _Place(
                    slice(student_part.start, int(student_tokens[last])),
                    slice(teacher_part.start, int(teacher_tokens[last])),
                )
            )
    return places


def _documents(reading: Reading) -> list[slice]:
    """Return the tokens of each document in a window: up to, and without, its end of text.

    An end of text that is the start of the next document belongs to that one.
    """
    ends = np.flatnonzero(reading.roles == END).tolist()
    begins = [0, *ends]
    parts = []
    for number, (begin, end) in enumerate(zip(begins, [*ends, len(reading.ids)], strict=True)):
        follows_end = number > 0
        has_start = begin + 1 < len(reading.ids) and reading.roles[begin + 1] == MARKER
        parts.append(slice(begin + 1 if follows_end and has_start else begin, end))
    return parts


def _text_starts(reading: Reading, part: slice, table: TokenTable) -> np.ndarray:
    """Return the bytes at which tokens of a text begin that do not go on with a character."""
    tokens = reading.select(part)
    begins_character = [_begins_character(table.bytes[token]) for token in tokens.ids.tolist()]
    return tokens.starts[(tokens.roles == TEXT) & np.array(begins_character, dtype=bool)]


def _begins_character(data: bytes | None) -> bool:
    """Return whether bytes begin with a character; one of the form 10xxxxxx goes on with one."""
    return not data or (data[0] & 0xC0) != 0x80


def _begins_of_answers(encoder: PairEncoder, student: Reading, teacher: Reading) -> list[_Place]:
    """Return what stands before each answer in a window of conversations, its markup included."""
    student_table, teacher_table = encoder.tables
    pairs = list(zip(_answers(student), _answers(teacher), strict=False))
    ended = [pair for pair in pairs if all(answer.may_end for answer in pair)]
    # Of a template that ends nobody's turn with the token that ends a text, every message is as good as any other.
    has_ends = any(END in reading.roles for reading in (student, teacher))

    places = []
    for (first, _), (second, _) in ended if has_ends else pairs:
        begin = max(student.starts[first], teacher.starts[second])
        places.append(
            _Place(
                slice(0, first),
                slice(0, second),
                student_space=_space_before(student, first, begin, student_table),
                teacher_space=_space_before(teacher, second, begin, teacher_table),
            )
        )
    return places


def _within_document(place: _Place, window: Mapping[str, Any]) -> _Place:
    """Return a place without the documents before its own, where models do not see those."""
    parts = []
    for side, prompt in zip(SIDES, (place.student, place.teacher), strict=True):
        begins = document_begins(window, side)
        last_begin = begins[begins < prompt.stop][-1]
        parts.append(slice(int(last_begin), prompt.stop))

    student, teacher = parts
    return place._replace(student=student, teacher=teacher)


def _space_before(reading: Reading, number: int, begin: int, table: TokenTable) -> bytes:
    """Return the space that a token has before the byte at which an answer begins."""
    data = table.bytes[int(reading.ids[number])] or b""
    before = data[: max(0, begin - int(reading.starts[number]))]
    return before if before.isspace() else b""


class _Answer(NamedTuple):
    """A learned stretch of a conversation."""

    first: int
    """Token at which its text begins."""
    may_end: bool
    """The token that ends a text ends it too, or it is cut off; a user's message may end with markup alone."""


def _answers(reading: Reading) -> list[_Answer]:
    """Return the learned stretches that have text."""
    is_learned = reading.roles != MARKER
    begins = np.flatnonzero(is_learned & ~np.append(False, is_learned[:-1]))
    stops = np.flatnonzero(is_learned & ~np.append(is_learned[1:], False)) + 1
    texts = np.flatnonzero(reading.roles == TEXT)

    answers = []
    for begin, stop in zip(begins, stops, strict=True):
        # A template may write markup of its own before the text.
        number = np.searchsorted(texts, begin)
        if number < len(texts):
            may_end = stop == len(reading.roles) or reading.roles[stop - 1] == END
            answers.append(_Answer(int(texts[number]), bool(may_end)))
    return answers


# ---------------------------------------------------------------------------------- what it has written


def own_window(encoder: PairEncoder, prompt: OwnPrompt, sampled: Sequence[int]) -> OwnText:
    """Make a window of what the student wrote.

    Args:
        encoder: that made the window of the prompt.
        sampled: the student's tokens behind the prompt; the first end of text or turn among them is the last that
            counts.
    """
    student_table, teacher_table = encoder.tables
    ids, ended, has_special = _up_to_end(sampled, student_table)
    room = encoder.max_length - len(prompt.student.ids)
    if len(ids) > room:
        ids = ids[:room]
        ended = has_special = False

    # Up to the last byte of the last whole character.
    data, ends = _spelling(ids, student_table)
    count, is_text = _valid_tokens(data, ends)
    ends = ends[:count]
    data = data[: ends[-1]] if count else b""
    is_cut = count < len(ids)
    broken = has_special or not is_text or (ended and is_cut)
    ended = ended and not is_cut

    space = prompt.student_space if data.startswith(prompt.student_space) else b""
    answer = data[len(space) :]
    begin = prompt.byte + max(len(space), len(prompt.teacher_space))

    # Where the student has sampled what no text can hold, the right end stands in its place. The distributions before
    # it are compared like any others; without it nobody would tell the student what should have followed there.
    end_ids = encoder.end_of_text if ended or broken else (None, None)

    # The teacher may need more tokens than a window has.
    readings = []
    for table, before, own_space, own_ids, end_id in (
        (student_table, prompt.student, space, ids[:count], end_ids[0]),
        (teacher_table, prompt.teacher, prompt.teacher_space, None, end_ids[1]),
    ):
        text = _behind_space(_text_reading(own_space + answer, table, own_ids), len(own_space)).shifted(begin)
        if None not in end_ids:
            text = text.with_end(end_id, begin + len(answer))
        readings.append(Reading.joined([before, text]).part(0, encoder.max_length))

    is_learned = ended or answer or None not in end_ids
    window = _window(readings, prompt, len(answer)) if is_learned else None
    return OwnText(window, answer.decode(), count, ended, broken)


def _up_to_end(sampled: Sequence[int], table: TokenTable) -> tuple[list[int], bool, bool]:
    """Return the tokens of text that come first, and whether an end, or another special token, follows them."""
    for number, token in enumerate(sampled):
        if token == table.end_of_text:
            return list(sampled[:number]), True, False
        if token >= len(table.bytes) or table.bytes[token] is None:
            return list(sampled[:number]), False, True
    return list(sampled), False, False


def _spelling(ids: Sequence[int], table: TokenTable) -> tuple[bytes, np.ndarray]:
    """Return the bytes of tokens, and the byte at which each ends."""
    pieces = [table.bytes[token] or b"" for token in ids]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return b"".join(pieces), ends


def _valid_tokens(data: bytes, ends: np.ndarray) -> tuple[int, bool]:
    """Count the first tokens that end with a whole character of valid UTF-8.

    Returns:
        the number, and False where what follows is no begin of a character either.
    """
    is_text = True
    valid = len(data)
    try:
        data.decode()
    except UnicodeDecodeError as error:
        valid = error.start
        is_text = error.reason == "unexpected end of data"

    for number in range(len(ends), 0, -1):
        end = ends[number - 1]
        if end <= valid and (end == valid or _begins_character(data[end:])):
            return number, is_text
    return 0, is_text


def _text_reading(data: bytes, table: TokenTable, ids: Sequence[int] | None) -> Reading:
    """Return tokens in the middle of a text, with their bytes: these ids, or by the tokenizer's own rules."""
    if ids is None:
        [ids] = table.spell([data]) if data else [[]]
    spelt, ends = _spelling(ids, table)
    if spelt != data:
        # Bytes that the tokenizer drops or has no token for: its own reading of the text tells where they are.
        return table.read_inside(data.decode())

    return Reading(
        ids=np.array(ids, dtype=np.int64),
        starts=np.append(np.zeros(1, dtype=np.int64), ends)[: len(ids)],
        ends=ends,
        roles=np.full(len(ids), TEXT),
    )


def _behind_space(reading: Reading, size: int) -> Reading:
    """Return the tokens of an answer and so many bytes of a template before it; what has no other byte is markup."""
    ends = reading.ends - size
    return reading._replace(starts=reading.starts - size, ends=ends, roles=np.where(ends > 0, reading.roles, MARKER))


def _window(readings: Sequence[Reading], prompt: OwnPrompt, size: int) -> dict[str, Any]:
    """Return the window of two readings, with the columns of `PairEncoder.windows`."""
    window: dict[str, Any] = {"bytes": size, "left_out": 0, "documents": prompt.document, OWN: True}
    for side, reading in zip(SIDES, readings, strict=True):
        window[f"{side}_unspelt"] = 0
        window |= _columns(reading, side)
    return window
