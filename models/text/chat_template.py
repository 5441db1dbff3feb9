"""Renderings of conversations by a chat template, and all that a model has to write of them.

A conversation is rendered with a mark in place of everything that its messages say. The marks show where contents lie
in a model's text, and a comparison with the rendering that ends in the generation prompt (`chat_turns`) shows what the
model itself writes: markup such as an empty block of thinking, the contents, and the end of its turn.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from .chat_turns import (
    EndOfTurn,
    common_length,
    end_of_turn,
    example,
    field_begin,
    field_end,
    placeholders,
    reads,
    render,
    template_of,
)
from .messages import MARK, PLACEHOLDER, Message, Outline, Shape

REMEDY = (
    "Leave such conversations out, or give the tokenizer a template that takes them and writes contents as they are."
)


class ConversationError(ValueError):
    """A conversation that a chat template refuses, or changes so that its contents cannot be found."""

    document: str | None = None
    """Name of the document that the conversation is, where it has one."""


@contextmanager
def named(document: str) -> Iterator[None]:
    """Give a `ConversationError` raised inside the name of its document."""
    try:
        yield
    except ConversationError as error:
        error.document = document
        raise


class Stretch(NamedTuple):
    """A part of a rendering that is learned: the text that a model writes of one message."""

    message: int
    begin: int
    """In the rendering with marks."""
    end: int
    end_token: str
    """The control token it ends with, or nothing."""


@dataclass(frozen=True)
class Rendering:
    """The first messages of a conversation, with marks, and the parts of it that are learned."""

    outline: Outline
    text: str
    """As the template writes it; where an answer is last, with the end of its turn, too."""
    stretches: tuple[Stretch, ...]

    def places(self) -> list[tuple[int, int]]:
        """Return (message, number) of all that is said, in the order of the text."""
        return [(mark.message, mark.number) for mark in placeholders(self.text)]

    def lacks_calls(self, stretch: Stretch) -> bool:
        """Return whether a learned message calls tools of which the template leaves one or some of its texts out."""
        message = stretch.message
        shape = self.outline.shapes[message]
        if not shape.calls:
            return False

        places = set(self.places())
        if any((message, field) not in places for field in range(shape.first_argument, shape.fields)):
            return True

        # A call without a text among its arguments is known by its name, which may stand before what is learned.
        begin = max((mark.end for mark in placeholders(self.text) if mark.message < message), default=0)
        written = self.text[begin : stretch.end]
        called = Counter(call["function"]["name"] for call in json.loads(shape.calls))
        return any(written.count(name) < count for name, count in called.items())


class Segment(NamedTuple):
    """A piece of a rendering."""

    text: str
    field: tuple[int, int] | None
    """(message, number) of what is said; None: the template's own text."""
    stretch: int | None
    """Index of the stretch that holds it."""


class Difference(NamedTuple):
    """A place in which a template writes something else than is said."""

    message: int | None
    """Its number; None where the contents are as they are, and the text around them depends on them."""
    expected: str
    """The content, or the text around it."""
    written: str
    """The text that the template writes in its place."""


CallForm = Literal["objects", "texts", "unwritten"]
"""Form in which a template expects the arguments of tool calls; unwritten: it does not write calls."""

EXAMPLE_TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Find a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Its name."}}},
    },
}
"""Schema of a function, to look at templates with."""

MOST_RENDERINGS = 1000
"""Renderings that are remembered; conversations with tools have outlines of their own."""


