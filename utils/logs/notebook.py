"""The panel of a run below the cell of a notebook: its state, curves, a table of steps and the last sample.

A saved notebook has the last state of it only, since the panel is drawn anew in place; and that has a bounded size
whatever the length of the run, since the table and the curves leave out what lies between.
"""

import uuid
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment

from ..errors import shorten
from ..spread import spread
from .lines import compact_number, sample_line, thousands

LAST_ROWS = 5
EARLIER_ROWS = 7
"""Rows of the table: the newest ones, and some of those before them."""

KEPT_ROWS = 600
"""Rows that are remembered; of more, every second of the earlier ones is forgotten."""

CURVE_POINTS = 120
"""Points of a curve, at most."""

SAMPLE_CHARACTERS = 400

CURVE_SIZE = (360, 130)
"""Pixels of a picture of a curve."""

_TEMPLATE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<div style="max-width: 60em">
<div>{{ state }}
{% if share is not none %}
<progress value="{{ share }}" max="1" style="width: 16em"></progress>
{% endif %}
</div>
{% if curves %}
<div>
{% for title, picture in curves %}
<img alt="{{ title }}" src="data:image/svg+xml;base64,{{ picture }}" style="display: inline-block">
{% endfor %}
</div>
{% endif %}
{% if rows %}
<div style="overflow-x: auto">
<table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for name in columns %}<td>{{ row[name] or "" }}</td>{% endfor %}</tr>
{% endfor %}
</table>
</div>
{% endif %}
{% if sample %}
<div style="overflow-wrap: anywhere"><i>{{ sample.prompt }}</i> {{ sample.text }}</div>
{% endif %}
</div>
"""
)

_CURVE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<svg xmlns="http://www.w3.org/2000/svg" width="{{ width }}" height="{{ height }}" font-family="sans-serif" \
font-size="11" fill="#888">
<text x="{{ left }}" y="12">{{ title }}</text>
<path d="M{{ left }} {{ top }}V{{ bottom }}H{{ right }}" fill="none" stroke="#888"/>
<text x="{{ left - 4 }}" y="{{ top + 9 }}" text-anchor="end">{{ highest }}</text>
<text x="{{ left - 4 }}" y="{{ bottom }}" text-anchor="end">{{ lowest }}</text>
<text x="{{ left }}" y="{{ bottom + 14 }}">{{ first }}</text>
<text x="{{ right }}" y="{{ bottom + 14 }}" text-anchor="end">step {{ last }}</text>
<polyline points="{{ points }}" fill="none" stroke="#3b82c4" stroke-width="1.5"/>
</svg>
"""
)


@dataclass
class StepRow:
    """All that the panel shows of a step."""

    step: int
    cells: dict[str, str] = field(default_factory=dict)
    """By the name of the column."""
    loss: float | None = None
    bits_per_byte: float | None = None
    """Of the evaluation at this step, if there was one."""


