"""Comparison of runs, from the files in their folders: one table, the settings that differ, one picture.

No model is loaded. A run need not be finished; its records so far are compared, and it is marked as unfinished. Every
file that is read is checked against a form first, since a damaged one must not stop the comparison of the others.
"""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import matplotlib
from annotated_types import Ge, Gt, Le
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from rich import box
from rich.table import Table
from tqdm import tqdm

from ..config.plain import flatten
from ..config.yaml_files import read_config
from ..errors import UserError
from ..evaluation.comparability import MOST_UNSPELT, unspelt_share
from ..logs.console import console
from ..logs.records import read_lines
from ..paths import user_path
from ..run_layout import CONFIG, METRICS, REPORT_JSON, START
from .charts import STYLE, save
from .results import figure, percent

PICTURE = "comparison.png"
OWN_TO_A_RUN = {"output_dir", "resume"}
"""Settings that differ in any two runs."""

MOST_SHOWN = 60
"""Characters of a setting's value."""

# Okabe and Ito's palette without its yellow, which is too light for a line, and with a brown and a grey.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#444444")


@dataclass(frozen=True)
class Run:
    """The files of one run, as far as they could be read."""

    name: str
    records: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any]
    """Empty without a report on the last step."""
    start: Mapping[str, Any]
    """Teacher and untrained student, measured before the first step; empty where there is none."""
    settings: Mapping[str, Any]
    """By dotted key; empty without a config.yaml."""
    damaged: Sequence[str] = ()
    """Files, or records, that are left out, each with what is wrong with it."""

    @cached_property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """Evaluations of the student, by step."""
        evaluations = [record for record in self.records if "terms" not in record]
        return [record for record in evaluations if record.get("bits_per_byte") is not None]

    @property
    def step(self) -> int:
        """Newest optimizer step in the records."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def progress(self) -> float:
        """Share of the optimizer steps done."""
        return max((record["progress"] for record in self.records if "progress" in record), default=0.0)

    @property
    def state(self) -> str:
        """Reason of the run's end, in words; or that there is no end yet, or no report."""
        if self.report:
            return self.report["run"]["stopped_by"].replace("_", " ")
        if self.progress < 1:
            return "unfinished"
        return "no report"

    def bits(self, model: str) -> float | None:
        """Return the bits per byte of a model of the results; of a student without a report the newest."""
        if model == "student" and not self.report:
            return self.evaluations[-1]["bits_per_byte"] if self.evaluations else None

        results = self.report or self.start
        return (results.get(model) or {}).get("bits_per_byte")

    @property
    def scored_bytes(self) -> int | None:
        """Bytes of the text that the student is measured on."""
        return self.evaluations[-1].get("bytes") if self.evaluations else None

    @property
    def tokens_per_step(self) -> float | None:
        """Student tokens that a step learns from: the median of the logged steps, of which the last may be short."""
        counts = []
        for record in self.records:
            lm_term = record.get("terms", {}).get("lm", {})
            if "count" in lm_term:
                counts.append(lm_term["count"])
        return statistics.median(counts) if counts else None


def compare(folders: Sequence[str], output: Path) -> None:
    """Print the comparison of runs, and draw it into `output`.

    Args:
        folders: of the runs, at least two.

    Raises:
        UserError: a folder that is not a run's, or an `output` where nothing can be written.
    """
    runs = read_runs(folders)
    # Before anything is printed: a folder that cannot be made ends the command with one message.
    _make_folder(output)

    console().print(result_table(runs))
    if differing := differing_settings(runs):
        console().print(settings_table(runs, differing))
    for note in notes(runs):
        console().print(note)

    draw(output / PICTURE, runs)
    console().print(f"picture: {output / PICTURE}", soft_wrap=True)


def _make_folder(folder: Path) -> None:
    """Make the folder of the picture, or raise a UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise UserError(
            f"--output-dir {folder}: expected a folder for {PICTURE}, and there can be none ({reason}). Choose another "
            "--output-dir."
        ) from error


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read the runs in these folders.

    Raises:
        UserError: names every folder that is not a run's.
    """
    problems = []
    for folder in folders:
        if problem := _problem(user_path(folder)):
            problems.append(f"  - {folder}: {problem}")
    if len(folders) < 2:
        problems.append(f"  - got {len(folders)} folder, and a comparison needs at least two")
    if problems:
        raise UserError("--compare expects the folders of runs, such as runs/quickstart:\n" + "\n".join(problems))

    # A run is called by as much of its path as tells it from the others.
    paths = [user_path(folder).absolute() for folder in folders]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [_read(path.relative_to(shared).as_posix(), path) for path in paths]


def _problem(folder: Path) -> str | None:
    """Return why a folder is not a run's; None if it is."""
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file"
    if (folder / METRICS).is_file():
        return None

    # The folder of several runs is an easy mistake, so they are named.
    runs = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(f"*/{METRICS}"))
    if runs:
        return f"no {METRICS} in it; runs in it: {', '.join(runs)}"
    return f"no {METRICS} in it"


