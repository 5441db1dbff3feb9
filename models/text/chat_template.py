"""Chat templates as text: what a model is asked with, and what it has to write behind that.

A conversation is rendered with a mark in place of everything that its messages say. The marks show where contents lie
in a model's text, and a comparison with the rendering that ends in the generation prompt shows what the model itself
writes: markup such as an empty block of thinking, the contents, and the end of its turn.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""For a tokenizer without a chat template: role names in plain words, end of text after the assistant's."""

MARK, BREAK = "\U0010fffd", "\U0010fffc"
"""Private characters: around the alias of a control token or the number of a content, and between texts that no token
may join. In contents they become U+FFFD."""

PLACEHOLDER = re.compile(f"{MARK}(\\d+)\\.(\\d+){MARK}")

CLOCK = "strftime_now"
"""The function by which a chat template reads the clock."""

DIRECTIVES = [*"aAbBcdDeFgGhHIjmMpPrRSTuUVwWxXyYzZ", "-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j", "%"]
"""What may follow a % in a format of `strftime`; not every platform knows all of them."""

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn the thinking before an answer on or off."""

THOUGHT = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)
"""Thinking and the answer behind it, as models write them; the opening tag may stand in the generation prompt."""

REMEDY = (
    "Leave such conversations out, or give the tokenizer a template that takes them and writes contents as they are."
)


class ConversationError(ValueError):
    """A conversation that a chat template refuses, or changes so that its contents cannot be found."""

    document: str | None = None
    """Its name, where it has one."""


@contextmanager
def named(document: str) -> Iterator[None]:
    """A `ConversationError` raised inside is about this document."""
    try:
        yield
    except ConversationError as error:
        error.document = document
        raise


# ---------------------------------------------------------------- messages


class Shape(NamedTuple):
    """All of a message but the texts of its fields, which are what is said in it."""

    role: str
    literals: tuple[str, ...]
    """Texts of the content around its fields: one more than there are fields in it."""
    has_reasoning: bool = False
    """Whether a field behind those of the content is the thinking, under a key of its own."""

    def message(self, fields: Sequence[str]) -> dict[str, str]:
        """Return the message with these fields, as templates read it."""
        content = self.literals[0]
        for field, literal in zip(fields, self.literals[1:], strict=False):
            content += field + literal

        message = {"role": self.role, "content": content}
        if self.has_reasoning:
            message |= {"reasoning_content": fields[-1], "thinking": fields[-1]}
        return message

    def marked(self, number: int) -> dict[str, str]:
        """Return the message with marks as its fields, `number` being its place in the conversation."""
        count = len(self.literals) - 1 + self.has_reasoning
        return self.message([f"{MARK}{number}.{field}{MARK}" for field in range(count)])


class Message(NamedTuple):
    """A message, taken apart."""

    shape: Shape
    fields: tuple[str, ...]

    @classmethod
    def of(cls, message: dict[str, Any], *, strip: bool, cut: bool) -> "Message":
        """Take a message apart.

        Args:
            strip: leave out the white space around its content.
            cut: make the thinking in an assistant's content, and the answer behind it, fields of their own.
        """
        content = message["content"].strip() if strip else message["content"]
        literals, fields = ("", ""), (content,)

        thought = THOUGHT.fullmatch(content) if cut and message["role"] == "assistant" else None
        if thought is not None:
            opening, thinking, closing, answer = thought.groups()
            literals, fields = (opening, closing, ""), (thinking, answer)

        reasoning = message.get("reasoning_content")
        if reasoning is not None:
            fields = (*fields, reasoning.strip() if strip else reasoning)
        return cls(Shape(message["role"], literals, reasoning is not None), fields)

    def as_dict(self) -> dict[str, str]:
        """Return the message, as templates read it."""
        return self.shape.message(self.fields)


# ---------------------------------------------------------------- the clock


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether conversations look different from day to day."""
    return CLOCK in str(tokenizer.chat_template)


