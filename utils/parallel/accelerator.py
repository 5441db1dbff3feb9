"""The accelerator as a run needs it: precision, processes, DDP, and the engine that takes the steps."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from ..machine.hardware import choose_device, choose_precision
from .deepspeed import Zero, plugin
from .engine import Engine, FullySharded
from .sharding import check_launcher

LONGEST_WAIT = timedelta(hours=2)
"""Longest time that processes wait for one another: for the main one to cut a large corpus into windows. A process
that ends does not make the others wait: its launcher ends them, and so does the closed connection."""


def build_accelerator(
    mixed_precision: str, *, cpu: bool = False, track: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """Return an Accelerator as the loop needs it.

    Args:
        mixed_precision: `no`, `fp16` or `bf16` (`auto` is decided in `hardware`).
        cpu: stay on the CPU even if there is a GPU.
        track: experiment trackers, which `utils.logs.trackers.require` has found.
        folder: where those that need one write.

    Raises:
        UserError: a launcher asks for FSDP1, or for a DeepSpeed that is refused.
    """
    check_launcher()
    _forget_precision_of_earlier_runs(mixed_precision)

    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=True,  # terms of the curriculum whose weight is 0 leave parameters without a gradient
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # rotary tables and the router's statistics: equal everywhere, never changed in a step
    )
    process_group = InitProcessGroupKwargs(timeout=LONGEST_WAIT)

    # accelerate has one state a process: an earlier accelerator's plugin is used, and a second one refused
    deepspeed_plugin = None
    if AcceleratorState._shared_state.get("distributed_type") != DistributedType.DEEPSPEED:
        deepspeed_plugin = plugin(mixed_precision, device="cpu" if cpu else "gpu")

    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        cpu=cpu,
        log_with=list(track) or None,
        project_config=ProjectConfiguration(logging_dir=str(folder)) if track else None,
        kwargs_handlers=[ddp, process_group],
        deepspeed_plugin=deepspeed_plugin,
    )
    _number_device(accelerator)
    if accelerator.device.type == "cpu":
        # transformers loads DeepSpeed where it is installed, and that would warn that it had to look for a device
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return accelerator


def _forget_precision_of_earlier_runs(mixed_precision: str) -> None:
    """Let a second run of one process, as in a notebook, compute in another precision than the first.

    accelerate has one state a process, and refuses a second precision in it. That of DeepSpeed stays, since it has the
    engine's settings.
    """
    state = AcceleratorState._shared_state
    is_other = state.get("_mixed_precision", mixed_precision) != mixed_precision
    if is_other and state.get("distributed_type") != DistributedType.DEEPSPEED:
        AcceleratorState._reset_state()


def _number_device(accelerator: Accelerator) -> None:
    """Let the device of a lone process be `cuda:0`, not `cuda`, which is unequal to any device that a user names."""
    device = accelerator.device
    if device.type == "cuda" and device.index is None:
        accelerator.state.device = torch.device("cuda", torch.cuda.current_device())


def accelerator_for(mixed_precision: Literal["auto", "no", "fp16", "bf16"]) -> Accelerator:
    """Make an Accelerator for the device that is there, in the precision that was asked for where it can be met."""
    device = choose_device().value
    precision = choose_precision(mixed_precision, device).value
    return build_accelerator(precision, cpu=device.type == "cpu")


def engine_kind(accelerator: Accelerator) -> type[Engine]:
    """Return the class that takes the steps of a module under this accelerator."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return FullySharded
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return Zero
    return Engine


@contextmanager
def temporary_accelerator(mixed_precision: str, *, cpu: bool) -> Iterator[Accelerator]:
    """Provide an Accelerator for a while, beside one of another precision or device.

    accelerate has one state a process, which is put aside and put back afterwards.
    """
    saved_states = [(kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, PartialState)]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield build_accelerator(mixed_precision, cpu=cpu)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for shared_state, saved in saved_states:
            shared_state.update(saved)
