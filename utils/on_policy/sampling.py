"""Sampling: texts that a model writes behind prompts, a pure function of its weights and of given random numbers.

A token is drawn by inverse transform: one number between 0 and 1 per position says which token it is. So a text
depends neither on the batch that it is written in, nor on the process, nor on a global generator, but for the rounding
of the model's logits.

Shapes: B texts of a batch, V tokens of the vocabulary, N new tokens.
"""

import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..evaluation.samples import generation_settings, readable_tokens, ready_to_write, writing_model
from ..evaluation.scores import evaluation_mode
from ..evaluation.written_text import padded
from ..machine import device_memory

log = logging.getLogger(__name__)

STREAM = 20_477
"""Number that sets these random numbers apart from all others that are made from the run's seed."""


WRITTEN_TOGETHER = 64
"""Texts of a batch, where nothing says how many fit."""


@dataclass(frozen=True)
class Prompt:
    """A beginning that a text is written behind."""

    ids: Sequence[int]
    """Tokens that the model has read."""
    uniforms: np.ndarray
    """[N] numbers in [0, 1), one for each new token; their count is the most that may be written."""


@dataclass(frozen=True)
class SamplingRule:
    """The distribution that tokens are drawn from, and what ends a text."""

    stop_ids: Sequence[int]
    """Tokens that end a text."""
    temperature: float = 1.0
    top_p: float = 1.0
    """Tokens are drawn from the fewest likeliest ones whose probabilities add up to this."""


class Engine(Protocol):
    """Writes texts, as `GenerateEngine` does."""

    def __call__(
        self, student: nn.Module, prompts: Sequence[Prompt], sampling: SamplingRule, note: Callable[[int], None]
    ) -> list[list[int]]:
        """Return the new tokens behind each prompt, in the order of the prompts.

        Args:
            student: with the weights of this step, in training mode or not; it must be left as it was.
            prompts: those of this process.
            note: called with the number of texts that were just written; may raise to end it.

        Returns:
            for each prompt at most `len(prompt.uniforms)` ids, up to and including the first of `sampling.stop_ids`
            if there is one. The same call must return the same ids, or a resumed run differs from one that was not
            stopped: `prompt.uniforms` are there to be drawn by, or to make a seed of.
        """


def checked_rows(rows: Any, prompts: Sequence[Prompt], vocabulary: int) -> list[list[int]]:
    """Return what an engine has written, as plain numbers.

    Args:
        vocabulary: tokens of the student.

    Raises:
        UserError: they are not the new tokens behind each prompt.
    """
    expected = "the engine must return the new tokens behind each prompt (`Engine` in utils/on_policy/sampling.py)"
    try:
        texts = [[operator.index(token) for token in row] for row in rows]
    except TypeError as error:
        raise UserError(
            f"{expected}; got {type(rows).__name__} {rows!r:.80}, expected lists of whole numbers"
        ) from error

    if len(texts) != len(prompts):
        raise UserError(f"{expected}; got {len(texts)} rows, expected {len(prompts)}, one a prompt, in their order")
    for number, (text, prompt) in enumerate(zip(texts, prompts, strict=True)):
        if len(text) > len(prompt.uniforms):
            raise UserError(
                f"{expected}; got {len(text)} tokens in row {number}, expected at most {len(prompt.uniforms)} there, "
                "as many as the prompt's `uniforms`, and without the prompt"
            )
        outside = [token for token in text if not 0 <= token < vocabulary]
        if outside:
            raise UserError(
                f"{expected}; got token {outside[0]} in row {number}, expected 0 to {vocabulary - 1}, the student's"
            )
    return texts


