"""Tool calls of a pair of renderings: the text that both models write alike is aligned and distilled.

Each template writes a call in its own way: `<tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>`,
`{"name": "f", "parameters": {...}}`. Both are compared word by word, with every text among the arguments as one word.
Runs of words that both have, in the same order, become contents. The rest of a call, and control tokens in it, is
learned from the text alone, as other markup of a template is.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from .chat_template import Rendering, Segment

WORD = re.compile(r"\w+|\W")
"""Word of a template's own text; every other character is one of its own."""

CONTENT, REASONING, FIRST_RUN = 0, 1, 2
"""Numbers of what both models may write in a stretch: the content, the thinking, and from here on runs of its calls."""

NO_STRETCH = -1
"""In place of a stretch, for what is said outside of them."""


class Written(NamedTuple):
    """A rendering, and the fields of its messages as the template writes them."""

    rendering: Rendering
    fields: list[list[str]]


class _Word(NamedTuple):
    """A word of a call."""

    text: str
    is_argument: bool
    control: tuple[int, int] | None
    """Of a control token: side and number, so that it equals no other word."""

    @property
    def is_spoken(self) -> bool:
        """Return whether it is more than punctuation."""
        return self.is_argument or (self.control is None and self.text[0].isalnum())


def name_fields(
    pair: Sequence[Written],
    pieces: Sequence[Sequence[Segment]],
    controls: Sequence[re.Pattern],
) -> list[list[Segment]]:
    """Return the segments of a pair of renderings with names for what is said that hold for both models.

    A field is named by its stretch and its kind, since the models may have different messages before it.

    Args:
        pair: renderings of student and teacher, with as many stretches.
        pieces: their segments.
        controls: the control tokens of each side.
    """
    result = []
    calls = _calls(pair)
    for side, (written, segments) in enumerate(zip(pair, pieces, strict=True)):
        named = [_named(written, piece, number, side) for number, piece in enumerate(segments)]
        result.append(named)

    for stretch in calls:
        tails = [_tail(written, named, stretch) for written, named in zip(pair, result, strict=True)]
        words = []
        for side, (named, tail) in enumerate(zip(result, tails, strict=True)):
            words.append(_words(named[tail], controls[side], side))

        for side, runs in enumerate(_runs(words)):
            tail = tails[side]
            result[side][tail] = _segments(words[side], runs, stretch, side)
    return result


def _calls(pair: Sequence[Written]) -> list[int]:
    """Return the stretches in which both models call tools."""
    calls = []
    for number, stretches in enumerate(zip(*(written.rendering.stretches for written in pair), strict=True)):
        messages = [
            written.rendering.outline.shapes[stretch.message] for written, stretch in zip(pair, stretches, strict=True)
        ]
        if all(shape.calls for shape in messages):
            calls.append(number)
    return calls


def _named(
    written: Written,
    piece: Segment,
    number: int,
    side: int,
) -> Segment:
    """Return a segment with the name of its field; arguments have one of their own on each side."""
    if piece.field is None:
        return piece
    message, field = piece.field
    shape = written.rendering.outline.shapes[message]

    alone = _alone(number, side)
    if piece.stretch is None:
        return piece._replace(field=(NO_STRETCH, alone))
    kinds = {shape.content_field: CONTENT, shape.reasoning_field: REASONING}
    return piece._replace(field=(piece.stretch, kinds.get(field, alone)))


def _alone(number: int, side: int) -> int:
    """Return a negative number that the other side does not have."""
    return -1 - 2 * number - side


def _tail(
    written: Written,
    pieces: Sequence[Segment],
    stretch: int,
) -> slice:
    """Return the segments of a stretch behind its content, without the end of the turn."""
    indices = [index for index, piece in enumerate(pieces) if piece.stretch == stretch]
    first = indices[0]
    if written.rendering.stretches[stretch].end_token:
        indices.pop()
    said = [index for index in indices if pieces[index].field in ((stretch, CONTENT), (stretch, REASONING))]
    begin = max(said) + 1 if said else first
    return slice(begin, max(indices, default=first - 1) + 1)


