"""Optimizer, parameter groups and learning-rate schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from ..config.settings import TrainingConfig
from ..errors import UserError


def build_optimizer(module: nn.Module, config: TrainingConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over the trained parameters.

    The module's own `parameter_groups(learning_rate, weight_decay)` are used if it has them: dicts of `name`,
    `params`, `lr` and `weight_decay`, those named "student" first. Otherwise all parameters have one learning rate,
    and weight decay only matrices (biases and norms are vectors).

    Args:
        fused: one kernel for all parameters, which can also leave a step out without asking the host. Without it the
            multi-tensor kernels are taken: told nothing but fused=False, torch would update one tensor at a time.

    Raises:
        UserError: nothing of the student is trained.
    """
    if hasattr(module, "parameter_groups"):
        groups = module.parameter_groups(config.learning_rate, config.weight_decay)
    else:
        groups = [
            {"params": [p for p in module.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in module.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
    groups = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    groups = [group for group in groups if group["params"]]
    grouped = {p for group in groups for p in group["params"]}
    assert grouped == {p for p in module.parameters() if p.requires_grad}, "parameter_groups() differ from parameters()"
    if not taught_parameters(groups):
        raise UserError("no parameter of the student is trained. Expected at least one that requires a gradient.")
    betas = tuple(config.betas)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=fused, foreach=not fused)


def taught_parameters(groups: Sequence[Mapping[str, Any]]) -> list[nn.Parameter]:
    """The student's parameters in an optimizer's groups: of those named "student", or of all where none has a name."""
    return [p for group in groups if group.get("name", "student") == "student" for p in group["params"]]


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> Any:
    """Warm-up, then cosine or linear to 0, over optimizer steps. Not for `prepare()`, which would hurry it."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    return get_scheduler(config.scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
