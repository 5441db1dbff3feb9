"""Two families of models, causal language models and encoder-decoder models (T5, BART), and what differs between them.

Also the parts of a model that transformers calls differently from one architecture to the next: body, depth.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from ..config.protocols import RunConfig
from ..errors import UserError

REWRITING = {"rescale_every": 0}
"""Settings by which a model changes its weights in evaluation mode, and the values by which it does not."""


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class of transformers that makes or loads a model with its head."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal language model below its head.

    Raises:
        ValueError: the model does not keep it apart.
    """
    if model.base_model is not model:
        return model.base_model

    # Llama 4 calls its body otherwise than its class promises
    candidates = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(candidates) == 1:
        return candidates[0]
    raise ValueError(f"a {type(model).__name__} does not keep its body apart from its head")


def depth(config: PretrainedConfig) -> int:
    """Return the number of layers, of the deeper one of encoder and decoder.

    Raises:
        ValueError: the config names no number of layers.
    """
    # A config of several towers (images, text) has the layers of the text in a config of its own.
    text = config.get_text_config()
    counts = [getattr(text, name) for name in layer_counts(text)]
    if not counts:
        raise ValueError(f"the config of a {text.model_type} names no number of layers")
    return max(counts)


def layer_counts(config: PretrainedConfig) -> list[str]:
    """Return the names of the settings that say how many layers a model has."""
    # num_hidden_layers is the encoder's where there is one; T5 and BART have one of the others for the decoder.
    names = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
    return [name for name in names if getattr(config, name, None)]


def decoder_starts(config: RunConfig, shapes: Mapping[str, PretrainedConfig]) -> tuple[int, int] | None:
    """Return the tokens that the decoders of student and teacher begin with; None for causal language models.

    Args:
        shapes: the models' configs, of `student` and `teacher`.

    Raises:
        UserError: one model has an encoder and the other has none, or the settings ask for something that only causal
            models can do.
    """
    encoders = {role for role, shape in shapes.items() if shape.is_encoder_decoder}
    if not encoders:
        return None

    pair = " and ".join(f"{role} {shape.model_type}" for role, shape in shapes.items())
    if encoders != set(shapes):
        raise UserError(
            f"got an encoder-decoder model beside a causal one ({pair}). Expected two of one kind: what these two "
            "predict depends on different text."
        )
    _refuse_causal_settings(config, pair)

    # The decoder's input cannot be made without it; found out here, before any text is read.
    for role, shape in shapes.items():
        if not isinstance(getattr(shape, "decoder_start_token_id", None), int):
            raise UserError(
                f"{role}: its config.json has no decoder_start_token_id, which its decoder begins with. Add it: 0 for "
                "T5 and its kin, 2 for BART."
            )
    return shapes["student"].decoder_start_token_id, shapes["teacher"].decoder_start_token_id


def _refuse_causal_settings(config: RunConfig, pair: str) -> None:
    """Refuse settings that only causal language models can follow.

    Args:
        pair: both models, for messages.

    Raises:
        UserError: there is such a setting.
    """
    if config.student.lora.enabled:
        raise UserError(f"--lora: not for encoder-decoder models ({pair}). Train all weights: leave it out.")
    if config.evaluation.tasks:
        raise UserError(f"--eval-tasks: not for encoder-decoder models ({pair}). Leave it out.")
    if config.data.learn_from != "completions":
        raise UserError(
            f"data.learn_from: got {config.data.learn_from}, expected completions: of encoder-decoder models ({pair}) "
            "only the decoder predicts text, and it reads the completion."
        )


@contextmanager
def exportable_config(config: PretrainedConfig, original: PretrainedConfig) -> Iterator[None]:
    """Undo `keep_weights` within the block, so that a model is exported with the config that it came with."""
    # Most architectures have none of these settings.
    before = {name: getattr(config, name) for name in REWRITING if hasattr(original, name)}
    try:
        for name in before:
            setattr(config, name, getattr(original, name))
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def keep_weights(config: PretrainedConfig) -> None:
    """Keep a model from changing its own weights in evaluation mode: checkpoints, training and export would have them.

    RWKV halves weights there, against an overflow that float32 does not have.
    """
    for name, off in REWRITING.items():
        if hasattr(config, name):
            setattr(config, name, off)
