"""Pictures of a run, as PNG files and as SVG elements: curves of its training, and the router's match of layers.

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
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..logs.records import is_evaluation, is_own_text, is_training
from .results import model_name

Records = Sequence[Mapping[str, Any]]

MOST_NUMBERS = 12
"""Teacher layers up to which the cells of the routing have their numbers in them."""

FEW_POINTS = 12
"""Points of a curve up to which each has a marker."""

MAGNIFIED_SHARE = 0.2
"""Share of the panel's range below which the ends of two curves are drawn once more, magnified."""

WIDE_RANGE = 30
"""Ratio of largest to smallest value above which an axis is logarithmic: KD at a high temperature falls that far."""

_NOT_THE_STUDENT = ("teacher", "initial_student")
"""Splits of evaluation records that are not of what is trained."""

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
# Okabe and Ito's palette, whose colours most colour-blind readers can tell apart; two more for the router's terms.
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
_SCHEDULED = {
    "temperature": "#999933",
    "skew": "#44AA99",
    "interpolation": "#882255",
    "select": "#117733",
    "open_text": "#661100",
    "sample_weights": "#AA4499",
    "sample_spread": "#CC6677",
}
"""Scalars that may follow the run's progress beside the weights, and their colours."""
_MEASURED_ONLY = {"linestyle": (0, (1, 1.6)), "linewidth": 1.4, "alpha": 0.6}
"""Line of a term that never weighs anything: it is measured, and nothing is learned from it."""
_WEIGHTED = {"linestyle": (0, (3, 2)), "linewidth": 1.2}
"""Line of a term times its weight."""
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
"""Colour on a light page -> colour of the same thing on a dark page."""


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_curves(
    path: str | Path, records: Records, results: Mapping[str, Any] | None = None, baseline: Records = ()
) -> None:
    """Draw the panels: evaluation, loss terms, curriculum weights, learning rate and gradient norm.

    Args:
        path: of the PNG file, replaced in one step.
        records: of metrics.jsonl.
        results: supplies the levels of teacher and initial student.
        baseline: records of the run without the teacher.
    """
    panels = _panels(records, results or {}, baseline)
    rows = [["losses", "evaluation"], ["weights", "optimisation"]]
    if "evaluation_end" in panels:
        rows = [["losses"] * 3 + ["evaluation"] * 3, ["evaluation_end"] * 2 + ["weights"] * 2 + ["optimisation"] * 2]

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.6), layout="constrained")
        for name, axes in figure.subplot_mosaic(rows).items():
            panels[name](axes)

        # Some space between the panels: one has a second axis on its right.
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
        save(figure, path)


def curves_as_svg(records: Records, results: Mapping[str, Any], baseline: Records = ()) -> list[str]:
    """Return the same panels, each as an SVG element of its own."""
    elements = []
    with matplotlib.rc_context(STYLE):
        for draw in _panels(records, results, baseline).values():
            figure = Figure(figsize=(5.6, 3.8), layout="constrained")
            draw(figure.subplots())
            elements.append(_as_svg(figure))
    return elements


DrawPanel = Callable[[Axes], None]


def _panels(records: Records, results: Mapping[str, Any], baseline: Records) -> dict[str, DrawPanel]:
    """Return the functions that draw the panels, by name, all but the magnified one over the same range of steps."""
    steps = [record for record in records if is_training(record)]
    last = max([1, *(record["step"] for record in [*records, *baseline])])
    curves = _evaluation_curves(records, baseline)
    levels = {key: (results.get(key) or {}).get("bits_per_byte") for key in ("initial_student", "teacher")}

    def over_steps(draw: Callable[..., None], first: float = 0, **data: Any) -> DrawPanel:
        def draw_panel(panel: Axes) -> None:
            draw(panel, **data)
            panel.set_xlabel("optimizer step")
            margin = 0.015 * (last - first)
            panel.set_xlim(first - margin, last + margin)
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.xaxis.set_major_formatter(FuncFormatter(_with_commas))

        return draw_panel

    panels = {"evaluation": over_steps(_draw_evaluation, curves=curves, levels=levels, results=results)}
    if end := _end_worth_magnifying(curves, levels):
        first = min(x[0] for x, _ in end.values())
        panels["evaluation_end"] = over_steps(_draw_evaluation_end, first, curves=end, results=results)
    panels["losses"] = over_steps(_draw_losses, steps=steps)
    own_text = [record for record in records if is_own_text(record)]
    panels["weights"] = over_steps(_draw_weights, steps=steps, own_text=own_text)
    panels["optimisation"] = over_steps(_draw_optimisation, steps=steps)
    return panels


