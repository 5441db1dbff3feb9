"""Files that a run is read by: evaluation_report.json, .md, report.html, training_curves.png, routing.png; a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..advice import advice
from ..config import yaml_files
from ..files import write_json, write_text
from ..logs.console import console
from ..logs.records import json_safe, read_metrics, read_warnings
from ..run_layout import CURVES, METRICS, REPORT_HTML, REPORT_JSON, REPORT_MD, ROUTING
from . import html
from .charts import Records, curves_as_svg, draw_curves, draw_routing, routing_as_svg
from .markdown import markdown
from .results import MODELS, figure, headline, model_name, task_rows


def write_report(
    output_dir: str | Path,
    results: Mapping[str, Any],
    metrics: Records | str | Path | None = None,
    baseline_metrics: Records | str | Path | None = None,
) -> dict[str, Any]:
    """Write the files into `output_dir`.

    If evaluations have a routing, how the router matches layers, the last of them becomes `routing` in the results and
    a picture.

    Args:
        results: see `utils.report.results`. NaN and infinity become null.
        metrics: records of metrics.jsonl or its path; None: `output_dir/metrics.jsonl`.
        baseline_metrics: the same of the run without the teacher, to be drawn as well.

    Returns:
        the results as they stand in the JSON file.
    """
    folder = Path(output_dir)
    safe: dict[str, Any] = json_safe(results)
    records = _records(folder / METRICS if metrics is None else metrics)
    baseline = _records(baseline_metrics)

    # How layers are matched changes during the run; the report shows how it ended.
    routed = [record for record in records if record.get("routing")]
    if routed:
        safe["routing"] = {"step": routed[-1]["step"], **routed[-1]["routing"]}
    write_json(folder / REPORT_JSON, safe)

    # From here on what was measured is on the disk: a fault in a picture or a page must not end the run.
    with advice(CURVES):
        draw_curves(folder / CURVES, records, safe, baseline)
    if routed:
        with advice(ROUTING):
            draw_routing(folder / ROUTING, safe["routing"])
    with advice(REPORT_MD):
        write_text(folder / REPORT_MD, markdown(safe))
    with advice(REPORT_HTML):
        _write_page(folder, safe, _pictures(records, safe, baseline))
    return safe


def _write_page(folder: Path, results: Mapping[str, Any], pictures: Sequence[str]) -> None:
    """Write report.html, with the settings, notes and warnings from the run's other files."""
    settings, notes = yaml_files.read_config(folder)
    page = html.page(
        folder.absolute().name,
        results,
        pictures=pictures,
        settings=settings,
        notes=notes,
        warnings=read_warnings(folder),
    )
    write_text(folder / REPORT_HTML, page)


def _pictures(records: Records, results: Mapping[str, Any], baseline: Records) -> list[str]:
    """Return the pictures of report.html, without those that cannot be drawn."""
    pictures: list[str] = []
    with advice(f"curves in {REPORT_HTML}"):
        pictures += curves_as_svg(records, results, baseline)
    if "routing" in results:
        with advice(f"picture of the routing in {REPORT_HTML}"):
            pictures.append(routing_as_svg(results["routing"]))
    return pictures


def _records(metrics: Records | str | Path | None) -> Records:
    """Return records of metrics.jsonl, read from its path if need be; none where there is no such file."""
    if metrics is None:
        return []
    if isinstance(metrics, str | Path):
        return read_metrics(metrics) if Path(metrics).exists() else []
    return metrics


def print_summary(results: Mapping[str, Any]) -> None:
    """Print the result on the console: a small table, another one of tasks, and the headline."""
    with advice("summary on the console"):
        console().print(summary_table(results))
        if results.get("tasks"):
            console().print(tasks_table(results))
        console().print(headline(results))


def tasks_table(results: Mapping[str, Any]) -> Table:
    """Return a table of the tasks, a row for each metric; its texts are folded where they do not fit."""
    heads, rows = task_rows(results)
    table = Table(title="Tasks, measured by lm_eval", title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        # Task and metric are text, everything else is a number.
        table.add_column(head, justify="left" if number < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return a table of bits per byte, perplexity and size of every model; at most 80 columns wide."""
    table = Table(title="Evaluation on unseen text", title_justify="left", title_style="bold")
    table.add_column("model")
    for column in ("bits/byte", "perplexity", "parameters"):
        table.add_column(column, justify="right", no_wrap=True)

    # Not every run has a teacher, or a comparison without it.
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
