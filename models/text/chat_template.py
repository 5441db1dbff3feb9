"""Chat templates as text: the generation prompt that asks a model, and all that the model has to write behind it.

A conversation is rendered with a mark in place of everything that its messages say. The marks show where contents lie
in a model's text, and a comparison with the rendering that ends in the generation prompt shows what the model itself
writes: markup such as an empty block of thinking, the contents, and the end of its turn.

In this file: the date and other values in templates (`on_date`, `with_variables`), the end of turns (`end_of_turn`),
generation prompts that fit a template's answers, tokenizers prepared for conversations (`chat_tokenizer`), and
renderings with all that is learned of them (`ChatTemplate`, `segments`).
"""

import copy
import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from .messages import MARK, PLACEHOLDER, Message, Outline, Shape

PLAIN_TEMPLATE = (
    "{% if tools %}Tools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{{ '\n' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\n' if message['content'] or not loop.first else '' }}"
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}{{ eos_token if message['role'] == 'assistant' else '' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""For a tokenizer without a chat template: role names in plain words, end of text after the assistant's.

Tools are written as most templates write them."""

CLOCK = "strftime_now"
"""The function by which a chat template reads the clock."""

DIRECTIVES = [*"aAbBcdDeFgGhHIjmMpPrRSTuUVwWxXyYzZ", "-d", "-m", "-y", "-H", "-I", "-M", "-S", "-j", "%"]
"""Directives that may follow a % in a format of `strftime`; not every platform knows all of them."""

THINKING_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates turn the thinking before an answer on or off."""

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


# ---------------------------------------------------------------- marks


class _Placeholder(NamedTuple):
    """A mark in a rendering, in place of a field."""

    message: int
    number: int
    """Of the field in the message."""
    begin: int
    """Its first character in the rendering."""
    end: int


@functools.lru_cache(maxsize=1000)
def _placeholders(rendered: str) -> list[_Placeholder]:
    """Return the marks of a rendering in the order of its text; most conversations have the same renderings."""
    placeholders = []
    for match in PLACEHOLDER.finditer(rendered):
        placeholder = _Placeholder(
            message=int(match[1]),
            number=int(match[2]),
            begin=match.start(),
            end=match.end(),
        )
        placeholders.append(placeholder)
    return placeholders


# ---------------------------------------------------------------- the clock


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether conversations look different from day to day."""
    return CLOCK in str(tokenizer.chat_template)


def on_date(tokenizer: PreTrainedTokenizerBase, today: date) -> PreTrainedTokenizerBase:
    """Return a tokenizer for which it is always this day: itself, where its chat template reads no clock."""
    if not reads_clock(tokenizer):
        return tokenizer
    # a copy, because the student is handed on with its clock
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = _with_prelude(_clock_of(today), _template(tokenizer))
    return dated


def _clock_of(today: date) -> str:
    """Return a macro that stands in for the clock; a template can be given values, but no functions."""
    filters = ""
    for name in DIRECTIVES:
        directive = f"%{name}"
        with suppress(ValueError):  # a directive that this platform does not know
            filters += f" | replace({directive!r}, {today.strftime(directive)!r})"
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}"


# ---------------------------------------------------------------- variables


def with_variables(
    role: str,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any],
) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose chat template has values for its variables; itself, where there are none.

    Raises:
        ValueError: the template has no such variable.
    """
    if not variables:
        return tokenizer

    template = _template(tokenizer) if tokenizer.chat_template else ""
    prelude = ""
    for name, value in variables.items():
        # A value that nothing reads would be a mistake that nobody sees.
        if not reads(template, name):
            raise ValueError(
                f"{role}.chat_template_kwargs: got {name!r}, which the {role}'s chat template does not read. Expected "
                "a variable of that template, such as enable_thinking; take it out"
            )
        prelude += f"{{% set {name} = {_literal(value)} %}}"

    # A template that was written by this function has them already.
    if template.startswith(prelude):
        return tokenizer
    result = copy.deepcopy(tokenizer)
    result.chat_template = _with_prelude(prelude, template)
    return result


def reads(template: str, name: str) -> bool:
    """Return whether a template has a variable of this name."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _literal(value: Any) -> str:
    """Return a value of JSON as a template's language writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value)


# ---------------------------------------------------------------- templates


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template that conversations without tools are written in."""
    return tokenizer.get_chat_template()


def _with_prelude(prelude: str, template: str) -> str:
    return f"{prelude}\n{template}"  # the line break goes away with the statement before it


def _with_generation_prompt(template: str, prompt: str) -> str:
    """Return the template with another generation prompt behind its messages."""
    # The messages are rendered into a variable without a prompt of the template's own.
    return (
        "{% set asked_to_answer = add_generation_prompt %}{% set add_generation_prompt = false %}{% set said %}\n"
        + template.removesuffix("\n")
        + "{{ '' }}{% endset %}{{ said }}{% if asked_to_answer %}{{ "
        + repr(prompt)
        + " }}{% endif %}"
    )


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    ask: bool = False,
    tools: str = "",
    variables: str = "",
) -> str:
    """Return a conversation as the template writes it; `ask`: with the generation prompt behind it.

    Raises:
        TemplateError: the template refuses it, or expects other values.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=json.loads(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=ask,
            **json.loads(variables or "{}"),
        )
    except (TypeError, KeyError, AttributeError) as error:
        # such as a text where the template expects an object
        raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from error


def _example(roles: Sequence[str]) -> list[dict[str, str]]:
    """Return a conversation of marks."""
    messages = []
    for number, role in enumerate(roles):
        shape = Shape(role, ("", ""))
        messages.append(shape.message(shape.marks(number)))
    return messages


def _field_end(rendered: str, message: int) -> int:
    """Return the end of a message's last field in a rendering with marks, -1 if there is none."""
    ends = [mark.end for mark in _placeholders(rendered) if mark.message == message]
    return max(ends, default=-1)


def _field_begin(rendered: str, message: int) -> int:
    """Return the begin of a message's first field in a rendering with marks, -1 if there is none."""
    begins = [mark.begin for mark in _placeholders(rendered) if mark.message == message]
    return min(begins, default=-1)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return special tokens, and added ones that the chat template writes; the longest first."""
    template = str(tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    tokens = {token.content for token in added if token.special or token.content in template}

    # in a pattern of alternatives the first that matches wins, so a token goes before its own beginnings
    return sorted(tokens, key=lambda token: (-len(token), token))


# ---------------------------------------------------------------- ends of turns


class EndOfTurn(NamedTuple):
    """Text behind the assistant's content."""

    text: str
    """Up to the end of `token`; white space or other markup may come before it."""
    token: str
    """The control token at which a model stops."""
    begins_next: bool
    """The token belongs to the next message: behind the last answer the template does not write it."""


def _common_length(one: str, other: str) -> int:
    """Count the characters with which both texts begin."""
    for index, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return index
    return min(len(one), len(other))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> EndOfTurn | None:
    """Return the end of the assistant's turns; None where the template puts no control token behind them."""
    last = _behind_answer(tokenizer)
    try:
        followed = _behind_answer(tokenizer, followed=True)
    except jinja2.TemplateError:
        followed = last
    pattern = _control_pattern(tokenizer)

    # Some templates write more behind the very last message, and some end it in another way.
    common = _common_length(last, followed)
    for text in (last[:common], last):
        tokens = list(pattern.finditer(text))
        if tokens:
            token = _last_of_run(tokens)
            return EndOfTurn(
                text=text[: token.end()],
                token=token[0],
                begins_next=False,
            )

    # Others write nothing behind an answer: the model stops at the token that begins the next message.
    token = pattern.search(followed)
    if token is None or followed[: token.start()].strip() or token[0] == tokenizer.bos_token:
        return None
    return EndOfTurn(
        text=followed[: token.end()],
        token=token[0],
        begins_next=True,
    )


def _last_of_run(tokens: list[re.Match]) -> re.Match:
    """Return the last of the control tokens that follow each other directly."""
    # with white space in between, a token belongs to what comes after the turn
    last = tokens[0]
    for token in tokens[1:]:
        if token.start() != last.end():
            break
        last = token
    return last


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """Return a pattern of all control tokens; of nothing where there are none."""
    return re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or "(?!)")


def _behind_answer(tokenizer: PreTrainedTokenizerBase, *, followed: bool = False) -> str:
    """Return the text behind an answer: up to the end, or up to what the user says next."""
    roles = ["user", "assistant", "user"] if followed else ["user", "assistant"]
    rendered = _render(tokenizer, _example(roles))

    begin = _field_end(rendered, 1)
    end = _field_begin(rendered, 2) if followed else len(rendered)
    if begin < 0 or end < 0:
        return ""  # the template leaves one of the messages out
    return rendered[begin:end]


# ---------------------------------------------------------------- generation prompts


class Asking(NamedTuple):
    """Template with which a model is asked to answer."""

    template: str
    """The chat template to ask with."""
    note: str | None
    """Changes that were made for it, or a warning that it does not fit."""


class _Opening(NamedTuple):
    """A short conversation in three renderings."""

    messages: str
    """The messages alone."""
    prompted: str
    """The messages and the generation prompt."""
    answered: str
    """The messages and an answer."""


def _openings(tokenizer: PreTrainedTokenizerBase) -> list[_Opening]:
    """Return the openings that the template takes."""
    openings = []
    for roles in (["user"], ["system", "user"], ["user", "assistant", "user"]):
        question = _example(roles)
        answer = _example([*roles, "assistant"])
        try:
            opening = _Opening(
                messages=_render(tokenizer, question),
                prompted=_render(tokenizer, question, ask=True),
                answered=_render(tokenizer, answer),
            )
        except jinja2.TemplateError:
            continue
        openings.append(opening)
    return openings


def _asks_as_it_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template's answers begin with its generation prompt."""
    return all(opening.answered.startswith(opening.prompted) for opening in _openings(tokenizer))


def _choose_asking(tokenizer: PreTrainedTokenizerBase) -> Asking:
    """Find a generation prompt with which the template's own answers begin."""
    template = _template(tokenizer)
    if _asks_as_it_answers(tokenizer):
        return Asking(template, None)

    # The usual cause: the template asks for thinking, but writes answers without.
    asking = _with_thinking_switched(tokenizer)
    if asking is not None:
        return asking

    # Else ask with the text that answers do begin with, if there is one for all openings.
    openings = _openings(tokenizer)
    prompts = sorted({opening.prompted.removeprefix(opening.messages) for opening in openings})
    shown = " or ".join(map(repr, prompts))
    beginning = _answers_beginning(openings)
    if beginning is not None:
        trial = copy.deepcopy(tokenizer)
        trial.chat_template = _with_generation_prompt(template, beginning)
        if _asks_as_it_answers(trial) and _write_alike(_openings(trial), openings):
            note = (
                f"its generation prompt is {shown}, but its answers begin behind {beginning!r}: "
                "so asked here, and by the exported template"
            )
            return Asking(trial.chat_template, note)

    note = (
        f"its generation prompt is {shown}, but its chat template does not begin answers so: "
        "learned behind something else than what a model is asked with, so that it may answer worse. Give the "
        "tokenizer a chat template whose answers begin with its generation prompt"
    )
    return Asking(template, note)


def _with_thinking_switched(tokenizer: PreTrainedTokenizerBase) -> Asking | None:
    """Try the template with its thinking turned off or on for good; return the first that fits its answers."""
    template = _template(tokenizer)
    trial = copy.deepcopy(tokenizer)
    for name in THINKING_SWITCHES:
        if name not in template:
            continue
        for value in ("false", "true"):
            trial.chat_template = _with_prelude(f"{{% set {name} = {value} %}}", template)
            if _asks_as_it_answers(trial):
                note = f"its chat template asks for answers in the way that it writes them with {name}={value}: so set"
                return Asking(trial.chat_template, note)
    return None


def _answers_beginning(openings: Sequence[_Opening]) -> str | None:
    """Return the template's text before the content of every answer; None where it differs, or cannot be told."""
    beginnings: set[str | None] = set()
    for opening in openings:
        answer = max(mark.message for mark in _placeholders(opening.answered))
        content = _field_begin(opening.answered, answer)
        if opening.answered.startswith(opening.messages):
            beginnings.add(opening.answered[len(opening.messages) : content])
        else:
            beginnings.add(None)

    return beginnings.pop() if len(beginnings) == 1 else None


def _write_alike(openings: Sequence[_Opening], others: Sequence[_Opening]) -> bool:
    """Return whether the openings are the same but for their generation prompts."""
    without_prompts = [opening._replace(prompted="") for opening in openings]
    return without_prompts == [other._replace(prompted="") for other in others]


# ---------------------------------------------------------------- tokenizers for conversations


def chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy for conversations: with a chat template, and the end of the assistant's turn as end of text.

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

    # A template is only written anew where it changes: a tokenizer may have several by name.
    if asking.template != _template(tokenizer):
        tokenizer.chat_template = asking.template
    if end is not None:
        tokenizer.eos_token = end.token
    return tokenizer


def ends_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the assistant's turns end with the tokenizer's end of text."""
    end = end_of_turn(tokenizer)
    return end is not None and end.token == tokenizer.eos_token


def tokenizers_for_chat(
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    variables: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[dict[str, PreTrainedTokenizerBase], list[str]]:
    """Prepare tokenizers for conversations.

    Args:
        tokenizers: by role (student, teacher), as they were loaded.
        variables: by role, values for the variables of its chat template.

    Returns:
        `chat_tokenizer` of each, by role; and warnings about their own templates.

    Raises:
        ValueError: a template has no such variable.
    """
    prepared = {}
    warnings = []
    for role, loaded in tokenizers.items():
        tokenizer = with_variables(role, loaded, (variables or {}).get(role, {}))
        if not tokenizer.chat_template:
            warnings.append(f'{role}: no chat template, so conversations are written with "User:" and "Assistant:"')
        prepared[role] = chat_tokenizer(tokenizer)

        try:
            note = _choose_asking(tokenizer).note if tokenizer.chat_template else None
            marks_end = ends_turns(prepared[role])
        except jinja2.TemplateError:  # told of a conversation later, as in `chat_tokenizer`
            continue
        if note is not None:
            warnings.append(f"{role}: {note}")
        if not marks_end:
            warnings.append(f"{role}: its chat template marks no end of the assistant's turn: no model learns to stop")
    return prepared, warnings


# ---------------------------------------------------------------- renderings


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
        return [(mark.message, mark.number) for mark in _placeholders(self.text)]

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
        begin = max((mark.end for mark in _placeholders(self.text) if mark.message < message), default=0)
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
            messages = [*_example(["user"]), answer.shape.message([mark], arguments_as_text=as_text)]
            try:
                written = _render(self.tokenizer, messages, tools=json.dumps([EXAMPLE_TOOL]))
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
        return reads(_template(self.tokenizer), name)

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
        return _render(
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
        begin = _field_begin(text, message)
        if message > 0:  # nobody can ask for an answer to nothing
            prompt = self.marked(outline.first(message), ask=True)
            if not text.startswith(prompt):
                text = self._as_asked(text, prompt, outline)
            if text.startswith(prompt):
                begin = len(prompt)
        if not self.learn_reasoning:
            begin = max(begin, _behind_reasoning(text, message, outline.shapes[message]))

        # Behind the last answer a template does not write an end that belongs to the next message.
        content_end = _field_end(text, message)
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
        marks = _placeholders(text)
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
            stretches.append(self._stretch(text, message, _field_begin(text, message)))
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
        for mark in _placeholders(marked):
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
        same = _common_length(filled, written)
        same_at_end = _common_length(filled[same:][::-1], written[same:][::-1])
        end = len(written) - same_at_end
        word = 1 + max(filled.rfind(space, 0, same) for space in " \n")

        marked = self.marked(rendering.outline)
        marks = _placeholders(marked)
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
        content_end = _field_end(text, message)
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
        behind_fields = max(begin, _field_end(text, message))
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
    ends = [mark.end for mark in _placeholders(text) if (mark.message, mark.number) == (message, number)]
    if not ends:
        return -1
    closing = re.compile(r"\s*</think>\s*").match(text, ends[0])
    if closing is not None:
        return closing.end()

    # Other templates write other markup there; the content begins behind it.
    later = [mark.begin for mark in _placeholders(text) if mark.message == message and mark.begin >= ends[0]]
    return min(later, default=ends[0])


def segments(rendering: Rendering, fields: Sequence[Sequence[str]]) -> list[Segment]:
    """Cut a rendering at the edges of contents and of learned stretches, and fill the fields in.

    Args:
        rendering: with marks.
        fields: by message; they take the places of the marks.
    """
    edges = {0, len(rendering.text)}
    marks = {mark.begin: mark for mark in _placeholders(rendering.text)}
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
