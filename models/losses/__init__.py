"""The losses that are minimised.

Modules:
    losses: next-token loss, KD and the span term, as pure functions on tensors.
    fused_head: LM and KD of the student's head, and their gradients, without the logits of all positions at once.
    head_products: plain linear and other heads, and the products that carry a chunk's gradient backward.
    head_softmax: the softmax of a chunk and its gradient, for compiled passes.
    head_passes: the two compiled passes over a chunk of logits, and the choice whether to use them.
    selection: the positions of each window that KD is learned at.
    sample_weights: the weight of each window in KD.
    chunk_size: the number of logit rows that are held at once.

The divergences lie beside this folder, in `divergences`, because the settings name them too.
"""

from .chunk_size import chunk_rows
from .fused_head import HeadComputation, HeadLosses, HeadTarget, head_losses
from .losses import kd_loss, next_token_loss, outcome_log_probs, span_loss, span_sums

__all__ = [
    "HeadComputation",
    "HeadLosses",
    "HeadTarget",
    "chunk_rows",
    "head_losses",
    "kd_loss",
    "next_token_loss",
    "outcome_log_probs",
    "span_loss",
    "span_sums",
]
