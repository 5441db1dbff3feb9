"""Weights of the loss terms, and any other scalar, as a function of training progress."""

import math
import warnings
from dataclasses import fields

from .config import CurriculumConfig, LossConfig, Ramp, Schedule
from .validation import expect, expect_count


def value_at(schedule: Schedule, progress: float) -> float:
    """The value of a constant or ramp at a progress in [0, 1]."""
    if not isinstance(schedule, Ramp):
        return float(schedule)
    before = [point for point in schedule.points if point[0] <= progress]
    after = [point for point in schedule.points if point[0] > progress]
    if not before or not after:
        return float((before or after)[-1 if before else 0][1])
    (p0, v0), (p1, v1) = before[-1], after[0]
    share = (progress - p0) / (p1 - p0)
    if schedule.shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return v0 + (v1 - v0) * share


class CurriculumScheduler:
    """A pure function of the optimizer step: it has no state that a resume could lose.

    Args:
        curriculum: the weight of every term.
        loss: the source of the scheduled scalars (temperatures).
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, curriculum: CurriculumConfig, loss: LossConfig, total_steps: int) -> None:
        expect("curriculum", curriculum, CurriculumConfig, "a CurriculumConfig")
        expect("loss", loss, LossConfig, "a LossConfig")
        total_steps = expect_count("total_steps", total_steps, 1)

        self._weights: dict[str, Schedule] = {f.name: getattr(curriculum, f.name).weight for f in fields(curriculum)}
        self._scalars: dict[str, Schedule] = {
            "temperature": loss.temperature,
            "span_temperature": loss.span_temperature,
        }
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

    def weights(self, step: int | None) -> dict[str, float]:
        """Weight of every term at an optimizer step."""
        return {name: value_at(schedule, self.progress(step)) for name, schedule in self._weights.items()}

    def scalars(self, step: int | None) -> dict[str, float]:
        """Every other scheduled scalar at an optimizer step."""
        return {name: value_at(schedule, self.progress(step)) for name, schedule in self._scalars.items()}
