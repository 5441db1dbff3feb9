"""Pointers that git leaves in place of large files where Git LFS (large file storage) has not fetched them."""

from pathlib import Path

FIRST_BYTES = b"version https://git-lfs"
"""Beginning of every pointer."""

MOST_BYTES = 1000
"""Largest size of a pointer, which has three short lines."""


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file only points to the one that is meant.

    Raises:
        OSError: it cannot be read.
    """
    if file.stat().st_size > MOST_BYTES:
        return False

    with open(file, "rb") as stream:
        return stream.read(len(FIRST_BYTES)) == FIRST_BYTES
