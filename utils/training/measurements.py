"""Numbers that the loop collects while it runs; the host waits for the device only where a step is logged.

HostSum        sums over processes, of numbers on the host
Measured       losses and terms of one logged step
TermGradients  norm of the gradient of each term, for debugging
Clock          seconds and tokens
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from ..interfaces import StepOutput

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


# ---------------------------------------------------------------------------------- a logged step


@dataclass
class Measured:
    """Sums of one logged optimizer step; they stay on the device until `read`."""

    losses: list[Tensor] = field(default_factory=list)
    """By micro-batch."""
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    """By term and micro-batch."""
    counts: dict[str, int] = field(default_factory=dict)
    """Items of each term in this process."""
    weights: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    """Scheduled values: temperature, top-k."""
    skipped: dict[str, list[Tensor]] = field(default_factory=dict)
    """By term and micro-batch: items that turned out to say nothing."""
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
        for name, term in output.terms.items():
            self.sums.setdefault(name, []).append(term.sum.detach())
            self.counts[name] = self.counts.get(name, 0) + int(term.count)
            skipped = getattr(term, "skipped", None)
            if skipped is not None:
                self.skipped.setdefault(name, []).append(skipped)

    def skips(self, name: str, host: HostSum) -> int:
        """Return the items of a term that turned out to say nothing, over all processes."""
        skipped = 0.0
        if name in self.skipped:
            skipped = float(torch.stack(self.skipped[name]).sum())
        [total] = host([skipped])
        return int(total)

    def read(self, host: HostSum, counts: Mapping[str, int]) -> tuple[float, dict[str, dict[str, float]]]:
        """Return (loss, terms) of the step over all processes; the one place that waits for the device."""
        names = sorted(self.weights)
        loss, *sums = self._sums_on_host(names)

        # One row a term: its sum, processes that computed it, its items. One exchange for all of them.
        rows = [(loss, 0.0, 0.0)]
        for name, value in zip(names, sums, strict=True):
            is_computed = float(name in self.sums)
            items = float(self.counts.get(name, 0))
            rows.append((value, is_computed, items))
        table = host.of_tensor(torch.tensor(rows, dtype=torch.float64))
        (loss, _, _), *term_rows = table.tolist()

        # In the order of the curriculum, without terms that no process has computed.
        totals = dict(zip(names, term_rows, strict=True))
        terms = {}
        for name, weight in self.weights.items():
            value, processes, items = totals[name]
            if not processes:
                continue
            # The collator's count, which the loss was divided by; a term that it does not count says it itself.
            count = counts.get(name, int(items))
            raw = value / max(count, 1)
            terms[name] = {
                "raw": raw,
                "weight": weight,
                "weighted": weight * raw,
                "count": int(count),
            }
        return loss, terms

    def _sums_on_host(self, names: Sequence[str]) -> list[float]:
        """Return the sums over this process's micro-batches: of the loss, then of each term."""
        if not self.losses:
            return [0.0] * (1 + len(names))

        # One copy from the device for all of them, and exact sums of what was copied.
        columns = [self.losses]
        for name in names:
            columns.append(self.sums.get(name, []))
        values = torch.stack([value for column in columns for value in column]).cpu()
        lengths = [len(column) for column in columns]
        return [math.fsum(part.tolist()) for part in values.split(lengths)]

    def record(self, host: HostSum, counts: Mapping[str, int], accelerator: Accelerator) -> dict[str, Any]:
        """Return what a record of `metrics.jsonl` says of the loss: terms, coverage, scheduled scalars.

        Args:
            counts: of the whole optimizer step.
        """
        loss, terms = self.read(host, counts)
        if self.gradients is not None:
            norms = self.gradients.norms(self.weights, accelerator)
            for name in terms.keys() & norms.keys():
                terms[name]["grad_norm"] = norms[name]

        record: dict[str, Any] = {"loss": loss, "terms": terms}
        if "kd" in terms:
            # The loss of KD is multiplied by the temperature squared, nats are not.
            record["kd_nats_per_token"] = terms["kd"]["raw"] / self.scalars.get("temperature", 1.0) ** 2
        if counts.get("lm"):
            record["coverage"] = self._coverage(host, counts)
        for key in ("top_k", "temperature"):
            if key in self.scalars:
                record[key] = self.scalars[key]
        return record

    def _coverage(self, host: HostSum, counts: Mapping[str, int]) -> dict[str, float]:
        """Return the shares of the student's tokens that have an anchor, and one at depth 0."""
        # KD rows that turned out to say nothing are no anchors.
        skipped = self.skips("kd", host)
        coverage = {}
        if "kd" in counts:
            coverage["anchored"] = (counts["kd"] - skipped) / counts["lm"]
        if "depth0" in counts:
            coverage["depth0"] = counts["depth0"] / counts["lm"]
        return coverage


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
    def paused(self) -> Iterator[None]:
        """Let time pass, for evaluation and checkpoints, that does not count as time for tokens."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start
