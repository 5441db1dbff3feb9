"""Optimizer steps of true shapes without content, as a card would take them: bytes at the peak, and the forecast.

FakeTensorMode knows shapes, dtypes and devices but no values, so Qwen2.5-1.5B and SmolLM2-360M take seconds. What asks
for a value is left out (the check of the models' heads, the scaler of fp16).
"""

import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM

from benchmarks.step_time import STUDENT_VOCABULARY, TEACHER_VOCABULARY, random_windows, shapes, vocabulary_map
from models import distillation_framework
from models.config import CurriculumConfig, LossConfig, Term
from models.curriculum import CurriculumScheduler
from models.losses.chunk_size import chunk_rows
from models.teacher import frozen as teacher_module
from models.text.collate import PairCollator
from models.types import PairedBatch, movable_fields
from tests.gpu.attention_kernels import MATH, AttentionCall, choose_kernel
from utils.config.settings import TrainingConfig
from utils.forecast import step_memory
from utils.training.optimizer import build_optimizer

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 512
"""Bytes: torch's allocator rounds sizes up to multiples of it."""
MICRO_BATCHES = 2
GPU = torch.device("cuda:0")


@dataclass(frozen=True)
class Case:
    """Models and sizes that are trained."""

    precision: str
    windows: int
    length: int
    student: str = "smollm2-360m"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors on a GPU that exist, and their peak in each phase of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.phase = "models"
        self.peaks: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        size = (storage.nbytes() + BLOCK - 1) // BLOCK * BLOCK
        self._sizes[storage._cdata] = size
        self.now += size
        self.peaks[self.phase] = max(self.now, self.peaks.get(self.phase, 0))
        weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass
class Attention:
    """`scaled_dot_product_attention` as a card takes it, by operations that count its bytes."""

    capability: tuple[int, int]
    kernels: Counter[str] = field(default_factory=Counter)

    def __call__(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        call = AttentionCall(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        kernel = choose_kernel(self.capability, call)
        self.kernels[kernel] += 1
        query, key, value = (x.to(call.dtype) for x in (query, key, value))
        if kernel == MATH:
            attend = torch.ops.aten._scaled_dot_product_attention_math
            options = {"scale": scale, "enable_gqa": enable_gqa}
            return attend(query, key, value, attn_mask, dropout_p, is_causal, None, **options)[0]

        if (times := query.shape[1] // key.shape[1]) > 1:  # flash reads them as they are: an upper bound for it
            key, value = (x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2) for x in (key, value))
        attend = torch.ops.aten._scaled_dot_product_efficient_attention
        return attend(query, key, value, None, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale)[0]


def measure(device: Any, card: str, case: Case) -> dict[str, Any]:
    """Return the peak of some optimizer steps, its parts, the kernels of attention and the forecast."""
    device.become(card)
    attention, live = Attention(device.card.capability), LiveBytes()
    distillation_framework.check_head = lambda *_: GPU  # asks for values
    as_shipped = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, live:
            _steps(case, mode, live)
    finally:
        torch.nn.functional.scaled_dot_product_attention = as_shipped

    parts = _demand(case).memory(case.windows)
    forecast = sum(parts.values()) - parts["runtime"]
    return {
        "peak": max(live.peaks.values()),
        "phases": live.peaks,
        "kernels": dict(attention.kernels),
        "forecast": forecast,
        "parts": parts,
    }


def _steps(case: Case, mode: FakeTensorMode, live: LiveBytes) -> None:
    vocabulary = vocabulary_map(TEACHER_VOCABULARY, STUDENT_VOCABULARY)
    teacher_config, student_config = shapes(case.student, TEACHER_VOCABULARY, STUDENT_VOCABULARY)
    with GPU:
        teacher = AutoModelForCausalLM.from_config(teacher_config, dtype=case.dtype)
        student = AutoModelForCausalLM.from_config(student_config, dtype=torch.float32)

    frozen = teacher_module.FrozenTeacher.__new__(teacher_module.FrozenTeacher)  # its constructor asks for values
    frozen.model = teacher.eval().requires_grad_(False)
    frozen.vocabulary_order = vocabulary.order
    frozen.order = mode.from_tensor(torch.from_numpy(vocabulary.order).long())
    frozen._first_device = GPU
    frozen.signal = _in_phase(live, "teacher", frozen.signal)

    loss = LossConfig()
    curriculum = CurriculumScheduler(CurriculumConfig(kd=Term(0.7), lm=Term(0.3)), loss, 100)
    framework = distillation_framework.DistillationFramework(student.train(), frozen, vocabulary, loss, curriculum)
    framework.projection.segments = mode.from_tensor(framework.projection.segments)
    optimizer = build_optimizer(framework, TrainingConfig(), fused=case.precision != "fp16")

    windows = random_windows(vocabulary, case.windows, case.length)
    batch = _without_content(mode, PairCollator(vocabulary, (None, None), loss.max_depth)(windows))

    # the moments exist from the first update on, which needs no forward: the second step has the peak
    live.phase = "first update"
    for parameter in framework.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    for _ in range(MICRO_BATCHES):
        live.phase = "forward"
        with torch.autocast("cuda", case.dtype, enabled=case.precision != "no"):
            output = framework(batch.to(GPU, non_blocking=True), 0)
        live.phase = "backward"
        output.loss.backward()
        del output
    live.phase = "clip"
    torch.nn.utils.clip_grad_norm_(list(framework.parameters()), 1.0)
    live.phase = "update"
    optimizer.step()


def _in_phase(live: LiveBytes, phase: str, function: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        before, live.phase = live.phase, phase
        try:
            return function(*args, **options)
        finally:
            live.phase = before

    return call


def _without_content(mode: FakeTensorMode, batch: PairedBatch) -> PairedBatch:
    tensors = {}
    for name, value in movable_fields(batch).items():
        tensors[name] = mode.from_tensor(value) if isinstance(value, Tensor) else _without_content(mode, value)
    return replace(batch, **tensors)


def _demand(case: Case) -> step_memory.Demand:
    teacher, student = shapes(case.student, TEACHER_VOCABULARY, STUDENT_VOCABULARY)
    return step_memory.Demand(
        student=student,
        teacher=teacher,
        length=case.length,
        precision=case.precision,
        student_dtype=torch.float32,
        teacher_dtype=case.dtype,
        rows=lambda vocabulary, each, is_half=False: chunk_rows(vocabulary, GPU, each, is_half=is_half)[0],
        top_k=LossConfig().top_k,
        on_gpu=True,
    )
