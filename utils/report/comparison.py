"""Several runs side by side, from what they left: one table, the settings that differ, one picture.

No model is loaded. A run need not be finished; what it has logged so far is compared, and it is marked.
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

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#444444")


@dataclass(frozen=True)
class Run:
    """What a run has left so far."""

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
        """Of the student, by step."""
        return [record for record in self.records if "terms" not in record and record.get("bits_per_byte") is not None]

    @property
    def step(self) -> int:
        return max((record["step"] for record in self.records), default=0)

    @property
    def progress(self) -> float:
        """Share of the optimizer steps done."""
        return max((record["progress"] for record in self.records if "progress" in record), default=0.0)

    @property
    def state(self) -> str:
        """How it ended, if it did."""
        if self.report:
            return self.report["run"]["stopped_by"].replace("_", " ")
        return "unfinished" if self.progress < 1 else "no report"

    def bits(self, model: str) -> float | None:
        """Bits per byte of a model of the results; of the student the newest."""
        if model == "student" and not self.report:
            return self.evaluations[-1]["bits_per_byte"] if self.evaluations else None
        return ((self.report or self.start).get(model) or {}).get("bits_per_byte")

    @property
    def scored_bytes(self) -> int | None:
        """Of the text it is measured on."""
        return self.evaluations[-1].get("bytes") if self.evaluations else None

    @property
    def tokens_per_step(self) -> float | None:
        """Student's tokens that a step learns from: median of the logged ones, of which the last is short."""
        of_lm = [record["terms"]["lm"] for record in self.records if "lm" in record.get("terms", {})]
        counts = [term["count"] for term in of_lm if "count" in term]
        return statistics.median(counts) if counts else None


