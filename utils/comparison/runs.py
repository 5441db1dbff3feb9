"""Runs as their folders tell of them, finished or not.

Every file that is read is checked against a form first: a damaged one must not stop the comparison of the others.
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..config.plain import flatten
from ..config.yaml_files import read_config
from ..errors import UserError
from ..logs.records import is_evaluation, read_lines
from ..logs.terminal import printable
from ..paths import user_path
from ..run_layout import CONFIG, METRICS, REPORT_JSON, START
from .forms import RecordForm, ReportForm, StartForm

SEED = "training.seed"

WHOLE_ENDS = ("finished", "early_stopping")
"""Reasons of an end that follows from a run's settings; others (a limit of hours, a signal) cut a run short."""


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
        evaluations = [record for record in self.records if is_evaluation(record)]
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
    def seed(self) -> str:
        """Seed as text, whatever a config.yaml has in its place."""
        return json.dumps(self.settings.get(SEED), default=str)

    @property
    def is_whole(self) -> bool:
        """True of a run that has ended as its settings have it."""
        return bool(self.report) and self.report["run"]["stopped_by"] in WHOLE_ENDS

    @property
    def scored_bytes(self) -> int | None:
        """Bytes of the text that the student is measured on, with a finite figure or without."""
        sizes = [record["bytes"] for record in self.records if is_evaluation(record) and record.get("bytes")]
        return sizes[-1] if sizes else None

    @property
    def tokens_per_step(self) -> float | None:
        """Student tokens that a step learns from: the median of the logged steps, of which the last may be short."""
        counts = []
        for record in self.records:
            lm_term = record.get("terms", {}).get("lm", {})
            if "count" in lm_term:
                counts.append(lm_term["count"] + record.get("own_tokens", 0))
        return statistics.median(counts) if counts else None


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
    return [_read(printable(path.relative_to(shared).as_posix()), path) for path in paths]


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
    report = _json(folder / REPORT_JSON, ReportForm, damaged)
    start = _json(folder / START, StartForm, damaged)
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
        RecordForm.model_validate(record, strict=True)
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


def is_same_text(runs: Sequence[Run]) -> bool:
    """Return True if no two runs are measured on different text, as far as is known."""
    return len(set(sizes_of_text(runs).values())) <= 1


def sizes_of_text(runs: Sequence[Run]) -> dict[str, int]:
    """Return the bytes that each run is measured on; different ones mean different text."""
    return {run.name: run.scored_bytes for run in runs if run.scored_bytes is not None}
