"""Views of single tokens for the report: a sentence as both models read it, and places where they differ most."""

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from ..evaluation.held_out import HeldOut
from ..evaluation.scores import float32_evaluation
from ..interfaces import Pair, Side
from ..machine.device_memory import FittingParts

SEARCHED_WINDOWS = 16
"""Windows of the held-out text that are searched for differences: some are enough, and all would take minutes."""

MOST_DIFFERENCES = 6

CONTEXT = 240
"""Characters that are shown before a place, at most."""

SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f", "\n")

CONTEXT_ROLE = 0
"""Role, in a window, of start markers and of what the window before has had already."""

MOST_MARKED = 160
"""Tokens of the text in which the positions that KD is learned at are marked."""

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
    window = windows[0]
    batch: Any = pair.collate([window])
    sides = {
        "student": _tokens_of_spans(pair, "student", window, batch.student_spans[0]),
        "teacher": _tokens_of_spans(pair, "teacher", window, batch.teacher_spans[0]),
    }

    # Whole spans, up to the end of a sentence.
    spans = []
    shown: list[int] = []
    for span in sorted({-1, *sides["student"]} & {*sides["student"], *sides["teacher"]}):
        positions, texts = sides["student"].get(span, ([], []))
        _, teacher_texts = sides["teacher"].get(span, ([], []))
        spans.append({"student": texts, "teacher": teacher_texts})
        shown += positions
        ends_sentence = "".join(texts).rstrip(" ").endswith(SENTENCE_ENDS)
        if len(shown) >= MOST_TOKENS or (len(shown) >= LEAST_TOKENS and ends_sentence):
            break
    if not any(span["student"] for span in spans):
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


def _tokens_of_spans(
    pair: Pair, side: Side, window: Mapping[str, Any], spans: Any
) -> dict[int, tuple[list[int], list[str]]]:
    """Return (positions that predict the tokens, their texts) of each span, in the order of the text.

    Under -1 is what stands before the first span: text that one of the models reads and does not predict.
    """
    table = pair.encoder.tables[("student", "teacher").index(side)]
    by_span: dict[int, tuple[list[int], list[str]]] = {}
    tokens = zip(window[f"{side}_ids"], window[f"{side}_roles"], strict=True)
    for index, (token, role) in enumerate(tokens):
        # A token belongs to the position before it, which predicts it.
        span = int(spans[index - 1]) if index > 0 else -1
        is_before_all = span < 0 and not any(number >= 0 for number in by_span)
        spelling = table.bytes[token] if token < len(table.bytes) else None

        # Markers have no bytes; context was shown to the model before.
        is_text = role != CONTEXT_ROLE and spelling is not None
        if is_text and (span >= 0 or is_before_all):
            positions, texts = by_span.setdefault(span, ([], []))
            positions.append(index - 1)
            texts.append(spelling.decode("utf-8", "replace"))
    return dict(sorted(by_span.items()))


# ------------------------------------------------------------------------------------ chosen positions


def chosen(pair: Pair, window: Mapping[str, Any], positions: Sequence[int]) -> list[tuple[str, bool]]:
    """Return the first tokens of a window: the text of each, and True if KD is learned at it.

    Args:
        positions: those of the window that predict a token which KD is learned at.
    """
    table = pair.encoder.tables[0]
    is_chosen = set(positions)

    # A character may be spelt by several tokens: it is shown with the last of them, marked if one of them is.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens: list[tuple[str, bool]] = []
    is_marked = False
    for index, (token, role) in enumerate(zip(window["student_ids"], window["student_roles"], strict=True)):
        spelling = table.bytes[token] if token < len(table.bytes) else None
        if role == CONTEXT_ROLE or spelling is None:
            continue
        # A token is predicted at the position before it.
        is_marked = is_marked or index - 1 in is_chosen
        if text := decoder.decode(spelling):
            tokens.append((text, is_marked))
            is_marked = False
    return tokens[:MOST_MARKED]


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
