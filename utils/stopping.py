"""Why a run ends before its last step: no better evaluation, a signal, or the clock."""

import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

STOP_REASONS = ("finished", "early_stopping", "max_hours", "SIGTERM", "SIGINT")
"""What `FitResult.stopped_by` can be."""


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


class StopSignal:
    """Remembers that the run has to stop: SIGTERM, SIGINT (Ctrl-C) or a wall-clock limit.

    A context manager. Inside it, signals raise nothing, so whatever is being written is written to its end; a
    second signal changes nothing. The former handlers return at exit. Outside the main thread, where Python
    allows no handlers, only the limit works.

    Args:
        max_hours: limit; None is no limit.
        started: `time.monotonic()` from which the hours count; None: when this object was made.
    """

    def __init__(self, max_hours: float | None = None, started: float | None = None) -> None:
        began = time.monotonic() if started is None else started
        self.deadline = None if max_hours is None else began + 3600 * max_hours
        self._signal: str | None = None
        self._former: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def requested(self) -> str | None:
        """`SIGTERM`, `SIGINT`, `max_hours`, or None to go on."""
        if self._signal is None and self.deadline is not None and time.monotonic() >= self.deadline:
            return "max_hours"
        return self._signal

    def _handle(self, number: int, frame: object) -> None:
        # Forked data workers inherit this handler: Ctrl-C reaches them too, and they must go on until the step ends.
        if self._signal is None and os.getpid() == self._process:
            self._signal = signal.Signals(number).name
            # not through logging, whose streams may be in use at this very moment
            os.write(2, f"\n{self._signal}: stopping after this optimizer step\n".encode())
