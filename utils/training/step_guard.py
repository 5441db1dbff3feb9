"""What a healthy run does not do: steps that are not finite, losses that jump, and red flags with the likely cause.

Nothing here makes the host wait for the GPU at a step: `StepGuard` decides on the device and tells at logged steps,
`RedFlags` looks at their records and at labels that are still on the host.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


MOST_SKIPPED = 20
"""Optimizer steps in a row that are not finite, after which the run stops."""

TOLD = 20
"""So many steps left out are told one by one; from then on ever more rarely."""

MOST_PENDING = 1000
"""Steps whose outcome is kept on the device before the host has to read it."""

SPIKE_WINDOW, SPIKE_LEAST = 128, 32
"""Finite losses that a new one is compared with, and how many there must be."""

SPIKE_DEVIATIONS, SPIKE_SHARE = 6.0, 0.25
"""A spike is so many robust standard deviations, and such a share of the median, above the median."""


class Spikes:
    """Counts losses far above the recent ones.

    Compared with the median of the last `SPIKE_WINDOW` finite losses; the deviation is 1.4826 times the median
    absolute deviation, the standard deviation of normal noise. Neither NaN nor spikes move a median by much, and a
    constant loss, whose deviation is 0, is judged by its share.
    """

    def __init__(self) -> None:
        self.total = 0
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def add(self, step: int, loss: float) -> None:
        """Take note of the loss of a step."""
        if not math.isfinite(loss):
            return
        if len(self.recent) >= SPIKE_LEAST:
            middle = median(self.recent)
            deviation = 1.4826 * median(abs(value - middle) for value in self.recent)
            if loss - middle > max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(middle)):
                self.total += 1
                if self.total.bit_count() == 1:  # 1, 2, 4, 8, ...
                    log.warning(
                        "loss spike at step %d: %.4g, and the median of the %d steps before is %.4g; spike number %d "
                        "of this run, told ever more rarely",
                        step, loss, len(self.recent), middle, self.total,
                    )  # fmt: skip
        self.recent.append(loss)


@dataclass(frozen=True)
class _Step:
    """What is known of a step before the host reads its outcome."""

    step: int
    documents: list[Sequence[str]]
    """By micro-batch of this process."""
    terms: list[list[str]]
    finite: list[Tensor]
    """By micro-batch: for each of its terms, whether its value is finite; [terms] on the device."""
    outcome: Tensor
    """[2] on the device: the loss over all processes, and 1 if the step was left out."""


class StepGuard:
    """Leaves out steps whose loss or gradient is not finite, and names the text; counts loss spikes.

    Args:
        total: tensor -> its sum over all processes, on the device.
        gather: list -> the lists of all processes, joined.
        scaled: with a gradient scaler, which decides itself and looks for its scale by leaving steps out.

    Attributes:
        skipped: steps left out so far.
        exhausted: the last `MOST_SKIPPED` steps were left out.
    """

    def __init__(self, total: Callable[[Tensor], Tensor], gather: Callable[[list], list], scaled: bool) -> None:
        self._total, self._gather, self._scaled = total, gather, scaled
        self.skipped = self._row = 0
        self.exhausted = False
        self.spikes = Spikes()
        self._micro_batches: list[tuple[Sequence[str], list[str], Tensor, Tensor]] = []
        self._pending: list[_Step] = []

    def look(self, output: Any, documents: Sequence[str]) -> None:
        """Take note of a micro-batch: its loss, and which of the terms that weigh something are finite."""
        names = [name for name in output.terms if output.weights[name]]
        loss = output.loss.detach()
        values = torch.stack([output.terms[name].sum.detach().to(loss.dtype) for name in names] or [loss])
        self._micro_batches.append((documents, names, values.isfinite(), loss))

    def forget(self) -> None:
        """Take back the notes on a step that is done again."""
        self._micro_batches = []

    def decide(self, step: int, norm: Tensor) -> Tensor:
        """Whether the step that ends now is to be left out, as a scalar bool tensor. `step`: counted from 1."""
        seen, self._micro_batches = self._micro_batches, []
        loss = torch.stack([loss for *_, loss in seen]).sum() if seen else torch.zeros_like(norm)
        loss = self._total(loss.to(norm.device, torch.float32))
        is_bad = ~norm.isfinite() if self._scaled else ~(norm.isfinite() & loss.isfinite())
        outcome = torch.stack([loss, is_bad.float()])
        documents, terms, finite = ([part[i] for part in seen] for i in range(3))
        self._pending.append(_Step(step, documents, terms, finite, outcome))
        return is_bad

    @property
    def must_read(self) -> bool:
        return len(self._pending) >= MOST_PENDING

    def read(self) -> None:
        """Tell what happened since the last time; the one place that waits for the device. Call it in all processes."""
        pending, self._pending = self._pending, []
        outcomes = torch.stack([step.outcome for step in pending]).tolist() if pending else []
        for seen, (loss, is_bad) in zip(pending, outcomes, strict=True):
            self._row = self._row + 1 if is_bad else 0
            self.exhausted = self.exhausted or self._row >= MOST_SKIPPED
            if not is_bad:
                self.spikes.add(seen.step, loss)
                continue
            self.skipped += 1
            if self.skipped <= TOLD or self.skipped.bit_count() == 1:
                self._tell(seen, loss)

    def explanation(self, step: int) -> str:
        """Why the run stops at this step."""
        return (
            f"loss or gradient were not finite in {MOST_SKIPPED} optimizer steps in a row or more (up to step {step}), "
            "so none of them was taken. The log names their documents. Likely cause: a learning rate that is too high, "
            "activations that overflow in half precision (try --mixed-precision no and --set teacher.dtype=float32), "
            "or weights that were damaged before. The checkpoint of this step has the weights from before the first "
            "of them."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint; `read` first."""
        recent = list(self.spikes.recent)
        return {"skipped": self.skipped, "in_a_row": self._row, "spikes": self.spikes.total, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.skipped, self._row, self.spikes.total = state["skipped"], state["in_a_row"], state["spikes"]
        self.spikes.recent.clear()
        self.spikes.recent.extend(state["recent"])

    def _tell(self, seen: _Step, loss: float) -> None:
        found = []
        for documents, names, finite in zip(seen.documents, seen.terms, seen.finite, strict=True):
            term = next((name for name, right in zip(names, finite.tolist(), strict=False) if not right), None)
            found.append((term, list(documents)))
        found = self._gather(found)
        guilty = [(term, documents) for term, documents in found if term is not None]
        gradient = "the gradient (every term of the loss is finite)"
        what = guilty[0][0] if guilty else gradient if math.isfinite(loss) else "the loss (every term is finite)"
        told = _named(documents for _, documents in guilty or found)
        level = logging.INFO if self._scaled and not guilty else logging.WARNING
        log.log(level, "step %d left out, number %d: %s is not finite; documents %s",
                seen.step, self.skipped, what, told)  # fmt: skip


def _named(batches: Iterable[Sequence[str]], most: int = 16) -> str:
    """Names of documents without repetition; a window's name may be those of several, with commas."""
    names = list(dict.fromkeys(name for batch in batches for window in batch for name in window.split(",") if name))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "without a name"
