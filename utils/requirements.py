"""What a run asks of this machine besides its models and its text: devices and packages, found out before all else."""

from typing import Any

import torch

from . import adapters, benchmark_tasks, pretrained, zero
from .errors import UserError


def check(config: Any, device: torch.device) -> None:
    """Refuse, with nothing loaded, what this machine cannot do.

    Args:
        config: of the run, with sections `teacher`, `student` and `evaluation`.
        device: of the student.

    Raises:
        UserError: weights that need another device, or that DeepSpeed cannot cut, a package that is not there, a task
            that cannot be measured.
    """
    if config.teacher.name is not None:
        pretrained.check_weights(config.teacher.dtype, "teacher.dtype", device)
    adapters.check(config.student.lora, device)
    if zero.is_requested() and config.student.lora.enabled and config.student.lora.base in pretrained.QUANTISED:
        raise UserError(
            f"DeepSpeed: got student.lora.base={config.student.lora.base}, whose weights cannot be cut; expected auto, "
            "or no DeepSpeed"
        )
    benchmark_tasks.check(config.evaluation)
