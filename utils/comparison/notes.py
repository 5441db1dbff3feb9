"""Sentences on what keeps figures from being compared, which their reader would miss."""

from collections.abc import Iterable, Sequence

from ..evaluation.comparability import MOST_UNSPELT, unspelt_share
from .figures import FIGURES
from .runs import Run, sizes_of_text
from .seeds import SeedGroup, has_several_seeds, seed_rows, with_several_seeds
from .settings import OWN_TO_A_RUN, differing_keys, is_important


def notes(runs: Sequence[Run]) -> Iterable[str]:
    """Yield a sentence for everything that makes figures of these runs incomparable."""
    # The size of the text stands for the text: other text has hardly ever the same number of bytes.
    sizes = sizes_of_text(runs)
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

    if unimportant := [key for key in differing_keys(runs) if not is_important(key) and key not in OWN_TO_A_RUN]:
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


def seed_notes(groups: Sequence[SeedGroup]) -> Iterable[str]:
    """Yield a sentence for everything that a reader of the means over seeds would miss."""
    if not has_several_seeds(groups):
        return
    averaged = with_several_seeds(groups)

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