def save(figure: Figure, path: str | Path) -> None:
    """Write a PNG file in one step: a reader sees the old picture or the new one."""
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=130)
    os.replace(temporary, path)


def _as_svg(figure: Figure) -> str:
    """Return a figure as an SVG element, as wide as its container; the colours of `THEME` are variables."""
    # Without this matplotlib names the moment and some addresses, and no two files are equal.
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none", metadata=no_metadata)

    # The element alone, without the XML declaration, and without the width and height in points.
    text = file.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", text, count=2)

    for light in THEME:
        text = text.replace(light, f"var(--c{light[1:]})")
    return text


# --- panels -----------------------------------------------------------------------------------------------------------


def _draw_losses(panel: Axes, steps: Records) -> None:
    """Draw every term as it is and times its weight, and the total."""
    panel.set_title("Loss terms")
    if not steps:
        _say_empty(panel)
        return

    x = [record["step"] for record in steps]
    has_unlearned = False
    for name in _terms(steps):
        is_learned = _weighs_anything(steps, name)
        look = _marker(x) if is_learned else _MEASURED_ONLY
        raw = _series(steps, "terms", name, "raw")
        panel.plot(x, raw, **_term_style(name), **look)
        has_unlearned |= not is_learned

        # A comparison with NaN is False, so gaps count as nothing.
        weighted = _series(steps, "terms", name, "weighted")
        if any(value > 0 for value in weighted):
            panel.plot(x, weighted, color=_COLOURS.get(name), **_WEIGHTED)

    total = _series(steps, "loss")
    panel.plot(x, total, color="#222222", linewidth=2.2, label="total", **_marker(x))

    # Two lines without points, for the legend.
    panel.plot([], [], color="#777777", label="weighted", **_WEIGHTED)
    if has_unlearned:
        panel.plot([], [], color="#777777", label="weight 0", **_MEASURED_ONLY)

    _logarithmic_if_wide(panel)
    _legend_above(panel, columns=4)


def _draw_weights(panel: Axes, steps: Records, own_text: Records = ()) -> None:
    """Draw the weights of all terms that weigh anything, what else changes with them, and the share of own text."""
    panel.set_title("Curriculum weights")
    if not steps:
        _say_empty(panel)
        return

    x = [record["step"] for record in steps]
    names = [name for name in _terms(steps) if _weighs_anything(steps, name)]
    for order, name in enumerate(names):
        y = _series(steps, "terms", name, "weight")
        # Later lines are thinner, so that of two equal ones both are seen.
        width = max(3.6 - 0.7 * order, 1.4)
        panel.plot(x, y, **_term_style(name), linewidth=width)

    for name, colour in _SCHEDULED.items():
        values = [record.get(name) for record in steps]
        if None not in values and len(set(values)) > 1:
            panel.plot(x, values, color=colour, linestyle="--", label=name.replace("_", " "))

    # Of each round, until the next one begins.
    if own_text:
        rounds = [record["step"] for record in own_text]
        share = _series(own_text, "share")
        panel.plot(rounds, share, color="#222222", linestyle=":", drawstyle="steps-post", label="share of own text")

    panel.set_ylim(0, max(panel.get_ylim()[1], 1e-3))
    _legend_above(panel, columns=4)


def _draw_optimisation(panel: Axes, steps: Records) -> None:
    """Draw the learning rate, and behind it, on an axis of its own, the gradient norm."""
    panel.set_title("Learning rate and gradient norm")
    if not steps:
        _say_empty(panel)
        return

    right = panel.twinx()
    right.spines["right"].set_visible(True)
    right.grid(False)

    x = [record["step"] for record in steps]
    norms = _series(steps, "grad_norm")
    rates = _series(steps, "lr")
    [norm] = right.plot(x, norms, color="#B0B0B0", linewidth=1.2, label="gradient norm (right)")
    [rate] = panel.plot(x, rates, color="#0072B2", linewidth=2.0, label="learning rate", **_marker(x))

    # The learning rate in front; its panel's background would hide the norm.
    panel.set_zorder(right.get_zorder() + 1)
    panel.patch.set_visible(False)

    panel.yaxis.set_major_formatter(FuncFormatter(_scientific))
    panel.set_ylim(bottom=0)
    _logarithmic_if_wide(right)
    _legend_above(panel, columns=2, handles=[rate, norm])


