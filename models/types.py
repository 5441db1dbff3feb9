"""Types that pass between the parts of the framework: batch, teacher's signal, target, terms, output.

Shapes: B windows, S student positions, T teacher positions, N KD rows (anchored student positions, ordered by window,
then position), M unpadded teacher positions, K outcomes of each row, n supervised student positions, D rows at depth
> 0, P spans. For the router: A anchors at depth 0, in D texts, Q of them sampled in a text, U in a window, R runs.
Flat index of student position (b, j): b * S + j; of teacher position (b, k): b * T + k.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not supervised (the convention of `torch.nn.functional.cross_entropy`)."""

_Self = TypeVar("_Self", bound="_Movable")


class _Movable:
    """A dataclass whose tensors go from place to place together."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def to(self: _Self, device: torch.device | str, non_blocking: bool = False) -> _Self:
        """Return a copy with its tensors on a device."""
        moved = {name: _moved(value, device, non_blocking) for name, value in movable_fields(self).items()}
        return replace(self, **moved)

    def pin_memory(self: _Self) -> _Self:
        """Return a copy whose tensors the host need not wait for when they are copied to a GPU."""
        pinned = {name: _pinned(value) for name, value in movable_fields(self).items()}
        return replace(self, **pinned)


def movable_fields(instance: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are tensors, or hold tensors."""
    values = {column.name: getattr(instance, column.name) for column in fields(instance)}
    return {name: value for name, value in values.items() if _is_movable(value)}


def _is_movable(value: Any) -> bool:
    """Tell whether a value is a tensor, holds tensors, or is a tuple of such values."""
    if isinstance(value, tuple):
        return bool(value) and all(map(_is_movable, value))
    return isinstance(value, Tensor | _Movable)


def _moved(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(item, device, non_blocking) for item in value)
    return value.to(device, non_blocking=non_blocking)


def _pinned(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_pinned, value))
    return value.pin_memory()


@dataclass
class TeacherSignal(_Movable):
    """The teacher's answer to a batch: the seam between a running teacher and a cache.

    At temperature 1. At depth > 0 the distribution is the one restricted to the tokens that begin with
    what the student has read, renormalised.
    """

    ids: Tensor
    """[N, K] int64 teacher tokens, most probable first; -1 where fewer than K exist."""
    log_probs: Tensor
    """[N, K] float32, -inf where `ids` is -1."""
    log_tail: Tensor
    """[N] log mass of all other tokens."""
    log_mass: Tensor
    """[N] log probability, under the full distribution, of what was read since the anchor; -inf in a row of which too
    little is known (`models.teacher.listed`)."""
    realised: Tensor
    """[M] log probability of the text's next teacher token, at every unpadded teacher position; 0 where the batch does
    not ask for it."""
    hidden: tuple[Tensor, ...] | None = None
    """[B, T, H_T] states after the teacher layers that the router asked for; None where it asked for none."""

    @property
    def is_stored(self) -> Tensor:
        """[N] False in a row of which a store has left everything out (`models.teacher.kept_rows`)."""
        return (self.ids >= 0).any(1) | ~self.log_mass.isneginf()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TeacherSignal":
        """Return a copy with its tensors, the hidden states too, on a device.

        From the host's memory to a GPU the host waits for none of them.
        """
        signal = self
        if torch.device(device).type == "cuda" and self.ids.device.type == "cpu":
            signal = self.pin_memory()
            non_blocking = True

        return super(TeacherSignal, signal).to(device, non_blocking)


@dataclass
class MixtureSignal(_Movable):
    """The answers of several teachers to a batch, and how much each weighs."""

    signals: tuple[TeacherSignal, ...]
    """Of the teachers that were asked: those with a weight and, where hidden states are compared, the first one."""
    teachers: tuple[int, ...]
    """Number of each of them, from 0."""
    weights: tuple[float, ...]
    """Of each of them, at the step that was asked for; they need not add up to 1."""

    @property
    def hidden(self) -> tuple[Tensor, ...] | None:
        """States of the first teacher after the layers that the router asked for; see `TeacherSignal`."""
        return self.signals[0].hidden if 0 in self.teachers else None


