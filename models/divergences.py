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

Divergence = Callable[["Tensor", "Tensor", float], "Tensor"]
"""Divergence in nats of the student from the teacher: (log_p, log_q, skew) -> [...].

log_p [..., K] and log_q [..., K] are the normalised log-probabilities of teacher and student; very negative ones, not
-inf, stand for outcomes without probability. `skew` is the share of the teacher in a mixture, for those that have one.
The result is 0 for equal distributions, and autograd differentiates it by log_q.
"""


def forward_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """Return KL(p, q), which asks the student for mass wherever the teacher has some."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """Return KL(q, p), which forbids the student mass where the teacher has none."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """Return the mean KL of both sides to their mixture: symmetric, at most ln 2."""
    log_mixture = log_p.logaddexp(log_q) - math.log(2)
    teacher_part = log_p.exp() * (log_p - log_mixture)
    student_part = log_q.exp() * (log_q - log_mixture)
    return (teacher_part + student_part).sum(-1) / 2


def skew_kl(log_p: Tensor, log_q: Tensor, skew: float) -> Tensor:
    """Return KL(p, skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898, eq. 3)."""
    # In logarithms: log(1 - skew) is exact by log1p, and no probability is computed that could vanish.
    log_teacher_share = log_p + math.log(skew)
    log_student_share = log_q + math.log1p(-skew)
    log_mixture = log_teacher_share.logaddexp(log_student_share)
    return (log_p.exp() * (log_p - log_mixture)).sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "skew_kl": skew_kl,
}
"""Name in the settings -> function, in the order in which messages list them."""

if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[tuple(DIVERGENCES)]
"""Annotation of a setting that names a divergence; a check of annotations admits the names of the table alone."""


def divergence(
    log_p: Tensor,
    log_q: Tensor,
    kind: str,
    skew: float,
) -> Tensor:
    """Return the divergence of that name, in nats, of the student q from the teacher p, over the last dimension.

    Args:
        log_p: [..., K] normalised log-probabilities of the teacher.
        log_q: [..., K] likewise of the student.
        kind: a key of `DIVERGENCES`.
        skew: share of the teacher in the mixture of skew_kl.

    Raises:
        ValueError: for a name that the table does not have.
    """
    if kind not in DIVERGENCES:
        *names, last_name = DIVERGENCES
        raise ValueError(f"got divergence {kind!r}, expected {', '.join(names)} or {last_name}")
    return DIVERGENCES[kind](log_p, log_q, skew)


def temper(log_probs: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the log of p ** (1 / temperature), normalised over the last dimension."""
    return (log_probs / temperature).log_softmax(-1)
