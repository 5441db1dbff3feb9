"""Schedules beside the best constant, their mean, their reversal and their own values in another order.

    REAL_MODELS_DIR=... python -m benchmarks.curricula --pair neo-260k --schedules "forward to reverse KL"
    REAL_MODELS_DIR=... python -m benchmarks.curricula --table

A schedule that is better than one constant may only have met a better constant on its way. So it has these opponents:

- constants: as many as are listed, of which the best over all seeds counts;
- mean: the constant that the schedule is on average;
- reversed: from the last value to the first;
- shuffled: the schedule in 20 pieces, in a random order that is always the same;
- best constant, as long: with as many more steps as the schedule takes more time of the processor.

All arms of a pair see the same batches and the same first student for a seed: differences are taken seed by seed. A
schedule earns to be a default where it is below the best constant and below its reversal with the 95 % interval of
either difference below 0: by at least 0.5 % of bits per byte, 1 % of the teacher's bits per byte of the text that the
student writes, or a point of repeated 4-grams. The best constant is the best of the same figure, the mean one of the
schedule among them. It earns nothing where the shuffled schedule or the best constant that is trained as long is no
worse, or where it loses as much by another figure; nor before it and all of its opponents have finite figures for five
seeds in common. See benchmarks/quality.py.

Every run is a line of the results file, written when it ends; a run that is there is not repeated.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from benchmarks.measure import table
from benchmarks.quality import MALLOC, PAIRS, Pair, Variant, bits_per_byte, kd_and_text, prepare, train
from benchmarks.situations import FALLING, SCORED_WINDOWS, TOP_K, Writing
from models.config import CurriculumConfig, LossConfig, Ramp, Schedule, Term
from models.curriculum import value_at
from models.types import TeacherSignal
from utils.comparison.seeds import interval

PIECES = 20
"""Pieces of a schedule that are shuffled."""
LEAST_GAIN = 0.005
"""Share of its bits per byte by which a schedule must be better."""
LEAST_TEXT_GAIN = 0.01
"""The same of what the teacher thinks of the written text; and points of repeated 4-grams."""
COMPARED_WINDOWS = 24
"""Unseen windows on which the student's distributions are compared with the teacher's."""
AS_LONG = "best constant, as long"
SCHEDULE, MEAN, REVERSED, SHUFFLED = "schedule", "mean", "reversed", "shuffled"
CONSTANT = "constant "
"""What the names of constants begin with."""
SETTING = ("pair", "share", "steps", "size")
"""Names of what all runs of a table share."""

_LOSS = LossConfig(top_k=TOP_K, head_passes="eager")


@dataclass(frozen=True)
class Candidate:
    """A schedule, and how a student is trained under it or under another."""

    schedule: Ramp
    constants: Sequence[float]
    """Opponents, of which the best counts."""
    variant: Callable[[Schedule], Variant]


def _loss(name: str, **others: object) -> Callable[[Schedule], Variant]:
    """Return what makes an arm of KD .7 + LM .3 under a scheduled setting of the loss."""
    return lambda schedule: Variant(replace(_LOSS, **{name: schedule}, **others))


def _selected(by: str) -> Callable[[Schedule], Variant]:
    """Return what makes an arm that learns KD at a scheduled share of the positions."""
    loss = replace(_LOSS, select_by=by)
    return lambda schedule: Variant(loss, replace(CurriculumConfig(), select=schedule))


def _weighted(*terms: str, balance: str = "none") -> Callable[[Schedule], Variant]:
    """Return what makes an arm of KD .7 + LM .3 in which some terms have a scheduled weight."""
    curriculum = CurriculumConfig(balance=balance)
    return lambda schedule: Variant(_LOSS, replace(curriculum, **dict.fromkeys(terms, Term(schedule))))


def _sample_weights(schedule: Schedule) -> Variant:
    """Return an arm of KD .7 + LM .3 in which KD weighs windows to a scheduled degree."""
    return Variant(_LOSS, CurriculumConfig(sample_weights=schedule))


def _opened(schedule: Schedule) -> Variant:
    """Return an arm of KD .7 + LM .3 for which a scheduled share of the text is open, by the teacher's loss."""
    return Variant(_LOSS, CurriculumConfig(open_text=schedule))


