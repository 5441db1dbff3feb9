"""Weights of windows in KD, by the student's success beside the teacher's.

PACED (arXiv 2603.11178) weights a problem by p(1 - p) of the student's pass rate p: both what it can do already and
what it cannot do at all teach little. Plain text has no pass rate. The success in a window is here the ratio of the
student's probability of the real text to the teacher's, as a geometric mean over the student's tokens, but 1 where the
student is the better one: p = exp(-excess loss). So p(1 - p) is 0 for equal models, and highest at an excess of log 2
nats a token.

A fresh window has no statistics of earlier steps. So its success comes from the losses of the same step, without a
gradient, and depends on nothing outside of the window; what is divided by, the mean over windows, comes from the steps
before. In this way weights have a mean of about 1 over a run, though not in each step of few windows, and no split of a
step into micro-batches or processes changes them.

Shapes: B windows, n supervised student positions, M unpadded teacher positions.
"""

import torch
from torch import Tensor

from ..types import IGNORE, PairedBatch, TeacherSignal

LEAST_WEIGHT = 0.25
MOST_WEIGHT = 4.0
"""Bounds of a window's weight."""


def excess_losses(batch: PairedBatch, signal: TeacherSignal, log_probs: Tensor) -> Tensor:
    """Return [B] the student's loss over the teacher's on the text of each window, in nats per token of the student.

    Of text that the student wrote itself it is the teacher's loss over the student's: there a student is far from the
    teacher where it finds likely what the teacher does not.

    Args:
        log_probs: [n] log-probability of each label under the student.
    """
    windows, width = batch.student_ids.shape
    window = batch.supervised // width
    is_scored = batch.scored("student")[1].flatten()[batch.supervised] != IGNORE
    student = _sums_of(log_probs.masked_fill(~is_scored, 0.0), window, windows)
    tokens = _sums_of(is_scored.to(log_probs.dtype), window, windows)

    # The same text, in other tokens.
    teacher_window = batch.teacher_held // batch.teacher_ids.shape[1]
    is_scored = batch.scored("teacher")[1].flatten()[batch.teacher_held] != IGNORE
    teacher = _sums_of(signal.realised.masked_fill(~is_scored, 0.0), teacher_window, windows)

    excess = (teacher - student) / tokens.clamp_min(1)
    if batch.given is None:
        return excess
    has_own_text = _sums_of((~batch.given).int(), window, windows) > 0
    return torch.where(has_own_text, -excess, excess)


def frontier(excess: Tensor) -> Tensor:
    """Return p(1 - p) of each window's success p = exp(-excess), which is 1 at most."""
    success = (-excess.clamp_min(0)).exp()
    return success * (1 - success)


def window_weights(scores: Tensor, mean: float | None, degree: float) -> Tensor:
    """Return [B] the weight of each window in KD.

    Args:
        scores: [B] of `frontier`.
        mean: of scores over the steps before; None, in the first step: all windows weigh alike.
        degree: 0 for equal weights, 1 for the scores over their mean; between them a mixture, of the same mean.
    """
    # Equal models have no frontier, and nothing to weigh by.
    if not mean:
        return torch.ones_like(scores)
    relative = (scores / mean).clamp(LEAST_WEIGHT, MOST_WEIGHT)
    return 1 + degree * (relative - 1)


def _sums_of(values: Tensor, window: Tensor, windows: int) -> Tensor:
    """Return [windows] the sum of the values in each window."""
    return values.new_zeros(windows).index_add_(0, window, values)
