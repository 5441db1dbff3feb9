"""The types that pass between the parts of the framework.

Shapes: B windows, S student positions, T teacher positions, N KD rows (anchored student positions,
ordered by window, then position), M unpadded teacher positions, K outcomes kept per row, P spans.
Flat index of student position (b, j): b * S + j; of teacher position (b, k): b * T + k.
"""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not supervised (the convention of `torch.nn.functional.cross_entropy`)."""


@dataclass
class PairedBatch:
    """Windows of text as both models read them, and how the two readings fit together."""

    student_ids: Tensor  # [B, S] int64, right padded
    student_mask: Tensor  # [B, S] int64, 1 on tokens
    labels: Tensor  # [B, S] int64: the token that position j predicts (already shifted), or IGNORE
    teacher_ids: Tensor  # [B, T]
    teacher_mask: Tensor  # [B, T]
    teacher_labels: Tensor  # [B, T] as labels, for the teacher
    row_student: Tensor  # [N] flat student position
    row_teacher: Tensor  # [N] flat teacher position: the anchor
    depth: Tensor  # [N] student tokens read since the anchor's boundary
    prefix_lo: Tensor  # [N] teacher tokens that begin with what was read since the anchor are, in the
    prefix_hi: Tensor  # [N]   vocabulary map's order, those with prefix_lo <= rank < prefix_hi
    pieces: Tensor  # [N] teacher tokens that the student's next token is made of, from the anchor's token on;
    #                     0 where it does not end on a common boundary
    student_spans: Tensor  # [B, S] index of the span that holds the predicted token, or -1
    teacher_spans: Tensor  # [B, T] likewise for the teacher
    counts: dict[str, int]
    """Known before any forward: lm (supervised student tokens), kd (N), span (P), depth0 (rows at depth 0)."""
    bytes: Tensor  # [B] bytes of supervised text (end-of-text tokens are not counted)
    end_of_text: tuple[int | None, int | None]
    """Token id of end of text for student and teacher."""
    documents: list[str] = field(default_factory=list)
    """Per window, which documents it holds (for messages)."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PairedBatch":
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> "PairedBatch":
        pinned = {
            f.name: value.pin_memory() for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)

    def scored(self, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """(ids, mask, labels) of "student" or "teacher" for evaluation.

        Both sides score exactly the same bytes of text; end-of-text tokens are not scored.
        """
        if side == "student":
            ids, mask, labels, eot = self.student_ids, self.student_mask, self.labels, self.end_of_text[0]
        else:
            ids, mask, labels, eot = self.teacher_ids, self.teacher_mask, self.teacher_labels, self.end_of_text[1]
        return ids, mask, labels if eot is None else labels.masked_fill(labels == eot, IGNORE)


@dataclass
class TeacherSignal:
    """What the teacher says about a batch: the seam between a running teacher and a cache.

    At temperature 1. At depth > 0 the distribution is the one restricted to the tokens that begin with
    what the student has read, renormalised.
    """

    ids: Tensor  # [N, K] int64 teacher tokens, most probable first; -1 where fewer than K exist
    log_probs: Tensor  # [N, K] float32, -inf where ids is -1
    log_tail: Tensor  # [N] log mass of all other tokens
    log_mass: Tensor  # [N] log probability, under the full distribution, of what was read since the anchor
    realised: Tensor  # [M] log probability of the text's next teacher token, at every unpadded teacher position


@dataclass
class SparseTarget:
    """A teacher distribution on the student's vocabulary: few tokens and one bucket for all others."""

    ids: Tensor  # [N, K] student tokens, each at most once per row; -1 is padding
    probs: Tensor  # [N, K] float32, 0 on padding
    tail: Tensor  # [N] float32, 1 - sum of probs
    valid: Tensor  # [N] bool: rows that count; others contribute zero


@dataclass
class LossTerm:
    """A sum over items and how many items: divided once, by the count of the whole optimizer step."""

    sum: Tensor  # scalar float32
    count: int
    skipped: Tensor | None = None
    """Items that turned out to say nothing, once computed: they add 0 to the sum and stay in the count, which has to
    be known before (KD: too little teacher probability of what was read, or no token of the student's)."""


@dataclass
class DistillationOutput:
    """What one forward of the framework returns."""

    loss: Tensor
    """Weighted total, every term divided by its count in the whole optimizer step."""
    terms: dict[str, LossTerm]
    """Raw terms of this batch; a term that was not computed is absent."""
    weights: dict[str, float]
    """Weight of every term at this step."""
    scalars: dict[str, float]
    """Scheduled scalars at this step: temperature, span_temperature, top_k."""
