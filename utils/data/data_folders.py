"""Files of a folder that are data, told from what programs leave beside them.

Caches of `map` and `filter`, metadata, markers of a finished job, hidden files and half downloads are no data.
`choose_files` names what it leaves out, so that nothing is left out in silence.
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

TEXT_SUFFIXES = (".txt", ".jsonl", ".json", ".csv")
"""Suffixes of files of lines, which may be compressed as a whole."""
SUFFIXES = (*TEXT_SUFFIXES, ".parquet", ".arrow")
"""Suffixes of files that can be read."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compressed files, and what pyarrow calls the compression."""
READABLE = f"{', '.join(SUFFIXES)} ({', '.join(TEXT_SUFFIXES)} also with {' or '.join(COMPRESSIONS)} behind it)"
"""Suffixes of files that can be read, for messages."""

SPLIT_NAMES = {"validation": "validation|valid|val|eval|dev"}
"""Split -> other names of it, as a regular expression."""

STATE = "state.json"
"""File that `save_to_disk` of `datasets` writes beside the data of a table."""
SPLITS = "dataset_dict.json"
"""File that it writes beside the folders of a dictionary of tables."""

METADATA = {
    STATE,
    SPLITS,
    "dataset_info.json",
    "dataset_infos.json",
    "dataset-metadata.json",
    "croissant.json",
}
"""Files about data under names of types that are read as data."""
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
"""Files that `map`, `filter`, `shuffle` and `select` of `datasets` leave beside data: other rows, or row numbers."""

ABOUT = re.compile(r"(readme|licen[cs]e|notice|copying|changelog|requirements)(\.(txt|md|rst))?", re.IGNORECASE)
"""Texts about data, which are no data."""

HIDDEN = (".", "_")
"""First characters of names that other readers of folders (Arrow, Spark, Hive) leave out too: .ipynb_checkpoints,
._data.jsonl, __MACOSX, _SUCCESS, _delta_log."""

MOST_NAMED = 8
"""Files that a message names."""


def data_suffix(file: Path) -> str:
    """Return the suffix that says what a file holds: `.jsonl` for texts.jsonl and for texts.jsonl.gz.

    Other compressed files keep both: Parquet and Arrow compress inside, and nothing reads them packed once more.
    """
    suffix = file.suffix.lower()
    if suffix not in COMPRESSIONS:
        return suffix
    inner = Path(file.stem).suffix.lower()
    return inner if inner in TEXT_SUFFIXES else inner + suffix


@dataclass
class Contents:
    """The files of a folder, sorted by what becomes of them."""

    data: list[Path] = field(default_factory=list)
    """Files to read."""
    aside: list[Path] = field(default_factory=list)
    """Files and folders that are known not to be data."""
    unread: list[Path] = field(default_factory=list)
    """Files of a type that is not read, or links to nothing: they may be data."""


def choose_files(folder: Path, split: str) -> list[Path]:
    """Return the data files of a folder and of those in it, in the order of their paths, and log what is left out.

    Of a folder that `datasets` has saved these are the files that its state.json lists. If files or folders are named
    after the split (train-00000-of-00001.parquet), they are preferred to all others.

    Raises:
        UserError: there is no data file, or a listed one is missing.
    """
    contents = Contents()
    _sort(folder, contents, visited=set())

    # The error lists what is there in place of data.
    if not contents.data:
        inside = _named(folder, [*contents.unread, *contents.aside]) or "nothing"
        raise UserError(f"No data file in folder {folder}: expected one of {READABLE}. In {folder} there is: {inside}.")

    # Data of both splits in one folder: training must not read what is evaluated on.
    files = sorted(contents.data)
    of_split = [file for file in files if _is_of_split(file.relative_to(folder), split)]
    if of_split:
        others = [file for file in files if file not in of_split]
        _log_left_out(folder, others, f"not of the split {split!r}")

    _log_left_out(folder, contents.aside, "no data: caches, metadata, hidden files, files of a model")
    if contents.unread:
        # Not an info as above: these may be data that the user believes to be read.
        log.warning(
            "%s: not read, of another type or a link to nothing: %s. Read are %s; unpack or convert what is data",
            folder,
            _named(folder, contents.unread),
            READABLE,
        )
    return of_split or files


