"""What the loop counts while it runs, without making the host wait for the device more than it must."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor


class HostSum:
    """Sums of small host-side numbers over all processes, without touching the accelerator's device."""

    def __init__(self, accelerator: Accelerator, names: list[str]) -> None:
        self.names = names
        self._many = accelerator.num_processes > 1
        self._group = torch.distributed.new_group(backend="gloo") if self._many else None

    def __call__(self, values: list[float]) -> list[float]:
        if not self._many:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=self._group)
        return total.tolist()

    def sum_counts(self, counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
        """Counts of the whole optimizer step."""
        own = [sum(int(count.get(name, 0)) for count in counts) for name in self.names]
        return {name: int(total) for name, total in zip(self.names, self(own), strict=True)}

    def any_of(self, value: str | None, values: Sequence[str]) -> str | None:
        """The first of `values` that some process has."""
        given = self([float(value == candidate) for candidate in values])
        return next((candidate for candidate, count in zip(values, given, strict=True) if count), None)

    def close(self) -> None:
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)


@dataclass
class Measured:
    """Sums of one logged optimizer step; they stay on the device until `read`."""

    losses: list[Tensor] = field(default_factory=list)
    sums: dict[str, list[Tensor]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, list[Tensor]] = field(default_factory=dict)
    gradients: "TermGradients | None" = None
    """Only where they were asked for."""

    def add(self, output: Any, idle: bool) -> None:
        """Take a micro-batch's output; of an idle one only what is the same for all."""
        self.weights, self.scalars = dict(output.weights), dict(output.scalars)
        if idle:
            return
        self.losses.append(output.loss.detach())
        for name, term in output.terms.items():
            self.sums.setdefault(name, []).append(term.sum.detach())
            self.counts[name] = self.counts.get(name, 0) + int(term.count)
            if getattr(term, "skipped", None) is not None:
                self.skipped.setdefault(name, []).append(term.skipped)

    def skips(self, name: str, host: HostSum) -> int:
        """Items of a term that turned out to say nothing, over all processes."""
        return int(host([float(torch.stack(self.skipped[name]).sum()) if name in self.skipped else 0.0])[0])

    def read(self, host: HostSum, counts: Mapping[str, int]) -> tuple[float, dict[str, dict[str, float]]]:
        """(loss, terms) of the step over all processes; the one place that waits for the device."""
        names = sorted(self.weights)
        columns = [self.losses, *(self.sums.get(name, []) for name in names)]
        flat = torch.stack([value for column in columns for value in column]).tolist() if self.losses else []
        values = iter(flat)
        sums = [math.fsum(islice(values, len(column))) for column in columns]
        seen = [float(name in self.sums) for name in names]
        own = [float(self.counts.get(name, 0)) for name in names]
        total = host([*sums, *seen, *own])
        loss, sums = total[0], total[1 : 1 + len(names)]
        seen, own = total[1 + len(names) : 1 + 2 * len(names)], total[1 + 2 * len(names) :]
        terms = {}
        for name, value, present, count in zip(names, sums, seen, own, strict=True):
            if present:
                count = counts.get(name, int(count))
                raw, weight = value / max(count, 1), self.weights[name]
                terms[name] = {"raw": raw, "weight": weight, "weighted": weight * raw, "count": int(count)}
        return loss, {name: terms[name] for name in self.weights if name in terms}

    def record(self, host: HostSum, counts: Mapping[str, int], accelerator: Accelerator) -> dict[str, Any]:
        """What a record of `metrics.jsonl` tells of the loss: terms, coverage, scheduled scalars.

        Args:
            counts: of the whole optimizer step.
        """
        loss, terms = self.read(host, counts)
        if self.gradients is not None:
            norms = self.gradients.norms(self.weights, accelerator)
            terms = {name: term | ({"grad_norm": norms[name]} if name in norms else {}) for name, term in terms.items()}
        record: dict[str, Any] = {"loss": loss, "terms": terms}
        if "kd" in terms:
            record["kd_nats_per_token"] = terms["kd"]["raw"] / self.scalars.get("temperature", 1.0) ** 2
        if counts.get("lm"):
            skipped = {"kd": self.skips("kd", host)}
            record["coverage"] = {
                key: (counts[name] - skipped.get(name, 0)) / counts["lm"]
                for key, name in {"anchored": "kd", "depth0": "depth0"}.items()
                if name in counts
            }
        return record | {key: self.scalars[key] for key in ("top_k", "temperature") if key in self.scalars}


class TermGradients:
    """The gradient that each term contributes to some parameters in one optimizer step: that of its weighted share.

    For debugging: costs a backward pass and the memory of one gradient per term. It leaves `.grad` alone, and with
    it the run.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, output: Any, counts: Mapping[str, int], scale: float = 1.0) -> None:
        """Take a micro-batch's output, before the backward pass that frees its graph.

        Args:
            counts: of the whole optimizer step.
            scale: factor that keeps half-precision gradients from vanishing on their way; divided out again.
        """
        for name, term in output.terms.items():
            weight = output.weights[name]
            if weight > 0 and term.sum.requires_grad:
                share = term.sum * (weight * scale / max(int(counts.get(name, term.count)), 1))
                gradients = torch.autograd.grad(share, self.parameters, retain_graph=True, allow_unused=True)
                for total, gradient in zip(self._of(name), gradients, strict=True):
                    if gradient is not None:
                        total.add_(gradient, alpha=1 / scale)

    def norms(self, weights: Mapping[str, float], accelerator: Accelerator) -> dict[str, float]:
        """Norm of each term's gradient, summed over micro-batches and processes, which must all call this."""
        norms = {}
        for name in (name for name, weight in weights.items() if weight > 0):
            found = torch.tensor(float(name in self._sums), device=accelerator.device)
            if accelerator.reduce(found, "sum").item():
                parts = [accelerator.reduce(total, "sum").norm() for total in self._of(name)]
                norms[name] = torch.stack(parts).norm().item()
        return norms

    def _of(self, name: str) -> list[Tensor]:
        if name not in self._sums:
            self._sums[name] = [torch.zeros_like(parameter) for parameter in self.parameters]
        return self._sums[name]


class Clock:
    """Seconds of the run, and supervised student tokens per second since the last logged step."""

    def __init__(self) -> None:
        self.before = 0.0
        self.tokens = 0
        self.waited = 0.0
        """Seconds in which there was no batch to work on."""
        self._began = self._since = time.monotonic()

    def total(self) -> float:
        """Seconds, sessions before a resume included."""
        return self.before + time.monotonic() - self._began

    def tokens_per_second(self) -> float:
        now = time.monotonic()
        speed = self.tokens / max(now - self._since, 1e-9)
        self._since, self.tokens = now, 0
        return speed

    def delivered(self, batches: Iterator[Any]) -> Any:
        """The next of `batches`; what it takes is time in which nothing is computed."""
        start = time.monotonic()
        found = next(batches)
        self.waited += time.monotonic() - start
        return found

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time for evaluation and checkpoints does not count as time for tokens."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start
