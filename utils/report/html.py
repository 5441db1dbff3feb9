"""The report as one HTML page that needs nothing but a browser: no script, no font, no picture from elsewhere.

The page is `report.html.jinja`. Text of models and users is escaped there, so that it can never become markup; the
page's own content security policy forbids scripts besides.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..config.plain import flatten
from .charts import THEME
from .results import (
    MODELS,
    bits_of,
    chosen_note,
    figure,
    headline,
    is_random_start,
    model_name,
    own_text_note,
    own_text_samples,
    percent,
    retention_lines,
    run_lines,
    samples_title,
    task_rows,
    teacher_of,
)
from .usage_example import how_to_use, repeat_command
from .written_text import WRITTEN_TEXT_HEADS, written_text_note, written_text_rows

TEMPLATE = "report.html.jinja"
"""Page, beside this module."""

MOST_WARNINGS = 30
"""Warnings shown; the others are in the log."""

MOST_INDENTED = 12
"""Spaces at the beginning of a line of a sample, at most."""

_DELETE = 127
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_CONTROL_PICTURES[_DELETE] = "\u2421"
"""Control characters, which HTML cannot hold -> the pictures that Unicode has of them."""

_NOT_IN_HTML = re.compile("[\ud800-\udfff\x80-\x9f]")
"""Halves of surrogate pairs, which UTF-8 cannot encode, and the second block of control characters."""


class Row(NamedTuple):
    """A row of a table."""

    cells: Sequence[str]
    is_best: bool = False
    """Emphasised."""
    bar: float | None = None
    """Width of the bar in its first cell, in percent; None: it has none."""


class TableOfRows(NamedTuple):
    """A table of the page."""

    heads: Sequence[str]
    rows: Sequence[Row]


def page(
    name: str,
    results: Mapping[str, Any],
    pictures: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """Return the page.

    Args:
        name: of the run.
        results: see `utils.report.results`, without NaN.
        pictures: SVG elements whose colours are the variables of `charts.THEME`; the one markup taken as it is.
        settings: of the run, nested.
        notes: the run's notes on its decisions and its environment, nested.
        warnings: of the run, in order.
    """
    settings = settings or {}
    template = _environment().get_template(TEMPLATE)

    return template.render(
        name=name,
        theme=THEME,
        facts=_facts(results, settings),
        headline=headline(results),
        figures=_figures(results),
        warnings=warnings[:MOST_WARNINGS],
        more_warnings=len(warnings) - MOST_WARNINGS,
        models=_model_table(results),
        retention=retention_lines(results),
        written_text=TableOfRows(WRITTEN_TEXT_HEADS, [Row(cells) for cells in written_text_rows(results)]),
        written_text_note=written_text_note(results),
        tasks=_task_table(results),
        pictures=pictures,
        pictures_note=_pictures_note(settings),
        alignment=results.get("alignment"),
        differences=results.get("differences"),
        chosen=results.get("chosen_positions"),
        chosen_note=chosen_note(results),
        student_name=model_name("student", results),
        samples=_samples(results, results.get("samples") or []),
        own_text=_samples(results, own_text_samples(results)),
        own_text_note=own_text_note(results),
        samples_title=samples_title(results),
        # A plain text has a beginning, a conversation or an example has a prompt.
        prompt_title="Prompt" if results.get("prompted") else "Beginning",
        usage=how_to_use('"student"  # beside this file', settings, results),
        command=repeat_command(settings),
        settings=_groups(settings),
        notes=_groups(notes or {}),
    )


def _pictures_note(settings: Mapping[str, Any]) -> str:
    """Return what the pictures of training do not say themselves; empty where there is nothing to say."""
    curriculum = settings.get("curriculum") or {}
    notes = []
    balance = curriculum.get("balance", "none")
    if balance != "none":
        notes.append(
            f"The weights are those in effect: curriculum.balance {balance} has divided them by the size that each "
            "term had in the step before."
        )
    if curriculum.get("sample_weights", 0) != 0:
        notes.append(
            "The sample spread is the standard deviation of the weights of windows in KD (curriculum.sample_weights)."
        )
    return " ".join(notes)


# -------------------------------------------------------------------------------------- template


@cache
def _environment() -> Environment:
    """Return jinja2 set up for the page: everything that is inserted is escaped, and has to be there."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_in_html,
    )
    environment.filters.update(
        collapsed=collapsed,
        collapsed_line=lambda text: " ".join(text.split()) + " " * text.endswith((" ", "\n")),
        visible=_visible,
        percent=percent,
    )
    return environment


