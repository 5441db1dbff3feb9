"""What a run leaves to read: evaluation_report.json, .md, report.html, training_curves.png, routing.png; a table."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ..advice import advice
from ..files import write_json, write_text
from ..logs.step_logger import console, json_safe, read_metrics, read_warnings
from ..run import folder as run_folder
from ..run_layout import CURVES, METRICS, REPORT_HTML, REPORT_JSON, REPORT_MD, ROUTING
from . import html
from .charts import Records, curves_as_svg, draw_curves, draw_routing, routing_as_svg
from .results import MODELS, figure, headline, model_name, retention_lines, run_lines, samples_title, task_table


def write_report(
    output_dir: str | Path,
    results: Mapping[str, Any],
    metrics: Records | str | Path | None = None,
    baseline_metrics: Records | str | Path | None = None,
) -> dict[str, Any]:
    """Write the files into `output_dir`; returns the results as they stand in the JSON file.

    If evaluations tell how the router matches layers, the last of them becomes `routing` in the results and a picture.

    Args:
        results: see `utils.results`. NaN and infinity become null.
        metrics: records of metrics.jsonl or its path; None: `output_dir/metrics.jsonl`.
        baseline_metrics: the same of the run without the teacher, to be drawn as well.
    """
    folder = Path(output_dir)
    results = json_safe(results)
    records = _records(metrics if metrics is not None else folder / METRICS)
    baseline = _records(baseline_metrics)
    if routed := [record for record in records if record.get("routing")]:
        results["routing"] = {"step": routed[-1]["step"], **routed[-1]["routing"]}
    write_json(folder / REPORT_JSON, results)

    # what was measured is on the disk: what only shows it cannot take it away any more
    with advice(CURVES):
        draw_curves(folder / CURVES, records, results, baseline)
    if routed:
        with advice(ROUTING):
            draw_routing(folder / ROUTING, results["routing"])
    with advice(REPORT_MD):
        write_text(folder / REPORT_MD, markdown(results))
    with advice(REPORT_HTML):
        pictures = _pictures(records, results, baseline)
        settings, told = run_folder.read_config(folder)
        name, warnings = folder.absolute().name, read_warnings(folder)
        write_text(folder / REPORT_HTML, html.page(name, results, pictures, settings, told, warnings))
    return results


def _pictures(records: Records, results: Mapping[str, Any], baseline: Records) -> list[Any]:
    """Those of report.html; without the ones that cannot be drawn."""
    pictures: list[Any] = []
    with advice(f"curves in {REPORT_HTML}"):
        pictures += curves_as_svg(records, results, baseline)
    if "routing" in results:
        with advice(f"picture of the routing in {REPORT_HTML}"):
            pictures.append(routing_as_svg(results["routing"]))
    return pictures


def print_summary(results: Mapping[str, Any]) -> None:
    """The result on the console: one small table and one sentence."""
    with advice("summary on the console"):
        console().print(summary_table(results))
        console().print(headline(results))


def summary_table(results: Mapping[str, Any]) -> Table:
    """Bits per byte, perplexity and size of every model; at most 80 columns wide."""
    table = Table(title="Evaluation on unseen text", title_justify="left", title_style="bold")
    table.add_column("model")
    for column in ("bits/byte", "perplexity", "parameters"):
        table.add_column(column, justify="right", no_wrap=True)
    for key in MODELS:
        if model := results.get(key):
            table.add_row(
                model_name(key, results),
                figure(model.get("bits_per_byte")),
                figure(model.get("perplexity"), 2),
                figure(model.get("parameters")),
                style="bold" if key == "student" else None,
            )
    return table


# --- markdown -------------------------------------------------------------------------------------------------------


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


def _records(metrics: Records | str | Path | None) -> Records:
    if metrics is None:
        return []
    if isinstance(metrics, str | Path):
        return read_metrics(metrics) if Path(metrics).exists() else []
    return metrics
