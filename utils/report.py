"""What a run leaves to read: evaluation_report.json and .md, training_curves.png, routing.png, a console table.

The results are one dict, in the form of evaluation_report.json:
`{student, teacher, initial_student, retention, samples, run}` and, where there was one, `baseline`: the same
student after the same steps without the teacher. Everything is measured on the same text.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from rich.table import Table

from .atomic import write_json, write_text
from .logs import console, duration, json_safe, read_metrics

Records = Sequence[Mapping[str, Any]]

MODELS = {
    "teacher": "Teacher",
    "student": "Distilled student",
    "baseline": "Same student without the teacher",
    "initial_student": "Student before training",
}
"""Keys of the results that describe a model, in the order they are shown."""

REPORT_JSON, REPORT_MD, CURVES = "evaluation_report.json", "evaluation_report.md", "training_curves.png"
ROUTING = "routing.png"
MOST_NUMBERS = 12
"""Up to so many teacher layers, the routing's cells have their numbers in them."""

_TERM_NAMES = {
    "kd": "KD",
    "span": "span",
    "lm": "LM",
    "feat": "feature",
    "rel": "relations",
    "attn": "alignment",
    "layer": "layer",
    "contr": "contrastive",
}
# Okabe and Ito's palette, told apart by most colour-blind readers.
_COLOURS = {
    "kd": "#D55E00",
    "lm": "#0072B2",
    "span": "#CC79A7",
    "feat": "#009E73",
    "rel": "#56B4E9",
    "attn": "#E69F00",
    "layer": "#8C6BB1",
    "contr": "#8C564B",
    "student": "#D55E00",
    "baseline": "#0072B2",
    "teacher": "#009E73",
    "initial_student": "#888888",
}
_EVALUATION_LINE = {"marker": "o", "markersize": 3.5, "linewidth": 1.8}
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def write_report(
    output_dir: str | Path,
    results: Mapping[str, Any],
    metrics: Records | str | Path | None = None,
    baseline_metrics: Records | str | Path | None = None,
) -> dict[str, Any]:
    """Write the files into `output_dir`; returns the results as they stand in the JSON file.

    If evaluations tell how the router matches layers, the last of them becomes `routing` in the results and a picture.

    Args:
        results: see the top of this file. NaN and infinity become null.
        metrics: records of metrics.jsonl or its path; None: `output_dir/metrics.jsonl`.
        baseline_metrics: the same of the run without the teacher, to be drawn as well.
    """
    folder = Path(output_dir)
    results = json_safe(results)
    records = _records(metrics if metrics is not None else folder / "metrics.jsonl")
    draw_curves(folder / CURVES, records, results, _records(baseline_metrics))
    if routed := [record for record in records if record.get("routing")]:
        results["routing"] = {"step": routed[-1]["step"], **routed[-1]["routing"]}
        draw_routing(folder / ROUTING, results["routing"])
    write_json(folder / REPORT_JSON, results)
    write_text(folder / REPORT_MD, markdown(results))
    return results


def print_summary(results: Mapping[str, Any]) -> None:
    """The result on the console: one small table and one sentence."""
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
                _name(key, results),
                _figure(model.get("bits_per_byte")),
                _figure(model.get("perplexity"), 2),
                _figure(model.get("parameters")),
                style="bold" if key == "student" else None,
            )
    return table


def headline(results: Mapping[str, Any]) -> str:
    """What the run achieved, in a sentence or two."""
    bits = {key: model["bits_per_byte"] for key in MODELS if (model := results.get(key))}
    sentences = []
    if bits.get("baseline"):
        less = 1 - bits["student"] / bits["baseline"]
        word = "fewer" if less >= 0 else "more"
        sentences.append(
            f"The distilled student needs {abs(less):.1%} {word} bits per byte than the same student trained for the "
            "same steps without the teacher."
        )
    closed = (results.get("retention") or {}).get("gap_closed")
    if closed is not None:
        sentences.append(f"It closed {closed:.1%} of the gap between the untrained student and the teacher.")
    elif {"teacher", "initial_student"} <= bits.keys() and bits["teacher"] >= bits["initial_student"]:
        sentences.append("The teacher is no better on this text than the student was before training.")
    return " ".join(sentences)


