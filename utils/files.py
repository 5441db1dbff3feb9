"""Files and folders that are either whole or absent, whatever kills the process.

Everything is written to a hidden staging name next to its final name (same file system), flushed to the
disk, and renamed with `os.replace`. A reader therefore never sees half a file, and after a crash only a
hidden leftover remains, which `clean_leftovers` removes at the next start.

Also here: hashes of files, and the space on a disk.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_STAGING = ".staging-"
_REPLACED = ".replaced-"
_DELETED = ".deleted-"

_CHUNK = 2**20
"""Bytes that are read at once."""


# ------------------------------------------------------------------------------------------------------- files


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8, line ends as given) to `path`, replacing what was there in one step.

    A file name that is no UTF-8 reaches Python with characters that UTF-8 lacks. Those are written as `\\udcXX`, which
    in JSON means that very character.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, replacing what was there in one step."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_STAGING + path.name + "-")
    staging = Path(name)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

        # mkstemp makes private files; an output should look like any other
        os.chmod(staging, 0o666 & ~_umask())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise

    # the rename itself is on the disk only when the folder is
    sync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: the value holds NaN or infinity, which are not JSON.
        TypeError: the value holds something JSON has no form for.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def sha256_of(file: str | Path) -> str:
    """Return the hash of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- folders


@contextmanager
def atomic_folder(final: str | Path) -> Iterator[Path]:
    """Provide a staging folder that becomes `final` when the block ends, or vanishes when the block raises.

    On success every file in it is flushed to the disk before the rename. If `final` exists already it is
    renamed aside first and removed last; a crash between the two renames is undone by `clean_leftovers`.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=final.parent, prefix=_STAGING + final.name + "-"))
    aside = final.parent / (_REPLACED + final.name)
    try:
        yield staging

        # everything is on the disk before it gets its name
        _sync_tree(staging)
        os.chmod(staging, 0o777 & ~_umask())

        # no system renames a folder onto one that has files in it
        if final.exists():
            remove_folder(aside)
            os.replace(final, aside)
        os.replace(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise

    sync_folder(final.parent)
    remove_folder(aside)


def remove_folder(folder: str | Path) -> None:
    """Remove a folder in one visible step: hidden by a rename first, then deleted. Missing is fine.

    Raises:
        OSError: the rename failed; the folder is untouched. (A deletion that fails half-way is silent: what
            is left is hidden and `clean_leftovers` tries again.)
    """
    folder = Path(folder)
    if not folder.exists():
        return

    hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_DELETED))
    os.replace(folder, hidden / folder.name)
    shutil.rmtree(hidden, ignore_errors=True)


def clean_leftovers(parent: str | Path, older_than: float = 0.0) -> list[str]:
    """Remove what an interrupted writer left in `parent`; put back a folder caught between two renames.

    Args:
        older_than: seconds for which it must not have been changed, so that nobody writes it any more. With 0 call
            this only when no other process writes there.

    Returns:
        The names that were removed or put back.
    """
    parent = Path(parent)
    if not parent.is_dir():
        return []

    handled = []
    latest = time.time() - older_than
    for path in sorted(parent.iterdir()):
        if older_than and _modified(path) > latest:
            continue

        final = parent / path.name.removeprefix(_REPLACED)
        if path.name.startswith(_REPLACED) and not final.exists():
            # the new folder did not come to be: the old one is still the whole one
            os.replace(path, final)
            handled.append(path.name)
        elif path.name.startswith((_STAGING, _REPLACED, _DELETED)):
            _delete(path)
            handled.append(path.name)
    return handled


def _delete(path: Path) -> None:
    """Delete a file or folder; what cannot be deleted of a folder stays."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _modified(path: Path) -> float:
    """Return when a path was changed, in seconds of `time.time()`; infinity if it vanished in the meantime."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf


# -------------------------------------------------------------------------------------------------------- disk


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries (the names in it) to the disk, where the system can do that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    """Flush a folder, and everything below it, to the disk; give its files the usual permissions."""
    mode = 0o666 & ~_umask()  # some writers, safetensors among them, make private files
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(path, mode)
        sync_folder(root)


def _umask() -> int:
    """Return the permissions that new files of this process lack; the system tells them only when they are set."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def free_disk(folder: Path) -> int:
    """Return the bytes free where a folder is, or will be."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """Return the folder itself, or where there is none yet, the nearest one above it (or the file in its place)."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())