class ChatTemplate:
    """One model's chat template.

    Args:
        name: of the model, for messages.
        tokenizer: with its template; looked at when it is needed.
        learn_reasoning: False: the thinking before an answer is read, and what follows it learned.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        learn_reasoning: bool = True,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.learn_reasoning = learn_reasoning
        self._renderings: dict[tuple, str] = {}
        self._end: list[EndOfTurn | None] = []  # empty until it is looked for, since the end may be None
        self._call_form: CallForm | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_renderings": {}, "_end": []}

    @property
    def call_form(self) -> CallForm:
        """Form in which the template expects the arguments of calls; objects where it refuses the example."""
        if self._call_form is None:
            self._call_form = self._find_call_form()
        return self._call_form

    def _find_call_form(self) -> CallForm:
        """Write a call in both forms, and see what becomes of it."""
        mark = f"{MARK}1.0{MARK}"
        call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "find", "arguments": {"place": mark}}}
        answer = Message.of({"role": "assistant", "content": "", "tool_calls": [call]}, strip=False, cut=False)

        is_refused = True
        for form, as_text in (("objects", False), ("texts", True)):
            messages = [*example(["user"]), answer.shape.message([mark], arguments_as_text=as_text)]
            try:
                written = render(self.tokenizer, messages, tools=json.dumps([EXAMPLE_TOOL]))
            except jinja2.TemplateError:
                continue
            is_refused = False

            # A template that expects JSON writes an object as Python does; find(place='Ulm') is a form of its own.
            if mark in written and f"'place': '{mark}'" not in written:
                return form  # type: ignore[return-value]
        return "objects" if is_refused else "unwritten"

    def writes_tools(self, outline: Outline) -> bool:
        """Return whether the schemas of an outline are written."""
        return self.marked(outline) != self.marked(outline.without_tools())

    def reads(self, name: str) -> bool:
        """Return whether the template has a variable of this name."""
        return reads(template_of(self.tokenizer), name)

    @property
    def end(self) -> EndOfTurn | None:
        """End of turns; None where it is not the tokenizer's end of text, too."""
        if not self._end:
            try:
                end = end_of_turn(self.tokenizer)
            except jinja2.TemplateError:
                end = None
            if end is not None and end.token != self.tokenizer.eos_token:
                end = None
            self._end.append(end)
        return self._end[0]

    def marked(
        self,
        outline: Outline,
        *,
        ask: bool = False,
    ) -> str:
        """Return a rendering with marks in place of what is said."""
        key = (outline, ask)
        if key not in self._renderings:
            if len(self._renderings) >= MOST_RENDERINGS:
                self._renderings.clear()
            marks = [shape.marks(number) for number, shape in enumerate(outline.shapes)]
            self._renderings[key] = self._render(outline, marks, ask=ask)
        return self._renderings[key]

    def _render(
        self,
        outline: Outline,
        fields: Sequence[Sequence[str]],
        *,
        ask: bool = False,
    ) -> str:
        """Return a conversation with these fields, by message, as the template writes it."""
        as_text = any(shape.calls for shape in outline.shapes) and self.call_form == "texts"
        messages = []
        for shape, texts in zip(outline.shapes, fields, strict=False):
            messages.append(shape.message(texts, arguments_as_text=as_text))
        return render(
            self.tokenizer,
            messages,
            ask=ask,
            tools=outline.tools,
            variables=outline.variables,
        )

    def answer(self, outline: Outline) -> Rendering:
        """Return a conversation up to an answer, of which all behind the generation prompt is learned.

        Where the answer does not begin with the generation prompt (`chat_tokenizer` has looked for one), the content
        and the end of the turn are learned.
        """
        text = self.marked(outline)
        message = len(outline.shapes) - 1
        begin = field_begin(text, message)
        if message > 0:  # nobody can ask for an answer to nothing
            prompt = self.marked(outline.first(message), ask=True)
            if not text.startswith(prompt):
                text = self._as_asked(text, prompt, outline)
            if text.startswith(prompt):
                begin = len(prompt)
        if not self.learn_reasoning:
            begin = max(begin, _behind_reasoning(text, message, outline.shapes[message]))

        # Behind the last answer a template does not write an end that belongs to the next message.
        content_end = field_end(text, message)
        is_last = content_end >= 0 and not text[content_end:].strip()
        if is_last and self.end is not None and self.end.begins_next:
            text = text[:content_end] + self.end.text

        if outline.shapes[message].calls:
            stretch = self._stretch_with_calls(text, message, begin)
        else:
            stretch = self._stretch(text, message, begin)
        return Rendering(
            outline=outline,
            text=text,
            stretches=(stretch,),
        )

    def _as_asked(self, text: str, prompt: str, outline: Outline) -> str:
        """Return a rendering whose last message stands behind the prompt for it, if it begins as the prompt ends.

        Once there is an answer, some templates write what came before it otherwise: they drop its thinking. The model
        that answered has read it.
        """
        message = len(outline.shapes) - 1
        before = self.marked(outline.first(message))
        opening = prompt[len(before) :] if prompt.startswith(before) else ""

        # The opening stands between the last mark of the messages before and the first one of the answer.
        marks = placeholders(text)
        first = max((mark.end for mark in marks if mark.message < message), default=0)
        last = min((mark.begin for mark in marks if mark.message == message), default=len(text))
        place = text.rfind(opening, first, last) if opening else -1
        return text if place < 0 else prompt + text[place + len(opening) :]

    def remains(self, answer: Rendering, outline: Outline) -> bool:
        """Return whether an answer is written alike when the conversation has gone on."""
        (stretch,) = answer.stretches
        upto_end = answer.text[: stretch.end]
        return 0 <= stretch.begin <= stretch.end and self._ended(outline).startswith(upto_end)

    def whole(
        self,
        outline: Outline,
        answers: Sequence[Rendering],
        others: Sequence[int],
    ) -> Rendering:
        """Return a whole conversation.

        Args:
            answers: those that are learned in it; all of them remain.
            others: messages of which the contents are learned.
        """
        text = self._ended(outline)
        stretches = []
        for message in others:
            stretches.append(self._stretch(text, message, field_begin(text, message)))
        for answer in answers:
            stretches += answer.stretches
        return Rendering(
            outline=outline,
            text=text,
            stretches=tuple(sorted(stretches)),
        )

    def _ended(self, outline: Outline) -> str:
        """Return the whole conversation; an answer that is last has an end of its turn."""
        ends_with_answer = bool(outline.shapes) and outline.shapes[-1].role == "assistant"
        if ends_with_answer and self.end is not None and self.end.begins_next:
            return self.answer(outline).text
        return self.marked(outline)

    def fields_as_written(
        self,
        rendering: Rendering,
        fields: Sequence[Sequence[str]],
    ) -> list[list[str]] | None:
        """Return the fields in the spelling in which the template writes them where the marks are.

        Only the arguments of calls have several: as they are, and as a text in JSON or Python. None: the template
        writes something else.
        """
        marked = self.marked(rendering.outline)
        written = self._render(rendering.outline, fields)
        spelt = [list(texts) for texts in fields]

        position = 0
        end_of_last = 0
        for mark in placeholders(marked):
            literal = marked[end_of_last : mark.begin]
            end_of_last = mark.end
            if not written.startswith(literal, position):
                return None
            position += len(literal)

            is_argument = mark.number >= rendering.outline.shapes[mark.message].first_argument
            spellings = _spellings(fields[mark.message][mark.number], is_argument)
            spelling = next((text for text in spellings if written.startswith(text, position)), None)
            if spelling is None:
                return None
            position += len(spelling)
            spelt[mark.message][mark.number] = spelling
        return spelt if written[position:] == marked[end_of_last:] else None

    def difference(self, rendering: Rendering, fields: Sequence[Sequence[str]]) -> Difference:
        """Return the first content that the template does not write as it is, and the text in its place."""
        filled = self._filled(rendering, fields)
        written = self._render(rendering.outline, fields)

        # Both texts begin and end alike; in between they differ from the begin of a word on.
        same = common_length(filled, written)
        same_at_end = common_length(filled[same:][::-1], written[same:][::-1])
        end = len(written) - same_at_end
        word = 1 + max(filled.rfind(space, 0, same) for space in " \n")

        marked = self.marked(rendering.outline)
        marks = placeholders(marked)
        next_begins = [mark.begin for mark in marks[1:]]
        next_begins.append(len(marked))
        longer = 0  # characters that the contents so far have more than their marks
        for mark, next_begin in zip(marks, next_begins, strict=True):
            content = fields[mark.message][mark.number]
            begin = mark.begin + longer
            if begin > same:
                begin = word  # behind the first difference, characters of both texts no longer correspond
            longer += len(content) - (mark.end - mark.begin)
            if content in written:
                continue

            # The text in the content's place reaches to the template's own text behind it, where that is written.
            behind = marked[mark.end : next_begin]
            place_end = written.find(behind, begin) if behind else -1
            if place_end < 0:
                place_end = end
            return Difference(
                message=mark.message,
                expected=content,
                written=written[begin:place_end],
            )

        # All contents are written: the text around them depends on them.
        filled_end = len(filled) - same_at_end
        return Difference(
            message=None,
            expected=filled[word:filled_end],
            written=written[word:end],
        )

    def _filled(self, rendering: Rendering, fields: Sequence[Sequence[str]]) -> str:
        """Return the rendering with the fields in place of their marks."""

        def field_of(mark: re.Match) -> str:
            return fields[int(mark[1])][int(mark[2])]

        return PLACEHOLDER.sub(field_of, self.marked(rendering.outline))

    def _stretch(
        self,
        text: str,
        message: int,
        begin: int,
    ) -> Stretch:
        """Return the learned part of a message from `begin` on, with the end of the turn where it has one."""
        content_end = field_end(text, message)
        if self.end is not None and content_end >= 0 and text.startswith(self.end.text, content_end):
            end = content_end + len(self.end.text)
            return Stretch(
                message=message,
                begin=begin,
                end=end,
                end_token=self.end.token,
            )
        return Stretch(message, begin, content_end, end_token="")

    def _stretch_with_calls(
        self,
        text: str,
        message: int,
        begin: int,
    ) -> Stretch:
        """Return the learned part of a last message that calls tools; its turn may end in another way than others."""
        behind_fields = max(begin, field_end(text, message))
        end = -1
        if self.end is not None:
            end = text.find(self.end.text, behind_fields)
        if self.end is None or end < 0:
            return Stretch(message, begin, len(text.rstrip()), end_token="")
        return Stretch(
            message=message,
            begin=begin,
            end=end + len(self.end.text),
            end_token=self.end.token,
        )


