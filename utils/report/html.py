"""The report as one page that needs nothing but a browser: no script, no font, no picture from elsewhere.

What models wrote and what users typed is text here and never markup; the page's own policy forbids scripts besides.
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

_UNSEEN = {**{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}, 127: "\u2421"}
"""Control characters, which HTML cannot hold, as the pictures that Unicode has of them."""

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
    """The page.

    Args:
        name: of the run.
        results: see `utils.report.results`, without NaN.
        pictures: SVG elements whose colours are the variables of `charts.THEME`; the one markup taken as it is.
        settings: of the run, nested.
        told: what the run noted of its decisions and its environment, nested.
        warnings: what the run warned of, in order.
    """
    use = how_to_use('"student"  # beside this file', settings or {}, results)
    sections = [
        _warnings(warnings),
        "<h2>Result on unseen text</h2>",
        _model_table(results),
        _pairs_card(retention_lines(results)),
        _tasks(results),
        "<h2>Training</h2>" if pictures else "",
        f'<div class="grid" style="--least: 440px">{"".join(map(_picture, pictures))}</div>',
        _samples(results),
        f'<h2>Use the student</h2><div class="card"><pre class="code">{_text(use)}</pre></div>',
        _details("Settings", _groups(settings or {})),
        _details("Environment and decisions", _groups(told or {})),
    ]
    return _PAGE.substitute(
        title=_text(name),
        header=_header(results, settings or {}),
        sections="\n".join(section for section in sections if section),
        light=" ".join(f"--c{light[1:]}: {light};" for light in THEME),
        dark=" ".join(f"--c{light[1:]}: {dark};" for light, dark in THEME.items()),
    )


def _text(value: Any) -> str:
    """Any text as text of a page."""
    shown = str(value).replace("\r\n", "\n").translate(_UNSEEN)
    return html.escape(re.sub("[\ud800-\udfff\x80-\x9f]", "\ufffd", shown))


def _header(results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    names = [(settings.get(role) or {}).get("name") for role in ("teacher", "student")]
    facts = [" → ".join(str(name) for name in names if name), *(f"{key} {value}" for key, value in run_lines(results))]
    told = " · ".join(_text(fact) for fact in facts if fact)
    cards = "".join(f'<div class="card figure"><b>{_text(b)}</b>{_text(a)}</div>' for a, b in _figures(results))
    return (
        f'<p class="kicker">{told}</p><p class="lead">{_text(headline(results))}</p>'
        f'<div class="grid" style="--least: 150px">{cards}</div>'
    )


def _figures(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, figure) that are worth a large number."""
    bits = {key: (results.get(key) or {}).get("bits_per_byte") for key in MODELS}
    found = [(f"bits per byte, {model_name('student', results).lower()}", figure(bits["student"]))]
    for key, other in (("initial_student", "before training"), ("baseline", "the same student without the teacher")):
        if bits[key] and bits["student"] is not None:
            less = 1 - bits["student"] / bits[key]
            found.append((f"{'fewer' if less >= 0 else 'more'} bits per byte than {other}", percent(abs(less))))
    if (closed := (results.get("retention") or {}).get("gap_closed")) is not None:
        found.append(("of the gap to the teacher closed", percent(closed)))
    return found


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return '<h2>Warnings</h2><div class="card">The run raised none.</div>'
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings[:MOST_WARNINGS])
    more = len(warnings) - MOST_WARNINGS
    rest = f'<p class="note">and {more} more in train.log</p>' if more > 0 else ""
    return f'<h2>Warnings</h2><div class="card warn"><ul>{items}</ul>{rest}</div>'


def _model_table(results: Mapping[str, Any]) -> str:
    columns = {"bits_per_byte": 4, "perplexity": 2, "tokens": 0, "bytes": 0, "parameters": 0}
    models = {key: model for key in MODELS if (model := results.get(key))}
    most = max((model.get("bits_per_byte") or 0 for model in models.values()), default=0)
    rows = []
    for key, model in models.items():
        width = 100 * (model.get("bits_per_byte") or 0) / most if most else 0
        cells = [figure(model.get(column), digits) for column, digits in columns.items()] + [model.get("dtype") or "-"]
        rows.append(
            f"<tr{' class=best' if key == 'student' else ''}><td>{_text(model_name(key, results))}"
            f'<div class="bar" style="width: {width:.1f}%"></div></td>'
            + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    heads = "".join(f"<th>{column.replace('_', ' ')}</th>" for column in ("model", *columns, "dtype"))
    note = "All rows score the same text. Perplexities compare only between models with the same tokenizer."
    return (
        f'<div class="card"><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{note} The bars are bits per byte.</p></div>'
    )


def _tasks(results: Mapping[str, Any]) -> str:
    heads, rows = task_rows(results)
    if not rows:
        return ""
    told = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<h2>Tasks</h2><div class="card"><div class="scroll"><table><thead><tr>'
        f"{''.join(f'<th>{_text(head)}</th>' for head in heads)}</tr></thead><tbody>{told}</tbody></table></div>"
        '<p class="note">Measured by lm_eval; ± is the standard error, the arrow points to the better side.</p></div>'
    )


def _picture(svg: str) -> str:
    return f'<div class="card">{svg}</div>'


def _samples(results: Mapping[str, Any]) -> str:
    prompt, shown = "Prompt" if results.get("prompted") else "Beginning", []
    for sample in results.get("samples") or []:
        written = {model_name(key, results): sample[key] for key in MODELS if sample.get(key) is not None}
        texts = "".join(f"<div>{_said(name, text)}</div>" for name, text in written.items())
        shown.append(
            f'<div class="card sample"><div class="prompt">{_said(prompt, sample.get("prompt", ""))}</div>'
            f'<div class="grid" style="--least: 240px">{texts}</div></div>'
        )
    about = f'<p class="note">{samples_title(results)}, which nobody was trained on.</p>'
    return f"<h2>Samples</h2>{about}{''.join(shown)}" if shown else ""


def _said(title: str, text: str) -> str:
    return f'<h3>{_text(title)}</h3><pre class="text" dir="auto">{_text(text)}</pre>'


def _details(title: str, inner: str) -> str:
    return f"<details><summary>{title}</summary>{inner}</details>" if inner else ""


def _groups(values: Mapping[str, Any]) -> str:
    """A card for each section of nested values, and one for what is in none."""
    groups: dict[str, list[tuple[str, Any]]] = {}
    for path, value in flatten(values).items():
        section, dot, rest = path.partition(".")
        told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        groups.setdefault(section if dot else "", []).append((rest or section, told))
    cards = [f"<h3>{_text(section)}</h3>" * bool(section) + _pairs(pairs) for section, pairs in groups.items()]
    inner = "".join(f'<div class="card settings">{card}</div>' for card in cards)
    return f'<div class="columns">{inner}</div>' if inner else ""


def _pairs_card(pairs: Sequence[tuple[str, Any]]) -> str:
    return f'<div class="card" style="margin-top: 16px">{_pairs(pairs)}</div>' if pairs else ""


def _pairs(pairs: Sequence[tuple[str, Any]]) -> str:
    return f"<dl>{''.join(f'<dt>{_text(name)}</dt><dd>{_text(value)}</dd>' for name, value in pairs)}</dl>"
