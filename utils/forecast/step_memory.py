"""Memory of a training step, forecast in seconds: it finds out before the start what would fail after an hour.

What the models themselves take is not guessed: `measure_body` runs them on tensors without content (FakeTensorMode),
with as few layers as tell how it grows with depth, and counts the bytes that exist at a time. What the losses of
`models/` add are sums, whose factors are bytes of the tensors they hold; `tests/equivalence/test_memory.py` compares
the whole with the peak of real optimizer steps.

Attention: the scores [heads, S, S] count where a model's own attention makes them (eager, or dropout on a CPU). On a
GPU this forecast relies on SDPA having a kernel that does not write them: flash or cuDNN in half precision from compute
capability 8.0 on, memory-efficient elsewhere (float32 and float16 on every GPU that torch supports). The latter reads
no grouped heads, so it also relies on `models/attention.py`, which has keys and values repeated there. Isolated
documents have a mask [B, 1, S, S], of which every layer keeps a copy in the dtype of its scores for the backward pass.
"""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from transformers import PretrainedConfig

from ..config.protocols import RunConfig
from ..config.settings import LoraConfig, ModelConfig
from ..logs.lines import ROUTER_TERMS
from ..machine.device_memory import GPU_SCORED_WINDOWS, scored_logits
from ..machine.kernels import compiles_head
from ..parallel.deepspeed import BUCKET
from ..paths import user_path
from ..pretrained.precision import QUANTISED, frozen_dtype
from .body_memory import Body, BodyRun, measure_body, require_parallel
from .model_size import Shape, trained_parameters

log = logging.getLogger(__name__)


class ChunkRows(Protocol):
    """Positions whose logits a head computes at a time, at most, and why: `models.losses.chunk_size.chunk_rows`."""

    def __call__(
        self,
        vocabulary: int,
        device: torch.device,
        bytes_per_logit: int = ...,
        *,
        is_half: bool = ...,
    ) -> tuple[int, str]: ...


class Rows(Protocol):
    """The same positions, on the device of a run."""

    def __call__(self, vocabulary: int, bytes_per_logit: int, *, is_half: bool = ...) -> int: ...


Breakdown = dict[str, float]
"""Bytes by what holds them."""

RUNTIME = 700 * 2**20
"""Bytes of CUDA context and kernels, or of Python with its libraries."""
FLOAT32, HALF = 4, 2
"""Bytes of a number."""
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
SCORED_LOGIT = 8
"""Bytes beside each logit that an evaluation looks at: it in float32, among those of supervised positions, and its
softmax."""
EXCHANGED = 2 * 4 * BUCKET
"""Bytes of gradients on their way to the processes that keep them, where they are sharded."""
ZERO3_WHOLE = 10**9
"""Weights that ZeRO-3 holds whole before it lets go of any (DeepSpeed's stage3_max_live_parameters)."""
MOMENTS = 2 * FLOAT32
"""Bytes of AdamW's two moments of a parameter."""
QUANTISED_SHARE = {"8bit": 0.5, "4bit": 0.28}
"""Size of quantised weights beside half precision, scales included."""
CPU_MEMORY_SHARE = 0.5
"""Of the free memory of a host that `--batch-size auto` takes: nothing raises there before the system kills."""


# ------------------------------------------------------------------------------------------------ a training step


class HeldWeights(NamedTuple):
    """Bytes of the student's weights in one process."""

    always: float
    """Between steps too."""
    in_step: float
    """Besides, during a step: layers that were gathered from other processes."""


