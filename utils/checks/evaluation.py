"""Checks of the evaluation, on models whose perplexity is known."""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..evaluation import scores
from .bench import Bench
from .checklist import Measured


class _HandMade(nn.Module):
    """A model that predicts its input's successor with probability 1/2 after token 0, and with 1/8 after token 1."""

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        # Nine outcomes: token 0, and eight others that share the rest evenly.
        after_0 = [0.5, 0.5 / 8]
        after_1 = [0.125, 0.875 / 8]
        pairs = torch.tensor([after_0, after_1])[input_ids]

        others = pairs[..., 1:].expand(*pairs.shape[:-1], 8)
        probabilities = torch.cat([pairs[..., :1], others], -1)
        return CausalLMOutput(logits=probabilities.log())


class TextScores(NamedTuple):
    perplexity: float
    bits_per_byte: float


def weighted_perplexity() -> TextScores:
    """Score two batches of different length, of 3 tokens that are easy to predict and of 9 that are hard.

    Perplexity by tokens is 2 ** ((3 * 1 + 9 * 3) / 12) = 2 ** 2.5; by batches it would be 2 ** ((1 + 3) / 2) = 4. The
    text is counted as 2 and 7 bytes, so it has 30 / 9 bits per byte.
    """
    easy = torch.zeros(1, 3, dtype=torch.long)
    hard = torch.ones(1, 9, dtype=torch.long)
    batches = []
    for ids, text_bytes in ((easy, 2), (hard, 7)):
        labels = torch.zeros_like(ids)
        batches.append(({"input_ids": ids}, labels, text_bytes))

    metrics = scores.evaluate(_HandMade(), batches, torch.device("cpu"))
    return TextScores(metrics["perplexity"], metrics["bits_per_byte"])


class RandomPerplexity(NamedTuple):
    perplexity: float
    vocabulary: int
    ratio: float
    """Perplexity over vocabulary; about 1, since nothing can be predicted."""


def random_perplexity(bench: Bench) -> RandomPerplexity:
    """Measure the perplexity of a student with random weights on the held-out text."""
    perplexity = bench.job.held_out.score(bench.student(), "student")["perplexity"]
    return RandomPerplexity(perplexity, bench.size, perplexity / bench.size)


def dtype_round_trip(bench: Bench) -> Measured:
    """Evaluate a student in half precision, and compare its weights with those before.

    The evaluation computes in float32 and puts the weights back. They must be the same parameters, since the optimizer
    holds them, with the same bits, and an input embedding that is the head's must still be.
    """
    student = bench.student().half()
    parameters = list(student.parameters())
    weights = [parameter.detach().clone() for parameter in parameters]

    # The evaluation of a copy that is float32 already gives the loss that must come out.
    loss = bench.job.held_out.score(student, "student")["loss"]
    expected = bench.job.held_out.score(copy.deepcopy(student).float(), "student")["loss"]

    parameters_after = list(student.parameters())
    is_same = _same_objects(parameters_after, parameters)
    has_same_bits = is_same and _same_bits(parameters_after, weights)
    is_tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight

    bits = "same" if has_same_bits else "other"
    tied = "tied" if is_tied else "untied"
    return Measured(
        f"{bits} bits, weights {tied}, loss {loss - expected:+.0e}",
        "same bits, tied, loss as in float32",
        passed=has_same_bits and is_tied and loss == expected,
    )


def _same_objects(first: list[nn.Parameter], second: list[nn.Parameter]) -> bool:
    """Return True if two lists hold the very same parameters."""
    if len(first) != len(second):
        return False
    return all(a is b for a, b in zip(first, second, strict=True))


def _same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Return True if two lists hold equal tensors of equal dtypes."""
    pairs = zip(first, second, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