def uniforms(seed: int, step: int, slot: int, count: int) -> np.ndarray:
    """Return [count] random numbers in [0, 1) of one slot of a step.

    Made from the raw output of a bit generator, which NumPy promises never to change.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, STREAM, step, slot]))
    return (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


class GenerateEngine:
    """Writes by `transformers.generate`, in batches of prompts of about the same length.

    Args:
        fitting: tokens of the longest text of a batch, its prompt included -> texts of the batch, at most; None:
            `WRITTEN_TOGETHER`. What does not fit into a GPU's memory nevertheless is halved.
        precision: makes the context of the student's forward, such as `accelerator.autocast`.
    """

    def __init__(self, fitting: Callable[[int], int] | None = None, precision: Callable = nullcontext) -> None:
        self.fitting = fitting or (lambda tokens: WRITTEN_TOGETHER)
        self.precision = precision
        self._most: float = math.inf

    def __call__(
        self, student: nn.Module, prompts: Sequence[Prompt], sampling: SamplingRule, note: Callable[[int], None]
    ) -> list[list[int]]:
        """Return the new tokens behind each prompt; see `Engine`."""
        model = writing_model(student)
        texts: list[list[int]] = [[] for _ in prompts]
        waiting = _in_order(prompts)
        with evaluation_mode(model), ready_to_write(model), self.precision():
            while waiting:
                numbers = self._next_batch(prompts, waiting, readable_tokens(model))
                rows = self._written(model, [prompts[number] for number in numbers], sampling)
                if rows is None:
                    continue  # in smaller batches

                for number, row in zip(numbers, rows, strict=True):
                    texts[number] = row
                waiting = waiting[len(numbers) :]
                note(len(numbers))
        return texts

    def _written(self, model: nn.Module, prompts: Sequence[Prompt], sampling: SamplingRule) -> list[list[int]] | None:
        """Return the texts of a batch; None where it does not fit into memory, after which batches are smaller."""
        try:
            return _write_batch(model, prompts, sampling)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise

        # outside of the handler: the exception holds what did not fit
        self._most = max(1, len(prompts) // 2)
        device_memory.release()
        log.warning("memory: the student writes %d texts at a time from here on; more do not fit", self._most)
        return None

    def _next_batch(self, prompts: Sequence[Prompt], waiting: Sequence[int], context: float) -> list[int]:
        """Return the first of the prompts that wait, as many as fit together into memory and the model's context."""
        new_tokens = 0
        numbers: list[int] = []
        for number in waiting:
            prompt = prompts[number]
            most_new = max(new_tokens, len(prompt.uniforms))
            tokens = len(prompt.ids) + most_new
            has_room = len(numbers) < min(self._most, self.fitting(tokens)) and tokens <= context
            if numbers and not has_room:
                break
            new_tokens = most_new
            numbers.append(number)
        return numbers


def _in_order(prompts: Sequence[Prompt]) -> list[int]:
    """Return the numbers of the prompts that have room for a token, shortest first."""
    numbers = [number for number, prompt in enumerate(prompts) if len(prompt.uniforms)]
    return sorted(numbers, key=lambda number: (len(prompts[number].ids), -len(prompts[number].uniforms)))


def _write_batch(model: nn.Module, prompts: Sequence[Prompt], sampling: SamplingRule) -> list[list[int]]:
    """Return the texts of a batch."""
    from transformers import LogitsProcessorList

    width = max(len(prompt.ids) for prompt in prompts)
    new_tokens = max(len(prompt.uniforms) for prompt in prompts)
    settings = generation_settings(model, width, new_tokens, end=list(sampling.stop_ids), forced_bos=None)
    if settings is None:  # the context is full
        return [[] for _ in prompts]

    # a text that has all its tokens is drawn on until its batch is done, and cut then
    numbers = np.zeros((len(prompts), new_tokens))
    for row, prompt in enumerate(prompts):
        numbers[row, : len(prompt.uniforms)] = prompt.uniforms

    device = next(model.parameters()).device
    ids, mask = padded([prompt.ids for prompt in prompts], left=True)
    draw = _Draw(torch.from_numpy(numbers).to(device), width)
    outputs = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([*_warpers(sampling), draw]),
    )
    rows = outputs[:, width:].tolist()
    return [_up_to_end(row[: len(prompt.uniforms)], sampling) for row, prompt in zip(rows, prompts, strict=True)]


def _warpers(sampling: SamplingRule) -> Iterator:
    """Yield what changes the distribution that is drawn from."""
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    if sampling.temperature != 1:
        yield TemperatureLogitsWarper(sampling.temperature)
    if sampling.top_p < 1:
        yield TopPLogitsWarper(sampling.top_p)


class _Draw:
    """Leaves of each position's logits the one token that its random number says.

    Args:
        numbers: [B, N] in [0, 1).
        width: tokens before the first new one.
    """

    def __init__(self, numbers: Tensor, width: int) -> None:
        self.numbers = numbers
        self.width = width

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        # what has overflowed is no number, and no token lies at one: an error that a GPU does not recover from
        finite = logits.float().nan_to_num(nan=torch.finfo(torch.float32).min)

        # float64: a sum over a large vocabulary in float32 is off by more than a rare token has
        cumulative = finite.softmax(-1).double().cumsum(-1)
        number = self.numbers[:, ids.shape[1] - self.width, None]

        # a product just below 1 may be rounded up to the whole sum, which no token lies behind
        whole = cumulative[:, -1:]
        target = (number * whole).minimum(torch.nextafter(whole, torch.zeros_like(whole)))
        # right: of equal sums, where tokens have no probability, the one behind them
        tokens = torch.searchsorted(cumulative, target, right=True)
        return torch.full_like(logits, -torch.inf).scatter_(1, tokens, 0.0)


def _up_to_end(ids: list[int], sampling: SamplingRule) -> list[int]:
    """Return ids up to and including the first that ends a text."""
    for number, token in enumerate(ids):
        if token in sampling.stop_ids:
            return ids[: number + 1]
    return ids
