"""Where documents come from: text files, tables and hub data sets, read lazily and located for error messages.

A source is a file, a glob, a folder, the name of a Kaggle input, or a hub id: `owner/name`, with `:config` and
`:split` after it where needed (`Salesforce/wikitext:wikitext-103-raw-v1:validation`).
"""

import csv
import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from ..errors import UserError
from ..git_lfs import is_lfs_pointer
from ..paths import user_path
from .columns import Columns
from .data_folders import SUFFIXES, choose_files, without_caches

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
KAGGLE_INPUT = Path("/kaggle/input")

BATCH = 1000
"""Rows of a table that are read at once."""

Located = tuple[str, Any]
"""(place, value): the place is file:line or the like, for messages; a value of None is an empty document."""


def read(names: Sequence[str], *, split: str, columns: Columns, separator: str | None) -> Iterator[Located]:
    """Documents of every source in turn.

    Args:
        split: of hub data sets that do not name one themselves; in a folder, what is named after it is preferred
            (see `data_folders`).
        columns: that hold the documents, wherever there are columns.
        separator: of documents in .txt files, at every occurrence (backslash-n and -t are understood; the empty
            string makes the file one document). None: lines that are exactly `<|endoftext|>` if the file has any,
            else blank lines. The separator is structure, not text, and so are line breaks next to it.

    Raises `UserError`, with file and line where there is one, for what cannot be found or read. Nothing is
    repaired silently: bytes that are not UTF-8 are an error.
    """
    for name in names:
        files = _find(name, split)
        if files is None:
            yield from _read_hub(name, columns, split)
            continue
        log.info("Reading %s: %d file(s), first %s", name, len(files), files[0])
        for file in files:
            yield from _read_one_of(name, files, file, columns, separator)


def _read_one_of(
    name: str, files: Sequence[Path], file: Path, columns: Columns, separator: str | None
) -> Iterator[Located]:
    """Read a file of a source. One without a byte has no documents, whatever its type, and is named.

    Raises:
        UserError: it cannot be read. If it is one of several and nothing of it could be, it may be no data at all, and
            the message says so.
    """
    is_begun = False
    try:
        if file.is_file() and file.stat().st_size == 0:
            log.warning("%s: empty, it holds no byte and so no document", file)
            return

        for located in _read_file(file, columns, separator):
            is_begun = True
            yield located
    except UserError as error:
        if is_begun or len(files) == 1:
            raise
        raise UserError(
            f"{error}\n{file.name} is one of {len(files)} files in {name}. If it is no data, move it elsewhere, or "
            "name the files that are, alone or as a pattern in quotes: --train-data 'FOLDER/*.jsonl'."
        ) from error


def _find(source: str, split: str) -> list[Path] | None:
    """Files that a source stands for; None for a hub id."""
    path = user_path(source)
    if not os.path.exists(path) and not glob.has_magic(source):
        path = _attached(path) or path
    if os.path.isdir(path):
        return choose_files(path, split)
    if os.path.exists(path):
        return [path]
    if glob.has_magic(source):
        files = sorted(Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file())
        if files:
            return without_caches(source, files)
        raise UserError(f"No file matches {source}. {_there(path.parent)}")
    if path.suffix.lower() in SUFFIXES or source.startswith((".", "/", "~")) or "\\" in source:
        raise UserError(f"No such file or folder: {source}. {_there(path.parent)}")
    return None


def _attached(path: Path) -> Path | None:
    """The file or folder of that name among the inputs of a Kaggle notebook, at most four folders deep."""
    if not KAGGLE_INPUT.is_dir() or path.is_absolute() or ".." in path.parts:
        return None
    for depth in range(4):
        found = sorted(KAGGLE_INPUT.glob("*/" * depth + glob.escape(str(path))))
        if found:
            return found[0]
    return None


def _there(folder: Path) -> str:
    if not os.path.isdir(folder):
        return f"The folder {folder} does not exist either."
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"In {folder} there is: {', '.join(names[:12]) or 'nothing'}{more}."


def _read_hub(source: str, columns: Columns, split: str) -> Iterator[Located]:
    name, subset, split = _hub_id(source, split)
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the hub client raises errors of five libraries; all mean: not available as asked
        reason = " ".join(str(error).split())[:500]
        raise UserError(
            f"Data {source} is neither a local path nor could it be loaded from the Hugging Face hub "
            f"(configuration {subset or 'default'}, split {split}): {type(error).__name__}: {reason}\n"
            f"Offline: give a file or folder instead ({', '.join(SUFFIXES)}); on Kaggle attach the data as an input "
            "and give its name or /kaggle/input/...; or load it once with internet, then set HF_HUB_OFFLINE=1."
        ) from error
    yield from _read_rows(rows, source, columns)


def _read_rows(rows: datasets.Dataset, place: str, columns: Columns) -> Iterator[Located]:
    names = columns.to_read(place, rows.column_names)
    rows = rows.select_columns(names)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for offset, values in enumerate(zip(*(batch[name] for name in names), strict=True)):
            yield f"{place}, row {start + offset}", columns.document(names, values)


def _hub_id(source: str, split: str) -> tuple[str, str | None, str]:
    """`owner/name[:config[:split]]`, or `owner/name/config`, in parts."""
    name, subset, chosen, *more = [*source.split(":"), "", ""][: max(3, source.count(":") + 1)]
    parts = name.split("/")
    if len(parts) == 3 and not subset:
        name, subset = "/".join(parts[:2]), parts[2]
    if more or not all(parts) or len(parts) > 3:
        raise UserError(
            f"Data source {source!r}: no such path, and not a hub id either. Expected a file, a folder, a glob, or "
            "owner/name[:config[:split]], as in Salesforce/wikitext:wikitext-103-raw-v1."
        )
    return name, subset or None, chosen or split