@dataclass(frozen=True)
class Demand:
    """Everything that the memory of a training step depends on, its batch size apart."""

    student: PretrainedConfig
    teacher: PretrainedConfig | None
    length: int
    """Tokens per window."""
    precision: str
    """`no`, `fp16` or `bf16`."""
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    rows: Rows
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
    further_weights: float = 0.0
    """Bytes of the weights of further teachers on the student's device; `teacher` is then the largest there, whose
    forward takes most."""
    teachers: int = 1
    """Of which each names outcomes at a position."""
    weight_share: float = 1.0
    """Size of the teacher's weights beside those of `teacher_dtype`: less where they are quantised or sharded."""
    sharded: str = ""
    """How the student is cut into parts: `fsdp2`, `zero2`, `zero3`, or not."""
    processes: int = 1
    """That share it then."""
    compiled_head: bool = False
    """The student's head writes its gradient in compiled passes, all tokens of a chunk at once."""
    isolates: bool = False
    """Documents are isolated by a mask [B, 1, S, S]; also where a teacher has a kernel that needs none."""
    scored_logits: int = 0
    """Logits that an evaluation looks at in one go, at most; 0: nothing is evaluated."""

    @cached_property
    def shapes(self) -> tuple[Shape, Shape | None]:
        """Sizes of (student, teacher)."""
        student = Shape.of(self.student)
        teacher = None if self.teacher is None else Shape.of(self.teacher)
        return student, teacher

    def memory(self, windows: int) -> dict[str, int]:
        """Return the bytes at the peak of a step with so many windows a micro-batch, by what holds them.

        Raises:
            RuntimeError: see `measure_body`.
        """
        return StepMemory(self, windows).at_the_peak()

    def student_weights(self, size: int, learned: int) -> HeldWeights:
        """Return what a process holds of the student's weights.

        Args:
            size: bytes of all weights.
            learned: parameters that are trained.
        """
        student = self.shapes[0]
        updated_part = FLOAT32 * learned / self.processes

        if self.sharded == "fsdp2":
            return HeldWeights(size / self.processes, size * _whole_share(self.student, student))
        if self.sharded == "zero2":  # what it updates is a copy of its part
            return HeldWeights(size + updated_part, 0)
        if self.sharded == "zero3":
            gathered = size * min(1.0, ZERO3_WHOLE / student.parameters)
            return HeldWeights(size / self.processes + updated_part, gathered)
        return HeldWeights(size, 0)