def _read(name: str, folder: Path) -> Run:
    """Read the files of a run; a damaged one counts as absent."""
    damaged: list[str] = []
    records = _records(folder / METRICS, damaged)
    report = _json(folder / REPORT_JSON, _Report, damaged)
    start = _json(folder / START, _Start, damaged)
    settings = _settings(folder, damaged)

    # A run that was continued after its report has none on its last step.
    newest = max((record["step"] for record in records), default=0)
    if report and report["run"]["steps"] < newest:
        report = {}

    return Run(name, records, report, start, settings, damaged)


def _json(file: Path, form: type[BaseModel], damaged: list[str]) -> dict[str, Any]:
    """Read a JSON file of this form; a damaged one is empty, and is added to `damaged`."""
    if not file.is_file():
        return {}

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        # Strict: a number in quotes is damage, and would fail later in arithmetic.
        form.model_validate(content, strict=True)
    except (OSError, ValueError, RecursionError) as error:  # ValueError of pydantic, json and UTF-8
        damaged.append(f"{file.name} ({_reason(error)})")
        return {}
    return content


def _records(file: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """Read the records that can be used; a last line that a kill cut short is no damage."""
    # A line that is no JSON is None, but for the last one, which is left out.
    records = read_lines(file)
    usable = [record for record in records if record is not None and _is_record(record)]

    if len(usable) < len(records):
        damaged.append(f"{file.name} ({len(records) - len(usable)} of {len(records)} records)")
    return usable


def _is_record(record: Mapping[str, Any]) -> bool:
    """Return True if a record has the form of a line of metrics.jsonl."""
    try:
        _Record.model_validate(record, strict=True)
    except ValidationError:
        return False
    return True


def _settings(folder: Path, damaged: list[str]) -> dict[str, Any]:
    """Read the settings of a run by dotted key; a damaged config.yaml is empty, and is added to `damaged`."""
    try:
        return flatten(read_config(folder)[0])
    except UserError as error:
        damaged.append(f"{CONFIG} ({_reason(error)})")
        return {}


def _reason(error: Exception) -> str:
    """Return in one line what is wrong with a file."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place} {first['msg']}".strip()
    return " ".join(str(error).split())


# ------------------------------------------------------------------------------- forms of the files


Count = Annotated[int, Ge(0), Le(10**15)]
Bits = Annotated[float, Gt(0), Le(1e9)]
"""Bits per byte; null where a run's was not finite."""
Seconds = Annotated[float, Ge(0), Le(1e10)]
"""Up to three hundred years."""


class _Read(BaseModel):
    """Base of all forms; numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class _Scores(_Read):
    """Scores of one model."""

    bits_per_byte: Bits | None = None
    bytes: Count | None = None
    unspelt_bytes: Count = 0

    @model_validator(mode="after")
    def _has_a_share(self) -> "_Scores":
        if self.unspelt_bytes > (self.bytes or 0):
            raise ValueError(f"unspelt_bytes: got {self.unspelt_bytes}, expected at most bytes ({self.bytes})")
        return self


class _RunSummary(_Read):
    steps: Count
    seconds: Seconds | None = None
    stopped_by: str


class _Retention(_Read):
    gap_closed: Annotated[float, Ge(-1e9), Le(1e9)] | None = None


class _Start(_Read):
    """Fields that are read of baseline_evaluation.json."""

    teacher: _Scores | None = None
    initial_student: _Scores | None = None


class _Report(_Start):
    """Fields that are read of evaluation_report.json."""

    student: _Scores | None = None
    retention: _Retention | None = None
    run: _RunSummary


class _Term(_Read):
    count: Annotated[float, Ge(0), Le(1e15)] = 0.0


class _Record(_Read):
    """Fields that are read of a line of metrics.jsonl."""

    step: Count
    progress: Annotated[float, Ge(0), Le(1)] = 0.0
    terms: dict[str, _Term] = {}
    bits_per_byte: Bits | None = None
    bytes: Count | None = None


# ------------------------------------------------------------------------------------------- tables


def result_table(runs: Sequence[Run]) -> Table:
    """Return a table with a row for each run, 80 columns wide.

    It has the share of the gap to the teacher closed and, where the runs are measured on the same text, the change
    against the first one, with the best one in bold.
    """
    table = _table("Bits per byte on unseen text")
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    for column in ("step", "student", "change", "teacher", "closed", "time"):
        table.add_column(column, justify="right", no_wrap=True)

    # Bits per byte compare only on the same text.
    first = runs[0].bits("student")
    measured = [run.bits("student") for run in runs if run.bits("student") is not None]
    least = min(measured, default=None)
    is_same_text = len(set(_sizes(runs).values())) <= 1

    for run in runs:
        bits = run.bits("student")
        is_best = is_same_text and bits is not None and bits == least
        has_change = is_same_text and run is not runs[0]
        table.add_row(
            run.name,
            run.state,
            _step(run),
            figure(bits),
            _change(bits, first) if has_change else "",
            figure(run.bits("teacher")),
            percent((run.report.get("retention") or {}).get("gap_closed")),
            _time(run),
            style="bold" if is_best else None,
        )
    return table


def _step(run: Run) -> str:
    """Return the newest step of a run, and its progress where there is no report yet."""
    if run.report:
        return f"{run.step:,}"
    return f"{run.step:,} ({run.progress:.0%})"


def _change(bits: float | None, first: float | None) -> str:
    """Return the relative change of bits per byte against the first run; nothing where one of them is unknown."""
    if bits is None or first is None:
        return ""
    return f"{bits / first - 1:+.1%}"


def _time(run: Run) -> str:
    """Return the duration of a finished run."""
    seconds = run.report.get("run", {}).get("seconds")
    return "-" if seconds is None else tqdm.format_interval(seconds)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ.

    Returns:
        dotted key -> its value in each run; `?` for a run that does not have it, which alone makes no difference.
    """
    # A dict as an ordered set: the order of the settings in config.yaml.
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in OWN_TO_A_RUN)

    differing = {}
    for key in keys:
        values = [_shown(run.settings[key]) if key in run.settings else "?" for run in runs]
        if len(set(values) - {"?"}) > 1:
            differing[key] = values
    return differing