@dataclass
class Anchors(_Movable):
    """Places where both models have read the same bytes (depth 0): what the router compares.

    The first position of either model is left out: its state is extreme and says little (massive activations).
    """

    student: Tensor
    """[A] flat student position."""
    teacher: Tensor
    """[A] flat teacher position."""
    text: Tensor
    """[A] text of each anchor, of D in the batch: a window or, where documents are isolated, a document."""
    run: Tensor
    """[A] index of the run of neighbouring anchors (a span of text) that holds it."""
    sampled: Tensor
    """[D, Q] index into the A anchors, spread evenly over a text's; -1 where it has fewer."""
    queries: Tensor
    """[B, U] the same by window; -1 where it has fewer."""
    query_bytes: Tensor
    """[B, U, 2] first byte and end of the student's last token read at each sampled anchor."""
    key_bytes: Tensor
    """[B, T, 2] likewise of every teacher token; padding lies behind every query."""
    query_begin: Tensor
    """[B, U] first byte that a sampled anchor may see: that of its text."""
    attends: Tensor
    """[B, U] bool: sampled anchors that see at least two teacher tokens and overlap one."""
    runs: int
    """R."""


@dataclass
class Places(_Movable):
    """Places of the KD rows of a batch in their windows, by scores that were stored before training.

    Rows behind the largest share of the run are not in the batch: the teacher is not asked about them.
    """

    place: Tensor
    """[N] 0: the first of its window."""
    of: Tensor
    """[N] float64: rows of its window, those that are not in the batch too."""


@dataclass
class Source(_Movable):
    """Input of the encoder of an encoder-decoder model (E tokens of a prompt)."""

    ids: Tensor
    """[B, E] int64, right padded."""
    mask: Tensor | None
    """[B, E] int64, 1 on tokens: an encoder sees what is behind a token, too. None: no padding."""


@dataclass
class MixedRows(_Movable):
    """A batch as several teachers read it; R of them read any of its windows."""

    batches: "tuple[PairedBatch, ...]"
    """R batches: the windows that each teacher is asked about."""
    teachers: tuple[int, ...]
    """Number of each of these teachers, from 0."""
    places: tuple[Tensor, ...]
    """[N_r] for each of them: index of its KD rows among those at which any teacher has a say."""


