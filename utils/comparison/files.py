"""The same tables as files, Markdown or CSV, for people and for other programs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import write_text
from ..report.results import MODELS
from .runs import Run
from .seeds import SeedGroup, seed_rows
from .tables import PAIRED_TITLE, SEEDS_TITLE

if TYPE_CHECKING:
    import pandas as pd


def write_tables(
    path: Path,
    runs: Sequence[Run],
    groups: Sequence[SeedGroup],
    differing: Mapping[str, Sequence[str]],
    told: Sequence[str],
) -> list[Path]:
    """Write a row for each run, with its figures and the settings that differ, and the figures over seeds.

    In Markdown the second table stands below the first; in CSV, whose files hold one table, beside it.

    Args:
        groups: of these runs, by `over_seeds`.
        told: sentences on what keeps figures from being compared; Markdown ends with them.

    Returns:
        the files.

    Raises:
        UserError: a file cannot be written.
    """
    import pandas as pd  # takes a second to load, and is needed here alone

    frame = pd.DataFrame(_run_cells(runs, differing)).dropna(axis="columns", how="all")
    seeds = pd.DataFrame(_seed_cells(groups)).convert_dtypes()
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
            contents[seeds_beside(path)] = seeds.to_csv(index=False)

    for file, content in contents.items():
        try:
            write_text(file, content)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--csv {path}: {file} cannot be written ({reason}). Choose another file.") from error
    return [*contents]


def seeds_beside(path: Path) -> Path:
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


def _seed_cells(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
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
