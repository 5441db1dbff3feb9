"""Continuations that a model writes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .scores import evaluation_mode, float32_evaluation, has_encoder


def generate_samples(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    forced_bos: int | None = None,
    float32: bool = True,
) -> list[str]:
    """Greedy continuations, without the prompts; of an encoder-decoder model, what its decoder writes.

    Args:
        prompts: token ids, what stands before a text included; or what an encoder reads. Each runs alone, so no
            padding.
        new_tokens: at most; fewer where the model's context ends.
        forced_bos: what a decoder reads between its start and a text, if anything.
        float32: as in `evaluate`.
    """
    from transformers import GenerationConfig

    if hasattr(model, "get_base_model"):  # peft's wrapper has generation settings of its own
        model = model.get_base_model()
    device = next(model.parameters()).device
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    end = tokenizer.eos_token_id
    texts = []
    with float32_evaluation(model) if float32 else evaluation_mode(model):
        for prompt in prompts:
            read = 2 if has_encoder(model) else len(prompt)  # a decoder's start, and perhaps that of a text
            room = int(min(new_tokens, context - read))
            if room < 1:
                texts.append("")
                continue
            ids = torch.tensor([list(prompt)], device=device)
            settings = GenerationConfig(max_new_tokens=room, do_sample=False, eos_token_id=end, pad_token_id=end or 0)
            if has_encoder(model):
                settings.decoder_start_token_id = model.config.decoder_start_token_id
                settings.forced_bos_token_id = forced_bos
            with _plain_generation(model):
                out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            texts.append(_continuation(tokenizer, [] if has_encoder(model) else list(prompt), out[0].tolist()))
    return texts


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Set the model's own generation settings aside: they would be merged in, and warned about when greedy."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _continuation(tokenizer: Any, prompt: list[int], whole: list[int]) -> str:
    """Text of what follows the prompt; decoded together, because SentencePiece drops a leading space."""
    before, text = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in (prompt, whole)
    )
    if text.startswith(before):
        return text[len(before) :]
    return tokenizer.decode(whole[len(prompt) :], skip_special_tokens=True)  # the prompt ended inside a character