Curves = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Model -> steps, and its bits per byte at each."""


def _evaluation_curves(records: Records, baseline: Records) -> Curves:
    """Return the curves of the student with and without the teacher, as far as they were measured."""
    # The baseline first, so that the student's curve lies above it.
    curves = {}
    for key, run in (("baseline", baseline), ("student", records)):
        points = [(record["step"], record["bits_per_byte"]) for record in run if _is_of_student(record)]
        if points:
            x, y = zip(*points, strict=True)
            curves[key] = (x, y)
    return curves


def _draw_evaluation(
    panel: Axes, curves: Curves, levels: Mapping[str, float | None], results: Mapping[str, Any]
) -> None:
    """Draw bits per byte of the student with and without the teacher, and the levels of the other models."""
    panel.set_title("Evaluation, bits per byte")
    if not curves and levels["teacher"] is None:
        _say_empty(panel)
        return

    for key, level in levels.items():
        if level is not None:
            label = f"{model_name(key, results)}  {level:.3f}"
            panel.axhline(level, color=_COLOURS[key], linestyle=(0, (5, 3)), linewidth=1.4, label=label)
    _draw_students(panel, curves, results)
    panel.margins(y=0.09)
    _legend_above(panel, columns=1)


def _draw_evaluation_end(panel: Axes, curves: Curves, results: Mapping[str, Any]) -> None:
    """Draw the last half of the curves once more, where the whole range hides their difference."""
    panel.set_title("Last half of the evaluation")
    _draw_students(panel, curves, results)
    panel.margins(y=0.15)
    _legend_above(panel, columns=1)


def _draw_students(panel: Axes, curves: Curves, results: Mapping[str, Any]) -> None:
    """Draw the curves of the students; each is named with its last figure."""
    for key, (x, y) in curves.items():
        label = f"{model_name(key, results)}  {y[-1]:.3f}"
        panel.plot(x, y, color=_COLOURS[key], label=label, **_EVALUATION_LINE)


def _end_worth_magnifying(curves: Curves, levels: Mapping[str, float | None]) -> Curves | None:
    """Return the last half of the curves where they differ by little of the whole range; None where they do not."""
    last = max((x[-1] for x, _ in curves.values()), default=0)
    ends = {}
    for key, (x, y) in curves.items():
        points = [(step, bits) for step, bits in zip(x, y, strict=True) if step >= last / 2]
        # Two points make no curve.
        if len(points) >= 3:
            steps, values = zip(*points, strict=True)
            ends[key] = (steps, values)

    # One curve has nothing to differ from.
    if len(ends) < 2:
        return None
    at_end = [bits for _, y in ends.values() for bits in y]
    anywhere = [bits for _, y in curves.values() for bits in y]
    anywhere += [level for level in levels.values() if level is not None]
    is_hidden = max(at_end) - min(at_end) <= MAGNIFIED_SHARE * (max(anywhere) - min(anywhere))
    return ends if is_hidden else None


def _legend_above(panel: Axes, columns: int, handles: Sequence[Any] | None = None) -> None:
    """Put the legend between title and panel, where no curve can run through it.

    Args:
        handles: lines to name; None: all that have a label.
    """
    if handles is None:
        handles = panel.get_legend_handles_labels()[0]

    # The title moves up by as many rows as the legend has.
    rows = math.ceil(len(handles) / columns)
    size = matplotlib.rcParams["legend.fontsize"]
    legend = panel.legend(
        handles=handles,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.3,
        borderpad=0.1,
        columnspacing=1.4,
        handlelength=1.8,
        labelspacing=0.3,
    )
    panel.set_title(panel.get_title(loc="left"), pad=8 + 1.35 * size * rows)

    # Its space is that of the title; as a part of the layout a wide legend would make the panel narrow.
    legend.set_in_layout(False)


# --- series and axes --------------------------------------------------------------------------------------------------


def _is_of_student(record: Mapping[str, Any]) -> bool:
    """Return True for an evaluation of what is trained, not of the teacher or of the start."""
    if not is_evaluation(record) or record["bits_per_byte"] is None:
        return False
    return record.get("split") not in _NOT_THE_STUDENT


def _terms(steps: Records) -> list[str]:
    """Return the terms that occur, those with a label first in their usual order."""
    names = {name for record in steps for name in record["terms"]}
    labelled = [name for name in _TERM_NAMES if name in names]
    return labelled + sorted(names - _TERM_NAMES.keys())


def _term_style(name: str) -> dict[str, Any]:
    """Return colour and label of a term's line; a term unknown here is called by its name."""
    return {"color": _COLOURS.get(name), "label": _TERM_NAMES.get(name, name)}


