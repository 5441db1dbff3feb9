"""How much memory training will take, to find out in seconds what would fail after an hour; and what fits.

What the models themselves take is not guessed: `measure_body` runs them on tensors without content (FakeTensorMode),
with as few layers as tell how it grows with depth, and counts the bytes that exist at a time. What the losses of
`models/` add are sums, whose factors are bytes of the tensors they hold; `tests/equivalence/test_memory.py` compares
the whole with the peak of real optimizer steps.

Attention: the scores [heads, S, S] count where a model's own attention makes them (eager, or dropout on a CPU). On a
GPU this forecast relies on SDPA having a kernel that does not write them: flash or cuDNN in half precision from compute
capability 8.0 on, memory-efficient elsewhere (float32 and float16 on every GPU that torch supports). The latter reads
no grouped heads, so it also relies on `models/attention.py`, which has keys and values repeated there.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig

from ..advice import advice
from ..config.build import LoraConfig, ModelConfig
from ..errors import UserError
from ..logs.step_logger import ROUTER_TERMS
from ..parallel import deepspeed
from ..parallel.processes import on_main_process
from ..paths import user_path
from ..pretrained import loading
from ..pretrained.families import auto_class, body, depth
from .disk import Shape, free_memory, largest, shallow, trained_parameters

log = logging.getLogger(__name__)

ChunkRows = Callable[[int, torch.device, int], tuple[int, str]]
"""(vocabulary, device, bytes per logit) -> (positions whose logits a head computes at a time, at most, why)."""

REMEDY = (
    "Lower --batch-size and raise --gradient-accumulation-steps by the same factor (--batch-size auto does both), or "
    "try --gradient-checkpointing, a lower --max-length, --lora, or smaller models"
)
RUNTIME = 700 * 2**20
"""Bytes of CUDA context and kernels, or of Python with its libraries."""
LOGIT = 4
"""Bytes of a logit in a chunk: float32, whatever the head computes in."""
HALF_BLOCK = 16_384
"""Tokens whose gradients a head rounds to half precision at a time."""
PREFIX = 1
"""Bytes for each of the teacher's logits in a chunk, for its distributions at depth > 0 and what is small."""
KEPT_OUTCOME, PASSING_OUTCOME, CHUNK_OUTCOME = 24, 72, 110
"""Bytes for each outcome that the teacher names at a position: in signal and target; while one becomes the other; and
of the head's chunk, in the KD term."""
ROUTED_KEPT = 10
"""Teacher widths in float32 that the router keeps per student layer and token for the backward pass, all terms used."""
EVALUATED_LOGIT = 12
"""Bytes for each logit of a window that is scored: the logits, those of supervised positions and their softmax."""
EXCHANGED = 2 * 4 * deepspeed.BUCKET
"""Bytes of gradients on their way to the processes that keep them, where they are sharded."""
ZERO3_WHOLE = 10**9
"""Weights that ZeRO-3 holds whole before it lets go of any (DeepSpeed's stage3_max_live_parameters)."""
MEASURED_LAYERS = (2, 3)
"""A body is run with so many layers; every further one takes what the third takes more than two."""
PROBED_LENGTHS = (16, 32)
"""Tokens of two short forwards, which take equally many operations unless a body goes from token to token."""
FAKE_TENSORS = "torch._subclasses.fake_tensor"
"""Logger that prints the traceback of whatever an architecture cannot do without content."""


# ------------------------------------------------------------------------------------- what a model's body takes


