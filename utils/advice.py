"""Advice: what helps the user and does not change what is learned; where it fails, the run goes on without it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RunError, UserError, shorten

log = logging.getLogger(__name__)

LONGEST_REASON = 300
"""Characters of an exception's message that are logged."""


@contextmanager
def advice(what: str) -> Iterator[None]:
    """Log "no WHAT, because of ..." in one line where the body raises; the traceback is dropped.

    For forecasts, estimates, pictures, samples and cards alone: what is trained, measured or exported must not depend
    on them. A caller notices the failure by the value that the body was to assign.

    Raises:
        UserError, RunError: as the body does: these say themselves what is wrong, and that it matters.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:
        log.warning("no %s, because of %s", what, reason(error))


def reason(error: BaseException) -> str:
    """Return an exception in one line: its class, and the first words of its message."""
    name = type(error).__name__
    # line breaks and indentation of a long message would tear the log's line apart
    message = " ".join(str(error).split())

    if not message:
        return name
    return f"{name}: {shorten(message, LONGEST_REASON)}"