def _is_of_split(path: Path, split: str) -> bool:
    """Tell whether a file or a folder that it is in is named after a split: train.jsonl, validation/part-0.parquet."""
    names = SPLIT_NAMES.get(split, re.escape(split))
    begins_with_split = re.compile(rf"({names})([-_.]|$)", re.IGNORECASE)
    return any(begins_with_split.match(part) for part in path.parts)


def without_caches(pattern: str, files: Iterable[Path]) -> list[Path]:
    """Return the files that match a pattern, but for caches of `datasets` beside a table; log what is left out."""
    data: list[Path] = []
    caches: list[Path] = []
    for file in files:
        if CACHE.fullmatch(file.name):
            caches.append(file)
        else:
            data.append(file)

    # A pattern that fits nothing but caches was meant for them.
    if not data:
        return caches
    if caches:
        log.info("%s: left out, caches of `datasets`: %s", pattern, ", ".join(map(str, caches[:MOST_NAMED])))
    return data


def _sort(folder: Path, contents: Contents, visited: set[Path]) -> None:
    """Sort what is in a folder into `contents`.

    Raises:
        UserError: it cannot be read.
    """
    # A link to a folder that was read already, which may even lead in a circle.
    real = folder.resolve()
    if real in visited:
        contents.aside.append(folder)
        return
    visited.add(real)

    # Sorted: the order of documents is then the same on every file system.
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read: {error.strerror or error}.") from error

    # Where `datasets` says which files are the data, nothing else is.
    saved = _saved_data(folder)
    if saved is not None:
        contents.data += saved
        contents.aside += [path for path in children if path not in saved]
        return

    splits = _saved_splits(folder)
    for path in children:
        is_stray_folder = splits is not None and path.is_dir() and path.name not in splits
        if path.name.startswith(HIDDEN) or _is_never_data(path) or is_stray_folder:
            contents.aside.append(path)
        elif path.is_dir():
            _sort(path, contents, visited)
        elif path.is_file() and data_suffix(path) in SUFFIXES:
            contents.data.append(path)
        else:
            contents.unread.append(path)


def _is_never_data(path: Path) -> bool:
    """Tell whether a name is that of a file which is never data."""
    if path.name in METADATA or path.name in OF_A_MODEL:
        return True
    return bool(CACHE.fullmatch(path.name) or ABOUT.fullmatch(path.name))


def _saved_data(folder: Path) -> list[Path] | None:
    """Return the files that the state.json of a saved table lists; None where there is none.

    Raises:
        UserError: a file is missing, or the table has an index that says which of its rows count.
    """
    # Other programs write a file of this name too; checkpoints of a run have one.
    state = _json(folder / STATE)
    if not isinstance(state, dict) or "_data_files" not in state:
        return None

    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise UserError(
            f"{folder / STATE}: got a table saved with an index of the rows that count (by `datasets` before 2.0), "
            "which is not read. Save it again: datasets.load_from_disk(...).flatten_indices().save_to_disk(...), with "
            "the version that wrote it."
        )

    # By its name alone: a path in the file must not lead out of the folder.
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
    """Log files that are not read, where there are any."""
    if files:
        log.info("%s: left out, %s: %s", folder, why, _named(folder, files))


def _named(folder: Path, files: Sequence[Path]) -> str:
    """Return the names of files below a folder, the first of them; empty where there are none."""
    names: list[str] = []
    for file in files:
        name = str(file.relative_to(folder))
        names.append(f"{name}/" if file.is_dir() else name)

    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
