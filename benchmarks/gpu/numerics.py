"""Parts about values: gradients of each precision beside float64, and a teacher in few bits."""

import copy
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu.made import small_pair, true_pair
from benchmarks.gpu.settings import Bench, Skipped
from benchmarks.gpu.timing import measure_fitting, seconds
from benchmarks.step_time import random_batch, vocabulary_map
from models.config import CurriculumConfig, LossConfig, Term
from models.distillation import Distillation, Method
from models.teacher.frozen import FrozenTeacher
from models.types import PairedBatch, TeacherSignal

METHOD = Method(curriculum=CurriculumConfig(kd=Term(0.7), lm=Term(0.3)))
LENGTH = 128
"""Tokens of a window."""
WINDOWS = 4
TOP = 8
"""Outcomes that a quantised teacher is compared in."""


@dataclass(frozen=True)
class Arithmetic:
    """Precision in which a gradient is computed."""

    name: str
    weights: torch.dtype
    """Of the student, and without autocast of the teacher."""
    autocast: torch.dtype | None = None
    """Of the student; the teacher's weights have it."""
    matmul_precision: str = "highest"
    """As torch names it: "high" allows TF32."""
    loss_scale: float = 1.0
    """Factor that keeps the gradients of float16 from vanishing."""

    def context(self, device: torch.device) -> AbstractContextManager:
        """Return the autocast of the student."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)


EXACT = Arithmetic("float64", torch.float64)
FLOAT32 = Arithmetic("float32", torch.float32)
TF32 = Arithmetic("TF32", torch.float32, matmul_precision="high")
BF16 = Arithmetic("bf16", torch.float32, torch.bfloat16)
FP16 = Arithmetic("fp16", torch.float32, torch.float16, loss_scale=65536.0)


def gradients(bench: Bench) -> Iterator[dict]:
    """Yield the distance of a small pair's loss and gradient from those in float64 on the host."""
    folders = small_pair(bench)
    pair = Distillation.from_models(
        student=AutoModelForCausalLM.from_pretrained(folders.student, dtype=torch.float64),
        teacher=AutoModelForCausalLM.from_pretrained(folders.teacher, dtype=torch.float64),
        tokenizers={
            "student": AutoTokenizer.from_pretrained(folders.student),
            "teacher": AutoTokenizer.from_pretrained(folders.teacher),
        },
        max_length=LENGTH // 2 if bench.scale.is_toy else LENGTH,
        method=METHOD,
    )

    # More documents than windows, since some are short.
    lines = folders.text.read_text(encoding="utf-8").splitlines()[: 4 * WINDOWS]
    windows = pair.windows([json.loads(line)["text"] for line in lines])
    batch = pair.collate(windows[:WINDOWS])

    exact_loss, exact_gradient = _gradient(pair, batch, EXACT, torch.device("cpu"))
    cases = [FLOAT32, BF16] if bench.device.type == "cpu" else [FLOAT32, TF32, BF16, FP16]
    for case in cases:
        loss, gradient = _gradient(pair, batch, case, bench.device)
        yield {
            "precision": case.name,
            "loss_off": abs(loss / exact_loss - 1),
            "gradient_off": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
            "finite": bool(gradient.isfinite().all()),
        }


def _gradient(pair: Distillation, batch: PairedBatch, case: Arithmetic, device: torch.device) -> tuple[float, Tensor]:
    """Return (loss, the gradient of all parameters in float64 on the host)."""
    torch.set_float32_matmul_precision(case.matmul_precision)

    # Copies: every case starts from the same weights in float64.
    student = copy.deepcopy(pair.student).to(device, case.weights)
    teacher = copy.deepcopy(pair.teacher.model).to(device, case.autocast or case.weights)
    framework = pair.framework(10, student=student, teacher=pair.frozen(teacher))

    with case.context(device):
        output = framework(batch.to(device), 0)
    (output.loss * case.loss_scale).backward()

    parts = [parameter.grad.flatten().double().cpu() for parameter in student.parameters()]
    torch.set_float32_matmul_precision("highest")
    return output.loss.item(), torch.cat(parts) / case.loss_scale


def quantised(bench: Bench) -> Iterator[dict]:
    """Yield memory, time and agreement of the teacher's weights in 8 and 4 bits beside half precision.

    Raises:
        Skipped: bitsandbytes has no kernels for this card.
    """
    from bitsandbytes.cextension import lib

    from utils.pretrained.loading import load_model
    from utils.pretrained.precision import check_weights

    if not lib.compiled_with_cuda:
        raise Skipped("bitsandbytes could not load its library for CUDA; the part's log has its reason")

    folder = str(true_pair(bench).teacher)
    vocabulary = vocabulary_map(bench.scale.teacher_vocabulary, bench.scale.student_vocabulary)
    windows, length = bench.scale.steps[0]
    batch = random_batch(vocabulary, windows, length).to(bench.device)

    # The first, in half precision, is what the others are compared with.
    exact = None
    for weights in ("float16", "8bit", "4bit"):
        before = torch.cuda.memory_allocated(bench.device)
        check_weights(weights, "teacher.dtype", bench.device)
        model = load_model(folder, "teacher", torch.float16, bench.device, weights=weights)
        size = torch.cuda.memory_allocated(bench.device) - before

        teacher = FrozenTeacher(model, vocabulary)
        signal = teacher.signal(batch, TOP)
        exact = exact or signal

        # The default binds this teacher.
        def compute_signal(teacher: FrozenTeacher = teacher) -> TeacherSignal:
            return teacher.signal(batch, LossConfig().top_k)

        measured = measure_fitting({"signal": compute_signal}, bench.device, bench.scale.repeats)

        yield {
            "weights": weights,
            "GiB": size / 2**30,
            "ms": seconds(measured.runs["signal"]) * 1e3,
            "same_most_probable_token": (signal.ids[:, 0] == exact.ids[:, 0]).float().mean().item(),
            "finite": not bool(signal.log_probs.isnan().any()),
        }

        # Nothing may keep this model while the memory of the next one is counted.
        del model, teacher, compute_signal, measured
        torch.cuda.empty_cache()