def _weighs_anything(steps: Records, name: str) -> bool:
    return any(value > 0 for value in _series(steps, "terms", name, "weight"))


def _series(steps: Records, *keys: str) -> list[float]:
    """Return one value per record; NaN, which is a gap in a line, where there is none."""
    values = []
    for record in steps:
        value: Any = record
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        values.append(math.nan if value is None else float(value))
    return values


def _marker(x: Sequence[int]) -> dict[str, Any]:
    """Return the look of a short curve, whose points are shown as points."""
    return {"marker": "o", "markersize": 3.5} if len(x) <= FEW_POINTS else {}


def _logarithmic_if_wide(panel: Axes) -> None:
    """Make an axis logarithmic if its lines span a wide range."""
    values = []
    for line in panel.get_lines():
        values += [value for value in line.get_ydata() if _is_positive(value)]
    if not values:
        return

    least = min(values)
    most = max(values)
    if most / least > WIDE_RANGE:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(FuncFormatter(_plain))
        # Four decades at most: a single value near 0 must not press the curves into a line.
        panel.set_ylim(bottom=max(least, most / 1e4) * 0.8, top=most * 1.3)
    else:
        panel.set_ylim(bottom=0, top=1.06 * most)


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _with_commas(value: float, position: int) -> str:
    """Return a tick's label such as 1,000; matplotlib also gives the tick's number."""
    return f"{value:,.0f}"


def _plain(value: float, position: int) -> str:
    """Return a tick's label such as 0.001, also on a logarithmic axis."""
    return f"{value:g}"


def _scientific(value: float, position: int) -> str:
    """Return a tick's label such as 2.5e-4: a learning rate."""
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def _say_empty(panel: Axes) -> None:
    panel.text(0.5, 0.5, "nothing was logged", transform=panel.transAxes, ha="center", color="#888888")


# --- routing ----------------------------------------------------------------------------------------------------------


def draw_routing(path: str | Path, routing: Mapping[str, Any]) -> None:
    """Draw the router's match of layers as a heat map.

    A row is a student layer, the deepest on top; a column is a teacher layer.

    Args:
        path: of the PNG file, replaced in one step.
        routing: `student_layers`, `teacher_layers` (numbers of the layers), `weights` (a row per student layer) and
            the `step` they were measured at.
    """
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        save(_routing_figure(routing), path)


def routing_as_svg(routing: Mapping[str, Any]) -> str:
    """Return the same heat map as an SVG element."""
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        return _as_svg(_routing_figure(routing))


def _routing_figure(routing: Mapping[str, Any]) -> Figure:
    """Return the heat map, larger for deeper models, with numbers in its cells where they have space."""
    rows = routing["student_layers"]
    columns = routing["teacher_layers"]
    # In metrics.jsonl a NaN is null, which becomes NaN again here.
    weights = np.array(routing["weights"], dtype=float)
    most = np.nanmax(weights, initial=1e-3)

    width = min(2.6 + 0.62 * max(len(columns), 6), 13)
    height = min(1.8 + 0.5 * max(len(rows), 3), 9)
    figure = Figure(figsize=(width, height), layout="constrained")
    panel = figure.subplots()
    # From nothing to blue, so that the picture has the colour of the page, light or dark.
    shares = LinearSegmentedColormap.from_list("shares", ["#2171b500", "#2171b5ff"])
    image = panel.imshow(weights, cmap=shares, vmin=0, vmax=most, origin="lower", aspect="auto")

    panel.set_title(f"Routing at step {routing['step']:,}")
    for axis, layers, name in ((panel.xaxis, columns, "teacher layer"), (panel.yaxis, rows, "student layer")):
        axis.set_ticks(range(len(layers)), [str(layer) for layer in layers])
        axis.set_tick_params(length=0)
        axis.set_label_text(name)

    if len(columns) <= MOST_NUMBERS:
        for (y, x), share in np.ndenumerate(weights):
            colour = "white" if share > 0.55 * most else "#222222"
            panel.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=9, color=colour)

    figure.colorbar(image, ax=panel, label="share of the mixture").outline.set_visible(False)
    return figure
