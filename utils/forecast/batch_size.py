"""The choice of a batch size that fits into memory, with the forecast that it rests on."""

import logging
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import PretrainedConfig

from ..advice import advice
from ..config.protocols import ConfigT, RunConfig
from ..errors import UserError
from ..logs.lines import ROUTER_TERMS
from ..machine.device_memory import MARGIN
from ..machine.hardware import free_memory
from ..parallel.processes import on_main_process
from ..pretrained import loading
from ..pretrained.named import load_shapes, teachers_by_role
from .disk import largest
from .step_memory import CPU_MEMORY_SHARE, ChunkRows, Demand, StepSetting, demand_of, in_gib, spares_teacher
from .writing_memory import WritingMemory

log = logging.getLogger(__name__)

REMEDY = (
    "Lower --batch-size and raise --gradient-accumulation-steps by the same factor (--batch-size auto does both), or "
    "try --gradient-checkpointing, a lower --max-length, --lora, or smaller models"
)

HELD_BETWEEN_STEPS = {"optimizer", "teacher weights", "student weights", "runtime"}
"""Parts of a step's memory that are held between steps too."""


@dataclass(frozen=True)
class Forecast:
    """Memory that training takes on the student's device; empty where no forecast is possible."""

    told: str = ""
    """The forecast as a message."""
    size: int = 0
    """Bytes."""
    writing: WritingMemory | None = None
    """Of the texts that the student writes, where it learns from its own."""


@dataclass(frozen=True)
class Machine:
    """Device and processes of a run, as far as memory depends on them."""

    device: torch.device
    """Of the student."""
    precision: str
    """`no`, `fp16` or `bf16`."""
    processes: int
    sharded: str
    """See `Demand.sharded`."""

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Machine":
        """Return the machine that an accelerator was built for."""
        sharded = ""
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            sharded = f"zero{accelerator.deepspeed_plugin.zero_stage}"
        elif accelerator.distributed_type == DistributedType.FSDP:
            sharded = "fsdp2"

        return cls(
            device=accelerator.device,
            precision=accelerator.mixed_precision,
            processes=accelerator.num_processes,
            sharded=sharded,
        )


def choose_batch_size(config: ConfigT, accelerator: Accelerator, chunk_rows: ChunkRows) -> tuple[ConfigT, Forecast]:
    """Return the RunConfig with a number for `batch_size: auto`, and the forecast, which is logged.

    With auto, `gradient_accumulation_steps` is the number of windows per optimizer step and process: they are taken in
    the largest micro-batches that divide it and fit. Where no forecast is possible, micro-batches start as large as
    can be halved while training, or else with one window.

    Raises:
        UserError: micro-batches of one window need more than is free, by more than the forecast can be wrong.
    """
    machine = Machine.of(accelerator)

    # the main process decides for all: free memory differs from one to the other
    return on_main_process(accelerator, lambda: _choose(config, machine, chunk_rows))


def _choose(config: ConfigT, machine: Machine, chunk_rows: ChunkRows) -> tuple[ConfigT, Forecast]:
    """Choose the batch size in one process, and log why."""
    fit = None
    with advice("forecast of memory"):
        fit = _fit(config, machine, chunk_rows)

    is_auto = config.training.batch_size == "auto"
    if fit is None:
        if is_auto:
            config = _without_forecast(config, machine)
        return config, Forecast()

    message = f"{largest(fit.parts)} in micro-batches of {fit.windows}; {in_gib(fit.free)} GiB free on {machine.device}"
    if spares_teacher(config):
        message += " (teacher included, which a complete cache spares)"

    # only building a cache trains nothing, so that what training takes is no reason to refuse it
    if fit.least > MARGIN * fit.free and not config.cache.build_only:
        raise UserError(
            f"training would take about {in_gib(fit.least)} GiB even in micro-batches of one window, and "
            f"{in_gib(fit.free)} GiB are free on {machine.device} (forecast: {largest(fit.parts)}). {REMEDY}."
        )

    if fit.size > fit.free:
        log.warning("memory: about %s. Where it does not fit, micro-batches are halved. %s", message, REMEDY)
    else:
        log.info("memory: about %s%s", message, " (chosen by --batch-size auto)" if is_auto else "")

    if is_auto:
        config = _in_micro_batches(config, fit.windows)
    if config.curriculum.uses_own_text:
        return config, _with_writing(config, fit, message)
    return config, Forecast(message, fit.size)


