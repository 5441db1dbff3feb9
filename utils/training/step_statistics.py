"""Statistics of the optimizer steps before, of which the weights of the next one are made; in every checkpoint.

They are sums over whole steps, all micro-batches and processes, so that the split of a step changes nothing. To have
them the host waits for the device once a step; a module that does not use them costs nothing.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from .measurements import HostSum, StepSums

NEWEST_SHARE = 0.1
"""Share of the newest step in a running mean, once there are as many steps as make it their plain mean."""

SAMPLES = "samples"
"""Name under which the module finds the mean of what it weights windows by."""


class StepStatistics:
    """Size of each term in the step before, and the running mean of what windows are weighted by.

    Args:
        module: its `curriculum`, where it has one, says which of them it uses.
    """

    def __init__(self, module: nn.Module) -> None:
        curriculum = getattr(module, "curriculum", None)
        self.balance: str = getattr(curriculum, "balance", "none")
        self.is_used: bool = getattr(curriculum, "uses_statistics", False)
        self.values: dict[str, float] = {}
        self.scored_steps = 0
        """Steps whose windows were scored."""
        self.spread: float | None = None
        """Standard deviation of the sample weights in the step before; None where there were none."""

    @property
    def needs_gradients(self) -> bool:
        """True if the gradient of each term is to be measured in every step."""
        return self.balance == "gradient"

    def options(self) -> dict[str, Any]:
        """Return what the module's forward is given besides its batch."""
        return {"statistics": self.values} if self.is_used else {}

    def take(
        self,
        sums: StepSums,
        counts: Mapping[str, int],
        *,
        host: HostSum,
        accelerator: Accelerator,
    ) -> None:
        """Take a step whose gradient is added up; waits for the device. Call it in all processes.

        A value that is not finite, or of a term without items, leaves the one before.
        """
        if not self.is_used:
            return

        names = [name for name in sorted(sums.weights) if sums.weights[name] and counts.get(name)]
        whole = _sum_up(sums, names, host)
        # A step in which nothing was scored, as where the degree is 0, says nothing of the scores.
        self.spread = None
        mean_weight = 1.0
        if whole.scored:
            positions = max(counts.get("kd", 0), 1)
            self.scored_steps += 1
            self._update(SAMPLES, whole.scores / positions, max(NEWEST_SHARE, 1 / self.scored_steps))
            self.spread = math.sqrt(whole.squares / positions)
            mean_weight = whole.weights / positions

        sizes: dict[str, float] = {}
        if self.balance == "loss":
            sizes = {name: total / counts[name] for name, total in whole.terms.items()}
        if self.needs_gradients and sums.gradients is not None:
            norms = sums.gradients.norms(sums.weights, accelerator)
            sizes = {name: norm / sums.weights[name] for name, norm in norms.items()}
        # Windows that weigh little in this step say nothing of the size of KD in the next.
        if "kd" in sizes and mean_weight:
            sizes["kd"] /= mean_weight
        for name, size in sizes.items():
            self._update(name, size, 1.0)

    def _update(self, name: str, value: float, share: float) -> None:
        """Move a value towards a newer one by a share of the way."""
        if not math.isfinite(value):
            return
        before = self.values.get(name, value)
        self.values[name] = value if share == 1 else before + share * (value - before)

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers, for a checkpoint."""
        return {
            "values": dict(self.values),
            "balance": self.balance,
            "scored_steps": self.scored_steps,
            "spread": self.spread,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the sizes of terms count for the same balance alone."""
        values = dict(state["values"])
        if state["balance"] != self.balance:
            values = {name: value for name, value in values.items() if name == SAMPLES}
        self.values = values
        self.scored_steps = state["scored_steps"]
        self.spread = state["spread"]


class _WholeSums(NamedTuple):
    """Sums over all micro-batches and processes of a step."""

    terms: dict[str, float]
    scores: float
    """Of what windows are weighted by, over the rows of KD."""
    weights: float
    """Of the weights of windows, likewise."""
    squares: float
    """Of the square of each weight less 1, likewise."""
    scored: float
    """Micro-batches whose windows were scored."""


def _sum_up(sums: StepSums, names: list[str], host: HostSum) -> _WholeSums:
    """Return the sums of a step from those of this process."""
    row = []
    for name in names:
        values = sums.sums.get(name)
        row.append(float(torch.stack(values).sum()) if values else 0.0)
    samples = torch.stack(sums.samples).sum(0).tolist() if sums.samples else [0.0, 0.0, 0.0]

    *terms, scores, weights, squares, scored = host([*row, *samples, float(len(sums.samples))])
    return _WholeSums(dict(zip(names, terms, strict=True)), scores, weights, squares, scored)
