"""Comparison of runs, from the files in their folders: tables, the settings that differ, one picture.

No model is loaded. A run need not be finished; its records so far are compared, and it is marked as unfinished. Every
file that is read is checked against a form first, since a damaged one must not stop the comparison of the others.
"""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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

from ..config import resume_rules
from ..config.plain import flatten
from ..config.yaml_files import read_config
from ..errors import UserError
from ..evaluation.comparability import MOST_UNSPELT, unspelt_share
from ..files import write_text
from ..logs.console import console
from ..logs.records import is_evaluation, read_lines
from ..logs.terminal import printable
from ..paths import user_path
from ..run_layout import CONFIG, METRICS, REPORT_JSON, START
from .charts import STYLE, save
from .results import MODELS, figure, percent

if TYPE_CHECKING:
    import pandas as pd

PICTURE = "comparison.png"

NAMES_OF_SOURCES = {"teacher.name", "student.name", "data.train"}
IMPORTANT = NAMES_OF_SOURCES | resume_rules.MICRO_BATCH | resume_rules.AS_ASKED_FOR | {"training.max_hours"}
"""Settings that results depend on although a resumed run may have others."""

UNIMPORTANT = resume_rules.FREE_TO_CHANGE - IMPORTANT
"""Settings, or whole sections, that no result depends on."""

OWN_TO_A_RUN = {"output_dir", "resume"}
"""Settings that differ in any two runs."""

SEED = "training.seed"

WHOLE_ENDS = ("finished", "early_stopping")
"""Reasons of an end that follows from a run's settings; others (a limit of hours, a signal) cut a run short."""

MOST_SHOWN = 60
"""Characters of a setting's value."""

LONG_NAME = 14
"""Characters of a run's name up to which the table has space for all columns."""

T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t distribution with 1, 2, ... 30 degrees of freedom; above, the normal's is near."""

LEGEND_CHARACTERS = 150
"""Characters that the legend's columns have together, below the picture."""

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


def compare(folders: Sequence[str], output: Path, table: Path | None = None) -> None:
    """Print the comparison of runs, and draw it into `output`.

    Args:
        folders: of the runs, at least two.
        table: file for the same in tables, Markdown where its name ends with .md, else CSV.

    Raises:
        UserError: a folder that is not a run's, or an `output` where nothing can be written.
    """
    runs = read_runs(folders)
    # Before anything is printed: a folder that cannot be made ends the command with one message.
    _make_folder(output)

    console().print(result_table(runs))
    groups = over_seeds(runs)
    if rows := seed_rows(groups):
        console().print(seeds_table(rows))
    differing = differing_settings(runs)
    if differing:
        console().print(settings_table(runs, differing))
    told = [*notes(runs), *seed_notes(groups)]
    for note in told:
        console().print(note)

    draw(output / PICTURE, runs)
    console().print(f"picture: {output / PICTURE}", soft_wrap=True)
    if table is not None:
        written = write_tables(table, runs, differing, told)
        for file in written:
            console().print(f"table: {file}", soft_wrap=True)

        older = _seeds_beside(table)
        if older not in written and older.exists():
            console().print(f"{older} is of another comparison: here no setting has several seeds", soft_wrap=True)


