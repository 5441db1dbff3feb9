"""Paths as users write them."""

import os
from pathlib import Path

from .errors import UserError


def user_path(name: str | Path) -> Path:
    """Return the path that a user means: `~` is the home folder.

    Raises:
        UserError: a home that nobody knows, such as `~nobody/x`. Taken as it is, it would become a folder of that name.
    """
    path = os.path.expanduser(name)

    if path.startswith("~"):
        user = Path(path).parts[0]
        raise UserError(
            f"{name}: {user} stands for a home folder, and this machine knows none for it. Expected ~ for your own "
            f"one, the whole path, or ./{path} for a folder that is called so."
        )
    return Path(path)
