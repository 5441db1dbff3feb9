"""Requirements of a run beside models and text: devices and packages, checked before all else."""

from typing import cast

import torch

from ..config.protocols import RunConfig
from ..errors import UserError
from ..evaluation import lm_eval_tasks
from ..logs import trackers
from ..parallel import deepspeed
from ..pretrained import lora, precision
from ..served.http_client import check_access


def check(config: RunConfig, device: torch.device) -> None:
    """Refuse, with nothing loaded, what this machine cannot do.

    Args:
        config: of the run, with sections `teacher`, `student`, `evaluation` and `logging`.
        device: of the student.

    Raises:
        UserError: weights that need another device, or that DeepSpeed cannot cut, a package that is not there, a task
            that cannot be measured, an address of a server or a key that cannot be one.
    """
    trackers.require(config.logging.track)

    if config.teacher.name is not None:
        for teacher in config.several_teachers or [config.teacher]:
            precision.check_weights(teacher.dtype, "teacher.dtype", device)
            if teacher.is_served:
                check_access(cast(str, teacher.name), config.served.key_variable)
    lora.check(config.student.lora, device)

    lora_settings = config.student.lora
    is_quantised = lora_settings.enabled and lora_settings.base in precision.QUANTISED
    if is_quantised and deepspeed.is_requested():
        raise UserError(
            f"DeepSpeed: got student.lora.base={lora_settings.base}, whose weights cannot be cut; expected auto, "
            "or no DeepSpeed"
        )

    lm_eval_tasks.check(config.evaluation)