def write_tables(
    path: Path,
    runs: Sequence[Run],
    differing: Mapping[str, Sequence[str]],
    told: Sequence[str],
) -> list[Path]:
    """Write a row for each run, with its figures and the settings that differ, and the figures over seeds.

    In Markdown the second table stands below the first; in CSV, whose files hold one table, beside it.

    Args:
        told: sentences on what keeps figures from being compared; Markdown ends with them.

    Returns:
        the files.

    Raises:
        UserError: a file cannot be written.
    """
    import pandas as pd  # takes a second to load, and is needed here alone

    frame = pd.DataFrame(_run_cells(runs, differing)).dropna(axis="columns", how="all")
    seeds = pd.DataFrame(_seed_cells(over_seeds(runs))).convert_dtypes()
    if path.suffix == ".md":
        parts = [_markdown(frame)]
        if not seeds.empty:
            parts += [SEEDS_TITLE + PAIRED_TITLE, _markdown(seeds)]
        if told:
            parts.append("\n".join(f"- {note}" for note in told))
        contents = {path: "\n\n".join(parts) + "\n"}
    else:
        contents = {path: frame.to_csv(index=False)}
        if not seeds.empty:
            contents[_seeds_beside(path)] = seeds.to_csv(index=False)

    for file, content in contents.items():
        try:
            write_text(file, content)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--csv {path}: {file} cannot be written ({reason}). Choose another file.") from error
    return [*contents]


def _seeds_beside(path: Path) -> Path:
    """Return the file that holds the figures over seeds, beside a CSV file of runs."""
    return path.with_name(f"{path.stem}-seeds{path.suffix}")


def _markdown(frame: "pd.DataFrame") -> str:
    """Return a table in Markdown, with figures of four digits."""
    shown = frame.round(4).astype(object).where(frame.notna(), "")
    return shown.to_markdown(index=False, disable_numparse=True)