# ---------------------------------------------------------------- files


def _read_file(file: Path, columns: Columns, separator: str | None) -> Iterator[Located]:
    if not file.is_file():
        raise UserError(f"{file}: got a pipe, socket or device; expected a file, which is read more than once.")
    _refuse_pointer(file)

    match file.suffix.lower():
        case ".txt":
            return _read_txt(file, separator)
        case ".jsonl":
            return _read_jsonl(file, columns)
        case ".json":
            return _read_json(file, columns)
        case ".csv":
            return _read_csv(file, columns)
        case ".parquet":
            return _read_parquet(file, columns)
        case ".arrow":
            return _read_arrow(file, columns)
        case suffix:
            expected = ", ".join(SUFFIXES)
            raise UserError(f"{file}: cannot read files of type {suffix or '(none)'}. Expected one of {expected}.")


def _refuse_pointer(file: Path) -> None:
    """Refuse a file that only points to the data: its lines would be taken for the text.

    Raises:
        UserError: it does, or it cannot be read.
    """
    try:
        is_pointer = is_lfs_pointer(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}.") from error

    if is_pointer:
        raise UserError(
            f"{file}: got a pointer of Git LFS, which stands for the data until they are fetched. Run `git lfs pull` "
            f"in {file.parent}, or download the data with `hf download --repo-type dataset`."
        )


def _lines(file: Path) -> Iterator[str]:
    """Lines with their ends, which stay as they are in the file."""
    try:
        with open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}). "
                        "Convert the file to UTF-8; bytes are not replaced silently."
                    ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}.") from error


def _read_txt(file: Path, separator: str | None) -> Iterator[Located]:
    if separator is not None:
        parts = _cut(_lines(file), separator.replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t"))
    elif any(_bare(line) == END_OF_TEXT for line in _lines(file)):
        parts = _cut_at_lines(_lines(file), lambda line: line == END_OF_TEXT)
    else:
        parts = (part for part in _cut_at_lines(_lines(file), lambda line: not line.strip()) if part[1])
    for number, text in parts:
        yield f"{file}:{number}", text.strip("\r\n")


def _bare(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _cut_at_lines(lines: Iterable[str], separates: Callable[[str], bool]) -> Iterator[tuple[int, str]]:
    """(line number, text) of what lies between separating lines; after a last separator comes no document."""
    begin, part, number = 1, [], 0
    for number, line in enumerate(lines, 1):
        if separates(_bare(line)):
            yield begin, "".join(part)
            begin, part = number + 1, []
        else:
            part.append(line)
    if part:
        yield begin, "".join(part)


def _cut(lines: Iterable[str], separator: str) -> Iterator[tuple[int, str]]:
    """As `_cut_at_lines`, at every occurrence of a string; the empty string leaves the file whole."""
    whole = "".join(lines)
    parts = whole.split(separator) if separator else [whole]
    if not parts[-1].strip("\r\n"):
        parts.pop()
    number = 1
    for part in parts:
        yield number, part
        number += part.count("\n") + separator.count("\n")


def _read_jsonl(file: Path, columns: Columns) -> Iterator[Located]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{file}:{number}: not valid JSON: {error.msg} (column {error.colno}). Expected one object a line."
                ) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file}:{number}: cannot be read as JSON: {error}.") from None
            yield _field(f"{file}:{number}", record, columns)


def _read_json(file: Path, columns: Columns) -> Iterator[Located]:
    """A list of objects; or JSON lines under another name."""
    try:
        records = json.loads("".join(_lines(file)))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _read_jsonl(file, columns)
            return
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}.") from None
    if isinstance(records, dict) and not all(isinstance(value, list) for value in records.values()):
        records = [records]
    if not isinstance(records, list):
        found = f"an object with the keys {', '.join(records)}" if isinstance(records, dict) else type(records).__name__
        raise UserError(f"{file}: expected a list of objects, one for each document, got {found}.")
    for number, record in enumerate(records):
        yield _field(f"{file}, record {number}", record, columns)


def _field(place: str, record: Any, columns: Columns) -> Located:
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object whose keys are columns, got {type(record).__name__}.")
    names = columns.to_read(place, record)
    return place, columns.document(names, [record[name] for name in names])


def _read_csv(file: Path, columns: Columns) -> Iterator[Located]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    rows = csv.reader(_lines(file), strict=True)
    try:
        header = next(rows, [])
        names = columns.to_read(f"{file}:1", header)
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{file}:{rows.line_num}: expected {len(header)} fields as in the first line, got {len(row)}. "
                    "Quote fields that contain commas."
                )
            values = [row[header.index(name)] for name in names] if row else [None]
            yield f"{file}:{rows.line_num}", columns.document(names, values)
    except csv.Error as error:
        raise UserError(f"{file}:{rows.line_num}: not valid CSV: {error}.") from None


def _read_parquet(file: Path, columns: Columns) -> Iterator[Located]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = columns.to_read(str(file), table.schema_arrow.names)
            for batch in table.iter_batches(BATCH, columns=names):
                for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    yield f"{file}, row {number}", columns.document(names, values)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {error}") from error
    except UnicodeDecodeError as error:  # of a batch: which row of it, nobody says
        rows = f"rows {number} to {number + BATCH - 1}"
        raise UserError(f"{file}, {rows}: not UTF-8 ({error}). Convert the file; bytes are not replaced.") from None


def _read_arrow(file: Path, columns: Columns) -> Iterator[Located]:
    try:
        rows = datasets.Dataset.from_file(str(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Arrow: {error}") from error
    yield from _read_rows(rows, str(file), columns)
