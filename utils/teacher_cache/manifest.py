"""What a teacher cache was made from, and whether it may be used."""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.settings import CacheConfig
from ..errors import UserError
from ..files import clean_leftovers, sha256_of, write_json
from ..paths import user_path
from .codec import FORMAT, Codec
from .store import MANIFEST, SHARDS, TeacherCache, _told

log = logging.getLogger(__name__)


LEFT_BEHIND = 3600.0
"""Seconds after which a file that is not whole is nobody's: another process may write a shard, which takes less."""


OVERRIDABLE = {"teacher", "teacher_dtype", "text"}
"""Differences that a user may know to be none; with others the stored signals do not fit."""


def open_cache(
    config: CacheConfig,
    codec: Codec,
    identity: Mapping[str, str],
    text: str,
    *,
    main: bool,
    asked: Mapping[str, Any] | None = None,
) -> TeacherCache:
    """The cache in a folder, checked to be that of this teacher, these tokenizers and this text; made if there is none.

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
    here = {**identity, "top_k": codec.top_k, "storage": codec.storage, "vocabulary": codec.vocabulary}
    if main:
        with _told(folder, 0):
            if not (folder / MANIFEST).exists():
                _create(folder, here, text, asked or {})
        _check(folder, here, text, asked or {}, config.accept_mismatch)
        _remove_damaged(folder)
    return TeacherCache(folder, codec, identity)


def _create(folder: Path, here: Mapping[str, Any], text: str, asked: Mapping[str, Any]) -> None:
    if folder.is_dir() and any((folder / SHARDS).glob("*.safetensors")):
        raise UserError(
            f"teacher cache {folder}: there are shards and no {MANIFEST}, so that nothing tells what they were made "
            "from. Give another --cache-teacher DIR, or delete this one."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MANIFEST, {"format": FORMAT, "built_from": dict(here), "texts": [text], "asked": dict(asked)})


def _check(folder: Path, here: Mapping[str, Any], text: str, asked: Mapping[str, Any], accept: bool) -> None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        there, texts, version = dict(manifest["built_from"]), list(manifest["texts"]), manifest["format"]
        then = dict(manifest.get("asked", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"teacher cache {folder}: {MANIFEST} cannot be read ({type(error).__name__}). "
            "Give another --cache-teacher DIR, or delete this one."
        ) from error
    pairs = {key: (there.get(key, "-"), here.get(key, "-")) for key in sorted(there | here)}
    pairs |= {"format": (version, FORMAT), "text": (text if text in texts else texts[-1], text)}
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    if not differing:
        return
    told = differing | {f"asked for {k}": (was, asked[k]) for k, was in then.items() if was != asked.get(k, was)}
    lines = "".join(f"\n  - {key}: {was} -> {now}" for key, (was, now) in told.items())
    if not accept or not differing.keys() <= OVERRIDABLE:
        override = "--cache-accept-mismatch uses it all the same; missing windows are added."
        if not differing.keys() <= OVERRIDABLE:
            override = f"(--cache-accept-mismatch overrules {', '.join(sorted(OVERRIDABLE))} only.)"
        raise UserError(
            f"teacher cache {folder} was built from something else (cache -> now):{lines}\n"
            f"Expected the same. Put it back, or give another --cache-teacher DIR. {override}"
        )
    log.warning("teacher cache %s is used although it was built from something else (cache -> now):%s", folder, lines)
    if not os.access(folder, os.W_OK):
        return
    texts += [text] if "text" in differing else []
    # what is missing comes from here: whoever expects the first teacher alone must be told
    both = {key: f"{was}, then {now}" for key, (was, now) in differing.items() if key != "text" and now not in was}
    write_json(folder / MANIFEST, {**manifest, "texts": texts, "built_from": there | both})


def _remove_damaged(folder: Path) -> None:
    shards, began = folder / SHARDS, time.monotonic()
    writable = os.access(folder, os.W_OK)
    if writable:
        for place in (folder, shards):
            clean_leftovers(place, older_than=LEFT_BEHIND)
    files = sorted(shards.glob("*.safetensors"))
    damaged = [file for file in files if sha256_of(file) != file.stem]
    if damaged and not writable:
        raise UserError(
            f"teacher cache {folder} is damaged and cannot be written to: {len(damaged)} of {len(files)} shards do not "
            f"match their sha256, such as {damaged[0].name}. Copy it to a folder that can be written to (the damaged "
            "part is built again there), or give another --cache-teacher DIR."
        )
    for file in damaged:
        file.unlink(missing_ok=True)
        log.warning("teacher cache: shard %s does not match its sha256; its windows are built again", file.name)
    if files:
        size = sum(file.stat().st_size for file in files if file not in damaged)
        log.info("teacher cache %s: %.1f MB checked, %.1f s", folder, size / 1e6, time.monotonic() - began)
