"""Continuations that a model writes: the samples beside its figures."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .scores import evaluation_mode, float32_evaluation, has_encoder

if TYPE_CHECKING:
    from transformers import GenerationConfig


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    forced_bos: int | None = None,
    float32: bool = True,
    note: Callable[[int], None] | None = None,
) -> list[str]:
    """Return greedy continuations, without the prompts; of an encoder-decoder model, what its decoder writes.

    Args:
        prompts: token ids, what stands before a text included; or what an encoder reads. Each runs alone, so no
            padding.
        new_tokens: at most; fewer where the model's context ends.
        forced_bos: the token that a decoder reads between its start and a text, if any.
        float32: as in `evaluate`.
        note: called with the number of tokens that were just written; may raise to end it.
    """
    model = writing_model(model)
    texts = []
    with float32_evaluation(model) if float32 else evaluation_mode(model):
        for prompt in prompts:
            texts.append(_sample(model, tokenizer, list(prompt), new_tokens, forced_bos, note))
    return texts


def _sample(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    new_tokens: int,
    forced_bos: int | None,
    note: Callable[[int], None] | None,
) -> str:
    """Return the continuation of one prompt; "" where the model's context is full."""
    from transformers import StoppingCriteriaList

    settings = generation_settings(model, len(prompt), new_tokens, end=tokenizer.eos_token_id, forced_bos=forced_bos)
    if settings is None:
        return ""

    device = next(model.parameters()).device
    ids = torch.tensor([prompt], device=device)
    with ready_to_write(model):
        outputs = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([] if note is None else [_Noting(note)]),
        )

    # of a decoder-only model the output begins with the prompt
    repeated = [] if has_encoder(model) else prompt
    return continuation(tokenizer, repeated, outputs[0].tolist())


def writing_model(model: nn.Module) -> nn.Module:
    """Return the model that generates: peft's wrapper has generation settings of its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def readable_tokens(model: nn.Module) -> float:
    """Return how many tokens a model can read; infinite where its config names no limit."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def generation_settings(
    model: nn.Module,
    prompt_length: int,
    new_tokens: int,
    *,
    end: int | Sequence[int] | None,
    forced_bos: int | None,
    samples: bool = False,
) -> "GenerationConfig | None":
    """Return the settings of a continuation; None where the model's context is full.

    Args:
        new_tokens: at most; fewer where the context ends.
        end: end-of-text token, or several tokens that end a text.
        forced_bos: the token that a decoder reads between its start and a text, if any.
        samples: draw from the whole vocabulary at temperature 1, instead of taking the likeliest token.
    """
    from transformers import GenerationConfig

    # a decoder has read its own start, and perhaps that of a text; the prompt is read by the encoder
    is_encoder_decoder = has_encoder(model)
    already_read = 2 if is_encoder_decoder else prompt_length
    most_tokens = int(min(new_tokens, readable_tokens(model) - already_read))
    if most_tokens < 1:
        return None

    ends = [end] if isinstance(end, int) else list(end or [])
    whole_vocabulary = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if samples else {}
    settings = GenerationConfig(
        max_new_tokens=most_tokens,
        do_sample=samples,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **whole_vocabulary,
    )
    if is_encoder_decoder:
        settings.decoder_start_token_id = model.config.decoder_start_token_id
        settings.forced_bos_token_id = forced_bos
    return settings


class _Noting:
    """Notes every token that is written, and stops nothing."""

    def __init__(self, note: Callable[[int], None]) -> None:
        self.note = note

    def __call__(self, ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.note(1)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@contextmanager
def ready_to_write(model: nn.Module) -> Iterator[None]:
    """Prepare a model for `generate`: its own settings aside, its head given states that are contiguous."""
    with _own_settings_aside(model), _contiguous_states_for_head(model):
        yield


@contextmanager
def _own_settings_aside(model: nn.Module) -> Iterator[None]:
    """Set the model's own generation settings aside: they would be merged in, and warned about when greedy."""
    from transformers import GenerationConfig

    own_settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own_settings


@contextmanager
def _contiguous_states_for_head(model: nn.Module) -> Iterator[None]:
    """Hand the head contiguous states; `generate` gives it the last of each row, a view into all of them.

    For such a view PyTorch multiplies by a copy of the frozen weights for every row: in half precision on a CPU 16 GB,
    and a minute, for 51 rows of a head of 262,144 tokens and 640 channels.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    hook = head.register_forward_pre_hook(_with_contiguous_states)
    try:
        yield
    finally:
        hook.remove()


def _with_contiguous_states(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a head's inputs, of which the first is its hidden states, in memory of their own where they are a view."""
    states, *others = inputs
    return (states.contiguous(), *others)


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], ids: list[int]) -> str:
    """Return the text that follows the prompt, whose ids are the first of `ids`."""
    # decoded together: SentencePiece drops a space that leads
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    prompt_text = tokenizer.decode(prompt, **options)
    text = tokenizer.decode(ids, **options)
    if text.startswith(prompt_text):
        return text[len(prompt_text) :]

    # the prompt ended inside a character
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
