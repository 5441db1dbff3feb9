"""Projection of the teacher's distributions on the student's vocabulary: `TeacherSignal` -> `SparseTarget`.

Shapes: N KD rows, K teacher tokens of each row, C student tokens that the channel has for a teacher token, L longest
spelling, V_T teacher vocabulary.
"""

import math

import torch
from torch import Tensor

from ..text.vocabulary import VocabularyMap
from ..types import PairedBatch, SparseTarget, TeacherSignal

FIXED_POINT = 2.0**32
"""Units in 1 nat: a rounding to whole units is far finer than a float32 log-probability."""
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

    def __init__(
        self,
        vocabulary: VocabularyMap,
        correction: str,
        min_prefix_mass: float,
    ) -> None:
        if correction == "channel" and vocabulary.channel_ids is None:
            raise ValueError(
                "got correction 'channel' and no counts; call VocabularyMap.with_channel on tokenised text"
            )

        self.correction = correction
        self.min_prefix_mass = min_prefix_mass
        # [V_T, L] student tokens that spell each teacher token.
        self.segments = torch.from_numpy(vocabulary.segments).long()
        # [V_T, C] student tokens that were counted where a teacher token begins, and how probable each is.
        self.channel_ids = None
        self.channel_probs = None
        if correction == "channel":
            self.channel_ids = torch.from_numpy(vocabulary.channel_ids).long()
            self.channel_probs = torch.from_numpy(vocabulary.channel_probs)

    def to(self, device: torch.device) -> "Projection":
        """Move the tables to a device, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.device != device:
                setattr(self, name, value.to(device))
        return self

    @torch.no_grad()
    def __call__(
        self,
        signal: TeacherSignal,
        batch: PairedBatch,
        corrected: bool = True,
    ) -> SparseTarget:
        """Return the target of every row; the mass of what has no student token (yet) is in the tail.

        Args:
            corrected: False leaves the correction out: for measuring, since "span" knows the real next token.
        """
        correction = self.correction if corrected else "none"
        probs = signal.log_probs.exp()
        is_token = signal.ids >= 0
        token = signal.ids.clamp_min(0)
        spelled = self._next_in_spelling(token, batch.depth[:, None])
        ids = torch.where(is_token, spelled, -1)
        if correction == "channel":
            ids, probs = self._through_channel(ids, probs, signal, batch)

        # The tail is whatever falls to no student token: what the teacher's top k leave out, and spellings that end.
        without_token = torch.where(ids < 0, probs, 0)
        tail = signal.log_tail.exp() + without_token.sum(1)
        if correction == "span":
            ids, probs, tail = self._move_realised(ids, probs, tail, signal, batch)
        probs = torch.where(ids < 0, 0, probs)
        ids, probs = merge(ids, probs)

        # A row is nothing to learn from where the teacher hardly expected what was read, or names no student token.
        least_mass = max(self.min_prefix_mass, 1e-30)
        is_expected = signal.log_mass > math.log(least_mass)
        valid = is_expected & (ids >= 0).any(1)
        return SparseTarget(ids=ids, probs=probs, tail=tail.clamp_min(0), valid=valid)

    def _next_in_spelling(self, token: Tensor, depth: Tensor) -> Tensor:
        """Return the student token at `depth` in the spelling of teacher tokens; -1 past its end."""
        longest = self.segments.shape[1]
        spelled = self.segments[token, depth.clamp_max(longest - 1)]
        return torch.where(depth < longest, spelled, -1)

    def _through_channel(
        self,
        ids: Tensor,
        probs: Tensor,
        signal: TeacherSignal,
        batch: PairedBatch,
    ) -> tuple[Tensor, Tensor]:
        """Return [N, K * C] ids and masses: depth 0 through the counted channel, deeper rows through the spelling.

        Args:
            ids: [N, K] student tokens by the spelling.
            probs: [N, K] masses of the teacher's tokens.
        """
        # Depth 0: the mass of a teacher token is spread over the student tokens that were counted for it.
        token = signal.ids.clamp_min(0)
        is_token = (signal.ids >= 0)[..., None]
        channel_ids = torch.where(is_token, self.channel_ids[token], -1)
        spread = probs[..., None] * self.channel_probs[token]
        channel_mass = torch.where(is_token, spread, 0)
        # A teacher token that was never counted keeps its mass, in the tail.
        is_uncounted = channel_ids[..., 0] < 0
        channel_mass[..., 0] += torch.where(is_uncounted, probs, 0)

        # Deeper: all of the mass goes to the one token of the spelling.
        spelled_ids = torch.full_like(channel_ids, -1)
        spelled_mass = torch.zeros_like(channel_mass)
        spelled_ids[..., 0] = ids
        spelled_mass[..., 0] = probs

        is_shallow = (batch.depth == 0)[:, None, None]
        ids = torch.where(is_shallow, channel_ids, spelled_ids)
        probs = torch.where(is_shallow, channel_mass, spelled_mass)
        return ids.flatten(1), probs.flatten(1)

    def _move_realised(
        self,
        ids: Tensor,
        probs: Tensor,
        tail: Tensor,
        signal: TeacherSignal,
        batch: PairedBatch,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Move the mass of the real next student token to it, from the student token that its first piece begins with.

        The mass is the teacher's probability of exactly these bytes, by the chain rule over the token's pieces. Both
        changes are appended as columns of ids and masses; from a piece that is not listed it comes out of the tail.
        """
        is_split = batch.pieces > 1
        # The signal's numbers are in the order of the text.
        anchor = batch.asked[batch.row_asked]
        sums = running_sums(signal.realised)
        units = sums[anchor + batch.pieces] - sums[anchor]
        log_realised = (units.double() / FIXED_POINT).float()
        log_mass = log_realised - signal.log_mass
        realised_mass = log_mass.clamp_max(0).exp()
        mass = torch.where(is_split, realised_mass, 0)

        first_piece = batch.teacher_ids.flatten()[batch.row_teacher + 1]
        source = self._next_in_spelling(first_piece, batch.depth)
        is_piece = signal.ids == first_piece[:, None]
        is_listed = is_piece.any(1) & (source >= 0)
        source_ids = torch.where(is_split & is_listed, source, -1)
        source_mass = torch.where(is_listed, -mass, 0)

        labels = batch.labels.flatten()[batch.row_student]
        target_ids = torch.where(is_split, labels, -1)
        ids = torch.cat([ids, source_ids[:, None], target_ids[:, None]], 1)
        probs = torch.cat([probs, source_mass[:, None], mass[:, None]], 1)
        return ids, probs, tail - torch.where(is_listed, 0, mass)


def running_sums(log_probs: Tensor) -> Tensor:
    """Return [n + 1] int64: sums over the first 0 to n log-probabilities, times `FIXED_POINT`.

    In whole numbers, whose sum is exact in any order: of floating-point numbers a GPU has no deterministic running sum.
    """
    bounded = log_probs.double().clamp_min(LEAST_LOG_PROB)
    units = (bounded * FIXED_POINT).round().long()
    return torch.cat([units.new_zeros(1), units.cumsum(0)])


def merge(ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Add the masses of equal ids; each id once per row, in rising order, -1 where nothing is left."""
    # Equal ids become neighbours; each such group is numbered by its rank.
    ids, order = ids.sort(1)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = is_first.cumsum(1) - 1

    # Padding is a group, too; and a mass that was moved away leaves 0, or a little less by rounding.
    sorted_probs = probs.gather(1, order)
    group_mass = torch.zeros_like(probs).scatter_add(1, group, sorted_probs)
    group_ids = torch.full_like(ids, -1).scatter(1, group, ids)
    has_mass = (group_ids >= 0) & (group_mass > 0)
    merged_ids = torch.where(has_mass, group_ids, -1)
    merged_probs = torch.where(has_mass, group_mass, 0)
    return merged_ids, merged_probs
