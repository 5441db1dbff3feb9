"""Windows of text -> `PairedBatch`: `PairCollator` aligns the two readings of each window and pads.

A window starts with each model's start marker and begins and ends on a common boundary. Where a document is continued
from the window before, its last span is read again, unsupervised, so that every byte of text is supervised exactly
once.

Within a window, byte offsets count text, one pseudo-byte for each end of text, and one slot before each document
for the space that some tokenizers put there.

Shapes: as in `models.types`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import RouterConfig
from ..losses.hidden_state_terms import count_items
from ..types import IGNORE, PairedBatch, Places, Source
from ..validation import expect, expect_count
from .alignment import Alignment, align, paired_tokens
from .anchors import collect_anchors
from .padding import pad_rows
from .tokens import MARKER, MISMATCH, WRITTEN, Reading
from .vocabulary import VocabularyMap
from .windows import OWN, SIDES, _reading, document_begins

Window = Mapping[str, Any]
"""A window as `PairEncoder.windows` makes it."""

PLACES = "places"
"""Column of a window whose positions for KD were chosen before training: the place of each KD row by its score, -1 for
those that are never learned at; see `models.chosen_positions`."""


def read_and_learned(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens that the student reads of a window, those of its encoder first; bool: it learns to predict it)."""
    source = np.asarray(window.get("student_source", []), dtype=np.int64)
    ids = np.asarray(window["student_ids"])
    roles = np.asarray(window["student_roles"])

    # Nothing of a prompt is learned that an encoder reads.
    source_learned = np.zeros(len(source), dtype=bool)
    is_learned = np.append(source_learned, roles != MARKER)
    return np.append(source, ids), is_learned


def count_channel(windows: Sequence[Window]) -> tuple[np.ndarray, np.ndarray]:
    """Return (teacher tokens, student tokens) that start at the same byte, for `VocabularyMap.with_channel`."""
    teacher_tokens = []
    student_tokens = []
    for window in windows:
        student = _comparable(_reading(window, "student"))
        teacher = _comparable(_reading(window, "teacher"))
        teacher_ids, student_ids = paired_tokens(student, teacher)
        teacher_tokens.append(teacher_ids)
        student_tokens.append(student_ids)
    return np.concatenate(teacher_tokens), np.concatenate(student_tokens)


def _comparable(reading: Reading) -> Reading:
    """Return a reading as it is aligned: markup, which one model alone writes, is no text of the other."""
    is_markup = reading.roles == WRITTEN
    return reading._replace(roles=np.where(is_markup, MISMATCH, reading.roles))


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
        self.vocabulary_sizes = (vocabulary.student_vocab_size, len(vocabulary.order))
        _check_end_of_text(end_of_text, self.vocabulary_sizes)
        if router is not None:
            expect("router", router, RouterConfig, "a RouterConfig, or None")

        self.vocabulary = vocabulary
        self.end_of_text = end_of_text
        self.max_depth = expect_count("max_depth", max_depth, 0)
        self.router = router

    def __call__(self, windows: Sequence[Window]) -> PairedBatch:
        """Return some windows as one batch.

        Raises:
            TypeError: something else than a list of windows.
            ValueError: no window, one that no encoder made, or tokens that the vocabulary map does not have.
        """
        _check_windows(windows)
        student = _pad_side(windows, "student", self.vocabulary_sizes[0])
        teacher = _pad_side(windows, "teacher", self.vocabulary_sizes[1])

        # Window by window; the alignment knows nothing of padding.
        aligned = []
        for student_reading, teacher_reading in zip(student.readings, teacher.readings, strict=True):
            student_text = _comparable(student_reading)
            teacher_text = _comparable(teacher_reading)
            aligned.append(align(student_text, teacher_text, self.vocabulary, self.max_depth))
        return self._assemble(windows, student, teacher, aligned)

    def _assemble(
        self,
        windows: Sequence[Window],
        student: "_PaddedSide",
        teacher: "_PaddedSide",
        aligned: list[Alignment],
    ) -> PairedBatch:
        """Return the batch of windows that were padded and aligned."""
        # Losses are divided by the items of a whole step, which have to be known before its first forward.
        supervised = np.flatnonzero(student.labels != IGNORE)
        given = _given_positions(windows, supervised, student.width)
        counts = _count_head_items(given, aligned)
        window_rows = np.array([len(alignment.student) for alignment in aligned])

        # Positions are flat from here on, so that a loss takes what it needs with one index.
        chosen, places = _chosen_rows(windows, aligned)
        rows = _stack_rows(chosen, supervised, student.width, teacher.width)
        # Of no row at all the teacher is asked as if nobody had chosen: its head takes no batch without a position.
        asks_everywhere = places is None or not len(rows.row_student)
        order = _order_teacher(rows, teacher.mask, asks_everywhere)
        anchors = None
        if self.router is not None:
            anchors = collect_anchors(
                readings=(student.readings, teacher.readings),
                aligned=aligned,
                begins=(student.begins, teacher.begins),
                widths=(student.width, teacher.width),
                router=self.router,
            )
            counts |= count_items(anchors)

        text_bytes = [int(window["bytes"]) for window in windows]
        return PairedBatch(
            **student.fields("student"),
            **teacher.fields("teacher"),
            labels=_tensor(student.labels),
            teacher_labels=_tensor(teacher.labels),
            supervised=_tensor(supervised),
            **{name: _tensor(column) for name, column in rows._asdict().items()},
            **order.fields(),
            window_rows=window_rows,
            places=places,
            student_spans=_number_spans([alignment.student_spans for alignment in aligned], aligned),
            teacher_spans=_number_spans([alignment.teacher_spans for alignment in aligned], aligned),
            counts=counts,
            given=None if given.all() else _tensor(given),
            anchors=anchors,
            bytes=torch.tensor(text_bytes, dtype=torch.int64),
            end_of_text=self.end_of_text,
            documents=[str(window["documents"]) for window in windows],
            vocabulary_sizes=self.vocabulary_sizes,
        )


