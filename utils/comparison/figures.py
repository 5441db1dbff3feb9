"""Figures by which finished runs are compared."""

from collections.abc import Callable, Mapping

from .runs import Run

Values = Callable[[Run], float | None]
"""What gives a figure of a run; None where the run lacks it."""


def _against_baseline(run: Run) -> float | None:
    """Return the student's bits per byte less those of the same student without the teacher."""
    student, baseline = run.bits("student"), run.bits("baseline")
    return None if student is None or baseline is None else student - baseline


def _retained(name: str) -> Values:
    """Return what gives a figure of how near a run's student is to its teacher."""
    return lambda run: (run.report.get("retention") or {}).get(name)


def _written(name: str) -> Values:
    """Return what gives a figure of the text that a run's student writes."""
    return lambda run: ((run.report.get("generation") or {}).get("student") or {}).get(name)


BITS = "bits per byte"

FIGURES: Mapping[str, Values] = {
    BITS: lambda run: run.bits("student"),
    "minus without teacher": _against_baseline,
    "KL to the teacher": _retained("kl_nats_per_token"),
    "same first choice": _retained("top1_agreement"),
    "teacher's of its text": _written("teacher_bits_per_byte"),
    "repeated 4-grams": _written("repeated_4grams"),
}
"""Name -> what gives it, in the order of the tables."""
