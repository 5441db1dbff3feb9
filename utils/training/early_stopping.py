"""Why a run ends before its last step: no better evaluation, a signal, or the clock."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """Patience on bits per byte: how many evaluations in a row may pass without a better one (0: any number)."""

    patience: int
    best: float | None = None
    best_step: int | None = None
    waited: int = 0

    def update(self, step: int, bits_per_byte: float) -> bool:
        """Take note of an evaluation; True if it is the best so far (NaN never is)."""
        if math.isfinite(bits_per_byte) and (self.best is None or bits_per_byte < self.best):
            self.best, self.best_step, self.waited = bits_per_byte, step, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        return 0 < self.patience <= self.waited