def _name(key: str, results: Mapping[str, Any]) -> str:
    return "Trained student" if key == "student" and not results.get("teacher") else MODELS[key]


# --- markdown -------------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """The report for people."""
    parts = ["# Evaluation report", headline(results), _model_table(results), _retention_list(results)]
    parts += [f"![Training curves]({CURVES})", _routing(results.get("routing")), _run_list(results.get("run") or {})]
    if samples := results.get("samples"):
        parts.append("## Samples\n\nGreedy continuations of the same beginnings.")
        parts += [_sample(number, sample) for number, sample in enumerate(samples, 1)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _model_table(results: Mapping[str, Any]) -> str:
    lines = [
        "| | bits per byte | perplexity | tokens | bytes | parameters | dtype |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for key in MODELS:
        if model := results.get(key):
            cells = [_figure(model.get("bits_per_byte")), _figure(model.get("perplexity"), 2)]
            cells += [_figure(model.get(column)) for column in ("tokens", "bytes", "parameters")]
            lines.append(f"| {_name(key, results)} | {' | '.join(cells)} | {model.get('dtype') or '-'} |")
    note = "All rows score the same text. Perplexities compare only between models with the same tokenizer."
    return "\n".join(lines) + "\n\n" + note


def _retention_list(results: Mapping[str, Any]) -> str:
    kept = results.get("retention") or {}
    if not kept:  # no teacher
        return ""
    lines = [
        ("Bits per byte, student over teacher", _figure(kept.get("bits_per_byte_ratio"), 3)),
        ("Share of the gap to the teacher closed", _percent(kept.get("gap_closed"))),
        ("Same most probable token as the teacher", _percent(kept.get("top1_agreement"))),
        ("KL from the teacher at common boundaries", f"{_figure(kept.get('kl_nats_per_token'))} nats per token"),
    ]
    return "## Retention\n\n" + "\n".join(f"- {name}: {value}" for name, value in lines)


def _routing(routing: Mapping[str, Any] | None) -> str:
    if not routing:
        return ""
    return (
        f"## Routing\n\n![Routing]({ROUTING})\n\n"
        f"Each row tells which teacher layers a student layer is compared with by the term `layer`, at step "
        f"{routing['step']:,}: shares of the mixture, which add up to 1."
    )


def _run_list(run: Mapping[str, Any]) -> str:
    shown = dict(run)
    if isinstance(seconds := shown.pop("seconds", None), int | float):
        shown["duration"] = duration(seconds)
    lines = [f"- {_escape(str(key).replace('_', ' '))}: {_escape(_plain(value))}" for key, value in shown.items()]
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


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _figure(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# --- routing --------------------------------------------------------------------------------------------------------


def draw_routing(path: str | Path, routing: Mapping[str, Any]) -> None:
    """A heat map of the teacher layers (columns) that each student layer (rows, the deepest on top) is matched with.

    Args:
        path: of the PNG file, replaced in one step.
        routing: `student_layers`, `teacher_layers` (numbers of the layers), `weights` (a row per student layer) and
            the `step` they were measured at.
    """
    rows, columns = routing["student_layers"], routing["teacher_layers"]
    weights = np.array(routing["weights"], dtype=float)  # what metrics.jsonl has as null is NaN again
    most = np.nanmax(weights, initial=1e-3)
    size = (min(2.6 + 0.62 * max(len(columns), 6), 13), min(1.8 + 0.5 * max(len(rows), 3), 9))
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.subplots()
        image = panel.imshow(weights, cmap="Blues", vmin=0, vmax=most, origin="lower", aspect="auto")
        panel.set_title(f"Routing at step {routing['step']:,}")
        for axis, layers, name in ((panel.xaxis, columns, "teacher layer"), (panel.yaxis, rows, "student layer")):
            axis.set_ticks(range(len(layers)), [str(layer) for layer in layers])
            axis.set_tick_params(length=0)
            axis.set_label_text(name)
        if len(columns) <= MOST_NUMBERS:
            for y, row in enumerate(weights):
                for x, share in enumerate(row):
                    colour = "white" if share > 0.55 * most else "#333333"
                    panel.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=9, color=colour)
        figure.colorbar(image, ax=panel, label="share of the mixture").outline.set_visible(False)
        _save(figure, path)


# --- curves ---------------------------------------------------------------------------------------------------------


def draw_curves(
    path: str | Path, records: Records, results: Mapping[str, Any] | None = None, baseline: Records = ()
) -> None:
    """Four panels: loss terms, curriculum weights, learning rate and gradient norm, evaluation.

    Args:
        path: of the PNG file, replaced in one step.
        records: of metrics.jsonl.
        results: supplies the levels of teacher and initial student.
        baseline: records of the run without the teacher.
    """
    steps = [record for record in records if "terms" in record]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 8.6), layout="constrained")
        panels = figure.subplots(2, 2)
        _draw_losses(panels[0][0], steps)
        _draw_evaluation(panels[0][1], records, results or {}, baseline)
        _draw_weights(panels[1][0], steps)
        _draw_optimisation(panels[1][1], steps)
        last = max(record["step"] for record in [*records, *baseline, {"step": 1}])
        for panel in panels.flat:
            panel.set_xlabel("optimizer step")
            panel.set_xlim(-0.015 * last, 1.015 * last)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
        _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    """In one step: a reader sees the old picture or the new one."""
    beside = Path(path).with_suffix(".tmp.png")
    figure.savefig(beside, dpi=130)
    os.replace(beside, path)


