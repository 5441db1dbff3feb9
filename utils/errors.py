"""The two exceptions whose message is all that a user needs: a mistake of the user's, and an end that is no bug."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right: a setting, a path, a file's content, a missing device.

    The message says three things in plain words: what was found, what was expected, and what to do about it.
    `train.py` prints it without a traceback and exits with status 2. Faults of the program itself are never
    wrapped in it, so that their tracebacks survive.
    """


class RunError(RuntimeError):
    """What ends a run that was asked for rightly: a full disk, gradients that stay not finite, too little memory.

    The message says what happened, what is kept, and what to do. `train.py` prints it without a traceback and exits
    with status 1; the same command continues once the cause is gone.
    """


@contextmanager
def value_errors_are_the_users() -> Iterator[None]:
    """What is built inside tells by ValueError what does not fit together: that is the user's to put right."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
