"""The losses: pure functions on tensors, in float32, returning sums.

Shapes: n supervised positions, N KD rows, V student vocabulary, K kept outcomes, P spans.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import SparseTarget
from .divergences import divergence, temper

PADDING = -1e9
"""Log-probability of an outcome that is only padding: its probability is exactly 0 and no difference is NaN."""
LOG_FLOOR = math.log(1e-7)
"""Least log-probability of a teacher's bucket, of a student's beside it, and of the opposite of a span: float32 cannot
tell a smaller rest from none."""
LEAST_REST = 1e-38
"""Least probability of a student's bucket; float32 has no smaller one."""


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross-entropy (nats) of [n, V] logits against the tokens [n] they predict."""
    return F.cross_entropy(logits, labels, reduction="sum")


def outcome_log_probs(logits: Tensor, target: SparseTarget, tail: str) -> tuple[Tensor, Tensor]:
    """(teacher, student) log-probabilities of the outcomes that KD compares.

    The outcomes are the target's tokens and, with tail "bucket", one more: any other token. Both sides are
    normalised over the same outcomes, so that a student equal to the teacher has divergence 0.

    Returns:
        two tensors [N, K + 1] ("bucket") or [N, K] ("renormalise"; to be normalised, as `temper` does).
    """
    kept = target.ids >= 0
    # padding repeats a token of its row, so that what is left after masking is the rest of the vocabulary
    ids = torch.where(kept, target.ids, target.ids.amax(1, keepdim=True).clamp_min(0))
    log_p = torch.where(kept, target.probs.clamp_min(1e-30).log(), PADDING)
    log_probs = logits.log_softmax(1)
    log_q = torch.where(kept, log_probs.gather(1, ids), PADDING)
    if tail == "renormalise":
        return log_p, log_q
    # summed over what is left, not 1 - sum: exact also where the rest is tiny
    rest = log_probs.exp().scatter(1, ids, 0.0).sum(1, keepdim=True).clamp_min(LEAST_REST).log()
    log_r = target.tail[:, None].log()
    # only where the teacher has no rest either: a student certain of too little keeps its gradient
    rest = torch.where(log_r > LOG_FLOOR, rest, rest.clamp_min(LOG_FLOOR))
    return torch.cat([log_p, log_r.clamp_min(LOG_FLOOR)], 1), torch.cat([log_q, rest], 1)


def kd_loss(logits: Tensor, target: SparseTarget, *, temperature: float, kind: str, tail: str, skew: float) -> Tensor:
    """Sum over rows of the divergence between tempered teacher and student, times temperature squared.

    Adding masses on the student's vocabulary and tempering do not commute: the target is made at temperature 1 and
    both sides are tempered here. The square keeps the size of the gradient (Hinton et al. 2015).
    """
    log_p, log_q = (temper(x, temperature) for x in outcome_log_probs(logits, target, tail))
    rows = divergence(log_p, log_q, kind, skew)
    return torch.where(target.valid, rows, 0).sum() * temperature**2


def span_loss(student: Tensor, teacher: Tensor, *, temperature: float, kind: str, skew: float) -> Tensor:
    """Sum over spans of the divergence of (this text, any other text) between teacher and student.

    Approximate likelihood matching (arXiv 2503.20083, eq. 5): the probability of the text of a span needs no common
    vocabulary. Both two-outcome distributions are tempered as in KD, that is normalised again (the paper takes
    p ** (1 / T) and its opposite; equal at T = 1); the sum is multiplied by temperature squared.

    Args:
        student: [P] log-probability of each span's text under the student.
        teacher: [P] likewise under the teacher.
    """
    log_p, log_q = (temper(torch.stack(_binary(x), -1), temperature) for x in (teacher, student))
    return divergence(log_p, log_q, kind, skew).sum() * temperature**2


def _binary(log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of an outcome and of its opposite, accurate at both ends."""
    log_prob = log_prob.clamp_max(-1e-7)
    near_one = log_prob > -math.log(2)
    # each branch sees only arguments it can take, so that the unused one has no NaN gradient
    opposite = torch.where(
        near_one,
        (-torch.expm1(torch.where(near_one, log_prob, -1.0))).log(),
        torch.log1p(-torch.where(near_one, -1.0, log_prob).exp()),
    )
    return log_prob, opposite.clamp_min(LOG_FLOOR)


def span_sums(values: Tensor, spans: Tensor, count: int) -> Tensor:
    """[P] sums of per-token values over the spans they belong to (-1: none)."""
    # what is in no span goes to one more, that is dropped: choosing would wait for the device
    return values.new_zeros(count + 1).index_add(0, torch.where(spans < 0, count, spans), values)[:count]
