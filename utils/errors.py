"""The exceptions whose message is all that a user needs, and helpers for their messages."""

from collections.abc import Iterator
from contextlib import contextmanager


class Plain(BaseException):
    """An exception whose message a notebook shows without a traceback."""

    def _render_traceback_(self) -> list[str]:
        """Return the lines that IPython shows."""
        return [f"{type(self).__name__}: {self}"]


class UserError(Plain, Exception):
    """Something the user can put right: a setting, a path, a file's content, a missing device.

    The message says three things in plain words: what was found, what was expected, and what to do about it.
    `train.py` prints it without a traceback and exits with status 2. Faults of the program itself are never
    wrapped in it, so that their tracebacks survive.
    """


class RunError(Plain, RuntimeError):
    """An end of a run that is no mistake of the user: a full disk, gradients that stay not finite, too little memory.

    The message says what happened, what is kept, and what to do. `train.py` prints it without a traceback and exits
    with status 1; the same command continues once the cause is gone.
    """


class TeacherGone(RunError):
    """A teacher behind a server that has not answered for too long; a training saves a checkpoint first."""

    in_every_process = False
    """All processes of the run raise it at the same place, so that they can save a checkpoint together."""


@contextmanager
def value_errors_are_the_users() -> Iterator[None]:
    """Turn a ValueError of the body into a UserError with the same message.

    For constructors that check their arguments, where these come straight from the user's settings.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def shorten(text: str, longest: int) -> str:
    """Return a text cut to at most `longest` characters, with three dots at the cut; for what a message quotes."""
    if len(text) <= longest:
        return text
    return f"{text[: longest - 3]}..."