def _shown(value: Any) -> str:
    """Return the value of a setting as text, cut where it is long."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def settings_table(runs: Sequence[Run], differing: Mapping[str, Sequence[str]]) -> Table:
    """Return a table with a row for each setting that differs, and a column for each run."""
    table = _table("Settings that differ")
    table.add_column("setting", no_wrap=True)
    for run in runs:
        table.add_column(run.name, overflow="fold")

    for key, values in differing.items():
        table.add_row(key, *values)
    return table


def _table(title: str) -> Table:
    """Return an empty table in the look of the comparison."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )


def notes(runs: Sequence[Run]) -> Iterable[str]:
    """Yield a sentence for everything that makes figures of these runs incomparable."""
    # The size of the text stands for the text: other text has hardly ever the same number of bytes.
    sizes = _sizes(runs)
    if len(set(sizes.values())) > 1:
        named = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        yield f"The runs are measured on different text (bytes: {named}): their bits per byte do not compare."

    if lossy := _lossy_students(runs):
        yield f"Students whose tokens leave out part of the text have too few bits per byte: {', '.join(lossy)}."

    if silent := [run.name for run in runs if not run.evaluations]:
        yield f"Without an evaluation so far: {', '.join(silent)}."

    for run in runs:
        if run.damaged:
            yield f"Damaged in {run.name}, and left out: {'; '.join(run.damaged)}."

    if without_settings := [run.name for run in runs if not run.settings]:
        yield f"Without a config.yaml, so with unknown settings: {', '.join(without_settings)}."


def _lossy_students(runs: Sequence[Run]) -> list[str]:
    """Return the runs whose student's tokens leave out too much of the text, with the share."""
    shares = {}
    for run in runs:
        if student := run.report.get("student"):
            shares[run.name] = unspelt_share(student)
    return [f"{name} {share:.1%}" for name, share in shares.items() if share > MOST_UNSPELT]


def _sizes(runs: Sequence[Run]) -> dict[str, int]:
    """Return the bytes that each run is measured on; different ones mean different text."""
    return {run.name: run.scored_bytes for run in runs if run.scored_bytes is not None}


# ------------------------------------------------------------------------------------------ picture


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
        _finish(over_steps, runs, "optimizer step")
        _finish(over_tokens, runs, "student's tokens learned from (median of the logged steps x step)")

        # The lines by themselves: of its own accord a legend leaves out names that begin with an underscore.
        labels = [line.get_label() for line in lines]
        chart.legend(handles=lines, labels=labels, loc="outside lower center", ncols=min(len(runs), 3))
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


def _finish(panel: Axes, runs: Sequence[Run], name: str) -> None:
    """Name the axes of a panel and draw the levels of the teachers; runs of one level share a line."""
    panel.set_title("Evaluation, bits per byte")
    panel.set_xlabel(name)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))

    # Levels that look the same in the picture share a line, and a label.
    levels: dict[float, list[Run]] = {}
    for run in runs:
        bits = run.bits("teacher")
        if bits is not None:
            levels.setdefault(round(bits, 2), []).append(run)

    for group in levels.values():
        level = group[0].bits("teacher")
        owners = ""
        if len(levels) > 1:
            owners = f" of {', '.join(run.name for run in group)}"
        _draw_level(panel, level, f"teacher{owners}  {level:.3f}")

    panel.margins(y=0.09)


def _draw_level(panel: Axes, level: float, label: str) -> None:
    """Draw a dashed line across a panel, with its label above the right end."""
    panel.axhline(level, color="#888888", linestyle=(0, (5, 3)), linewidth=1.2)
    panel.annotate(
        label,
        (0.985, level),
        xycoords=panel.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        horizontalalignment="right",
        color="#666666",
        fontsize=9,
    )