CANDIDATES = {
    "forward to reverse KL": Candidate(
        Ramp(((0.2, 0.0), (1.0, 1.0))), (0.0, 0.25, 0.5, 1.0), _loss("skew", divergence="generalised_jsd")
    ),
    "interpolated targets": Candidate(Ramp(((0.0, 0.4), (0.8, 1.0))), (0.6, 0.8, 1.0), _loss("interpolation")),
    "ever more positions": Candidate(Ramp(((0.0, 0.2), (0.8, 1.0))), (0.2, 0.5, 1.0), _selected(by="student_entropy")),
    "ever more positions, chosen before": Candidate(
        Ramp(((0.0, 0.2), (0.8, 1.0))), (0.2, 0.5, 1.0), _selected(by="first_student")
    ),
    "ever more positions, excess loss": Candidate(
        Ramp(((0.0, 0.2), (0.8, 1.0))), (0.2, 0.5, 1.0), _selected(by="excess_loss")
    ),
    "ever less KD": Candidate(Ramp(((0.0, 1.4), (1.0, 0.2))), (0.3, 0.7, 1.4), _weighted("kd")),
    "ever less KD, balanced losses": Candidate(
        Ramp(((0.0, 1.4), (1.0, 0.2))), (0.3, 0.7, 1.4), _weighted("kd", balance="loss")
    ),
    "ever less KD, balanced gradients": Candidate(
        Ramp(((0.0, 1.4), (1.0, 0.2))), (0.3, 0.7, 1.4), _weighted("kd", balance="gradient")
    ),
    "KD, then text alone": Candidate(FALLING, (0.0, 0.3, 0.7), lambda schedule: Variant(_LOSS, kd_and_text(schedule))),
    "sample weights later": Candidate(Ramp(((0.2, 0.0), (0.8, 1.0))), (0.0, 0.5, 1.0), _sample_weights),
    "cooling": Candidate(Ramp(((0.0, 4.0), (0.8, 1.0))), (1.0, 2.0, 4.0), _loss("temperature")),
    "easier text first": Candidate(Ramp(((0.0, 0.2), (0.8, 1.0))), (0.5, 1.0), _opened),
    "hidden states early": Candidate(Ramp(((0.3, 1.0), (0.5, 0.0))), (0.0, 0.3, 1.0), _weighted("feat", "attn")),
}


# ------------------------------------------------------------------------------------------ opponents


def mean_of(schedule: Ramp) -> float:
    """Return the mean of a schedule over the run."""
    return mean(value_at(schedule, (step + 0.5) / 1000) for step in range(1000))


def reversed_of(schedule: Ramp) -> Ramp:
    """Return a schedule from its end to its beginning."""
    points = [(1 - progress, value) for progress, value in reversed(schedule.points)]
    return Ramp(tuple(points), schedule.shape)


def shuffled_of(schedule: Ramp) -> Ramp:
    """Return the values of a schedule in a random order: constant in each piece of the run."""
    values = [value_at(schedule, (piece + 0.5) / PIECES) for piece in range(PIECES)]
    points = []
    for piece, place in enumerate(np.random.default_rng(0).permutation(PIECES)):
        points += [(piece / PIECES, values[place]), ((piece + 1) / PIECES - 1e-9, values[place])]
    return Ramp(tuple(points))


def arms_of(candidate: Candidate) -> dict[str, Schedule]:
    """Return the schedule and its opponents by name, but for the one that depends on their results."""
    schedule = candidate.schedule
    arms: dict[str, Schedule] = {f"{CONSTANT}{value:g}": value for value in candidate.constants}
    return arms | {
        SCHEDULE: schedule,
        MEAN: mean_of(schedule),
        REVERSED: reversed_of(schedule),
        SHUFFLED: shuffled_of(schedule),
    }


# ------------------------------------------------------------------------------------------ runs


