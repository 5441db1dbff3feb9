"""Windows that several teachers read -> one batch: `MixedCollator` joins what the collator of each teacher makes.

A window has the student's tokens and those of every teacher (`windows.sides_of`); each teacher's own collator sees it
as a window of two sides. A position of the student is a KD row of the whole where any teacher has a say.

Shapes: as in `models.types`; W windows that a teacher is asked about.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..types import MixedRows, PairedBatch
from .windows import sides_of

ROUTE = "route"
"""Column of a window: the source that its documents are from, or what a column of their rows says; only where teachers
are for some of the text alone."""


class Collate(Protocol):
    """Makes the batch of one teacher: a `PairCollator`, or one that remembers."""

    def __call__(self, windows: Sequence[Any]) -> PairedBatch: ...


def as_pair(window: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a window as the student and one teacher read it.

    Args:
        number: of the teacher, from 0.
    """
    side = sides_of(2 + number)[1 + number]
    pair = {}
    for column, value in window.items():
        name, _, rest = column.rpartition("_")
        if name == side:
            pair[f"teacher_{rest}"] = value
        elif not name.startswith("teacher"):
            pair[column] = value
    return pair


@dataclass(frozen=True)
class MixedCollator:
    """Collates windows for several teachers.

    Args:
        collators: one for each teacher.
        only_for: for each teacher, the routes of text that it is asked about; empty: all.
    """

    collators: tuple[Collate, ...]
    only_for: tuple[Collection[str], ...]

    def __call__(self, windows: Sequence[Mapping[str, Any]]) -> PairedBatch:
        """Return some windows as one batch.

        Raises:
            ValueError: see `PairCollator`.
        """
        # The student's reading is the same beside every teacher.
        whole = self.collators[0]([as_pair(window, 0) for window in windows])
        width = whole.student_ids.shape[1]

        batches = []
        teachers = []
        positions = []
        for number, collate in enumerate(self.collators):
            chosen = self._asked_about(windows, number)
            if not chosen:
                continue
            batch = whole
            if number > 0 or len(chosen) < len(windows):
                batch = collate([as_pair(windows[index], number) for index in chosen])

            batches.append(batch)
            teachers.append(number)
            positions.append(_positions_in_whole(batch, chosen, width))
        return _with_rows_of_all(whole, batches, teachers, positions)

    def _asked_about(self, windows: Sequence[Mapping[str, Any]], number: int) -> list[int]:
        """Return the windows that a teacher is asked about."""
        routes = self.only_for[number]
        return [index for index, window in enumerate(windows) if not routes or str(window[ROUTE]) in routes]


class _Rows(NamedTuple):
    """KD rows of one teacher, in the flat positions of the whole batch."""

    position: np.ndarray
    depth: np.ndarray


def _positions_in_whole(batch: PairedBatch, chosen: Sequence[int], width: int) -> _Rows:
    """Return the rows of a teacher's batch, whose windows are some of the whole batch.

    Args:
        width: of the student's side of the whole batch.
    """
    window, position = np.divmod(batch.row_student.numpy(), batch.student_ids.shape[1])
    in_whole = np.asarray(chosen, dtype=np.int64)[window] * width + position
    return _Rows(in_whole, batch.depth.numpy())


def _with_rows_of_all(
    whole: PairedBatch,
    batches: Sequence[PairedBatch],
    teachers: Sequence[int],
    rows: Sequence[_Rows],
) -> PairedBatch:
    """Return the whole batch with the rows at which any teacher has a say."""
    positions = np.concatenate([np.zeros(0, dtype=np.int64), *(part.position for part in rows)])
    union = np.unique(positions)
    places = [np.searchsorted(union, part.position) for part in rows]

    # A row where the student is inside a token of any teacher is no place where all have read the same.
    depth = np.zeros(len(union), dtype=np.int64)
    for place, part in zip(places, rows, strict=True):
        depth[place] = np.maximum(depth[place], part.depth)

    count, width = whole.student_ids.shape
    mixed = MixedRows(tuple(batches), tuple(teachers), tuple(map(_tensor, places)))
    return replace(
        whole,
        row_student=_tensor(union),
        row_supervised=_tensor(np.searchsorted(whole.supervised.numpy(), union)),
        depth=_tensor(depth),
        window_rows=np.bincount(union // width, minlength=count),
        counts={**whole.counts, "kd": len(union), "depth0": int((depth == 0).sum())},
        mixed=mixed,
        # What a store had is in the batches of the teachers.
        keys=[],
        signal=None,
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
