"""Guard of optimizer steps: leaves out steps that are not finite, counts losses that jump.

`StepGuard` decides on the device, so that the host never waits for it at a step, and tells at logged steps.

Shapes: T terms of a micro-batch that weigh something.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..interfaces import StepOutput

log = logging.getLogger(__name__)


MOST_SKIPPED = 20
"""Optimizer steps in a row that are not finite, after which the run stops."""

TOLD = 20
"""Skipped steps reported one by one; after that only at powers of two."""

MOST_PENDING = 1000
"""Steps whose outcome is kept on the device before the host has to read it."""

MOST_NAMES = 16
"""Documents named in a message."""

SPIKE_WINDOW = 128
"""Finite losses that a new one is compared with."""

SPIKE_LEAST = 32
"""Losses that there must be before one is called a spike."""

SPIKE_DEVIATIONS = 6.0
"""Robust standard deviations that a spike is above the median, at least."""

SPIKE_SHARE = 0.25
"""Share of the median that a spike is above it, at least."""


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
            self._compare(step, loss)
        self.recent.append(loss)

    def _compare(self, step: int, loss: float) -> None:
        """Count a loss that is a spike beside the recent ones, and warn of the 1st, 2nd, 4th, 8th, ..."""
        middle = median(self.recent)
        # Medians, not mean and standard deviation: one spike would hide the next.
        deviation = 1.4826 * median(abs(value - middle) for value in self.recent)
        threshold = max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(middle))
        if loss - middle <= threshold:
            return

        self.total += 1
        if _is_power_of_two(self.total):
            log.warning(
                "loss spike at step %d: %.4g, and the median of the %d steps before is %.4g; spike number %d "
                "of this run, told ever more rarely",
                step,
                loss,
                len(self.recent),
                middle,
                self.total,
            )


class _MicroBatch(NamedTuple):
    """Notes on one micro-batch of this process."""

    documents: Sequence[str]
    terms: list[str]
    """That weigh something."""
    is_finite: Tensor
    """[T] bool on the device: the values of the terms are finite."""
    loss: Tensor
    """Scalar on the device."""


@dataclass(frozen=True)
class _Step:
    """A step that was taken or left out, before the host reads which."""

    step: int
    """Counted from 1."""
    micro_batches: Sequence[_MicroBatch]
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
        self._total = total
        self._gather = gather
        self._scaled = scaled

        self.skipped = 0
        self.exhausted = False
        self.spikes = Spikes()
        self._skipped_in_a_row = 0
        self._micro_batches: list[_MicroBatch] = []
        self._pending: list[_Step] = []

    # --- at every step, on the device -------------------------------------------------------------------------------

    def look(self, output: StepOutput, documents: Sequence[str]) -> None:
        """Take note of a micro-batch: its loss, and which of the terms that weigh something are finite."""
        loss = output.loss.detach()
        names = [name for name in output.terms if output.weights[name]]
        # Without a term the loss stands in: torch cannot stack nothing.
        values = [output.terms[name].sum.detach().to(loss.dtype) for name in names] or [loss]
        self._micro_batches.append(_MicroBatch(documents, names, torch.stack(values).isfinite(), loss))

    def forget(self) -> None:
        """Take back the notes on a step that is done again."""
        self._micro_batches = []

    def decide(self, step: int, norm: Tensor) -> Tensor:
        """Return a scalar bool tensor: the step that ends now is to be left out.

        Args:
            step: counted from 1.
            norm: scalar, of the whole gradient.
        """
        micro_batches = self._micro_batches
        self._micro_batches = []

        # A process that was idle in the whole step has none.
        loss = torch.zeros_like(norm)
        if micro_batches:
            loss = torch.stack([micro_batch.loss for micro_batch in micro_batches]).sum()
        loss = self._total(loss.to(norm.device, torch.float32))

        # A scaler looks at gradients alone, and must not be contradicted.
        is_good = norm.isfinite()
        if not self._scaled:
            is_good = is_good & loss.isfinite()
        is_bad = ~is_good

        outcome = torch.stack([loss, is_bad.float()])
        self._pending.append(_Step(step, micro_batches, outcome))
        return is_bad

    # --- at logged steps, on the host -------------------------------------------------------------------------------

    @property
    def must_read(self) -> bool:
        """Reading is due: many outcomes wait on the device."""
        return len(self._pending) >= MOST_PENDING

    def read(self) -> None:
        """Tell what happened since the last time; the one place that waits for the device. Call it in all processes."""
        pending = self._pending
        self._pending = []
        if not pending:
            return

        # One copy from the device for all of them.
        outcomes = torch.stack([step.outcome for step in pending]).tolist()
        for step, (loss, is_bad) in zip(pending, outcomes, strict=True):
            if is_bad:
                self._skipped_in_a_row += 1
                self._count_skipped(step, loss)
            else:
                self._skipped_in_a_row = 0
                self.spikes.add(step.step, loss)
            # It stays so, even if a step after these was taken before the host could read.
            if self._skipped_in_a_row >= MOST_SKIPPED:
                self.exhausted = True

    def explanation(self, step: int) -> str:
        """Return why the run stops at this step."""
        return (
            f"loss or gradient were not finite in {MOST_SKIPPED} optimizer steps in a row or more (up to step {step}), "
            "so none of them was taken. The log names their documents. Likely cause: a learning rate that is too high, "
            "activations that overflow in half precision (try --mixed-precision no and --set teacher.dtype=float32), "
            "or weights that were damaged before. The checkpoint of this step has the weights from before the first "
            "of them."
        )

    def _count_skipped(self, step: _Step, loss: float) -> None:
        self.skipped += 1
        if self.skipped <= TOLD or _is_power_of_two(self.skipped):
            self._report_skipped(step, loss)

    def _report_skipped(self, step: _Step, loss: float) -> None:
        """Log why a step was left out, with its documents; all processes call it, as they gather what they know."""
        # Other processes may have met what this one has not.
        notes = []
        for micro_batch in step.micro_batches:
            notes.append((_first_bad_term(micro_batch), list(micro_batch.documents)))
        notes = self._gather(notes)

        # Documents of the micro-batches at fault; of all of them, where no term is.
        faults = [(term, documents) for term, documents in notes if term is not None]
        if faults:
            cause = faults[0][0]
        elif math.isfinite(loss):
            cause = "the gradient (every term of the loss is finite)"
        else:
            cause = "the loss (every term is finite)"
        names = _names(documents for _, documents in faults or notes)

        # A scaler leaves steps out until it has found its scale, which is no fault.
        level = logging.INFO if self._scaled and not faults else logging.WARNING
        log.log(
            level,
            "step %d left out, number %d: %s is not finite; documents %s",
            step.step,
            self.skipped,
            cause,
            names,
        )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers, for a checkpoint; `read` first."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._skipped_in_a_row,
            "spikes": self.spikes.total,
            "recent": list(self.spikes.recent),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.skipped = state["skipped"]
        self._skipped_in_a_row = state["in_a_row"]
        self.spikes.total = state["spikes"]
        self.spikes.recent.clear()
        self.spikes.recent.extend(state["recent"])


def _first_bad_term(micro_batch: _MicroBatch) -> str | None:
    """Return the first term whose value is not finite; waits for the device."""
    for name, is_finite in zip(micro_batch.terms, micro_batch.is_finite.tolist(), strict=False):
        if not is_finite:
            return name
    return None


def _is_power_of_two(number: int) -> bool:
    return number.bit_count() == 1


def _names(batches: Iterable[Sequence[str]]) -> str:
    """Return names of documents without repetition; a window's name may be those of several, with commas."""
    names: dict[str, None] = {}
    for batch in batches:
        for window in batch:
            names |= dict.fromkeys(name for name in window.split(",") if name)
    if not names:
        return "without a name"

    text = ", ".join(list(names)[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        text += f" and {len(names) - MOST_NAMES} more"
    return text
