"""What the figures of a GPU have to be, and whether they are: the one place that says what is right."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Rows = dict[str, list[dict]]
"""Part -> its rows."""


@dataclass(frozen=True)
class Verdict:
    """One figure beside what it should be."""

    figure: str
    measured: str
    right: str
    met: bool


def verdicts(rows: Rows) -> list[Verdict]:
    """Return what can be judged of the measured rows."""
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


def _at_most(figure: str, value: float, limit: float, form: Callable[[float], str]) -> Verdict:
    return Verdict(figure, form(value), f"at most {form(limit)}", value <= limit)


_times = "{:.2f}".format
_percent = "{:.1%}".format
STEP_LIMITS = {"2 x 512": 1.10, "8 x 1024": 1.05}
HEAD_LIMIT, HEAD_MEMORY_LIMIT = 1.3, 0.02
WAITING_LIMIT = 0.02
FORECAST_LEAST, FORECAST_MOST = 0.90, 1.10


def _step(rows: Rows) -> Iterator[Verdict]:
    for row in rows.get("step_bf16", []):
        limit = STEP_LIMITS.get(row["size"])
        if row["what"] == "this project" and limit and "times_bare" in row:
            yield _at_most(f"step / bare models, bf16, {row['size']}", row["times_bare"], limit, _times)


def _fused(rows: Rows) -> Iterator[tuple[str, dict]]:
    """Yield (title, row) of the fused head in bf16."""
    for row in rows.get("head_bf16", []):
        if row["variant"] == "fused head" and "ms" in row:
            yield f"V = {row['V']:,}, N = {row['N']:,}", row


def _head(rows: Rows) -> Iterator[Verdict]:
    for title, row in _fused(rows):
        if "times_bare" in row:
            yield _at_most(f"head / bare products, bf16, {title}", row["times_bare"], HEAD_LIMIT, _times)


def _memory_of_head(rows: Rows) -> Iterator[Verdict]:
    """Only for the largest size: at few tokens there are few chunks, and each counts."""
    largest = max(_fused(rows), key=lambda item: item[1]["N"], default=None)
    if largest and "memory_of_plain" in largest[1]:
        title, row = largest
        figure = f"head's memory / plain PyTorch's, {title}"
        yield _at_most(figure, row["memory_of_plain"], HEAD_MEMORY_LIMIT, _percent)


def _peers_of_head(rows: Rows) -> Iterator[Verdict]:
    for title, row in _fused(rows):
        peers = [
            other
            for other in rows["head_bf16"]
            if (other["V"], other["N"]) == (row["V"], row["N"])
            and other["variant"].startswith(("Liger", "TRL"))
            and "ms" in other
        ]
        for peer in peers:
            figure = f"head, bf16, beside {peer['variant']}, {title}"
            yield Verdict(figure, f"{row['ms']:.2f} ms", f"less than {peer['ms']:.2f} ms", row["ms"] < peer["ms"])


def _train(rows: Rows) -> Iterator[Verdict]:
    for part in ("train_bf16", "train_fp16"):
        for row in rows.get(part, []):
            name = f"train.py in {row['precision']}"
            yield Verdict(f"{name}: exit status", str(row["exit"]), "0", row["exit"] == 0)
            if "waiting" in row:
                yield _at_most(f"{name}: waiting for batches", row["waiting"], WAITING_LIMIT, _percent)


def _forecast(rows: Rows) -> Iterator[Verdict]:
    for row in rows.get("forecast", []):
        if "forecast_over_peak" in row:
            share = row["forecast_over_peak"]
            figure = f"forecast / counted peak, {row['precision']}, {row['size']}"
            right = f"{_times(FORECAST_LEAST)} to {_times(FORECAST_MOST)}"
            yield Verdict(figure, _times(share), right, FORECAST_LEAST <= share <= FORECAST_MOST)


def _waits(rows: Rows) -> Iterator[Verdict]:
    for row in rows.get("waits", []):
        if row["watched"]:
            figure = f"waits in a step that is not logged, {row['precision']}, {row['loss']}"
            yield Verdict(figure, row["waits"], "none", row["waits"] == "none")
