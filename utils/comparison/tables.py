"""Tables of the terminal: runs, means over seeds, settings that differ. Each is 80 columns wide."""

from collections.abc import Callable, Mapping, Sequence

from rich import box
from rich.table import Table
from tqdm import tqdm

from ..report.results import figure, percent
from .runs import Run, is_same_text
from .seeds import SeedGroup, SeedRow, has_several_seeds

LONG_NAME = 14
"""Characters of a run's name up to which the table has space for all columns."""

SEEDS_TITLE = "Over seeds: mean ± 95 % confidence interval"
PAIRED_TITLE = "; differences are of equal seeds"


def result_table(runs: Sequence[Run], groups: Sequence[SeedGroup]) -> Table:
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
    has_best = is_same_text(runs) and least is not None and not has_several_seeds(groups)
    for run in runs:
        is_best = has_best and run.bits("student") == least
        cells = [cell(run) for cell in columns.values()]
        table.add_row(run.name, *cells, style="bold" if is_best else None)
    return table


def _changes(runs: Sequence[Run]) -> Callable[[Run], str]:
    """Return what gives the relative change of a run's bits per byte against the first run's."""
    first = runs[0].bits("student") if is_same_text(runs) else None

    def change(run: Run) -> str:
        bits = run.bits("student")
        if run is runs[0] or bits is None or first is None:
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
