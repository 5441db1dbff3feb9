"""Paths as users write them."""

import os
from pathlib import Path


def user_path(name: str | Path) -> Path:
    """The path that a user means: `~` is the home folder.

    A home that nobody knows (`~nobody/x`) stays as it is, for the message that there is no such file; `Path.expanduser`
    raises.
    """
    return Path(os.path.expanduser(name))
