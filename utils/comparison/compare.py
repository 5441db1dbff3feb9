"""Comparison of runs: tables, the settings that differ, one picture. No model is loaded."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..logs.console import console
from .files import seeds_beside, write_tables
from .notes import notes, seed_notes
from .picture import draw
from .runs import read_runs
from .seeds import over_seeds, seed_rows
from .settings import differing_settings
from .tables import result_table, seeds_table, settings_table

PICTURE = "comparison.png"


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

    groups = over_seeds(runs)
    console().print(result_table(runs, groups))
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
        written = write_tables(table, runs, groups, differing, told)
        for file in written:
            console().print(f"table: {file}", soft_wrap=True)

        older = seeds_beside(table)
        if older not in written and older.exists():
            console().print(f"{older} is of another comparison: here no setting has several seeds", soft_wrap=True)


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
