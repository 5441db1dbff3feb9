"""Signals that end a run: in training with a checkpoint, before and after it at once."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from .. import interrupt
from .jupyter import in_kernel

SIGNAL_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
"""Signals that ask a run to end: a scheduler or `kill`, Ctrl-C, a terminal or ssh connection that was closed; and
SIGUSR1, which batch systems are asked to send some time before the end."""

STOP_SIGNALS = tuple(getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name))
"""Those of them that this system has: Windows has neither SIGHUP nor SIGUSR1."""

STOP_REASONS = ("finished", "early_stopping", "max_hours", "collapse", *SIGNAL_NAMES)
"""Values of `FitResult.stopped_by`."""

SECONDS_PER_HOUR = 3600


SIZE_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which launchers (torchrun, Intel MPI, Open MPI, MVAPICH) say how many processes a run has."""

REPEAT_SECONDS = 0.5
"""Launchers pass Ctrl-C on to processes that have it from the terminal already: what comes so soon is no second one."""


class Interrupted(BaseException):
    """A signal, or the clock, ended the run before it was done; whatever it had to keep is on the disk.

    Not an `Exception`: code that goes on without a sample or a picture must not go on after this.
    """


class StopSignal:
    """Remembers that the run has to stop: SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR1 or a wall-clock limit.

    A context manager. Inside it, signals raise nothing, so whatever is being written is written to its end; a second
    Ctrl-C ends the process at once, or in the kernel of a notebook the cell. Where nothing is lost by an end
    (`raising`), the first Ctrl-C raises. The former handlers return at exit. Outside the main thread, where Python
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
        self._arrived = 0.0
        self._raises = False
        self._has_raised = False
        self._is_writing = False
        self._ends_after_writing = False
        self._is_at_once = False
        self._former_handlers: dict[int, Any] = {}
        self._process = os.getpid()
        # Others would wait for a process that ends in the middle of a step.
        self._is_alone = all(os.environ.get(name, "1") in ("", "1") for name in SIZE_VARIABLES)

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

    # --- where a signal is obeyed -----------------------------------------------------------------------------------

    def requested(self) -> str | None:
        """Return the name of the signal, such as `SIGTERM`, or `max_hours`; None to go on."""
        is_over = self.deadline is not None and time.monotonic() >= self.deadline
        if is_over and self._signal is None:
            return "max_hours"
        return self._signal

    def check(self) -> None:
        """End training here, within a step or an evaluation, if a signal came.

        In a run of several processes, and at the limit of hours, only within `at_once`.

        Raises:
            Interrupted: a signal came, or the hours are over. Not outside training, where all but Ctrl-C wait for what
                is being done.
        """
        reason = self.requested() if self._is_at_once else self._signal
        is_possible = self._is_alone or self._is_at_once
        if reason is not None and is_possible and not self._raises:
            raise Interrupted(reason)

    def pending(self) -> str | None:
        """Return SIGINT if it came while signals were deferred, and would raise now; else None."""
        if self._raises and self._signal == "SIGINT":
            return self._signal
        return None

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Let Ctrl-C raise `Interrupted` wherever it comes: nothing is lost by an end. In a run of one process."""
        with self._raising(self._is_alone):
            yield

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Let signals wait for `requested` and `check`, also within `raising`; for training."""
        with self._raising(False):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let `check` end what is being done at the limit of hours too, and in a run of several processes.

        It is for what takes long, and where the processes tell each other of an end before one waits for another.
        """
        self._is_at_once = True
        try:
            yield
        finally:
            self._is_at_once = False

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Let a second Ctrl-C wait until a checkpoint is written, as well."""
        self._is_writing = True
        try:
            yield
        finally:
            self._is_writing = False
            if self._ends_after_writing:
                self._end_at_once()

    @contextlib.contextmanager
    def _raising(self, value: bool) -> Iterator[None]:
        before = self._raises
        self._raises = value
        try:
            yield
        except Exception as error:
            # Compiled modules that are being loaded turn what is raised in them into an error of their own.
            if self._has_raised and self._signal is not None:
                raise Interrupted(self._signal) from error
            raise
        finally:
            self._raises = before

    # --- the handler ------------------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: object) -> None:
        """Remember a signal; called by Python between two instructions of whatever runs in the main thread."""
        # Forked processes inherit this handler, and a signal to the whole group reaches them too: they must go on.
        if os.getpid() != self._process:
            return

        name = signal.Signals(number).name
        if self._signal is not None:
            is_second = name == "SIGINT" and time.monotonic() - self._arrived >= REPEAT_SECONDS
            if is_second:
                self._handle_second()
            return

        self._signal = name
        self._arrived = time.monotonic()
        if self._raises and name == "SIGINT":
            self._has_raised = True
            raise Interrupted(name)

        hint = "; once more ends at once" if name == "SIGINT" else ""
        message = "stopping, the same cell continues" if in_kernel() else "stopping, the same command continues"
        _write(f"\n{name}: {message}{hint}\n")

    def _handle_second(self) -> None:
        """End at once, or as soon as a checkpoint is written."""
        if self._is_writing:
            self._ends_after_writing = True
            _write("\na checkpoint is being written, the end comes after it\n")
            return
        self._end_at_once()

    def _end_at_once(self) -> None:
        """End the process without any cleaning up: files appear whole or not at all.

        Raises:
            KeyboardInterrupt: the process is the kernel of a notebook, whose other cells need it.
        """
        if in_kernel():
            raise KeyboardInterrupt("ended at once; the same cell continues from the newest checkpoint")
        _write("\nended at once; the same command continues from the newest checkpoint\n")
        os._exit(interrupt.EXIT_CODE)


def _write(message: str) -> None:
    """Write to standard error from a signal handler."""
    # Not through logging, whose streams may be in use at this very moment. The terminal may be closed.
    with contextlib.suppress(OSError):
        os.write(2, message.encode())


@contextlib.contextmanager
def interrupt_ends_process() -> Iterator[None]:
    """Let Ctrl-C end this process at once, while libraries are loaded and nothing is begun.

    `KeyboardInterrupt` is no use there: compiled modules turn it into an error of theirs, or go on without it. Outside
    the main thread, where Python allows no handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGINT, interrupt.end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
