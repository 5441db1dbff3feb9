"""Targets of the figures of a GPU, and the verdicts on them: the one place that says what is right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Rows = dict[str, list[dict]]
"""Part -> its rows."""

STEP_LIMITS = {"2 x 512": 1.10, "8 x 1024": 1.05}
"""Size -> time of a step over that of the bare models."""
HEAD_LIMIT = 1.3
"""Time of the head over that of its bare products."""
HEAD_MEMORY_LIMIT = 0.02
"""Memory of the head over that of plain PyTorch."""
WAITING_LIMIT = 0.02
"""Share of a run that is spent waiting for batches."""
FORECAST_LEAST = 0.90
FORECAST_MOST = 1.10
"""Forecast of memory over the counted peak."""


@dataclass(frozen=True)
class Verdict:
    """One figure beside what it should be."""

    figure: str
    """The figure's name, with its sizes."""
    measured: str
    right: str
    """The target in words."""
    met: bool


def verdicts(rows: Rows) -> list[Verdict]:
    """Return the verdicts on all measured rows that have a target."""
    judges: list[Callable[[Rows], Iterator[Verdict]]] = [
        _step,
        _head,
        _memory_of_head,
        _peers_of_head,
        _train,
        _forecast,
        _waits,
    ]
    return [verdict for judge in judges for verdict in judge(rows)]


def _times(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _at_most(figure: str, value: float, limit: float, *, form: Callable[[float], str]) -> Verdict:
    """Judge a figure that has an upper limit, both written by `form`."""
    return Verdict(
        figure=figure,
        measured=form(value),
        right=f"at most {form(limit)}",
        met=value <= limit,
    )


# Each judge reads the rows of its parts, which may lack: a part can be left out, and a row can say that it failed.


def _step(rows: Rows) -> Iterator[Verdict]:
    """Judge the time of a step beside the bare models."""
    for row in rows.get("step_bf16", []):
        limit = STEP_LIMITS.get(row["size"])
        is_measured = row["what"] == "this project" and "times_bare" in row
        if limit and is_measured:
            figure = f"step / bare models, bf16, {row['size']}"
            yield _at_most(figure, row["times_bare"], limit, form=_times)


def _fused(rows: Rows) -> Iterator[tuple[str, dict]]:
    """Yield (title, row) of the fused head in bf16, one for each size: with compiled passes where they work."""
    by_title = {}
    for row in rows.get("head_bf16", []):
        if row["variant"].startswith("fused head") and "ms" in row:
            by_title[f"V = {row['V']:,}, N = {row['N']:,}"] = row
    yield from by_title.items()


def _head(rows: Rows) -> Iterator[Verdict]:
    """Judge the time of the head beside its bare products."""
    for title, row in _fused(rows):
        if "times_bare" in row:
            figure = f"head / bare products, bf16, {title}"
            yield _at_most(figure, row["times_bare"], HEAD_LIMIT, form=_times)


def _memory_of_head(rows: Rows) -> Iterator[Verdict]:
    """Judge the memory of the head at the largest size: at few tokens there are few chunks, and each counts."""
    fused = list(_fused(rows))
    if not fused:
        return

    title, row = max(fused, key=lambda item: item[1]["N"])
    if "memory_of_plain" in row:
        figure = f"head's memory / plain PyTorch's, {title}"
        yield _at_most(figure, row["memory_of_plain"], HEAD_MEMORY_LIMIT, form=_percent)


def _peers_of_head(rows: Rows) -> Iterator[Verdict]:
    """Judge the time of the head beside each peer that was measured at the same size."""
    for title, row in _fused(rows):
        for other in rows["head_bf16"]:
            is_peer = other["variant"].startswith(("Liger", "TRL"))
            has_same_size = (other["V"], other["N"]) == (row["V"], row["N"])
            if not is_peer or not has_same_size or "ms" not in other:
                continue

            yield Verdict(
                figure=f"head, bf16, beside {other['variant']}, {title}",
                measured=f"{row['ms']:.2f} ms",
                right=f"less than {other['ms']:.2f} ms",
                met=row["ms"] < other["ms"],
            )


def _train(rows: Rows) -> Iterator[Verdict]:
    """Judge the end of whole runs, and their waiting for batches."""
    for part in ("train_bf16", "train_fp16"):
        for row in rows.get(part, []):
            name = f"train.py in {row['precision']}"
            yield Verdict(
                figure=f"{name}: exit status",
                measured=str(row["exit"]),
                right="0",
                met=row["exit"] == 0,
            )
            if "waiting" in row:
                yield _at_most(f"{name}: waiting for batches", row["waiting"], WAITING_LIMIT, form=_percent)


def _forecast(rows: Rows) -> Iterator[Verdict]:
    """Judge the forecast of memory beside the counted peak."""
    for row in rows.get("forecast", []):
        if "forecast_over_peak" not in row:
            continue

        share = row["forecast_over_peak"]
        yield Verdict(
            figure=f"forecast / counted peak, {row['precision']}, {row['size']}",
            measured=_times(share),
            right=f"{_times(FORECAST_LEAST)} to {_times(FORECAST_MOST)}",
            met=FORECAST_LEAST <= share <= FORECAST_MOST,
        )


def _waits(rows: Rows) -> Iterator[Verdict]:
    """Judge the steps in which the host may not wait for the card; those under fp16 are not watched."""
    for row in rows.get("waits", []):
        if row["watched"]:
            yield Verdict(
                figure=f"waits in a step that is not logged, {row['precision']}, {row['loss']}",
                measured=row["waits"],
                right="none",
                met=row["waits"] == "none",
            )
