"""Several teachers at once: each answers in its own tokens, and they are mixed on the student's vocabulary.

There the masses of different tokenizers add up: the target of a row is the sum of w P over the teachers that have a
say there, their tails in one bucket. The weights of a row add up to 1 over those teachers.

Shapes: N rows at which any teacher has a say, N_t rows of one teacher, M its unpadded positions, K its outcomes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import LossConfig, Schedule
from ..curriculum import value_at
from ..text.vocabulary import VocabularyMap
from ..types import IGNORE, MixedRows, MixtureSignal, PairedBatch, SparseTarget, TeacherSignal
from ..validation import expect
from .cached import CachedTeacher, expect_teacher
from .frozen import FrozenTeacher
from .listed import ListedTeacher
from .projection import FIXED_POINT, Projection, merge, running_sums

Mix = Literal["weights", "likelihood"]
"""How several teachers are weighed: by their weights, or by these times how likely each finds the text so far."""


@dataclass(frozen=True)
class Member:
    """One of several teachers."""

    teacher: FrozenTeacher | CachedTeacher | ListedTeacher
    vocabulary: VocabularyMap
    """Its tokens spelt in the student's."""
    weight: Schedule = 1.0
    """Its share beside the others' weights."""


class TeacherMixture:
    """Several frozen teachers, asked about the batches of a `MixedCollator`.

    A teacher whose weight is 0 at a step is not asked there: one with the only weight costs what it costs alone.

    Args:
        members: the first one's hidden states are those that terms on hidden states compare with.
        mix: see `Mix`.

    Raises:
        TypeError: a member that does not answer as a teacher does.
        ValueError: no member.
    """

    def __init__(self, members: Sequence[Member], mix: Mix = "weights") -> None:
        if not members:
            raise ValueError("members: got none, expected at least one teacher")
        for member in members:
            expect("members", member, Member, "Member(teacher, vocabulary, weight)")
            expect_teacher(member.teacher)
        self.members = tuple(members)
        self.mix = mix

    def __deepcopy__(self, memo: dict) -> "TeacherMixture":
        # Copies of a framework share it, as they do a single teacher.
        return self

    @property
    def model(self) -> nn.Module | None:
        """The network of the first teacher."""
        return self.members[0].teacher.model

    @property
    def teacher(self) -> Any:
        """The first teacher as it runs; None where a cache stands for it."""
        first = self.members[0].teacher
        return first.teacher if isinstance(first, CachedTeacher) else first

    def projection(self, loss: LossConfig) -> "MixtureProjection":
        """Return what makes targets of this mixture's signals."""
        parts = [Projection(member.vocabulary, loss.correction, loss.min_prefix_mass) for member in self.members]
        return MixtureProjection(parts, self.mix)

    def begin(self, batch: PairedBatch, top_k: int, *, progress: float = 1.0) -> bool:
        """Let the teachers elsewhere that have a weight begin their answers; returns at once.

        Returns:
            False where there is nothing to begin: all is stored, or computed in this process.
        """
        mixed = mixed_rows(batch)
        has_begun = False
        for number, part in zip(mixed.teachers, mixed.batches, strict=True):
            member = self.members[number]
            begin = getattr(member.teacher, "begin", None)
            if begin is not None and value_at(member.weight, progress):
                has_begun |= begin(part, top_k)
        return has_begun

    @torch.no_grad()
    def signal(
        self,
        batch: PairedBatch,
        top_k: int,
        layers: Sequence[int] = (),
        *,
        progress: float = 1.0,
    ) -> MixtureSignal:
        """Return the signals of the teachers that have a weight.

        Args:
            layers: of the first teacher, which is asked for its states whatever its weight is.
            progress: share of the run that is done, which the weights follow.

        Raises:
            ValueError: a batch that no `MixedCollator` made.
        """
        mixed = mixed_rows(batch)
        signals = []
        teachers = []
        weights = []
        for number, part in zip(mixed.teachers, mixed.batches, strict=True):
            member = self.members[number]
            weight = value_at(member.weight, progress)
            own_layers = layers if number == 0 else ()
            if not weight and not own_layers:
                continue

            signals.append(member.teacher.signal(part, top_k, own_layers))
            teachers.append(number)
            weights.append(weight)
        return MixtureSignal(tuple(signals), tuple(teachers), tuple(weights))


def mixed_rows(batch: PairedBatch) -> MixedRows:
    """Return a batch as several teachers read it.

    Raises:
        ValueError: a single teacher's collator made it.
    """
    if batch.mixed is None:
        raise ValueError("batch: got one for a single teacher, expected one that a MixedCollator made")
    return batch.mixed