# ---------------------------------------------------------------------------------- what is handed in


def _check_end_of_text(end_of_text: Any, vocabulary_sizes: tuple[int, int]) -> None:
    """Check that there is a token of each vocabulary, or None, for student and teacher."""
    is_pair = isinstance(end_of_text, tuple | list) and len(end_of_text) == 2
    if not is_pair or not all(isinstance(token, int | None) for token in end_of_text):
        raise TypeError(f"end_of_text: got {end_of_text!r}, expected that of the encoder: PairEncoder.end_of_text")

    for side, token, rows in zip(SIDES, end_of_text, vocabulary_sizes, strict=True):
        if token is not None and not 0 <= token < rows:
            raise ValueError(
                f"end_of_text: got {token} for the {side}, expected a token of the vocabulary map, which has "
                f"{rows:,}; PairEncoder.end_of_text has the right ones"
            )


def _check_windows(windows: Any) -> None:
    """Refuse what is no list of windows."""
    if isinstance(windows, Mapping):
        raise TypeError("windows: got one window, expected a list of windows; put it in brackets: [window]")
    if not len(windows):
        raise ValueError("windows: got none, expected at least 1")

    for number, window in enumerate(windows):
        _check_window(number, window)


def _check_window(number: int, window: Any) -> None:
    """Refuse what no encoder has made."""
    expected = "one that an encoder made: PairEncoder(...).windows(texts)"
    if not isinstance(window, Mapping):
        raise TypeError(f"windows[{number}]: got a {type(window).__name__}, expected {expected}")

    columns = [f"{side}_{column}" for side in SIDES for column in Reading._fields]
    columns += ["bytes", "documents"]
    lacking = [name for name in columns if name not in window]
    if lacking:
        raise ValueError(f"windows[{number}]: got a window without {', '.join(lacking)}, expected {expected}")


def _check_ids(
    side: str,
    ids: Sequence[np.ndarray],
    rows: int,
) -> None:
    """Refuse tokens that the vocabulary map lacks; on a GPU, in the embedding, they would end the process."""
    tokens = np.concatenate([np.zeros(1, dtype=np.int64), *ids])
    lowest = int(tokens.min())
    highest = int(tokens.max())
    if lowest < 0 or highest >= rows:
        token = lowest if lowest < 0 else highest
        raise ValueError(
            f"windows: got token {token} for the {side}, of which the vocabulary map has {rows:,}; expected windows "
            "and map of the same pair, or are student and teacher swapped?"
        )


# ------------------------------------------------------------------------------------ one side, padded


