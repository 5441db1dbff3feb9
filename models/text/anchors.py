"""Places of a batch at which the router compares hidden states: where both models have read the same bytes.

A text is what a model reads by itself: a window or, where documents are isolated, each document in it.

Shapes: B windows, D texts, T teacher positions, A anchors, Q sampled anchors of a text, U of a window, R runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import RouterConfig
from ..types import Anchors
from .alignment import Alignment
from .padding import pad_rows
from .tokens import Reading
from .windows import BEHIND


class WindowAnchors(NamedTuple):
    """Anchors of one window; positions, texts, runs and indices are counted within it."""

    student: np.ndarray
    """[A] student position."""
    teacher: np.ndarray
    """[A] teacher position."""
    text: np.ndarray
    """[A] text that holds it."""
    run: np.ndarray
    """[A] run of neighbouring anchors."""
    runs: int
    sampled: list[np.ndarray]
    """For each text, [Q] indices into the A anchors."""
    query_start: np.ndarray
    """[U] first byte of the student's last token read at each sampled anchor."""
    query_end: np.ndarray
    """[U] end of that token."""
    query_begin: np.ndarray
    """[U] first byte that it may see: that of its text."""
    attends: np.ndarray
    """[U] bool."""

    @property
    def queries(self) -> np.ndarray:
        """[U] the sampled anchors of all texts."""
        return np.concatenate(self.sampled)

    def numbered_on(self, anchors: int, texts: int, runs: int) -> "WindowAnchors":
        """Return them behind the anchors, texts and runs of the windows before."""
        sampled = [indices + anchors for indices in self.sampled]
        return self._replace(text=self.text + texts, run=self.run + runs, sampled=sampled)


def collect_anchors(
    readings: tuple[Sequence[Reading], Sequence[Reading]],
    aligned: Sequence[Alignment],
    begins: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    widths: tuple[int, int],
    router: RouterConfig,
) -> Anchors:
    """Return the anchors of a batch, with flat positions into its padded rows.

    Args:
        readings: of student and teacher, one a window.
        aligned: one a window.
        begins: of student and teacher, one a window: tokens at which its texts begin.
        widths: positions of a padded row of student and teacher.
        router: how many anchors are sampled, and how long a run is.
    """
    student_readings, teacher_readings = readings
    windows = []
    for number, alignment in enumerate(aligned):
        windows.append(
            _window_anchors(
                alignment,
                (student_readings[number], teacher_readings[number]),
                (begins[0][number], begins[1][number]),
                router,
            )
        )

    parts = _numbered_through(windows, widths)
    return Anchors(
        student=_joined([part.student for part in parts]),
        teacher=_joined([part.teacher for part in parts]),
        text=_joined([part.text for part in parts]),
        run=_joined([part.run for part in parts]),
        sampled=_padded([indices for part in parts for indices in part.sampled], -1),
        queries=_padded([part.queries for part in parts], -1),
        query_bytes=_padded_ranges(
            [part.query_start for part in parts],
            [part.query_end for part in parts],
            0,
        ),
        # Padding lies behind every text, where no query sees it.
        key_bytes=_padded_ranges(
            [reading.starts for reading in teacher_readings],
            [_key_ends(*pair) for pair in zip(teacher_readings, begins[1], strict=True)],
            BEHIND,
        ),
        query_begin=_padded([part.query_begin for part in parts], 0),
        attends=_padded([part.attends for part in parts], 0).bool(),
        runs=sum(part.runs for part in parts),
    )


def _numbered_through(windows: Sequence[WindowAnchors], widths: tuple[int, int]) -> list[WindowAnchors]:
    """Return anchors of windows as those of a batch: positions flat, the rest numbered on from the windows before."""
    student_width, teacher_width = widths
    parts = []
    anchors = 0
    texts = 0
    runs = 0

    for number, window in enumerate(windows):
        part = window.numbered_on(anchors, texts, runs)
        parts.append(
            part._replace(
                student=part.student + number * student_width,
                teacher=part.teacher + number * teacher_width,
            )
        )
        anchors += len(part.student)
        texts += len(part.sampled)
        runs += part.runs
    return parts