def _in_html(value: Any) -> Any:
    """Return any value as text without the characters that HTML cannot hold; what is markup already stays."""
    if hasattr(value, "__html__"):
        return value
    text = str(value).replace("\r\n", "\n").translate(_CONTROL_PICTURES)
    return _NOT_IN_HTML.sub("\ufffd", text)


def collapsed(text: Any) -> str:
    """Return text of a model with runs of spaces as one space and empty lines as one; indentation stays, in bounds.

    Untrained models write hundreds of line breaks.
    """
    lines = []
    for line in str(text).replace("\r\n", "\n").strip().split("\n"):
        words = line.lstrip(" \t")
        indentation = " " * min(len(line) - len(words), MOST_INDENTED)
        lines.append((indentation + re.sub(r"[ \t]+", " ", words)).rstrip(" \t"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _visible(token: str) -> str:
    """Return a token with its spaces and line breaks as signs that are seen."""
    return token.replace(" ", "·").replace("\r\n", "⏎").replace("\n", "⏎").replace("\t", "⇥")


# ----------------------------------------------------------------------------------------- header


def _facts(results: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the line below the title: the models and the run."""
    # Without a teacher the student's name is alone, without an arrow. The whole path of a folder is in the settings.
    names = [teacher_of(settings), (settings.get("student") or {}).get("name")]
    models = " → ".join(Path(name).name if Path(name).is_absolute() else str(name) for name in names if name)
    facts = [models, *(f"{key} {value}" for key, value in run_lines(results))]
    return [fact for fact in facts if fact]


def _figures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, figure) of what is worth a large number."""
    bits = bits_of(results)
    student = bits.get("student")
    figures = [(f"bits per byte, {model_name('student', results).lower()}", figure(student))]

    # A figure that was not finite is null, and then nothing is compared with it.
    start = "with random weights" if is_random_start(results) else "before training"
    others = {"initial_student": start, "baseline": "the same student without the teacher"}
    for key, description in others.items():
        if key in bits and student is not None:
            saved = 1 - student / bits[key]
            word = "fewer" if saved >= 0 else "more"
            figures.append((f"{word} bits per byte than {description}", percent(abs(saved))))

    # A share below 0 is no share of a gap that was closed: the figure before says that the student got worse.
    closed = (results.get("retention") or {}).get("gap_closed")
    if closed is not None and closed >= 0:
        nearest = "best teacher" if "teachers" in (results.get("teacher") or {}) else "teacher"
        figures.append((f"of the gap to the {nearest} closed", percent(closed)))
    return figures


# ----------------------------------------------------------------------------------------- tables


def _model_table(results: Mapping[str, Any]) -> TableOfRows:
    """Return a table with a row for each model, and bars of their bits per byte."""
    digits = {"bits_per_byte": 4, "perplexity": 2, "tokens": 0, "bytes": 0, "parameters": 0}
    models = {key: results[key] for key in MODELS if results.get(key)}
    most = max((model.get("bits_per_byte") or 0 for model in models.values()), default=0)

    rows = []
    for key, model in models.items():
        # The bar of the model with the most bits per byte is as wide as its cell.
        bits = model.get("bits_per_byte") or 0
        width = round(100 * bits / most, 1) if most else 0.0
        figures = [figure(model.get(column), places) for column, places in digits.items()]
        cells = [model_name(key, results), *figures, model.get("dtype") or "-"]
        rows.append(Row(cells, is_best=key == "student", bar=width))

    columns = [column.replace("_", " ") for column in digits]
    return TableOfRows(["model", *columns, "dtype"], rows)


def _task_table(results: Mapping[str, Any]) -> TableOfRows:
    """Return a table of lm_eval's tasks."""
    heads, rows = task_rows(results)
    return TableOfRows(heads, [Row(cells) for cells in rows])


def _samples(results: Mapping[str, Any], written: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return samples, each with its prompt and with (name, text) of every model that wrote one."""
    samples = []
    for sample in written:
        texts = [(model_name(key, results), sample[key]) for key in MODELS if sample.get(key) is not None]
        samples.append({"prompt": sample.get("prompt", ""), "texts": texts})
    return samples


def _groups(values: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """Return (name, value) of nested values by section, under "" those that are in no section."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for path, value in flatten(values).items():
        # A value that is in no section comes under no heading.
        section, dot, name = path.partition(".")
        if not dot:
            section, name = "", path
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        groups.setdefault(section, []).append((name or section, text))
    return groups