@dataclass(frozen=True)
class _PaddedSide:
    """Windows as one of the models reads them."""

    readings: list[Reading]
    ids: np.ndarray
    """[B, S] tokens."""
    mask: np.ndarray
    """[B, S] 1 on tokens."""
    labels: np.ndarray
    """[B, S] the token that each position predicts, or IGNORE."""
    markup: np.ndarray
    """Flat positions that predict markup."""
    source: Source | None
    """Input of the encoder, where there is one."""
    begins: list[np.ndarray]
    """For each window, the tokens at which its isolated documents begin."""

    @property
    def positions(self) -> Tensor | None:
        """[B, S] position of each token in its document; None where every window holds one document."""
        if all(len(begins) == 1 for begins in self.begins):
            return None

        # Padding goes on from the last document, behind which nothing sees it.
        places = np.arange(self.width)
        rows = [places - begins[np.searchsorted(begins, places, side="right") - 1] for begins in self.begins]
        return torch.from_numpy(np.stack(rows))

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def fields(self, side: str) -> dict[str, Any]:
        """Return the fields that a batch has for each side, but for labels."""
        return {
            f"{side}_ids": _tensor(self.ids),
            f"{side}_mask": _tensor(self.mask),
            f"{side}_markup": _tensor(self.markup),
            f"{side}_source": self.source,
            f"{side}_positions": self.positions,
        }


def _pad_side(
    windows: Sequence[Window],
    side: str,
    vocabulary_size: int,
) -> _PaddedSide:
    """Pad the windows of one side, after a look at their tokens."""
    # The decoder's tokens, which are aligned, and the encoder's, where there is one, which are only read.
    readings = [_reading(window, side) for window in windows]
    sources = [window.get(f"{side}_source") for window in windows]
    decoder_ids = [reading.ids for reading in readings]
    encoder_ids = [source for source in sources if source is not None]
    _check_ids(side, [*decoder_ids, *encoder_ids], vocabulary_size)

    # Position j predicts token j + 1, and the last position nothing.
    labels = []
    for reading in readings:
        is_supervised = reading.roles[1:] != MARKER
        next_ids = np.where(is_supervised, reading.ids[1:], IGNORE)
        labels.append(np.append(next_ids, IGNORE))

    ids = pad_rows(decoder_ids, 0)
    return _PaddedSide(
        readings=readings,
        ids=ids,
        mask=pad_rows([np.ones_like(row) for row in decoder_ids], 0),
        labels=pad_rows(labels, IGNORE),
        markup=_markup_positions(readings, ids.shape[1]),
        source=_pad_source(sources),
        begins=[document_begins(window, side) for window in windows],
    )


def _markup_positions(readings: list[Reading], width: int) -> np.ndarray:
    """Return flat positions, in rows of `width`, that predict markup."""
    positions = [np.zeros(0, dtype=np.int64)]
    for number, reading in enumerate(readings):
        predicts_markup = reading.roles[1:] == WRITTEN
        positions.append(np.flatnonzero(predicts_markup) + number * width)
    return np.concatenate(positions)


def _pad_source(rows: list[np.ndarray | None]) -> Source | None:
    """Return what the encoder of a side reads; None where the model has no encoder."""
    if rows[0] is None:
        return None

    ids = torch.from_numpy(pad_rows(rows, 0))
    mask = torch.from_numpy(pad_rows([np.ones_like(row) for row in rows], 0))
    # Decided here, on the host: later a GPU would have to be waited for.
    has_padding = not mask.all()
    return Source(ids, mask if has_padding else None)


# ------------------------------------------------------------------------------------ both sides together


class _Rows(NamedTuple):
    """KD rows of a batch, under the names that they have in `PairedBatch`."""

    row_student: np.ndarray
    row_supervised: np.ndarray
    row_teacher: np.ndarray
    depth: np.ndarray
    prefix_lo: np.ndarray
    prefix_hi: np.ndarray
    pieces: np.ndarray


def _stack_rows(
    aligned: list[Alignment],
    supervised: np.ndarray,
    student_width: int,
    teacher_width: int,
) -> _Rows:
    """Return the anchored positions of all windows, as flat indices into the padded batch."""
    student_positions = []
    teacher_positions = []
    for number, alignment in enumerate(aligned):
        student_positions.append(alignment.student + number * student_width)
        teacher_positions.append(alignment.teacher + number * teacher_width)

    row_student = _joined(student_positions)
    return _Rows(
        row_student=row_student,
        # Every anchored position has a label, so that it is among the supervised ones.
        row_supervised=np.searchsorted(supervised, row_student),
        row_teacher=_joined(teacher_positions),
        depth=_joined([alignment.depth for alignment in aligned]),
        prefix_lo=_joined([alignment.prefix_lo for alignment in aligned]),
        prefix_hi=_joined([alignment.prefix_hi for alignment in aligned]),
        pieces=_joined([alignment.pieces for alignment in aligned]),
    )


