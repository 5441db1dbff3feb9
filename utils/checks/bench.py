"""The bench: tiny models and the real training loop, on which checks train in seconds what a run trains in hours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from ..interfaces import Job
from ..logs.step_logger import StepLogger
from ..pretrained import loading
from ..seeding import seed_everything
from ..training.checkpoints import CheckpointStore
from ..training.loop import FitResult, fit
from ..training.options import LoopOptions
from .miniature import Miniature

LEARNED_WINDOWS = 11
"""Windows that the bench trains on. Steps of four leave a short one at the end of an epoch, which is worth a check."""

NEVER = 10**6
"""Steps between two lines of the log: more than any check takes."""

TEACHER_SEED = 1


class WholeRun(NamedTuple):
    """A run in one go, for comparison with runs that are interrupted."""

    module: nn.Module
    result: FitResult
    saved: dict[str, Any]
    """What its last checkpoint holds beside the weights: the states of optimizer and schedule."""


@dataclass(frozen=True)
class Bench:
    """A tiny teacher and student with different tokenizers, prepared as a run of train.py would be."""

    folder: Path
    """Everything that a check writes goes in here."""
    models: Miniature
    job: Job
    join: Callable[[nn.Module, nn.Module, Mapping[str, Any]], nn.Module]
    """Returns the module that is trained: (student, teacher, weights or ramps of the curriculum's terms)."""

    @property
    def accelerator(self) -> Accelerator:
        return self.job.accelerator

    @property
    def size(self) -> int:
        """Tokens of the student's vocabulary."""
        return len(self.job.tokenizer)

    @cached_property
    def windows(self) -> list[dict[str, Any]]:
        """The first windows of the training text."""
        return [self.job.windows[number] for number in range(LEARNED_WINDOWS)]

    def student(self, seed: int = 0) -> nn.Module:
        """Make a student with random weights."""
        seed_everything(seed)
        return loading.random_model(loading.load_config(str(self.models.student), "student"))

    def distillation(
        self,
        seed: int = 0,
        weights: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Make the module that is trained: a fresh student under a fixed teacher of the other tokenizer.

        Args:
            seed: of the student's weights.
            weights: weights or ramps of terms; those that are not given are the curriculum's defaults.
            device, dtype: where, and as what, the teacher computes.
        """
        # Making the student seeds anew, so its weights do not depend on what is drawn for the teacher.
        seed_everything(TEACHER_SEED)
        teacher = loading.random_model(loading.load_config(str(self.models.teacher), "teacher"))
        teacher = teacher.to(device=device, dtype=dtype)
        return self.join(self.student(seed), teacher, weights or {})

    def fit(
        self,
        module: nn.Module,
        windows: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any] | None = None,
        *,
        accelerator: Accelerator | None = None,
        **training: Any,
    ) -> FitResult:
        """Train with the real loop.

        Args:
            options: of the loop, such as a checkpoint store.
            accelerator: by default that of the job.
            training: settings that differ from those of the job.
        """
        # A logger without a folder: training for a check writes and prints nothing.
        logger = StepLogger(None, NEVER, main_process=False)
        return fit(
            module,
            windows,
            self.job.collate,
            replace(self.job.config.training, **training),
            accelerator=accelerator or self.accelerator,
            options=LoopOptions(logger=logger, **(options or {})),
        )

    @cached_property
    def whole_run(self) -> WholeRun:
        """A run in one go: eleven windows in steps of four, twice, which makes 3 + 3 optimizer steps."""
        module = self.distillation()
        store = CheckpointStore(self.folder / "whole")
        result = self.fit(module, self.windows, {"checkpoints": store})
        return WholeRun(module, result, store.load(store.newest_whole()).objects)
