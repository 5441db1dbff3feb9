"""Texts -> windows that both models can read -> PairedBatch.

`PairEncoder` tokenises documents with both tokenizers and packs them into windows; `PairCollator` aligns the two
readings of each window and pads. A window starts with each model's start marker and begins and ends on a common
boundary. Where a document is continued from the window before, its last span is read again, unsupervised, so that
every byte of text is supervised exactly once.

Within a window, byte offsets count text, one pseudo-byte for each end of text, and one slot before each document
for the space that some tokenizers put there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..config import RouterConfig
from ..types import IGNORE, LEAST_RELATED, Anchors, PairedBatch, Source
from ..validation import expect, expect_count
from .alignment import Alignment, align, paired_tokens
from .tokens import MARKER, MISMATCH, WRITTEN, Reading
from .vocabulary import VocabularyMap
from .windows import BEHIND, SIDES, _reading


def _comparable(reading: Reading) -> Reading:
    """The reading as it is aligned: markup, which one model alone writes, stands for no bytes of the other's text."""
    return reading._replace(roles=np.where(reading.roles == WRITTEN, MISMATCH, reading.roles))


def read_and_learned(window: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens that the student reads of a window, those of its encoder first; whether it learns to predict each)."""
    source = np.asarray(window.get("student_source", []), dtype=np.int64)
    ids, roles = np.asarray(window["student_ids"]), np.asarray(window["student_roles"])
    return np.append(source, ids), np.append(np.zeros(len(source), dtype=bool), roles != MARKER)


def count_channel(windows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(teacher tokens, student tokens) that start at the same byte, over windows: for `VocabularyMap.with_channel`."""
    pairs = [paired_tokens(*(_comparable(_reading(window, side)) for side in SIDES)) for window in windows]
    return tuple(np.concatenate(side) for side in zip(*pairs, strict=True))


class PairCollator:
    """Windows -> PairedBatch. NumPy up to the last step, so that it runs in the workers of a DataLoader.

    Args:
        vocabulary: spellings of the teacher's tokens.
        end_of_text: end-of-text ids of student and teacher (`PairEncoder.end_of_text`).
        max_depth: how many student tokens into a teacher token a position may lie and still be anchored.
        router: what the router samples; None leaves its part of the batch out.

    Raises:
        TypeError, ValueError: an argument of another kind, or a negative depth.
    """

    def __init__(
        self,
        vocabulary: VocabularyMap,
        end_of_text: tuple[int | None, int | None],
        max_depth: int,
        router: RouterConfig | None = None,
    ) -> None:
        expect("vocabulary", vocabulary, VocabularyMap, "the pair's VocabularyMap")
        ids = end_of_text if isinstance(end_of_text, tuple | list) else ()
        if len(ids) != 2 or not all(i is None or isinstance(i, int) for i in ids):
            raise TypeError(f"end_of_text: got {end_of_text!r}, expected that of the encoder: PairEncoder.end_of_text")
        if router is not None:
            expect("router", router, RouterConfig, "a RouterConfig, or None")

        self.vocabulary_sizes = (vocabulary.student_vocab_size, len(vocabulary.order))
        for side, token, rows in zip(SIDES, ids, self.vocabulary_sizes, strict=True):
            if token is not None and not 0 <= token < rows:
                raise ValueError(
                    f"end_of_text: got {token} for the {side}, expected a token of the vocabulary map, which has "
                    f"{rows:,}; PairEncoder.end_of_text has the right ones"
                )

        self.vocabulary = vocabulary
        self.end_of_text = end_of_text
        self.max_depth = expect_count("max_depth", max_depth, 0)
        self.router = router

    def __call__(self, windows: Sequence[dict[str, Any]]) -> PairedBatch:
        if isinstance(windows, Mapping):
            raise TypeError("windows: got one window, expected a list of windows; put it in brackets: [window]")
        if not len(windows):
            raise ValueError("windows: got none, expected at least 1")
        for number, window in enumerate(windows):
            _check_window(number, window)

        readings = [[_reading(w, side) for w in windows] for side in SIDES]
        sources = [[w.get(f"{side}_source") for w in windows] for side in SIDES]
        for side, rows, of_side, read in zip(SIDES, self.vocabulary_sizes, readings, sources, strict=True):
            decoded = [reading.ids for reading in of_side]
            _check_ids(side, [*decoded, *(ids for ids in read if ids is not None)], rows)

        aligned = [
            align(_comparable(student), _comparable(teacher), self.vocabulary, self.max_depth)
            for student, teacher in zip(*readings, strict=True)
        ]
        padded, markup = {}, {}
        for side, rows in zip(SIDES, readings, strict=True):
            padded[f"{side}_ids"] = _pad([r.ids for r in rows], 0)
            padded[f"{side}_mask"] = _pad([np.ones_like(r.ids) for r in rows], 0)
            supervised = [np.where(r.roles[1:] != MARKER, r.ids[1:], IGNORE) for r in rows]
            padded[f"{side}_labels"] = _pad([np.append(labels, IGNORE) for labels in supervised], IGNORE)
            markup[f"{side}_markup"] = _markup_positions(rows, padded[f"{side}_ids"].shape[1])
        padded["labels"] = padded.pop("student_labels")
        rows = _stack(aligned, padded["student_ids"].shape[1], padded["teacher_ids"].shape[1])
        rows["supervised"] = np.flatnonzero(padded["labels"] != IGNORE)
        rows["row_supervised"] = np.searchsorted(rows["supervised"], rows["row_student"])
        asked, host = _asked(rows, padded["teacher_mask"])
        counts = {
            "lm": len(rows["supervised"]),
            "kd": len(rows["row_student"]),
            "depth0": int((rows["depth"] == 0).sum()),
            "span": sum(a.spans for a in aligned),
        }
        anchors = None
        if self.router is not None:
            anchors, compared = _anchors(readings, aligned, padded, self.router)
            counts |= compared
        return PairedBatch(
            **{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in (padded | rows | asked | markup).items()},
            **host,
            **{f"{side}_source": _source(read) for side, read in zip(SIDES, sources, strict=True)},
            counts=counts,
            anchors=anchors,
            bytes=torch.tensor([int(w["bytes"]) for w in windows], dtype=torch.int64),
            end_of_text=self.end_of_text,
            documents=[str(w["documents"]) for w in windows],
            vocabulary_sizes=self.vocabulary_sizes,
        )


