"""The report as one HTML page that needs nothing but a browser: no script, no font, no picture from elsewhere.

Text of models and users goes through `_text`, so that it can never become markup; the page's own content security
policy forbids scripts besides.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from string import Template
from typing import Any

from ..config.plain import flatten
from .charts import THEME
from .results import MODELS, figure, headline, model_name, percent, retention_lines, run_lines, samples_title, task_rows
from .usage_example import how_to_use

MOST_WARNINGS = 30
"""Warnings shown; the others are in the log."""

_DELETE = 127
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_CONTROL_PICTURES[_DELETE] = "\u2421"
"""Control characters, which HTML cannot hold -> the pictures that Unicode has of them."""

_NOT_IN_HTML = re.compile("[\ud800-\udfff\x80-\x9f]")
"""Halves of surrogate pairs, which UTF-8 cannot encode, and the second block of control characters."""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --page: #f5f6f8; --card: #ffffff; --ink: #1d2127; --soft: #5c6570; --line: #e1e4e9; --accent: #b84e00;
  --bar: #f3c9a8; --warn: #fff4d6; --warn-line: #e2b93b; $light }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --card: #1b1e24; --ink: #e6e8eb; --soft: #9aa3ad;
  --line: #31363e; --accent: #ff9a57; --bar: #7a4321; --warn: #342b12; --warn-line: #a5842a; $dark } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 44px 0 14px; font-size: 1.3rem; }
h3 { margin: 0 0 8px; font-size: 1rem; }
p { margin: 8px 0; }
.kicker, .note, dt { color: var(--soft); }
.kicker, .note { font-size: .9rem; }
.lead { font-size: 1.15rem; max-width: 62em; margin: 8px 0 20px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, var(--least)), 1fr)); }
.figure b { display: block; font-size: 1.75rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; font-size: .9rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9.5em; padding-left: 0; }
tr:last-child td { border-bottom: 0; }
tr.best { font-weight: 650; }
.bar { height: 5px; margin-top: 4px; border-radius: 3px; background: var(--bar); }
.best .bar { background: var(--accent); }
dl { display: grid; grid-template-columns: fit-content(60%) minmax(0, 1fr); gap: 4px 18px; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; }
ul { margin: 0; padding-left: 1.2em; }
li { overflow-wrap: anywhere; margin: 4px 0; }
.warn { background: var(--warn); border-color: var(--warn-line); }
svg { display: block; width: 100%; height: auto; }
pre { margin: 0; font: .86rem/1.5 ui-monospace, "SFMono-Regular", Consolas, "DejaVu Sans Mono", monospace; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
pre.code { overflow-x: auto; }
.sample { margin-bottom: 16px; }
.sample .prompt h3 { color: var(--soft); }
.sample .prompt { padding-bottom: 14px; margin-bottom: 14px; border-bottom: 1px solid var(--line); }
.columns { columns: 330px; column-gap: 16px; }
.settings { font-size: .9rem; margin-bottom: 16px; break-inside: avoid; }
summary { cursor: pointer; font-size: 1.3rem; font-weight: 700; margin: 44px 0 14px; }
@media (max-width: 600px) { main { padding: 24px 14px 48px; } .card { padding: 14px; } h1 { font-size: 1.5rem; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<header>
<p class="kicker">Curriculum Distillation</p>
<h1>$title</h1>
$header
</header>
$sections
</main>
</body>
</html>
""")


