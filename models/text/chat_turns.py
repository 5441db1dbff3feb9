"""Turns as a chat template writes them: the generation prompt that asks for one, the end that a model must write.

A template is looked at as text, with a mark in place of everything that messages say: the marks show where contents
lie, and what stands behind the last one ends a turn.

In this file: the date and other values in templates (`on_date`, `with_variables`), the end of turns (`end_of_turn`),
generation prompts that fit a template's answers, tokenizers prepared for conversations (`chat_tokenizer`).
"""

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from typing import Any, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from .messages import PLACEHOLDER, Shape

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


# ---------------------------------------------------------------- marks


class Placeholder(NamedTuple):
    """A mark in a rendering, in place of a field."""

    message: int
    number: int
    """Of the field in the message."""
    begin: int
    """Its first character in the rendering."""
    end: int


@functools.lru_cache(maxsize=1000)
def placeholders(rendered: str) -> list[Placeholder]:
    """Return the marks of a rendering in the order of its text; most conversations have the same renderings."""
    placeholders = []
    for match in PLACEHOLDER.finditer(rendered):
        placeholder = Placeholder(
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
    dated.chat_template = _with_prelude(_clock_of(today), template_of(tokenizer))
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

    template = template_of(tokenizer) if tokenizer.chat_template else ""
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


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
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


def render(
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


def example(roles: Sequence[str]) -> list[dict[str, str]]:
    """Return a conversation of marks."""
    messages = []
    for number, role in enumerate(roles):
        shape = Shape(role, ("", ""))
        messages.append(shape.message(shape.marks(number)))
    return messages


def field_end(rendered: str, message: int) -> int:
    """Return the end of a message's last field in a rendering with marks, -1 if there is none."""
    ends = [mark.end for mark in placeholders(rendered) if mark.message == message]
    return max(ends, default=-1)


def field_begin(rendered: str, message: int) -> int:
    """Return the begin of a message's first field in a rendering with marks, -1 if there is none."""
    begins = [mark.begin for mark in placeholders(rendered) if mark.message == message]
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


def common_length(one: str, other: str) -> int:
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
    common = common_length(last, followed)
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
    rendered = render(tokenizer, example(roles))

    begin = field_end(rendered, 1)
    end = field_begin(rendered, 2) if followed else len(rendered)
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
        question = example(roles)
        answer = example([*roles, "assistant"])
        try:
            opening = _Opening(
                messages=render(tokenizer, question),
                prompted=render(tokenizer, question, ask=True),
                answered=render(tokenizer, answer),
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
    template = template_of(tokenizer)
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
    template = template_of(tokenizer)
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
        answer = max(mark.message for mark in placeholders(opening.answered))
        content = field_begin(opening.answered, answer)
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
    if asking.template != template_of(tokenizer):
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
