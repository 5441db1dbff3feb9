"""What the loss is made of: plain, frozen dataclasses, one place for each default.

An instance is checked when it is made (`Validated`): the constraints (`Gt`, `Ge`, `Literal`, ...) hold for whoever
makes one, in a program or from a file.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from .divergences import DivergenceName
from .validation import Validated, as_plain


@dataclass(frozen=True)
class Ramp(Validated):
    """A scalar that follows training progress (step / total optimizer steps, in [0, 1]).

    `points` are (progress, value) pairs in increasing order of progress. Between two points the
    value is interpolated, linearly or along half a cosine; before the first and after the last
    point it is constant.
    """

    points: tuple[tuple[Annotated[float, Ge(0), Le(1)], float], ...]
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if isinstance(self.points, list | tuple):  # lists are welcome; tuples can be neither changed nor unhashable
            points = [
                tuple(as_plain(number) for number in point) if isinstance(point, list | tuple) else point
                for point in self.points
            ]
            object.__setattr__(self, "points", tuple(points))
        super().__post_init__()

        progress = [p for p, _ in self.points]
        if not progress or any(a >= b for a, b in pairwise(progress)):
            raise ValueError(
                f"a ramp needs points [[progress, value], ...] with rising progress, got {list(self.points)}"
            )


Schedule = float | Ramp
"""A constant, or a ramp over training progress."""


def values_of(schedule: Schedule) -> list[float]:
    """The values a schedule takes, those between them apart."""
    return [value for _, value in schedule.points] if isinstance(schedule, Ramp) else [schedule]


@dataclass(frozen=True)
class Term(Validated):
    """One term of the loss."""

    weight: Schedule = 0.0
    """Weight in the total. A term whose weight is 0 is not computed."""


@dataclass(frozen=True)
class CurriculumConfig(Validated):
    """Weight of every loss term over the run."""

    kd: Term = field(default_factory=lambda: Term(0.7))
    """Knowledge distillation: the teacher's next-token distribution, projected on the student's vocabulary."""
    span: Term = field(default_factory=Term)
    """Span likelihood: the probability of the text between common token boundaries."""
    lm: Term = field(default_factory=lambda: Term(0.3))
    """Next-token cross-entropy on the text."""
    feat: Term = field(default_factory=Term)
    """Router: distance of the student's states from the teacher's, at the same relative depth."""
    rel: Term = field(default_factory=Term)
    """Router: attention relations, how the states of a text resemble one another."""
    attn: Term = field(default_factory=Term)
    """Router: attention alignment, which teacher state a student's state points at."""
    layer: Term = field(default_factory=Term)
    """Router: distance from the mixture of teacher layers that the gate chooses."""
    contr: Term = field(default_factory=Term)
    """Router: contrastive, which teacher state of a span of text belongs to the student's."""

    def __post_init__(self) -> None:
        super().__post_init__()

        weights = {name: values_of(term.weight) for name, term in vars(self).items()}
        wrong = {f"{name}.weight": v for name, v in weights.items() if not all(0 <= w < math.inf for w in v)}
        if wrong:
            raise ValueError(f"weights must be 0 or more, got {wrong}")

    def used(self) -> set[str]:
        """Terms whose weight leaves 0 anywhere in the run."""
        return {name for name, term in vars(self).items() if any(values_of(term.weight))}


@dataclass(frozen=True)
class LossConfig(Validated):
    """How the teacher's distribution becomes a loss."""

    divergence: DivergenceName = "forward_kl"
    """Divergence between teacher and student."""
    tail: Literal["bucket", "renormalise"] = "bucket"
    """Outcomes beyond the top k: one explicit bucket on both sides, or both sides renormalised without them
    (with top_k 1 nothing is left to learn then)."""
    top_k: Annotated[int, Gt(0)] = 256
    """Teacher tokens kept per position (capped at the teacher's vocabulary)."""
    temperature: Schedule = 1.0
    """Temperature of KD; teacher and student are tempered alike, and the term is multiplied by its square."""
    skew: Annotated[float, Gt(0), Lt(1)] = 0.1
    """skew_kl only: share of the teacher in the mixture that stands in for the student (DistiLLM, eq. 3)."""
    max_depth: Annotated[int, Ge(0)] = 16
    """How many student tokens into a teacher token KD still applies; 0: common boundaries only."""
    correction: Literal["span", "channel", "none"] = "span"
    """Remedy where a teacher token is a proper prefix of the student's real token."""
    min_prefix_mass: Annotated[float, Ge(0), Lt(1)] = 1e-3
    """Inside a teacher token: least teacher probability of what was read so far; below it, no KD there."""
    span_temperature: Schedule = 1.0
    """Temperature of the two-outcome distributions of the span term."""
    head_passes: Literal["auto", "compiled", "eager"] = "auto"
    """Elementwise work of the student's head: compiled into two passes by torch.compile, or eager, step by step; auto:
    compiled on GPUs of compute capability 7.0 or newer where a compiler works."""

    def __post_init__(self) -> None:
        super().__post_init__()

        scalars = {name: values_of(getattr(self, name)) for name in ("temperature", "span_temperature")}
        wrong = {name: v for name, v in scalars.items() if not all(0 < t < math.inf for t in v)}
        if wrong:
            raise ValueError(f"temperatures must be greater than 0, got {wrong}; 1 is a good start")


@dataclass(frozen=True)
class RouterConfig(Validated):
    """How hidden states of student and teacher are compared (`StudentAwareRouter`); the terms' weights say whether."""

    layers: Annotated[int, Gt(0)] = 4
    """Student layers that are compared, spread evenly up to the last (capped at the student's layers)."""
    teacher_layers: Annotated[int, Gt(0)] = 8
    """Teacher layers that are kept, spread likewise."""
    positions: Annotated[int, Ge(4)] = 64
    """rel and attn: anchors of a window that are compared with one another, spread evenly."""
    heads: Annotated[int, Gt(0)] = 1
    """rel and attn: equal parts of a state that are compared on their own; a divisor of both widths."""
    span: Annotated[int, Gt(0)] = 16
    """contr: anchors of a span of text, whose states are averaged."""
    contrastive_temperature: Annotated[float, Gt(0)] = 0.1
    """contr: temperature of the similarities (InfoNCE)."""
    gate: Literal["window", "position"] = "window"
    """layer: what the gate sees of the student, its mean state in a window or its state at each position."""
    prior_width: Annotated[float, Gt(0)] = 0.15
    """layer: standard deviation of the gate's prior around the same relative depth, as a share of the depth."""
    prior_weight: Annotated[float, Ge(0)] = 0.1
    """layer: weight of the divergence of the gate from its prior."""
    initial: Literal["ridge", "random"] = "ridge"
    """Projections at the start: a ridge regression on the first windows, or random."""
    calibration_windows: Annotated[int, Gt(0)] = 32
    """Windows that standardise the teacher's states and fit the first projections."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate of projections and gates; it follows the schedule of the student's."""

    def check_widths(self, student: int, teacher: int) -> None:
        """Whether states of these widths can be compared; raises a ValueError that says why not."""
        if student % self.heads or teacher % self.heads:
            raise ValueError(
                f"got router.heads {self.heads} for states of width {student} (student) and {teacher} (teacher), "
                "expected a divisor of both; 1 always is"
            )