def on_date(tokenizer: PreTrainedTokenizerBase, today: date) -> PreTrainedTokenizerBase:
    """Return a tokenizer for which it is always this day: itself, where its chat template reads no clock."""
    if not reads_clock(tokenizer):
        return tokenizer
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = _with_prelude(_clock_of(today), _template(tokenizer))
    return dated


def _clock_of(today: date) -> str:
    """A macro that stands in for the clock; a template can be given values, but no functions."""
    replaced = ""
    for name in DIRECTIVES:
        directive = f"%{name}"
        with suppress(ValueError):
            replaced += f" | replace({directive!r}, {today.strftime(directive)!r})"
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"


# ---------------------------------------------------------------- templates


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that conversations without tools are written in."""
    return tokenizer.get_chat_template()


def _with_prelude(prelude: str, template: str) -> str:
    return f"{prelude}\n{template}"  # the line break goes away with the statement before it


def _with_generation_prompt(template: str, prompt: str) -> str:
    """The template with another generation prompt behind its messages."""
    return (
        "{% set asked_to_answer = add_generation_prompt %}{% set add_generation_prompt = false %}{% set said %}\n"
        + template.removesuffix("\n")
        + "{{ '' }}{% endset %}{{ said }}{% if asked_to_answer %}{{ "
        + repr(prompt)
        + " }}{% endif %}"
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, ask: bool = False) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def _example(*roles: str) -> list[dict[str, str]]:
    """A conversation of marks."""
    return [Shape(role, ("", "")).marked(number) for number, role in enumerate(roles)]


def _field_end(rendered: str, message: int) -> int:
    """Find the end of a message's last field in a rendering with marks, -1 if there is none."""
    ends = [match.end() for match in PLACEHOLDER.finditer(rendered) if int(match[1]) == message]
    return max(ends, default=-1)


def _field_begin(rendered: str, message: int) -> int:
    begins = [match.start() for match in PLACEHOLDER.finditer(rendered) if int(match[1]) == message]
    return min(begins, default=-1)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return special tokens, and added ones that the chat template writes; the longest first."""
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in template}
    return sorted(tokens, key=lambda token: (-len(token), token))


class EndOfTurn(NamedTuple):
    """Return the text behind what the assistant says."""

    text: str
    """Up to the end of `token`; white space or other markup may come before it."""
    token: str
    """The control token at which a model stops."""
    begins_next: bool
    """The token belongs to the next message: behind the last answer the template does not write it."""


def _common_length(one: str, other: str) -> int:
    """Count the characters with which both texts begin."""
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return index
    return min(len(one), len(other))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn | None:
    """Return how the assistant's turns end; None where the template puts no control token behind them."""
    last = _behind_answer(tokenizer)
    try:
        followed = _behind_answer(tokenizer, followed=True)
    except jinja2.TemplateError:
        followed = last

    # Some templates write more behind the very last message, and some end it in another way.
    common = _common_length(last, followed)

    for text, begins_next in ((last[:common], False), (last, False), (followed, True)):
        tokens = list(_control_pattern(tokenizer).finditer(text))
        if not tokens:
            continue
        if not begins_next:
            token = _last_of_run(tokens)
            return EndOfTurn(text[: token.end()], token[0], begins_next)
        token = tokens[0]
        if not text[: token.start()].strip() and token[0] != tokenizer.bos_token:
            return EndOfTurn(text[: token.end()], token[0], begins_next)
    return None


def _last_of_run(tokens: list[re.Match]) -> re.Match:
    """The last of the control tokens that follow each other directly."""
    last = tokens[0]
    for token in tokens[1:]:
        if token.start() != last.end():
            break
        last = token
    return last


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    return re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or "(?!)")


def _behind_answer(tokenizer: PreTrainedTokenizerBase, *, followed: bool = False) -> str:
    """Return the text behind an answer: up to the end, or up to what the user says next."""
    roles = ["user", "assistant", "user"] if followed else ["user", "assistant"]
    rendered = _render(tokenizer, _example(*roles))
    end = _field_begin(rendered, 2) if followed else len(rendered)
    begin = _field_end(rendered, 1)
    return rendered[begin:end] if begin >= 0 and end >= 0 else ""


