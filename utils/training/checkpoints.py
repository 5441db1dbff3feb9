"""Checkpoints that are whole or absent, that prove it by hashes, and that know which run they belong to.

A checkpoint is a folder `step-XXXXXXXX`:

    GROUP.safetensors   tensors of one group, for instance everything that is trained
    NAME.pt             plain containers (optimizer, scheduler, scaler, random generators), weights_only
    state.json          where the run stood, and the fingerprint of config, data and tokenizers
    manifest.json       size and sha256 of each file above, written last

It is written to a hidden folder, flushed and renamed, so a kill at any moment leaves the earlier ones as
they were. Damage that a file format would not notice (a flipped bit loads silently) fails the hash.
"""

import json
import logging
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..config.plain import flatten
from ..config.resume_rules import check_same_run
from ..errors import RunError, UserError
from ..files import atomic_folder, clean_leftovers, free_disk, remove_folder
from ..paths import user_path
from . import checkpoint_files
from .checkpoint_files import FOLDER_NAME, folder_name

log = logging.getLogger(__name__)

REHEARSAL = "rehearsal"
"""Folder of a checkpoint that is written for trial, and gone at once."""
OVERHEAD = 1 << 20
"""Bytes that the files of a checkpoint take beside its tensors, at most: names, numbers, block sizes."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory; all tensors are on the CPU."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """By group. Names that shared memory when saved share it here."""
    objects: dict[str, Any]
    """Plain containers by name."""
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `OUTPUT/checkpoints`; created at the first save.
        keep: how many of the newest stay.
        fingerprint: what must be equal for a run to be continued (settings, hashes of data and tokenizers):
            nested dicts of JSON values. It is stored with each checkpoint and compared on resume.
        changed: other settings were asked for, as far as `resume_rules.CHANGEABLE` goes.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        fingerprint: Mapping[str, Any] | None = None,
        changed: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.keep = max(1, keep)
        # As it is read back from JSON: tuples become lists, which would differ.
        self.fingerprint = json.loads(json.dumps(dict(fingerprint or {})))
        self.changed = changed
        self._verified: set[Path] = set()

    # --- save -------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        objects: Mapping[str, Any],
        state: Mapping[str, Any],
        protect: Iterable[int] = (),
    ) -> Path:
        """Write the checkpoint of `step`; when it is whole on the disk, remove those no longer needed.

        Args:
            tensors: by group; each group becomes one safetensors file. Shared tensors are stored once.
            objects: plain containers of numbers, strings and tensors, as `torch.load(weights_only=True)` takes.
            state: JSON values.
            protect: steps that stay whatever their age, such as the best one.

        Raises:
            RunError: there is too little disk, or it could not be written. As with any other exception, nothing new
                is visible then and every older checkpoint is intact.
        """
        start = time.monotonic()
        final = self.folder / folder_name(step)

        # Compared before anything is written: a disk that is full stops the log and the cache as well.
        needed = _size_of(tensors) + _size_of(objects) + OVERHEAD
        if free_disk(self.folder) < needed:
            raise self._cannot_save(final, needed, "there is too little disk")

        try:
            with atomic_folder(final) as staging:
                for group, members in tensors.items():
                    checkpoint_files.save_tensors(staging / f"{group}.safetensors", members)
                for name, value in objects.items():
                    checkpoint_files.save_object(staging / f"{name}.pt", value)
                content = {"step": step, "state": dict(state), "fingerprint": self.fingerprint}
                (staging / checkpoint_files.STATE).write_text(json.dumps(content), encoding="utf-8")

                # The manifest lists all other files, so it comes last.
                size = checkpoint_files.write_manifest(staging, step)
        except (OSError, SafetensorError) as error:
            raise self._cannot_save(final, needed, _disk_error(error)) from error

        self._verified.add(final)
        log.debug("checkpoint %s saved (%.1f MB, %.1f s)", final.name, size / 1e6, time.monotonic() - start)
        self._prune(step, set(protect))
        return final

    def rehearse(self) -> None:
        """Write a tiny checkpoint and remove it again: what the disk or a library refuses shows before training.

        Raises:
            RunError: it could not be written.
        """
        trial = self.folder / REHEARSAL
        try:
            with atomic_folder(trial) as staging:
                checkpoint_files.save_tensors(staging / "rehearsal.safetensors", {"weight": torch.zeros(1)})
                checkpoint_files.save_object(staging / "rehearsal.pt", {"number": 1})
                checkpoint_files.write_manifest(staging, 0)

            remove_folder(trial)
            with suppress(OSError):  # not empty: there are checkpoints
                self.folder.rmdir()
        except (OSError, SafetensorError) as error:
            raise self._cannot_save(trial, OVERHEAD, _disk_error(error)) from error

    def _prune(self, step: int, protect: set[int]) -> None:
        """Remove what the checkpoint just committed makes unnecessary.

        Older ones beyond `keep`; and any later one: it was damaged, or the run was taken up again before it.
        A removal that fails is reported and tried again after the next save.
        """
        older = [other for other in self.steps() if other < step]
        later = [other for other in self.steps() if other > step]
        # Newest first; the checkpoint of `step` is the first of those that stay.
        outdated = [other for other in older[self.keep - 1 :] if other not in protect]

        for other in later + outdated:
            path = self.folder / folder_name(other)
            try:
                remove_folder(path)
                self._verified.discard(path)
            except OSError as error:
                log.warning("old checkpoint %s could not be removed: %s", path, error)

    def _cannot_save(self, final: Path, needed: int, why: str) -> RunError:
        """Return the error of a checkpoint that cannot be written; `needed`: bytes."""
        newest = next(iter(self.steps().values()), None)
        if newest is None:
            consequence = "There is no earlier one."
            continuation = "the start."
        else:
            consequence = f"{newest.name} is kept."
            continuation = "it."

        return RunError(
            f"checkpoint {final.name} cannot be saved in {self.folder}: {why}. It needs {needed / 1e6:,.1f} MB, "
            f"{free_disk(self.folder) / 1e6:,.1f} MB are free. {consequence} "
            f"Free some space there, then the same command continues from {continuation}"
        )

    # --- choose -----------------------------------------------------------------------------------------------------

    def steps(self) -> dict[int, Path]:
        """Return every checkpoint folder by its step, whole or not, newest first. Other folders are not looked at."""
        if not self.folder.is_dir():
            return {}

        folders = {}
        for path in self.folder.iterdir():
            match = FOLDER_NAME.fullmatch(path.name)
            if match and path.is_dir():
                folders[int(match[1])] = path
        return dict(sorted(folders.items(), reverse=True))

    def newest_whole(self) -> Path | None:
        """Return the newest checkpoint that passes its hashes; None if there is none at all.

        A rejected one is named in a warning, with the reason.

        Raises:
            UserError: there are checkpoints, and every one is damaged.
        """
        rejected = []
        for path in self.steps().values():
            damage = self._damage(path)
            if damage is None:
                return path
            rejected.append(f"{path.name}: {damage}")
            log.warning("checkpoint %s rejected: %s", path.name, damage)

        # Never a fresh start instead: it would overwrite what may still be repaired.
        if rejected:
            raise UserError(
                f"no checkpoint in {self.folder} is whole:\n"
                + "".join(f"  - {line}\n" for line in rejected)
                + "Expected at least one to continue from. Choose another --output-dir to train from the start, "
                "--resume PATH for a checkpoint kept elsewhere, or delete the folder."
            )
        return None

    def resume_point(self, resume: str = "auto") -> Path | None:
        """Return the checkpoint to continue from, verified and of this very run, or None for a fresh start.

        Leftovers of an interrupted save are removed first, so call it in one process, before training.

        Args:
            resume: `auto` (the newest whole one, if there is any), `never`, or a path: a checkpoint, or a folder
                of checkpoints, or a run that has such a folder.

        Raises:
            UserError: `never` although there are checkpoints, a path that holds none or a damaged one, a path
                outside this run although it has checkpoints of its own, or a run with other settings.
        """
        if names := clean_leftovers(self.folder):
            log.info("leftovers of an interrupted save handled in %s: %s", self.folder, ", ".join(names))

        if resume == "never":
            self._check_fresh_start()
            return None

        path = self.newest_whole() if resume == "auto" else self._checkpoint_at(user_path(resume))
        # Settings, text and tokenizers must be those of the checkpoint.
        if path is not None:
            saved = checkpoint_files.read_state(path).get("fingerprint", {})
            check_same_run(str(path), flatten(saved), flatten(self.fingerprint), self.changed)
        return path

    def check_path(self, resume: str) -> None:
        """Find a mistake in --resume PATH, with nothing loaded; `resume_point` compares the settings later.

        Raises:
            UserError: a path that holds no checkpoint or a damaged one, or that is outside this run.
        """
        if resume not in ("auto", "never"):
            self._checkpoint_at(user_path(resume))

    def _check_fresh_start(self) -> None:
        """Check that there is no earlier run in the folder.

        Raises:
            UserError: there is one.
        """
        steps = self.steps()
        if steps:
            raise UserError(
                f"{self.folder} holds checkpoints of an earlier run (up to step {max(steps)}), and a fresh start was "
                "asked for: the two would be mixed up. Choose another --output-dir, continue that run with "
                "--resume auto, or delete the folder."
            )

    def _checkpoint_at(self, path: Path) -> Path:
        """Return the whole checkpoint that a user's path means.

        Raises:
            UserError: there is none, it is damaged, or it is outside this run, which has checkpoints of its own.
        """
        # A damaged checkpoint may lack its manifest, and a copied one its name.
        is_checkpoint = (path / checkpoint_files.MANIFEST).exists() or FOLDER_NAME.fullmatch(path.name)
        if not is_checkpoint:
            path = _newest_in(path)

        if (damage := self._damage(path)) is not None:
            raise UserError(f"--resume {path}: {damage}. Choose another checkpoint, or --resume auto.")

        # Two runs in one folder could not be told apart at the next resume.
        steps = self.steps()
        if steps and path.resolve().parent != self.folder.resolve():
            raise UserError(
                f"--resume {path}: that is outside {self.folder}, which holds checkpoints of its own (up to step "
                f"{max(steps)}). Use --resume auto to continue those, or another --output-dir to continue that one."
            )
        return path

    def _damage(self, path: Path) -> str | None:
        """Return why a checkpoint cannot be trusted; None if it is whole. Hashes are computed once a checkpoint."""
        if path in self._verified:
            return None

        damage = checkpoint_files.verify(path)
        if damage is None:
            self._verified.add(path)
        return damage

    # --- load -------------------------------------------------------------------------------------------------------

    def load(self, path: str | Path) -> Checkpoint:
        """Read a checkpoint onto the CPU. Pickles are read with `weights_only=True`: no code of theirs runs.

        Raises:
            UserError: it is damaged, or holds something other than plain containers and tensors.
        """
        path = Path(path)
        if (damage := self._damage(path)) is not None:
            raise UserError(f"checkpoint {path} cannot be used: {damage}. Choose another one with --resume PATH.")

        tensors = {}
        objects = {}

        # Whole files can still hold what this program never wrote.
        try:
            content = checkpoint_files.read_state(path)
            for name in sorted(checkpoint_files.read_manifest(path)["files"]):
                file = path / name
                if file.suffix == ".safetensors":
                    tensors[file.stem] = checkpoint_files.load_tensors(file)
                elif file.suffix == ".pt":
                    objects[file.stem] = checkpoint_files.load_object(file)
        except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
            raise UserError(
                f"checkpoint {path} cannot be used: {type(error).__name__}: {str(error).splitlines()[0]}. "
                "Expected files written by this program; choose another one with --resume PATH."
            ) from error
        return Checkpoint(path, content["step"], tensors=tensors, objects=objects, state=content["state"])


def _newest_in(path: Path) -> Path:
    """Return the newest whole checkpoint of a run, or of a folder of checkpoints.

    Raises:
        UserError: there is none.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = CheckpointStore(folder).newest_whole()
    if newest is None:
        raise UserError(
            f"--resume {path}: no checkpoint there. Expected a folder step-XXXXXXXX with a manifest.json, or a "
            "run that has such folders; --resume auto looks in the output folder itself."
        )
    return newest


def _disk_error(error: Exception) -> str:
    """Return the reason that the system gives, without the path in it."""
    return getattr(error, "strerror", None) or str(error)


def _size_of(value: Any) -> int:
    """Return the bytes of the tensors in nested containers; at least what they take in files."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(_size_of(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_size_of(item) for item in value)
    return 0