def _check_window(number: int, window: Any) -> None:
    """Refuse what no encoder has made."""
    expected = "one that an encoder made: PairEncoder(...).windows(texts)"
    if not isinstance(window, Mapping):
        raise TypeError(f"windows[{number}]: got a {type(window).__name__}, expected {expected}")

    columns = [f"{side}_{column}" for side in SIDES for column in Reading._fields]
    lacking = [name for name in [*columns, "bytes", "documents"] if name not in window]
    if lacking:
        raise ValueError(f"windows[{number}]: got a window without {', '.join(lacking)}, expected {expected}")


def _check_ids(side: str, ids: Sequence[np.ndarray], rows: int) -> None:
    """Refuse tokens that the vocabulary map lacks; on a GPU, in the embedding, they would end the process."""
    low = min((int(np.min(some)) for some in ids if len(some)), default=0)
    high = max((int(np.max(some)) for some in ids if len(some)), default=0)
    if low < 0 or high >= rows:
        raise ValueError(
            f"windows: got token {low if low < 0 else high} for the {side}, of which the vocabulary map has {rows:,}; "
            "expected windows and map of the same pair, or are student and teacher swapped?"
        )


def _markup_positions(readings: list[Reading], width: int) -> np.ndarray:
    """Flat positions, in rows of `width`, that predict markup."""
    empty = np.zeros(0, dtype=np.int64)
    rows = [np.flatnonzero(reading.roles[1:] == WRITTEN) + row * width for row, reading in enumerate(readings)]
    return np.concatenate([empty, *rows])


