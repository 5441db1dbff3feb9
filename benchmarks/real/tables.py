"""Tables of the results in Markdown: mean, 95 % interval and range over seeds, against the arm without a teacher."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.measure import table
from utils.comparison.seeds import interval as half_interval

from .arms import WHOLE, Arm

MANY_LAYERS = 10**6
"""Place of the whole student among the cut ones: behind them."""

Result = Mapping[str, Any]
Group = Mapping[tuple[int, str, str], Sequence[Result]]
"""(layers, teacher, name) -> results, one for each seed."""


def tables(results: Sequence[Result]) -> str:
    """Return all tables of the results of one setting."""
    # Several results files each have those of the same models.
    levels = list({result["name"]: result for result in results if result["kind"] == "level"}.values())
    groups = _grouped(_under_chosen_rates([result for result in results if result["kind"] == "arm"]))

    parts = [_levels(levels)]
    for layers in dict.fromkeys(group[0] for group in _ordered(groups)):
        parts.append(_bits(layers, groups))
    parts += [_corpora(groups), _written(levels, groups), _rates(results)]
    return "\n\n".join(part for part in parts if part)


def _grouped(results: Sequence[Result]) -> Group:
    """Return the results of each arm."""
    groups: dict[tuple[int, str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result["layers"], result["teacher"], result["name"]].append(result)
    return groups


def _under_chosen_rates(results: Sequence[Result]) -> list[Result]:
    """Return results under the learning rate that was best without a teacher, for students of that depth."""
    best: dict[int, tuple[float, float]] = {}
    for result in results:
        if result["teacher"] == "nobody" and result["seed"] == 0:
            candidate = (result["bits"]["all"], result["rate"])
            best[result["layers"]] = min(best.get(result["layers"], candidate), candidate)
    return [result for result in results if result["layers"] in best and result["rate"] == best[result["layers"]][1]]


def key(arm: Arm) -> tuple[int, str, str]:
    """Return what an arm's results are grouped by."""
    return (arm.layers, arm.teacher or "nobody", arm.name)


def _ordered(groups: Group) -> list[tuple[int, str, str]]:
    """Return the groups, those of the shallowest students first, and of each as their first runs came."""
    return sorted(groups, key=lambda group: group[0] or MANY_LAYERS)


def _label(layers: int) -> str:
    """Return a student in words."""
    return "whole student" if layers == WHOLE else f"{layers} layers"


def interval(values: Sequence[float]) -> str:
    """Return the mean of values with its 95 % interval; of one value, only that."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ± {half_interval(values):.4f}"


def change(percents: Sequence[float]) -> str:
    """Return the mean of paired changes in per cent, with its 95 % interval where there are several."""
    if not percents:
        return ""
    if len(percents) == 1:
        return f"{percents[0]:+.2f} %"
    return f"{mean(percents):+.2f} ± {half_interval(percents):.2f} %"


# ------------------------------------------------------------------------------------------- each table


def _levels(levels: Sequence[Result]) -> str:
    """Return the table of models as they are."""
    rows = [[level["name"], f"{level['bits']['all']:.4f}"] for level in levels if level["bits"]]
    return table(["before training", "bits per byte, unseen"], rows) if rows else ""


def _bits(layers: int, groups: Group) -> str:
    """Return the table of all students of one depth."""
    base = {result["seed"]: result["bits"]["all"] for result in groups.get((layers, "nobody", "text alone"), [])}
    rows = []
    for group in _ordered(groups):
        if group[0] != layers:
            continue

        results = groups[group]
        bits = [result["bits"]["all"] for result in results]
        changes = [
            100 * (result["bits"]["all"] / base[result["seed"]] - 1) for result in results if result["seed"] in base
        ]
        speed = mean(result["tokens_per_second"] for result in results)
        rows.append(
            [
                group[1],
                group[2],
                interval(bits),
                change(changes),
                f"{min(changes):+.2f} to {max(changes):+.2f}" if len(changes) > 1 else "",
                len(bits),
                f"{speed:,.0f}",
            ]
        )
    if not rows:
        return ""

    header = ["taught by", "learns by", "bits per byte, unseen", "against text alone", "range", "seeds", "tokens/s"]
    any_result = groups[next(group for group in _ordered(groups) if group[0] == layers)][0]
    title = f"{_label(layers)}, {any_result['tokens']:,} tokens, learning rate {any_result['rate']:g}"
    return f"{title}\n\n{table(header, rows)}"


def _corpora(groups: Group) -> str:
    """Return the table of bits per byte by corpus, mean over seeds."""
    rows = []
    names: list[str] = []
    for group in _ordered(groups):
        results = groups[group]
        names = list(results[0]["bits"])
        means = [mean(result["bits"][name] for result in results) for name in names]
        rows.append([*_of(group), *(f"{value:.4f}" for value in means)])
    return table(["student", "taught by", "learns by", *names], rows) if rows else ""


def _written(levels: Sequence[Result], groups: Group) -> str:
    """Return the table of metrics of written text, mean over seeds."""
    rows = []
    for level in levels:
        if level["written"]:
            rows.append([level["name"], "", "", *_metrics([level])])
    for group in _ordered(groups):
        rows.append([*_of(group), *_metrics(groups[group])])
    if not rows:
        return ""

    of_samples = ["the teacher's bits/byte", "the whole student's", "repeated 4-grams", "ended", "tokens"]
    return table(["text written by", "taught by", "learns by", *of_samples], rows)


def _metrics(results: Sequence[Result]) -> list[str]:
    """Return the cells of the metrics of written text."""
    written = [result["written"] for result in results]

    def average(name: str) -> float | None:
        values = [metrics[name] for metrics in written if metrics[name] is not None]
        return mean(values) if values else None

    cells = []
    for name, form in (
        ("the teacher_bits_per_byte", "{:.3f}"),
        ("itself_bits_per_byte", "{:.3f}"),
        ("repeated_4grams", "{:.1%}"),
        ("ended", "{:.0%}"),
        ("tokens", "{:.0f}"),
    ):
        value = average(name)
        cells.append("" if value is None else form.format(value))
    return cells


def _rates(results: Sequence[Result]) -> str:
    """Return the table of learning rates, of whatever was tried under several under seed 0, and of text alone."""
    groups = _grouped([result for result in results if result["kind"] == "arm" and result["seed"] == 0])
    rows = []
    for group in _ordered(groups):
        tried = sorted(groups[group], key=lambda result: result["rate"])
        if len(tried) > 1 or group[1] == "nobody":
            rows += [[*_of(group), f"{result['rate']:g}", f"{result['bits']['all']:.4f}"] for result in tried]
    header = ["student", "taught by", "learns by", "learning rate, seed 0", "bits per byte, unseen"]
    return table(header, rows) if rows else ""


def _of(group: tuple[int, str, str]) -> tuple[str, str, str]:
    """Return a group in words."""
    return _label(group[0]), *group[1:]
