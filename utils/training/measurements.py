"""Numbers that the loop collects while it runs; the host waits for the device only where a step is logged.

HostSum        sums over processes, of numbers on the host
StepSums       losses and terms of one optimizer step
IntervalMeans  their means since the last logged step
TermGradients  norm of the gradient of each term, for debugging
Clock          seconds and tokens
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from ..interfaces import StepOutput
from .step_guard import MOST_PENDING

# ---------------------------------------------------------------------------- sums over processes


class HostSum:
    """Sums of small host-side numbers over all processes, without touching the accelerator's device.

    Args:
        names: of the terms that `sum_counts` adds up, in the same order in all processes.
    """

    def __init__(self, accelerator: Accelerator, names: list[str]) -> None:
        self.names = names
        self._has_others = accelerator.num_processes > 1
        self._group = None
        # Of its own: NCCL would take the numbers by way of the GPU, for which the host would wait.
        if self._has_others:
            self._group = torch.distributed.new_group(backend="gloo")

    def __call__(self, values: list[float]) -> list[float]:
        """Return the sum of each value over all processes, which must all call this."""
        if not self._has_others:
            return values
        return self.of_tensor(torch.tensor(values, dtype=torch.float64)).tolist()

    def of_tensor(self, values: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor on the CPU; `values` itself may be changed."""
        if self._has_others:
            torch.distributed.all_reduce(values, group=self._group)
        return values

    def sum_counts(self, counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """Return the counts of the whole optimizer step, from those of this process's micro-batches."""
        sums: list[float] = []
        for name in self.names:
            sums.append(sum(int(count.get(name, 0)) for count in counts))

        # float64 is exact up to 2**53.
        totals = [int(total) for total in self(sums)]
        return dict(zip(self.names, totals, strict=True))

    def any_of(self, value: str | None, values: Sequence[str]) -> str | None:
        """Return the first of `values` that some process has, the same in all of them."""
        counts = self([float(value == candidate) for candidate in values])
        for candidate, count in zip(values, counts, strict=True):
            if count:
                return candidate
        return None

    def close(self) -> None:
        """Give the processes' group back."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)


# ------------------------------------------------------------------------------------ means over steps


@dataclass
class StepSums:
    """Sums of one optimizer step, by micro-batch; they stay on the device until `IntervalMeans.read`."""

    losses: list[Tensor] = field(default_factory=list)
    """By micro-batch."""
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    """By term and micro-batch."""
    skipped: dict[str, list[Tensor]] = field(default_factory=dict)
    """By term and micro-batch: items that turned out to say nothing."""
    unlisted: dict[str, list[Tensor]] = field(default_factory=dict)
    """Those of them of which a listed teacher tells too little."""
    samples: list[Tensor] = field(default_factory=list)
    """By micro-batch: what the output says of the weights of windows, where they have some."""
    items: dict[str, int] = field(default_factory=dict)
    """Items of each term in this process."""
    weights: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    """Scheduled values: temperature, top-k."""
    gradients: "TermGradients | None" = None
    """Only where they are to be logged."""

    def add(self, output: StepOutput, *, is_idle: bool) -> None:
        """Take a micro-batch's output; of an idle one only what is the same for all."""
        self.weights = dict(output.weights)
        self.scalars = dict(output.scalars)
        if is_idle:
            return

        # Detached: the graph must go with the backward pass, not with the record.
        self.losses.append(output.loss.detach())
        samples = getattr(output, "samples", None)
        if samples is not None:
            self.samples.append(samples)
        for name, term in output.terms.items():
            self.sums.setdefault(name, []).append(term.sum.detach())
            self.items[name] = self.items.get(name, 0) + int(term.count)
            for sums, column in ((self.skipped, "skipped"), (self.unlisted, "unlisted")):
                value = getattr(term, column, None)
                if value is not None:
                    sums.setdefault(name, []).append(value)


@dataclass(frozen=True)
class _PendingStep:
    """A step whose sums the host has not read yet."""

    values: Tensor | None
    """[N] on the device, the sums of all its micro-batches; None in a process that was idle."""
    columns: list[int]
    """[N] column of the step's row to which each value is added."""
    items: dict[str, int]
    counts: dict[str, int]
    """Items of every term in the whole step, as the collator counted them."""
    weights: dict[str, float]
    scalars: dict[str, float]
    norm: Tensor
    """Scalar on the device."""


class _TermRow(NamedTuple):
    """Numbers of one term in a step, summed over all processes."""

    sum: float
    skipped: float
    unlisted: float
    computed: float
    """Processes that have computed it."""
    items: float


@dataclass
class TermTotals:
    """Sums over steps of one term."""

    steps: int = 0
    """Steps in which it was computed: all of them where it has a weight."""
    raw: float = 0.0
    """Sum of its mean over the items of each step."""
    weighted: float = 0.0
    count: float = 0.0
    skipped: float = 0.0
    unlisted: float = 0.0


@dataclass
class IntervalTotals:
    """Sums over the steps since the last logged one, over all processes; steps that were left out are not in them."""

    steps: int = 0
    loss: float = 0.0
    norm: float = 0.0
    kd_nats: float = 0.0
    """Of KD without the square of the temperature that its loss is multiplied by."""
    counts: dict[str, float] = field(default_factory=dict)
    """Items as the collator counted them, by name."""
    terms: dict[str, TermTotals] = field(default_factory=dict)


class IntervalMeans:
    """Means over the optimizer steps since the last logged one.

    Sums wait on the device, one small tensor a step, until `read`; nothing here makes an unlogged step wait.
    """

    def __init__(self) -> None:
        self.totals = IntervalTotals()
        self._pending: list[_PendingStep] = []
        self._weights: dict[str, float] = {}
        self._scalars: dict[str, float] = {}

    # --- at every step, on the device -------------------------------------------------------------------------------

    def add(self, step: StepSums, counts: Mapping[str, int], norm: Tensor) -> None:
        """Take a step that is done.

        Args:
            counts: items of every term in the whole step.
            norm: scalar, of the whole gradient before clipping.
        """
        # 1. The values of each column of the step's row, see `_row_columns`.
        names = sorted(step.weights)
        parts = [step.losses]
        for name in names:
            parts.append(step.sums.get(name, []))
        for sums in (step.skipped, step.unlisted):
            for name in names:
                parts.append(sums.get(name, []))

        # 2. One tensor for all of them.
        values: list[Tensor] = []
        columns: list[int] = []
        for column, part in enumerate(parts):
            values += [value.to(torch.float32) if not value.is_floating_point() else value for value in part]
            columns += [column] * len(part)

        self._pending.append(
            _PendingStep(
                values=torch.stack(values) if values else None,
                columns=columns,
                items=dict(step.items),
                counts=dict(counts),
                weights=step.weights,
                scalars=step.scalars,
                norm=norm.detach(),
            )
        )

    @property
    def must_read(self) -> bool:
        """Reading is due: many steps wait on the device."""
        return len(self._pending) >= MOST_PENDING

    # --- at logged steps and checkpoints, on the host ---------------------------------------------------------------

    def read(self, host: HostSum) -> None:
        """Add the steps that wait on the device to the totals; waits for the device. Call it in all processes."""
        pending = self._pending
        self._pending = []
        if not pending:
            return

        rows = host.of_tensor(torch.stack(_rows_on_host(pending))).tolist()
        norms = torch.stack([step.norm for step in pending]).tolist()
        for step, row, norm in zip(pending, rows, norms, strict=True):
            self._weights = step.weights
            self._scalars = step.scalars
            self._take(step, row, norm)

    def _take(self, step: _PendingStep, row: Sequence[float], norm: float) -> None:
        """Add one step to the totals, from its row over all processes."""
        names = sorted(step.weights)
        loss, *columns = row
        parts = (columns[i * len(names) : (i + 1) * len(names)] for i in range(5))

        totals = self.totals
        rows = (_TermRow(*values) for values in zip(*parts, strict=True))
        terms = {name: row for name, row in zip(names, rows, strict=True) if row.computed}
        for name in terms:
            totals.terms.setdefault(name, TermTotals())

        # One step that was left out would make the mean of a hundred not a number.
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return

        totals.steps += 1
        totals.loss += loss
        totals.norm += norm
        for name, count in step.counts.items():
            totals.counts[name] = totals.counts.get(name, 0.0) + count

        for name, term in terms.items():
            # The collator's count, which the loss was divided by; a term that it does not count says it itself.
            count = step.counts.get(name, int(term.items))
            total = totals.terms[name]
            total.skipped += term.skipped
            total.unlisted += term.unlisted
            # A step without items of a term says nothing of it, such as LM where the student wrote every window.
            if not count:
                continue

            raw = term.sum / count
            total.steps += 1
            total.raw += raw
            total.weighted += step.weights[name] * raw
            total.count += count
            if name == "kd":
                # The loss of KD is multiplied by the temperature squared, nats are not.
                totals.kd_nats += raw / step.scalars.get("temperature", 1.0) ** 2

    def record(self) -> dict[str, Any]:
        """Return what a record of `metrics.jsonl` says of the steps that were read, and begin anew.

        Losses, terms and coverage are means over the steps; `weight` and the scheduled scalars are those of the last.
        The loss is the sum of `weighted` over the terms.
        """
        totals = self.totals
        self.totals = IntervalTotals()

        terms = {}
        for name, weight in self._weights.items():
            if name in totals.terms:
                term = totals.terms[name]
                terms[name] = {
                    "raw": _mean(term.raw, term.steps),
                    "weight": weight,
                    "weighted": _mean(term.weighted, totals.steps),
                    "count": term.count / max(term.steps, 1),
                }

        record: dict[str, Any] = {
            "loss": _mean(totals.loss, totals.steps),
            "grad_norm": _mean(totals.norm, totals.steps),
            "terms": terms,
        }
        if "kd" in terms:
            record["kd_nats_per_token"] = _mean(totals.kd_nats, totals.terms["kd"].steps)
        if supervised_tokens(totals.counts):
            record["coverage"] = _coverage(totals)
        if totals.counts.get("own"):
            record["own_tokens"] = _mean(totals.counts["own"], totals.steps)
        for key in ("top_k", "temperature", "skew", "interpolation", "select", "open_text", "sample_weights"):
            if key in self._scalars:
                record[key] = self._scalars[key]
        return record

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers, for a checkpoint between two logged steps; `read` first."""
        return asdict(self.totals)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        terms = {name: TermTotals(**term) for name, term in state["terms"].items()}
        self.totals = IntervalTotals(**{**state, "terms": terms})


def _rows_on_host(pending: Sequence[_PendingStep]) -> list[Tensor]:
    """Return a row for each step, of this process: the loss; then each field of `_TermRow`, of all terms by name."""
    # One copy from the device for all steps.
    tensors = [step.values for step in pending if step.values is not None]
    values = torch.cat(tensors).cpu().tolist() if tensors else []

    rows = []
    first = 0
    for step in pending:
        names = sorted(step.weights)
        row = [0.0] * (1 + 3 * len(names))
        for column, value in zip(step.columns, values[first : first + len(step.columns)], strict=True):
            row[column] += value
        first += len(step.columns)

        row += [float(name in step.items) for name in names]
        row += [float(step.items.get(name, 0)) for name in names]
        rows.append(torch.tensor(row, dtype=torch.float64))
    return rows


def _coverage(totals: IntervalTotals) -> dict[str, float]:
    """Return the shares of the student's tokens that have an anchor, and one at depth 0; and that lost it to lists."""
    counts = totals.counts
    tokens = supervised_tokens(counts)
    coverage = {}
    if "kd" in counts:
        # KD rows that turned out to say nothing are no anchors.
        skipped = totals.terms["kd"].skipped if "kd" in totals.terms else 0.0
        coverage["anchored"] = (counts["kd"] - skipped) / tokens
        # What longer lists of a served teacher would give back.
        unlisted = totals.terms["kd"].unlisted if "kd" in totals.terms else 0.0
        if unlisted:
            coverage["unlisted"] = unlisted / tokens
    if "depth0" in counts:
        coverage["depth0"] = counts["depth0"] / tokens
    return coverage


def supervised_tokens(counts: Mapping[str, float]) -> float:
    """Return the student tokens that are learned: those of given text, which LM counts, and those it wrote itself."""
    return counts.get("lm", 0) + counts.get("own", 0)


def _mean(total: float, number: int) -> float:
    """Return a mean; not a number of nothing."""
    return total / number if number else math.nan


# ------------------------------------------------------------------------------ gradients of terms


class TermGradients:
    """The gradient that each term contributes to some parameters in one optimizer step: that of its weighted share.

    For debugging: costs a backward pass and the memory of one gradient per term. It leaves `.grad` alone, and with
    it the run.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, output: StepOutput, counts: Mapping[str, int], scale: float = 1.0) -> None:
        """Take a micro-batch's output, before the backward pass that frees its graph.

        Args:
            counts: of the whole optimizer step.
            scale: factor that keeps half-precision gradients from vanishing on their way; divided out again.
        """
        for name, term in output.terms.items():
            weight = output.weights[name]
            if weight <= 0 or not term.sum.requires_grad:
                continue

            # Its part of the loss of the whole step, as the module weighs it.
            count = max(int(counts.get(name, term.count)), 1)
            share = term.sum * (weight * scale / count)
            gradients = torch.autograd.grad(share, self.parameters, retain_graph=True, allow_unused=True)
            for total, gradient in zip(self._sums_of(name), gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=1 / scale)

    def norms(self, weights: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
        """Return the norm of each term's gradient, summed over micro-batches and processes, which must all call this.

        A term that no process has computed is left out.
        """
        norms = {}
        for name, weight in weights.items():
            if weight <= 0:
                continue
            is_computed = torch.tensor(float(name in self._sums), device=accelerator.device)
            if not accelerator.reduce(is_computed, "sum").item():
                continue

            # A process without it takes part with zeros.
            parts = []
            for total in self._sums_of(name):
                parts.append(accelerator.reduce(total, "sum").norm())
            norms[name] = torch.stack(parts).norm().item()
        return norms

    def _sums_of(self, name: str) -> list[Tensor]:
        """Return the gradients of a term so far, one a parameter; zeros at first."""
        if name not in self._sums:
            self._sums[name] = [torch.zeros_like(parameter) for parameter in self.parameters]
        return self._sums[name]


# -------------------------------------------------------------------------------------------- time


class Clock:
    """Seconds of the run, and supervised student tokens per second since the last logged step."""

    def __init__(self) -> None:
        self.before = 0.0
        """Seconds of the sessions before a resume."""
        self.tokens = 0
        """Supervised tokens since the last logged step."""
        self.waited = 0.0
        """Seconds in which there was no batch to work on."""
        self._began = time.monotonic()
        self._since = self._began

    def total(self) -> float:
        """Return the seconds of the run, sessions before a resume included."""
        return self.before + time.monotonic() - self._began

    def tokens_per_second(self) -> float:
        """Return the speed since the last call, and begin to count anew."""
        now = time.monotonic()
        speed = self.tokens / max(now - self._since, 1e-9)
        self._since = now
        self.tokens = 0
        return speed

    def delivered(self, batches: Iterator[Any]) -> Any:
        """Return the next of `batches`; what it takes is time in which nothing is computed."""
        start = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - start
        return batch

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let time pass in which the student writes: neither time for tokens that are learned, nor waiting."""
        start = time.monotonic()
        with self.paused():
            yield
        self.waited -= time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let time pass, for evaluation and checkpoints, that does not count as time for tokens."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start
