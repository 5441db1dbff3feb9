"""The folder of a run: refused early when it cannot serve, and the record of what was run in it."""

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..config.resume_rules import check_same_run, identity
from ..config.settings import CAPTURES
from ..config.yaml_files import as_yaml, get_dotted, load_yaml
from ..errors import UserError
from ..files import clean_leftovers, nearest_existing, write_text
from ..machine import hardware
from ..paths import user_path
from ..run_layout import CHECKPOINTS, CONFIG, FILES, FOLDERS, LAYERS, LOCK, LOG, REPORT_JSON, STUDENT

PATIENCE = 15
"""Seconds that the data workers of a run that was killed may take to notice it; they keep its lock."""
BEFORE_TRAINING = {CONFIG, LAYERS, LOCK, LOG}
"""What a run writes before there is anything to continue."""


def check(folder: Path, config: Mapping[str, Any], resume: str) -> None:
    """Make sure, before anything is loaded, that a run may write here and that its teacher cache has a place.

    The folder of the run is created.

    Raises:
        UserError: a file is in the way, the folder cannot be written to, it holds another run's checkpoints, or there
            is no teacher cache and none can be made.
    """
    _check_name(folder)
    refuse_sources(folder, config)
    _nearest_folder("output_dir", folder, "--output-dir")
    if cache := config.get("cache", {}).get("folder"):
        _check_cache_folder(user_path(cache))

    # Trying tells more than permissions do: a full or read-only disk too.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"output_dir {folder} cannot be written to ({error.strerror or error}). Choose another --output-dir."
        ) from error

    if obstacles := _obstacles(folder):
        raise UserError(
            f"output_dir {folder} holds something else under names that a run writes to: {', '.join(obstacles)}. "
            "Choose another --output-dir, or move it away."
        )

    _check_continuation(folder, config, resume)


def _check_cache_folder(cache: Path) -> None:
    """Check that a teacher cache is there, or can be made.

    Raises:
        UserError: it cannot be made.
    """
    nearest = _nearest_folder("teacher cache", cache, "--cache-teacher DIR")
    # a cache that is there may be read-only
    if nearest != cache and not os.access(nearest, os.W_OK):
        raise UserError(
            f"teacher cache {cache} cannot be made: {nearest} cannot be written to. Choose another --cache-teacher DIR."
        )


def _check_continuation(folder: Path, config: Mapping[str, Any], resume: str) -> None:
    """Check that checkpoints in the folder, if any, are of this run and may be continued.

    Raises:
        UserError: they are of another run, or a fresh start was asked for.
    """
    if not any((folder / CHECKPOINTS).glob("step-*")):
        return

    if resume == "never":
        raise UserError(
            f"output_dir {folder} holds checkpoints of an earlier run, and a fresh start was asked for. Choose another "
            "--output-dir, continue that run with --resume auto, or delete the folder."
        )
    if not (folder / CONFIG).is_file():
        return

    earlier = identity(load_yaml(folder / CONFIG))
    try:
        check_same_run(f"output_dir {folder}", earlier, identity(config), config["resume_changed"])
    except UserError as error:
        if not (folder / REPORT_JSON).is_file():
            raise
        # More steps are asked for most often.
        advice = follow_up(folder, earlier.get("student.init", "pretrained"))
        raise UserError(f"{error}\nThat run is finished; {advice}.") from None


def follow_up(folder: Path, init: str) -> str:
    """Return how a finished run is trained further: by a new one, whose schedule is made for its own steps.

    Args:
        init: of the finished run's student; random weights would be drawn anew, and layers cut once more.
    """
    student = shlex.quote(str(folder / STUDENT))
    keep_weights = "" if init == "pretrained" else " --student-init pretrained"
    return (
        f"to train its student further, start a new run from it: --student {student}{keep_weights}, in another "
        "--output-dir"
    )


def _check_name(folder: Path) -> None:
    """Make sure that every library can write here: those that write weights and tokenizers take UTF-8 alone.

    Raises:
        UserError: the name is no UTF-8.
    """
    try:
        str(folder.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"output_dir {folder}: its name is no UTF-8, and weights cannot be written there. Choose another "
            "--output-dir."
        ) from None


def refuse_sources(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to write a run where its models or texts are: the next look at them would find the run's files.

    Raises:
        UserError: names the setting, and the folder that the run needs.
    """
    output = folder.resolve()
    for key in ("teacher.name", "student.name", "data.train", "data.eval"):
        names = get_dotted(config, key) or []
        for name in [names] if isinstance(names, str) else names:
            path = name.removeprefix(CAPTURES)
            if not os.path.isdir(os.path.expanduser(path)):
                continue

            source = user_path(path).resolve()
            is_replaced_by_export = key.endswith("name") and source == output / STUDENT
            if output == source or source in output.parents or is_replaced_by_export:
                raise UserError(
                    f"output_dir {folder}: the run would write into {name}, which it reads from ({key}). Choose "
                    "another --output-dir, outside of models and texts."
                )


def _obstacles(folder: Path) -> list[str]:
    """Name what has a name that a run writes to and is of another kind, such as a folder called train.log."""
    problems = []

    for name in FILES:
        path = folder / name
        if path.is_dir():
            problems.append(f"{name} is a folder, not a file")
        elif path.exists() and not path.is_file():
            problems.append(f"{name} is a device or a pipe, not a file")

    # The other way round: a file where a folder will be.
    for name in FOLDERS:
        path = folder / name
        if path.exists() and not path.is_dir():
            problems.append(f"{name} is a file, not a folder")

    return problems


def _nearest_folder(what: str, folder: Path, flag: str) -> Path:
    """Return the folder itself, or where there is none yet, the nearest one above it.

    Raises:
        UserError: that is a file.
    """
    existing = nearest_existing(folder)
    if not existing.is_dir():
        raise UserError(f"{what} {folder}: {existing} is a file. Expected a folder; choose another {flag}.")
    return existing


@contextmanager
def locked_run_folder(name: str) -> Iterator[None]:
    """Lock a run's folder, so that no other run writes there meanwhile.

    A user's mistake that is found before training leaves no folder behind that was not there before.

    Raises:
        UserError: another run is there.
    """
    folder = Path(name)
    new_folders = [path for path in (folder, *folder.absolute().parents) if not os.path.exists(path)]

    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise UserError(
            f"output_dir {folder}: another run is writing there. Wait for its end, stop it, or choose another "
            "--output-dir."
        ) from None
    except OSError:
        pass  # what is wrong with the folder `check` tells

    try:
        yield
    except UserError:
        if new_folders:
            _remove_unused(folder, new_folders[1:])
        raise
    finally:
        lock.release()


def _remove_unused(folder: Path, parents: Sequence[Path]) -> None:
    """Remove a run's folder, and those that were made above it, if nothing was trained there."""
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= BEFORE_TRAINING:
        return

    # Windows keeps the log, which is still open.
    shutil.rmtree(folder, ignore_errors=True)
    for parent in parents:
        with suppress(OSError):  # not empty
            parent.rmdir()


def write_config(folder: Path, config: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Write config.yaml: every setting after defaults and flags, so that the file is itself a recipe.

    The environment, and `notes` (what was decided and why), follow as comments. Half-written files of a run that
    was killed here are removed first; call it in one process.
    """
    clean_leftovers(folder)
    remarks = as_yaml({"notes": dict(notes), "environment": hardware.describe()})
    comments = "".join(f"# {line}\n" for line in remarks.splitlines())
    write_text(folder / CONFIG, f"{as_yaml(dict(config))}\n{comments}")
