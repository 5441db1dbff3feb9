"""The trained student's folder, ready to be loaded by transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..advice import advice
from ..config.settings import StudentConfig
from ..evaluation import scores
from ..files import write_text
from ..pretrained import export as model_export
from ..pretrained import families, loading, lora
from ..report.model_card import model_card


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
        settings, results: for the card, see `utils.report.model_card`.
        forced_bos: as in `evaluation.generate_samples`.
    """
    if config.lora.merge:
        # into weights as they were loaded, not into those that training may have quantised
        base = loading.load_model(config.name, "student", torch.float32, allow_pickle=config.allow_pickle)
        settings_of_generation = student.generation_config
        student = lora.merged(student, base)
        student.generation_config = settings_of_generation
    _start_as_trained(student, forced_bos)

    card = None
    with advice("model card"):
        card = model_card(settings, results)

    # Settings that `keep_weights` changed for training are put back meanwhile.
    original = loading.load_config(config.name, "student")
    with families.exportable_config(student.config, original):
        model_export.export(student, tokenizer, folder, card)


def rehearse_export(
    student: nn.Module, config: StudentConfig, tokenizer: PreTrainedTokenizerBase, forced_bos: int | None = None
) -> None:
    """Check before training that the student can be exported after it.

    Raises:
        UserError: see `utils.pretrained.export.rehearse_export`.
    """
    _start_as_trained(student, forced_bos)
    model_export.rehearse_export(student, tokenizer, merges=config.lora.merge)


def _start_as_trained(student: nn.Module, forced_bos: int | None) -> None:
    """Let a decoder begin what it generates as it did in training."""
    if scores.has_encoder(student):
        student.generation_config.forced_bos_token_id = forced_bos


def describe(folder: Path, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the card of an exported student once more, when there is more to tell."""
    with advice("newer model card"):
        write_text(folder / model_export.CARD, model_card(settings, results))
