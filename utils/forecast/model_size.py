"""Sizes of a model, from its configuration alone: no weights are read or allocated."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from ..config.settings import LoraConfig
from ..errors import UserError
from ..pretrained.families import auto_class, depth, layer_counts


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; of an encoder-decoder model both stacks count, as deep as the deeper one."""

    parameters: int
    """All of them; shared ones count once."""
    hidden: int
    """Width of the states that enter the head."""
    intermediate: int
    """Width inside the feed-forward blocks."""
    layers: int
    vocabulary: int
    """Rows of the head."""

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Return the sizes of a model that is built on the meta device, where weights take no memory.

        Raises:
            UserError: transformers cannot make such a model, or it does not predict tokens.
        """
        try:
            with torch.device("meta"):
                kind: Any = auto_class(config)
                model = kind.from_config(config)
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
        intermediate = _widest(getattr(config.get_text_config(), "intermediate_size", None))
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            hidden=hidden,
            intermediate=intermediate or 4 * hidden,
            layers=depth(config),
            vocabulary=vocabulary,
        )


def _widest(sizes: int | Sequence[int] | None) -> int | None:
    """Return the width of all layers, or the largest where each has its own (Gemma 3n)."""
    if isinstance(sizes, Sequence):
        return max(sizes)
    return sizes


def shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return the config of the same architecture with at most so many layers, in encoder and decoder each."""
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
    """Return the number of parameters that are trained: all of a student, or those of its adapter."""
    if not lora.enabled:
        return student.parameters

    # attention has four linear layers of the hidden width, the rest three between it and the intermediate one; an
    # adapter adds `rank` times input and output width to each
    widths = 8 * student.hidden + 3 * (student.hidden + student.intermediate)
    return student.layers * lora.rank * widths
