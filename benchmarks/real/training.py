"""One arm: a student trained on the batches that all arms share, and measured on text that none has read."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from models.language_model import depth_and_width
from models.types import PairedBatch
from utils.pretrained.layers import LayerChoice, choose_layers, keep_layers

from .arms import WHOLE, Arm
from .pair import TEACHER, RealPair

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises; behind them it falls along half a cosine."""

CALIBRATION_BATCHES = 4
UNTIMED_STEPS = 3
"""Steps before the clock for tokens per second starts."""

STEPS_BETWEEN_LOOKS = 10
"""Steps between two looks at the clock."""

GOLD_WINDOWS = {"cpu": 2, "cuda": 8}
"""Windows that GOLD compares at once: it needs the teacher's whole distributions, sorted."""

CHOICE_WINDOWS = 16
"""Windows on which is measured how much a layer changes."""


class OutOfTime(Exception):
    """The budget does not suffice."""


@dataclass(frozen=True)
class Run:
    """One arm under one seed and one learning rate."""

    arm: Arm
    seed: int
    rate: float


class Students:
    """Untrained students: the whole model, or a cut one, whose layers are chosen once."""

    def __init__(self, pair: RealPair) -> None:
        self.pair = pair
        self.choices: dict[int, LayerChoice] = {}

    def make(self, layers: int) -> nn.Module:
        """Return a student of so many layers."""
        if layers == WHOLE:
            return keep_layers(self.pair.whole, range(depth_and_width(self.pair.whole)[0]))

        if layers not in self.choices:
            windows = self.pair.windows[TEACHER][:CHOICE_WINDOWS]
            texts = [torch.from_numpy(window["student_ids"]).long() for window in windows]
            self.choices[layers] = choose_layers(self.pair.whole, layers, texts)
            print(self.choices[layers], flush=True)
        return keep_layers(self.pair.whole, self.choices[layers].indices)


def train(
    run: Run,
    students: Students,
    is_too_long: Callable[[float], bool],
) -> tuple[nn.Module, dict[str, Any]]:
    """Train a student; return it and what the training was like.

    Args:
        is_too_long: whether so many seconds more are too many.

    Raises:
        OutOfTime: the training would take too long, by the time of its steps so far.
    """
    # 1. The student, and what teaches it.
    pair = students.pair
    device = pair.setting.device
    torch.manual_seed(run.seed)
    student = students.make(run.arm.layers)
    name = run.arm.teacher or TEACHER
    teacher = pair.teacher(name) if run.arm.teacher and not run.arm.gold else None
    distillation = replace(pair.distillations[name], method=run.arm.method, teacher=None)
    framework = distillation.framework(pair.steps, student=student, teacher=teacher)

    # 2. Batches, complete with the teacher's signals.
    batches = pair.batches(name, run.seed)
    if framework.router is not None:
        framework.calibrate(batches[:CALIBRATION_BATCHES])

    # 3. Steps.
    groups = framework.parameter_groups(run.rate, WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=BETAS, fused=device.type == "cuda" or None)
    schedule = get_scheduler("cosine", optimizer, max(1, round(WARM_UP * pair.steps)), pair.steps)
    add_gradient = _Gold(pair, student, run.seed) if run.arm.gold else _Ours(pair, framework)

    student.train()
    losses: list[Tensor] = []
    tokens = 0
    began = time.perf_counter()
    for step, batch in enumerate(batches):
        if step == UNTIMED_STEPS:
            _wait_for(device)
            began, tokens = time.perf_counter(), 0
        if step > UNTIMED_STEPS and step % STEPS_BETWEEN_LOOKS == 0:
            seconds_a_step = (time.perf_counter() - began) / (step - UNTIMED_STEPS)
            if is_too_long(seconds_a_step * (pair.steps - step)):
                raise OutOfTime

        losses.append(add_gradient(batch, step))
        torch.nn.utils.clip_grad_norm_(framework.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += batch.counts["lm"]

    _wait_for(device)
    seconds = time.perf_counter() - began
    return student, {
        "tokens_per_second": tokens / seconds,
        "training_loss": float(torch.stack(losses)[-max(1, pair.steps // 10) :].mean()),
    }


class _Ours:
    """A step under the curriculum of an arm."""

    def __init__(self, pair: RealPair, framework: nn.Module) -> None:
        self.pair = pair
        self.framework = framework

    def __call__(self, batch: PairedBatch, step: int) -> Tensor:
        """Add the gradient of a step to the student's; return the loss."""
        with self.pair.autocast():
            loss = self.framework(batch, step).loss
        loss.backward()
        return loss.detach()


class _Gold:
    """A step of GOLD: its loss on a few windows at once, their mean over the batch."""

    def __init__(self, pair: RealPair, student: nn.Module, seed: int) -> None:
        from benchmarks.quality import Gold

        self.pair = pair
        self.student = student
        self.teacher = pair.distillations[TEACHER].teacher.model
        self.collate = pair.distillations[TEACHER].collate
        self.loss = Gold()
        self.windows = pair.windows_of_steps(TEACHER, seed)

    def __call__(self, batch: PairedBatch, step: int) -> Tensor:
        """Add the gradient of a step to the student's; return the loss."""
        windows = self.windows[step]
        device = batch.student_ids.device
        size = GOLD_WINDOWS[device.type]
        total = torch.zeros((), device=device)
        for first in range(0, len(windows), size):
            part = windows[first : first + size]
            with self.pair.autocast():
                loss = self.loss(self.student, self.teacher, self.collate(part), part).squeeze()
            loss = loss * (len(part) / len(windows))
            loss.backward()
            total += loss.detach()
        return total


def _wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