class _TeacherOrder(NamedTuple):
    """Order in which the teacher's head computes positions, under the names of `PairedBatch`."""

    teacher_held: np.ndarray
    asked: np.ndarray
    row_asked: np.ndarray
    deep: np.ndarray
    deep_before: np.ndarray
    deep_width: np.ndarray

    def fields(self) -> dict[str, Any]:
        """Return the fields of a batch: tensors, but for the two that stay on the host, where chunks are cut."""
        return {
            "teacher_held": _tensor(self.teacher_held),
            "asked": _tensor(self.asked),
            "row_asked": _tensor(self.row_asked),
            "deep": _tensor(self.deep),
            "deep_before": self.deep_before,
            "deep_width": self.deep_width,
        }


def _order_teacher(rows: _Rows, mask: np.ndarray, asks_everywhere: bool) -> _TeacherOrder:
    """Put the teacher's positions that are the anchor of a row first: these alone need a whole distribution.

    Args:
        asks_everywhere: behind them come all others, of which the probability of the text is asked; else those alone
            that correct a row, by the chain rule over its pieces.
    """
    positions = np.flatnonzero(mask)
    row_positions = np.searchsorted(positions, rows.row_teacher)
    anchors, row_asked = np.unique(row_positions, return_inverse=True)
    is_other = np.full(len(positions), asks_everywhere)
    if not asks_everywhere:
        pieces = np.maximum(rows.pieces, 1)
        first = np.repeat(row_positions, pieces)
        is_other[first + _counted_up(pieces)] = True
    is_other[anchors] = False
    others = np.flatnonzero(is_other)

    # Rows at depth > 0 need it restricted besides. Their number before each anchor tells a chunk which are its own.
    deep = np.flatnonzero(rows.depth)
    boundaries = np.arange(len(anchors) + 1)
    return _TeacherOrder(
        teacher_held=positions,
        asked=np.append(anchors, others),
        row_asked=row_asked,
        deep=deep,
        deep_before=np.searchsorted(row_asked[deep], boundaries),
        deep_width=(rows.prefix_hi - rows.prefix_lo)[deep],
    )


def _counted_up(lengths: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... up to each of some lengths of at least 1, one behind the other."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _chosen_rows(
    windows: Sequence[Window],
    aligned: list[Alignment],
) -> tuple[list[Alignment], Places | None]:
    """Return the rows that KD may be learned at, and their places; all rows, and None, where nobody has chosen."""
    has_places = [window.get(PLACES) is not None for window in windows]
    if not any(has_places):
        return aligned, None
    if not all(has_places):
        raise ValueError(
            f"windows: got a column {PLACES} in {sum(has_places)} of {len(windows)} windows, expected it in all or none"
        )

    chosen = []
    place = []
    of = []
    for number, (window, alignment) in enumerate(zip(windows, aligned, strict=True)):
        places = np.asarray(window[PLACES])
        rows = len(alignment.student)
        if len(places) != rows:
            raise ValueError(
                f"windows[{number}]: got {len(places)} {PLACES} for {rows} KD rows; choose positions again, with this "
                "pair and max_depth"
            )
        index = np.flatnonzero(places >= 0)
        chosen.append(alignment.rows(index))
        place.append(places[index])
        of.append(np.full(len(index), rows, dtype=np.float64))
    return chosen, Places(_tensor(_joined(place)), torch.from_numpy(np.concatenate(of)))


def _given_positions(windows: Sequence[Window], supervised: np.ndarray, width: int) -> np.ndarray:
    """Return [n] bool: which of the supervised flat positions lie in windows that the student did not write."""
    is_own = np.array([bool(window.get(OWN)) for window in windows])
    return ~is_own[supervised // width]


def _count_head_items(given: np.ndarray, aligned: list[Alignment]) -> dict[str, int]:
    """Return the items of the terms on the student's head, and the rows at depth 0."""
    return {
        "lm": int(given.sum()),
        "own": int((~given).sum()),
        "kd": sum(len(alignment.student) for alignment in aligned),
        "depth0": sum(int((alignment.depth == 0).sum()) for alignment in aligned),
        "span": sum(alignment.spans for alignment in aligned),
    }


def _number_spans(spans: list[np.ndarray], aligned: list[Alignment]) -> Tensor:
    """Return [B, S] the span of each position, numbered through the batch; -1 where there is none."""
    first = 0
    rows = []
    for row, alignment in zip(spans, aligned, strict=True):
        in_span = row >= 0
        rows.append(np.where(in_span, row + first, -1))
        first += alignment.spans
    return torch.from_numpy(pad_rows(rows, -1))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Return the rows of all windows, one behind the other."""
    return np.concatenate(parts).astype(np.int64)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