@dataclass(frozen=True)
class StepMemory:
    """Memory of a step in micro-batches of so many windows: a breakdown for each of its peaks, and the highest."""

    demand: Demand
    windows: int

    # --- sizes that several peaks need ------------------------------------------------------------------------------

    @property
    def student(self) -> Shape:
        """Sizes of the student."""
        return self.demand.shapes[0]

    @property
    def teacher(self) -> Shape | None:
        """Sizes of the teacher; None where there is none."""
        return self.demand.shapes[1]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.windows * self.demand.length

    @property
    def is_half(self) -> bool:
        """The student computes in half precision."""
        return self.demand.precision != "no"

    @property
    def holds_teacher(self) -> bool:
        """The teacher is on the student's device."""
        return self.teacher is not None and not self.demand.apart

    @property
    def head_rows(self) -> int:
        """Positions whose logits the student's head computes at a time."""
        bytes_per_logit = LOGIT + self.rounded_bytes if self.demand.compiled_head else LOGIT
        most = self.demand.rows(self.student.vocabulary, bytes_per_logit, is_half=self.is_half)
        return min(self.tokens, most)

    @property
    def rounded_bytes(self) -> int:
        """Bytes of a gradient by a logit that is rounded for the products; 0 in full precision."""
        return HALF if self.is_half else 0

    @property
    def outcomes_per_token(self) -> int:
        """Outcomes that the teacher names at a position."""
        if self.teacher is None:
            return 0
        return self.demand.teachers * min(self.demand.top_k, self.teacher.vocabulary)

    @property
    def outcomes(self) -> int:
        """Outcomes that the teacher names in a micro-batch."""
        return self.tokens * self.outcomes_per_token

    @cached_property
    def learned(self) -> int:
        """Parameters of the student that are trained, without the router's."""
        return trained_parameters(self.student, self.demand.lora)

    @cached_property
    def body(self) -> Body:
        """Bytes of the student's body in a step."""
        run = BodyRun(
            windows=self.windows,
            length=self.demand.length,
            dtype=torch.float32,  # of what is trained; autocast makes half-precision copies of it
            half=self.is_half,
            trained=True,
            on_gpu=self.demand.on_gpu,
            recomputes=self.demand.recomputes,
            isolates=self.demand.isolates,
        )
        return measure_body(self.demand.student, run)

    # --- what is held at several peaks ------------------------------------------------------------------------------

    def gradients(self) -> Breakdown:
        """Gradients of all that is trained, from an earlier micro-batch on."""
        of_student = self.learned * FLOAT32 * (1 + self.demand.gradients)
        size = of_student + self._router_parameters() * FLOAT32

        # sharded gradients pass through a bucket on their way to the process that keeps them
        if not self.demand.sharded:
            return {"gradients": size}
        return {"gradients": size // self.demand.processes, "exchange": EXCHANGED}

    def for_backward(self) -> Breakdown:
        """Tensors that the losses keep from the forward until the end of the backward pass."""
        return {"signal": self.outcomes * KEPT_OUTCOME, "router": self._router_states()}

    def waiting(self) -> Breakdown:
        """Everything that waits for the backward pass while the losses are computed."""
        return self.gradients() | {"student activations": self.body.saved} | self.for_backward()

    def always(self) -> Breakdown:
        """Memory held from the first step to the last, the student's weights apart."""
        demand = self.demand
        moments = (self.learned + self._router_parameters()) * MOMENTS
        sharers = demand.processes if demand.sharded else 1
        breakdown = {"optimizer": moments / sharers}
        if self.holds_teacher:
            size = self.teacher.parameters * demand.teacher_dtype.itemsize
            breakdown["teacher weights"] = size * demand.weight_share + demand.further_weights
        return breakdown

    # --- the peaks of a step ----------------------------------------------------------------------------------------

    def teacher_forward(self) -> Breakdown:
        """Peak inside the teacher's body."""
        return self.gradients() | {"teacher activations": self._teacher_body.forward + self._teacher_states()}

    def teacher_head(self) -> Breakdown:
        """Peak where the teacher's head makes its signal, a chunk of logits at a time."""
        rows = min(self.tokens, self.demand.rows(self.teacher.vocabulary, LOGIT))
        chunk = self.teacher.vocabulary * rows * (LOGIT + PREFIX)
        logits = chunk + self._teacher_body.saved + self._teacher_states()
        return self.gradients() | {"teacher logits": logits, "signal": self.outcomes * KEPT_OUTCOME}

    def projection(self) -> Breakdown:
        """Peak where the teacher's signal becomes the student's target."""
        return self.waiting() | {"projection": self.outcomes * PASSING_OUTCOME}

    def student_head(self) -> Breakdown:
        """Peak in the student's head: its chunk of logits beside everything that waits for the backward pass."""
        # the chunk: all logits of some positions, and the outcomes that the teacher names there
        logits = self.head_rows * self.student.vocabulary * LOGIT
        logits += self.head_rows * self.outcomes_per_token * CHUNK_OUTCOME
        rounded_tokens = self.student.vocabulary
        if not self.demand.compiled_head:
            rounded_tokens = min(rounded_tokens, HALF_BLOCK)
        logits += self.head_rows * rounded_tokens * self.rounded_bytes

        # below an adapter the head is frozen and has no gradient
        head_weights = 0
        if not self.demand.lora.enabled:
            head_weights = self.student.vocabulary * self.student.hidden

        # gradients of the head and of the states that enter it; in half precision a float32 sum stands beside a copy
        of_weight = FLOAT32 + HALF if self.is_half else FLOAT32
        of_state = 2 * FLOAT32 if self.is_half else FLOAT32
        gradient = head_weights * of_weight + self.tokens * self.student.hidden * of_state
        return self.waiting() | {"student logits": logits, "head gradient": gradient}

    def backward(self) -> Breakdown:
        """Peak of the backward pass through the student's body."""
        # `body.backward` holds the gradients of all parameters, which count as such
        activations = self.body.backward - FLOAT32 * self.student.parameters
        return self.gradients() | {"backward": activations} | self.for_backward()

    def update(self) -> Breakdown:
        """Peak of AdamW."""
        # without a fused kernel, which the scaler of fp16 rules out, one more copy
        copies = self.learned * FLOAT32 if self.demand.precision == "fp16" else 0
        return self.gradients() | {"update": copies}

    def evaluation(self) -> Breakdown:
        """Peak where the student is scored between two steps: without gradients, with float32 weights."""
        demand = self.demand
        breakdown: Breakdown = {"evaluation logits": self._scored(self.student.vocabulary, FLOAT32)}

        # `float32_evaluation` copies half-precision weights; those of a full student are float32 already
        has_half_weights = demand.student_dtype.itemsize < FLOAT32 and demand.lora.base not in QUANTISED
        if demand.lora.enabled and has_half_weights:
            breakdown["student in float32 for evaluation"] = self.student.parameters * FLOAT32
        return breakdown

    def teacher_evaluation(self) -> Breakdown:
        """Peak where the teacher is scored, before the first step: the optimizer's moments are not there yet."""
        logits = self._scored(self.teacher.vocabulary, self.demand.teacher_dtype.itemsize)
        return {"teacher's evaluation logits": max(0, logits - self.always()["optimizer"])}

    def _scored(self, vocabulary: int, logit: int) -> int:
        """Return the bytes of logits while windows are scored, as many at once as an evaluation may look at.

        Args:
            logit: bytes of one as the model makes it.
        """
        of_window = self.demand.length * vocabulary
        most_windows = max(self.windows, GPU_SCORED_WINDOWS) if self.demand.on_gpu else self.windows
        windows = max(1, min(most_windows, self.demand.scored_logits // of_window))

        # a model makes those of a whole window, of which a part is looked at in one go
        made = windows * of_window
        return made * logit + min(made, self.demand.scored_logits) * SCORED_LOGIT

    # --- the highest ------------------------------------------------------------------------------------------------

    def at_the_peak(self) -> dict[str, int]:
        """Return the bytes at the highest peak, with what is held all the time.

        Raises:
            RuntimeError: see `measure_body`.
        """
        # without a teacher nothing is projected; on a device of its own it takes nothing here
        peaks = [self.student_head(), self.backward(), self.update()]
        if self.teacher is not None:
            peaks.append(self.projection())
        if self.holds_teacher:
            peaks += [self.teacher_forward(), self.teacher_head()]
        if self.demand.scored_logits:
            peaks.append(self.evaluation())
        if self.demand.scored_logits and self.holds_teacher:
            peaks.append(self.teacher_evaluation())

        # a sharded student is gathered layer by layer in a step, and whole for an evaluation
        size = self._weights_size()
        learned = self.learned + self._router_parameters()
        weights = self.demand.student_weights(size, learned)
        peaks = [peak | {"student weights": weights.in_step} for peak in peaks]
        if self.demand.sharded:
            peaks.append({"student, whole for evaluation": size})

        # memory of one peak serves the next, so that only the highest counts
        highest = max(peaks, key=_total)
        highest["student weights"] = highest.get("student weights", 0) + weights.always
        parts = self.always() | highest | {"runtime": RUNTIME}
        return {name: int(size) for name, size in parts.items() if size}

    def _weights_size(self) -> int:
        """Bytes of the student's weights and the router's: what is trained in float32, and a frozen base below it."""
        trained = (self.learned + self._router_parameters()) * FLOAT32
        if not self.demand.lora.enabled:
            return trained
        return trained + self.student.parameters * self.demand.student_dtype.itemsize

    # --- teacher and router -----------------------------------------------------------------------------------------

    @cached_property
    def _teacher_body(self) -> Body:
        """Bytes of the teacher's body in a forward."""
        run = BodyRun(
            windows=self.windows,
            length=self.demand.length,
            dtype=self.demand.teacher_dtype,
            half=False,
            trained=False,
            on_gpu=self.demand.on_gpu,
            isolates=self.demand.isolates,
        )
        return measure_body(self.demand.teacher, run)

    def _teacher_states(self) -> int:
        """Bytes of the teacher's hidden states, of all its layers once a router asks for any."""
        if not self.demand.routed_layers:
            return 0
        widths = (self.teacher.layers + 1) * self.teacher.hidden
        return self.tokens * widths * self.demand.teacher_dtype.itemsize

    @property
    def _routed(self) -> tuple[int, int]:
        """Layers of (student, teacher) that the router compares; (0, 0) without one."""
        if self.teacher is None or not self.demand.routed_layers:
            return 0, 0
        student_layers = min(self.demand.routed_layers, self.student.layers)
        teacher_layers = min(self.demand.routed_teacher_layers, self.teacher.layers)
        return student_layers, teacher_layers

    def _router_states(self) -> int:
        """Bytes of the states that the router keeps for the backward pass."""
        student_layers, teacher_layers = self._routed
        if not student_layers:
            return 0
        per_layer = self.student.hidden + ROUTED_KEPT * self.teacher.hidden
        widths = student_layers * per_layer + teacher_layers * self.teacher.hidden
        return FLOAT32 * self.tokens * widths

    def _router_parameters(self) -> int:
        """Parameters of the router: a projection and a gate for each student layer."""
        student_layers, teacher_layers = self._routed
        if not student_layers:
            return 0
        return student_layers * self.student.hidden * (self.teacher.hidden + teacher_layers)


def _total(parts: Breakdown) -> float:
    return sum(parts.values())


# -------------------------------------------------------------------------------------------- the demand of a run


@dataclass(frozen=True)
class StepSetting:
    """Models, lengths and machine of a run, which its RunConfig does not tell."""

    student: PretrainedConfig
    teachers: tuple[PretrainedConfig, ...]
    """None where nothing is distilled."""
    length: int
    """Tokens per window."""
    precision: str
    """`no`, `fp16` or `bf16`."""
    device: torch.device
    """Of the student."""
    chunk_rows: ChunkRows
    processes: int = 1
    sharded: str = ""
    """See `Demand.sharded`."""


def demand_of(config: RunConfig, setting: StepSetting) -> Demand:
    """Return what the memory of a run's steps depends on.

    Raises:
        RuntimeError: a model's body would take minutes to be run without content.
    """
    # found out with two short forwards, before a long one that would take minutes
    for shape in (setting.student, *setting.teachers):
        require_parallel(shape)

    def rows(vocabulary: int, bytes_per_logit: int, *, is_half: bool = False) -> int:
        return setting.chunk_rows(vocabulary, setting.device, bytes_per_logit, is_half=is_half)[0]

    device = setting.device
    lora = config.student.lora
    terms = config.curriculum.used()
    is_routed = bool(terms & {*ROUTER_TERMS})
    placed = _place_teachers(config, setting)
    model = placed.model
    return Demand(
        student=setting.student,
        teacher=placed.shape,
        length=setting.length,
        precision=setting.precision,
        student_dtype=frozen_dtype(lora.base, device, setting.precision).value,
        teacher_dtype=frozen_dtype(model.dtype, device, setting.precision).value,
        rows=rows,
        top_k=config.loss.top_k,  # type: ignore[arg-type]  # a number in every LossConfig
        on_gpu=device.type == "cuda",
        lora=lora,
        recomputes=config.training.gradient_checkpointing,
        routed_layers=config.router.layers if is_routed else 0,
        routed_teacher_layers=config.router.teacher_layers if is_routed else 0,
        gradients=len(terms) if config.logging.term_gradients or config.curriculum.balance == "gradient" else 0,
        apart=_is_apart(model, device),
        further_weights=placed.further_weights,
        teachers=max(1, len(setting.teachers)),
        weight_share=_weight_share(model, placed.shape, setting.processes),
        sharded=setting.sharded,
        processes=setting.processes,
        compiled_head=compiles_head(config.loss.head_passes, device),
        isolates=config.data.isolate_documents,
        scored_logits=scored_logits(device),
    )


class _PlacedTeachers(NamedTuple):
    """The teacher that decides on the peaks of the student's device, and what the others take there."""

    model: ModelConfig
    shape: PretrainedConfig | None
    further_weights: float


def _place_teachers(config: RunConfig, setting: StepSetting) -> _PlacedTeachers:
    """Return the largest teacher on the student's device, or the first one where none is, and the others' weights."""
    models = config.several_teachers or [config.teacher]
    if not setting.teachers:
        return _PlacedTeachers(models[0], None, 0.0)

    weights: list[float] = []
    for model, shape in zip(models, setting.teachers, strict=True):
        dtype = frozen_dtype(model.dtype, setting.device, setting.precision).value
        size = Shape.of(shape).parameters * dtype.itemsize * _weight_share(model, shape, setting.processes)
        weights.append(0.0 if _is_apart(model, setting.device) else size)

    largest = max(range(len(models)), key=weights.__getitem__)
    return _PlacedTeachers(models[largest], setting.teachers[largest], sum(weights) - weights[largest])


def _is_apart(model: ModelConfig, device: torch.device) -> bool:
    """Tell whether a teacher has a device of its own, or none."""
    return model.is_elsewhere or model.device not in ("auto", "sharded", str(device))


def spares_teacher(config: RunConfig) -> bool:
    """Return whether there is a cache that, where it is complete, is read in place of the teacher."""
    folder = config.cache.folder
    if folder is None or not user_path(folder).is_dir():
        return False

    # nobody knows beforehand what a student will write
    if config.curriculum.uses_own_text:
        return False

    # hidden states are not cached: the router's terms need the teacher in every step
    return not config.curriculum.used() & {*ROUTER_TERMS}


def _weight_share(config: ModelConfig, teacher: PretrainedConfig | None, processes: int) -> float:
    """Share of the teacher's weights in half precision that a process holds."""
    if config.device != "sharded" or teacher is None:
        return QUANTISED_SHARE.get(config.dtype, 1.0)

    # layers are cut among the processes, and what is outside of them is whole in each
    shape = Shape.of(teacher)
    return min(1.0, _whole_share(teacher, shape) + _in_layers(teacher, shape) / processes)


def _in_layers(config: PretrainedConfig, shape: Shape) -> float:
    """Share of a model's weights that is in its layers."""
    matrices = 1 if config.get_text_config().tie_word_embeddings else 2  # embeddings and head
    return 1 - shape.vocabulary * shape.hidden * matrices / shape.parameters


def _whole_share(config: PretrainedConfig, shape: Shape) -> float:
    """Share of its weights that FSDP2 holds whole: what is outside of layers, the layer that computes and the next."""
    layers = _in_layers(config, shape)
    return 1 - layers + layers * min(1.0, 2 / shape.layers)


def in_gib(size: float) -> str:
    """Return bytes in GiB with three digits."""
    return f"{size / 2**30:.3g}"
