"""Texts -> windows that both models can read -> PairedBatch.

`PairEncoder` tokenises documents with both tokenizers and packs them into windows; `PairCollator` aligns the two
readings of each window and pads. A window starts with each model's start marker and begins and ends on a common
boundary. Where a document is continued from the window before, its last span is read again, unsupervised, so that
every byte of text is supervised exactly once.

Within a window, byte offsets count text, one pseudo-byte for each end of text, and one slot before each document
for the space that some tokenizers put there.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..config import RouterConfig
from ..types import IGNORE, LEAST_RELATED, Anchors, PairedBatch, Source
from ..validation import expect, expect_count, expect_texts
from .alignment import Alignment, align, paired_tokens
from .vocabulary import END, FORMAT, MARKER, MISMATCH, WRITTEN, Reading, TokenTable, VocabularyMap

SIDES = ("student", "teacher")
BEHIND = 2**40
"""A byte behind every text."""


@dataclass(frozen=True)
class Piece:
    """A part of a document that fits into a window, with what is read before it."""

    document: str
    readings: list[Reading]  # per side; the lead has role MARKER
    first_byte: int
    last_byte: int
    text_bytes: int
    unspelt: tuple[int, int]  # per side, bytes of text that the tokens do not say
    left_out: int
    whole: bool  # ends with the document's end

    @property
    def size(self) -> np.ndarray:
        return np.array([len(r.ids) for r in self.readings])


@dataclass(frozen=True)
class ModelFacts:
    """What the windows of a pair depend on besides the two tokenizers: student and teacher in this order."""

    rows: tuple[int | None, int | None] = (None, None)
    """Of the heads; None: as many as tokens."""
    text_starts: tuple[str | None, str | None] = (None, None)
    """Tokens that plain text starts with; None: see `models.text_start`."""


ANY_MODEL = ModelFacts()
"""Models of which nothing is known but their tokenizers."""


class PairEncoder:
    """Documents -> windows of at most `max_length` tokens in either tokenizer.

    Attributes:
        tables: of student and teacher.
        starts: per side, the ids that are read before a text.

    Raises:
        TypeError: if a tokenizer is none.
        ValueError: if a tokenizer does not fit (see `TokenTable`), or `max_length` is below 8.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        facts: ModelFacts = ANY_MODEL,
    ) -> None:
        max_length = expect_count("max_length", max_length, 8, "raise --max-length")
        pair = (student_tokenizer, teacher_tokenizer)
        self.tables = tuple(
            TokenTable(tokenizer, rows, start, name=f"the {side}'s tokenizer")
            for side, tokenizer, rows, start in zip(SIDES, pair, facts.rows, facts.text_starts, strict=True)
        )
        self.max_length = max_length
        self.end_of_text = tuple(table.end_of_text for table in self.tables)
        # what is read before a text
        self.starts = [[] if table.start_marker is None else [table.start_marker] for table in self.tables]
        # the end of a document then marks the start of the next one
        self._end_is_start = tuple(t.start_marker is not None and t.start_marker == t.end_of_text for t in self.tables)
        parts = [str(FORMAT), *(table.fingerprint for table in self.tables), str(max_length)]
        self.fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def canonical(self, text: str) -> str:
        """The text that both models are given: valid Unicode, normalised where one of the tokenizers would."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for table in self.tables:
            text = table.normalise(text)
        return text

    def windows(self, texts: list[str], documents: list[str] | None = None) -> list[dict[str, Any]]:
        """Pack documents into windows.

        A document is cut only where it is longer than a window: a model that meets the middle of a text after
        another text predicts worse (docs/experiments.md).

        Args:
            texts: documents; empty ones are skipped.
            documents: a name for each, for messages.

        Returns:
            one dictionary per window: `student_ids`, `student_starts`, `student_ends`, `student_roles`, the same for
            `teacher`, `bytes` (supervised bytes of text), `student_unspelt` and `teacher_unspelt` (how many of these
            the tokens do not say: dropped or unknown text), `left_out` (bytes skipped, because the two tokenizations
            had no common boundary for longer than a window), `documents` (names, joined by commas).

        Raises:
            TypeError: a single text in place of a list, or something in the list that is no text.
        """
        expect_texts(texts, documents)
        names = documents or [""] * len(texts)
        kept = [(name, text) for name, text in zip(names, map(self.canonical, texts), strict=True) if text]
        readings = zip(*(table.read([text for _, text in kept]) for table in self.tables), strict=True)
        pieces, at_ends = [], 0
        for (name, text), pair in zip(kept, readings, strict=True):
            found, left_out = self._pieces(name, len(text.encode()), pair)
            pieces += found
            at_ends += left_out
        return self.packed(pieces, at_ends)

    def least_length(self, text: str) -> int | None:
        """Return how many tokens a window must hold before anything of a document can be learned, by the model that
        needs more of them; None if nothing of it can be learned however long a window is."""
        boundless = copy.copy(self)
        boundless.max_length = BEHIND
        windows = boundless.windows([text])
        if not windows:
            return None

        ends, lengths = [], [0]
        for side in SIDES:
            reading = _reading(windows[0], side)
            ends.append(np.where(reading.roles != MARKER, reading.ends, -1))
            lengths.append(len(windows[0].get(f"{side}_source", [])))
        common = np.intersect1d(*ends)
        common = common[common >= 0]
        if not len(common):
            return None

        first = common[0]
        lengths += [int(np.flatnonzero(side == first)[0]) + 1 for side in ends]
        return max(lengths)

    prompt: Callable[[str, str], tuple[str, list[int]]] | None = None
    """(document, side) -> what is asked last in it and the ids up to the answer, where documents are conversations."""

    day: date | None = None
    """That on which all documents are read, where what a model reads depends on it."""

    def notes(self, texts: Iterable[str]) -> list[str]:
        """What is worth knowing of documents before they are learned from, in words."""
        return []

    def packed(self, pieces: list[Piece], left_out: int) -> list[dict[str, Any]]:
        """Windows of pieces; `left_out` counts bytes that are in none of them."""
        windows = [self._assemble(group) for group in self._group(pieces)]
        if windows:
            windows[-1]["left_out"] += left_out
        return windows

    def _pieces(self, name: str, size: int, pair: Sequence[Reading]) -> tuple[list[Piece], int]:
        """A document of `size` bytes cut into pieces that fill a window each, and the bytes left out at its end."""
        pair = [self._end(reading, size, side) for side, reading in enumerate(pair)]
        cuts = _common_cuts(pair, size)
        pieces, left_out = [], 0
        # without a start marker the first span of a document is read, not predicted
        at = 0 if all(self.starts) else 1
        while at < len(cuts) - 1:
            lead = max(at - 1, 0)
            room = [self.max_length - len(start) for start in self.starts]
            fits = ((cuts[at:, 1:] - cuts[lead, 1:]) <= room).all(1)
            to = at + int(np.flatnonzero(fits).max(initial=0))
            text_bytes = int(np.diff(np.clip(cuts[[at, max(to, at + 1)], 0], 0, size))[0])
            if to == at:
                left_out += text_bytes
                at += 1
                continue
            readings = [self._lead(pair[i], i, cuts[[lead, at, to], 1 + i], cuts[lead, 0]) for i in range(2)]
            spelt = [self._spelt(i, pair[i].part(cuts[at, 1 + i], cuts[to, 1 + i]), [-1]) for i in range(2)]
            pieces.append(
                Piece(
                    document=name,
                    readings=readings,
                    first_byte=int(cuts[lead, 0]),
                    last_byte=int(cuts[to, 0]),
                    text_bytes=text_bytes,
                    unspelt=(text_bytes - spelt[0], text_bytes - spelt[1]),
                    left_out=left_out,
                    whole=to == len(cuts) - 1,
                )
            )
            at, left_out = to, 0
        return pieces, left_out

    def _spelt(self, side: int, reading: Reading, slots: Sequence[int] | np.ndarray) -> int:
        """Bytes of a text that a side's tokens say; a space in one of the slots before a text is no part of it."""
        spelt = self.tables[side].spelt(reading)
        in_front = np.isin(reading.starts, slots) & (spelt > 0)
        return int(spelt.sum() - in_front.sum())

    def _lead(self, reading: Reading, side: int, cuts: np.ndarray, first_byte: int) -> Reading:
        """Start markers, context cuts[0]..cuts[1] (read, not predicted) and text up to cuts[2]."""
        ids = np.array(self.starts[side], dtype=np.int64)
        where = np.full(len(ids), first_byte)
        body = reading.part(cuts[0], cuts[2])
        body = body._replace(roles=np.where(np.arange(len(body.ids)) < cuts[1] - cuts[0], MARKER, body.roles))
        mark = Reading(ids, where, where, np.full(len(ids), MARKER, dtype=np.int8))
        return Reading(*(np.concatenate(c) for c in zip(mark, body, strict=True)))

    def _group(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Pieces that share a window, largest first into the fullest window that has room for them."""
        groups, room = [], np.empty((len(pieces), 2), dtype=np.int64)
        for piece in sorted(pieces, key=lambda p: -p.size.max()):
            left = room[: len(groups)] - piece.size
            fits = np.flatnonzero((left >= 0).all(1)) if piece.whole else []
            if len(fits):
                best = fits[left[fits].max(1).argmin()]
                groups[best].append(piece)
                room[best] = left[best]
            else:
                # only the end of a document can be followed by another one
                room[len(groups)] = self.max_length - piece.size if piece.whole else -1
                groups.append([piece])
        return groups

    def _assemble(self, group: list[Piece]) -> dict[str, Any]:
        window: dict[str, Any] = {
            "bytes": sum(p.text_bytes for p in group),
            "left_out": sum(p.left_out for p in group),
            "documents": ",".join(p.document for p in group),
        }
        for side, name in enumerate(SIDES):
            window[f"{name}_unspelt"] = sum(p.unspelt[side] for p in group)
        base = np.cumsum([0, *(p.last_byte - p.first_byte for p in group)])
        for side, name in enumerate(SIDES):
            parts = []
            for n, piece in enumerate(group):
                reading, shift = piece.readings[side], base[n] - piece.first_byte
                if n > 0 and self._end_is_start[side]:
                    reading = reading.part(1, len(reading.ids))
                parts.append(reading._replace(starts=reading.starts + shift, ends=reading.ends + shift))
            for column, values in zip(Reading._fields, zip(*parts, strict=True), strict=True):
                kind = np.int8 if column == "roles" else np.int32
                window[f"{name}_{column}"] = np.concatenate(values).astype(kind)
        return window

    def _end(self, reading: Reading, size: int, side: int) -> Reading:
        """The reading with an end-of-text token, one pseudo-byte after the text."""
        eot = self.tables[side].end_of_text
        if eot is None:
            return reading
        return Reading(*(np.append(c, v) for c, v in zip(reading, (eot, size, size + 1, END), strict=True)))


def _common_cuts(pair: list[Reading], size: int) -> np.ndarray:
    """[C, 3] places where a document can be cut: byte offset, student tokens before it, teacher tokens before it."""
    s, t = pair
    _, i, j = np.intersect1d(s.starts, t.starts, return_indices=True)
    inner = np.stack([s.starts[i], i, j], axis=1)
    inner = inner[(i > 0) & (j > 0)]
    return np.concatenate([[[-1, 0, 0]], inner, [[size + 1, len(s.ids), len(t.ids)]]]).astype(np.int64)


def _reading(window: dict[str, Any], side: str) -> Reading:
    return Reading(*(np.asarray(window[f"{side}_{column}"], dtype=np.int64) for column in Reading._fields))


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