_IN_SINGLE_QUOTES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r"})


def _spellings(text: str, is_argument: bool) -> list[str]:
    """Return the spellings in which a template may write a field."""
    if not is_argument:
        return [text]
    as_json = [json.dumps(text, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True)]

    # JSON in JSON, where a template writes arguments that are JSON as one text.
    in_json = json.dumps(as_json[0], ensure_ascii=False)[1:-1]

    # A text of Python between single quotes: find(place='Sam\'s').
    in_single_quotes = text.translate(_IN_SINGLE_QUOTES)
    return list(dict.fromkeys([in_json, *as_json, in_single_quotes, text]))


def _behind_reasoning(text: str, message: int, shape: Shape) -> int:
    """Return the end of the thinking in a rendering with marks, with the tag behind it; -1 where there is none."""
    number = shape.reasoning_field
    ends = [mark.end for mark in placeholders(text) if (mark.message, mark.number) == (message, number)]
    if not ends:
        return -1
    closing = re.compile(r"\s*</think>\s*").match(text, ends[0])
    if closing is not None:
        return closing.end()

    # Other templates write other markup there; the content begins behind it.
    later = [mark.begin for mark in placeholders(text) if mark.message == message and mark.begin >= ends[0]]
    return min(later, default=ends[0])


def segments(rendering: Rendering, fields: Sequence[Sequence[str]]) -> list[Segment]:
    """Cut a rendering at the edges of contents and of learned stretches, and fill the fields in.

    Args:
        rendering: with marks.
        fields: by message; they take the places of the marks.
    """
    edges = {0, len(rendering.text)}
    marks = {mark.begin: mark for mark in placeholders(rendering.text)}
    for mark in marks.values():
        edges.add(mark.begin)
        edges.add(mark.end)
    for stretch in rendering.stretches:
        edges.add(stretch.begin)
        edges.add(stretch.end)
        edges.add(stretch.end - len(stretch.end_token))  # the end of the turn is a segment of its own

    pieces = []
    for begin, end in pairwise(sorted(edges)):
        text = rendering.text[begin:end]
        field = None
        mark = marks.get(begin)
        if mark is not None:
            text = fields[mark.message][mark.number]
            field = (mark.message, mark.number)
        pieces.append(
            Segment(
                text=text,
                field=field,
                stretch=_stretch_at(rendering, begin, end),
            )
        )
    return pieces


def _stretch_at(rendering: Rendering, begin: int, end: int) -> int | None:
    """Return the index of the stretch that holds these characters; None where none does."""
    for index, stretch in enumerate(rendering.stretches):
        if stretch.begin <= begin and end <= stretch.end:
            return index
    return None
