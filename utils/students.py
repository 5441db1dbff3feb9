"""The student before and after its training: made, the same one every time, and exported."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from . import adapters, evaluation, pretrained
from .atomic import write_text
from .config import StudentConfig, TrainingConfig
from .model_card import model_card
from .seeding import seed_everything

log = logging.getLogger(__name__)

RANDOM_HINT = (
    "a student that starts from random weights learns more from the teacher's hidden states besides "
    "(docs/experiments.md): --set curriculum.feat.weight=1 curriculum.attn.weight=1"
)


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
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    forced_bos: int | None = None,
) -> None:
    """Write the trained student, its tokenizer and a model card to a folder: the adapter alone, unless it is merged.

    Args:
        config: of the student, with paths that can be loaded.
        settings, results: for the card, see `utils.model_card`.
        forced_bos: as in `evaluation.generate_samples`.
    """
    if config.lora.merge:
        base = pretrained.load_model(config.name, "student", torch.float32, allow_pickle=config.allow_pickle)
        student = adapters.merged(student, base)
    if evaluation.has_encoder(student):  # as it was trained
        student.generation_config.forced_bos_token_id = forced_bos
    pretrained.export(student, tokenizer, folder, model_card(settings, results))


def describe(folder: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the card of an exported student once more, when there is more to tell."""
    write_text(folder / pretrained.CARD, model_card(settings, results))
