"""A run's settings, as functions that are handed them see them: `train.RunConfig` fulfils these protocols.

The sections of what is learned lie in models/, which nothing here may import.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar

from .settings import (
    CacheConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    LoggingConfig,
    ModelConfig,
    OnPolicyConfig,
    ServedConfig,
    StudentConfig,
    TrainingConfig,
)


class Schedule(Protocol):
    """A value that may change with a run's progress."""

    @property
    def points(self) -> Sequence[tuple[float, float]]:
        """(progress from 0 to 1, value), in order of progress."""


def points_of(value: float | Schedule) -> Sequence[tuple[float, float]]:
    """Return the (progress, value) points of a ramp; a constant has one, at the start."""
    return value.points if hasattr(value, "points") else [(0.0, value)]


def values_of(value: float | Schedule) -> list[float]:
    """Return the value of a constant, or those of a ramp's points."""
    return [level for _, level in points_of(value)]


def is_zero_between(value: float | Schedule, start: float, end: float) -> bool:
    """Return whether a schedule is 0 throughout a part of the training in which none of its points lies."""
    points = points_of(value)
    before = [level for progress, level in points if progress <= start]
    after = [level for progress, level in points if progress >= end]
    # before the first and after the last point it is constant
    return not any([*before[-1:], *after[:1]])


class Term(Protocol):
    """A loss term of the curriculum."""

    @property
    def weight(self) -> float | Schedule: ...


class CurriculumSettings(Protocol):
    """The loss terms that a run uses, and when. Every term is an attribute of its name."""

    @property
    def kd(self) -> Term: ...

    @property
    def on_policy(self) -> float | Schedule:
        """Share of a step's windows that the student writes itself."""

    @property
    def select(self) -> float | Schedule:
        """Share of each window's positions that KD is learned at."""

    @property
    def open_text(self) -> float | Schedule:
        """Share of the training windows that is open, from the easiest."""

    @property
    def uses_own_text(self) -> bool:
        """True if that share is above 0 at some time."""

    @property
    def opens_text(self) -> bool:
        """True if that share is below 1 at some time."""

    @property
    def sample_weights(self) -> float | Schedule:
        """Degree to which windows are weighted in KD."""

    @property
    def balance(self) -> str:
        """Size by which the weights of terms are balanced: none, loss or gradient."""

    def used(self) -> set[str]:
        """Return the names of the terms whose weight is above 0 at some time."""

    def in_words(self) -> str:
        """Return all that weighs anything, and what is chosen of the text."""


class LossSettings(Protocol):
    """The way from the teacher's distribution to a loss."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def top_k(self) -> int | Schedule: ...

    @property
    def temperature(self) -> float | Schedule: ...

    @property
    def max_depth(self) -> int: ...

    @property
    def correction(self) -> str: ...

    @property
    def min_prefix_mass(self) -> float: ...

    @property
    def select_by(self) -> str: ...

    @property
    def divergence(self) -> str: ...

    @property
    def interpolation(self) -> float | Schedule:
        """Share of the teacher in what KD learns from."""

    @property
    def needs_several_tokens(self) -> bool:
        """True if KD needs more than one of the teacher's tokens at a position."""

    @property
    def reads_skew(self) -> bool:
        """True if the divergence has a mixture."""

    def in_words(self) -> str:
        """Return how KD compares, where it is not the usual way."""

    @property
    def head_passes(self) -> str: ...


class RouterSettings(Protocol):
    """Sizes of the comparison of hidden states."""

    @property
    def layers(self) -> int: ...

    @property
    def teacher_layers(self) -> int: ...

    @property
    def calibration_windows(self) -> int: ...


class RunConfig(Protocol):
    """Everything a run depends on, as `train.RunConfig` holds it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def teacher(self) -> ModelConfig: ...
    @property
    def served(self) -> ServedConfig: ...
    @property
    def several_teachers(self) -> Sequence[ModelConfig]:
        """Teachers that are mixed, of which `teacher` is the first; none where there is a single one."""

    @property
    def routes_of_teachers(self) -> Sequence[Sequence[str]]:
        """Sources of text, or values of `route_column`, that each of several teachers is asked about; none: all."""

    @property
    def route_column(self) -> str | None:
        """Column of tables that says which of several teachers a row is for; None: its source does."""

    @property
    def student(self) -> StudentConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def loss(self) -> LossSettings: ...
    @property
    def curriculum(self) -> CurriculumSettings: ...
    @property
    def router(self) -> RouterSettings: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def on_policy(self) -> OnPolicyConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def cache(self) -> CacheConfig: ...
    @property
    def logging(self) -> LoggingConfig: ...
    @property
    def hub(self) -> HubConfig: ...
    @property
    def reads_once(self) -> bool:
        """True if no text is learned from twice, as far as the settings tell."""

    @property
    def compares_without_teacher(self) -> bool:
        """True if the student is trained once more without its teacher."""

    @property
    def output_dir(self) -> str: ...
    @property
    def resume(self) -> str: ...
    @property
    def resume_changed(self) -> bool: ...


ConfigT = TypeVar("ConfigT", bound=RunConfig)
"""The settings that a function returns changed, of the kind that it was given."""


def share_stored(config: RunConfig) -> float:
    """Return the share of its KD positions that a cache keeps of a training window, as the teacher's entropy chooses.

    It is the largest that the run learns at; 1: it keeps all.
    """
    if config.cache.folder is None or config.loss.select_by != "teacher_entropy":
        return 1.0
    return max(values_of(config.curriculum.select))


def learns_at_some_positions(config: RunConfig) -> bool:
    """Return whether KD is learned, and somewhere in the run not at all positions."""
    return "kd" in config.curriculum.used() and min(values_of(config.curriculum.select)) < 1


def are_chosen_before(config: RunConfig) -> bool:
    """Return whether the student before training puts the positions in order: the run learns somewhere at some of them.

    A share that grows to all positions needs their order as well.
    """
    if config.teacher.name is None or config.loss.select_by != "first_student":
        return False
    return min(values_of(config.curriculum.select)) < 1


def share_chosen_before(config: RunConfig) -> float:
    """Return the share of its KD positions that a training window has left, as the student before training chose them.

    It is the largest that the run learns at.
    """
    return max(values_of(config.curriculum.select)) if are_chosen_before(config) else 1.0