# ---------------------------------------------------------------- generation prompts


class Asking(NamedTuple):
    """Return the text with which a model is asked to answer."""

    template: str
    """The chat template to ask with."""
    note: str | None
    """What was changed for it, or what does not fit."""


def _openings(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str, str]]:
    """(messages, messages and generation prompt, messages and an answer) of conversations that the template takes."""
    openings = []
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
        asked = _example(*roles)
        answered = _example(*roles, "assistant")
        try:
            openings.append(
                (_render(tokenizer, asked), _render(tokenizer, asked, ask=True), _render(tokenizer, answered))
            )
        except jinja2.TemplateError:
            continue
    return openings


def _asks_as_it_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    return all(answered.startswith(asked) for _, asked, answered in _openings(tokenizer))


def _choose_asking(tokenizer: PreTrainedTokenizerBase) -> Asking:
    """Find a generation prompt with which the template's own answers begin."""
    template = _template(tokenizer)
    if _asks_as_it_answers(tokenizer):
        return Asking(template, None)

    trial = copy.deepcopy(tokenizer)
    switches = [name for name in THINKING_SWITCHES if name in template]
    for name, value in ((name, value) for name in switches for value in ("false", "true")):
        trial.chat_template = _with_prelude(f"{{% set {name} = {value} %}}", template)
        if _asks_as_it_answers(trial):
            note = f"its chat template asks for answers in the way that it writes them with {name}={value}: so set"
            return Asking(trial.chat_template, note)

    prompts = set()
    for messages, _, answered in _openings(tokenizer):
        begin = _field_begin(answered, max(int(match[1]) for match in PLACEHOLDER.finditer(answered)))
        prompts.add(answered[len(messages) : begin] if answered.startswith(messages) else None)
    asked = _generation_prompts(tokenizer)

    if len(prompts) == 1 and None not in prompts:
        (prompt,) = prompts
        trial.chat_template = _with_generation_prompt(template, prompt)
        if _asks_as_it_answers(trial) and _openings_without_asking(trial) == _openings_without_asking(tokenizer):
            note = (
                f"its generation prompt is {' or '.join(map(repr, asked))}, but its answers begin behind {prompt!r}: "
                "so asked here, and by the exported template"
            )
            return Asking(trial.chat_template, note)

    note = (
        f"its generation prompt is {' or '.join(map(repr, asked))}, but its chat template does not begin answers so: "
        "learned behind something else than what a model is asked with, so that it may answer worse. Give the "
        "tokenizer a chat template whose answers begin with its generation prompt"
    )
    return Asking(template, note)


def _generation_prompts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The generation prompts of a template, without the messages before them."""
    return sorted({asked.removeprefix(messages) for messages, asked, _ in _openings(tokenizer)})


def _openings_without_asking(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    return [(messages, answered) for messages, _, answered in _openings(tokenizer)]


# ---------------------------------------------------------------- tokenizers for conversations


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that can be talked with: it has a chat template, and its end of text is the end of the assistant's turn.

    So generation stops there, and the ends of turn of two models are each other's counterparts as ends of text are.
    Where the template puts no control token behind the assistant's text, the end of text stays what it is. Where its
    generation prompt does not fit its answers, the template gets one that does, if there is one.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    try:
        asking = _choose_asking(tokenizer)
        end = end_of_turn(tokenizer)
    except jinja2.TemplateError:  # what a template refuses is told of a conversation, by its place in the data
        return tokenizer

    if asking.template != _template(tokenizer):
        tokenizer.chat_template = asking.template
    if end is not None:
        tokenizer.eos_token = end.token
    return tokenizer


def ends_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer's end of text is how the assistant's turns end."""
    end = end_of_turn(tokenizer)
    return end is not None and end.token == tokenizer.eos_token


