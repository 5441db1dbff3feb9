"""Learned stretches of a conversation, laid out as one stream of bytes for both models.

For every content that both models write the stream has a slot (the space that some tokenizers put before a text), the
content's bytes, and one pseudo-byte for the end of the turn, which both models mark in their own way; one more slot
before and behind a content where a template writes markup there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .chat_template import Segment

Field = tuple[int, int]
"""(stretch, number) of something that both models write; see `call_text.name_fields`."""


class PlacedContent(NamedTuple):
    """A content that both models write, in the stream of bytes."""

    field: Field
    size: int
    """Bytes of the content."""
    lead: int
    """First byte of the slots before it."""
    begin: int
    """First byte of the content itself."""


@dataclass(frozen=True)
class Place:
    """Place of a learned stretch in the stream of bytes, for both models."""

    contents: tuple[PlacedContent, ...]
    """Contents that both models write, in order."""
    end: int
    """The pseudo-byte of the turn's end."""
    ends_alike: bool
    """True if the end of one model's turn tells about the other's: both write the same before it."""

    def slots(self) -> list[int]:
        """Return the bytes before the contents, where a space that a token has in front of a content may lie."""
        slots: list[int] = []
        for content in self.contents:
            slots += range(content.lead, content.begin)
        return slots


class _Markup(NamedTuple):
    """Markup of one model beside the contents of a stretch that both models write."""

    before: tuple[str, ...]
    """Before each of the contents, from the content before it on."""
    behind: str
    """Behind the last one, up to the end of the turn."""


def places_of(sides: Sequence[Sequence[Segment]], count: int) -> list[Place]:
    """Lay the `count` learned stretches of a pair of renderings out as one stream of bytes."""
    places = []
    byte = 0
    for number in range(count):
        stretches = [[piece for piece in pieces if piece.stretch == number] for pieces in sides]
        place = _place(stretches, byte)
        places.append(place)
        byte = place.end + 1
    return places


def _place(stretches: Sequence[Sequence[Segment]], byte: int) -> Place:
    """Lay out a stretch, as both models write it, from this byte of the stream on."""
    # A template may spell an argument in its own way.
    student_texts, teacher_texts = ({(piece.field, piece.text) for piece in stretch} for stretch in stretches)
    common = {field for field, _ in student_texts & teacher_texts if field is not None}
    markup = [_markup(stretch, common) for stretch in stretches]

    contents: list[PlacedContent] = []
    for piece in stretches[0]:
        if piece.field not in common:
            continue

        # One slot for a space in front of the content, one for markup of either model.
        lead = byte
        byte += 1
        if any(side.before[len(contents)] for side in markup):
            byte += 1
        size = len(piece.text.encode())
        content = PlacedContent(
            field=piece.field,
            size=size,
            lead=lead,
            begin=byte,
        )
        contents.append(content)
        byte += size

    if any(side.behind for side in markup):
        byte += 1
    return Place(
        contents=tuple(contents),
        end=byte,
        ends_alike=markup[0].behind == markup[1].behind,
    )


def _markup(stretch: Sequence[Segment], common: set[Field]) -> _Markup:
    """Return the markup beside the contents that both models write."""
    before = []
    text = ""
    for piece in stretch:
        if piece.field in common:
            before.append(text)
            text = ""
        else:
            text += piece.text

    # The last segment is the end of the turn, if there is one.
    if stretch and stretch[-1].field is None:
        text = text.removesuffix(stretch[-1].text)
    return _Markup(tuple(before), behind=text)
