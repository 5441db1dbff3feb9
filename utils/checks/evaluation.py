"""Checks of the evaluation on models whose perplexity is known."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from ..evaluation import scores
from .checklist import check


class _HandMade(nn.Module):
    """Predicts its input's successor with probability 1/2 after token 0, and with 1/8 after token 1."""

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        p = torch.tensor([[0.5, 0.5 / 8], [0.125, 0.875 / 8]])[input_ids]
        logits = torch.cat([p[..., :1], p[..., 1:].expand(*p.shape[:-1], 8)], -1).log()
        return CausalLMOutput(logits=logits)


@check("perplexity by tokens", "perplexity is a mean of batch means: it depends on how text is cut into batches")
def weighted_perplexity() -> tuple:
    rows = [torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)]
    batches = [({"input_ids": ids}, torch.zeros_like(ids), 5 * ids.shape[1] // 6) for ids in rows]
    found = scores.evaluate(_HandMade(), batches, torch.device("cpu"))
    right = abs(found["perplexity"] - 2**2.5) < 1e-3 and abs(found["bits_per_byte"] - 30 / 9) < 1e-3
    value = f"{found['perplexity']:.3f}, bits per byte {found['bits_per_byte']:.3f}, of 3 and 9 tokens"
    return value, "5.657 (mean of means: 4) and 3.333", right


@check("perplexity of a random model", "the evaluation leaks what it should predict, or scores the wrong tokens")
def random_perplexity(bench: Any) -> tuple:
    found = bench.job.held_out.score(bench.student(), "student")["perplexity"]
    return f"{found:.1f} with a vocabulary of {bench.size}", "V within 5 %", abs(found / bench.size - 1) < 0.05


@check(
    "evaluation leaves fp16 as it was", "the evaluation in float32 changes the student: the final report would crash"
)
def dtype_round_trip(bench: Any) -> tuple:
    student = bench.student().half()
    held = list(student.parameters())
    before = [p.detach().clone() for p in held]
    inside = bench.job.held_out.score(student, "student")["loss"]
    expected = bench.job.held_out.score(copy.deepcopy(student).float(), "student")["loss"]
    after = list(student.parameters())
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    same = len(after) == len(held) and all(a is b for a, b in zip(after, held, strict=True))
    bits = same and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before, strict=True))
    value = f"{'same' if bits else 'other'} bits, weights {'tied' if tied else 'untied'}, loss {inside - expected:+.0e}"
    return value, "same bits, tied, loss as in float32", same and bits and tied and inside == expected
