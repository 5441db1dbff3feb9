"""Paths as users write them: `~` for their home, and names that no file can have; and the folder of caches."""

import os
from pathlib import Path

from .errors import UserError

MOST_BYTES_OF_PART = 255
"""Longest name of one folder or file on common file systems."""

MOST_CHARACTERS = 4000
"""Longest path on Linux, less some for the names that a run adds to that of its folder."""


def user_path(name: str | Path) -> Path:
    """Return the path that a user means: `~` is the home folder.

    Raises:
        UserError: a home that nobody knows, such as `~nobody/x`. Taken as it is, it would become a folder of that name.
            Or a name that no file system takes: too long, or with a null character in it.
    """
    path = os.path.expanduser(name)

    # still there: Python leaves a home that it does not know as it is
    if path.startswith("~"):
        user = Path(path).parts[0]
        raise UserError(
            f"{name}: {user} stands for a home folder, and this machine knows none for it. Expected ~ for your own "
            f"one, the whole path, or ./{path} for a folder that is called so."
        )

    _require_possible(path)
    return Path(path)


def cache_dir() -> Path:
    """Return $CURRICULUM_DISTILLATION_CACHE, or `curriculum_distillation` in the user's cache folder (XDG)."""
    if chosen := os.environ.get("CURRICULUM_DISTILLATION_CACHE"):
        return user_path(chosen)

    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "curriculum_distillation"


def _require_possible(path: str) -> None:
    """Refuse what cannot be the name of a file, whether there is one or not.

    Raises:
        UserError: it is too long, or there is a null character in it.
    """
    if "\0" in path:
        raise UserError(f"{path!r}: there is a null character in this name, and no file can be called so.")

    # in bytes, for file systems count these; a name may hold characters that are no UTF-8
    lengths = [len(part.encode(errors="replace")) for part in Path(path).parts]
    longest_part = max(lengths, default=0)
    if longest_part > MOST_BYTES_OF_PART or len(path) > MOST_CHARACTERS:
        raise UserError(
            f"No such file or folder can be: {path[:60]}... is longer than a file system takes, "
            f"{len(path):,} characters. Expected at most {MOST_BYTES_OF_PART} bytes between two slashes, "
            f"and {MOST_CHARACTERS:,} characters in all."
        )
