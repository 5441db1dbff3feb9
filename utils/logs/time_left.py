"""Time that a command still takes, estimated from the pace of each kind of work that it has done so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "step",
    "step alone",
    "teacher window",
    "student window",
    "agreement window",
    "token",
    "own text",
    "model file",
    "other",
]
"""Kinds of work, each with a pace of its own: an optimizer step, with and without a teacher; a window that a model
scores, or both; a token that a model writes; a text that the student writes to learn from it; a student that is read
from or written to the disk."""

STEPS: tuple[Kind, ...] = ("step", "step alone")
"""Kinds without whose pace nothing is known of a command."""

ESTIMATES: Mapping[Kind, tuple[Kind, ...]] = {
    "step alone": ("step",),
    "student window": ("teacher window",),
    "agreement window": ("teacher window", "student window"),
}
"""Kinds whose pace stands in for that of another, summed up, until it has one of its own."""


@dataclass
class Pace:
    """Work of one kind that is done, and the seconds it took."""

    units: int = 0
    seconds: float = 0.0


@dataclass
class TimeLeft:
    """Work that is still expected, in training and after it, and the pace of what was done."""

    training: dict[Kind, int] = field(default_factory=dict)
    """Units by kind until the last step, which a time limit may cut short."""
    after: dict[Kind, int] = field(default_factory=dict)
    """Units by kind after the last step."""
    paces: dict[Kind, Pace] = field(default_factory=dict)

    def expect(self, training: Mapping[Kind, int], after: Mapping[Kind, int]) -> None:
        """Replace what is still expected; paces stay."""
        self.training = dict(training)
        self.after = dict(after)

    def done(self, kind: Kind, units: int, seconds: float | None) -> None:
        """Take note of work that is done; `seconds` is None where it took longer than the rest of its kind will."""
        if seconds is not None:
            pace = self.paces.setdefault(kind, Pace())
            pace.units += units
            pace.seconds += seconds

        stage = self.training if self.training.get(kind) else self.after
        if kind in stage:
            stage[kind] = max(stage[kind] - units, 0)

    def seconds(self, limit: float | None = None) -> float | None:
        """Return the seconds that the command still takes; None where nothing is expected, or steps of unknown pace.

        Args:
            limit: seconds until training is stopped; None: it is not.
        """
        if not self.training and not self.after:
            return None
        training = self._seconds_of(self.training)
        after = self._seconds_of(self.after)
        if training is None or after is None:
            return None
        if limit is not None:
            training = min(training, max(limit, 0.0))
        return training + after

    def _seconds_of(self, work: Mapping[Kind, int]) -> float | None:
        """Return the seconds of some work, None if it has steps without a pace; other work without one is short."""
        total = 0.0
        for kind, units in work.items():
            seconds = self.pace(kind)
            if seconds is not None:
                total += units * seconds
            elif units and kind in STEPS:
                return None
        return total

    def pace(self, kind: Kind) -> float | None:
        """Return the seconds of one unit of work; None: unknown."""
        pace = self.paces.get(kind)
        if pace is not None and pace.units:
            return pace.seconds / pace.units

        known = [seconds for other in ESTIMATES.get(kind, ()) if (seconds := self.pace(other)) is not None]
        return sum(known) if known else None