class Panel:
    """One display of a cell that is drawn anew in place; nothing is shown before there is something to show."""

    def __init__(self) -> None:
        self._id: str | None = None
        self._rows: list[StepRow] = []
        self._sample: Mapping[str, str] | None = None
        self._end = ""

    def begin(self) -> None:
        """Begin with the table of another training, below all that the cell has shown so far."""
        self._id = None
        self._rows = []
        self._sample = None
        self._end = ""

    def training(self, record: Mapping[str, Any], total_steps: int) -> None:
        """Take the record of a logged step."""
        row = self._row(record["step"])
        row.loss = record["loss"]
        row.cells["loss"] = compact_number(record["loss"])
        for name, term in record["terms"].items():
            if term["weight"] or term["weighted"]:
                row.cells[name] = compact_number(term["raw"])

        row.cells["lr"] = f"{record['lr']:.1e}"
        if record.get("tokens_per_second") is not None:
            row.cells["tokens/s"] = thousands(record["tokens_per_second"])
        self._end = f"step {record['step']:,} of {total_steps:,}"

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Take the record of an evaluation, and its sample."""
        row = self._row(record["step"])
        row.bits_per_byte = record["bits_per_byte"]
        row.cells["bits/byte"] = f"{record['bits_per_byte']:.4f}"
        self._sample = record.get("sample") or self._sample

    def draw(self, state: str, share: float) -> None:
        """Show the panel with what is being done.

        Args:
            state: of the work, in words.
            share: of the work that is done, from 0 to 1.
        """
        self._show(state, share)

    def rest(self) -> None:
        """Show the panel without work that is under way."""
        if self._rows or self._id is not None:
            self._show(self._end, None)

    # --- rows -------------------------------------------------------------------------------------------------------

    def _row(self, step: int) -> StepRow:
        """Return the row of a step; that of a new step is the last one."""
        if self._rows and self._rows[-1].step == step:
            return self._rows[-1]

        if len(self._rows) >= KEPT_ROWS:
            earlier = self._rows[:-LAST_ROWS]
            self._rows[:-LAST_ROWS] = earlier[::2]
        self._rows.append(StepRow(step))
        return self._rows[-1]

    def _shown_rows(self) -> list[StepRow]:
        """Return the rows of the table: the newest, and of those before them some, evaluated ones if there are any."""
        earlier = self._rows[:-LAST_ROWS]
        evaluated = [row for row in earlier if row.bits_per_byte is not None]
        if len(evaluated) >= EARLIER_ROWS // 2:
            earlier = evaluated
        return [*spread(earlier, EARLIER_ROWS), *self._rows[-LAST_ROWS:]]

    # --- drawing ----------------------------------------------------------------------------------------------------

    def _show(self, state: str, share: float | None) -> None:
        """Send the panel to the notebook, in the place that it has there."""
        from IPython.display import display, update_display

        content = {"text/html": self._html(state, share), "text/plain": self._plain(state)}
        if self._id is None:
            self._id = uuid.uuid4().hex
            display(content, raw=True, display_id=self._id)
        else:
            update_display(content, raw=True, display_id=self._id)

    def _html(self, state: str, share: float | None) -> str:
        rows = self._shown_rows()

        # A column stands where the first row that has it puts it; an evaluation is told last.
        names = [name for row in self._rows for name in row.cells if name != "bits/byte"]
        columns = ["step", *dict.fromkeys(names), "bits/byte"]

        sample = None
        if self._sample is not None:
            sample = {name: _flat(text, SAMPLE_CHARACTERS) for name, text in self._sample.items()}

        cells: list[Mapping[str, str]] = [{"step": f"{row.step:,}", **row.cells} for row in rows]
        return _TEMPLATE.render(
            state=state,
            share=None if share is None else f"{share:.3f}",
            curves=self._curves(),
            columns=columns,
            rows=cells,
            sample=sample,
        )

    def _curves(self) -> list[tuple[str, str]]:
        """Return title and picture of each curve of two points or more."""
        points = {
            "loss": [(row.step, row.loss) for row in self._rows if row.loss is not None],
            "bits per byte of unseen text": [
                (row.step, row.bits_per_byte) for row in self._rows if row.bits_per_byte is not None
            ],
        }
        curves = []
        for title, curve in points.items():
            finite = [(step, value) for step, value in curve if abs(value) < float("inf")]
            if len(finite) > 1:
                picture = draw_curve(title, spread(finite, CURVE_POINTS))
                curves.append((title, b64encode(picture.encode()).decode()))
        return curves

    def _plain(self, state: str) -> str:
        """Return the panel for readers that show no HTML."""
        lines = [state] if state else []
        for row in self._rows[-1:]:
            cells = " ".join(f"{name} {value}" for name, value in row.cells.items())
            lines.append(f"step {row.step} {cells}")
        if self._sample is not None:
            lines.append(sample_line(self._sample, SAMPLE_CHARACTERS))
        return "\n".join(lines)


def draw_curve(title: str, points: Sequence[tuple[int, float]]) -> str:
    """Return a curve as SVG, in colours that are seen on white and on black.

    Args:
        points: (step, value), two or more, in the order of steps.
    """
    width, height = CURVE_SIZE
    left, right, top, bottom = 48, width - 8, 20, height - 18
    first, last = points[0][0], points[-1][0]
    values = [value for _, value in points]
    lowest, highest = min(values), max(values)

    # A level curve lies at the bottom.
    x_scale = (right - left) / max(last - first, 1)
    y_scale = (bottom - top) / ((highest - lowest) or 1.0)
    places = [
        f"{left + (step - first) * x_scale:.0f},{bottom - (value - lowest) * y_scale:.1f}" for step, value in points
    ]
    return _CURVE.render(
        title=title,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        lowest=compact_number(lowest),
        highest=compact_number(highest),
        first=f"{first:,}",
        last=f"{last:,}",
        points=" ".join(places),
    )


def _flat(text: str, characters: int) -> str:
    """Return a text in one line of so many characters, at most."""
    return shorten(" ".join(text.split()), characters)
