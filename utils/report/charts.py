"""The pictures of a run: curves of its training, and how the router matches layers; as PNG files and as SVG.

In an SVG every colour of `THEME` is a CSS variable, so that a page shows it in light and in dark.
"""

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .results import MODELS, model_name

Records = Sequence[Mapping[str, Any]]

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
_MEASURED_ONLY = {"linestyle": (0, (1, 1.6)), "linewidth": 1.4, "alpha": 0.6}
"""Of a term that never weighs anything: it is measured, and nothing is learned from it."""
_EVALUATION_LINE = {"marker": "o", "markersize": 3.5, "linewidth": 1.8}
STYLE = {
    "font.size": 10,
    "text.parse_math": False,  # a dollar sign in a name is one
    "text.color": "#222222",
    "axes.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: it can be read out, found and copied
    "svg.hashsalt": "curves",
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
THEME = {
    "#0072b2": "#56a9e8",
    "#8c6bb1": "#b99be0",
    "#8c564b": "#c9988d",
    "#009e73": "#2fc39b",
    "#d55e00": "#ff8336",
    "#222222": "#e6e6e6",
    "#444444": "#b4b8be",
    "#666666": "#9aa0a8",
    "#777777": "#8f959d",
    "#888888": "#9aa0a8",
    "#b0b0b0": "#6d737c",
    "#e6e6e6": "#343942",
    "#fdfdfd": "#1b1e24",
}
"""What is drawn in a colour on a light page, and in which one on a dark page."""


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_curves(
    path: str | Path, records: Records, results: Mapping[str, Any] | None = None, baseline: Records = ()
) -> None:
    """Four panels: loss terms, evaluation, curriculum weights, learning rate and gradient norm.

    Args:
        path: of the PNG file, replaced in one step.
        records: of metrics.jsonl.
        results: supplies the levels of teacher and initial student.
        baseline: records of the run without the teacher.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.6), layout="constrained")
        for panel, draw in zip(figure.subplots(2, 2).flat, _panels(records, results or {}, baseline), strict=True):
            draw(panel)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
        save(figure, path)


def curves_as_svg(records: Records, results: Mapping[str, Any], baseline: Records = ()) -> list[str]:
    """The same panels, each as an SVG element of its own, the evaluation first."""
    losses, evaluation, weights, optimisation = _panels(records, results, baseline)
    drawn = []
    with matplotlib.rc_context(STYLE):
        for draw in (evaluation, losses, weights, optimisation):
            figure = Figure(figsize=(5.6, 3.8), layout="constrained")
            draw(figure.subplots())
            drawn.append(_as_svg(figure))
    return drawn


def _panels(records: Records, results: Mapping[str, Any], baseline: Records) -> list[Callable[[Axes], None]]:
    """What draws each of the four panels."""
    steps = [record for record in records if "terms" in record]
    last = max(record["step"] for record in [*records, *baseline, {"step": 1}])

    def over_steps(draw: Callable[..., None], *arguments: Any) -> Callable[[Axes], None]:
        def draw_panel(panel: Axes) -> None:
            draw(panel, *arguments)
            panel.set_xlabel("optimizer step")
            panel.set_xlim(-0.015 * last, 1.015 * last)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

        return draw_panel

    return [
        over_steps(_draw_losses, steps),
        over_steps(_draw_evaluation, records, results, baseline),
        over_steps(_draw_weights, steps),
        over_steps(_draw_optimisation, steps),
    ]


def save(figure: Figure, path: str | Path) -> None:
    """As a PNG file, in one step: a reader sees the old picture or the new one."""
    beside = Path(path).with_suffix(".tmp.png")
    figure.savefig(beside, dpi=130)
    os.replace(beside, path)


def _as_svg(figure: Figure) -> str:
    """The element alone, as wide as there is room; the colours of `THEME` are variables named after them."""
    file = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # else it names the moment, and addresses
    figure.savefig(file, format="svg", facecolor="none", metadata=about)
    text = file.getvalue()
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text[text.index("<svg ") :], count=2)
    for light in THEME:
        text = text.replace(light, f"var(--c{light[1:]})")
    return text


def _draw_losses(panel: Axes, steps: Records) -> None:
    panel.set_title("Loss terms")
    if not steps:
        return _say_empty(panel)
    x, unlearned = [record["step"] for record in steps], False
    for name in _terms(steps):
        raw, weighted = (_series(steps, "terms", name, key) for key in ("raw", "weighted"))
        learned = any(value > 0 for value in _series(steps, "terms", name, "weight"))
        look = _marker(x) if learned else _MEASURED_ONLY
        panel.plot(x, raw, color=_COLOURS.get(name), label=_TERM_NAMES.get(name, name), **look)
        unlearned |= not learned
        if any(value > 0 for value in weighted if not math.isnan(value)):
            panel.plot(x, weighted, color=_COLOURS.get(name), linestyle=(0, (3, 2)), linewidth=1.2)
    panel.plot(x, _series(steps, "loss"), color="#222222", linewidth=2.2, label="total", **_marker(x))
    panel.plot([], [], color="#777777", linestyle=(0, (3, 2)), linewidth=1.2, label="weighted")
    if unlearned:
        panel.plot([], [], color="#777777", label="weight 0", **_MEASURED_ONLY)
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
            panel.plot(x, y, color=_COLOURS[key], label=f"{model_name(key, results)}  {y[-1]:.3f}", **_EVALUATION_LINE)
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
    window = panel.inset_axes((0.40, 0.35, 0.585, 0.33), facecolor="#FDFDFD")
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


# --- routing ----------------------------------------------------------------------------------------------------------


def draw_routing(path: str | Path, routing: Mapping[str, Any]) -> None:
    """A heat map of the teacher layers (columns) that each student layer (rows, the deepest on top) is matched with.

    Args:
        path: of the PNG file, replaced in one step.
        routing: `student_layers`, `teacher_layers` (numbers of the layers), `weights` (a row per student layer) and
            the `step` they were measured at.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        save(_routing_figure(routing), path)


def routing_as_svg(routing: Mapping[str, Any]) -> str:
    """The same as an SVG element."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        return _as_svg(_routing_figure(routing))


def _routing_figure(routing: Mapping[str, Any]) -> Figure:
    rows, columns = routing["student_layers"], routing["teacher_layers"]
    weights = np.array(routing["weights"], dtype=float)  # what metrics.jsonl has as null is NaN again
    most = np.nanmax(weights, initial=1e-3)
    size = (min(2.6 + 0.62 * max(len(columns), 6), 13), min(1.8 + 0.5 * max(len(rows), 3), 9))
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
    return figure