@dataclass
class PairedBatch(_Movable):
    """Windows of text as both models read them, and how the two readings fit together.

    In five groups: the two readings, the KD rows, the order in which the teacher's head computes, the spans, and facts
    about the windows.
    """

    # --- the student's reading and the teacher's

    student_ids: Tensor
    """[B, S] int64, right padded; what the decoder reads where there is an encoder."""
    student_mask: Tensor
    """[B, S] int64, 1 on tokens."""
    labels: Tensor
    """[B, S] int64: the token that position j predicts (already shifted), or IGNORE."""
    supervised: Tensor
    """[n] flat student positions that have a label, in order."""
    teacher_ids: Tensor
    """[B, T] as `student_ids`, for the teacher."""
    teacher_mask: Tensor
    """[B, T] as `student_mask`."""
    teacher_labels: Tensor
    """[B, T] as `labels`."""

    # --- the order of the teacher's head: positions that are the anchor of a row first, then the others

    teacher_held: Tensor
    """[M] flat positions of the teacher's tokens, in the order of the text."""
    asked: Tensor
    """[M] indices into `teacher_held`, in the order in which the head computes these positions; with `places` only
    those that KD needs."""

    # --- the rows of KD: student positions with an anchor

    row_student: Tensor
    """[N] flat student position."""
    row_supervised: Tensor
    """[N] the same as an index into `supervised`."""
    row_teacher: Tensor
    """[N] flat teacher position: the anchor."""
    row_asked: Tensor
    """[N] the same as an index into `asked`."""
    depth: Tensor
    """[N] student tokens read since the anchor's boundary."""
    prefix_lo: Tensor
    """[N] least rank, in the vocabulary map's order, of the teacher tokens that begin with what was read since the
    anchor."""
    prefix_hi: Tensor
    """[N] their highest rank, plus 1."""
    deep: Tensor
    """[D] rows at depth > 0."""
    deep_before: np.ndarray
    """[anchors of rows + 1] how many of `deep` have an anchor before the i-th of `asked`. On the host, where chunks are
    cut."""
    deep_width: np.ndarray
    """[D] teacher tokens that begin with what was read; on the host likewise."""
    window_rows: np.ndarray
    """[B] rows of each window, those that were left out (`places`) too; on the host."""
    pieces: Tensor
    """[N] teacher tokens that the student's next token is made of, from the anchor's token on; 0 where it does not end
    on a common boundary."""

    # --- spans: the text between two common boundaries

    student_spans: Tensor
    """[B, S] index of the span that holds the predicted token, or -1."""
    teacher_spans: Tensor
    """[B, T] likewise for the teacher."""

    # --- facts about the windows

    counts: dict[str, int]
    """Items, known before any forward: lm (supervised student tokens of given text), own (those of text that the
    student wrote), kd (N, and the rows that were left out), span (P), depth0 (those of kd at depth 0), and those of the
    terms on hidden states (`models.losses.hidden_state_terms`)."""
    bytes: Tensor
    """[B] bytes of supervised text (end-of-text tokens are not counted)."""
    end_of_text: tuple[int | None, int | None]
    """Token id of end of text for student and teacher."""
    documents: list[str] = field(default_factory=list)
    """Names of the documents in each window, for messages."""
    anchors: Anchors | None = None
    """For the router; None where there is none."""
    student_source: Source | None = None
    """For the student's encoder; None where it has none. Both models have one, or neither."""
    teacher_source: Source | None = None
    """For the teacher's encoder."""
    student_positions: Tensor | None = None
    """[B, S] int64 position of each token in its document, which the student reads by itself; None: the windows are
    read as a whole."""
    teacher_positions: Tensor | None = None
    """[B, T] likewise for the teacher."""
    keys: list[bytes] = field(default_factory=list)
    """Key of each window in a store of the teacher's signals (`CachedTeacher`)."""
    signal: TeacherSignal | None = None
    """The teacher's signal, where a store had it."""
    stores_chosen: bool = False
    """Whether a store keeps only the rows that KD is learned at."""
    student_markup: Tensor | None = None
    """Flat student positions that predict markup of its chat template, which is no text."""
    teacher_markup: Tensor | None = None
    """Likewise for the teacher."""
    given: Tensor | None = None
    """[n] bool: supervised positions in given text, to which LM applies; None: all. The others the student wrote."""
    places: Places | None = None
    """Where the positions that KD is learned at were chosen before training; None: all rows are there."""
    vocabulary_sizes: tuple[int, int] | None = None
    """Rows of student and teacher in the collator's vocabulary map; every token id is below."""
    is_filler: bool = False
    """The batch only keeps other processes company: its items are in no count of the step."""
    mixed: "MixedRows | None" = None
    """With several teachers, the batch as each of them reads it. The KD rows of this batch (`row_student`,
    `row_supervised`, `depth`, `window_rows`) are then those at which any of them has a say, and what else tells of a
    teacher is that of the first one."""

    def __repr__(self) -> str:
        """Return what a person wants to know of it; the fields are tensors of thousands of numbers."""
        windows, student_length = self.student_ids.shape
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        answers = "with" if self.signal is not None else "without"
        return (
            f"PairedBatch of {windows} windows on {self.student_ids.device}, {answers} the teacher's answers\n"
            f"  tokens: {student_length} of the student, {self.teacher_ids.shape[1]} of the teacher, padding included\n"
            f"  items: {counts}"
        )

    def without_anchors(self) -> "PairedBatch":
        """Return a copy without anchors, for a process that has no micro-batch left in a step.

        It takes part in what processes do together, and adds nothing: not even a span to compare others with.
        """
        if self.anchors is None:
            return replace(self, is_filler=True)

        no_anchors = replace(
            self.anchors,
            student=self.anchors.student[:0],
            teacher=self.anchors.teacher[:0],
            text=self.anchors.text[:0],
            run=self.anchors.run[:0],
            sampled=torch.full_like(self.anchors.sampled, -1),
            queries=torch.full_like(self.anchors.queries, -1),
            attends=torch.zeros_like(self.anchors.attends),
            runs=0,
        )
        return replace(self, anchors=no_anchors, is_filler=True)

    def scored(self, side: str) -> tuple[dict[str, Tensor], Tensor]:
        """Return keyword arguments for the model of "student" or "teacher", and its labels, for evaluation.

        Both sides score exactly the same bytes of text; end-of-text tokens and markup are not scored.
        """
        if side == "student":
            inputs = _model_inputs(self.student_ids, self.student_mask, self.student_source, self.student_positions)
            return inputs, _text_labels(self.labels, self.end_of_text[0], self.student_markup)

        inputs = _model_inputs(self.teacher_ids, self.teacher_mask, self.teacher_source, self.teacher_positions)
        return inputs, _text_labels(self.teacher_labels, self.end_of_text[1], self.teacher_markup)

    def teacher_nll(self, signal: TeacherSignal) -> tuple[float, int]:
        """Return the teacher's loss on the text that `scored("teacher")` scores, in nats, and its number of tokens.

        For a teacher whose model is elsewhere: its signal has the probability of every token of the text.
        """
        _, labels = self.scored("teacher")
        is_scored = labels.flatten()[self.teacher_held] != IGNORE
        realised = signal.realised[is_scored].double()
        return -float(realised.sum()), int(is_scored.sum())

    def teacher_nll_by_window(self, signal: TeacherSignal) -> Tensor:
        """Return [B] float64, the teacher's loss on each window of what `scored("teacher")` scores, in nats."""
        _, labels = self.scored("teacher")
        is_scored = labels.flatten()[self.teacher_held] != IGNORE
        window = self.teacher_held // labels.shape[1]
        nats = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        return nats.index_add(0, window, -signal.realised.double() * is_scored)


