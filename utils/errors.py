"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """Something the user can put right: a setting, a path, a file's content, a missing device.

    The message says three things in plain words: what was found, what was expected, and what to do about it.
    `train.py` prints it without a traceback and exits with status 2. Faults of the program itself are never
    wrapped in it, so that their tracebacks survive.
    """
