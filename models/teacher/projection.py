"""TeacherSignal -> SparseTarget: the teacher's distribution on the student's vocabulary.

Shapes: N KD rows, K teacher tokens kept per row, L longest spelling, V_T teacher vocabulary.
"""

import math

import torch
from torch import Tensor

from ..text.vocabulary import VocabularyMap
from ..types import PairedBatch, SparseTarget, TeacherSignal

FIXED_POINT = 2.0**32
"""Whole numbers in 1 nat: their rounding is far below that of a float32 log-probability."""
LEAST_LOG_PROB = -1e4
"""Nats; e to that power is 0. A batch of 200,000 positions is then summed without overflow."""


class Projection:
    """Moves every teacher token's mass to the student token that comes next in its spelling, and adds.

    Args:
        vocabulary: spellings; for correction "channel" with its channel counted.
        correction: what is done where a teacher token is a proper prefix of the student's real token.
            "span": the probability of exactly the real token's bytes, known by the chain rule, moves from the first
            piece to the student's token. "channel": the first token of the spelling is replaced by counted
            P(student token | teacher token). "none".
        min_prefix_mass: rows whose prefix has less teacher probability do not count.

    Raises:
        ValueError: for correction "channel" without a counted channel.
    """

    def __init__(self, vocabulary: VocabularyMap, correction: str, min_prefix_mass: float) -> None:
        if correction == "channel" and vocabulary.channel_ids is None:
            raise ValueError(
                "got correction 'channel' and no counts; call VocabularyMap.with_channel on tokenised text"
            )
        self.correction, self.min_prefix_mass = correction, min_prefix_mass
        self.segments = torch.from_numpy(vocabulary.segments).long()
        channel = correction == "channel"
        self.channel_ids = torch.from_numpy(vocabulary.channel_ids).long() if channel else None
        self.channel_probs = torch.from_numpy(vocabulary.channel_probs) if channel else None

    def to(self, device: torch.device) -> "Projection":
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))
        return self

    @torch.no_grad()
    def __call__(self, signal: TeacherSignal, batch: PairedBatch, corrected: bool = True) -> SparseTarget:
        """The target of every row; what has no student token (yet) is in the tail.

        Args:
            corrected: False leaves the correction out: for measuring, since "span" knows the real next token.
        """
        correction = self.correction if corrected else "none"
        probs = signal.log_probs.exp()
        ids = torch.where(signal.ids >= 0, self._next(signal.ids.clamp_min(0), batch.depth[:, None]), -1)
        if correction == "channel":
            ids, probs = self._through_channel(ids, probs, signal, batch)
        tail = signal.log_tail.exp() + torch.where(ids < 0, probs, 0).sum(1)
        if correction == "span":
            ids, probs, tail = self._move_realised(ids, probs, tail, signal, batch)
        ids, probs = _merge(ids, torch.where(ids < 0, 0, probs))
        valid = (signal.log_mass > math.log(max(self.min_prefix_mass, 1e-30))) & (ids >= 0).any(1)
        return SparseTarget(ids=ids, probs=probs, tail=tail.clamp_min(0), valid=valid)

    def _next(self, token: Tensor, depth: Tensor) -> Tensor:
        """Student token at `depth` in the spelling of teacher tokens; -1 past its end."""
        longest = self.segments.shape[1]
        return torch.where(depth < longest, self.segments[token, depth.clamp_max(longest - 1)], -1)

    def _through_channel(self, ids: Tensor, probs: Tensor, signal: TeacherSignal, batch: PairedBatch) -> tuple:
        """Depth 0 through the counted channel, deeper rows through the spelling; [N, K * width]."""
        token = signal.ids.clamp_min(0)
        known = (signal.ids >= 0)[..., None]
        spread_ids = torch.where(known, self.channel_ids[token], -1)
        spread = torch.where(known, probs[..., None] * self.channel_probs[token], 0)
        # a teacher token that the channel knows nothing of keeps its mass, in the tail
        spread[..., 0] += torch.where(spread_ids[..., 0] < 0, probs, 0)
        plain_ids, plain = torch.full_like(spread_ids, -1), torch.zeros_like(spread)
        plain_ids[..., 0], plain[..., 0] = ids, probs
        shallow = (batch.depth == 0)[:, None, None]
        ids, probs = torch.where(shallow, spread_ids, plain_ids), torch.where(shallow, spread, plain)
        return ids.flatten(1), probs.flatten(1)

    def _move_realised(
        self, ids: Tensor, probs: Tensor, tail: Tensor, signal: TeacherSignal, batch: PairedBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append the mass of the real next student token, taken from its first piece (or from the tail)."""
        rows = batch.pieces > 1
        at = batch.asked[batch.row_asked]  # anchor as an index into signal.realised
        sums = _running_sums(signal.realised)
        log_mass = ((sums[at + batch.pieces] - sums[at]).double() / FIXED_POINT).float() - signal.log_mass
        mass = torch.where(rows, log_mass.clamp_max(0).exp(), 0)
        first = batch.teacher_ids.flatten()[batch.row_teacher + 1]
        source = self._next(first, batch.depth)
        listed = (signal.ids == first[:, None]).any(1) & (source >= 0)
        token = torch.where(rows, batch.labels.flatten()[batch.row_student], -1)
        ids = torch.cat([ids, torch.where(rows & listed, source, -1)[:, None], token[:, None]], 1)
        probs = torch.cat([probs, torch.where(listed, -mass, 0)[:, None], mass[:, None]], 1)
        return ids, probs, tail - torch.where(listed, 0, mass)


def _running_sums(log_probs: Tensor) -> Tensor:
    """Return [n + 1] int64: sums over the first 0 to n log-probabilities, times `FIXED_POINT`.

    In whole numbers, whose sum is exact in any order: of floating-point numbers a GPU has no deterministic running sum.
    """
    numbers = (log_probs.double().clamp_min(LEAST_LOG_PROB) * FIXED_POINT).round().long()
    return torch.cat([numbers.new_zeros(1), numbers.cumsum(0)])


def _merge(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Add the masses of equal ids; each id once per row, in rising order, -1 where nothing is left."""
    ids, order = ids.sort(1)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = new.cumsum(1) - 1
    merged = torch.zeros_like(probs).scatter_add(1, group, probs.gather(1, order))
    merged_ids = torch.full_like(ids, -1).scatter(1, group, ids)
    kept = (merged_ids >= 0) & (merged > 0)
    return torch.where(kept, merged_ids, -1), torch.where(kept, merged, 0)