def _draw_losses(panel: Axes, steps: Records) -> None:
    panel.set_title("Loss terms")
    if not steps:
        return _say_empty(panel)
    x = [record["step"] for record in steps]
    for name in _terms(steps):
        raw, weighted = (_series(steps, "terms", name, key) for key in ("raw", "weighted"))
        panel.plot(x, raw, color=_COLOURS.get(name), label=_TERM_NAMES.get(name, name), **_marker(x))
        if any(value > 0 for value in weighted if not math.isnan(value)):
            panel.plot(x, weighted, color=_COLOURS.get(name), linestyle=(0, (3, 2)), linewidth=1.2)
    panel.plot(x, _series(steps, "loss"), color="#222222", linewidth=2.2, label="total", **_marker(x))
    panel.plot([], [], color="#777777", linestyle=(0, (3, 2)), linewidth=1.2, label="weighted")
    _logarithmic_if_wide(panel, rows=math.ceil(len(panel.get_legend_handles_labels()[0]) / 4))
    panel.legend(ncols=4, loc="upper right", fontsize=8.5)


def _draw_weights(panel: Axes, steps: Records) -> None:
    panel.set_title("Curriculum weights")
    if not steps:
        return _say_empty(panel)
    x = [record["step"] for record in steps]
    names = [name for name in _terms(steps) if any(value > 0 for value in _series(steps, "terms", name, "weight"))]
    for order, name in enumerate(names):
        y = _series(steps, "terms", name, "weight")
        # Later lines are thinner, so that of two equal ones both are seen.
        width = max(3.6 - 0.7 * order, 1.4)
        panel.plot(x, y, color=_COLOURS.get(name), label=_TERM_NAMES.get(name, name), linewidth=width)
    panel.set_ylim(0, 1.18 * max(panel.get_ylim()[1], 1e-3))
    panel.legend(ncols=4, loc="upper right")


def _draw_optimisation(panel: Axes, steps: Records) -> None:
    panel.set_title("Learning rate and gradient norm")
    if not steps:
        return _say_empty(panel)
    x = [record["step"] for record in steps]
    other = panel.twinx()
    other.spines["right"].set_visible(True)
    other.grid(False)
    (norm,) = other.plot(x, _series(steps, "grad_norm"), color="#B0B0B0", linewidth=1.2, label="gradient norm (right)")
    (rate,) = panel.plot(x, _series(steps, "lr"), color="#0072B2", linewidth=2.0, label="learning rate", **_marker(x))
    panel.set_zorder(other.get_zorder() + 1)  # the learning rate in front
    panel.patch.set_visible(False)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_ylim(bottom=0, top=1.15 * panel.get_ylim()[1])
    _logarithmic_if_wide(other)
    if other.get_yscale() == "linear":
        other.set_ylim(bottom=0, top=1.15 * other.get_ylim()[1])
    panel.legend(handles=[rate, norm], ncols=2, loc="upper right")


