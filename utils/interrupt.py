"""Ctrl-C while a command is still loading its modules: one line and its exit code in place of a traceback.

Light, because a command imports it before everything else.
"""

import os
import signal
from contextlib import suppress

EXIT_CODE = 128 + signal.SIGINT

MESSAGE = "stopped by SIGINT, before anything was begun"


def end_on_interrupt() -> None:
    """Let Ctrl-C end this process at once; called first of all in a command.

    Where Ctrl-C does something else already (a job in the background ignores it), nothing changes.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def raise_on_interrupt() -> None:
    """Let Ctrl-C raise `KeyboardInterrupt` again, after `end_on_interrupt`; called where that is caught."""
    if signal.getsignal(signal.SIGINT) is end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end(*_: object) -> None:
    """Handle SIGINT: say that nothing was begun, and end the process."""
    # Not through logging, whose streams may be in use at this very moment. The terminal may be closed.
    with suppress(OSError):
        os.write(2, f"\n{MESSAGE}\n".encode())
    os._exit(EXIT_CODE)
