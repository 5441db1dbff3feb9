"""The losses: pure functions on tensors, in float32, returning sums.

Shapes: n supervised positions, N KD rows, V student vocabulary, K tokens that a target names in a row, P spans.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..divergences import divergence, interpolate, temper
from ..types import SparseTarget

PADDING = -1e9
"""Log-probability of an outcome that is only padding: its probability is exactly 0 and no difference is NaN."""
LOG_FLOOR = math.log(1e-7)
"""Least log-probability of a teacher's bucket, of a student's beside it, and of the opposite of a span: float32 cannot
tell a smaller rest from none."""
LEAST_REST = 1e-38
"""Least probability of a student's bucket; float32 has no smaller one."""
LEAST_PROBABILITY = 1e-30
"""Least teacher probability of a named token, so that its logarithm is finite."""
HIGHEST_SPAN = -1e-7
"""Most log-probability of a span: its opposite then has one that is finite."""


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross-entropy (nats) of [n, V] logits against the tokens [n] they predict."""
    return F.cross_entropy(logits, labels, reduction="sum")


def outcome_log_probs(logits: Tensor, target: SparseTarget, tail: str) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities, of the teacher and of the student, of the outcomes that KD compares.

    The outcomes are the target's tokens and, with tail "bucket", one more: any other token. Both sides are
    normalised over the same outcomes, so that a student equal to the teacher has divergence 0.

    Args:
        logits: [N, V] of the student.
        target: [N, K] tokens with their probabilities under the teacher.
        tail: "bucket" or "renormalise".

    Returns:
        two tensors [N, K + 1] ("bucket") or [N, K] ("renormalise"; to be normalised, as `temper` does).
    """
    # Padding repeats a token of its row, so that what is left after masking is the rest of the vocabulary.
    is_token = target.ids >= 0
    any_token = target.ids.amax(1, keepdim=True).clamp_min(0)
    ids = torch.where(is_token, target.ids, any_token)

    probs = target.probs.clamp_min(LEAST_PROBABILITY)
    log_p = torch.where(is_token, probs.log(), PADDING)
    log_probs = logits.log_softmax(1)
    log_q = torch.where(is_token, log_probs.gather(1, ids), PADDING)
    if tail == "renormalise":
        return log_p, log_q

    # Summed over what is left, not 1 - sum: exact also where the rest is tiny.
    other_probs = log_probs.exp().scatter(1, ids, 0.0)
    student_rest = other_probs.sum(1, keepdim=True)
    log_student_rest = student_rest.clamp_min(LEAST_REST).log()
    log_teacher_rest = target.tail[:, None].log()

    # Bounded only where the teacher has no rest either: a student certain of too little keeps its gradient.
    bounded = log_student_rest.clamp_min(LOG_FLOOR)
    log_student_rest = torch.where(log_teacher_rest > LOG_FLOOR, log_student_rest, bounded)
    log_teacher_rest = log_teacher_rest.clamp_min(LOG_FLOOR)

    log_p = torch.cat([log_p, log_teacher_rest], 1)
    log_q = torch.cat([log_q, log_student_rest], 1)
    return log_p, log_q


def kl_with_bucket(logits: Tensor, target: SparseTarget) -> Tensor:
    """Return [N] the KL divergence of a student with logits [N, V] from the teacher, at temperature 1."""
    log_p, log_q = outcome_log_probs(logits, target, "bucket")
    return (log_p.exp() * (log_p - log_q)).sum(1)


def kd_loss(
    logits: Tensor,
    target: SparseTarget,
    *,
    temperature: float | Tensor,
    kind: str,
    tail: str,
    skew: float | Tensor,
    interpolation: float | Tensor | None = None,
) -> Tensor:
    """Return the sum over rows of the divergence between tempered teacher and student, times temperature squared.

    Adding masses on the student's vocabulary and tempering do not commute: the target is made at temperature 1 and
    both sides are tempered here. The square keeps the size of the gradient (Hinton et al. 2015).

    Args:
        logits: [N, V] of the student.
        target: [N, K]; its invalid rows add nothing, the others as often as their weight says.
        temperature: above 0.
        kind: a key of `DIVERGENCES`.
        tail: treatment of the tokens that a row does not name, "bucket" or "renormalise".
        skew: share of the teacher in the mixture of skew_kl and generalised_jsd.
        interpolation: share of the teacher in what the student learns from (`interpolate`); None: the teacher alone.
    """
    log_p, log_q = outcome_log_probs(logits, target, tail)
    log_p = temper(log_p, temperature)
    log_q = temper(log_q, temperature)
    if interpolation is not None:
        log_p = interpolate(log_p, log_q, interpolation)

    rows = divergence(log_p, log_q, kind=kind, skew=skew)
    rows = torch.where(target.valid, rows, 0)
    if target.weight is not None:
        rows = rows * target.weight
    return rows.sum() * temperature**2


def span_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float,
    kind: str,
    skew: float,
) -> Tensor:
    """Return the sum over spans of the divergence of (this text, any other text) between teacher and student.

    Approximate likelihood matching (arXiv 2503.20083, eq. 5): the probability of the text of a span needs no common
    vocabulary. Both two-outcome distributions are tempered as in KD, that is normalised again (the paper takes
    p ** (1 / T) and its opposite; equal at T = 1); the sum is multiplied by temperature squared.

    Args:
        student: [P] log-probability of each span's text under the student.
        teacher: [P] likewise under the teacher.
        temperature: above 0.
        kind: a key of `DIVERGENCES`.
        skew: share of the teacher in the mixture of skew_kl and generalised_jsd.
    """
    log_p = temper(_with_opposite(teacher), temperature)
    log_q = temper(_with_opposite(student), temperature)
    spans = divergence(log_p, log_q, kind=kind, skew=skew)
    return spans.sum() * temperature**2


def _with_opposite(log_prob: Tensor) -> Tensor:
    """Return [P, 2] log-probabilities of outcomes [P] and of their opposites, accurate at both ends."""
    log_prob = log_prob.clamp_max(HIGHEST_SPAN)
    is_likely = log_prob > -math.log(2)

    # Each branch sees only arguments it can take, so that the unused one has no NaN gradient.
    likely = torch.where(is_likely, log_prob, -1.0)
    unlikely = torch.where(is_likely, -1.0, log_prob)
    opposite_of_likely = (-torch.expm1(likely)).log()
    opposite_of_unlikely = torch.log1p(-unlikely.exp())
    opposite = torch.where(is_likely, opposite_of_likely, opposite_of_unlikely)
    return torch.stack([log_prob, opposite.clamp_min(LOG_FLOOR)], -1)


def span_sums(values: Tensor, spans: Tensor, count: int) -> Tensor:
    """Return [P] sums of per-token values over the spans they belong to.

    Args:
        values: [n] number of each token.
        spans: [n] span of each token; -1: none.
        count: P.
    """
    # A token of no span goes to one more, which is dropped: choosing the others would wait for the device.
    spans = torch.where(spans < 0, count, spans)
    sums = values.new_zeros(count + 1).index_add(0, spans, values)
    return sums[:count]