def _pad(rows: list[np.ndarray], value: int) -> np.ndarray:
    out = np.full((len(rows), max([1, *map(len, rows)])), value, dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def _source(rows: list[np.ndarray | None]) -> Source | None:
    if rows[0] is None:
        return None
    ids, mask = (torch.from_numpy(_pad(some, 0)) for some in (rows, [np.ones_like(row) for row in rows]))
    return Source(ids, None if mask.all() else mask)  # decided here, where no device has to be waited for


def _stack(aligned: list[Alignment], student_width: int, teacher_width: int) -> dict[str, np.ndarray]:
    """The alignments of all windows as flat indices into the padded batch."""
    empty = [np.zeros(0, dtype=np.int64)]
    rows = {
        "row_student": [a.student + b * student_width for b, a in enumerate(aligned)],
        "row_teacher": [a.teacher + b * teacher_width for b, a in enumerate(aligned)],
        **{name: [getattr(a, name) for a in aligned] for name in ("depth", "prefix_lo", "prefix_hi", "pieces")},
    }
    flat = {name: np.concatenate([*empty, *parts]).astype(np.int64) for name, parts in rows.items()}
    first = np.cumsum([0, *(a.spans for a in aligned)])
    for side in SIDES:
        spans = [getattr(a, f"{side}_spans") for a in aligned]
        flat[f"{side}_spans"] = _pad([np.where(s >= 0, s + n, -1) for s, n in zip(spans, first[:-1], strict=True)], -1)
    return flat | {
        f"{side}_spans": _widen(flat[f"{side}_spans"], width)
        for side, width in zip(SIDES, (student_width, teacher_width), strict=True)
    }


def _asked(rows: dict[str, np.ndarray], mask: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """In which order the teacher's positions are asked for their distributions: (for the device, for the host)."""
    held = np.flatnonzero(mask)
    anchors, row_asked = np.unique(np.searchsorted(held, rows["row_teacher"]), return_inverse=True)
    others = np.delete(np.arange(len(held)), anchors)
    deep = np.flatnonzero(rows["depth"])
    before = np.searchsorted(row_asked[deep], np.arange(len(anchors) + 1))
    width = (rows["prefix_hi"] - rows["prefix_lo"])[deep]
    device = {"teacher_held": held, "asked": np.append(anchors, others), "row_asked": row_asked, "deep": deep}
    return device, {"deep_before": before, "deep_width": width}


def _widen(rows: np.ndarray, width: int) -> np.ndarray:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=-1)


def _anchors(
    readings: list[list[Reading]], aligned: list[Alignment], padded: dict[str, np.ndarray], router: RouterConfig
) -> tuple[Anchors, dict[str, int]]:
    """What the router compares in a batch, and how many items each of its terms has."""
    widths = [padded[f"{side}_ids"].shape[1] for side in SIDES]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("student", "teacher", "window", "run")}
    sampled, queries, attends = [], [], []
    total = runs = 0
    for b, (a, s, t) in enumerate(zip(aligned, *readings, strict=True)):
        at = np.flatnonzero((a.depth == 0) & (a.student > 0) & (a.teacher > 0))
        in_runs = max(1, round(len(at) / router.span)) if len(at) else 0
        columns["student"].append(a.student[at] + b * widths[0])
        columns["teacher"].append(a.teacher[at] + b * widths[1])
        columns["window"].append(np.full(len(at), b))
        columns["run"].append(runs + np.arange(len(at)) * in_runs // max(len(at), 1))
        chosen = np.unique(np.linspace(0, len(at) - 1, min(len(at), router.positions)).round().astype(np.int64))
        token = a.student[at[chosen]]
        query = np.stack([s.starts[token], s.ends[token]], 1)
        seen = t.ends[None, 1:] <= query[:, 1:]
        overlap = np.minimum(t.ends[None, 1:], query[:, 1:]) - np.maximum(t.starts[None, 1:], query[:, :1])
        sampled.append(total + chosen)
        queries.append(query)
        attends.append((seen.sum(1) > 1) & ((overlap > 0) & seen).any(1))
        total += len(at)
        runs += in_runs
    anchors = Anchors(
        **{name: torch.from_numpy(np.concatenate(parts).astype(np.int64)) for name, parts in columns.items()},
        sampled=torch.from_numpy(_pad(sampled, -1)),
        query_bytes=torch.from_numpy(np.stack([_pad([q[:, i] for q in queries], 0) for i in range(2)], -1)),
        key_bytes=torch.from_numpy(np.stack([_pad([r[i] for r in readings[1]], BEHIND) for i in (1, 2)], -1)),
        attends=torch.from_numpy(_pad(attends, 0).astype(bool)),
        runs=runs,
    )
    return anchors, {
        "feat": total,
        "layer": total,
        "rel": sum(len(chosen) >= LEAST_RELATED for chosen in sampled),
        "attn": int(anchors.attends.sum()),
        "contr": runs,
    }
