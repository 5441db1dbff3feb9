"""Manifest of a teacher cache: what it was built from, compared with what the run has now."""

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..config.settings import CacheConfig, ModelConfig
from ..errors import UserError
from ..files import clean_leftovers, sha256_of, write_json
from ..paths import user_path
from .codec import FORMAT, Codec
from .store import MANIFEST, SHARDS, TeacherCache, explained_write_errors

log = logging.getLogger(__name__)

DTYPES = get_args(get_type_hints(ModelConfig)["dtype"])
"""Precisions of a teacher that `--teacher-dtype` takes."""

LEFT_BEHIND = 3600.0
"""Seconds after which a file that is not whole is nobody's: another process may write a shard, which takes less."""

OVERRIDABLE = {"teacher", "teacher_dtype", "text"}
"""Differences that a user may know to be none; with others the stored signals do not fit."""


@dataclass(frozen=True)
class _Manifest:
    """Content of a manifest: read from a cache, or as a run would write it now."""

    built_from: dict[str, Any]
    """Fingerprints and settings that the signals depend on."""
    texts: list[str]
    """Fingerprints of the training texts that it was used with."""
    version: Any
    """Of the format of the shards."""
    names: dict[str, Any]
    """Settings that explain a difference of fingerprints."""
    content: Mapping[str, Any]
    """Everything that is in the file."""

    @classmethod
    def of_run(cls, built_from: dict[str, Any], text: str, names: dict[str, Any]) -> "_Manifest":
        """Return the manifest of a cache that a run begins."""
        content = {"format": FORMAT, "built_from": built_from, "texts": [text], "asked": names}
        return cls(built_from, [text], version=FORMAT, names=names, content=content)

    @classmethod
    def read(cls, folder: Path) -> "_Manifest":
        """Read the manifest in a folder.

        Raises:
            UserError: it cannot be read.
        """
        try:
            content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return cls(
                built_from=dict(content["built_from"]),
                texts=list(content["texts"]),
                version=content["format"],
                names=dict(content.get("asked", {})),  # caches of older versions have none
                content=content,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"teacher cache {folder}: {MANIFEST} cannot be read ({type(error).__name__}). "
                "Give another --cache-teacher DIR, or delete this one."
            ) from error


def stored_teacher(folder: Path) -> str | None:
    """Return the teacher that a cache says it was built from; None: there is no cache, or its manifest is damaged."""
    if not (folder / MANIFEST).is_file():
        return None
    with suppress(UserError):
        return str(_Manifest.read(folder).built_from.get("teacher"))
    return None


def open_cache(
    config: CacheConfig,
    codec: Codec,
    identity: Mapping[str, str],
    text: str,
    *,
    main: bool,
    asked: Mapping[str, Any] | None = None,
) -> TeacherCache:
    """Open the cache in a folder, checked to be that of this teacher, these tokenizers and this text; it is made if
    there is none.

    Damaged shards are removed, and their windows are missing then.

    Args:
        identity: what signals depend on: fingerprints of the teacher's weights, the tokenizers and so on.
        text: fingerprint of the training text.
        main: whether this is the process that checks and writes, before the others.
        asked: settings that explain a difference of fingerprints, such as names; never a reason to refuse.

    Raises:
        UserError: the cache was built from something else, or is damaged and may not be written to.
        RunError: it cannot be made.
    """
    folder = user_path(config.folder)
    if main:
        storage = {"top_k": codec.top_k, "storage": codec.storage, "vocabulary": codec.vocabulary}
        now = _Manifest.of_run({**identity, **storage}, text, names=dict(asked or {}))
        with explained_write_errors(folder, 0):
            if not (folder / MANIFEST).exists():
                _create(folder, now)
        _check(folder, now, config.accept_mismatch)
        _remove_damaged(folder)
    return TeacherCache(folder, codec, identity)


def _create(folder: Path, now: _Manifest) -> None:
    """Make an empty cache.

    Raises:
        UserError: there are shards already.
    """
    if folder.is_dir() and any((folder / SHARDS).glob("*.safetensors")):
        raise UserError(
            f"teacher cache {folder}: there are shards and no {MANIFEST}, so that nothing tells what they were made "
            "from. Give another --cache-teacher DIR, or delete this one."
        )

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MANIFEST, now.content)


# ---------------------------------------------------------------------------------------- the same as before