def _window_anchors(
    alignment: Alignment,
    readings: tuple[Reading, Reading],
    begins: tuple[np.ndarray, np.ndarray],
    router: RouterConfig,
) -> WindowAnchors:
    """Find the anchors of a window, divide those of each text into runs, and sample some, spread evenly."""
    student, teacher = readings
    # The first position of a text is left out: its state is extreme (massive activations).
    is_first = np.isin(alignment.student, begins[0]) | np.isin(alignment.teacher, begins[1])
    rows = np.flatnonzero((alignment.depth == 0) & ~is_first)
    positions = alignment.student[rows]
    text = np.searchsorted(begins[0], positions, side="right") - 1

    run = np.zeros(len(rows), dtype=np.int64)
    runs = 0
    sampled = []
    for number in range(len(begins[0])):
        members = np.flatnonzero(text == number)
        count = len(members)

        text_runs = max(1, round(count / router.span)) if count else 0
        run[members] = runs + np.arange(count) * text_runs // max(count, 1)
        runs += text_runs

        # From the first to the last.
        spread = np.linspace(0, count - 1, min(count, router.positions))
        sampled.append(members[np.unique(spread.round().astype(np.int64))])

    # Position j has read the tokens up to j. Both models begin a text at the same byte, or the slot before it.
    queries = np.concatenate(sampled)
    query_start = student.starts[positions[queries]]
    query_end = student.ends[positions[queries]]
    # Of the texts that have any: a window may be without a token.
    begin_of_query = [begin[text[queries]] for begin in begins]
    query_begin = np.minimum(student.starts[begin_of_query[0]], teacher.starts[begin_of_query[1]])

    return WindowAnchors(
        student=positions,
        teacher=alignment.teacher[rows],
        text=text,
        run=run,
        runs=runs,
        sampled=sampled,
        query_start=query_start,
        query_end=query_end,
        query_begin=query_begin,
        attends=_attends(
            np.stack([query_begin, query_start, query_end]),
            teacher._replace(ends=_key_ends(teacher, begins[1])),
        ),
    )


def _key_ends(teacher: Reading, begins: np.ndarray) -> np.ndarray:
    """Return [T] ends of the teacher's tokens as keys: the first of a later text lies behind every query."""
    ends = teacher.ends.copy()
    ends[begins[1:]] = BEHIND
    return ends


def _attends(query: np.ndarray, teacher: Reading) -> np.ndarray:
    """Return [U] bool: the query sees at least two teacher tokens after the first, and overlaps one of these.

    Args:
        query: [3, U] the first byte that it may see, first byte and end of its token.
        teacher: tokens as keys.
    """
    query_begin, query_start, query_end = query[:, :, None]
    key_start = teacher.starts[None, 1:]
    key_end = teacher.ends[None, 1:]

    is_visible = (key_end <= query_end) & (key_start >= query_begin)  # [U, T - 1]
    overlap = np.minimum(key_end, query_end) - np.maximum(key_start, query_start)
    overlaps = (overlap > 0) & is_visible
    return (is_visible.sum(1) > 1) & overlaps.any(1)


def _joined(parts: list[np.ndarray]) -> Tensor:
    """Return the numbers of all windows, one behind the other."""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _padded(rows: list[np.ndarray], value: int) -> Tensor:
    return torch.from_numpy(pad_rows(rows, value))


def _padded_ranges(starts: list[np.ndarray], ends: list[np.ndarray], value: int) -> Tensor:
    """Return [rows, longest, 2] int64: start and end of each entry."""
    columns = [_padded(starts, value), _padded(ends, value)]
    return torch.stack(columns, -1)
