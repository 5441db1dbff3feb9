"""Windows: documents as token ids of both tokenizers, cut and packed to the length that both models read.

A document is cut where a token of the student and a token of the teacher begin at the same byte. A window holds
pieces of documents, each behind the start markers of its two models. A piece that goes on from an earlier window
reads the span before it again, unsupervised, so that every byte of text is supervised exactly once.

Byte offsets in a window count the text, one pseudo-byte for each end of text, and one slot before each document for
the space that some tokenizers put there.

Shapes: T tokens of a reading, C common cuts of a document.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import reduce
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..validation import expect_count, expect_texts
from .tokens import FORMAT, MARKER, Reading, TokenTable

SIDES = ("student", "teacher")


def sides_of(count: int) -> tuple[str, ...]:
    """Return the names of `count` sides: student, teacher, teacher_2, teacher_3, ..."""
    return (*SIDES, *(f"teacher_{number}" for number in range(2, count)))


OWN = "own"
"""Column of a window that the student wrote itself (`models.text.own_text`)."""

BEHIND = 2**40
"""A byte behind every text."""


@dataclass(frozen=True)
class Piece:
    """A part of a document that fits into a window, with the tokens that are read before it."""

    document: str
    """Name of the document, for messages."""
    readings: list[Reading]
    """Tokens of each side; those read before the part have role MARKER."""
    first_byte: int
    """Byte of the document at which the readings begin; -1: the slot before the text."""
    last_byte: int
    """Byte of the document at which the readings end, the pseudo-byte of the end of text included."""
    text_bytes: int
    """Supervised bytes of text."""
    unspelt: tuple[int, ...]
    """For each side, how many of these bytes its tokens do not say."""
    left_out: int
    """Bytes before the part that are in no window."""
    whole: bool
    """True if the part ends where the document ends."""

    @property
    def size(self) -> np.ndarray:
        """[sides] numbers of tokens."""
        return np.array([len(reading.ids) for reading in self.readings])


@dataclass(frozen=True)
class ModelFacts:
    """Facts about the models, the student and then its teacher or teachers, that their tokenizers do not tell."""

    rows: tuple[int | None, ...] = (None, None)
    """Rows of the heads; None: as many as tokens."""
    text_starts: tuple[str | None, ...] = (None, None)
    """Tokens that plain text starts with; None: see `models.text.text_start`."""


ANY_MODEL = ModelFacts()
"""Models of which nothing is known but their tokenizers."""


@dataclass(frozen=True)
class _Document:
    """A tokenised document, and the places where it can be cut."""

    name: str
    size: int
    """Bytes of text."""
    readings: list[Reading]
    """Tokens of each side, with an end of text where the tokenizer has one."""
    cuts: np.ndarray
    """[C, 1 + sides] see `_common_cuts`."""

    def text_bytes(self, first: int, last: int) -> int:
        """Count the bytes of text between two cuts: neither the slot in front nor the pseudo-byte at the end."""
        bytes_of_cuts = self.cuts[[first, last], 0]
        begin, end = np.clip(bytes_of_cuts, 0, self.size)
        return int(end - begin)


class PairEncoder:
    """Documents -> windows of at most `max_length` tokens in each tokenizer.

    Args:
        further: tokenizers of more teachers, for text that several of them read: it is cut where all tokenizers agree.

    Attributes:
        side_names: of the sides: student, teacher and, with further ones, teacher_2, ...
        tables: of each side.
        starts: per side, the ids that are read before a text.

    Raises:
        TypeError: if a tokenizer is none.
        ValueError: if a tokenizer does not fit (see `TokenTable`), or `max_length` is below 8.
    """

    prompt: Callable[[str, str], tuple[str, list[int]]] | None = None
    """(document, side) -> the last question in it and the ids up to the answer, where documents are conversations."""

    day: date | None = None
    """Day on which all documents are read, where the text that a model reads depends on it."""

    isolates: bool = False
    """Windows name the token at which each of their documents begins, so that models read each by itself."""

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        facts: ModelFacts = ANY_MODEL,
        *,
        further: Sequence[PreTrainedTokenizerBase] = (),
    ) -> None:
        max_length = expect_count("max_length", max_length, 8, "raise --max-length")

        tokenizers = (student_tokenizer, teacher_tokenizer, *further)
        self.side_names = sides_of(len(tokenizers))
        # Of models nobody knows facts about, none is known of the further ones either.
        if facts is ANY_MODEL:
            facts = ModelFacts((None,) * len(tokenizers), (None,) * len(tokenizers))
        self.tables = tuple(
            TokenTable(tokenizer, rows, start, name=f"the {side}'s tokenizer")
            for side, tokenizer, rows, start in zip(
                self.side_names, tokenizers, facts.rows, facts.text_starts, strict=True
            )
        )
        self.max_length = max_length
        student_table, teacher_table, *_ = self.tables
        self.end_of_text = (student_table.end_of_text, teacher_table.end_of_text)
        self.starts = [_start_ids(table) for table in self.tables]

        # A window needs no start marker between two documents where the end of the first is one.
        self._end_is_start = tuple(
            table.start_marker is not None and table.start_marker == table.end_of_text for table in self.tables
        )

        tables = [table.fingerprint for table in self.tables]
        depends_on = " ".join([str(FORMAT), *tables, str(max_length)])
        self.fingerprint = hashlib.sha256(depends_on.encode()).hexdigest()

    def isolated(self) -> "PairEncoder":
        """Return a copy whose windows have `student_begins` and `teacher_begins`: tokens at which documents begin."""
        encoder = copy.copy(self)
        encoder.isolates = True
        # An end of text that the next document cannot see is no start of it.
        encoder._end_is_start = (False,) * len(self.side_names)
        encoder.fingerprint = hashlib.sha256(f"{self.fingerprint} isolated".encode()).hexdigest()
        return encoder

    def beside(self, number: int) -> "PairEncoder":
        """Return the encoder of the student and its teacher of this number (from 0), without the other teachers.

        For what is asked of two tokenizers; windows are cut by the encoder of all, whose fingerprint it keeps.
        """
        pair = copy.copy(self)
        chosen = (0, 1 + number)
        pair.side_names = SIDES
        pair.tables = tuple(self.tables[side] for side in chosen)
        pair.starts = [self.starts[side] for side in chosen]
        pair._end_is_start = tuple(self._end_is_start[side] for side in chosen)
        student_table, teacher_table = pair.tables
        pair.end_of_text = (student_table.end_of_text, teacher_table.end_of_text)
        return pair

    def canonical(self, text: str) -> str:
        """Return the text that all models are given: valid Unicode, normalised where one of the tokenizers would."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for table in self.tables:
            text = table.normalise(text)
        return text

    def windows(
        self,
        texts: list[str],
        documents: list[str] | None = None,
    ) -> list[dict[str, Any]]:
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
        if not documents:
            documents = [""] * len(texts)

        # Normalising may leave nothing of a text.
        names = []
        contents = []
        for name, text in zip(documents, texts, strict=True):
            text = self.canonical(text)
            if text:
                names.append(name)
                contents.append(text)

        # Each tokenizer reads all texts in one batch, which it does in parallel.
        read = [table.read(contents) for table in self.tables]
        pieces = []
        left_out = 0
        for name, text, *readings in zip(names, contents, *read, strict=True):
            size = len(text.encode())
            document_pieces, left_out_at_end = self._pieces(name, size, readings)
            pieces += document_pieces
            left_out += left_out_at_end
        return self.packed(pieces, left_out)

    def least_length(self, text: str) -> int | None:
        """Return the least `max_length` with which something of a document can be learned.

        It counts tokens of the model that needs more of them. None: nothing can be learned, however long windows are.
        """
        # In a window without a limit the whole document is one piece.
        boundless = copy.copy(self)
        boundless.max_length = BEHIND
        windows = boundless.windows([text])
        if not windows:
            return None

        # The first byte at which a supervised token of either side ends.
        window = windows[0]
        ends_of_sides = [_supervised_ends(_reading(window, side)) for side in self.side_names]
        common = reduce(np.intersect1d, ends_of_sides)
        common = common[common >= 0]
        if not len(common):
            return None

        # A window must hold the tokens up to there; an encoder's input must fit as a whole.
        lengths = [len(window.get(f"{side}_source", [])) for side in self.side_names]
        for ends in ends_of_sides:
            token = np.flatnonzero(ends == common[0])[0]
            lengths.append(int(token) + 1)
        return max(lengths)

    def notes(self, texts: Iterable[str]) -> list[str]:
        """Return warnings about documents, for the user to read before a training; none for plain text."""
        return []

    def packed(
        self,
        pieces: list[Piece],
        left_out: int,
    ) -> list[dict[str, Any]]:
        """Return the windows of pieces; `left_out` counts bytes that are in none of them."""
        windows = [self._assemble(group) for group in self._group(pieces)]
        if windows:
            windows[-1]["left_out"] += left_out
        return windows

    # ------------------------------------------------------------ a document -> pieces

    def _pieces(
        self,
        name: str,
        size: int,
        readings: Sequence[Reading],
    ) -> tuple[list[Piece], int]:
        """Cut a document of `size` bytes into pieces that fill a window each; count the bytes left out at its end."""
        readings = [self._with_end(reading, size, side) for side, reading in enumerate(readings)]
        document = _Document(
            name=name,
            size=size,
            readings=readings,
            cuts=_common_cuts(readings, size),
        )
        end = len(document.cuts) - 1

        # Without a start marker nothing stands before the first span of a document: it is read, not predicted.
        first = 0 if all(self.starts) else 1
        pieces = []
        left_out = 0
        while first < end:
            last = self._last_cut_that_fits(document.cuts, first)
            if last == first:
                # Not even one span fits behind its context: it is skipped, and is the context of the next.
                left_out += document.text_bytes(first, first + 1)
                first += 1
                continue

            pieces.append(self._piece(document, first, last, left_out=left_out))
            first = last
            left_out = 0
        return pieces, left_out

    def _last_cut_that_fits(self, cuts: np.ndarray, first: int) -> int:
        """Return the last cut at which a piece from cut `first` on can end; `first` if no piece fits."""
        # A piece reads the span before it, too, behind the start markers.
        context = max(first - 1, 0)
        free = [self.max_length - len(start) for start in self.starts]
        lengths = cuts[first:, 1:] - cuts[context, 1:]
        fitting = np.flatnonzero((lengths <= free).all(1))
        return first + int(fitting.max(initial=0))

    def _piece(
        self,
        document: _Document,
        first: int,
        last: int,
        *,
        left_out: int,
    ) -> Piece:
        """Return the part of a document between two cuts, behind the span before it as context."""
        cuts = document.cuts
        context = max(first - 1, 0)
        text_bytes = document.text_bytes(first, last)

        # Columns of the cuts are the byte, the student's tokens, those of each teacher.
        readings = []
        unspelt = []
        for side, reading in enumerate(document.readings):
            begin, middle, end = cuts[[context, first, last], 1 + side]
            behind_start = self._behind_start(
                reading.part(begin, end),
                side,
                context=middle - begin,
                first_byte=cuts[context, 0],
            )
            spelt = self._spelt_bytes(side, reading.part(middle, end), slots=[-1])
            readings.append(behind_start)
            unspelt.append(text_bytes - spelt)

        return Piece(
            document=document.name,
            readings=readings,
            first_byte=int(cuts[context, 0]),
            last_byte=int(cuts[last, 0]),
            text_bytes=text_bytes,
            unspelt=tuple(unspelt),
            left_out=left_out,
            whole=last == len(cuts) - 1,
        )

    def _spelt_bytes(
        self,
        side: int,
        reading: Reading,
        slots: Sequence[int] | np.ndarray,
    ) -> int:
        """Count the bytes of a text that a side's tokens say.

        A token that begins in a slot before a text says a space that is no part of the text.
        """
        spelt = self.tables[side].spelt(reading)
        begins_in_slot = np.isin(reading.starts, slots) & (spelt > 0)
        return int(spelt.sum() - begins_in_slot.sum())

    def _behind_start(
        self,
        reading: Reading,
        side: int,
        context: int,
        first_byte: int,
    ) -> Reading:
        """Return a reading behind the side's start markers; its first `context` tokens become unsupervised, too."""
        is_context = np.arange(len(reading.ids)) < context
        reading = reading._replace(roles=np.where(is_context, MARKER, reading.roles))

        ids = np.array(self.starts[side], dtype=np.int64)
        byte = np.full(len(ids), first_byte)
        start = Reading(
            ids=ids,
            starts=byte,
            ends=byte,
            roles=np.full(len(ids), MARKER, dtype=np.int8),
        )
        return Reading.joined([start, reading])

    def _with_end(
        self,
        reading: Reading,
        size: int,
        side: int,
    ) -> Reading:
        """Return a reading with an end-of-text token, one pseudo-byte after the text."""
        end_of_text = self.tables[side].end_of_text
        if end_of_text is None:
            return reading
        return reading.with_end(end_of_text, size)

    # ------------------------------------------------------------ pieces -> windows

    def _group(self, pieces: list[Piece]) -> list[list[Piece]]:
        """Return the pieces of each window: largest first, into the fullest window with space for them."""
        groups: list[list[Piece]] = []
        # Of windows that others may still join: their tokens left per side, and their groups. No others are looked at,
        # or the time of short windows grew with the square of the text.
        free = np.empty((len(pieces), len(self.side_names)), dtype=np.int64)
        joinable: list[list[Piece]] = []
        for piece in sorted(
            pieces,
            key=lambda piece: piece.size.max(),
            reverse=True,
        ):
            # Only the end of a document can be followed by another document.
            if not piece.whole:
                groups.append([piece])
                continue

            free_after = free[: len(joinable)] - piece.size
            fitting = np.flatnonzero((free_after >= 0).all(1))
            if len(fitting):
                fullest = fitting[free_after[fitting].max(1).argmin()]
                joinable[fullest].append(piece)
                free[fullest] = free_after[fullest]
            else:
                free[len(joinable)] = self.max_length - piece.size
                joinable.append([piece])
                groups.append(joinable[-1])
        return groups

    def _assemble(self, group: list[Piece]) -> dict[str, Any]:
        """Return the window of pieces that share it; its columns are those of `windows`."""
        window: dict[str, Any] = {
            "bytes": sum(piece.text_bytes for piece in group),
            "left_out": sum(piece.left_out for piece in group),
            "documents": ",".join(piece.document for piece in group),
        }
        for side, name in enumerate(self.side_names):
            window[f"{name}_unspelt"] = sum(piece.unspelt[side] for piece in group)

        # The bytes of a piece count on from the end of the piece before it.
        sizes = [piece.last_byte - piece.first_byte for piece in group]
        begins = np.cumsum([0, *sizes])
        for side, name in enumerate(self.side_names):
            readings = []
            for number, piece in enumerate(group):
                reading = piece.readings[side]
                if number > 0 and self._end_is_start[side]:
                    reading = reading.part(1, len(reading.ids))
                readings.append(reading.shifted(begins[number] - piece.first_byte))

            window |= _columns(Reading.joined(readings), name)
            if self.isolates:
                lengths = [len(reading.ids) for reading in readings]
                window[f"{name}_begins"] = np.cumsum([0, *lengths[:-1]]).astype(np.int32)
        return window


