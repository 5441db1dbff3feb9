"""Parts about values: gradients of each precision beside float64, and a teacher in few bits."""

import copy
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.gpu.made import small_pair, true_pair
from benchmarks.gpu.settings import Bench
from benchmarks.gpu.timing import measure_fitting, seconds
from benchmarks.step_time import random_batch, vocabulary_map
from models.config import CurriculumConfig, LossConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.teacher.frozen import FrozenTeacher
from models.text.collate import PairCollator
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import PairedBatch

LENGTH, WINDOWS = 128, 4
TOP = 8
"""Outcomes that a quantised teacher is compared in."""


@dataclass(frozen=True)
class Arithmetic:
    """How a gradient is computed."""

    name: str
    weights: torch.dtype
    autocast: torch.dtype | None = None
    """Of the student; the teacher's weights have it."""
    matmul_precision: str = "highest"
    loss_scale: float = 1.0

    def context(self, device: torch.device) -> AbstractContextManager:
        """Return the autocast of the student."""
        return nullcontext() if self.autocast is None else torch.autocast(device.type, self.autocast)


EXACT = Arithmetic("float64", torch.float64)
FLOAT32 = Arithmetic("float32", torch.float32)
TF32 = Arithmetic("TF32", torch.float32, matmul_precision="high")
BF16 = Arithmetic("bf16", torch.float32, torch.bfloat16)
FP16 = Arithmetic("fp16", torch.float32, torch.float16, loss_scale=65536.0)


def gradients(bench: Bench) -> Iterator[dict]:
    """Yield how far loss and gradient of a small pair are from those in float64 on the host."""
    pair = small_pair(bench)
    folders = (pair.student, pair.teacher)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders]
    sizes = [model.get_output_embeddings().weight.shape[0] for model in models]
    vocabulary = VocabularyMap.build(*tokenizers, *sizes)

    encoder = PairEncoder(*tokenizers, LENGTH // 2 if bench.scale.is_toy else LENGTH)
    lines = pair.text.read_text(encoding="utf-8").splitlines()[: 4 * WINDOWS]
    windows = encoder.windows([json.loads(line)["text"] for line in lines])[:WINDOWS]
    batch = PairCollator(vocabulary, encoder.end_of_text, LossConfig().max_depth)(windows)

    exact_loss, exact_gradient = _gradient(models, batch, vocabulary, EXACT, torch.device("cpu"))
    cases = [FLOAT32, BF16] if bench.device.type == "cpu" else [FLOAT32, TF32, BF16, FP16]
    for case in cases:
        loss, gradient = _gradient(models, batch, vocabulary, case, bench.device)
        yield {
            "precision": case.name,
            "loss_off": abs(loss / exact_loss - 1),
            "gradient_off": ((gradient - exact_gradient).norm() / exact_gradient.norm()).item(),
            "finite": bool(gradient.isfinite().all()),
        }


def _gradient(
    models: list[nn.Module], batch: PairedBatch, vocabulary: VocabularyMap, case: Arithmetic, device: torch.device
) -> tuple[float, Tensor]:
    """Return (loss, the gradient of all parameters in float64 on the host); models: student and teacher."""
    torch.set_float32_matmul_precision(case.matmul_precision)
    student = copy.deepcopy(models[0]).to(device, case.weights)
    teacher = copy.deepcopy(models[1]).to(device, case.autocast or case.weights)

    loss = LossConfig()
    terms = CurriculumScheduler(CurriculumConfig(kd=Term(0.7), lm=Term(0.3)), loss, 10)
    frozen = FrozenTeacher(teacher, vocabulary)
    framework = DistillationFramework(student, frozen, vocabulary, loss, terms)

    with case.context(device):
        output = framework(batch.to(device), 0)
    (output.loss * case.loss_scale).backward()

    parts = [parameter.grad.flatten().double().cpu() for parameter in student.parameters()]
    torch.set_float32_matmul_precision("highest")
    return output.loss.item(), torch.cat(parts) / case.loss_scale


def quantised(bench: Bench) -> Iterator[dict]:
    """Yield memory, time and agreement of the teacher's weights in 8 and 4 bits beside half precision."""
    from utils.pretrained import loading, precision

    folder = str(true_pair(bench).teacher)
    vocabulary = vocabulary_map(bench.scale.teacher_vocabulary, bench.scale.student_vocabulary)
    batch = random_batch(vocabulary, *bench.scale.steps[0]).to(bench.device)

    exact = None
    for weights, dtype in (("float16", torch.float16), ("8bit", torch.float16), ("4bit", torch.float16)):
        before = torch.cuda.memory_allocated(bench.device)
        precision.check_weights(weights, "teacher.dtype", bench.device)
        model = loading.load_model(folder, "teacher", dtype, bench.device, weights=weights)
        size = torch.cuda.memory_allocated(bench.device) - before

        teacher = FrozenTeacher(model, vocabulary)
        signal = teacher.signal(batch, TOP)
        exact = exact or signal
        work = {"signal": lambda teacher=teacher: teacher.signal(batch, LossConfig().top_k)}
        measured = measure_fitting(work, bench.device, bench.scale.repeats)

        yield {
            "weights": weights,
            "GiB": size / 2**30,
            "ms": seconds(measured.runs["signal"]) * 1e3,
            "same_most_probable_token": (signal.ids[:, 0] == exact.ids[:, 0]).float().mean().item(),
            "finite": not bool(signal.log_probs.isnan().any()),
        }
        del model, teacher, work, measured
        torch.cuda.empty_cache()
