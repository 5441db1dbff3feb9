"""Fields that a comparison reads of each file of a run, and what they may hold.

A file that has anything else in such a field is damaged; other fields are not looked at.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, model_validator

Count = Annotated[int, Ge(0), Le(10**15)]
Bits = Annotated[float, Gt(0), Le(1e9)]
"""Bits per byte; null where a run's was not finite."""
Seconds = Annotated[float, Ge(0), Le(1e10)]
"""Up to three hundred years."""


class _Read(BaseModel):
    """Base of all forms; numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


class _Scores(_Read):
    """Scores of one model."""

    bits_per_byte: Bits | None = None
    bytes: Count | None = None
    unspelt_bytes: Count = 0

    @model_validator(mode="after")
    def _has_a_share(self) -> "_Scores":
        if self.unspelt_bytes > (self.bytes or 0):
            raise ValueError(f"unspelt_bytes: got {self.unspelt_bytes}, expected at most bytes ({self.bytes})")
        return self


class _RunSummary(_Read):
    steps: Count
    seconds: Seconds | None = None
    stopped_by: str


Share = Annotated[float, Ge(0), Le(1)]


class _Retention(_Read):
    gap_closed: Annotated[float, Ge(-1e9), Le(1e9)] | None = None
    kl_nats_per_token: Annotated[float, Ge(-1), Le(1e9)] | None = None
    """Barely below 0 where rounding makes it so."""
    top1_agreement: Share | None = None


class _WrittenText(_Read):
    """Figures of the text that a student writes."""

    teacher_bits_per_byte: Bits | None = None
    repeated_4grams: Share | None = None


class _Generation(_Read):
    student: _WrittenText | None = None


class StartForm(_Read):
    """Fields that are read of baseline_evaluation.json."""

    teacher: _Scores | None = None
    initial_student: _Scores | None = None


class ReportForm(StartForm):
    """Fields that are read of evaluation_report.json."""

    student: _Scores | None = None
    baseline: _Scores | None = None
    retention: _Retention | None = None
    generation: _Generation | None = None
    run: _RunSummary


class _Term(_Read):
    count: Annotated[float, Ge(0), Le(1e15)] = 0.0


class RecordForm(_Read):
    """Fields that are read of a line of metrics.jsonl."""

    step: Count
    progress: Annotated[float, Ge(0), Le(1)] = 0.0
    terms: dict[str, _Term] = {}
    own_tokens: Annotated[float, Ge(0), Le(1e15)] = 0.0
    bits_per_byte: Bits | None = None
    bytes: Count | None = None