def _with_writing(config: RunConfig, fit: "_Fit", message: str) -> Forecast:
    """Return a forecast with the batches of texts that the student writes; log how many fit."""
    # what the step needs besides weights and moments is free while the student writes
    writing = WritingMemory.of(fit.student, fit.passing)
    tokens = min(fit.length, config.on_policy.tokens)
    together = writing.texts(tokens)
    size = writing.batch(together, tokens)
    log.info("the student writes up to %d texts at a time, in about %s GiB", together, in_gib(size))

    # the prompts of conversations may be as long as a window
    longest = writing.batch(writing.texts(fit.length), fit.length)
    return Forecast(message, fit.size - fit.passing + max(fit.passing, size, longest), writing)


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
    student: PretrainedConfig
    length: int
    """Tokens of a window."""

    @property
    def passing(self) -> int:
        """Bytes of a step that are free between two steps."""
        return sum(size for name, size in self.parts.items() if name not in HELD_BETWEEN_STEPS)

    @property
    def size(self) -> int:
        """Bytes of a step in such micro-batches."""
        return sum(self.parts.values())


def _fit(config: RunConfig, machine: Machine, chunk_rows: ChunkRows) -> _Fit:
    """Forecast the micro-batches of the settings, or with `auto` the largest that fit."""
    demand = _demand(config, machine, chunk_rows)

    free = free_memory(machine.device)
    windows = config.training.batch_size
    if windows == "auto":
        budget = free * (1 if demand.on_gpu else CPU_MEMORY_SHARE)
        windows = _largest_fitting(demand, config.training.gradient_accumulation_steps, budget)

    without_spared = replace(demand, apart=demand.apart or spares_teacher(config))
    return _Fit(
        windows=windows,
        parts=demand.memory(windows),
        least=sum(without_spared.memory(1).values()),
        free=free,
        student=demand.student,
        length=demand.length,
    )


def _demand(config: RunConfig, machine: Machine, chunk_rows: ChunkRows) -> Demand:
    """Return what the memory of a step depends on, from the models' configs and the machine."""
    shapes = load_shapes(config)
    limits = [loading.context_length(shape) for shape in shapes.values()]

    setting = StepSetting(
        student=shapes["student"],
        teachers=tuple(shapes[role] for role in teachers_by_role(config)) if config.teacher.name else (),
        length=int(min(config.data.max_length, *limits)),
        precision=machine.precision,
        device=machine.device,
        chunk_rows=chunk_rows,
        processes=machine.processes,
        sharded=machine.sharded,
    )
    return demand_of(config, setting)


def _largest_fitting(demand: Demand, step_windows: int, budget: float) -> int:
    """Return the largest micro-batch that divides the windows of a step and fits into `budget` bytes; at least 1."""
    for windows in range(step_windows, 0, -1):
        if step_windows % windows:
            continue
        if sum(demand.memory(windows).values()) <= budget:
            return windows
    return 1


def _without_forecast(config: ConfigT, machine: Machine) -> ConfigT:
    """Choose for `batch_size: auto` where nothing is known of the memory that it takes."""
    # micro-batches are halved on CUDA alone: a CPU raises nothing before the system kills
    can_halve = machine.device.type == "cuda"

    # and not where several processes would have to halve together, or windows are compared with one another
    if machine.processes > 1:
        # a router measures the contrastive term, over all processes, whichever of its terms is learned
        has_router = bool(config.curriculum.used() & {*ROUTER_TERMS})
        is_bound = machine.sharded or config.teacher.device == "sharded" or has_router
        can_halve = can_halve and not is_bound

    if can_halve:
        windows = config.training.gradient_accumulation_steps
        reason = "they are halved where they do not fit"
    else:
        windows = 1
        reason = "too large ones could not be halved here"
    log.warning("--batch-size auto: without a forecast, micro-batches of %d; %s", windows, reason)
    return _in_micro_batches(config, windows)


def _in_micro_batches(config: ConfigT, windows: int) -> ConfigT:
    """Return the RunConfig whose optimizer steps, as large as before, are taken in micro-batches of so many windows."""
    step_windows = config.training.gradient_accumulation_steps
    training = replace(config.training, batch_size=windows, gradient_accumulation_steps=step_windows // windows)
    return replace(config, training=training)
