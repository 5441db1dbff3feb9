"""The students' curves in one picture: over steps, and over the tokens that they learned from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..report.charts import STYLE, save
from ..report.results import figure
from .runs import Run

LEGEND_CHARACTERS = 150
"""Characters that the legend's columns have together, below the picture."""

# Okabe and Ito's palette without its yellow, which is too light for a line, and with a brown and a grey.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#444444")


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Draw bits per byte of the students over steps and over tokens, with the teachers' levels.

    Args:
        path: of the PNG file.
    """
    with matplotlib.rc_context(STYLE):
        chart = Figure(figsize=(13, 4.8), layout="constrained")
        over_steps, over_tokens = chart.subplots(1, 2)

        lines = []
        for place, run in enumerate(runs):
            lines += _draw_run(over_steps, over_tokens, run, _COLOURS[place % len(_COLOURS)])
        lines += _finish(over_steps, runs, "optimizer step")
        _finish(over_tokens, runs, "student's tokens learned from (median of the logged steps x step)")

        # The lines by themselves: of its own accord a legend leaves out names that begin with an underscore.
        labels = [line.get_label() for line in lines]
        columns = max(1, min(3, len(labels), LEGEND_CHARACTERS // max(map(len, labels))))
        chart.legend(handles=lines, labels=labels, loc="outside lower center", ncols=columns)
        save(chart, path)


def _draw_run(over_steps: Axes, over_tokens: Axes, run: Run, colour: str) -> list[Line2D]:
    """Draw the curve of one run into both panels, dashed without a report; returns its line over steps."""
    label = f"{run.name}  {figure(run.bits('student'), 3)}"
    dashes: Any = "-"
    if not run.report:
        label += f" ({run.state})"
        dashes = (0, (4, 2))

    # A run without a logged step has no count of tokens, and is drawn over steps alone.
    style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 3.5}
    steps = [record["step"] for record in run.evaluations]
    bits = [record["bits_per_byte"] for record in run.evaluations]
    lines = over_steps.plot(steps, bits, label=label, **style)
    if run.tokens_per_step is not None:
        over_tokens.plot([step * run.tokens_per_step for step in steps], bits, **style)
    return lines


def _finish(panel: Axes, runs: Sequence[Run], name: str) -> list[Line2D]:
    """Name the axes of a panel and draw the levels of the teachers; runs of one level share a line.

    Returns:
        the lines of the teachers; their names stand in the legend, where no curve runs through them.
    """
    panel.set_title("Evaluation, bits per byte")
    panel.set_xlabel(name)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))

    # Levels that look the same in the picture share a line, and a name.
    levels: dict[float, list[Run]] = {}
    for run in runs:
        bits = run.bits("teacher")
        if bits is not None:
            levels.setdefault(round(bits, 2), []).append(run)

    lines = []
    for place, group in enumerate(levels.values()):
        level = group[0].bits("teacher")
        owners = ""
        if len(levels) > 1:
            owners = f" of {', '.join(run.name for run in group)}"
        dashes = (0, (5, 3 + 3 * place))
        label = f"teacher{owners}  {level:.3f}"
        lines.append(panel.axhline(level, color="#888888", linestyle=dashes, linewidth=1.2, label=label))

    panel.margins(y=0.09)
    return lines