def tokenizers_for_chat(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> tuple[dict[str, PreTrainedTokenizerBase], list[str]]:
    """`chat_tokenizer` of each, by role; and what their own templates lack, in words."""
    prepared, lacking = {}, []
    for role, tokenizer in tokenizers.items():
        if not tokenizer.chat_template:
            lacking.append(f'{role}: no chat template, so conversations are written with "User:" and "Assistant:"')
        prepared[role] = chat_tokenizer(tokenizer)
        try:
            note = _choose_asking(tokenizer).note if tokenizer.chat_template else None
            ends = ends_turns(prepared[role])
        except jinja2.TemplateError:
            continue
        if note is not None:
            lacking.append(f"{role}: {note}")
        if not ends:
            lacking.append(f"{role}: its chat template marks no end of the assistant's turn: no model learns to stop")
    return prepared, lacking


# ---------------------------------------------------------------- renderings


class Stretch(NamedTuple):
    """A part of a rendering that is learned: what a model writes of one message."""

    message: int
    begin: int
    """In the rendering with marks."""
    end: int
    end_token: str
    """The control token it ends with, or nothing."""


@dataclass(frozen=True)
class Rendering:
    """The first messages of a conversation, with marks, and what is learned of it."""

    shapes: tuple[Shape, ...]
    text: str
    """As the template writes it; where an answer is last, with the end of its turn, too."""
    stretches: tuple[Stretch, ...]

    def places(self) -> list[tuple[int, int]]:
        """Return (message, number) of all that is said, in the order of the text."""
        return [(int(mark[1]), int(mark[2])) for mark in PLACEHOLDER.finditer(self.text)]


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
    written: str


class ChatTemplate:
    """One model's chat template.

    Args:
        name: of the model, for messages.
        tokenizer: with its template; looked at when it is needed.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name, self.tokenizer = name, tokenizer
        self._renderings: dict[tuple, str] = {}
        self._end: list[EndOfTurn | None] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_renderings": {}, "_end": []}

    @property
    def end(self) -> EndOfTurn | None:
        """Return the end of turns, as far as the tokenizer's end of text says so, too."""
        if not self._end:
            try:
                end = end_of_turn(self.tokenizer)
            except jinja2.TemplateError:
                end = None
            self._end.append(end if end is not None and end.token == self.tokenizer.eos_token else None)
        return self._end[0]

    def marked(self, shapes: tuple[Shape, ...], *, ask: bool = False) -> str:
        """Return a rendering with marks in place of what is said."""
        key = (shapes, ask)
        if key not in self._renderings:
            messages = [shape.marked(number) for number, shape in enumerate(shapes)]
            self._renderings[key] = _render(self.tokenizer, messages, ask=ask)
        return self._renderings[key]

    def answer(self, shapes: tuple[Shape, ...]) -> Rendering:
        """Return a conversation up to an answer, of which the answer is learned: what follows the generation prompt.

        Where the answer does not begin with the generation prompt (`chat_tokenizer` has looked for one), the content
        and the end of the turn are learned.
        """
        text, message = self.marked(shapes), len(shapes) - 1
        begin = _field_begin(text, message)
        prompt = self.marked(shapes[:-1], ask=True) if message else ""  # nobody can ask for an answer to nothing
        if message and text.startswith(prompt):
            begin = len(prompt)

        said = _field_end(text, message)
        if self.end is not None and self.end.begins_next and said >= 0 and not text[said:].strip():
            text = text[:said] + self.end.text
        return Rendering(shapes, text, (self._stretch(text, message, begin),))

    def remains(self, answer: Rendering, shapes: tuple[Shape, ...]) -> bool:
        """Return whether an answer is written alike when the conversation has gone on."""
        (stretch,) = answer.stretches
        upto_end = answer.text[: stretch.end]
        return 0 <= stretch.begin <= stretch.end and self._ended(shapes).startswith(upto_end)

    def whole(self, shapes: tuple[Shape, ...], answers: Sequence[Rendering], others: Sequence[int]) -> Rendering:
        """Return a whole conversation.

        Args:
            answers: those that are learned in it; all of them remain.
            others: messages of which the contents are learned.
        """
        text = self._ended(shapes)
        stretches = [self._stretch(text, n, _field_begin(text, n)) for n in others]
        stretches += [stretch for answer in answers for stretch in answer.stretches]
        return Rendering(shapes, text, tuple(sorted(stretches)))

    def _ended(self, shapes: tuple[Shape, ...]) -> str:
        """The whole conversation; an answer that is last has an end of its turn."""
        if shapes and shapes[-1].role == "assistant" and self.end is not None and self.end.begins_next:
            return self.answer(shapes).text
        return self.marked(shapes)

    def writes(self, rendering: Rendering, fields: Sequence[Sequence[str]]) -> bool:
        """Return whether the template writes these fields as they are, where the marks are."""
        return self._filled(rendering, fields) == self._written(rendering, fields)

    def difference(self, rendering: Rendering, fields: Sequence[Sequence[str]]) -> "Difference":
        """Return what the template makes of the first content that it does not write as it is."""
        filled = self._filled(rendering, fields)
        written = self._written(rendering, fields)
        same = _common_length(filled, written)
        same_at_end = _common_length(filled[same:][::-1], written[same:][::-1])
        end = len(written) - same_at_end
        word = 1 + max(filled.rfind(space, 0, same) for space in " \n")  # begin of the one that differs

        marked = self.marked(rendering.shapes)
        marks = list(PLACEHOLDER.finditer(marked))
        ends = [mark.start() for mark in marks[1:]] + [len(marked)]
        longer = 0  # characters that the contents so far have more than their marks
        for mark, next_begin in zip(marks, ends, strict=True):
            content = fields[int(mark[1])][int(mark[2])]
            begin = mark.start() + longer
            if begin > same:
                begin = word
            longer += len(content) - len(mark[0])
            if content in written:
                continue

            # What stands in the content's place reaches to the template's own text behind it, where that is there.
            behind = marked[mark.end() : next_begin]
            place = written.find(behind, begin) if behind else -1
            return Difference(int(mark[1]), content, written[begin : place if place >= 0 else end])
        return Difference(None, filled[word : len(filled) - same_at_end], written[word:end])

    def _filled(self, rendering: Rendering, fields: Sequence[Sequence[str]]) -> str:
        """The rendering with marks, with what is said in their places."""
        marked = self.marked(rendering.shapes)
        return PLACEHOLDER.sub(lambda mark: fields[int(mark[1])][int(mark[2])], marked)

    def _written(self, rendering: Rendering, fields: Sequence[Sequence[str]]) -> str:
        """What the template makes of the messages."""
        messages = [shape.message(of) for shape, of in zip(rendering.shapes, fields, strict=False)]
        return _render(self.tokenizer, messages)

    def _stretch(self, text: str, message: int, begin: int) -> Stretch:
        """Return the learned part of a message from `begin` on, with the end of the turn where it has one."""
        said = _field_end(text, message)
        if self.end is not None and said >= 0 and text.startswith(self.end.text, said):
            return Stretch(message, begin, said + len(self.end.text), self.end.token)
        return Stretch(message, begin, said, "")


def segments(rendering: Rendering, fields: Sequence[Sequence[str]]) -> list[Segment]:
    """Cut a rendering at the edges of what is said and of what is learned, and fill the fields in."""
    edges = {0, len(rendering.text)}
    marks = {match.start(): match for match in PLACEHOLDER.finditer(rendering.text)}
    for match in marks.values():
        edges |= {match.start(), match.end()}
    for stretch in rendering.stretches:
        edges |= {stretch.begin, stretch.end, stretch.end - len(stretch.end_token)}

    pieces = []
    ordered = sorted(edges)
    for begin, end in pairwise(ordered):
        stretch = next((n for n, s in enumerate(rendering.stretches) if s.begin <= begin and end <= s.end), None)
        if begin in marks:
            field = (int(marks[begin][1]), int(marks[begin][2]))
            pieces.append(Segment(fields[field[0]][field[1]], field, stretch))
        else:
            pieces.append(Segment(rendering.text[begin:end], None, stretch))
    return pieces