class Measures:
    """The figures of a student: on unseen text, against the teacher, and of what it writes."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.writing = Writing(pair)
        self.batch = pair.distillation.collate(pair.unseen[:COMPARED_WINDOWS])
        self.signal: TeacherSignal = pair.teacher.signal(self.batch, TOP_K)

    def of(self, student: torch.nn.Module, seed: int) -> dict:
        """Return all figures of a student."""
        framework = self.pair.under(Variant(_LOSS)).framework(1, student=student)
        sums = framework.compare(self.batch, self.signal)
        return {
            "bits_per_byte": bits_per_byte(student, self.pair, "student"),
            "kl": sums["kl_sum"] / sums["count"],
            "top1": sums["agree"] / sums["count"],
            "written": self.writing.measure(student, seed),
        }


class Benchmark:
    """The runs that the results file lacks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.pair = Pair(args.pair, args.share, args.cache)
        self.pair.unseen = self.pair.unseen[:SCORED_WINDOWS]
        self.measures = Measures(self.pair)

    def run(self, name: str) -> None:
        """Run a schedule and its opponents, seed by seed; last the best constant for as long as the schedule takes."""
        candidate = CANDIDATES[name]
        for seed in self.args.seeds:
            for arm, schedule in arms_of(candidate).items():
                self._run_arm(name, candidate.variant(schedule), seed, {"arm": arm, "trained_steps": self.args.steps})

        results = [line for line in read_results(self.args.results) if self._is_of(line, name)]
        best = best_constant(results)
        if best is None:
            print(f"{name}: no constant has finite figures for all seeds, so none is trained as long", flush=True)
            return
        seconds = {arm: mean(line["seconds"] for line in results if line["arm"] == arm) for arm in (best, SCHEDULE)}
        steps = round(self.args.steps * max(1.0, seconds[SCHEDULE] / seconds[best]))
        variant = candidate.variant(arms_of(candidate)[best])
        for seed in self.args.seeds:
            self._run_arm(name, variant, seed, {"arm": AS_LONG, "constant": best, "trained_steps": steps})

    def _is_of(self, line: dict, name: str) -> bool:
        setting = {key: getattr(self.args, key) for key in SETTING}
        return (setting | {"schedule": name}).items() <= line.items()

    def _run_arm(
        self,
        name: str,
        variant: Variant,
        seed: int,
        arm: dict,
    ) -> None:
        """Do one run, and add a line to the results, unless it is there.

        Args:
            arm: what is written of it, with its name and its steps.
        """
        arm = arm | {"seed": seed}
        done = [line for line in read_results(self.args.results) if self._is_of(line, name)]
        if any(arm.items() <= line.items() for line in done):
            return

        student, training = train(self.pair, variant, seed, arm["trained_steps"], self.args.size)
        result = {
            **{key: getattr(self.args, key) for key in SETTING},
            "schedule": name,
            **arm,
            "seconds": training["seconds"],
            **self.measures.of(student, seed),
        }
        with self.args.results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{name}, {arm['arm']}, seed {seed}: {result['bits_per_byte']:.4f} bits per byte", flush=True)


# ------------------------------------------------------------------------------------------ tables


def read_results(file: Path) -> list[dict]:
    """Return the results that are there; a last line that was not written to its end is left out."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def drop_cut_line(file: Path) -> None:
    """Take a last line that was not written to its end off the results."""
    if file.exists():
        text = file.read_text()
        file.write_text(text[: text.rfind("\n") + 1])


@dataclass(frozen=True)
class Metric:
    """A figure of a student of which less is better."""

    name: str
    stored: Callable[[dict], float | None]
    """Return the figure as a line of the results has it."""
    least_gain: float
    """By so much must a schedule be better to earn anything."""
    is_share: bool = False
    """Differences are in points; else relative."""

    def of(self, line: dict) -> float:
        """Return the figure of a line; NaN of a student that has none."""
        return number(self.stored(line))


def number(figure: float | None) -> float:
    """Return a figure, NaN in place of none."""
    return math.nan if figure is None else figure


METRICS = (
    Metric("bits per byte", lambda line: line["bits_per_byte"], LEAST_GAIN),
    Metric("the teacher's of its text", lambda line: line["written"]["teacher_bits_per_byte"], LEAST_TEXT_GAIN),
    Metric("repeated 4-grams", lambda line: line["written"]["repeated_4grams"], LEAST_TEXT_GAIN, is_share=True),
)


def best_constant(results: Sequence[dict], metric: Metric = METRICS[0]) -> str | None:
    """Return the constant with the least of a metric, over all seeds; the mean of the schedule is one of them.

    None where no constant has a finite figure for each of its seeds.
    """
    means = {}
    for arm in dict.fromkeys(line["arm"] for line in results):
        figures = [metric.of(line) for line in results if line["arm"] == arm]
        if (arm.startswith(CONSTANT) or arm == MEAN) and all(map(math.isfinite, figures)):
            means[arm] = mean(figures)
    return min(means, key=means.__getitem__, default=None)


@dataclass(frozen=True)
class Paired:
    """Differences of a metric between two arms, seed by seed."""

    values: Sequence[float]
    metric: Metric

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval of the mean; None of a single seed, and where a student has diverged."""
        has_interval = len(self.values) > 1 and all(map(math.isfinite, self.values))
        return interval(self.values) if has_interval else None

    @property
    def is_gain(self) -> bool:
        """True if the first arm is better by enough, with the interval clear of 0."""
        if self.half is None:
            return False
        return mean(self.values) <= -self.metric.least_gain and mean(self.values) + self.half < 0

    def __str__(self) -> str:
        if not self.values:
            return "not run yet"
        half = "" if self.half is None else f" ± {self.half:.2%}"
        return f"{mean(self.values):+.2%}{half}"


