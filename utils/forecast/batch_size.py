"""The forecast of a run's memory, and the batch size that fits."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ..advice import advice
from ..errors import UserError
from ..machine.device_memory import MARGIN
from ..machine.hardware import free_memory
from ..parallel.processes import on_main_process
from ..pretrained import loading
from .disk import largest
from .step_memory import ROOM_ON_CPU, ChunkRows, _gib, demand_of, spares_teacher

log = logging.getLogger(__name__)


REMEDY = (
    "Lower --batch-size and raise --gradient-accumulation-steps by the same factor (--batch-size auto does both), or "
    "try --gradient-checkpointing, a lower --max-length, --lora, or smaller models"
)


@dataclass(frozen=True)
class Forecast:
    """Of what training takes on the student's device; empty where none is possible."""

    told: str = ""
    size: int = 0  # bytes


@dataclass(frozen=True)
class Machine:
    """What a run computes on, as far as memory depends on it."""

    device: torch.device
    """Of the student."""
    precision: str
    """`no`, `fp16` or `bf16`."""
    processes: int
    sharded: str
    """See `Demand.sharded`."""

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Machine":
        """What an accelerator was built for."""
        sharded = ""
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            sharded = f"zero{accelerator.deepspeed_plugin.zero_stage}"
        elif accelerator.distributed_type == DistributedType.FSDP:
            sharded = "fsdp2"
        return cls(accelerator.device, accelerator.mixed_precision, accelerator.num_processes, sharded)


def choose_batch_size(config: Any, accelerator: Accelerator, chunk_rows: ChunkRows) -> tuple[Any, Forecast]:
    """(the RunConfig with a number for `batch_size: auto`, the forecast), logged.

    With auto, `gradient_accumulation_steps` is the number of windows per optimizer step and process: they are taken in
    the largest micro-batches that divide it and fit. Where no forecast is possible, micro-batches start as large as
    can be halved while training, or else with one window.

    Raises:
        UserError: micro-batches of one window need more than is free, by more than the forecast can be wrong.
    """
    machine = Machine.of(accelerator)
    return on_main_process(accelerator, lambda: _settle(config, machine, chunk_rows))


def _settle(config: Any, machine: Machine, chunk_rows: ChunkRows) -> tuple[Any, Forecast]:
    fit = None
    with advice("forecast of memory"):
        fit = _what_fits(config, machine, chunk_rows)

    is_auto = config.training.batch_size == "auto"
    if fit is None:
        return (_without_forecast(config, machine) if is_auto else config), Forecast()

    told = f"{largest(fit.parts)} in micro-batches of {fit.windows}; {_gib(fit.free)} GiB free on {machine.device}"
    if spares_teacher(config):
        told += " (teacher included, which a complete cache spares)"

    if fit.least > MARGIN * fit.free and not config.cache.build_only:
        raise UserError(
            f"training would take about {_gib(fit.least)} GiB even in micro-batches of one window, and "
            f"{_gib(fit.free)} GiB are free on {machine.device} (forecast: {largest(fit.parts)}). {REMEDY}."
        )
    if fit.size > fit.free:
        log.warning("memory: about %s. Where it does not fit, micro-batches are halved. %s", told, REMEDY)
    else:
        log.info("memory: about %s%s", told, " (chosen by --batch-size auto)" if is_auto else "")

    return (_in_micro_batches(config, fit.windows) if is_auto else config), Forecast(told, fit.size)


@dataclass(frozen=True)
class _Fit:
    """A forecast beside what is free."""

    windows: int
    """In a micro-batch."""
    parts: dict[str, int]
    """Bytes of a step in such micro-batches, by what holds them."""
    least: int
    """Bytes of a step in micro-batches of one window, without a teacher that a cache spares."""
    free: int
    """Bytes free on the student's device."""

    @property
    def size(self) -> int:
        """Bytes of a step in such micro-batches."""
        return sum(self.parts.values())


def _what_fits(config: Any, machine: Machine, chunk_rows: ChunkRows) -> _Fit:
    """The forecast for the micro-batches that were asked for, or for the largest that fit."""
    names = {"student": config.student.name, "teacher": config.teacher.name or config.student.name}
    shapes = loading.load_each(loading.load_config, names)
    teacher = shapes["teacher"] if config.teacher.name else None
    length = int(min(config.data.max_length, *map(loading.context_length, shapes.values())))
    demand = demand_of(
        config,
        shapes["student"],
        teacher,
        length,
        machine.precision,
        machine.device,
        chunk_rows,
        machine.processes,
        machine.sharded,
    )

    free, windows = free_memory(machine.device), config.training.batch_size
    if windows == "auto":
        room = free * (1 if demand.on_gpu else ROOM_ON_CPU)
        sizes = _divisors(config.training.gradient_accumulation_steps)
        windows = next((size for size in sizes if sum(demand.memory(size).values()) <= room), 1)

    without_spared = replace(demand, apart=demand.apart or spares_teacher(config))
    return _Fit(windows, demand.memory(windows), sum(without_spared.memory(1).values()), free)


def _without_forecast(config: Any, machine: Machine) -> Any:
    """`batch_size: auto` where nothing is known of the memory that it takes."""
    alone = machine.processes == 1
    waits = machine.sharded or config.teacher.device == "sharded" or "contr" in config.curriculum.used()
    can_halve = machine.device.type == "cuda" and (alone or not waits)

    windows = config.training.gradient_accumulation_steps if can_halve else 1
    why = "they are halved where they do not fit" if can_halve else "too large ones could not be halved here"
    log.warning("--batch-size auto: without a forecast, micro-batches of %d; %s", windows, why)
    return _in_micro_batches(config, windows)


def _in_micro_batches(config: Any, windows: int) -> Any:
    """The RunConfig whose optimizer steps, as large as before, are taken in micro-batches of so many windows."""
    whole = config.training.gradient_accumulation_steps
    training = replace(config.training, batch_size=windows, gradient_accumulation_steps=whole // windows)
    return replace(config, training=training)


def _divisors(number: int) -> list[int]:
    """From the number itself down to 1."""
    return [size for size in range(number, 0, -1) if number % size == 0]
