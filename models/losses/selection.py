"""Positions of each window that KD is learned at: those with the highest scores, in a share that may follow the run.

A share of a window's positions is known before any forward, so that neither micro-batches nor processes change what a
step divides by. They change which positions it is only where rounding decides between two scores. Positions that the
teacher cannot judge come last.

Shapes: N positions with a teacher's distribution, in B windows; c of them in one chunk; V student vocabulary; K tokens
that a distribution names.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..types import Places, SparseTarget
from .losses import LEAST_PROBABILITY, kl_with_bucket


class Evidence(NamedTuple):
    """Facts about some positions that a score is computed from."""

    target: SparseTarget
    """[c] distributions of the teacher."""
    logits: Tensor | None
    """[c, V] of the student; None where the score does without."""
    labels: Tensor
    """[c] token that each position predicts."""


Score = Callable[[Evidence], Tensor]
"""Score [c], in nats, of some positions: the higher, the more there is to learn."""


def entropy(logits: Tensor) -> Tensor:
    """Return [c] the entropy of distributions [c, V]."""
    log_q = logits.log_softmax(1)
    return -(log_q.exp() * log_q).sum(1)


def student_entropy(evidence: Evidence) -> Tensor:
    """Return the entropy of the student: where it is in doubt (SE-KD, arXiv 2602.01395)."""
    return entropy(evidence.logits)


def teacher_entropy(evidence: Evidence) -> Tensor:
    """Return the entropy of the teacher over the tokens that it names and one outcome for all others."""
    return entropy_of_target(evidence.target)


def entropy_of_target(target: SparseTarget) -> Tensor:
    """Return [c] the entropy of distributions over the tokens that each names and one outcome for all others."""
    outcomes = torch.cat([target.probs, target.tail[:, None]], 1)
    return -torch.xlogy(outcomes, outcomes).sum(1)


def divergence(evidence: Evidence) -> Tensor:
    """Return the KL divergence of the student from the teacher, at temperature 1, with one bucket for the rest."""
    return kl_with_bucket(evidence.logits, evidence.target)


def excess_loss(evidence: Evidence) -> Tensor:
    """Return the student's loss on the real token over the teacher's (RHO-1, arXiv 2404.07965).

    A token that the teacher does not name has at most the mass of all such tokens.
    """
    target = evidence.target
    labels = evidence.labels[:, None]
    is_label = target.ids == labels
    named = (target.probs * is_label).sum(1)
    teacher = torch.where(is_label.any(1), named, target.tail)

    student = evidence.logits.log_softmax(1).gather(1, labels)[:, 0]
    return teacher.clamp_min(LEAST_PROBABILITY).log() - student


SCORES: dict[str, Score] = {
    "student_entropy": student_entropy,
    "teacher_entropy": teacher_entropy,
    "divergence": divergence,
    "excess_loss": excess_loss,
}
"""Name in `LossConfig.select_by` -> score."""

WITHOUT_STUDENT = frozenset({"teacher_entropy"})
"""Names of the scores that need no logits of the student."""

STORED = "first_student"
"""Name in `LossConfig.select_by` of the entropy of the student before training, which windows bring along as places
(`models.chosen_positions`)."""


def positions_of_share(positions: np.ndarray, share: float) -> np.ndarray:
    """Return [B] how many positions of each window are chosen: the nearest whole number, at least one where one is.

    Args:
        positions: [B] of each window.
        share: above 0, at most 1.
    """
    nearest = np.rint(share * positions.astype(np.float64))
    return np.minimum(positions, np.maximum(nearest, 1)).astype(np.int64)


def places(scores: np.ndarray, share: float) -> np.ndarray:
    """Return [n] the place of each of a window's positions by its score; -1 behind a share. Of equal scores the first.

    Args:
        scores: [n].
        share: above 0, at most 1.
    """
    order = np.argsort(-scores, kind="stable")
    place = np.empty(len(scores), dtype=np.int64)
    place[order] = np.arange(len(scores))

    most = positions_of_share(np.array([len(scores)]), share)[0]
    return np.where(place < most, place, -1)


def choose_by_places(places: Places, positions: np.ndarray, share: float) -> Tensor | None:
    """Return [m] the chosen of N rows that have stored places, in order; None: all of them.

    Args:
        positions: [B] number of positions in each window, those that are no rows too; on the host.
        share: above 0, at most 1, and no more than what the places were stored for.
    """
    count = int(positions_of_share(positions, share).sum())
    if count >= len(places.place):
        return None

    most = _chosen_of(places.of, share)
    row = torch.arange(len(places.place), device=places.place.device)
    # The host knows how many there are: it does not wait for the device.
    return torch.where(places.place < most, row, len(row)).sort().values[:count]


def positions_of_a_chosen_one(positions: Tensor, share: float, judged: Tensor | None = None) -> Tensor:
    """Return how many positions each chosen one stands for, of windows with so many; any shape.

    Args:
        positions: how many a window has.
        share: above 0, at most 1.
        judged: how many of them the teacher can judge. They are chosen before the others, which teach nothing: the
            chosen ones that teach stand for all of them. None: it is not known, and the chosen ones for all positions.
    """
    chosen = _chosen_of(positions, share)
    if judged is None:
        return positions / chosen
    return judged / torch.minimum(chosen, judged).clamp_min(1)


def _chosen_of(positions: Tensor, share: float) -> Tensor:
    """Return how many positions are chosen of windows with so many, as `positions_of_share` says on the host."""
    return (share * positions.double()).round().clamp_min(1)


def choose(scores: Tensor, window: Tensor, positions: np.ndarray, share: float) -> Tensor:
    """Return [m] the chosen of N positions, in order; of equal scores the first.

    The host waits for nothing: how many are chosen is known to it.

    Args:
        scores: [N].
        window: [N] of each position.
        positions: [B] number of positions in each window, on the host.
        share: above 0, at most 1.
    """
    # On the device the same numbers again, in the same precision: a copy from the host would be waited for.
    ones = torch.ones_like(scores, dtype=torch.float64)
    held = ones.new_zeros(len(positions)).index_add_(0, window, ones)
    most = _chosen_of(held, share)

    # By window, and in each by score.
    order = scores.argsort(descending=True, stable=True)
    order = order[window[order].argsort(stable=True)]
    window = window[order]
    held = held.long()
    first = held.cumsum(0) - held
    rank = torch.arange(len(order), device=scores.device) - first[window]

    is_chosen = rank < most[window]
    count = int(positions_of_share(positions, share).sum())
    return torch.where(is_chosen, order, len(order)).sort().values[:count]
