"""Views of single tokens for the report: a sentence as both models read it, and places where they differ most."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from ..evaluation.held_out import HeldOut
from ..evaluation.scores import float32_evaluation
from ..interfaces import Pair, Side
from ..machine.device_memory import FittingParts

SEARCHED_WINDOWS = 32
"""Windows of the held-out text that are searched for differences: some are enough, and all would take minutes."""

MOST_DIFFERENCES = 6

CONTEXT = 240
"""Characters that are shown before a place, at most."""

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\n")

LEAST_TOKENS, MOST_TOKENS = 12, 48
"""Student tokens of the sentence that is shown: it ends with a sentence in between, if one does."""


# ------------------------------------------------------------------------------------------ alignment


def alignment(pair: Pair, windows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first sentence of the first window as both models read it.

    Returns:
        `spans`, each with the `student` and `teacher` tokens between two places where both have read the same bytes;
        `tokens` of the student, how many are `anchored`, and how many of those are `at_boundary` (depth 0). Empty where
        the window has no common place.
    """
    batch: Any = pair.collate([windows[0]])
    sides = {
        "student": _tokens_of_spans(pair, "student", batch.student_ids[0], batch.student_spans[0]),
        "teacher": _tokens_of_spans(pair, "teacher", batch.teacher_ids[0], batch.teacher_spans[0]),
    }

    # Whole spans, up to the end of a sentence.
    spans = []
    shown: list[int] = []
    for span, (positions, texts) in sides["student"].items():
        _, teacher_texts = sides["teacher"].get(span, ([], []))
        spans.append({"student": texts, "teacher": teacher_texts})
        shown += positions
        ends_sentence = "".join(texts).rstrip(" ").endswith(SENTENCE_ENDS)
        if len(shown) >= MOST_TOKENS or (len(shown) >= LEAST_TOKENS and ends_sentence):
            break
    if not spans:
        return {}

    # A row of the batch is a position with an anchor.
    anchored = np.isin(batch.row_student.numpy(), shown)
    at_boundary = anchored & (batch.depth.numpy() == 0)
    return {
        "spans": spans,
        "tokens": len(shown),
        "anchored": int(anchored.sum()),
        "at_boundary": int(at_boundary.sum()),
    }


def _tokens_of_spans(pair: Pair, side: Side, ids: Any, spans: Any) -> dict[int, tuple[list[int], list[str]]]:
    """Return (positions that predict the tokens, their texts) of each span, in the order of the text."""
    table = pair.encoder.tables[("student", "teacher").index(side)]
    by_span: dict[int, tuple[list[int], list[str]]] = {}

    # The token of a span is the one after the position that predicts it; the end of a text has no bytes.
    for position, (span, token) in enumerate(zip(spans[:-1].tolist(), ids[1:].tolist(), strict=True)):
        spelling = table.bytes[token] if token < len(table.bytes) else None
        if span >= 0 and spelling is not None:
            positions, texts = by_span.setdefault(span, ([], []))
            positions.append(position)
            texts.append(spelling.decode("utf-8", "replace"))
    return dict(sorted(by_span.items()))


# ---------------------------------------------------------------------------------------- differences


def differences(
    held_out: HeldOut, pair: Pair, student: nn.Module, find: Callable[[Any, int], Sequence[Any]]
) -> list[dict[str, Any]]:
    """Return the places of the held-out text where student and teacher differ most, the largest difference first.

    All processes compute it, on the same windows, since each may hold a part of a model alone.

    Args:
        student: after training; in float32 and evaluation mode meanwhile.
        find: (batch, most) -> `models.types.Difference`, one of a window at most.
    """
    accelerator: Accelerator = held_out.accelerator
    rows: list[dict[str, Any]] = []

    def search(indices: Sequence[int]) -> list[dict[str, Any]]:
        batch = held_out.collate([held_out.windows[index] for index in indices])
        batch = batch.to(accelerator.device)
        return [_described(pair, batch, difference) for difference in find(batch, MOST_DIFFERENCES)]

    # In one process a batch that does not fit into memory is halved.
    parts = FittingParts(held_out.batch_size, survives=accelerator.num_processes == 1)
    first_windows = range(min(len(held_out.windows), SEARCHED_WINDOWS))
    with float32_evaluation(student):
        for part in parts.of(first_windows, search):
            rows += part
    return sorted(rows, key=lambda row: -row["kl"])[:MOST_DIFFERENCES]


def _described(pair: Pair, batch: Any, difference: Any) -> dict[str, Any]:
    """Return a difference in words: the text before it, how it goes on, and the likeliest tokens of both."""
    tokenizer = pair.tokenizers["student"]
    ids = batch.student_ids[difference.window].tolist()
    label = int(batch.labels[difference.window, difference.position])

    # A window may hold several texts: the one before is no context.
    before = ids[: difference.position + 1]
    for start in range(len(before) - 1, -1, -1):
        if before[start] == batch.end_of_text[0]:
            before = before[start + 1 :]
            break

    def guesses(tokens: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"text": _spelling(pair, token), "probability": round(share, 4)} for token, share in tokens]

    return {
        "context": tokenizer.decode(before, skip_special_tokens=True)[-CONTEXT:],
        "next": _spelling(pair, label),
        "kl": difference.kl,
        "teacher": guesses(difference.teacher),
        "student": guesses(difference.student),
    }


def _spelling(pair: Pair, token: int) -> str:
    """Return the text of a student's token; of a marker, its name."""
    table = pair.encoder.tables[0]
    spelling = table.bytes[token] if token < len(table.bytes) else None
    if spelling is not None:
        return spelling.decode("utf-8", "replace")
    name = table.tokens[token] if token < len(table.tokens) else None
    return name or f"<token {token}>"
