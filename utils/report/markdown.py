"""The evaluation report as Markdown."""

from collections.abc import Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

from ..run_layout import CURVES, ROUTING
from .results import (
    MODELS,
    chosen_note,
    figure,
    headline,
    model_name,
    own_text_note,
    own_text_samples,
    retention_lines,
    run_lines,
    samples_title,
    task_table,
)
from .written_text import written_text_table

_MARKUP = "\\`*_{}[]#|~$"
"""Characters that Markdown, or the mathematics in it, gives a meaning. The backslash first: it escapes the others."""


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report for people.

    Args:
        results: see `utils.report.results`.
    """
    # Parts that do not apply to this run are empty, and left out at the end.
    parts = [
        "# Evaluation report",
        headline(results),
        _model_table(results),
        _retention_list(results),
        _tasks(results),
        written_text_table(results),
        f"![Training curves]({CURVES})",
        _routing(results.get("routing")),
        _chosen(results),
        _run_list(results),
    ]
    if samples := results.get("samples"):
        parts.append(f"## Samples\n\n{samples_title(results)}.")
        parts += [_sample(number, sample, results) for number, sample in enumerate(samples, 1)]

    if texts := own_text_samples(results):
        parts.append(f"## The student's own text\n\n{own_text_note(results)}")
        parts += [_sample(number, text, results) for number, text in enumerate(texts, 1)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _model_table(results: Mapping[str, Any]) -> str:
    """Return a table with a row for each model."""
    lines = [
        "| | bits per byte | perplexity | tokens | bytes | parameters | dtype |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    # Not every run has a teacher, or a comparison without it.
    for key in MODELS:
        if model := results.get(key):
            cells = [
                model_name(key, results),
                figure(model.get("bits_per_byte")),
                figure(model.get("perplexity"), 2),
                figure(model.get("tokens")),
                figure(model.get("bytes")),
                figure(model.get("parameters")),
                model.get("dtype") or "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")

    note = "All rows score the same text. Perplexities compare only between models with the same tokenizer."
    return "\n".join(lines) + "\n\n" + note


def _retention_list(results: Mapping[str, Any]) -> str:
    """Return the section of how close the student came to the teacher; nothing without a teacher."""
    lines = [f"- {name}: {value}" for name, value in retention_lines(results)]
    return "## Retention\n\n" + "\n".join(lines) if lines else ""


def _tasks(results: Mapping[str, Any]) -> str:
    """Return the section of lm_eval's tasks; nothing where none was measured."""
    table = task_table(results)
    return f"## Tasks\n\nMeasured by lm_eval.\n\n{table}" if table else ""


def _routing(routing: Mapping[str, Any] | None) -> str:
    """Return the section with the picture of the routing; nothing without one."""
    if not routing:
        return ""
    return (
        f"## Routing\n\n![Routing]({ROUTING})\n\n"
        f"Each row tells which teacher layers a student layer is compared with by the term `layer`, at step "
        f"{routing['step']:,}: shares of the mixture, which add up to 1."
    )


def _chosen(results: Mapping[str, Any]) -> str:
    """Return the section of the positions that KD is learned at; nothing where it is learned at all, or at none."""
    view = results.get("chosen_positions")
    if not view:
        return ""

    # As an element, since asterisks mark nothing beside a space, nor a comma behind a word.
    parts = []
    for is_chosen, run in groupby(view["tokens"], key=itemgetter(1)):
        text = _literal("".join(text for text, _ in run))
        parts.append(f"<b>{text}</b>" if is_chosen else text)
    text = " ".join("".join(parts).split())
    return f"## Where the teacher is listened to\n\n{_escape(chosen_note(results))}\n\n| text |\n|---|\n| {text} |"


def _run_list(results: Mapping[str, Any]) -> str:
    """Return the section of the run itself."""
    lines = [f"- {_escape(key)}: {_escape(value)}" for key, value in run_lines(results)]
    return "## Run\n\n" + "\n".join(lines) if lines else ""


def _sample(number: int, sample: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return a prompt, and a table of what every model wrote."""
    keys = [key for key in MODELS if sample.get(key) is not None]
    names = " | ".join(model_name(key, results) for key in keys)
    texts = " | ".join(_escape(sample[key]) for key in keys)
    return "\n".join(
        [
            f"### {number}. {_escape(sample.get('prompt', ''))}",
            "",
            f"| {names} |",
            "|" + "---|" * len(keys),
            f"| {texts} |",
        ]
    )


def _escape(text: str) -> str:
    """Return text of a model or a user so that it is shown as it is inside a Markdown table or heading."""
    return " ".join(_literal(text).split())


def _literal(text: str) -> str:
    """Return text without anything that Markdown gives a meaning, on one line, its spaces as they are."""
    for character in _MARKUP:
        text = text.replace(character, "\\" + character)

    # A table's cell is one line, and Markdown takes HTML as it is.
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return text.replace("\r", "").replace("\n", "<br>")
