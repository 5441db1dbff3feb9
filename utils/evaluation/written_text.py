"""Metrics of text that a model writes: what bits per byte on real text, which a divergence optimises, do not show.

A student is sampled from at temperature 1 behind beginnings of unseen texts. Of these samples are measured: the bits
per byte that they cost the teacher (few: the teacher finds them likely), the share of repeated 4-grams (Welleck et
al., arXiv 1908.04319: seq-rep-4; a text that repeats itself is likely, too), the share that ends, and the length.

Shapes: S samples, P tokens of a prompt, T tokens of a text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .samples import continuation, generation_settings, readable_tokens, ready_to_write, writing_model
from .scores import IGNORE, evaluation_mode, float32_evaluation, has_encoder, token_nll

NGRAM = 4
"""Tokens in a row whose repetition is counted."""

SAMPLED_TOGETHER = 64
"""Prompts that are continued in one batch."""

SCORED_TOGETHER = 8
"""Texts that the teacher reads in one batch."""


@dataclass(frozen=True)
class Sample:
    """A text that a model has written behind a prompt."""

    prompt: Sequence[int]
    ids: Sequence[int]
    """Tokens behind the prompt, without the end-of-text token."""
    has_ended: bool
    """The model wrote the end-of-text token."""


@dataclass(frozen=True)
class Sampling:
    """Settings of sampled texts."""

    new_tokens: int
    """Tokens of a sample, at most; fewer where the model's context ends."""
    end: int | None
    """End-of-text token."""
    seed: int = 0
    forced_bos: int | None = None
    """The token that a decoder reads between its start and a text, if any."""


def sample_texts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    float32: bool = True,
) -> list[Sample]:
    """Return a continuation of each prompt, sampled at temperature 1 from the whole vocabulary.

    The state of the random number generators is afterwards as it was.

    Args:
        prompts: token ids, what stands before a text included; or what an encoder reads.
        float32: compute in float32 whatever the model's dtype.
    """
    model = writing_model(model)
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    samples: list[Sample] = []
    with (
        torch.random.fork_rng(devices),
        float32_evaluation(model) if float32 else evaluation_mode(model),
        ready_to_write(model),
    ):
        torch.manual_seed(sampling.seed)
        for first in range(0, len(prompts), SAMPLED_TOGETHER):
            samples += _sample_together(model, prompts[first : first + SAMPLED_TOGETHER], sampling)
    return samples


def _sample_together(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[Sample]:
    """Return a continuation of each of some prompts."""
    length = max(map(len, prompts))
    settings = generation_settings(
        model,
        length,
        sampling.new_tokens,
        end=sampling.end,
        forced_bos=sampling.forced_bos,
        samples=True,
    )
    if settings is None or length < 1:
        return [Sample(prompt, [], has_ended=False) for prompt in prompts]

    is_encoder_decoder = has_encoder(model)
    device = next(model.parameters()).device
    ids, mask = padded(prompts, left=not is_encoder_decoder)
    outputs = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)

    # Of a decoder-only model the output begins with the padded prompt, else with the decoder's start.
    first = 1 if is_encoder_decoder else length
    rows = outputs[:, first:].tolist()
    return [_until_end(prompt, row, sampling.end) for prompt, row in zip(prompts, rows, strict=True)]


def padded(prompts: Sequence[Sequence[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of prompts: a text goes on at the right; an encoder counts positions from the left."""
    length = max(map(len, prompts))
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        first = length - len(prompt) if left else 0
        ids[row, first : first + len(prompt)] = torch.tensor(list(prompt), dtype=torch.long)
        mask[row, first : first + len(prompt)] = 1
    return ids, mask


def _until_end(prompt: Sequence[int], ids: list[int], end: int | None) -> Sample:
    """Return a sample without its end-of-text token and the padding behind it."""
    if end in ids:
        return Sample(prompt, ids[: ids.index(end)], has_ended=True)
    return Sample(prompt, ids, has_ended=False)


# ------------------------------------------------------------------------------------------------------- metrics


def repeated_share(texts: Sequence[Sequence[int]], size: int = NGRAM) -> float | None:
    """Return the share of n-grams that occurred before in the same text, the mean over texts that have any.

    None where no text is as long as an n-gram.
    """
    shares = []
    for ids in texts:
        ngrams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
        if ngrams:
            shares.append(1 - len(set(ngrams)) / len(ngrams))
    return sum(shares) / len(shares) if shares else None


@dataclass(frozen=True)
class Judge:
    """A model that finds texts likely or not."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    """Of the `tokenizers` library: it tells where its tokens begin."""
    prompts: Sequence[tuple[Sequence[int], str]]
    """For each text what it reads before: token ids, then text that is tokenised together with the written one."""

    def bits_per_byte(self, texts: Sequence[str]) -> float | None:
        """Return the bits per byte of texts behind their prompts; None where there is nothing to score.

        A token that begins within the prompt belongs to it.
        """
        rows = []
        num_bytes = 0
        for (before, prompt), text in zip(self.prompts, texts, strict=True):
            ids, begins = self._tokens(prompt + text)
            written = [number for number, begin in enumerate(begins) if begin >= len(prompt)]
            if not written:
                continue

            # Something has to stand before the first token that is predicted, and all has to fit into the context.
            first = len(before) + written[0]
            row = [*before, *ids]
            if first and len(row) <= readable_tokens(self.model):
                rows.append((row, first))
                num_bytes += len((prompt + text)[begins[written[0]] :].encode("utf-8", "replace"))
        if not num_bytes:
            return None

        rows.sort(key=lambda row: len(row[0]))
        batches = [self._batch(rows[i : i + SCORED_TOGETHER]) for i in range(0, len(rows), SCORED_TOGETHER)]
        nats, _ = token_nll(self.model, batches, next(self.model.parameters()).device)
        return nats / num_bytes / math.log(2)

    def _tokens(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text and the character at which each begins."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]

    def _batch(self, rows: Sequence[tuple[list[int], int]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return inputs and labels [S, T] of (ids, number of the first scored token), padded on the right."""
        width = max(len(ids) for ids, _ in rows)
        inputs = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(inputs)
        labels = torch.full_like(inputs, IGNORE)

        for row, (ids, first) in enumerate(rows):
            tokens = torch.tensor(ids)
            inputs[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1

            # Position j predicts token j + 1.
            labels[row, first - 1 : len(tokens) - 1] = tokens[first:]
        return {"input_ids": inputs, "attention_mask": mask}, labels


def describe(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    judges: Mapping[str, Judge],
) -> dict[str, float | int | None]:
    """Return the metrics of samples: `samples`, `tokens` (mean length), `ended` and `repeated_4grams` (shares), and
    of each judge `NAME_bits_per_byte`.

    Args:
        tokenizer: of the model that wrote them.
    """
    texts = [continuation(tokenizer, list(text.prompt), [*text.prompt, *text.ids]) for text in samples]
    count = max(len(samples), 1)
    metrics: dict[str, float | int | None] = {
        "samples": len(samples),
        "tokens": sum(len(text.ids) for text in samples) / count,
        "ended": sum(text.has_ended for text in samples) / count,
        "repeated_4grams": repeated_share([text.ids for text in samples]),
    }
    for name, judge in judges.items():
        metrics[f"{name}_bits_per_byte"] = judge.bits_per_byte(texts)
    return metrics