def page(
    name: str,
    results: Mapping[str, Any],
    pictures: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    told: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """Return the page.

    Args:
        name: of the run.
        results: see `utils.report.results`, without NaN.
        pictures: SVG elements whose colours are the variables of `charts.THEME`; the one markup taken as it is.
        settings: of the run, nested.
        told: the run's notes on its decisions and its environment, nested.
        warnings: of the run, in order.
    """
    settings = settings or {}
    sections = [
        _warnings(warnings),
        "<h2>Result on unseen text</h2>",
        _model_table(results),
        _pairs_card(retention_lines(results)),
        _tasks(results),
        "<h2>Training</h2>" if pictures else "",
        _pictures(pictures),
        _samples(results),
        _usage(settings, results),
        _details("Settings", _groups(settings)),
        _details("Environment and decisions", _groups(told or {})),
    ]

    # Every colour of the pictures is a CSS variable, with one value for a light page and one for a dark page.
    light_colours = " ".join(f"--c{light[1:]}: {light};" for light in THEME)
    dark_colours = " ".join(f"--c{light[1:]}: {dark};" for light, dark in THEME.items())
    return _PAGE.substitute(
        title=_text(name),
        header=_header(results, settings),
        sections="\n".join(section for section in sections if section),
        light=light_colours,
        dark=dark_colours,
    )


def _text(value: Any) -> str:
    """Return any value as text of a page, without characters that are markup or that HTML cannot hold."""
    text = str(value).replace("\r\n", "\n").translate(_CONTROL_PICTURES)
    return html.escape(_NOT_IN_HTML.sub("\ufffd", text))


# ----------------------------------------------------------------------------------------- header


def _header(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the facts of the run, its result in words, and cards with the most important figures."""
    # Without a teacher the student's name is alone, without an arrow.
    names = [(settings.get(role) or {}).get("name") for role in ("teacher", "student")]
    models = " → ".join(str(name) for name in names if name)
    facts = [models, *(f"{key} {value}" for key, value in run_lines(results))]
    line = " · ".join(_text(fact) for fact in facts if fact)

    cards = []
    for label, number in _figures(results):
        cards.append(f'<div class="card figure"><b>{_text(number)}</b>{_text(label)}</div>')
    return (
        f'<p class="kicker">{line}</p><p class="lead">{_text(headline(results))}</p>'
        f'<div class="grid" style="--least: 150px">{"".join(cards)}</div>'
    )


def _figures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, figure) of what is worth a large number."""
    bits = {key: (results.get(key) or {}).get("bits_per_byte") for key in MODELS}
    student = bits["student"]
    figures = [(f"bits per byte, {model_name('student', results).lower()}", figure(student))]

    # A figure that was not finite is null, and then nothing is compared with it.
    others = {"initial_student": "before training", "baseline": "the same student without the teacher"}
    for key, description in others.items():
        if bits[key] and student is not None:
            saved = 1 - student / bits[key]
            word = "fewer" if saved >= 0 else "more"
            figures.append((f"{word} bits per byte than {description}", percent(abs(saved))))

    gap_closed = (results.get("retention") or {}).get("gap_closed")
    if gap_closed is not None:
        figures.append(("of the gap to the teacher closed", percent(gap_closed)))
    return figures


def _warnings(warnings: Sequence[str]) -> str:
    """Return the section of the run's warnings; a run without any says so."""
    if not warnings:
        return '<h2>Warnings</h2><div class="card">The run raised none.</div>'

    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings[:MOST_WARNINGS])
    rest = len(warnings) - MOST_WARNINGS
    note = f'<p class="note">and {rest} more in train.log</p>' if rest > 0 else ""
    return f'<h2>Warnings</h2><div class="card warn"><ul>{items}</ul>{note}</div>'


# ----------------------------------------------------------------------------------------- tables


def _model_table(results: Mapping[str, Any]) -> str:
    """Return a table with a row for each model, and bars of their bits per byte."""
    digits = {"bits_per_byte": 4, "perplexity": 2, "tokens": 0, "bytes": 0, "parameters": 0}
    models = {key: results[key] for key in MODELS if results.get(key)}
    most = max((model.get("bits_per_byte") or 0 for model in models.values()), default=0)

    rows = []
    for key, model in models.items():
        # The bar of the model with the most bits per byte is as wide as its cell.
        bits = model.get("bits_per_byte") or 0
        width = 100 * bits / most if most else 0
        name = f'{_text(model_name(key, results))}<div class="bar" style="width: {width:.1f}%"></div>'

        figures = [figure(model.get(column), places) for column, places in digits.items()]
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in [*figures, model.get("dtype") or "-"])
        best = " class=best" if key == "student" else ""
        rows.append(f"<tr{best}><td>{name}</td>{cells}</tr>")

    columns = ["model", *digits, "dtype"]
    heads = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in columns)
    note = "All rows score the same text. Perplexities compare only between models with the same tokenizer."
    return (
        f'<div class="card"><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{note} The bars are bits per byte.</p></div>'
    )