def _model_inputs(
    ids: Tensor,
    mask: Tensor,
    source: Source | None,
    positions: Tensor | None,
) -> dict[str, Tensor]:
    """Return keyword arguments for a model; with a source, for its encoder and its decoder."""
    # transformers takes documents from their positions only where there is no mask; padding lies behind the text.
    if positions is not None:
        return {"input_ids": ids, "position_ids": positions}
    if source is None:
        return {"input_ids": ids, "attention_mask": mask}

    source_mask = torch.ones_like(source.ids) if source.mask is None else source.mask
    return {"input_ids": source.ids, "attention_mask": source_mask, "decoder_input_ids": ids}


def _text_labels(labels: Tensor, end_of_text: int | None, markup: Tensor | None) -> Tensor:
    """Return labels without end-of-text tokens and without the flat positions of markup."""
    if end_of_text is not None:
        labels = labels.masked_fill(labels == end_of_text, IGNORE)
    if markup is not None:
        labels = labels.flatten().index_fill(0, markup, IGNORE).view_as(labels)
    return labels


A_BATCH = "a PairedBatch: PairCollator(...)(windows)"
"""Expected kind of a batch, for messages, and how one comes by it."""


@dataclass
class SparseTarget:
    """A teacher distribution on the student's vocabulary: few tokens and one bucket for all others."""

    ids: Tensor
    """[N, K] student tokens, each at most once per row; -1 is padding."""
    probs: Tensor
    """[N, K] float32, 0 on padding."""
    tail: Tensor
    """[N] float32, 1 - sum of `probs`."""
    valid: Tensor
    """[N] bool: rows that count; others contribute zero."""
    weight: Tensor | None = None
    """[N] factor on the divergence of each row; None: 1."""

    def rows(self, index: slice | Tensor) -> "SparseTarget":
        """Return some of the rows."""
        return SparseTarget(
            ids=self.ids[index],
            probs=self.probs[index],
            tail=self.tail[index],
            valid=self.valid[index],
            weight=None if self.weight is None else self.weight[index],
        )


@dataclass
class LossTerm:
    """A sum over items and how many items: divided once, by the count of the whole optimizer step."""

    sum: Tensor
    """Scalar float32."""
    count: int
    skipped: Tensor | None = None
    """Items that turned out to say nothing, once computed: they add 0 to the sum and stay in the count, which has to
    be known before (KD: too little teacher probability of what was read, or no token of the student's)."""
    unlisted: Tensor | None = None
    """Those of them of which a listed teacher tells too little (`models.teacher.listed`)."""


@dataclass(frozen=True)
class Difference:
    """A position at which student and teacher, having read the same bytes, predict different next tokens."""

    window: int
    """In its batch."""
    position: int
    """Of the student: it has read the tokens up to this one."""
    kl: float
    """KL divergence from the teacher, in nats."""
    teacher: list[tuple[int, float]]
    """(student token, probability) that the teacher finds likeliest, the first one most."""
    student: list[tuple[int, float]]
    """Likewise of the student."""


@dataclass
class DistillationOutput:
    """Result of one forward of the framework."""

    loss: Tensor
    """Weighted total, every term divided by its count in the whole optimizer step."""
    terms: dict[str, LossTerm]
    """Raw terms of this batch; a term that was not computed is absent."""
    weights: dict[str, float]
    """Weight of every term at this step."""
    scalars: dict[str, float]
    """Scheduled scalars at this step: temperature, span_temperature, top_k; skew, interpolation, select and
    sample_weights where they are in use."""
    samples: Tensor | None = None
    """[3] sums over the rows of KD: what sample weights are made of (the success p of each row's window, as p(1 - p)),
    the weights, and the square of each weight less 1; None where windows have no weights."""