def _words(
    pieces: Sequence[Segment],
    controls: re.Pattern,
    side: int,
) -> list[_Word]:
    """Return the words of a call."""
    words: list[_Word] = []
    for piece in pieces:
        if piece.field is not None:
            words.append(_Word(piece.text, is_argument=True, control=None))
            continue

        position = 0
        for token in controls.finditer(piece.text):
            words += _plain_words(piece.text[position : token.start()])
            words.append(_Word(token[0], is_argument=False, control=(side, len(words))))
            position = token.end()
        words += _plain_words(piece.text[position:])
    return words


def _plain_words(text: str) -> list[_Word]:
    return [_Word(word, is_argument=False, control=None) for word in WORD.findall(text)]


def _runs(words: Sequence[Sequence[_Word]]) -> list[list[tuple[int, int]]]:
    """Return the runs of words that both sides have: for each side (begin, end) of every run."""
    # Punctuation is alike by chance: it belongs to a run only beside words.
    spoken = [[index for index, word in enumerate(side) if word.is_spoken] for side in words]
    keys = [[side[index] for index in indices] for side, indices in zip(words, spoken, strict=True)]
    pairs = []
    for first, second, size in SequenceMatcher(a=keys[0], b=keys[1], autojunk=False).get_matching_blocks():
        for offset in range(size):
            pairs.append((spoken[0][first + offset], spoken[1][second + offset]))

    runs: list[list[tuple[int, int]]] = [[], []]
    ends = (0, 0)
    for pair in pairs:
        # A run before this one may already reach up to it.
        lead = _common_before(words, pair, ends)
        stop = _common_behind(words, pair)
        is_continued = bool(runs[0]) and all(position - lead == end for position, end in zip(pair, ends, strict=True))
        for side, position in enumerate(pair):
            begin = position - lead
            if is_continued:
                begin, _ = runs[side].pop()
            runs[side].append((begin, position + stop))
        ends = (pair[0] + stop, pair[1] + stop)
    return runs


def _common_before(
    words: Sequence[Sequence[_Word]],
    pair: tuple[int, int],
    ends: tuple[int, int],
) -> int:
    """Count the words without sound that both sides have before a pair of words, behind the last run."""
    count = 0
    most = min(position - end for position, end in zip(pair, ends, strict=True))
    while count < most and words[0][pair[0] - count - 1] == words[1][pair[1] - count - 1]:
        count += 1
    return count


def _common_behind(words: Sequence[Sequence[_Word]], pair: tuple[int, int]) -> int:
    """Count the words from a pair of words on that both sides have, up to the next that is spoken."""
    count = 1
    most = min(len(side) - position for side, position in zip(words, pair, strict=True))
    while count < most and not words[0][pair[0] + count].is_spoken:
        if words[0][pair[0] + count] != words[1][pair[1] + count]:
            break
        count += 1
    return count


def _segments(
    words: Sequence[_Word],
    runs: Sequence[tuple[int, int]],
    stretch: int,
    side: int,
) -> list[Segment]:
    """Return the segments of a call: the runs that both sides have, and what lies between them."""
    segments: list[Segment] = []
    position = 0
    for number, (begin, end) in enumerate(runs):
        segments += _between(words[position:begin], stretch, _alone(position, side))
        text = "".join(word.text for word in words[begin:end])
        segments.append(Segment(text, (stretch, FIRST_RUN + number), stretch))
        position = end
    return segments + _between(words[position:], stretch, _alone(position, side))


def _between(
    words: Sequence[_Word],
    stretch: int,
    alone: int,
) -> list[Segment]:
    """Return the segments of words that one side alone has: its own text, and arguments."""
    segments: list[Segment] = []
    for word in words:
        field = (stretch, alone) if word.is_argument else None
        if field is None and segments and segments[-1].field is None:
            segments[-1] = segments[-1]._replace(text=segments[-1].text + word.text)
        else:
            segments.append(Segment(word.text, field, stretch))
    return segments
