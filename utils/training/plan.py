"""How windows become optimizer steps, and what takes them: plan, accelerator, optimizer, schedule."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import nn
from transformers import get_scheduler

from ..config.build import TrainingConfig
from ..data import loader
from ..errors import UserError
from ..logs import trackers
from ..parallel import deepspeed
from ..parallel.engine import Engine, FullySharded
from ..parallel.sharding import check_launcher

LONGEST_WAIT = timedelta(hours=2)
"""How long processes wait for one another: for the main one to cut a large corpus into windows. A process that ends
does not make the others wait: its launcher ends them, and so does the closed connection."""


@dataclass(frozen=True)
class Plan:
    """How the windows become optimizer steps."""

    windows: int
    micro_batch: int
    """Windows per forward pass, at most."""
    global_batch: int
    """Windows per optimizer step."""
    processes: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainingConfig, windows: int, processes: int = 1) -> "Plan":
        """The plan of a configuration for so many windows."""
        global_batch = config.batch_size * config.gradient_accumulation_steps * processes
        steps = config.max_steps or config.epochs * loader.steps_per_epoch(windows, global_batch)
        return cls(windows, config.batch_size, global_batch, processes, steps)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step and process."""
        return math.ceil(self.global_batch / (self.micro_batch * self.processes))

    def halved(self) -> "Plan":
        """The same optimizer steps, in micro-batches of half the windows, rounded up."""
        return replace(self, micro_batch=(self.micro_batch + 1) // 2)

    @property
    def steps_per_epoch(self) -> int:
        return loader.steps_per_epoch(self.windows, self.global_batch)

    def __str__(self) -> str:
        return (
            f"micro-batch {self.micro_batch} x accumulation {self.accumulation} x processes {self.processes} = "
            f"effective batch of {self.global_batch} windows; {self.windows} windows, {self.steps_per_epoch} optimizer "
            f"steps an epoch, {self.total_steps} in all"
        )

    def identity(self) -> dict[str, int]:
        """What may not change between a checkpoint and its continuation."""
        return {"windows": self.windows, "windows_per_step": self.global_batch, "total_steps": self.total_steps}


def build_accelerator(
    mixed_precision: str, *, cpu: bool = False, track: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """An Accelerator as the loop needs it.

    Args:
        mixed_precision: `no`, `fp16` or `bf16` (`auto` is decided in `hardware`).
        cpu: stay on the CPU even if there is a GPU.
        track: experiment trackers, see `utils.tracking`.
        folder: where those that need one write.

    Raises:
        UserError: a tracker is not installed, or a launcher asks for FSDP1, or for a DeepSpeed that is refused.
    """
    trackers.require(track)
    check_launcher()
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=True,  # terms of the curriculum whose weight is 0 leave parameters without a gradient
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # rotary tables and the router's statistics: equal everywhere, never changed in a step
    )
    group = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    # of an accelerator that there is already
    has_plugin = AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu,
        log_with=list(track) or None,
        project_config=ProjectConfiguration(logging_dir=str(folder)) if track else None,
        kwargs_handlers=[ddp, group],
        deepspeed_plugin=None if has_plugin else deepspeed.plugin(mixed_precision, "cpu" if cpu else "gpu"),
    )
    _number_device(accelerator)
    return accelerator


def _number_device(accelerator: Accelerator) -> None:
    """Let the device of a lone process be `cuda:0`, not `cuda`, which is unequal to any device that a user names."""
    device = accelerator.device
    if device.type == "cuda" and device.index is None:
        accelerator.state.device = torch.device("cuda", torch.cuda.current_device())


def engine_kind(accelerator: Accelerator) -> type[Engine]:
    """What takes the steps of a module here."""
    kinds = {DistributedType.FSDP: FullySharded, DistributedType.DEEPSPEED: deepspeed.Zero}
    return kinds.get(accelerator.distributed_type, Engine)


@contextmanager
def another_accelerator(mixed_precision: str, *, cpu: bool) -> Iterator[Accelerator]:
    """An Accelerator for a while beside one of another precision or device: accelerate has one state a process."""
    kept = [(kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, PartialState)]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield build_accelerator(mixed_precision, cpu=cpu)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for state, before in kept:
            state.update(before)


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
