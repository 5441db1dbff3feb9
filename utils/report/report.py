"""What a run leaves to read: evaluation_report.json, .md, report.html, training_curves.png, routing.png; a table."""

from collections.abc import Mapping
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
from .results import MODELS, figure, headline, model_name


def write_report(
    output_dir: str | Path,
    results: Mapping[str, Any],
    metrics: Records | str | Path | None = None,
    baseline_metrics: Records | str | Path | None = None,
) -> dict[str, Any]:
    """Write the files into `output_dir`; returns the results as they stand in the JSON file.

    If evaluations tell how the router matches layers, the last of them becomes `routing` in the results and a picture.

    Args:
        results: see `utils.report.results`. NaN and infinity become null.
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
        settings, told = yaml_files.read_config(folder)
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


def _records(metrics: Records | str | Path | None) -> Records:
    if metrics is None:
        return []
    if isinstance(metrics, str | Path):
        return read_metrics(metrics) if Path(metrics).exists() else []
    return metrics
