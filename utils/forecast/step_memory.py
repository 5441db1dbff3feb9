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
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from ..config.settings import LoraConfig, ModelConfig
from ..logs.lines import ROUTER_TERMS
from ..parallel import deepspeed
from ..paths import user_path
from ..pretrained import precision as precision_module
from .body_memory import _require_parallel, measure_body
from .model_size import Shape, trained_parameters

log = logging.getLogger(__name__)

ChunkRows = Callable[[int, torch.device, int], tuple[int, str]]
"""(vocabulary, device, bytes per logit) -> (positions whose logits a head computes at a time, at most, why)."""

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


# ------------------------------------------------------------------------------------- what a model's body takes


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
        is_half = self.student_dtype.itemsize < 4 and self.lora.base not in precision_module.QUANTISED
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
        student_dtype=precision_module.frozen_dtype(lora.base, device, precision).value,
        teacher_dtype=precision_module.frozen_dtype(config.teacher.dtype, device, precision).value,
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


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"
