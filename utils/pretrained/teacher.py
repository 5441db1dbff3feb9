"""The frozen teacher's model: its device, or devices, and its loading.

It computes with the student, on a device of its own, or on several. `spread`, in one process: accelerate puts some
layers on each GPU, and on the CPU those that fit on none. `sharded`, in several: each holds a part of every layer, and
they put a layer together while it computes.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import get_max_memory
from torch import nn

from ..config.protocols import ConfigT, RunConfig
from ..config.settings import ModelConfig
from ..errors import UserError
from ..interfaces import Job
from ..machine import hardware
from ..machine.device_memory import MARGIN
from . import loading
from .precision import QUANTISED
from .sharded_teacher import shard_layers

log = logging.getLogger(__name__)

SPREAD = "spread"
SHARDED = "sharded"

ROOM = 0.9
"""Share of the free memory of a device that weights may take: the rest is for what is computed with them."""


# ---------------------------------------------------------------- choice of devices


def with_spare_gpu(config: ConfigT, device: torch.device, processes: int) -> tuple[ConfigT, str | None]:
    """Return the RunConfig whose teacher, on `auto`, has a GPU for itself where there is one to spare, and the reason.

    Args:
        device: of the student.
        processes: of the run.
    """
    is_loaded = config.teacher.name is not None and not config.teacher.is_elsewhere
    is_trained_with = is_loaded and not config.cache.build_only
    if config.teacher.device != "auto" or not is_trained_with:
        return config, None

    spare = hardware.spare_gpu(device, processes)
    if spare is None:
        return config, None
    placed = replace(config, teacher=replace(config.teacher, device=str(spare.value)))
    return placed, f"{spare.value}: {spare.reason}"


def choose_teacher_device(config: RunConfig, accelerator: Accelerator) -> torch.device:
    """Return the teacher's device; of a teacher on several devices, the student's.

    Raises:
        UserError: the requested device does not exist, or the request contradicts another setting.
    """
    requested = config.teacher.device
    processes = accelerator.num_processes

    if requested == SPREAD:
        _require_several_gpus(processes)
        return accelerator.device
    if requested == SHARDED:
        _require_sharding(config, processes)
        return accelerator.device
    return hardware.choose_teacher_device(requested, accelerator.device, processes).value


def _require_several_gpus(processes: int) -> None:
    """Check that one process has GPUs to spread a teacher over.

    Raises:
        UserError: there are several processes, or fewer than two GPUs.
    """
    if processes > 1 or _gpus() < 2:
        raise UserError(
            f"teacher.device spread: got processes: {processes}, GPUs: {_gpus()}; expected one process, two GPUs or "
            "more. In several processes a teacher can be sharded: --teacher-device sharded."
        )


def _require_sharding(config: RunConfig, processes: int) -> None:
    """Check that a teacher can be sharded over the processes of this run.

    Raises:
        UserError: there is one process, or the teacher is quantised or cached.
    """
    if processes < 2:
        raise UserError(
            "teacher.device sharded: got one process, expected two or more (accelerate launch --num_processes N ...). "
            "In one process a teacher can be spread over several GPUs: --teacher-device spread."
        )
    if config.teacher.dtype in QUANTISED or config.cache.folder:
        raise UserError(
            f"teacher.device sharded: got teacher.dtype={config.teacher.dtype} and cache.folder={config.cache.folder}. "
            "Quantised weights cannot be cut, and a cache is filled by processes that do not wait for each other. "
            "Leave these out, or take one process and --teacher-device spread."
        )


def on_one_process(config: ModelConfig) -> ModelConfig:
    """Return the same teacher for a single process: `spread` and `sharded` become `auto`."""
    if config.device in (SPREAD, SHARDED):
        return replace(config, device="auto")
    return config


def gpus_used(config: RunConfig, device: torch.device, of_teachers: set[torch.device]) -> int:
    """Return how many GPUs this process computes on.

    Args:
        device: of the student.
        of_teachers: devices of the teachers, from `choose_teacher_device`.
    """
    if config.teacher.device == SPREAD:
        return _gpus()
    return len(({device} | of_teachers) - {torch.device("cpu")})


def is_asked_ahead(config: RunConfig) -> bool:
    """Tell whether the teacher computes a step before the student has finished the one before it.

    A sharded teacher does not: where a short last step leaves a process no windows, that process would call it in
    another order than the others do, and they would wait for each other for ever.
    """
    of_run = config.several_teachers or [config.teacher]
    if any(teacher.is_served for teacher in of_run):
        return True
    devices = {teacher.device for teacher in of_run}
    return config.teacher.name is not None and bool(devices - {"auto", SHARDED})


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# ---------------------------------------------------------------- loading


def load(job: Job) -> nn.Module:
    """Load the teacher's model onto its device or devices.

    Raises:
        UserError: see `loading.load_model`.
    """
    config = job.config.teacher

    # A sharded teacher is cut on the CPU: whole it may be larger than any GPU.
    device: torch.device | str | Mapping[int | str, int] = job.teacher_device
    if config.device == SPREAD:
        device = room(job.accelerator.device, job.needed.size)
    elif config.device == SHARDED:
        device = "cpu"

    dtype = job.teacher_dtype
    model = loading.load_model(
        config.name, "teacher", dtype.value, device, weights=config.dtype, allow_pickle=config.allow_pickle
    )

    place = str(job.teacher_device)
    if config.device == SPREAD:
        place = places(model)
    elif config.device == SHARDED:
        shard_layers(model, job.accelerator)
        place += f", its layers sharded over {job.accelerator.num_processes} processes"
        if job.config.evaluation.tasks:
            log.warning("--eval-tasks: not measured on a sharded teacher, with which all processes must compute")

    name = "" if job.teacher_name is None else f"{job.teacher_name} "
    log.info("teacher %son %s in %s: %s", name, place, str(dtype.value).removeprefix("torch."), dtype.reason)
    return model


def places(model: nn.Module) -> str:
    """Return where the parts of a spread model are, for the log."""
    # transformers leaves no map on a model that one device holds whole
    device_map = getattr(model, "hf_device_map", {"": model.device})

    # accelerate calls GPUs by their numbers, and other places by their names.
    modules: Counter[str] = Counter()
    for place in device_map.values():
        modules[f"cuda:{place}" if isinstance(place, int) else str(place)] += 1

    if len(modules) == 1:
        return f"{next(iter(modules))}, whole"
    return ", ".join(f"{place} ({count} modules)" for place, count in modules.items())


def room(student: torch.device, needed: int) -> dict[int | str, int]:
    """Return the bytes that each device has for a teacher beside the student.

    Args:
        student: its device.
        needed: bytes that training takes there without the teacher; 0: unknown, and the teacher gets nothing there.
    """
    # Free memory now, before the student is loaded: what that will need is taken off below.
    free = {device: int(ROOM * size) for device, size in get_max_memory().items()}
    if student.type == "cuda":
        gpu = student.index or 0
        reserved = int(MARGIN * needed)
        free[gpu] = max(0, free[gpu] - reserved) if needed else 0
    return free
