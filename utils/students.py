"""The student before and after its training: made, the same one every time, and exported."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from . import adapters, pretrained
from .config import StudentConfig, TrainingConfig
from .seeding import seed_everything

log = logging.getLogger(__name__)


def make(config: StudentConfig, training: TrainingConfig, accelerator: Accelerator) -> nn.Module:
    """The student before training, on the training device, float32 where it is trained."""
    seed_everything(training.seed)
    device, loading = accelerator.device, {"allow_pickle": config.allow_pickle}
    if config.init == "random":
        student = pretrained.random_model(pretrained.load_config(config.name, "student")).to(device)
    elif not config.lora.enabled:
        student = pretrained.load_model(config.name, "student", torch.float32, device, **loading)
    else:
        dtype = pretrained.frozen_dtype(config.lora.base, device, accelerator.mixed_precision)
        log.info("below the adapter, the student in %s: %s", str(dtype.value).removeprefix("torch."), dtype.reason)
        loading["weights"] = config.lora.base
        base = pretrained.load_model(config.name, "student", dtype.value, device, **loading)
        student = adapters.add_lora(base, config.name, config.lora)
    if training.gradient_checkpointing:
        pretrained.recompute_layers(student)
    return student


def export(
    student: nn.Module,
    config: StudentConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    results: dict[str, Any],
    *,
    name: str,
    teacher: str | None,
    text: Sequence[str],
) -> None:
    """Write the trained student, its tokenizer and a model card to a folder: the adapter alone, unless it is merged.

    Args:
        results: for the card, as in the report.
        name: of the student, and `teacher` and `text`: as the user gave them.
    """
    alone = config.lora.enabled and not config.lora.merge
    if config.lora.merge:
        base = pretrained.load_model(config.name, "student", torch.float32, allow_pickle=config.allow_pickle)
        student = adapters.merged(student, base)
    card = pretrained.model_card(name, config.init, teacher, text, results, adapter=alone)
    pretrained.export(student, tokenizer, folder, card)