def _check(folder: Path, now: _Manifest, accept: bool) -> None:
    """Compare a cache with what the run has now, and note what differs where that is accepted.

    Raises:
        UserError: something differs, and is not or cannot be accepted.
    """
    stored = _Manifest.read(folder)
    differences = _differences(stored, now)
    if not differences:
        return

    lines = _as_lines(differences, stored, now)
    can_be_accepted = differences.keys() <= OVERRIDABLE
    if not accept or not can_be_accepted:
        override = "--cache-accept-mismatch uses it all the same; missing windows are added."
        if not can_be_accepted:
            override = f"(--cache-accept-mismatch overrules {', '.join(sorted(OVERRIDABLE))} only.)"
        # Often nobody has changed it: `auto` means another precision on another machine.
        before, _ = differences.get("teacher_dtype", ("", ""))
        flag = f" (--teacher-dtype {before})" if before in DTYPES else ""
        raise UserError(
            f"teacher cache {folder} was built from something else (cache -> now):{lines}\n"
            f"Expected the same. Put it back{flag}, or give another --cache-teacher DIR. {override}"
        )

    log.warning("teacher cache %s is used although it was built from something else (cache -> now):%s", folder, lines)
    if os.access(folder, os.W_OK):
        _note(folder, stored, differences)


def _differences(stored: _Manifest, now: _Manifest) -> dict[str, tuple[Any, Any]]:
    """Return name -> (value in the cache, value now) of everything that differs."""
    pairs = {}
    for key in sorted(stored.built_from | now.built_from):
        pairs[key] = (stored.built_from.get(key, "-"), now.built_from.get(key, "-"))

    # a cache may have been used with several texts, and this may be any of them
    [text] = now.texts
    pairs["format"] = (stored.version, now.version)
    pairs["text"] = (text if text in stored.texts else stored.texts[-1], text)
    return {key: (before, after) for key, (before, after) in pairs.items() if before != after}


def _as_lines(differences: Mapping[str, tuple[Any, Any]], stored: _Manifest, now: _Manifest) -> str:
    """Return a line for each difference, and for each name that explains one."""
    pairs = dict(differences)
    for key, before in stored.names.items():
        if before != now.names.get(key, before):
            pairs[f"asked for {key}"] = (before, now.names[key])
    return "".join(f"\n  - {key}: {before} -> {after}" for key, (before, after) in pairs.items())


def _note(folder: Path, stored: _Manifest, differences: Mapping[str, tuple[Any, Any]]) -> None:
    """Write accepted differences into the manifest."""
    texts = list(stored.texts)
    built_from = dict(stored.built_from)
    for key, (before, after) in differences.items():
        if key == "text":
            texts.append(after)

        # missing windows come from here: whoever expects the first teacher alone must be told
        elif after not in before:
            built_from[key] = f"{before}, then {after}"
    write_json(folder / MANIFEST, {**stored.content, "texts": texts, "built_from": built_from})


# ------------------------------------------------------------------------------------------- whole shards


def _remove_damaged(folder: Path) -> None:
    """Remove shards that are not whole, and what killed processes have left.

    Raises:
        UserError: a shard is damaged, and the cache cannot be written to.
    """
    began = time.monotonic()
    shards = folder / SHARDS
    is_writable = os.access(folder, os.W_OK)
    if is_writable:
        for place in (folder, shards):
            clean_leftovers(place, older_than=LEFT_BEHIND)

    # a shard's name is the hash of its bytes
    files = sorted(shards.glob("*.safetensors"))
    damaged = [file for file in files if sha256_of(file) != file.stem]
    if damaged and not is_writable:
        raise UserError(
            f"teacher cache {folder} is damaged and cannot be written to: {len(damaged)} of {len(files)} shards do not "
            f"match their sha256, such as {damaged[0].name}. Copy it to a folder that can be written to (the damaged "
            "part is built again there), or give another --cache-teacher DIR."
        )

    for file in damaged:
        file.unlink(missing_ok=True)
        log.warning("teacher cache: shard %s does not match its sha256; its windows are built again", file.name)

    if files:
        size = _size(file for file in files if file not in damaged)
        log.info("teacher cache %s: %.1f MB checked, %.1f s", folder, size / 1e6, time.monotonic() - began)


def _size(files: Iterable[Path]) -> int:
    """Return the bytes of files."""
    return sum(file.stat().st_size for file in files)
