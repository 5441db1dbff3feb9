"""Means over runs that differ in nothing but their seed, and their differences from others, seed by seed."""

import json
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .figures import BITS, FIGURES, Values
from .runs import SEED, Run
from .settings import is_important

T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t distribution with 1, 2, ... 30 degrees of freedom; above, the normal's is near."""


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
        settings = {key: value for key, value in run.settings.items() if is_important(key) and key != SEED}
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
    averaged = with_several_seeds(groups)
    for group in averaged:
        for name, values in FIGURES.items():
            if name != BITS and all(values(run) is None for run in group.runs):
                continue
            difference = None if group is averaged[0] else group.less(averaged[0], values)
            pairs = None if difference is None else len(group.pairs(averaged[0]))
            rows.append(SeedRow(group, name, group.mean(values), difference, pairs))
    return rows


def with_several_seeds(groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """Return the groups of more than one seed."""
    return [group for group in groups if len(group.runs) > 1]
