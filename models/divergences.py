"""Divergences between teacher and student over the same outcomes: one function and one line of `DIVERGENCES` each.

Shapes: any leading dimensions [...], K outcomes, which both sides know by their log-probabilities.

The settings, the loss and its tests read the table. A new divergence is a function with the signature of `Divergence`,
named in it; nothing else has to know its name.

Settings are checked against the table before torch is loaded, so everything here is a method of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""Divergence in nats of the student from the teacher: (log_p, log_q, skew) -> [...].

log_p [..., K] and log_q [..., K] are the normalised log-probabilities of teacher and student; very negative ones, not
-inf, stand for outcomes without probability. `skew` is the share of the teacher in a mixture, for those that have one:
a scalar tensor between 0 and 1, without either. The result is 0 for equal distributions, and autograd differentiates it
by log_q.
"""


def forward_kl(log_p: Tensor, log_q: Tensor, skew: Tensor) -> Tensor:
    """Return KL(p, q), which asks the student for mass wherever the teacher has some."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, skew: Tensor) -> Tensor:
    """Return KL(q, p), which forbids the student mass where the teacher has none."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, skew: Tensor) -> Tensor:
    """Return the mean KL of both sides to their mixture: symmetric, at most ln 2."""
    log_mixture = log_p.logaddexp(log_q) - math.log(2)
    teacher_part = log_p.exp() * (log_p - log_mixture)
    student_part = log_q.exp() * (log_q - log_mixture)
    return (teacher_part + student_part).sum(-1) / 2


def skew_kl(log_p: Tensor, log_q: Tensor, skew: Tensor) -> Tensor:
    """Return KL(p, skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898, eq. 3)."""
    # In logarithms: log(1 - skew) is exact by log1p, and no probability is computed that could vanish.
    log_teacher_share = log_p + skew.log()
    log_student_share = log_q + (-skew).log1p()
    log_mixture = log_teacher_share.logaddexp(log_student_share)
    return (log_p.exp() * (log_p - log_mixture)).sum(-1)


def generalised_jensen_shannon(log_p: Tensor, log_q: Tensor, skew: Tensor) -> Tensor:
    """Return (skew KL(p, m) + (1 - skew) KL(q, m)) / (skew (1 - skew)), m = skew p + (1 - skew) q.

    It is the divergence of GKD (arXiv 2306.13649, eq. 1) over skew (1 - skew), so that it has the same size on its
    whole way: from the forward KL, at 0, through four times the Jensen-Shannon divergence to the reverse KL, at 1.
    """
    # Near an end of the way the logarithm of one ratio is divided by what is nearly 0.
    log_ratio = log_p - log_q
    mixture_to_teacher = _log_mixture_ratio(-log_ratio, 1 - skew)
    mixture_to_student = _log_mixture_ratio(log_ratio, skew)

    teacher_part = -(log_p.exp() * mixture_to_teacher).sum(-1) / (1 - skew)
    student_part = -(log_q.exp() * mixture_to_student).sum(-1) / skew
    return teacher_part + student_part


def _log_mixture_ratio(log_ratio: Tensor, share: Tensor) -> Tensor:
    """Return log(share exp(log_ratio) + 1 - share), whose error is as small as `share` is, and 0 at ratio 1."""
    # exp would overflow for large ratios. Clamped, so that the branch which is not taken has no gradient that is NaN.
    most = 20.0
    moderate = log_ratio.clamp(max=most)
    large = log_ratio.clamp(min=most)
    of_moderate = (share * moderate.expm1()).log1p()
    of_large = large + ((1 - share) * (-large).expm1()).log1p()
    return of_moderate.where(log_ratio <= most, of_large)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "skew_kl": skew_kl,
    "generalised_jsd": generalised_jensen_shannon,
}
"""Name in the settings -> function, in the order in which messages list them."""

MIXED = frozenset({"skew_kl", "generalised_jsd"})
"""Names of those that compare with a mixture whose share of the teacher is a setting."""

ENDS: dict[tuple[str, float], str] = {
    ("skew_kl", 0.0): "forward_kl",
    ("generalised_jsd", 0.0): "forward_kl",
    ("generalised_jsd", 1.0): "reverse_kl",
}
"""Divergence and share of the teacher in its mixture, at which nothing is mixed -> the divergence that it is there."""

NEAR_END = 1e-6
"""Nearer to 0 or 1 than this a share of the teacher is that end: float32 divides by what is left of it."""

if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[tuple(DIVERGENCES)]
"""Annotation of a setting that names a divergence; a check of annotations admits the names of the table alone."""


def divergence(
    log_p: Tensor,
    log_q: Tensor,
    kind: str,
    skew: float | Tensor,
) -> Tensor:
    """Return the divergence of that name, in nats, of the student q from the teacher p, over the last dimension.

    Args:
        log_p: [..., K] normalised log-probabilities of the teacher.
        log_q: [..., K] likewise of the student.
        kind: a key of `DIVERGENCES`.
        skew: share of the teacher in the mixture of skew_kl and generalised_jsd; as a tensor it is at neither end.

    Raises:
        ValueError: for a name that the table does not have.
    """
    if kind not in DIVERGENCES:
        *names, last_name = DIVERGENCES
        raise ValueError(f"got divergence {kind!r}, expected {', '.join(names)} or {last_name}")

    if isinstance(skew, float | int):
        kind = divergence_at(kind, skew)
        skew = log_p.new_full((), skew)
    return DIVERGENCES[kind](log_p, log_q, skew)


def divergence_at(kind: str, skew: float) -> str:
    """Return the name of the divergence that one is at a share of the teacher in its mixture: another at its ends."""
    for end in (0.0, 1.0):
        if abs(skew - end) < NEAR_END:
            return ENDS.get((kind, end), kind)
    return kind


def temper(log_probs: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the log of p ** (1 / temperature), normalised over the last dimension."""
    return (log_probs / temperature).log_softmax(-1)


def interpolate(log_p: Tensor, log_q: Tensor, share: float | Tensor) -> Tensor:
    """Return the log of p ** share q ** (1 - share), normalised over the last dimension: a target on the way to p.

    The student's q is a constant in it (TAID, arXiv 2501.16937, eq. 3, whose logits these are up to a constant).
    """
    return (share * log_p + (1 - share) * log_q.detach()).log_softmax(-1)