def _start_ids(table: TokenTable) -> list[int]:
    return [] if table.start_marker is None else [table.start_marker]


def _common_cuts(readings: Sequence[Reading], size: int) -> np.ndarray:
    """Return the places where a document can be cut.

    Returns:
        [C, 1 + sides] byte offset, tokens of each side before it; the first and the last row are the begin (the slot
        before the text) and the end of the document.
    """
    common = reduce(np.intersect1d, [reading.starts for reading in readings])
    # Of tokens that begin at one byte the first counts.
    columns = [np.intersect1d(common, reading.starts, return_indices=True)[2] for reading in readings]

    # Before the first token of any side there is nothing to cut off.
    inner = np.stack([common, *columns], axis=1)
    inner = inner[(inner[:, 1:] > 0).all(1)]
    begin = [[-1, *(0 for _ in readings)]]
    end = [[size + 1, *(len(reading.ids) for reading in readings)]]
    return np.concatenate([begin, inner, end]).astype(np.int64)


def _supervised_ends(reading: Reading) -> np.ndarray:
    """[T] byte at which each token ends; -1 for tokens that are not supervised."""
    return np.where(reading.roles != MARKER, reading.ends, -1)


def document_begins(window: Mapping[str, Any], side: str) -> np.ndarray:
    """Return [documents] the tokens of a side at which documents begin that models read by themselves."""
    return np.asarray(window.get(f"{side}_begins", [0]), dtype=np.int64)


def _columns(reading: Reading, side: str) -> dict[str, np.ndarray]:
    """Return one side of a window as its columns; `_reading` reads them back."""
    columns = {}
    for column, values in reading._asdict().items():
        kind = np.int8 if column == "roles" else np.int32
        columns[f"{side}_{column}"] = values.astype(kind)
    return columns


def _reading(window: Mapping[str, Any], side: str) -> Reading:
    """Return one side of a window."""
    # int64, since differences of bytes and indices are made of the columns
    columns = {}
    for column in Reading._fields:
        columns[column] = np.asarray(window[f"{side}_{column}"], dtype=np.int64)
    return Reading(**columns)
