"""The student before and after its training: made, the same one every time, and exported."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..advice import advice
from ..config.build import StudentConfig, TrainingConfig
from ..errors import UserError
from ..evaluation import scores
from ..files import write_text
from ..report.model_card import model_card
from ..seeding import seed_everything
from . import families, lora
from . import loading as pretrained

log = logging.getLogger(__name__)

RANDOM_HINT = (
    "a student that starts from random weights learns more from the teacher's hidden states besides "
    "(docs/experiments.md): --set curriculum.feat.weight=1 curriculum.attn.weight=1"
)


def check(config: StudentConfig) -> None:
    """Find out, with nothing loaded, whether what will be exported can be loaded.

    Raises:
        UserError: an adapter of an adapter, which other programs cannot load.
    """
    is_exported_alone = config.lora.enabled and not config.lora.merge and config.init == "pretrained"
    base = pretrained.adapted_base(config.name, "student") if is_exported_alone else None
    if base is not None:
        raise UserError(
            f"--lora: {config.name} is itself an adapter of {base}, and the new adapter would belong to both. Expected "
            "a whole model below an adapter. Merge them at the end: --set student.lora.merge=true; or leave out --lora."
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
        student = lora.add_lora(base, config.name, config.lora)
    families.keep_weights(student.config)
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
        settings_of_generation = student.generation_config
        student = lora.merged(student, base)
        student.generation_config = settings_of_generation
    _start_as_trained(student, forced_bos)
    card = None
    with advice("model card"):
        card = model_card(settings, results)
    original = pretrained.load_config(config.name, "student")
    with families.exportable_config(student.config, original):
        pretrained.export(student, tokenizer, folder, card)


def rehearse_export(
    student: nn.Module, config: StudentConfig, tokenizer: PreTrainedTokenizerBase, forced_bos: int | None = None
) -> None:
    """Find out before training whether the student can be exported after it.

    Raises:
        UserError: see `pretrained.rehearse_export`.
    """
    _start_as_trained(student, forced_bos)
    pretrained.rehearse_export(student, tokenizer, merges=config.lora.merge)


def _start_as_trained(student: nn.Module, forced_bos: int | None) -> None:
    """Let a decoder begin what it generates as it did in training."""
    if scores.has_encoder(student):
        student.generation_config.forced_bos_token_id = forced_bos


def describe(folder: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the card of an exported student once more, when there is more to tell."""
    with advice("newer model card"):
        write_text(folder / pretrained.CARD, model_card(settings, results))
