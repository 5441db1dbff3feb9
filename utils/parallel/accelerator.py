"""The accelerator: precision, processes, engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from . import deepspeed
from .engine import Engine, FullySharded
from .sharding import check_launcher

LONGEST_WAIT = timedelta(hours=2)
"""How long processes wait for one another: for the main one to cut a large corpus into windows. A process that ends
does not make the others wait: its launcher ends them, and so does the closed connection."""


def build_accelerator(
    mixed_precision: str, *, cpu: bool = False, track: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """An Accelerator as the loop needs it.

    Args:
        mixed_precision: `no`, `fp16` or `bf16` (`auto` is decided in `hardware`).
        cpu: stay on the CPU even if there is a GPU.
        track: experiment trackers, which `utils.logs.trackers.require` has found.
        folder: where those that need one write.

    Raises:
        UserError: a launcher asks for FSDP1, or for a DeepSpeed that is refused.
    """
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
def temporary_accelerator(mixed_precision: str, *, cpu: bool) -> Iterator[Accelerator]:
    """An Accelerator for a while beside one of another precision or device: accelerate has one state a process."""
    kept = [(kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, PartialState)]
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield build_accelerator(mixed_precision, cpu=cpu)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        for state, before in kept:
            state.update(before)
