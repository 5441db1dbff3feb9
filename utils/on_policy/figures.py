"""Figures of the texts of a round: how long they are, whether they end, and what the teacher thinks of them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator

from ..advice import advice
from ..evaluation import scores
from ..evaluation.written_text import repeated_share
from ..interfaces import Collator, OwnText
from ..spread import spread

MEASURED_WINDOWS = 16
"""Texts of a round that the teacher's opinion is measured on."""


@dataclass(frozen=True)
class SlotText:
    """A text that the student wrote in one slot, and facts that it is compared with."""

    own: OwnText | None
    """None: there was no place to write."""
    ids: Sequence[int]
    """Sampled tokens."""
    given_ends: bool
    """The given text ends within as many tokens as the student may write."""
    prompt: str
    """As it is shown."""


def describe(texts: Sequence[SlotText]) -> dict[str, Any]:
    """Return the figures of the texts alone.

    `texts` (their number), `ended` and `given_ended` (shares of the texts, and of the given texts in their places,
    that end within the limit), `tokens` and `tokens_95` (mean and 95 % quantile of the length), `repeated_4grams`,
    `commonest_token` (share of the tokens that are the most frequent one), `empty` (share of the places for a text that
    have none, or one that ends at once) and `broken` (share of the texts).
    """
    written = [text for text in texts if text.own is not None]
    own = [text.own for text in texts if text.own is not None]
    lengths = [text.tokens for text in own]
    # Its end is no part of a text, and what was cut off says nothing of it.
    tokens = Counter(token for text in written for token in text.ids[: text.own.tokens])

    return {
        "texts": len(texts),
        "ended": _share([text.ended for text in own]),
        "given_ended": _share([text.given_ends for text in written]),
        "tokens": sum(lengths) / max(len(own), 1),
        "tokens_95": float(np.quantile(lengths, 0.95)) if lengths else 0.0,
        "repeated_4grams": repeated_share([text.ids for text in written]),
        "commonest_token": max(tokens.values(), default=0) / max(tokens.total(), 1),
        "empty": _share([_is_empty(text.own) for text in texts]),
        "broken": _share([text.broken for text in own]),
    }


def _is_empty(own: OwnText | None) -> bool:
    """Return True if there is no text in a place, one of nothing but an end, or one that teaches nothing."""
    return own is None or own.window is None or not own.tokens


def _share(facts: Sequence[bool]) -> float:
    """Return the share of facts that are true; 0 of none."""
    return sum(facts) / max(len(facts), 1)


class OpinionOf(NamedTuple):
    """Sums over some texts of the student."""

    nats: float
    """Of the teacher."""
    bytes: float
    kl: float
    """Nats, at common boundaries."""
    positions: float


def teachers_opinion(
    module: Any, windows: Sequence[dict[str, Any]], collate: Collator, accelerator: Accelerator, *, batch_size: int
) -> dict[str, float | None]:
    """Return the teacher's bits per byte of texts, and the student's divergence from it per token; every process calls.

    Args:
        module: the framework that is trained.
        windows: of the student's texts, the same in every process; `MEASURED_WINDOWS` of them are measured.
        batch_size: windows of a forward.
    """
    measured = spread(windows, MEASURED_WINDOWS)[accelerator.process_index :: accelerator.num_processes]
    sums = [0.0] * len(OpinionOf._fields)
    with advice("the teacher's opinion of the student's texts"), scores.float32_evaluation(module.student):
        for start in range(0, len(measured), batch_size):
            batch = collate(measured[start : start + batch_size]).to(accelerator.device)
            sums = [a + b for a, b in zip(sums, _opinion_of(module, batch), strict=True)]

    total = OpinionOf(*scores.sum_over_processes(sums, accelerator))
    return {
        "teacher_bits_per_byte": total.nats / total.bytes / math.log(2) if total.bytes else None,
        "kl_nats_per_token": total.kl / total.positions if total.positions else None,
    }


@torch.no_grad()
def _opinion_of(module: Any, batch: Any) -> OpinionOf:
    """Return the sums over one batch."""
    signal = module.teacher.signal(batch, module.loss_config.top_k)
    nats, _ = batch.teacher_nll(signal)
    compared = module.compare(batch, signal)
    return OpinionOf(nats, float(batch.bytes.sum()), compared["kl_sum"], compared["count"])
