"""Positions that KD is learned at, chosen before training by the entropy of the student (`select_by: first_student`).

What the student is in doubt of is known before the teacher is asked, so that the teacher's head, the projection and a
cache have nothing to do for all other positions. The choice is a column of each window.

Shapes: B windows, S student positions, N KD rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .language_model import body_states, evaluating, head_logits, vocabulary_size
from .losses import selection
from .losses.chunk_size import chunk_rows
from .text.collate import PLACES, Window
from .types import PairedBatch


def with_places(
    windows: Sequence[Window],
    collate: Callable[[Sequence[Window]], PairedBatch],
    student: nn.Module,
    share: float,
    batch_size: int = 8,
) -> list[dict[str, Any]]:
    """Return windows with the places of their positions.

    Args:
        collate: of the pair, as in training.
        student: as it is before training.
        share: largest that `curriculum.select` takes in the run.
    """
    marked: list[dict[str, Any]] = []
    for first in range(0, len(windows), batch_size):
        part = [windows[index] for index in range(first, min(first + batch_size, len(windows)))]
        for window, places in zip(part, places_of(collate(part), student, share), strict=True):
            marked.append({**window, PLACES: places})
    return marked


def places_of(batch: PairedBatch, student: nn.Module, share: float) -> list[np.ndarray]:
    """Return, for each window of a batch, the place of every KD row by the student's entropy; -1 behind a share."""
    device = next(student.parameters()).device
    entropies = _entropies(batch.to(device), student).cpu().numpy()
    by_window = np.split(entropies, np.cumsum(batch.window_rows)[:-1])
    return [selection.places(scores, share) for scores in by_window]


@torch.no_grad()
def _entropies(batch: PairedBatch, student: nn.Module) -> Tensor:
    """Return [N] the student's entropy, in nats, at every KD row; no logits of all of them exist at once."""
    with evaluating(student), torch.autocast(batch.student_ids.device.type, enabled=False):
        states = body_states(student, batch.student_ids, batch.student_source, batch.student_positions).flatten(0, 1)
        rows, _ = chunk_rows(vocabulary_size(student), states.device)

        scores = [states.new_zeros(0, dtype=torch.float32)]
        for positions in batch.row_student.split(rows):
            logits = head_logits(student, states[positions])
            scores.append(selection.entropy(logits))
        return torch.cat(scores)