def _tasks(results: Mapping[str, Any]) -> str:
    """Return the section of lm_eval's tasks; nothing where none was measured."""
    heads, rows = task_rows(results)
    if not rows:
        return ""

    # Names of tasks and metrics come from elsewhere, so they are text, too.
    head_cells = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return (
        f'<h2>Tasks</h2><div class="card"><div class="scroll"><table><thead><tr>'
        f"{head_cells}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="note">Measured by lm_eval; ± is the standard error, the arrow points to the better side.</p></div>'
    )


# --------------------------------------------------------------------------- pictures, samples, code


def _pictures(pictures: Sequence[str]) -> str:
    """Return the pictures, each on a card, as many beside each other as the page is wide."""
    cards = "".join(f'<div class="card">{svg}</div>' for svg in pictures)
    return f'<div class="grid" style="--least: 440px">{cards}</div>'


def _samples(results: Mapping[str, Any]) -> str:
    """Return the section of samples: each with its prompt and with what every model wrote."""
    samples = results.get("samples") or []
    if not samples:
        return ""

    # A plain text has a beginning, a conversation or an example has a prompt.
    prompt = "Prompt" if results.get("prompted") else "Beginning"
    cards = []
    for sample in samples:
        texts = ""
        for key in MODELS:
            if sample.get(key) is not None:
                texts += f"<div>{_titled(model_name(key, results), sample[key])}</div>"
        cards.append(
            f'<div class="card sample"><div class="prompt">{_titled(prompt, sample.get("prompt", ""))}</div>'
            f'<div class="grid" style="--least: 240px">{texts}</div></div>'
        )

    about = f'<p class="note">{samples_title(results)}, which nobody was trained on.</p>'
    return f"<h2>Samples</h2>{about}{''.join(cards)}"


def _titled(title: str, text: str) -> str:
    return f'<h3>{_text(title)}</h3><pre class="text" dir="auto">{_text(text)}</pre>'


def _usage(settings: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the section with the code that loads the student."""
    code = how_to_use('"student"  # beside this file', settings, results)
    return f'<h2>Use the student</h2><div class="card"><pre class="code">{_text(code)}</pre></div>'


# ------------------------------------------------------------------------------ settings and notes


def _details(title: str, inner: str) -> str:
    """Return a section that opens on a click; nothing where it would be empty."""
    return f"<details><summary>{title}</summary>{inner}</details>" if inner else ""


def _groups(values: Mapping[str, Any]) -> str:
    """Return a card for each section of nested values, and one for those that are in no section."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for path, value in flatten(values).items():
        # A value that is in no section comes under no heading.
        section, dot, name = path.partition(".")
        if not dot:
            section, name = "", path
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        groups.setdefault(section, []).append((name or section, text))

    cards = ""
    for section, pairs in groups.items():
        heading = f"<h3>{_text(section)}</h3>" if section else ""
        cards += f'<div class="card settings">{heading}{_pairs(pairs)}</div>'
    return f'<div class="columns">{cards}</div>' if cards else ""


def _pairs_card(pairs: Sequence[tuple[str, Any]]) -> str:
    """Return a card of names and values; nothing where there are none."""
    return f'<div class="card" style="margin-top: 16px">{_pairs(pairs)}</div>' if pairs else ""


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs)
    return f"<dl>{items}</dl>"
