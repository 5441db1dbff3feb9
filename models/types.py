"""The types that pass between the parts of the framework.

Shapes: B windows, S student positions, T teacher positions, N KD rows (anchored student positions,
ordered by window, then position), M unpadded teacher positions, K outcomes kept per row, P spans,
n supervised student positions, A anchors of rows, D rows at depth > 0.
Flat index of student position (b, j): b * S + j; of teacher position (b, k): b * T + k.
For the router: A anchors at depth 0, Q of them sampled in a window, R runs of anchors.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not supervised (the convention of `torch.nn.functional.cross_entropy`)."""


_Self = TypeVar("_Self", bound="_Movable")


def _tensors(batch: Any) -> dict[str, Any]:
    """The fields of a dataclass that are tensors, or hold tensors."""
    return {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor | _Movable)}


class _Movable:
    """A dataclass whose tensors go from place to place together."""

    def to(self: _Self, device: torch.device | str, non_blocking: bool = False) -> _Self:
        return replace(self, **{n: v.to(device, non_blocking=non_blocking) for n, v in _tensors(self).items()})

    def pin_memory(self: _Self) -> _Self:
        return replace(self, **{n: v.pin_memory() for n, v in _tensors(self).items()})


@dataclass
class TeacherSignal(_Movable):
    """What the teacher says about a batch: the seam between a running teacher and a cache.

    At temperature 1. At depth > 0 the distribution is the one restricted to the tokens that begin with
    what the student has read, renormalised.
    """

    ids: Tensor  # [N, K] int64 teacher tokens, most probable first; -1 where fewer than K exist
    log_probs: Tensor  # [N, K] float32, -inf where ids is -1
    log_tail: Tensor  # [N] log mass of all other tokens
    log_mass: Tensor  # [N] log probability, under the full distribution, of what was read since the anchor
    realised: Tensor  # [M] log probability of the text's next teacher token, at every unpadded teacher position
    hidden: tuple[Tensor, ...] | None = None
    """[B, T, H_T] states after the teacher layers that the router asked for; None where it asked for none."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherSignal":
        moved = super().to(device, non_blocking)
        hidden = self.hidden and tuple(state.to(device, non_blocking=non_blocking) for state in self.hidden)
        return replace(moved, hidden=hidden)


@dataclass
class Anchors(_Movable):
    """Where both models have read the same bytes (depth 0): what the router compares.

    The first position of either model is left out: its state is extreme and says little (massive activations).
    """

    student: Tensor  # [A] flat student position
    teacher: Tensor  # [A] flat teacher position
    window: Tensor  # [A]
    run: Tensor  # [A] index of the run of neighbouring anchors (a span of text) that holds it
    sampled: Tensor  # [B, Q] index into the A anchors, spread evenly over a window's; -1 where it has fewer
    query_bytes: Tensor  # [B, Q, 2] first byte and end of the student's last token read at each sampled anchor
    key_bytes: Tensor  # [B, T, 2] likewise of every teacher token; padding lies behind every query
    attends: Tensor  # [B, Q] bool: sampled anchors that see at least two teacher tokens and overlap one
    runs: int  # R


@dataclass
class Source(_Movable):
    """What the encoder of an encoder-decoder model reads (E tokens of a prompt)."""

    ids: Tensor  # [B, E] int64, right padded
    mask: Tensor | None  # [B, E] int64, 1 on tokens: an encoder sees what is behind a token, too. None: no padding


@dataclass
class PairedBatch(_Movable):
    """Windows of text as both models read them, and how the two readings fit together."""

    student_ids: Tensor  # [B, S] int64, right padded; what the decoder reads where there is an encoder
    student_mask: Tensor  # [B, S] int64, 1 on tokens
    labels: Tensor  # [B, S] int64: the token that position j predicts (already shifted), or IGNORE
    supervised: Tensor  # [n] flat student positions that have a label, in order
    teacher_ids: Tensor  # [B, T]
    teacher_mask: Tensor  # [B, T]
    teacher_labels: Tensor  # [B, T] as labels, for the teacher
    teacher_held: Tensor  # [M] flat positions of the teacher's tokens, in order
    asked: Tensor  # [M] indices into `teacher_held`: first those that are the anchor of a row, then the others
    row_student: Tensor  # [N] flat student position
    row_supervised: Tensor  # [N] the same as an index into `supervised`
    row_teacher: Tensor  # [N] flat teacher position: the anchor
    row_asked: Tensor  # [N] the same as an index into `asked`
    depth: Tensor  # [N] student tokens read since the anchor's boundary
    prefix_lo: Tensor  # [N] teacher tokens that begin with what was read since the anchor are, in the
    prefix_hi: Tensor  # [N]   vocabulary map's order, those with prefix_lo <= rank < prefix_hi
    deep: Tensor  # [D] rows at depth > 0
    deep_before: np.ndarray  # [A + 1] how many of these have an anchor before the i-th of `asked`. On the host, where
    deep_width: np.ndarray  # [D]      chunks are cut; how many tokens begin with what was read.
    pieces: Tensor  # [N] teacher tokens that the student's next token is made of, from the anchor's token on;
    #                     0 where it does not end on a common boundary
    student_spans: Tensor  # [B, S] index of the span that holds the predicted token, or -1
    teacher_spans: Tensor  # [B, T] likewise for the teacher
    counts: dict[str, int]
    """Known before any forward: lm (supervised student tokens), kd (N), span (P), depth0 (rows at depth 0); for the
    router feat and layer (A), rel (windows with enough anchors), attn (sampled anchors), contr (R)."""
    bytes: Tensor  # [B] bytes of supervised text (end-of-text tokens are not counted)
    end_of_text: tuple[int | None, int | None]
    """Token id of end of text for student and teacher."""
    documents: list[str] = field(default_factory=list)
    """Per window, which documents it holds (for messages)."""
    anchors: Anchors | None = None
    """For the router; None where there is none."""
    student_source: Source | None = None
    """For the student's encoder; None where it has none. Both models have one, or neither."""
    teacher_source: Source | None = None
    keys: list[bytes] = field(default_factory=list)
    """Per window, what a memory of the teacher knows it by (`CachedTeacher`)."""
    signal: TeacherSignal | None = None
    """What the teacher says about this batch, where a memory had it."""
    student_markup: Tensor | None = None  # flat student positions that predict markup of its chat template: no text
    teacher_markup: Tensor | None = None  # likewise for the teacher
    vocabulary_sizes: tuple[int, int] | None = None
    """Rows of student and teacher in the collator's vocabulary map; every token id is below."""
    is_filler: bool = False
    """It only keeps others company: its items are in no count of the step."""

    def as_filler(self) -> "PairedBatch":
        """The same without anchors: for a process that only keeps others company, and must not be compared with."""
        if self.anchors is None:
            return replace(self, is_filler=True)
        a = self.anchors
        none = {name: getattr(a, name)[:0] for name in ("student", "teacher", "window", "run")}
        empty = replace(a, **none, sampled=torch.full_like(a.sampled, -1), attends=torch.zeros_like(a.attends), runs=0)
        return replace(self, anchors=empty, is_filler=True)

    def scored(self, side: str) -> tuple[dict[str, Tensor], Tensor]:
        """(what the model of "student" or "teacher" is called with, labels) for evaluation.

        Both sides score exactly the same bytes of text; end-of-text tokens and markup are not scored.
        """
        if side == "student":
            ids, mask, source = self.student_ids, self.student_mask, self.student_source
            labels, eot, markup = self.labels, self.end_of_text[0], self.student_markup
        else:
            ids, mask, source = self.teacher_ids, self.teacher_mask, self.teacher_source
            labels, eot, markup = self.teacher_labels, self.end_of_text[1], self.teacher_markup
        inputs = {"input_ids": ids, "attention_mask": mask}
        if source is not None:
            mask = torch.ones_like(source.ids) if source.mask is None else source.mask
            inputs = {"input_ids": source.ids, "attention_mask": mask, "decoder_input_ids": ids}

        if eot is not None:
            labels = labels.masked_fill(labels == eot, IGNORE)
        if markup is not None:
            labels = labels.flatten().index_fill(0, markup, IGNORE).view_as(labels)
        return inputs, labels


A_BATCH = "a PairedBatch: PairCollator(...)(windows)"
"""What is expected where something else was given, and how one comes by it."""


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