def compare(folders: Sequence[str], output: Path) -> None:
    """Print how runs compare, and draw it into `output`.

    Raises:
        UserError: folders that no run has left, or an `output` where nothing can be written.
    """
    runs = read_runs(folders)
    _make_folder(output)

    console().print(result_table(runs))
    if differing := differing_settings(runs):
        console().print(settings_table(runs, differing))
    for note in notes(runs):
        console().print(note)

    draw(output / PICTURE, runs)
    console().print(f"picture: {output / PICTURE}", soft_wrap=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise UserError(
            f"--output-dir {folder}: expected a folder for {PICTURE}, and there can be none ({reason}). Choose another "
            "--output-dir."
        ) from error


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in these folders.

    Raises:
        UserError: every folder that is none of a run.
    """
    problems = [f"  - {folder}: {problem}" for folder in folders if (problem := _problem(user_path(folder)))]
    if len(folders) < 2:
        problems.append(f"  - got {len(folders)} folder, and a comparison needs at least two")
    if problems:
        raise UserError("--compare expects the folders of runs, such as runs/quickstart:\n" + "\n".join(problems))
    paths = [user_path(folder).absolute() for folder in folders]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [_read(path.relative_to(shared).as_posix(), path) for path in paths]


def _problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return "no such folder" if not folder.exists() else "a file"
    if not (folder / METRICS).is_file():
        found = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob(f"*/{METRICS}"))
        return f"no {METRICS} in it" + (f"; runs in it: {', '.join(found)}" if found else "")
    return None


def _read(name: str, folder: Path) -> Run:
    """Read what a run has left; what is damaged counts as absent."""
    damaged: list[str] = []
    records = _records(folder / METRICS, damaged)
    report = _json(folder / REPORT_JSON, _Report, damaged)
    start = _json(folder / START, _Start, damaged)
    settings = _settings(folder, damaged)

    newest = max((record["step"] for record in records), default=0)
    if report and report["run"]["steps"] < newest:  # the run was continued after it
        report = {}

    return Run(name, records, report, start, settings, damaged)


def _json(file: Path, form: type[BaseModel], damaged: list[str]) -> dict[str, Any]:
    """Read a JSON file of this form; one that is damaged is empty, and told in `damaged`."""
    if not file.is_file():
        return {}

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        form.model_validate(content, strict=True)
    except (OSError, ValueError, RecursionError) as error:  # of pydantic, json and UTF-8
        damaged.append(f"{file.name} ({_reason(error)})")
        return {}
    return content


def _records(file: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """Read the records that can be used; a last line that a kill cut short is no damage."""
    records = read_lines(file)
    usable = [record for record in records if record is not None and _is_record(record)]

    if len(usable) < len(records):
        damaged.append(f"{file.name} ({len(records) - len(usable)} of {len(records)} records)")
    return usable


def _is_record(record: Mapping[str, Any]) -> bool:
    try:
        _Record.model_validate(record, strict=True)
    except ValidationError:
        return False
    return True


def _settings(folder: Path, damaged: list[str]) -> dict[str, Any]:
    try:
        return flatten(read_config(folder)[0])
    except UserError as error:
        damaged.append(f"{CONFIG} ({_reason(error)})")
        return {}


def _reason(error: Exception) -> str:
    """Say in one line what is wrong with a file."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return " ".join([".".join(map(str, first["loc"])), first["msg"]]).strip()
    return " ".join(str(error).split())


Count = Annotated[int, Ge(0), Le(10**15)]
Bits = Annotated[float, Gt(0), Le(1e9)]
"""Bits per byte; null where a run's was not finite."""
Seconds = Annotated[float, Ge(0), Le(1e10)]
"""Up to three hundred years."""


class _Read(BaseModel):
    """Base of what is read; its numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class _Scores(_Read):
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
    """What is read of baseline_evaluation.json."""

    teacher: _Scores | None = None
    initial_student: _Scores | None = None


class _Report(_Start):
    """What is read of evaluation_report.json."""

    student: _Scores | None = None
    retention: _Retention | None = None
    run: _RunSummary


class _Term(_Read):
    count: Annotated[float, Ge(0), Le(1e15)] = 0.0


class _Record(_Read):
    """What is read of a line of metrics.jsonl."""

    step: Count
    progress: Annotated[float, Ge(0), Le(1)] = 0.0
    terms: dict[str, _Term] = {}
    bits_per_byte: Bits | None = None
    bytes: Count | None = None


def result_table(runs: Sequence[Run]) -> Table:
    """A row for each run: share of the gap to the teacher closed and, where the runs are measured on the same text,
    change against the first one, with the best one in bold; 80 columns wide."""
    table = _table("Bits per byte on unseen text")
    table.add_column("run", overflow="fold", min_width=12)
    table.add_column("state", no_wrap=True)
    for column in ("step", "student", "change", "teacher", "closed", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    first, least = runs[0].bits("student"), min((bits for run in runs if (bits := run.bits("student"))), default=None)
    alike = len({*_sizes(runs).values()}) <= 1
    for run in runs:
        bits, seconds = run.bits("student"), run.report.get("run", {}).get("seconds")
        table.add_row(
            run.name,
            run.state,
            f"{run.step:,}" + ("" if run.report else f" ({run.progress:.0%})"),
            figure(bits),
            f"{bits / first - 1:+.1%}" if alike and run is not runs[0] and None not in (bits, first) else "",
            figure(run.bits("teacher")),
            percent((run.report.get("retention") or {}).get("gap_closed")),
            "-" if seconds is None else tqdm.format_interval(seconds),
            style="bold" if alike and bits is not None and bits == least else None,
        )
    return table


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Dotted key -> its value in each run, where those that tell theirs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in OWN_TO_A_RUN)
    shown = {key: [_shown(run.settings[key]) if key in run.settings else "?" for run in runs] for key in keys}
    return {key: values for key, values in shown.items() if len({*values} - {"?"}) > 1}


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def settings_table(runs: Sequence[Run], differing: Mapping[str, Sequence[str]]) -> Table:
    """A row for each setting that differs."""
    table = _table("Settings that differ")
    table.add_column("setting", no_wrap=True)
    for run in runs:
        table.add_column(run.name, overflow="fold")
    for key, values in differing.items():
        table.add_row(key, *values)
    return table


def _table(title: str) -> Table:
    look = {"box": box.SIMPLE_HEAD, "collapse_padding": True, "pad_edge": False}
    return Table(title=title, title_justify="left", title_style="bold", **look)


def notes(runs: Sequence[Run]) -> Iterable[str]:
    """What makes figures of these runs incomparable."""
    sizes = _sizes(runs)
    if len({*sizes.values()}) > 1:
        told = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        yield f"The runs are measured on different text (bytes: {told}): their bits per byte do not compare."
    lossy = {run.name: unspelt_share(run.report["student"]) for run in runs if run.report.get("student")}
    if told := [f"{name} {share:.1%}" for name, share in lossy.items() if share > MOST_UNSPELT]:
        yield f"Students whose tokens leave out part of the text have too few bits per byte: {', '.join(told)}."
    if silent := [run.name for run in runs if not run.evaluations]:
        yield f"Without an evaluation so far: {', '.join(silent)}."
    for run in runs:
        if run.damaged:
            yield f"Damaged in {run.name}, and left out: {'; '.join(run.damaged)}."
    if unknown := [run.name for run in runs if not run.settings]:
        yield f"Without a config.yaml, so with unknown settings: {', '.join(unknown)}."


def _sizes(runs: Sequence[Run]) -> dict[str, int]:
    """Bytes that each run is measured on; different ones mean different text."""
    return {run.name: run.scored_bytes for run in runs if run.scored_bytes is not None}


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Bits per byte of the students over steps and over tokens, with the teachers' levels."""
    with matplotlib.rc_context(STYLE):
        chart = Figure(figsize=(13, 4.8), layout="constrained")
        steps, tokens = chart.subplots(1, 2)
        lines, labels = [], []
        for place, run in enumerate(runs):
            style = {"color": _COLOURS[place % len(_COLOURS)], "marker": "o", "markersize": 3.5}
            dashes = "-" if run.report else (0, (4, 2))
            x, y = (
                [record["step"] for record in run.evaluations],
                [record["bits_per_byte"] for record in run.evaluations],
            )
            label = f"{run.name}  {figure(run.bits('student'), 3)}" + ("" if run.report else f" ({run.state})")
            lines += steps.plot(x, y, label=label, linestyle=dashes, **style)
            labels.append(label)
            if run.tokens_per_step is not None:
                tokens.plot([step * run.tokens_per_step for step in x], y, linestyle=dashes, **style)
        _finish(steps, runs, "optimizer step")
        _finish(tokens, runs, "student's tokens learned from (median of the logged steps x step)")
        # The lines by themselves: of its own accord a legend leaves out names that begin with an underscore.
        chart.legend(handles=lines, labels=labels, loc="outside lower center", ncols=min(len(runs), 3))
        save(chart, path)


def _finish(panel: Axes, runs: Sequence[Run], name: str) -> None:
    panel.set_title("Evaluation, bits per byte")
    panel.set_xlabel(name)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    levels: dict[float, list[Run]] = {}
    for run in runs:
        if (bits := run.bits("teacher")) is not None:
            levels.setdefault(round(bits, 2), []).append(run)
    for those in levels.values():
        level, whose = those[0].bits("teacher"), f" of {', '.join(run.name for run in those)}" * (len(levels) > 1)
        panel.axhline(level, color="#888888", linestyle=(0, (5, 3)), linewidth=1.2)
        panel.annotate(
            f"teacher{whose}  {level:.3f}",
            (0.985, level),
            xycoords=panel.get_yaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            horizontalalignment="right",
            color="#666666",
            fontsize=9,
        )
    panel.margins(y=0.09)