def _run_cells(runs: Sequence[Run], differing: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Return the cells of each run by column: its figures and the settings that differ."""
    rows = []
    for place, run in enumerate(runs):
        figures = {
            "run": run.name,
            "state": run.state,
            "step": run.step,
            **{f"{model}_bits_per_byte": run.bits(model) for model in MODELS},
            "gap_closed": (run.report.get("retention") or {}).get("gap_closed"),
            "seconds": run.report.get("run", {}).get("seconds"),
        }
        rows.append({**figures, **{key: values[place] for key, values in differing.items()}})
    return rows


def _seed_cells(groups: Sequence["SeedGroup"]) -> list[dict[str, Any]]:
    """Return the cells of the table over seeds by column, numbers for other programs."""
    rows = []
    for row in seed_rows(groups):
        group = {
            "runs": row.group.names,
            "seeds": len(row.group.runs),
            "left_out": "; ".join(row.group.left_out),
        }
        mean, difference = row.mean, row.difference
        figures = {
            "mean": mean and mean.value,
            "interval": mean and mean.half,
            "less_the_first": difference and difference.value,
            "interval_of_it": difference and difference.half,
        }
        rows.append({**group, "figure": row.figure, **figures, "pairs": row.pairs})

    return rows


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


Share = Annotated[float, Ge(0), Le(1)]


class _Retention(_Read):
    gap_closed: Annotated[float, Ge(-1e9), Le(1e9)] | None = None
    kl_nats_per_token: Annotated[float, Ge(-1), Le(1e9)] | None = None
    """Barely below 0 where rounding makes it so."""
    top1_agreement: Share | None = None


class _WrittenText(_Read):
    """Figures of the text that a student writes."""

    teacher_bits_per_byte: Bits | None = None
    repeated_4grams: Share | None = None


class _Generation(_Read):
    student: _WrittenText | None = None


class _Start(_Read):
    """Fields that are read of baseline_evaluation.json."""

    teacher: _Scores | None = None
    initial_student: _Scores | None = None


class _Report(_Start):
    """Fields that are read of evaluation_report.json."""

    student: _Scores | None = None
    baseline: _Scores | None = None
    retention: _Retention | None = None
    generation: _Generation | None = None
    run: _RunSummary


class _Term(_Read):
    count: Annotated[float, Ge(0), Le(1e15)] = 0.0


class _Record(_Read):
    """Fields that are read of a line of metrics.jsonl."""

    step: Count
    progress: Annotated[float, Ge(0), Le(1)] = 0.0
    terms: dict[str, _Term] = {}
    own_tokens: Annotated[float, Ge(0), Le(1e15)] = 0.0
    bits_per_byte: Bits | None = None
    bytes: Count | None = None


# ------------------------------------------------------------------------------------------- tables


def result_table(runs: Sequence[Run]) -> Table:
    """Return a table with a row for each run, 80 columns wide.

    It has the share of the gap to the teacher closed and, where the runs are measured on the same text, the change
    against the first one, with the best one in bold: not where settings ran with several seeds, of which the best one
    is chance.
    """
    # Columns that say the same of all runs make way for long names.
    is_short = max(len(run.name) for run in runs) <= LONG_NAME
    teachers = {figure(run.bits("teacher")) for run in runs}
    has_teacher = is_short or len(teachers) > 1
    has_state = is_short or any(run.state != "finished" for run in runs)

    table = _table("Bits per byte on unseen text" if has_teacher else f"Bits per byte, teacher {teachers.pop()}")
    table.add_column("run", overflow="fold", min_width=12)
    columns = {"step": _step, "student": lambda run: figure(run.bits("student")), "change": _changes(runs)}
    if has_state:
        columns = {"state": lambda run: run.state, **columns}
    if has_teacher:
        columns["teacher"] = lambda run: figure(run.bits("teacher"))
    columns |= {"closed": _gap_closed, "time": _time}
    for name in columns:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)

    # Bits per byte compare only on the same text.
    least = min((run.bits("student") for run in runs if run.bits("student") is not None), default=None)
    has_best = _is_same_text(runs) and least is not None and not has_several_seeds(over_seeds(runs))
    for run in runs:
        is_best = has_best and run.bits("student") == least
        cells = [cell(run) for cell in columns.values()]
        table.add_row(run.name, *cells, style="bold" if is_best else None)
    return table


def _is_same_text(runs: Sequence[Run]) -> bool:
    return len(set(_sizes(runs).values())) <= 1


def _changes(runs: Sequence[Run]) -> Callable[[Run], str]:
    """Return what gives the relative change of a run's bits per byte against the first run's."""
    first = runs[0].bits("student")

    def change(run: Run) -> str:
        bits = run.bits("student")
        if run is runs[0] or bits is None or first is None or not _is_same_text(runs):
            return ""
        return f"{bits / first - 1:+.1%}"

    return change


def _gap_closed(run: Run) -> str:
    """Return the share of the gap to the teacher closed; of a student that got worse, that it did."""
    closed = (run.report.get("retention") or {}).get("gap_closed")
    return "worse" if closed is not None and closed < 0 else percent(closed)


def _step(run: Run) -> str:
    """Return the newest step of a run, and its progress where there is no report yet."""
    if run.report:
        return f"{run.step:,}"
    return f"{run.step:,} ({run.progress:.0%})"


def _time(run: Run) -> str:
    """Return the duration of a finished run."""
    seconds = run.report.get("run", {}).get("seconds")
    return "-" if seconds is None else tqdm.format_interval(seconds)


# ------------------------------------------------------------------------------------------- seeds


class Estimate(NamedTuple):
    """A mean with half the width of its 95 % confidence interval."""

    value: float
    half: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Estimate":
        """Return the estimate of at least two numbers."""
        return cls(statistics.fmean(numbers), interval(numbers))


def interval(numbers: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of a mean, by Student's t distribution."""
    degrees = len(numbers) - 1
    quantile = T_QUANTILES[degrees - 1] if degrees <= len(T_QUANTILES) else 1.96
    return quantile * statistics.stdev(numbers) / len(numbers) ** 0.5


Values = Callable[[Run], float | None]
"""What gives a figure of a run; None where the run lacks it."""


class SeedGroup(NamedTuple):
    """Runs of equal settings but for the seed, measured on the same text."""

    runs: Sequence[Run]
    """One for each seed, whole, of which means are taken."""
    left_out: Sequence[str]
    """The others by name, each with the reason."""
    seeds: int
    """Different seeds, with those of the runs that are left out."""

    @property
    def names(self) -> str:
        """Names of the runs that count."""
        return ", ".join(run.name for run in self.runs)

    def mean(self, values: Values) -> Estimate | None:
        """Return the mean of a figure over the seeds; None where a run lacks it.

        A student that has diverged has no figure: the mean of the others would be better than the setting is.
        """
        figures = [values(run) for run in self.runs]
        numbers = [number for number in figures if number is not None]
        return Estimate.of(numbers) if len(numbers) == len(figures) else None

    def pairs(self, other: "SeedGroup") -> list[tuple[Run, Run]]:
        """Return the runs that have a twin of the same seed, measured on the same text, in another group."""
        of_other = {run.seed: run for run in other.runs}
        pairs = []
        for run in self.runs:
            twin = of_other.get(run.seed)
            if twin is not None and twin.scored_bytes == run.scored_bytes:
                pairs.append((run, twin))
        return pairs

    def less(self, other: "SeedGroup", values: Values) -> Estimate | None:
        """Return the mean difference of a figure from another group's, seed by seed.

        None where either group has no mean, or where fewer than two seeds have run in both.
        """
        if self.mean(values) is None or other.mean(values) is None:
            return None

        differences = []
        for run, twin in self.pairs(other):
            mine, theirs = values(run), values(twin)
            if mine is not None and theirs is not None:
                differences.append(mine - theirs)
        return Estimate.of(differences) if len(differences) > 1 else None


def over_seeds(runs: Sequence[Run]) -> list[SeedGroup]:
    """Return the groups of runs that differ in nothing but their seed, also those of a single run."""
    groups = []
    for members in _of_equal_settings(runs):
        counted: list[Run] = []
        left_out: list[str] = []
        seeds = dict.fromkeys(run.seed for run in members)
        for seed in seeds:
            of_seed = [run for run in members if run.seed == seed]
            whole = [run for run in of_seed if run.is_whole]
            left_out += [f"{run.name} ({_why_cut_short(run)})" for run in of_seed if not run.is_whole]

            # A run and its copy would say that seeds differ little. Of two that differ, order must not choose one.
            if len({_figures(run) for run in whole}) > 1:
                left_out += [f"{run.name} (seed {seed} ran more than once, with other figures)" for run in whole]
            else:
                counted += whole[:1]
        groups.append(SeedGroup(counted, left_out, len(seeds)))
    return groups


def _of_equal_settings(runs: Sequence[Run]) -> Iterable[list[Run]]:
    """Yield the runs that have known settings, equal but for the seed, and the same text to be measured on."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        settings = {key: value for key, value in run.settings.items() if _is_important(key) and key != SEED}
        if run.settings:
            by_settings.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)

    for members in by_settings.values():
        # A run without an evaluation so far may be measured on any text.
        texts = dict.fromkeys(run.scored_bytes for run in members if run.scored_bytes is not None)
        for text in texts or [None]:
            yield [run for run in members if run.scored_bytes in (text, None)]


def _why_cut_short(run: Run) -> str:
    """Return why a run that is not whole has no figure to compare with others."""
    return f"{run.state} at step {run.step:,}" if run.report else run.state


def _figures(run: Run) -> tuple[float | None, ...]:
    """Return all figures of a run."""
    return tuple(values(run) for values in FIGURES.values())


def has_several_seeds(groups: Sequence[SeedGroup]) -> bool:
    """Return True if settings ran more than once, copies aside."""
    return any(len(group.runs) + len(group.left_out) > 1 for group in groups)


class SeedRow(NamedTuple):
    """A figure of a group of seeds."""

    group: SeedGroup
    figure: str
    mean: Estimate | None
    difference: Estimate | None
    """From the first group."""
    pairs: int | None
    """Seeds of the difference; None of the first group, and where there is no difference."""


def seed_rows(groups: Sequence[SeedGroup]) -> list[SeedRow]:
    """Return the figures of each group that has several seeds, with the differences from the first of them.

    Differences of equal seeds vary less than either mean. A figure that no run of a group has is left out, but for bits
    per byte, which a student lacks that has diverged.
    """
    rows = []
    averaged = _averaged(groups)
    for group in averaged:
        for name, values in FIGURES.items():
            if name != BITS and all(values(run) is None for run in group.runs):
                continue
            difference = None if group is averaged[0] else group.less(averaged[0], values)
            pairs = None if difference is None else len(group.pairs(averaged[0]))
            rows.append(SeedRow(group, name, group.mean(values), difference, pairs))
    return rows


def _averaged(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Return the groups of more than one seed."""
    return [group for group in groups if len(group.runs) > 1]


SEEDS_TITLE = "Over seeds: mean ± 95 % confidence interval"
PAIRED_TITLE = "; differences are of equal seeds"


def seeds_table(rows: Sequence[SeedRow]) -> Table:
    """Return a table of the figures of each group of seeds, and of the differences from the first group's.

    The number of pairs behind the differences has a column where it is not that of the seeds.
    """
    first = rows[0].group
    has_differences = any(row.group is not first for row in rows)
    has_pairs = any(row.pairs not in (None, len(row.group.runs)) for row in rows)

    table = _table(SEEDS_TITLE + PAIRED_TITLE if has_differences else SEEDS_TITLE)
    table.add_column("runs", overflow="fold", min_width=12)
    table.add_column("seeds", justify="right", no_wrap=True)
    table.add_column("figure", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    if has_differences:
        table.add_column("less the first", justify="right", no_wrap=True)
    if has_pairs:
        table.add_column("pairs", justify="right", no_wrap=True)

    shown = None
    for row in rows:
        heading = ["", ""] if row.group is shown else [row.group.names, _seeds(row.group)]
        shown = row.group
        cells = ["-" if row.mean is None else f"{row.mean.value:.4f} ± {row.mean.half:.4f}"]
        if has_differences:
            cells.append("" if row.group is first else _difference(row))
        if has_pairs:
            cells.append("" if row.pairs is None else str(row.pairs))
        table.add_row(*heading, row.figure, *cells)
    return table


def _seeds(group: SeedGroup) -> str:
    """Return how many seeds a mean is of, and of how many that have run."""
    counted = len(group.runs)
    return str(counted) if counted == group.seeds else f"{counted} of {group.seeds}"


def _difference(row: SeedRow) -> str:
    """Return the difference of a row from the first group's; a dash where there is none."""
    return "-" if row.difference is None else f"{row.difference.value:+.4f} ± {row.difference.half:.4f}"


def seed_notes(groups: Sequence[SeedGroup]) -> Iterable[str]:
    """Yield a sentence for everything that a reader of the means over seeds would miss."""
    if not has_several_seeds(groups):
        return
    averaged = _averaged(groups)

    if left_out := [named for group in groups for named in group.left_out]:
        yield f"Left out of the means over seeds: {', '.join(left_out)}."

    if single := [group.names for group in groups if len(group.runs) == 1]:
        yield f"Settings with a single seed that counts, and so without a mean: {', '.join(single)}."

    for name, values in FIGURES.items():
        rows = [row for row in seed_rows(groups) if row.figure == name and row.mean is None]
        if lacking := [run.name for row in rows for run in row.group.runs if values(run) is None]:
            yield f"No mean of {name} where a run has none: {', '.join(lacking)}."

    for group in averaged:
        steps = {run.name: run.report["run"]["steps"] for run in group.runs}
        if len(set(steps.values())) > 1:
            named = ", ".join(f"{name} {number:,}" for name, number in steps.items())
            yield f"In one mean, though trained for different numbers of steps: {named}."

    for group in averaged[1:]:
        number = len(group.pairs(averaged[0]))
        if number < 2 and group.runs[0].scored_bytes == averaged[0].runs[0].scored_bytes:
            shared = "one seed" if number else "no seed"
            yield f"No difference from {averaged[0].names}: {group.names} have {shared} in common with them."


def _against_baseline(run: Run) -> float | None:
    """Return the student's bits per byte less those of the same student without the teacher."""
    student, baseline = run.bits("student"), run.bits("baseline")
    return None if student is None or baseline is None else student - baseline


def _retained(name: str) -> Values:
    """Return what gives a figure of how near a run's student is to its teacher."""
    return lambda run: (run.report.get("retention") or {}).get(name)


def _written(name: str) -> Values:
    """Return what gives a figure of the text that a run's student writes."""
    return lambda run: ((run.report.get("generation") or {}).get("student") or {}).get(name)


BITS = "bits per byte"

FIGURES: Mapping[str, Values] = {
    BITS: lambda run: run.bits("student"),
    "minus without teacher": _against_baseline,
    "KL to the teacher": _retained("kl_nats_per_token"),
    "same first choice": _retained("top1_agreement"),
    "teacher's of its text": _written("teacher_bits_per_byte"),
    "repeated 4-grams": _written("repeated_4grams"),
}
"""Figures of finished runs with several seeds."""


# ---------------------------------------------------------------------------------------- settings


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ and that a result can depend on.

    Returns:
        dotted key -> its value in each run; `?` for a run that does not have it, which alone makes no difference.
    """
    differing = {}
    for key in _differing(runs):
        if _is_important(key):
            values = [run.settings.get(key, UNKNOWN) for run in runs]
            differing[key] = ["?" if value is UNKNOWN else _shown(value) for value in _without_common_folders(values)]
    return differing


UNKNOWN = object()
"""Value of a setting that a run does not have."""


def _differing(runs: Sequence[Run]) -> list[str]:
    """Return the keys of all settings that differ, in the order of config.yaml."""
    # A dict as an ordered set.
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    differing = []
    for key in keys:
        values = {json.dumps(run.settings[key], default=str) for run in runs if key in run.settings}
        if len(values) > 1:
            differing.append(key)
    return differing


def _is_important(key: str) -> bool:
    """Return True if a result can depend on a setting."""
    return key not in UNIMPORTANT and key.partition(".")[0] not in UNIMPORTANT


def _without_common_folders(values: Sequence[Any]) -> list[Any]:
    """Return the values of a setting without the folders in which all of them are, if they are paths."""
    paths = [path for value in values for path in (value if isinstance(value, list) else [value])]
    paths = [path for path in paths if path is not UNKNOWN]
    if not all(isinstance(path, str) for path in paths):
        return [*values]

    try:
        shared = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # absolute ones beside others
        return [*values]
    if shared in ("", os.sep):
        return [*values]

    def cut(value: Any) -> Any:
        if isinstance(value, list):
            return [cut(path) for path in value]
        return value if value is UNKNOWN else "…" + value[len(shared) :]

    return [cut(value) for value in values]


def _shown(value: Any) -> str:
    """Return the value of a setting as text, cut where it is long."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 3] + "..."


def settings_table(runs: Sequence[Run], differing: Mapping[str, Sequence[str]]) -> Table:
    """Return a table with a row for each value of a setting that differs, and the runs that have it.

    However many runs there are, it is 80 columns wide.
    """
    table = _table("Settings that differ")
    table.add_column("setting", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("runs", overflow="fold")

    for key, values in differing.items():
        heading = key
        for value in dict.fromkeys(values):
            names = [run.name for run, other in zip(runs, values, strict=True) if other == value]
            table.add_row(heading, value, ", ".join(names))
            heading = ""
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

    if unimportant := [key for key in _differing(runs) if not _is_important(key) and key not in OWN_TO_A_RUN]:
        yield f"Different too, but without an effect on the result: {', '.join(unimportant)}."

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
