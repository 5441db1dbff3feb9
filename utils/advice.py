"""Advice: what helps the user and does not change what is learned; where it fails, the run goes on without it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import RunError, UserError

log = logging.getLogger(__name__)


@contextmanager
def advice(what: str) -> Iterator[None]:
    """Log "no WHAT, because ..." in one line where the body raises; the traceback goes to nobody.

    For forecasts, estimates, pictures, samples and cards alone: what is trained, measured or exported must not depend
    on them. A caller finds out by the value that the body was to assign.

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
    """An exception in one line: its class, and the first words of its message."""
    words = " ".join(str(error).split())
    name = type(error).__name__
    if not words:
        return name
    return f"{name}: {words}" if len(words) <= 300 else f"{name}: {words[:297]}..."