class MixtureProjection:
    """Projects the signals of several teachers on the student's vocabulary, and mixes them there.

    Args:
        parts: one projection for each teacher.
        mix: see `Mix`.
    """

    def __init__(self, parts: Sequence[Projection], mix: Mix) -> None:
        self.parts = tuple(parts)
        self.mix = mix

    def to(self, device: torch.device) -> "MixtureProjection":
        """Move the tables to a device, in place."""
        for part in self.parts:
            part.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        signal: MixtureSignal,
        batch: PairedBatch,
        corrected: bool = True,
    ) -> SparseTarget:
        """Return the mixed target of every row at which any teacher has a say; see `Projection`."""
        mixed = mixed_rows(batch)
        rows = len(batch.row_student)
        targets = []
        log_weights = []
        for number, weight, said in zip(signal.teachers, signal.weights, signal.signals, strict=True):
            if not weight:
                continue

            index = mixed.teachers.index(number)
            part, place = mixed.batches[index], mixed.places[index]
            target = self.parts[number](said, part, corrected)
            log_weight = torch.full_like(target.tail, weight, dtype=torch.float64).log()
            if self.mix == "likelihood":
                log_weight = log_weight - _cross_entropy_so_far(said, part)
            targets.append(_at_places(target, place, rows))
            log_weights.append(_scattered(log_weight, place, rows, -torch.inf))
        return _mixed(targets, log_weights, batch)


def _mixed(targets: Sequence[SparseTarget], log_weights: Sequence[Tensor], batch: PairedBatch) -> SparseTarget:
    """Return the weighted sum of some targets of the same rows, over those that are valid.

    Args:
        log_weights: [N] for each target.
    """
    if not targets:
        return _nothing(len(batch.row_student), batch.student_ids.device)
    # One that is alone is passed on bit for bit.
    if len(targets) == 1:
        return targets[0]

    valid = torch.stack([target.valid for target in targets])
    log_weight = torch.stack(list(log_weights)).masked_fill(~valid, -torch.inf)
    # A row at which nobody has a say must not be NaN.
    shares = log_weight.softmax(0).nan_to_num(0.0).float()

    ids = torch.cat([target.ids for target in targets], 1)
    probs = torch.cat([share[:, None] * target.probs for share, target in zip(shares, targets, strict=True)], 1)
    # A teacher without a say here adds no padding that looks like a token.
    ids, probs = merge(torch.where(probs > 0, ids, -1), probs)
    tail = torch.stack([share * target.tail for share, target in zip(shares, targets, strict=True)]).sum(0)
    is_valid = valid.any(0)
    return SparseTarget(ids=ids, probs=probs, tail=torch.where(is_valid, tail, 1.0), valid=is_valid)


def _at_places(target: SparseTarget, place: Tensor, rows: int) -> SparseTarget:
    """Return a target with `rows` rows, of which those at `place` are the given ones and the others not valid."""
    # Its own rows are all that there are: nothing is copied.
    if len(place) == rows:
        return target
    return SparseTarget(
        ids=_scattered(target.ids, place, rows, -1),
        probs=_scattered(target.probs, place, rows, 0.0),
        tail=_scattered(target.tail, place, rows, 1.0),
        valid=_scattered(target.valid, place, rows, False),
    )


def _scattered(values: Tensor, place: Tensor, rows: int, default: float) -> Tensor:
    """Return [rows, ...] with `values` at `place` and `default` elsewhere."""
    whole = values.new_full((rows, *values.shape[1:]), default)
    whole[place] = values
    return whole


def _nothing(rows: int, device: torch.device) -> SparseTarget:
    """Return a target of rows at which no teacher has a say."""
    return SparseTarget(
        ids=torch.full((rows, 1), -1, device=device),
        probs=torch.zeros(rows, 1, device=device),
        tail=torch.ones(rows, device=device),
        valid=torch.zeros(rows, dtype=torch.bool, device=device),
    )


def _cross_entropy_so_far(signal: TeacherSignal, batch: PairedBatch) -> Tensor:
    """Return [N_t] a teacher's cross-entropy on the text before each row's anchor; 0 at its beginning.

    The text is that of the window or, where documents are isolated, of the document. In nats per token of the student,
    so that teachers with long tokens and with short ones are comparable.
    """
    # 1. Nats before each position of the batch, of what is text; sums in whole numbers, as in `projection`.
    labels = batch.teacher_labels.flatten()[batch.teacher_held]
    realised = torch.where(labels == IGNORE, 0.0, signal.realised)
    sums = running_sums(realised)

    # 2. Less those before the text, whose positions follow one another.
    anchor = batch.asked[batch.row_asked]
    first = anchor - _positions(batch.teacher_ids, batch.teacher_positions)[batch.row_teacher]
    nats = (sums[first] - sums[anchor]).double() / FIXED_POINT

    # 3. Per supervised token of the student that was read up to the anchor.
    is_text = (batch.labels != IGNORE).long()
    read = (is_text.cumsum(1) - is_text).flatten()
    begin = batch.row_student - _positions(batch.student_ids, batch.student_positions)[batch.row_student]
    tokens = read[batch.row_student] - read[begin] - batch.depth
    # Before a text some tokenizers have a token for a space: it is no text that all have read.
    return torch.where(tokens > 0, nats / tokens.clamp_min(1), 0.0)


def _positions(ids: Tensor, positions: Tensor | None) -> Tensor:
    """Return [B * S] the position of each token [B, S] in its text; None: a row is one text."""
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return positions.flatten()
