"""Where the frozen teacher computes: with the student, on a device of its own, or on several.

`spread`, in one process: accelerate puts some layers on each GPU, and on the CPU what finds no room there. `sharded`,
in several: each holds a part of every layer, and they put a layer together while it computes.
"""

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import get_max_memory
from torch import nn

from ..config.settings import ModelConfig
from ..errors import UserError
from ..machine import hardware
from ..machine.device_memory import MARGIN
from . import loading, precision, sharded_teacher

log = logging.getLogger(__name__)

SPREAD, SHARDED = "spread", "sharded"
ROOM = 0.9
"""Share of the free memory of a device that weights may take: the rest is for what is computed with them."""


def choose_teacher_device(config: Any, accelerator: Accelerator) -> torch.device:
    """Where the teacher computes; of one on several devices, that of the student.

    Args:
        config: the junction's RunConfig.

    Raises:
        UserError: what was asked for is not there, or cannot be had beside something else that was.
    """
    asked, processes, device = config.teacher.device, accelerator.num_processes, accelerator.device
    if asked not in (SPREAD, SHARDED):
        return hardware.choose_teacher_device(asked, device, processes).value
    if asked == SPREAD and (processes > 1 or _gpus() < 2):
        raise UserError(
            f"teacher.device spread: got processes: {processes}, GPUs: {_gpus()}; expected one process, two GPUs or "
            "more. In several processes a teacher can be sharded: --teacher-device sharded."
        )
    if asked == SHARDED and processes < 2:
        raise UserError(
            "teacher.device sharded: got one process, expected two or more (accelerate launch --num_processes N ...). "
            "In one process a teacher can be spread over several GPUs: --teacher-device spread."
        )
    if asked == SHARDED and (config.teacher.dtype in precision.QUANTISED or config.cache.folder):
        raise UserError(
            f"teacher.device sharded: got teacher.dtype={config.teacher.dtype} and cache.folder={config.cache.folder}. "
            "Quantised weights cannot be cut, and a cache is filled by processes that do not wait for each other. "
            "Leave these out, or take one process and --teacher-device spread."
        )
    return device


def on_one_process(config: ModelConfig) -> ModelConfig:
    """What one process can have of it that does not look for GPUs: a teacher for several is with the student."""
    return replace(config, device="auto") if config.device in (SPREAD, SHARDED) else config


def gpus_used(config: Any, device: torch.device, teacher: torch.device) -> int:
    """GPUs that this process computes on.

    Args:
        device, teacher: of the student, and from `place`.
    """
    return _gpus() if config.teacher.device == SPREAD else len({device, teacher} - {torch.device("cpu")})


def is_asked_ahead(config: Any) -> bool:
    """Whether the teacher is asked about a step before the student works on the one before.

    Not a sharded one: where a short step leaves a process nothing, it would be asked in another order than in others.
    """
    return config.teacher.name is not None and config.teacher.device not in ("auto", SHARDED)


def load(job: Any) -> nn.Module:
    """The teacher's model where it is to compute.

    Args:
        job: of the junction, with the device and dtype of its teacher.

    Raises:
        UserError: see `pretrained.load_model`.
    """
    config, dtype = job.config.teacher, job.teacher_dtype
    where: Any = job.teacher_device
    if config.device == SPREAD:
        where = room(job.accelerator.device, job.needed.size)
    elif config.device == SHARDED:
        where = "cpu"
    weights = {"weights": config.dtype, "allow_pickle": config.allow_pickle}
    model = loading.load_model(config.name, "teacher", dtype.value, where, **weights)
    told = str(job.teacher_device)
    if config.device == SPREAD:
        told = places(model)
    elif config.device == SHARDED:
        sharded_teacher.shard_layers(model, job.accelerator)
        told += f", its layers sharded over {job.accelerator.num_processes} processes"
        if job.config.evaluation.tasks:
            log.warning("--eval-tasks: not measured on a sharded teacher, with which all processes must compute")
    log.info("teacher on %s in %s: %s", told, str(dtype.value).removeprefix("torch."), dtype.reason)
    return model


def places(model: nn.Module) -> str:
    """Return where the parts of a spread model are, for the log.

    transformers leaves no map on a model that one device holds whole.
    """
    device_map = getattr(model, "hf_device_map", {"": model.device})
    modules = Counter(f"cuda:{place}" if isinstance(place, int) else str(place) for place in device_map.values())
    if len(modules) == 1:
        return f"{next(iter(modules))}, whole"
    return ", ".join(f"{place} ({count} modules)" for place, count in modules.items())


def room(student: torch.device, needed: int) -> dict[int | str, int]:
    """Bytes that each device has for a teacher beside the student.

    Args:
        needed: what training takes on the student's device without the teacher; 0: not known, so that is not touched.
    """
    free = {device: int(ROOM * size) for device, size in get_max_memory().items()}
    if student.type == "cuda":
        free[student.index or 0] = max(0, free[student.index or 0] - int(MARGIN * needed)) if needed else 0
    return free


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
