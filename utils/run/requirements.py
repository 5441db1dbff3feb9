"""What a run asks of this machine besides its models and its text: devices and packages, found out before all else."""

from typing import Any

import torch

from ..errors import UserError
from ..evaluation import lm_eval_tasks
from ..logs import trackers
from ..parallel import deepspeed
from ..pretrained import lora, precision


def check(config: Any, device: torch.device) -> None:
    """Refuse, with nothing loaded, what this machine cannot do.

    Args:
        config: of the run, with sections `teacher`, `student`, `evaluation` and `logging`.
        device: of the student.

    Raises:
        UserError: weights that need another device, or that DeepSpeed cannot cut, a package that is not there, a task
            that cannot be measured.
    """
    trackers.require(config.logging.track)
    if config.teacher.name is not None:
        precision.check_weights(config.teacher.dtype, "teacher.dtype", device)
    lora.check(config.student.lora, device)
    if deepspeed.is_requested() and config.student.lora.enabled and config.student.lora.base in precision.QUANTISED:
        raise UserError(
            f"DeepSpeed: got student.lora.base={config.student.lora.base}, whose weights cannot be cut; expected auto, "
            "or no DeepSpeed"
        )
    lm_eval_tasks.check(config.evaluation)
