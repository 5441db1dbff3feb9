"""Divergences between teacher and student over the same outcomes."""

import math

import torch
from torch import Tensor


def temper(log_probs: Tensor, temperature: float) -> Tensor:
    """Log of p ** (1 / T), normalised over the last dimension."""
    return torch.log_softmax(log_probs / temperature, dim=-1)


def divergence(log_p: Tensor, log_q: Tensor, kind: str, skew: float) -> Tensor:
    """[N] divergence in nats of the student q from the teacher p, over the last dimension.

    forward_kl KL(p, q); reverse_kl KL(q, p); jsd: mean KL of both to their mixture; skew_kl
    KL(p, skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898, eq. 3).
    """
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        both = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
        return both.sum(-1) / 2
    if kind == "skew_kl":
        log_m = torch.logaddexp(log_p + math.log(skew), log_q + math.log1p(-skew))
        return (log_p.exp() * (log_p - log_m)).sum(-1)
    raise ValueError(f"got divergence {kind!r}, expected forward_kl, reverse_kl, jsd or skew_kl")