def _draw_evaluation(panel: Axes, records: Records, results: Mapping[str, Any], baseline: Records) -> None:
    panel.set_title("Evaluation, bits per byte")
    curves = {}
    for key, run in (("baseline", baseline), ("student", records)):
        points = [(record["step"], record["bits_per_byte"]) for record in run if _of_student(record)]
        if points:
            curves[key] = x, y = tuple(zip(*points, strict=True))
            panel.plot(x, y, color=_COLOURS[key], label=f"{_name(key, results)}  {y[-1]:.3f}", **_EVALUATION_LINE)
    levels = {key: (results.get(key) or {}).get("bits_per_byte") for key in ("initial_student", "teacher")}
    for key, level in levels.items():
        if level is not None:
            panel.axhline(level, color=_COLOURS[key], linestyle=(0, (5, 3)), linewidth=1.4)
            below = key == "initial_student"
            panel.annotate(
                f"{MODELS[key]}  {level:.3f}",
                (0.985, level),
                xycoords=panel.get_yaxis_transform(),
                xytext=(0, -4 if below else 4),
                textcoords="offset points",
                color=_COLOURS[key],
                horizontalalignment="right",
                verticalalignment="top" if below else "bottom",
                fontsize=9,
            )
    if not curves and levels["teacher"] is None:
        return _say_empty(panel)
    panel.margins(y=0.09)
    if curves:
        panel.legend(loc="upper right", bbox_to_anchor=(1.0, 0.88))
        _magnify_end(panel, curves)


def _magnify_end(panel: Axes, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """The last half of the curves once more, in a window, where the whole range hides what differs."""
    last = max(x[-1] for x, _ in curves.values())
    ends = {key: [(a, b) for a, b in zip(x, y, strict=True) if a >= last / 2] for key, (x, y) in curves.items()}
    values = [b for points in ends.values() for _, b in points]
    low, high = panel.get_ylim()
    if len(curves) < 2 or min(map(len, ends.values())) < 3 or max(values) - min(values) > 0.2 * (high - low):
        return
    window = panel.inset_axes((0.40, 0.35, 0.585, 0.33))
    for key, points in ends.items():
        window.plot(*zip(*points, strict=True), color=_COLOURS[key], **_EVALUATION_LINE)
    window.margins(y=0.15)
    window.tick_params(labelsize=8)
    window.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    window.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    window.set_title("last half, magnified", fontsize=8.5, fontweight="normal", color="#666666")


def _of_student(record: Mapping[str, Any]) -> bool:
    """An evaluation of what is trained, not of the teacher or of the start."""
    return (
        "terms" not in record
        and record.get("bits_per_byte") is not None
        and record.get("split") not in ("teacher", "initial_student")
    )


def _terms(steps: Records) -> list[str]:
    """Terms that occur, known ones first in their usual order."""
    found = {name for record in steps for name in record["terms"]}
    return [name for name in _TERM_NAMES if name in found] + sorted(found - _TERM_NAMES.keys())


def _series(steps: Records, *keys: str) -> list[float]:
    """One value per record; NaN, which is a gap in a line, where there is none."""
    values = []
    for record in steps:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        values.append(math.nan if value is None else float(value))
    return values


def _marker(x: Sequence[int]) -> dict[str, Any]:
    """A short run's points are shown as points."""
    return {"marker": "o", "markersize": 3.5} if len(x) <= 12 else {}


def _logarithmic_if_wide(panel: Axes, rows: int = 2) -> None:
    """A logarithmic axis where the lines span more than a factor of 30, as KD at a high temperature does.

    Room is left above for `rows` of a legend.
    """
    values = [v for line in panel.get_lines() for v in line.get_ydata() if v is not None and math.isfinite(v) and v > 0]
    if values and max(values) / min(values) > 30:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_ylim(bottom=max(min(values), max(values) / 1e4) * 0.8, top=max(values) * 2**rows)
    elif values:
        panel.set_ylim(bottom=0, top=(1 + 0.12 * rows) * max(values))


def _say_empty(panel: Axes) -> None:
    panel.text(0.5, 0.5, "nothing was logged", transform=panel.transAxes, ha="center", color="#888888")


def _records(metrics: Records | str | Path | None) -> Records:
    if metrics is None:
        return []
    if isinstance(metrics, str | Path):
        return read_metrics(metrics) if Path(metrics).exists() else []
    return metrics