def paired(results: Sequence[dict], arm: str, other: str, metric: Metric = METRICS[0]) -> Paired:
    """Return the differences of an arm from another on the seeds that both have."""
    figures = {(line["arm"], line["seed"]): metric.of(line) for line in results}
    seeds = sorted({line["seed"] for line in results})
    both = [seed for seed in seeds if {(arm, seed), (other, seed)} <= figures.keys()]

    pairs = [(figures[arm, seed], figures[other, seed]) for seed in both]
    if metric.is_share:
        return Paired([ours - theirs for ours, theirs in pairs], metric)
    return Paired([ours / theirs - 1 for ours, theirs in pairs], metric)


@dataclass(frozen=True)
class Demands:
    """Demands on the runs of a pair, before a schedule can earn a default."""

    seeds: int = 5
    """Seeds that the schedule and each opponent have in common."""
    has_equal_time: bool = True
    """A constant can be trained as long as the schedule; without that, no schedule earns anything."""


STORY_PAIRS = Demands()


def tables(results: Sequence[dict], demands: Demands = STORY_PAIRS) -> str:
    """Return a table for each pair and schedule, and what the schedule has earned."""
    parts = []
    keys = (*SETTING, "schedule")
    for values in dict.fromkeys(tuple(line[key] for key in keys) for line in results):
        lines = _that_count([line for line in results if tuple(line[key] for key in keys) == values])
        pair, share, steps, size, name = values
        title = f"**{name}**, {pair}: {steps} steps of {size} windows, {share:.0%} of the text"
        parts.append(f"{title}\n\n{_table(lines)}\n\n{_verdict(name, lines, demands)}")
    return "\n\n".join(parts)


def _that_count(lines: Sequence[dict]) -> list[dict]:
    """Return the lines without copies, and without runs as long of what is no longer the best constant, or the time."""
    lines = [line for place, line in enumerate(lines) if line not in lines[:place]]
    as_long = [line for line in lines if line["arm"] == AS_LONG]
    others = [line for line in lines if line["arm"] != AS_LONG]

    # More seeds may make another constant the best, and another number of steps as long.
    best = best_constant(others)
    newest = as_long[-1].get("trained_steps") if as_long else None
    for line in as_long:
        if line.get("constant") == best and line.get("trained_steps") == newest:
            others.append(line)
    return others


def _table(lines: Sequence[dict]) -> str:
    """Return the arms of one schedule, each with the schedule's difference from it."""
    header = ["arm", "seeds", "bits per byte", "schedule against it", "KL", "top 1", "teacher's of its text"]
    rows = [_row(arm, lines) for arm in dict.fromkeys(line["arm"] for line in lines)]
    return table([*header, "repeated", "seconds"], rows)


def _row(arm: str, lines: Sequence[dict]) -> list[object]:
    """Return the cells of an arm."""
    runs = [line for line in lines if line["arm"] == arm]
    written = [line["written"] for line in runs]

    return [
        arm,
        len(runs),
        f"{mean(number(line['bits_per_byte']) for line in runs):.4f}",
        "" if arm == SCHEDULE else paired(lines, SCHEDULE, arm),
        f"{mean(number(line['kl']) for line in runs):.4f}",
        f"{mean(number(line['top1']) for line in runs):.1%}",
        f"{mean(number(text['teacher_bits_per_byte']) for text in written):.3f}",
        f"{mean(number(text['repeated_4grams']) for text in written):.1%}",
        f"{mean(line['seconds'] for line in runs):.0f}",
    ]


