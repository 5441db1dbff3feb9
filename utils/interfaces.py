"""Types between the towers: what a run expects of what is learned, which models/ fulfils without importing from here.

The settings, the batch, the teacher and the module that is trained are seen from utils/ through these protocols alone.
A teacher of another kind (behind a server, or a second one) and a module with other terms need no change there.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from .config.settings import (
    CacheConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    LoggingConfig,
    ModelConfig,
    StudentConfig,
    TrainingConfig,
)
from .machine.hardware import Choice

if TYPE_CHECKING:
    from accelerate import Accelerator
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Side = Literal["student", "teacher"]


# ------------------------------------------------------------------------------------------ settings


class Schedule(Protocol):
    """A value that may change with a run's progress."""

    @property
    def points(self) -> Sequence[tuple[float, float]]:
        """(progress from 0 to 1, value), in order of progress."""


class Term(Protocol):
    """A loss term of the curriculum."""

    @property
    def weight(self) -> float | Schedule: ...


class CurriculumSettings(Protocol):
    """Which loss terms a run uses, and when. Every term is an attribute of its name."""

    @property
    def kd(self) -> Term: ...

    def used(self) -> set[str]:
        """Return the names of the terms whose weight is above 0 at some time."""


class LossSettings(Protocol):
    """How the teacher's distribution becomes a loss."""

    @property
    def top_k(self) -> int | Schedule: ...

    @property
    def temperature(self) -> float | Schedule: ...


class RunConfig(Protocol):
    """Everything a run depends on, as `train.RunConfig` holds it."""

    @property
    def teacher(self) -> ModelConfig: ...
    @property
    def student(self) -> StudentConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def loss(self) -> LossSettings: ...
    @property
    def curriculum(self) -> CurriculumSettings: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def evaluation(self) -> EvaluationConfig: ...
    @property
    def cache(self) -> CacheConfig: ...
    @property
    def logging(self) -> LoggingConfig: ...
    @property
    def hub(self) -> HubConfig: ...
    @property
    def output_dir(self) -> str: ...
    @property
    def resume(self) -> str: ...
    @property
    def resume_changed(self) -> bool: ...


# ---------------------------------------------------------------------------------- what is computed


class Batch(Protocol):
    """Windows of text, collated for both models."""

    counts: Mapping[str, int]
    """Items of every loss term, known before any forward."""
    documents: Sequence[str]
    """Where each window's text comes from, for messages."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Return the batch with its tensors on a device."""


class Collator(Protocol):
    """Makes batches of windows."""

    def __call__(self, windows: Sequence[Mapping[str, Any]]) -> Batch: ...


class Teacher(Protocol):
    """A frozen teacher: in this process, behind a cache, or elsewhere."""

    def signal(self, batch: Batch, top_k: int, layers: Sequence[int] = ()) -> Any:
        """Return top-k distributions, tail and text probabilities of a batch (`models.types.TeacherSignal`)."""


class StepOutput(Protocol):
    """What a module says of one micro-batch."""

    loss: Tensor


class StepModule(Protocol):
    """What the training loop trains; an `nn.Module` whose forward is one micro-batch of a step."""

    couples_windows: bool
    """A term compares the windows of a micro-batch with one another, so that its size changes what is learned."""

    def __call__(self, batch: Batch, step: int, **options: Any) -> StepOutput: ...

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return what the optimizer is to update."""


# --------------------------------------------------------------------------------------- what is run


class HeldOutText(Protocol):
    """Text that is evaluated on."""

    @property
    def windows(self) -> "Dataset": ...
    @property
    def collate(self) -> Collator: ...
    @property
    def batch_size(self) -> int: ...

    def score(self, model: "nn.Module", side: str) -> dict[str, Any]:
        """Return loss, perplexity and bits per byte of a model, with the tokens and bytes they are of."""

    def coverage(self) -> dict[str, float]:
        """Return the items of every loss term, summed over the windows."""

    def unspelt_shares(self) -> dict[str, float]:
        """Return the share of the text's bytes that the tokens of each side leave out."""


class Job(Protocol):
    """What training and evaluation work with, as `train.Job` holds it."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def accelerator(self) -> "Accelerator": ...
    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...
    @property
    def vocabulary(self) -> Any: ...
    @property
    def collate(self) -> Collator: ...
    @property
    def windows(self) -> "Dataset": ...
    @property
    def held_out(self) -> HeldOutText: ...
    @property
    def fingerprint(self) -> Mapping[str, Any]: ...
    @property
    def teacher_device(self) -> torch.device: ...
    @property
    def teacher_dtype(self) -> Choice[torch.dtype]: ...
