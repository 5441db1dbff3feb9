"""The evaluation report as Markdown."""

from collections.abc import Mapping
from typing import Any

from ..run_layout import CURVES, ROUTING
from .results import MODELS, figure, headline, model_name, retention_lines, run_lines, samples_title, task_table


def markdown(results: Mapping[str, Any]) -> str:
    """The report for people."""
    parts = ["# Evaluation report", headline(results), _model_table(results), _retention_list(results)]
    parts += [f"## Tasks\n\nMeasured by lm_eval.\n\n{tasks}"] if (tasks := task_table(results)) else []
    parts += [f"![Training curves]({CURVES})", _routing(results.get("routing")), _run_list(results)]
    if samples := results.get("samples"):
        parts.append(f"## Samples\n\n{samples_title(results)}.")
        parts += [_sample(number, sample) for number, sample in enumerate(samples, 1)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _model_table(results: Mapping[str, Any]) -> str:
    lines = [
        "| | bits per byte | perplexity | tokens | bytes | parameters | dtype |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for key in MODELS:
        if model := results.get(key):
            cells = [figure(model.get("bits_per_byte")), figure(model.get("perplexity"), 2)]
            cells += [figure(model.get(column)) for column in ("tokens", "bytes", "parameters")]
            lines.append(f"| {model_name(key, results)} | {' | '.join(cells)} | {model.get('dtype') or '-'} |")
    note = "All rows score the same text. Perplexities compare only between models with the same tokenizer."
    return "\n".join(lines) + "\n\n" + note


def _retention_list(results: Mapping[str, Any]) -> str:
    lines = [f"- {name}: {value}" for name, value in retention_lines(results)]
    return "## Retention\n\n" + "\n".join(lines) if lines else ""


def _routing(routing: Mapping[str, Any] | None) -> str:
    if not routing:
        return ""
    return (
        f"## Routing\n\n![Routing]({ROUTING})\n\n"
        f"Each row tells which teacher layers a student layer is compared with by the term `layer`, at step "
        f"{routing['step']:,}: shares of the mixture, which add up to 1."
    )


def _run_list(results: Mapping[str, Any]) -> str:
    lines = [f"- {_escape(key)}: {_escape(value)}" for key, value in run_lines(results)]
    return "## Run\n\n" + "\n".join(lines) if lines else ""


def _sample(number: int, sample: Mapping[str, Any]) -> str:
    names = [(key, name) for key, name in MODELS.items() if sample.get(key) is not None]
    return "\n".join(
        [
            f"### {number}. {_escape(sample.get('prompt', ''))}",
            "",
            "| " + " | ".join(name for _, name in names) + " |",
            "|" + "---|" * len(names),
            "| " + " | ".join(_escape(sample[key]) for key, _ in names) + " |",
        ]
    )


def _escape(text: str) -> str:
    """Text of a model or a user, shown as it is inside a Markdown table or heading."""
    for special in "\\`*_{}[]#|~$":
        text = text.replace(special, "\\" + special)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("\r", "").replace("\n", "<br>").split())