def _verdict(name: str, lines: Sequence[dict], demands: Demands) -> str:
    """Return what a schedule has earned: a line of its differences in each metric, and a sentence."""
    verdict = []
    for metric in METRICS:
        best = _opponent(lines, metric)
        gains = [paired(lines, SCHEDULE, opponent, metric) for opponent in (best, REVERSED)]
        verdict.append(f"- {metric.name}: {gains[0]} against {best}, {gains[1]} against its reversal")

    earns = any(_earns(lines, metric) for metric in METRICS) and not any(_loses(lines, metric) for metric in METRICS)
    if missing := _missing(name, lines, demands):
        verdict.append(f"- It earns no default before these are there: {'; '.join(missing)}.")
    elif not earns:
        verdict.append("- It earns no default.")
    elif not demands.has_equal_time:
        verdict.append(
            "- It is better over as many steps. Over as much time nothing was compared: it earns no default."
        )
    else:
        verdict.append("- It earns to be a default.")
    return "\n".join(verdict)


def _opponent(lines: Sequence[dict], metric: Metric) -> str:
    """Return the best constant, or the words for it where there is none."""
    return best_constant(lines, metric) or "the best constant"


def _missing(name: str, lines: Sequence[dict], demands: Demands) -> list[str]:
    """Return what a verdict lacks: arms that have too few seeds, a seed twice, or a figure that is not finite."""
    candidate = CANDIDATES.get(name)
    listed = arms_of(candidate) if candidate else (SCHEDULE, MEAN, REVERSED, SHUFFLED)
    as_long = (AS_LONG,) if demands.has_equal_time else ()
    arms = dict.fromkeys([*listed, *as_long, *(line["arm"] for line in lines)])

    missing = [] if any(arm.startswith(CONSTANT) for arm in arms) else ["constants"]
    of_schedule = _finite_seeds(lines, SCHEDULE)
    for arm in arms:
        seeds = [line["seed"] for line in lines if line["arm"] == arm]
        finite = _finite_seeds(lines, arm)
        shared = len(finite & of_schedule)
        if len(set(seeds)) < len(seeds):
            missing.append(f"{arm} (a seed ran more than once, with other figures)")
        elif diverged := sorted(set(seeds) - finite):
            missing.append(f"{arm} (no finite figures for seed {', '.join(map(str, diverged))})")
        elif shared < demands.seeds:
            missing.append(f"{arm} ({shared} of {demands.seeds} seeds)")
    return missing


def _finite_seeds(lines: Sequence[dict], arm: str) -> set[int]:
    """Return the seeds of an arm that have a finite figure of each metric."""
    runs = [line for line in lines if line["arm"] == arm]
    return {line["seed"] for line in runs if all(math.isfinite(metric.of(line)) for metric in METRICS)}


def _earns(lines: Sequence[dict], metric: Metric) -> bool:
    """Return True if a schedule is better by enough than what it has to beat, and no opponent is as good."""
    to_beat = (_opponent(lines, metric), REVERSED)
    others = [paired(lines, SCHEDULE, opponent, metric).values for opponent in (SHUFFLED, AS_LONG)]
    is_as_good = any(mean(values) >= 0 for values in others if values)
    return not is_as_good and all(paired(lines, SCHEDULE, opponent, metric).is_gain for opponent in to_beat)


def _loses(lines: Sequence[dict], metric: Metric) -> bool:
    """Return True if the best constant is better than a schedule by as much as would earn it something."""
    return paired(lines, _opponent(lines, metric), SCHEDULE, metric).is_gain


def main() -> None:
    """Do the runs that the results file lacks, and print the tables."""
    if sys.platform == "linux" and not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="neo-4096")
    parser.add_argument("--schedules", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=8, help="windows a step")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training stories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(".curricula-cache"))
    parser.add_argument("--results", type=Path, default=Path("curricula-results.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    args = parser.parse_args()

    if not args.table:
        prepare(parser, args.threads)
        drop_cut_line(args.results)
        benchmark = Benchmark(args)
        for name in args.schedules:
            benchmark.run(name)
    results = read_results(args.results)
    if not results:
        parser.error(f"--results {args.results}: there are no results yet; leave --table out to do the runs")
    print(tables(results))


if __name__ == "__main__":
    main()
