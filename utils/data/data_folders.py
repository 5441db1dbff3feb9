"""Files of a folder that are data.

What a program leaves beside data is not data: caches of `map` and `filter`, metadata, markers of a finished job, hidden
files, half downloads. `choose_files` names what it leaves out, so that nothing is left out in silence.
"""

import json
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".arrow")
"""Of files that can be read."""

SPLIT_NAMES = {"validation": "validation|valid|val|eval|dev"}
"""Split -> other names of it, as a regular expression."""

STATE, SPLITS = "state.json", "dataset_dict.json"
"""What `save_to_disk` of `datasets` writes beside the data: of one table, and of a dictionary of them."""

METADATA = {
    STATE,
    SPLITS,
    "dataset_info.json",
    "dataset_infos.json",
    "dataset-metadata.json",
    "croissant.json",
}
OF_A_MODEL = {
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
}
"""Files of a model and its tokenizer under names of types that are read as data."""

CACHE = re.compile(r"cache-[^/]*\.arrow|tmp[^/]*\.arrow")
"""What `map`, `filter`, `shuffle` and `select` of `datasets` leave beside the data: other rows, or row numbers."""

ABOUT = re.compile(r"(readme|licen[cs]e|notice|copying|changelog|requirements)(\.(txt|md|rst))?", re.IGNORECASE)
"""Texts about data, which are none."""

HIDDEN = (".", "_")
"""First characters of names that other readers of folders (Arrow, Spark, Hive) leave out too: .ipynb_checkpoints,
._data.jsonl, __MACOSX, _SUCCESS, _delta_log."""

MOST_NAMED = 8
"""Files that a message names."""


@dataclass
class Contents:
    """The files of a folder, sorted by what becomes of them."""

    data: list[Path] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)
    """Known not to be data."""
    unread: list[Path] = field(default_factory=list)
    """Of a type that is not read, or a link to nothing: it may be data."""


def choose_files(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder and of those in it, in the order of their paths, and log what is left out.

    Of a folder that `datasets` has saved these are the files that its state.json lists. If files or folders are named
    after the split (train-00000-of-00001.parquet), they are preferred to all others.

    Raises:
        UserError: there is no data file, or a listed one is missing.
    """
    contents = Contents()
    _sort(folder, contents, visited=set())
    if not contents.data:
        inside = _named(folder, [*contents.unread, *contents.aside]) or "nothing"
        raise UserError(
            f"No data file in folder {folder}: expected one of {', '.join(SUFFIXES)}. In {folder} there is: {inside}."
        )

    files = sorted(contents.data)
    of_split = re.compile(rf"({SPLIT_NAMES.get(split, re.escape(split))})([-_.]|$)", re.IGNORECASE)
    preferred = [file for file in files if any(of_split.match(part) for part in file.relative_to(folder).parts)]
    if preferred:
        _log_left_out(folder, [file for file in files if file not in preferred], f"not of the split {split!r}")

    _log_left_out(folder, contents.aside, "no data: caches, metadata, hidden files, files of a model")
    if contents.unread:
        log.warning(
            "%s: not read, of another type or a link to nothing: %s. Read are %s; unpack or convert what is data",
            folder,
            _named(folder, contents.unread),
            ", ".join(SUFFIXES),
        )
    return preferred or files


def without_caches(pattern: str, files: Iterable[Path]) -> list[Path]:
    """Return the files that match a pattern, but for caches of `datasets` beside a table; log what is left out."""
    files = list(files)
    kept = [file for file in files if not CACHE.fullmatch(file.name)]
    left_out = [file for file in files if file not in kept]
    if kept and left_out:
        log.info("%s: left out, caches of `datasets`: %s", pattern, ", ".join(map(str, left_out[:MOST_NAMED])))
    return kept or files


def _sort(folder: Path, contents: Contents, visited: set[Path]) -> None:
    """Sort what is in a folder into `contents`.

    Raises:
        UserError: it cannot be read.
    """
    real = folder.resolve()
    if real in visited:  # a link to a folder that was read already
        contents.aside.append(folder)
        return
    visited.add(real)

    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}.") from error

    saved = _saved_data(folder)
    if saved is not None:
        contents.data += saved
        contents.aside += [path for path in children if path not in saved]
        return

    splits = _saved_splits(folder)
    for path in children:
        if path.name.startswith(HIDDEN) or _is_known(path):
            contents.aside.append(path)
        elif path.is_dir():
            if splits is None or path.name in splits:
                _sort(path, contents, visited)
            else:
                contents.aside.append(path)
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            contents.data.append(path)
        else:
            contents.unread.append(path)


def _is_known(path: Path) -> bool:
    """Tell whether a name is that of a file which is never data."""
    return path.name in METADATA | OF_A_MODEL or bool(CACHE.fullmatch(path.name)) or bool(ABOUT.fullmatch(path.name))


def _saved_data(folder: Path) -> list[Path] | None:
    """Return the files that the state.json of a saved table lists; None where there is none.

    Raises:
        UserError: a file is missing, or the table has an index that says which of its rows count.
    """
    state = _json(folder / STATE)
    if not isinstance(state, dict) or "_data_files" not in state:
        return None

    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder / STATE}: got a table saved with an index of the rows that count (by `datasets` before 2.0), "
            "which is not read. Save it again: datasets.load_from_disk(...).flatten_indices().save_to_disk(...), with "
            "the version that wrote it."
        )
    files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{folder / STATE} lists {len(files)} data files, and {len(missing)} of them are missing: "
            f"{', '.join(missing[:MOST_NAMED])}. Copy the whole folder, or save the data again."
        )
    return files


def _saved_splits(folder: Path) -> Sequence[str] | None:
    """Return the folders that a saved dictionary of tables lists; None where there is none.

    Raises:
        UserError: one is missing.
    """
    listed = _json(folder / SPLITS)
    if not isinstance(listed, dict) or "splits" not in listed:
        return None

    missing = [split for split in listed["splits"] if not (folder / split).is_dir()]
    if missing:
        raise UserError(
            f"{folder / SPLITS} lists the splits {', '.join(listed['splits'])}, and there is no folder of "
            f"{', '.join(missing)}. Copy the whole folder, or give one of a split."
        )
    return listed["splits"]


def _json(file: Path) -> Any:
    """Return what a JSON file holds; None if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}. Save the data again.") from error


def _log_left_out(folder: Path, files: Sequence[Path], why: str) -> None:
    if files:
        log.info("%s: left out, %s: %s", folder, why, _named(folder, files))


def _named(folder: Path, files: Sequence[Path]) -> str:
    names = [str(file.relative_to(folder)) + "/" * file.is_dir() for file in files]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
