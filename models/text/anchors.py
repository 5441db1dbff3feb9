"""Places of a batch at which the router compares hidden states: where both models have read the same bytes.

Shapes: B windows, T teacher positions, A anchors, Q sampled anchors of a window, R runs of anchors.
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
    """Anchors of one window; positions, runs and indices are counted within it."""

    student: np.ndarray
    """[A] student position."""
    teacher: np.ndarray
    """[A] teacher position."""
    run: np.ndarray
    """[A] run of neighbouring anchors."""
    runs: int
    sampled: np.ndarray
    """[Q] indices into the A anchors."""
    query_bytes: np.ndarray
    """[Q, 2] first byte and end of the student's last token read at each sampled anchor."""
    attends: np.ndarray
    """[Q] bool."""


def collect_anchors(
    readings: tuple[Sequence[Reading], Sequence[Reading]],
    aligned: Sequence[Alignment],
    widths: tuple[int, int],
    router: RouterConfig,
) -> Anchors:
    """Return the anchors of a batch, with flat positions into its padded rows.

    Args:
        readings: of student and teacher, one a window.
        aligned: one a window.
        widths: positions of a padded row of student and teacher.
        router: how many anchors are sampled, and how long a run is.
    """
    student_readings, teacher_readings = readings
    parts = []
    for alignment, student, teacher in zip(aligned, student_readings, teacher_readings, strict=True):
        parts.append(_window_anchors(alignment, student, teacher, router))

    # Anchors and runs of a window are numbered on from those of the windows before it.
    first_anchor = np.cumsum([0, *(len(part.student) for part in parts)])
    first_run = np.cumsum([0, *(part.runs for part in parts)])
    numbered = list(enumerate(parts))

    return Anchors(
        student=_joined([part.student + number * widths[0] for number, part in numbered]),
        teacher=_joined([part.teacher + number * widths[1] for number, part in numbered]),
        window=_joined([np.full(len(part.student), number) for number, part in numbered]),
        run=_joined([part.run + first_run[number] for number, part in numbered]),
        sampled=_padded([part.sampled + first_anchor[number] for number, part in numbered], -1),
        query_bytes=_padded_pairs(
            [part.query_bytes[:, 0] for part in parts], [part.query_bytes[:, 1] for part in parts], 0
        ),
        key_bytes=_padded_pairs([r.starts for r in teacher_readings], [r.ends for r in teacher_readings], BEHIND),
        attends=_padded([part.attends for part in parts], 0).bool(),
        runs=int(first_run[-1]),
    )


def _window_anchors(
    alignment: Alignment,
    student: Reading,
    teacher: Reading,
    router: RouterConfig,
) -> WindowAnchors:
    """Find the anchors of a window, divide them into runs, and sample some of them, spread evenly."""
    # The first position of either model is left out: its state is extreme (massive activations).
    is_anchor = (alignment.depth == 0) & (alignment.student > 0) & (alignment.teacher > 0)
    rows = np.flatnonzero(is_anchor)
    positions = alignment.student[rows]
    count = len(rows)

    runs = max(1, round(count / router.span)) if count else 0
    run = np.arange(count) * runs // max(count, 1)

    sampled = np.linspace(0, count - 1, min(count, router.positions)).round().astype(np.int64)
    sampled = np.unique(sampled)
    tokens = positions[sampled]
    query_bytes = np.stack([student.starts[tokens], student.ends[tokens]], 1)

    return WindowAnchors(
        student=positions,
        teacher=alignment.teacher[rows],
        run=run,
        runs=runs,
        sampled=sampled,
        query_bytes=query_bytes,
        attends=_attends(query_bytes, teacher),
    )


def _attends(query_bytes: np.ndarray, teacher: Reading) -> np.ndarray:
    """Return [Q] bool: the query sees at least two teacher tokens after the first, and overlaps one of these."""
    query_start = query_bytes[:, :1]
    query_end = query_bytes[:, 1:]
    key_start = teacher.starts[None, 1:]
    key_end = teacher.ends[None, 1:]

    is_visible = key_end <= query_end
    overlap = np.minimum(key_end, query_end) - np.maximum(key_start, query_start)
    overlaps = ((overlap > 0) & is_visible).any(1)
    return (is_visible.sum(1) > 1) & overlaps


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _padded(rows: list[np.ndarray], value: int) -> Tensor:
    return torch.from_numpy(pad_rows(rows, value))


def _padded_pairs(
    first: list[np.ndarray],
    second: list[np.ndarray],
    value: int,
) -> Tensor:
    """Return [rows, longest, 2] int64 of two numbers for each entry."""
    return torch.stack([_padded(first, value), _padded(second, value)], -1)