class _Live(TorchDispatchMode):
    """Counts the bytes of tensors that exist, from when it is entered."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        found = func(*args, **(kwargs or {}))
        for tensor in tree_iter(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return found

    def _freed(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


@dataclass(frozen=True)
class Body:
    """Bytes beside the weights in a forward, and backward, through a model without its head."""

    kept: int
    """For the backward pass, what enters the head included."""
    forward: int
    """At the peak of the forward."""
    backward: int
    """At the peak of the backward, the gradients of all parameters included."""

    def deeper(self, other: "Body", layers: int) -> "Body":
        """With more layers, given another one that has one layer more."""
        own, more = vars(self), vars(other)
        return Body(**{name: own[name] + layers * (more[name] - own[name]) for name in own})


def measure_body(
    config: PretrainedConfig,
    windows: int,
    length: int,
    dtype: torch.dtype,
    half: bool,
    trained: bool,
    on_gpu: bool,
    recomputes: bool = False,
) -> Body:
    """What a body takes for windows of `length` tokens, run without content; of encoder and decoder each.

    Args:
        dtype: of the weights.
        half: under autocast to half precision.
        trained: with gradients, and those of an earlier micro-batch in memory.
        on_gpu: attention never makes scores for dropout's sake.
        recomputes: with gradient checkpointing.

    Raises:
        RuntimeError: the architecture looks into its tensors, which have no content here.
    """
    layers = depth(config)
    settings = (windows, length, dtype, half, trained, on_gpu, recomputes)
    few, more = (_run(shallow(config, n), *settings) for n in MEASURED_LAYERS)
    return few if layers <= MEASURED_LAYERS[0] else few.deeper(more, layers - MEASURED_LAYERS[0])


def _run(
    config: Any,
    windows: int,
    length: int,
    dtype: torch.dtype,
    half: bool,
    trained: bool,
    on_gpu: bool,
    recomputes: bool,
) -> Body:
    for dropout in ("attention_dropout", "attn_pdrop") if on_gpu else ():
        if hasattr(config.get_text_config(), dropout):
            setattr(config.get_text_config(), dropout, 0.0)
    with FakeTensorMode(), _silenced(FAKE_TENSORS):
        model = auto_class(config).from_config(config, dtype=dtype).train(trained)
        if recomputes:
            loading.recompute_layers(model)
        parameters = list(model.parameters())
        ids = torch.zeros(windows, length, dtype=torch.long)
        with _Live([*parameters, *model.buffers(), ids]) as live, torch.set_grad_enabled(trained):
            for _ in range(1 + trained):  # twice: the second time with gradients there
                before, live.peak = live.now, live.now
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    states = _states(model, ids)
                    kept, forward = live.now - before, live.peak - before
                    logits = model.get_output_embeddings()(states.flatten(0, 1)[:1])
                if trained:
                    live.peak = live.now
                    logits.float().sum().backward()
                del states, logits
        return Body(kept, forward, live.peak)


def _require_parallel(config: PretrainedConfig) -> None:
    """Make sure that a body takes all tokens of a window at once.

    Raises:
        RuntimeError: it goes from one to the next, as Mamba's does without its kernels: without content too that
            takes minutes.
    """
    few = shallow(config, MEASURED_LAYERS[0])
    shorter, longer = (_operations(few, length) for length in PROBED_LENGTHS)
    if longer > 1.5 * shorter:
        raise RuntimeError(f"a body of {config.model_type} goes from token to token without its kernels")


def _operations(config: PretrainedConfig, length: int) -> int:
    """Operations of a forward through a body, without content."""
    with FakeTensorMode(), _silenced(FAKE_TENSORS), torch.no_grad():
        model = auto_class(config).from_config(config, dtype=torch.float32).eval()
        ids = torch.zeros(1, length, dtype=torch.long)
        with _Live([]) as live:
            _states(model, ids)
    return live.operations


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    """A logger that says nothing for a while: what goes wrong is told by the exception."""
    logger = logging.getLogger(name)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _states(model: nn.Module, ids: Tensor) -> Tensor:
    """What enters the head; an encoder, where there is one, reads as many tokens as its decoder."""
    if not model.config.is_encoder_decoder:
        return body(model)(input_ids=ids, use_cache=False).last_hidden_state
    mask = torch.ones_like(ids)
    read = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    encoder = {"encoder_hidden_states": read, "encoder_attention_mask": mask}
    return model.get_decoder()(input_ids=ids, use_cache=False, **encoder).last_hidden_state


# ------------------------------------------------------------------------------------------------ a training step


@dataclass(frozen=True)
class Demand:
    """What a training step depends on."""

    student: PretrainedConfig
    teacher: PretrainedConfig | None
    length: int
    """Tokens per window."""
    precision: str
    """`no`, `fp16` or `bf16`."""
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    rows: Callable[[int, int], int]
    """(vocabulary, bytes per logit) -> positions whose logits a head computes at a time, at most."""
    top_k: int
    on_gpu: bool
    lora: LoraConfig = field(default_factory=LoraConfig)
    recomputes: bool = False
    """Layers are computed a second time in the backward pass (gradient checkpointing)."""
    routed_layers: int = 0
    """Student layers whose states a router compares with the teacher's; 0: there is none."""
    routed_teacher_layers: int = 0
    gradients: int = 0
    """Terms whose gradients are logged one by one."""
    apart: bool = False
    """The teacher has a device of its own: what it takes there is not told."""
    weight_share: float = 1.0
    """Size of the teacher's weights beside those of `teacher_dtype`: less where they are quantised or sharded."""
    sharded: str = ""
    """How the student is cut into parts: `fsdp2`, `zero2`, `zero3`, or not."""
    processes: int = 1
    """That share it then."""

    @cached_property
    def shapes(self) -> tuple[Shape, Shape | None]:
        return Shape.of(self.student), None if self.teacher is None else Shape.of(self.teacher)

    def memory(self, windows: int) -> dict[str, int]:
        """Bytes at the peak of a step with so many windows a micro-batch, by what holds them.

        A step has several peaks, and the highest is told: the teacher's forward, the student's head (its chunk of
        logits beside everything that waits for the backward pass), the backward pass through its body, AdamW, and an
        evaluation between two steps.

        Raises:
            RuntimeError: see `measure_body`.
        """
        student, teacher = self.shapes
        half, tokens = self.precision != "no", windows * self.length
        body = measure_body(self.student, windows, self.length, torch.float32, half, True, self.on_gpu, self.recomputes)
        head = 0 if self.lora.enabled else student.vocabulary * student.hidden
        rows = min(tokens, self.rows(student.vocabulary, LOGIT))
        learned = trained_parameters(student, self.lora)
        named = tokens * min(self.top_k, teacher.vocabulary) if teacher else 0
        chunk_named = min(rows, tokens) * min(self.top_k, teacher.vocabulary) if teacher else 0
        routed = self._router(tokens)
        gradients = {"gradients": learned * 4 * (1 + self.gradients) + routed["trained"] * 4}
        if self.sharded:
            gradients = {"gradients": gradients["gradients"] // self.processes, "exchange": EXCHANGED}
        held = {"signal": named * KEPT_OUTCOME, "router": routed["kept"]}
        waiting = gradients | {"student activations": body.kept} | held
        logits = rows * student.vocabulary * LOGIT + chunk_named * CHUNK_OUTCOME
        if half:
            logits += rows * min(student.vocabulary, HALF_BLOCK) * 2
        in_head = head * (6 if half else 4) + tokens * student.hidden * (8 if half else 4)
        peaks = [
            waiting | {"student logits": logits, "head gradient": in_head},
            gradients | {"backward": body.backward - 4 * student.parameters} | held,
            # without a fused kernel, which the scaler of fp16 rules out, one more copy
            gradients | {"update": learned * 4 * (self.precision == "fp16")},
        ]
        peaks += [self._evaluation_peak()]
        if teacher is not None:
            peaks += [waiting | {"projection": named * PASSING_OUTCOME}]
        if teacher is not None and not self.apart:
            peaks += self._teacher_peaks(windows, gradients, named)
        learned += routed["trained"]
        weights = learned * 4 + (student.parameters * self.student_dtype.itemsize if self.lora.enabled else 0)
        kept, passing = self._student_weights(weights, learned)
        peaks = [peak | {"student weights": passing} for peak in peaks]
        if self.sharded:
            peaks += [{"student, whole for evaluation": weights}]
        peak = max(peaks, key=lambda parts: sum(parts.values()))
        peak["student weights"] = peak.get("student weights", 0) + kept
        fixed = {"optimizer": learned * 8 / (self.processes if self.sharded else 1)}
        if teacher is not None and not self.apart:
            fixed["teacher weights"] = teacher.parameters * self.teacher_dtype.itemsize * self.weight_share
        parts = fixed | peak | {"runtime": RUNTIME}
        return {name: int(size) for name, size in parts.items() if size}

    def _evaluation_peak(self) -> dict[str, int]:
        """Bytes of an evaluation between two steps, window by window: without gradients, with float32 weights."""
        student = self.shapes[0]
        evaluation = {"evaluation logits": self.length * student.vocabulary * EVALUATED_LOGIT}
        is_half = self.student_dtype.itemsize < 4 and self.lora.base not in loading.QUANTISED
        if self.lora.enabled and is_half:
            evaluation["student in float32 for evaluation"] = student.parameters * 4
        return evaluation

    def _student_weights(self, size: int, learned: int) -> tuple[float, float]:
        """Bytes of its weights, of which there are `size`, that a process holds always, and in a step besides."""
        student, parts = self.shapes[0], 4 * learned / self.processes
        if self.sharded == "fsdp2":
            return size / self.processes, size * _whole_share(self.student, student)
        if self.sharded == "zero2":  # what it updates is a copy of its part
            return size + parts, 0
        if self.sharded == "zero3":
            return size / self.processes + parts, size * min(1.0, ZERO3_WHOLE / student.parameters)
        return size, 0

    def _teacher_peaks(self, windows: int, gradients: dict, named: int) -> list[dict[str, int]]:
        teacher, tokens = self.shapes[1], windows * self.length
        body = measure_body(self.teacher, windows, self.length, self.teacher_dtype, False, False, self.on_gpu)
        rows = min(tokens, self.rows(teacher.vocabulary, LOGIT))
        chunk = teacher.vocabulary * rows * (LOGIT + PREFIX)
        states = self._teacher_states(tokens)
        return [
            gradients | {"teacher activations": body.forward + states},
            gradients | {"teacher logits": chunk + body.kept + states, "signal": named * 24},
        ]

    def _teacher_states(self, tokens: int) -> int:
        if not self.routed_layers:
            return 0
        teacher = self.shapes[1]
        return tokens * (teacher.layers + 1) * teacher.hidden * self.teacher_dtype.itemsize  # asked for, all come

    def _router(self, tokens: int) -> dict[str, int]:
        """`kept` bytes of states until the backward pass, and its `trained` parameters."""
        student, teacher = self.shapes
        if teacher is None or not self.routed_layers:
            return {"kept": 0, "trained": 0}
        ours, theirs = min(self.routed_layers, student.layers), min(self.routed_teacher_layers, teacher.layers)
        states = ours * (student.hidden + ROUTED_KEPT * teacher.hidden) + theirs * teacher.hidden
        return {"kept": 4 * tokens * states, "trained": ours * student.hidden * (teacher.hidden + theirs)}


# --------------------------------------------------------------------------------------------------- what fits

QUANTISED_SHARE = {"8bit": 0.5, "4bit": 0.28}
"""Size of quantised weights beside half precision, scales included."""
MARGIN = 1.25
"""A run whose forecast is so many times what is free is refused: more than the forecast can be wrong."""
ROOM_ON_CPU = 0.5
"""Of the free memory of a host that `--batch-size auto` takes: nothing raises there before the system kills."""


def demand_of(
    config: Any,
    student: PretrainedConfig,
    teacher: PretrainedConfig | None,
    length: int,
    precision: str,
    device: torch.device,
    chunk_rows: ChunkRows,
    processes: int = 1,
    sharded: str = "",
) -> Demand:
    """What the junction's RunConfig asks for.

    Raises:
        RuntimeError: a model's body would take minutes to be run without content.
    """
    for shape in (student, teacher):
        if shape is not None:
            _require_parallel(shape)
    router = config.router if config.curriculum.used() & {*ROUTER_TERMS} else None
    lora = config.student.lora
    return Demand(
        student=student,
        teacher=teacher,
        length=length,
        precision=precision,
        student_dtype=loading.frozen_dtype(lora.base, device, precision).value,
        teacher_dtype=loading.frozen_dtype(config.teacher.dtype, device, precision).value,
        rows=lambda vocabulary, each: chunk_rows(vocabulary, device, each)[0],
        top_k=config.loss.top_k,
        on_gpu=device.type == "cuda",
        lora=lora,
        recomputes=config.training.gradient_checkpointing,
        routed_layers=router.layers if router else 0,
        routed_teacher_layers=router.teacher_layers if router else 0,
        gradients=len(config.curriculum.used()) if config.logging.term_gradients else 0,
        apart=config.teacher.device not in ("auto", "sharded", str(device)),
        weight_share=_share(config.teacher, teacher, processes),
        sharded=sharded,
        processes=processes,
    )


def spares_teacher(config: Any) -> bool:
    """Whether there is a cache that, where it is complete, is read in place of the teacher."""
    folder, routed = config.cache.folder, config.curriculum.used() & {*ROUTER_TERMS}
    return folder is not None and user_path(folder).is_dir() and not routed


def _share(config: ModelConfig, teacher: PretrainedConfig | None, processes: int) -> float:
    """Of the teacher's weights in half precision, what a process holds."""
    if config.device != "sharded" or teacher is None:
        return QUANTISED_SHARE.get(config.dtype, 1.0)
    shape = Shape.of(teacher)
    return min(1.0, _whole_share(teacher, shape) + _in_layers(teacher, shape) / processes)


def _in_layers(config: PretrainedConfig, shape: Shape) -> float:
    """Share of a model's weights that is in its layers."""
    tied = config.get_text_config().tie_word_embeddings
    return 1 - shape.vocabulary * shape.hidden * (1 if tied else 2) / shape.parameters


def _whole_share(config: PretrainedConfig, shape: Shape) -> float:
    """Share of its weights that FSDP2 holds whole: what is outside of layers, the layer that computes and the next."""
    layers = _in_layers(config, shape)
    return 1 - layers + layers * min(1.0, 2 / shape.layers)


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


def settle(config: Any, accelerator: Accelerator, chunk_rows: ChunkRows) -> tuple[Any, Forecast]:
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
