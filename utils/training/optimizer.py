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
    """Return AdamW over the trained parameters.

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
        groups = _matrices_and_vectors(module, config.weight_decay)

    # A checkpoint numbers its moments through the groups, where frozen parameters are not counted.
    groups = _trained(groups)

    # A parameter in no group would stay as it is, without a word.
    grouped = {p for group in groups for p in group["params"]}
    trained = {p for p in module.parameters() if p.requires_grad}
    assert grouped == trained, "parameter_groups() differ from parameters()"

    if not taught_parameters(groups):
        raise UserError("no parameter of the student is trained. Expected at least one that requires a gradient.")
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=tuple(config.betas),
        fused=fused,
        foreach=not fused,
    )


def _matrices_and_vectors(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: parameters that decay, and biases and norms, which do not."""
    matrices = [p for p in module.parameters() if p.ndim >= 2]
    vectors = [p for p in module.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def _trained(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups without frozen parameters, and without groups that are empty then."""
    trained = []
    for group in groups:
        parameters = [p for p in group["params"] if p.requires_grad]
        if parameters:
            trained.append({**group, "params": parameters})
    return trained


def taught_parameters(groups: Sequence[Mapping[str, Any]]) -> list[nn.Parameter]:
    """Return the student's parameters in an optimizer's groups: those of groups that are named "student" or nothing."""
    return [p for group in groups if group.get("name", "student") == "student" for p in group["params"]]


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> Any:
    """Return a schedule over optimizer steps: warm-up, then cosine or linear to 0.

    Do not give it to `Accelerator.prepare`, which would step it once for each process.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    return get_scheduler(
        config.scheduler,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total_steps,
    )
