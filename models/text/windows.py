"""Windows of text that both tokenizers read."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..validation import expect_count, expect_texts
from .tokens import END, FORMAT, MARKER, Reading, TokenTable

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
    """Tokens that plain text starts with; None: see `models.text.text_start`."""


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
