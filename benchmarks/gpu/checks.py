"""Parts that are checks: the host never waits for the card, and verify_fixes.py passes."""

import re
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.made import small_pair
from benchmarks.gpu.runs import flags
from benchmarks.gpu.settings import ROOT, Bench
from benchmarks.step_time import random_windows, vocabulary_map
from models.config import CurriculumConfig, LossConfig, RouterConfig, Term
from models.distillation import Distillation, Method
from models.student_aware_router import ROUTER_TERMS
from models.teacher.frozen import FrozenTeacher

TEACHER_VOCABULARY = 500
STUDENT_VOCABULARY = 300
LENGTH = 48
"""Tokens of a window."""
WINDOWS = 16
HEAD_WEIGHTS = {"kd": 0.7, "lm": 0.3, "span": 0.2}
KINDS = {
    "LM, KD and span": HEAD_WEIGHTS,
    "and all terms on hidden states": HEAD_WEIGHTS | dict.fromkeys(ROUTER_TERMS, 0.1),
}
"""Weights of the terms."""


def waits(bench: Bench) -> Iterator[dict]:
    """Yield, per precision and kind of loss, the report of torch's own watch on steps that are not logged.

    The first step is left out: tables move to the device then. Under fp16 the scaler asks the host once a step, by
    which torch's watch would end the run: those runs are only shown to pass.
    """
    for precision in bench.precisions():
        for kind, weights in KINDS.items():
            watched = precision != "fp16"
            row = {"precision": precision, "loss": kind, "watched": watched}
            try:
                steps = _train(bench, precision, weights=weights, watched=watched)
            except RuntimeError as error:
                yield row | {"waits": str(error).splitlines()[0][:160]}
            else:
                yield row | {"waits": "none" if watched else "", "steps": steps}


def _train(bench: Bench, precision: str, *, weights: dict[str, float], watched: bool) -> int:
    """Train a tiny random pair for four optimizer steps with the real loop; return the number of steps done.

    Raises:
        RuntimeError: the steps are watched, and the host waits in one of them.
    """
    from utils.config.settings import TrainingConfig
    from utils.logs.step_logger import StepLogger
    from utils.parallel.accelerator import temporary_accelerator
    from utils.training.loop import TrainingLoop, fit
    from utils.training.options import LoopOptions

    # torch watches every step but the first, and nothing between the steps.
    advance = TrainingLoop.advance

    def advance_under_watch(loop: TrainingLoop, *arguments: object) -> object:
        torch.cuda.set_sync_debug_mode("error" if watched and loop.step else "default")
        try:
            return advance(loop, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pair = _tiny_pair(weights, bench.device)
    windows = random_windows(pair.vocabulary, WINDOWS, LENGTH)
    framework = pair.framework(10)
    if pair.method.compares_states:
        framework.calibrate([pair.collate(windows).to(bench.device)])

    config = TrainingConfig(batch_size=2, gradient_accumulation_steps=2, max_steps=4, epochs=1)
    options = LoopOptions(logger=StepLogger(None, 10**6, 100, main_process=False))
    with (
        mock.patch.object(TrainingLoop, "advance", advance_under_watch),
        temporary_accelerator(precision, cpu=False) as accelerator,
    ):
        result = fit(framework, windows, pair.collate, config, accelerator=accelerator, options=options)
    return result.steps


def _tiny_pair(weights: dict[str, float], device: torch.device) -> Distillation:
    """Return random models that learn by terms of these weights."""
    torch.manual_seed(0)
    teacher = _tiny_model(TEACHER_VOCABULARY).to(device)
    student = _tiny_model(STUDENT_VOCABULARY).to(device)

    vocabulary = vocabulary_map(TEACHER_VOCABULARY, STUDENT_VOCABULARY)
    method = Method(
        LossConfig(),
        CurriculumConfig(**{name: Term(weight) for name, weight in weights.items()}),
        RouterConfig(layers=2, span=4, positions=8),
    )
    return Distillation(
        encoder=SimpleNamespace(end_of_text=(None, None), isolates=False),  # no text is read
        vocabulary=vocabulary,
        method=method,
        student=student.train(),
        teacher=FrozenTeacher(teacher, vocabulary),
    )


def _tiny_model(vocabulary: int) -> nn.Module:
    """Return a Llama of three layers with random weights."""
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
    """Yield the exit status of verify_fixes.py, and the lines of its output that say what is wrong."""
    pair = small_pair(bench)
    command = [sys.executable, "verify_fixes.py", *flags(pair, bench.work / "verify", settings=[])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    # The log has all of it.
    sys.stderr.write(done.stdout + done.stderr)

    yield {"what": "exit status", "result": done.returncode}
    for line in done.stdout.splitlines():
        if "✗" in line or re.search(r"checks? passed|device", line):
            yield {"what": "line", "result": line.strip()[:160]}
