"""Parts that ask whether something holds: the host never waits for the card, and verify_fixes.py passes."""

import re
import subprocess
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.settings import ROOT, Bench
from benchmarks.step_time import random_windows, vocabulary_map
from models.config import CurriculumConfig, LossConfig, RouterConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.student_aware_router import ROUTER_TERMS
from models.teacher.frozen import FrozenTeacher
from models.text.collate import PairCollator
from models.text.vocabulary import VocabularyMap

VOCABULARIES = {"teacher": 500, "student": 300}
LENGTH, WINDOWS = 48, 16
KINDS = {
    "LM, KD and span": {"kd": 0.7, "lm": 0.3, "span": 0.2},
    "and all terms on hidden states": {"kd": 0.7, "lm": 0.3, "span": 0.2} | dict.fromkeys(ROUTER_TERMS, 0.1),
}
"""Weights of the terms."""


def waits(bench: Bench) -> Iterator[dict]:
    """Yield, per precision and kind of loss, what torch's own watch says of steps that are not logged.

    The first step is left out: tables move to the device then. Under fp16 the scaler asks the host once a step, by
    which torch's watch would end the run: those runs are only shown to pass.
    """
    for precision in bench.precisions():
        for kind, weights in KINDS.items():
            watched = precision != "fp16"
            row = {"precision": precision, "loss": kind, "watched": watched}
            try:
                steps = _train(bench, precision, weights, watched)
            except RuntimeError as error:
                yield row | {"waits": str(error).splitlines()[0][:160]}
            else:
                yield row | {"waits": "none" if watched else "", "steps": steps}


def _train(bench: Bench, precision: str, weights: dict[str, float], watched: bool) -> int:
    """Train a tiny random pair for four optimizer steps with the real loop; returns how many were done."""
    from utils.config.settings import TrainingConfig
    from utils.logs.step_logger import StepLogger
    from utils.parallel.accelerator import temporary_accelerator
    from utils.training.loop import TrainingLoop, fit
    from utils.training.options import LoopOptions

    advance = TrainingLoop.advance

    def under_watch(loop: TrainingLoop, *arguments: object) -> object:
        torch.cuda.set_sync_debug_mode("error" if watched and loop.step else "default")
        try:
            return advance(loop, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    vocabulary = vocabulary_map(VOCABULARIES["teacher"], VOCABULARIES["student"])
    router = RouterConfig(layers=2, span=4, positions=8) if set(weights) & set(ROUTER_TERMS) else None
    collate = PairCollator(vocabulary, (None, None), LossConfig().max_depth, router)
    windows = random_windows(vocabulary, WINDOWS, LENGTH)

    framework = _framework(vocabulary, weights, router, bench.device)
    if router is not None:
        framework.calibrate([collate(windows[:WINDOWS]).to(bench.device)])

    config = TrainingConfig(batch_size=2, gradient_accumulation_steps=2, max_steps=4, epochs=1)
    options = LoopOptions(logger=StepLogger(None, 10**6, 100, main_process=False))
    with mock.patch.object(TrainingLoop, "advance", under_watch), temporary_accelerator(precision, cpu=False) as where:
        return fit(framework, windows, collate, config, accelerator=where, options=options).steps


def _framework(
    vocabulary: VocabularyMap, weights: dict[str, float], router: RouterConfig | None, device: torch.device
) -> DistillationFramework:
    torch.manual_seed(0)
    teacher, student = (_tiny_model(VOCABULARIES[role]).to(device) for role in ("teacher", "student"))

    loss = LossConfig()
    curriculum = CurriculumConfig(**{name: Term(weight) for name, weight in weights.items()})
    scheduler = CurriculumScheduler(curriculum, loss, 10)
    frozen = FrozenTeacher(teacher, vocabulary)
    return DistillationFramework(student.train(), frozen, vocabulary, loss, scheduler, router)


def _tiny_model(vocabulary: int) -> nn.Module:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def verify(bench: Bench) -> Iterator[dict]:
    """Yield what verify_fixes.py says of the machine and the code."""
    command = [sys.executable, "verify_fixes.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(done.stdout + done.stderr)

    yield {"what": "exit status", "result": done.returncode}
    for line in done.stdout.splitlines():
        if "✗" in line or re.search(r"checks? passed|device", line):
            yield {"what": "line", "result": line.strip()[:160]}
