"""Weights of the loss terms, and any other scalar, as a function of training progress."""

import math
import warnings
from collections.abc import Mapping
from itertools import pairwise

from .config import CurriculumConfig, LossConfig, Ramp, Schedule, values_of
from .validation import expect, expect_count


def value_at(schedule: Schedule, progress: float) -> float:
    """Return the value of a constant or a ramp at a progress in [0, 1]."""
    if not isinstance(schedule, Ramp):
        return float(schedule)

    # Outside of its points a ramp is constant.
    first_progress, first_value = schedule.points[0]
    last_progress, last_value = schedule.points[-1]
    if progress < first_progress:
        return float(first_value)
    if progress >= last_progress:
        return float(last_value)

    # A progress that is itself a point begins the stretch to the next one.
    (start, low), (end, high) = next(pair for pair in pairwise(schedule.points) if progress < pair[1][0])
    share = (progress - start) / (end - start)
    if schedule.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return low + (high - low) * share


MOST_BALANCE = 10.0
"""Most of the factor by which a balance changes a weight, and its inverse the least."""


def balanced(weights: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
    """Return weights under which terms contribute to the total in proportion to what the weights say.

    Each is multiplied by the weighted mean of all sizes over the size of its term, so that the total stays what it was
    unless a factor meets its bound: a term that has nothing left to teach cannot contribute its share. The idea of a
    ratio without a gradient is NeMo-RL's.

    Args:
        sizes: of each term in the step before: its loss, or the norm of its gradient; a term without one keeps its
            weight.
    """
    result = dict(weights)
    compared = [name for name, weight in weights.items() if weight and name in sizes]
    contributed = sum(weights[name] * sizes[name] for name in compared)
    if len(compared) < 2 or contributed <= 0:
        return result

    mean = contributed / sum(weights[name] for name in compared)
    for name in compared:
        # Bounded before the division: a term that has nothing left to teach has the size 0.
        bounded = min(max(sizes[name], mean / MOST_BALANCE), mean * MOST_BALANCE)
        result[name] *= mean / bounded
    return result


class CurriculumScheduler:
    """Weights and scalars as a pure function of the optimizer step: it has no state that a resume could lose.

    A balance takes the sizes of the terms besides, which are given to it.

    Args:
        curriculum: the weight of every term.
        loss: the source of the scheduled scalars (temperatures, skew, interpolation).
        total_steps: optimizer steps of the whole run.

    Raises:
        TypeError, ValueError: an argument of another kind, or no step.
    """

    def __init__(
        self,
        curriculum: CurriculumConfig,
        loss: LossConfig,
        total_steps: int,
    ) -> None:
        expect("curriculum", curriculum, CurriculumConfig, "a CurriculumConfig")
        expect("loss", loss, LossConfig, "a LossConfig")
        total_steps = expect_count("total_steps", total_steps, 1)

        self._weights: dict[str, Schedule] = {}
        for name, term in curriculum.terms().items():
            self._weights[name] = term.weight
        self._scalars: dict[str, Schedule] = {
            "temperature": loss.temperature,
            "span_temperature": loss.span_temperature,
        }
        # Scalars that nothing reads are no facts about a step.
        if loss.reads_skew:
            self._scalars["skew"] = loss.skew
        if loss.interpolation != 1:
            self._scalars["interpolation"] = loss.interpolation
        if curriculum.select != 1:
            self._scalars["select"] = curriculum.select
        if curriculum.open_text != 1:
            self._scalars["open_text"] = curriculum.open_text
        if curriculum.sample_weights != 0:
            self._scalars["sample_weights"] = curriculum.sample_weights

        self.balance = curriculum.balance
        self.uses_statistics = curriculum.uses_statistics
        self.weights_windows = any(values_of(curriculum.sample_weights))
        self._own_text = curriculum.on_policy
        self._open_text = curriculum.open_text
        self.opens_text = curriculum.opens_text
        self.uses_own_text = curriculum.uses_own_text

        self.loss = loss
        self.used = curriculum.used()
        self.total_steps = total_steps

    def progress(self, step: int | None) -> float:
        """Return the share of the run that is done before `step`; None stands for the end, where weights stay.

        Raises:
            TypeError, ValueError: a step that is no whole number, or negative.
        """
        if step is None:
            return 1.0

        step = expect_count("step", step, 0)
        if step > self.total_steps:
            warnings.warn(
                f"step {step} lies behind the {self.total_steps} of the curriculum, whose last weights are used: count "
                "optimizer steps, not micro-batches, or give CurriculumScheduler the right total_steps",
                stacklevel=2,
            )
        return min(1.0, step / self.total_steps)

    def weights(self, step: int | None, sizes: Mapping[str, float] | None = None) -> dict[str, float]:
        """Return the weight of every term at an optimizer step.

        Args:
            sizes: of terms in the step before, for a balance; None: nothing is known of it.
        """
        weights = {name: value_at(schedule, self.progress(step)) for name, schedule in self._weights.items()}
        if self.balance == "none" or sizes is None:
            return weights
        return balanced(weights, sizes)

    def scalars(self, step: int | None) -> dict[str, float]:
        """Return every other scheduled scalar at an optimizer step."""
        return {name: value_at(schedule, self.progress(step)) for name, schedule in self._scalars.items()}

    def on_policy(self, step: int | None) -> float:
        """Return the share of the windows of an optimizer step that the student writes itself."""
        return value_at(self._own_text, self.progress(step))

    def open_text(self, step: int) -> float:
        """Return the share of the training windows, from the easiest, that an optimizer step draws from.

        A step behind the run is no mistake: the order of an epoch is drawn to its end.
        """
        return value_at(self._open_text, self.progress(min(step, self.total_steps)))
