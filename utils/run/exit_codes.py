"""Exit codes of a command, and the last words about a mistake, a failure or an interruption."""

import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from .. import interrupt
from ..errors import RunError, UserError
from ..logs.progress import terminal_bar
from ..machine.launcher import leave, rank, tell_launcher
from ..machine.stop_signals import Interrupted

log = logging.getLogger(__name__)

__all__ = ["EXIT_CODES", "Interrupted", "end_process", "exit_code"]

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129, "SIGUSR1": 138}
"""Of runs that a signal ended, 128 and its number; every other ending that is no error is 0."""


def exit_code(command: Callable[[], None]) -> int:
    """Run a command, report its exceptions, and return the exit code of the process.

    0: done, or ended by the time limit; 1: a failure; 2: a mistake of the user's; 128 + N: signal N.
    """
    try:
        try:
            command()
        finally:
            terminal_bar().stop()
        leave()
        return 0

    except Interrupted as interrupted:
        log.warning("stopped by %s; the same command continues where it stopped", interrupted)
        leave()
        return EXIT_CODES.get(str(interrupted), 0)

    except (UserError, RunError) as error:
        tell_launcher(error)
        # What another process finds wrong, the main one does too, or the launcher tells.
        if rank() == 0:
            log.error("%s", error, exc_info=error)
        return 2 if isinstance(error, UserError) else 1

    except KeyboardInterrupt:
        log.warning(interrupt.MESSAGE)
        return EXIT_CODES["SIGINT"]

    except Exception as error:
        tell_launcher(error)
        log.critical("%s: %s", type(error).__name__, error, exc_info=error)
        return 1


def end_process(code: int) -> NoReturn:
    """End this process with an exit code.

    After a signal the interpreter is not taken down, which takes a second that a person waits at the terminal.
    """
    # All is done: what Ctrl-C would stop now is the taking down alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code in EXIT_CODES.values():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
