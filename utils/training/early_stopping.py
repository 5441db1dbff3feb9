"""Early stopping: a run ends when its evaluations have not become better for some time."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """The best evaluation so far, in bits per byte, and how long ago it was."""

    patience: int
    """Evaluations in a row without a better one, after which the run ends; 0: it goes on."""
    best: float | None = None
    """Bits per byte."""
    best_step: int | None = None
    waited: int = 0
    """Evaluations since the best one."""

    def update(self, step: int, bits_per_byte: float) -> bool:
        """Take note of an evaluation; True if it is the best so far (NaN never is)."""
        # A student that diverged is never the best, not even the first.
        is_first = self.best is None
        if math.isfinite(bits_per_byte) and (is_first or bits_per_byte < self.best):
            self.best = bits_per_byte
            self.best_step = step
            self.waited = 0
            return True

        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """The patience is at its end."""
        return 0 < self.patience <= self.waited
