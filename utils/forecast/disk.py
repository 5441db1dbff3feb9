"""Sizes of models, and how much disk a run will take; see memory.py for what is held while it trains."""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from ..config.build import LoraConfig, TrainingConfig
from ..errors import UserError
from ..pretrained.families import auto_class, depth, layer_counts

WINDOW_BYTES_PER_TEXT_BYTE = 9
"""Tokenised windows of both models in the cache of `datasets`."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; of an encoder-decoder model both stacks count, as deep as the deeper one."""

    parameters: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """From a model's config; no weights are read or allocated.

        Raises:
            UserError: transformers cannot make such a model.
        """
        try:
            with torch.device("meta"):
                model = auto_class(config).from_config(config)
        except Exception as error:  # whatever an architecture raises for a value that it does not know
            raise UserError(
                f"{config.name_or_path or 'the model'}: transformers cannot make a {config.model_type} model of its "
                f"config.json ({type(error).__name__}: {error}). Put it right, or choose another model."
            ) from error

        head = model.get_output_embeddings()
        if head is None:
            raise UserError(
                f"{config.name_or_path or 'the model'}: a {type(model).__name__} has no output embeddings. Expected a "
                "language model, which predicts tokens."
            )

        # the config may name its sizes otherwise; what enters the head is in the head's own shape
        vocabulary, hidden = head.weight.shape
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            hidden=hidden,
            intermediate=_widest(getattr(config.get_text_config(), "intermediate_size", None)) or 4 * hidden,
            layers=depth(config),
            vocabulary=vocabulary,
        )


def _widest(sizes: int | Sequence[int] | None) -> int | None:
    """The largest of a width for all layers, or of one for each (Gemma 3n)."""
    return max(sizes) if isinstance(sizes, Sequence) else sizes


def shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with at most so many layers, in encoder and decoder each."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    whole_depth = depth(config)

    for name in layer_counts(text):
        setattr(text, name, min(getattr(text, name), layers))

    # whatever has an entry for each layer; what a class computes from the number of layers is no attribute of its own
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole_depth:
            setattr(text, name, value[:layers])
    return config


def trained_parameters(student: Shape, lora: LoraConfig) -> int:
    """All of a student, or those of its adapter."""
    # attention has four layers of the hidden width, the rest three between it and the intermediate one
    widths = 8 * student.hidden + 3 * (student.hidden + student.intermediate)
    return student.layers * lora.rank * widths if lora.enabled else student.parameters


def disk(
    student: Shape,
    training: TrainingConfig,
    lora: LoraConfig,
    *,
    text_bytes: int = 0,
    runs: int = 1,
    in_memory: int = 0,
) -> dict[str, int]:
    """Bytes that a run writes, by what they are.

    Args:
        lora: with an adapter only that is saved, and exported unless it is merged.
        text_bytes: of the training text.
        runs: how many students are trained (2 with a comparison without the teacher).
        in_memory: up to so many bytes of text, windows are not written.
    """
    # a new checkpoint is whole before the oldest goes; with patience the best one stays besides
    checkpoints = training.keep_checkpoints + 1 + bool(training.patience)
    saved = trained_parameters(student, lora)
    return {
        "checkpoints": saved * 12 * checkpoints * runs,  # weights and two moments of AdamW
        "student": (student.parameters if lora.merge else saved) * 4,
        "windows": text_bytes * WINDOW_BYTES_PER_TEXT_BYTE if text_bytes > in_memory else 0,
    }


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def require_disk(folder: Path, parts: dict[str, int]) -> None:
    """Make sure, before models are loaded, that what a run will write finds room; what it wrote before counts.

    Raises:
        UserError: the estimate, and how much is free.
    """
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed, free = max(0, sum(parts.values()) - written), free_disk(folder)
    if needed > free:
        raise UserError(
            f"too little disk for {folder}: this run needs about {needed / 1e6:,.1f} MB more (checkpoints "
            f"{parts['checkpoints'] / 1e6:,.1f} and student {parts['student'] / 1e6:,.1f}, of which "
            f"{written / 1e6:,.1f} are there), and {free / 1e6:,.1f} MB are free. Free some space, choose another "
            "--output-dir, or lower training.keep_checkpoints."
        )


def largest(parts: dict[str, int], count: int = 3) -> str:
    """The total and its largest parts, such as `5.2 GiB (student logits 2.1, ...)`."""
    top = sorted(parts.items(), key=lambda part: -part[1])[:count]
    named = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in top if size)
    return f"{sum(parts.values()) / 2**30:.3g} GiB ({named})"
