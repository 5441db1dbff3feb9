"""Signals that end a run at the next step, with a checkpoint."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
"""Signals that ask a run to end: a scheduler or `kill`, Ctrl-C, a terminal or ssh connection that was closed; and
SIGUSR1, which batch systems are asked to send some time before the end."""

STOP_SIGNALS = tuple(getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name))
"""Those of them that this system has: Windows has neither SIGHUP nor SIGUSR1."""

STOP_REASONS = ("finished", "early_stopping", "max_hours", *SIGNAL_NAMES)
"""Values of `FitResult.stopped_by`."""

SECONDS_PER_HOUR = 3600


class StopSignal:
    """Remembers that the run has to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1 or a wall-clock limit.

    A context manager. Inside it, signals raise nothing, so whatever is being written is written to its end; a
    second signal changes nothing. The former handlers return at exit. Outside the main thread, where Python
    allows no handlers, only the limit works. A SIGHUP that is ignored already stays ignored: `nohup` asks for that.

    Args:
        max_hours: limit; None is no limit.
        started: `time.monotonic()` from which the hours count; None: when this object was made.
    """

    def __init__(self, max_hours: float | None = None, started: float | None = None) -> None:
        if started is None:
            started = time.monotonic()
        self.deadline = None if max_hours is None else started + SECONDS_PER_HOUR * max_hours
        self._signal: str | None = None
        self._former_handlers: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is not threading.main_thread():
            return self

        for number in STOP_SIGNALS:
            is_nohup = number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
            if not is_nohup:
                self._former_handlers[number] = signal.signal(number, self._handle)

        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers.clear()

    def requested(self) -> str | None:
        """Return the name of the signal, such as `SIGTERM`, or `max_hours`; None to go on."""
        is_over = self.deadline is not None and time.monotonic() >= self.deadline
        if is_over and self._signal is None:
            return "max_hours"
        return self._signal

    def _handle(self, number: int, frame: object) -> None:
        """Remember a signal; called by Python between two instructions of whatever runs in the main thread."""
        # Forked processes inherit this handler, and a signal to the whole group reaches them too: they must go on.
        if self._signal is not None or os.getpid() != self._process:
            return

        self._signal = signal.Signals(number).name
        message = f"\n{self._signal}: stopping after this optimizer step\n"

        # Not through logging, whose streams may be in use at this very moment. The terminal may be closed.
        with contextlib.suppress(OSError):
            os.write(2, message.encode())


@contextlib.contextmanager
def stop_signals_delayed() -> Iterator[None]:
    """Keep signals that end a run waiting while processes are started, which inherit this.

    A started process calls `ignore_stop_signals`; without the delay a signal that comes before would kill it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return

    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Leave it to the parent process what happens at a signal that ends a run; called in a worker process.

    `timeout`, batch systems and container runtimes send signals to every process of a run. The training process saves
    at the end of its step, and needs its workers until then.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    # Those that arrived during `stop_signals_delayed` are dropped, because they are ignored now.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
