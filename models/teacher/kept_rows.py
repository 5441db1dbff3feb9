"""Rows of a teacher's answer that a memory keeps: those that the teacher's entropy chooses for KD.

The teacher is frozen, so that `select_by: teacher_entropy` chooses the same positions in every epoch. Of all others
nothing is stored: such a row names no token, and the mass of what was read before it is unknown.

Shapes: N KD rows, K outcomes of a row.
"""

from dataclasses import dataclass, replace

import torch

from ..losses.selection import choose, entropy_of_target
from ..types import PairedBatch, TeacherSignal
from .projection import Projection


@dataclass(frozen=True)
class RowsByEntropy:
    """Takes out of a signal what KD is learned at nowhere in a run.

    Args:
        projection: to the student's vocabulary, as in training.
        share: of each window's positions, the largest of the run.
    """

    projection: Projection
    share: float

    @torch.no_grad()
    def __call__(self, batch: PairedBatch, signal: TeacherSignal) -> TeacherSignal:
        """Return a signal whose other rows are empty."""
        batch = batch.to(signal.ids.device)
        target = self.projection.to(signal.ids.device)(signal, batch)
        scores = entropy_of_target(target).masked_fill(~target.valid, -torch.inf)

        window = batch.row_student // batch.student_ids.shape[1]
        chosen = choose(scores, window, batch.window_rows, self.share)
        # Rows that the teacher cannot judge, which are few, stay as they are: they are counted.
        kept = ~target.valid
        kept[chosen] = True
        return replace(
            signal,
            ids=signal.ids.masked_fill(~kept[:, None], -1),
            log_probs=signal.log_probs.masked_fill(~kept[:, None], -torch.inf),
            log_tail=signal.log_tail.masked_fill(~kept, 0.0),
            log_mass=signal.log_mass.masked_fill(~kept, -torch.inf),
        )
