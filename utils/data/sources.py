"""Sources of documents: text files, tables and hub data sets, read lazily and located for error messages.

A source is a file, a glob, a folder, captures:DIR, the name of a Kaggle input, or a hub id: `owner/name`, with
`:config` and `:split` after it where needed (`Salesforce/wikitext:wikitext-103-raw-v1:validation`).
"""

import csv
import glob
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import datasets
import pyarrow
import pyarrow.parquet

from ..captures.folder import captured_texts, is_captures
from ..errors import UserError
from ..git_lfs import is_lfs_pointer
from ..paths import user_path
from .columns import Columns
from .data_folders import COMPRESSIONS, READABLE, SUFFIXES, choose_files, data_suffix, without_caches
from .kinds import kind_of

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
"""Line that ends a document of a .txt file, where the file has any."""

KAGGLE_INPUT = Path("/kaggle/input")
"""Folder below which a notebook's attached data appear."""
ATTACHED_DEPTH = 4
"""Levels below it that are searched: owner and kind of an input may be folders too."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Bytes that some editors put before the text of a file in UTF-8."""

MOST_LISTED = 12
"""Names of a folder that a message lists."""

BATCH = 1000
"""Rows of a table that are read at once."""

CHUNK = 2**20
"""Bytes of a file that are read at once."""

Located = tuple[str, Any]
"""(place, value): the place is file:line or the like, for messages; a value of None is an empty document."""


class Position(NamedTuple):
    """Place in a source at which a document begins, and at which reading can begin again."""

    offset: int = 0
    """Bytes before it, unpacked; in tables and lists of JSON the rows before it."""
    line: int = 0
    """Lines before it, in files that have lines."""


START = Position()
"""Beginning of a file or table."""


class Placed(NamedTuple):
    """A document, and where it begins."""

    start: Position
    place: str
    """file:line or the like, for messages."""
    value: Any
    """None: an empty document."""


class HubId(NamedTuple):
    """A data set of the hub."""

    name: str
    """owner/name."""
    subset: str | None
    """Its configuration; None: the default one."""
    split: str


def read(names: Sequence[str], *, split: str, columns: Columns, separator: str | None) -> Iterator[Located]:
    """Yield the documents of every source in turn.

    Args:
        split: of hub data sets that do not name one themselves; in a folder, what is named after it is preferred
            (see `data_folders`).
        columns: that hold the documents, wherever there are columns.
        separator: of documents in .txt files, at every occurrence (backslash-n and -t are understood; the empty
            string makes the file one document). None: lines that are exactly `<|endoftext|>` if the file has any,
            else blank lines. The separator is structure, not text, and so are line breaks next to it.

    Raises:
        UserError: something cannot be found or read; with file and line where there is one. Nothing is repaired
            silently: bytes that are not UTF-8 are an error.
    """
    for name in names:
        if is_captures(name):
            yield from captured_texts(name, columns.tokenizer or "")
            continue

        files = files_of(name, split)
        if files is None:
            placed_documents = _read_hub(name, columns, split)
        else:
            log.info("Reading %s: %d file(s), first %s", name, len(files), files[0])
            placed_documents = chain.from_iterable(
                read_one_of(name, files, file, columns=columns, separator=separator) for file in files
            )
        for placed in placed_documents:
            yield placed.place, placed.value


def read_one_of(
    name: str,
    files: Sequence[Path],
    file: Path,
    *,
    columns: Columns,
    separator: str | None,
    begin: Position = START,
) -> Iterator[Placed]:
    """Read a file of a source. One without a byte has no documents, whatever its type, and is named.

    Args:
        name: of the source; `files` are those that it stands for.
        begin: where a document begins, as an earlier reading found.

    Raises:
        UserError: it cannot be read. If it is one of several and nothing of it could be, it may be no data at all, and
            the message says so.
    """
    is_begun = False
    try:
        if file.is_file() and file.stat().st_size == 0:
            log.warning("%s: empty, it holds no byte and so no document", file)
            return

        for placed in _read_file(file, columns, separator, begin):
            is_begun = True
            yield placed
    except UserError as error:
        if is_begun or len(files) == 1:
            raise
        raise UserError(
            f"{error}\n{file.name} is one of {len(files)} files in {name}. If it is no data, move it elsewhere, or "
            "name the files that are, alone or as a pattern in quotes: --train-data 'FOLDER/*.jsonl'."
        ) from error


# ---------------------------------------------------------------- finding


def files_of(source: str, split: str) -> list[Path] | None:
    """Return the files that a source stands for; None for a hub id.

    Raises:
        UserError: it looks like a path, and nothing is there.
    """
    path = user_path(source)
    is_pattern = glob.has_magic(source)
    if not os.path.exists(path) and not is_pattern:
        path = _attached(path) or path

    # A file whose name has the characters of a pattern is taken as it is.
    if os.path.isdir(path):
        return choose_files(path, split)
    if os.path.exists(path):
        return [path]

    if is_pattern:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        files = sorted(match for match in matches if match.is_file())
        if files:
            return without_caches(source, files)
        raise UserError(f"No file matches {source}. {_listing(path.parent)}")

    # A hub id has no suffix of a data file, and no sign of a path: the user meant a file.
    if data_suffix(path) in SUFFIXES or source.startswith((".", "/", "~")) or "\\" in source:
        raise UserError(f"No such file or folder: {source}. {_listing(path.parent)}")
    return None


def _attached(path: Path) -> Path | None:
    """Return the file or folder of that name among the inputs of a Kaggle notebook, the one nearest to the top."""
    if not KAGGLE_INPUT.is_dir() or path.is_absolute() or ".." in path.parts:
        return None

    name = glob.escape(str(path))
    for depth in range(ATTACHED_DEPTH):
        matches = sorted(KAGGLE_INPUT.glob("*/" * depth + name))
        if matches:
            return matches[0]
    return None


def _listing(folder: Path) -> str:
    """Return a sentence about what is in a folder, where something in it was not found."""
    if not os.path.isdir(folder):
        return f"The folder {folder} does not exist either."

    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    shown = ", ".join(names[:MOST_LISTED]) or "nothing"
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return f"In {folder} there is: {shown}{more}."


# ---------------------------------------------------------------- the hub


def hub_id_of(source: str, split: str) -> HubId:
    """Take `owner/name[:config[:split]]`, or `owner/name/config`, apart.

    Args:
        split: for a source that names none.

    Raises:
        UserError: it is nothing of that form.
    """
    fields = source.split(":")
    path = fields[0].split("/")
    if len(fields) > 3 or len(path) > 3 or not all(path):
        raise UserError(
            f"Data source {source!r}: no such path, and not a hub id either. Expected a file, a folder, a glob, or "
            "owner/name[:config[:split]], as in Salesforce/wikitext:wikitext-103-raw-v1."
        )

    name = fields[0]
    subset = fields[1] if len(fields) > 1 else ""
    named_split = fields[2] if len(fields) > 2 else ""
    if len(path) == 3 and not subset:
        owner, repository, subset = path
        name = f"{owner}/{repository}"
    return HubId(name, subset or None, named_split or split)


def load_hub(source: str, split: str, **options: Any) -> Any:
    """Return the rows of a data set of the hub.

    Args:
        split: for a source that names none.
        options: of `datasets.load_dataset`.

    Raises:
        UserError: it is no hub id, or the data set cannot be loaded.
    """
    hub_id = hub_id_of(source, split)
    try:
        return datasets.load_dataset(hub_id.name, hub_id.subset, split=hub_id.split, **options)
    except Exception as error:  # the hub client raises errors of five libraries; all mean: not available as asked
        words = " ".join(str(error).split())[:500]
        raise UserError(
            f"Data {source} is neither a local path nor could it be loaded from the Hugging Face hub "
            f"(configuration {hub_id.subset or 'default'}, split {hub_id.split}): {type(error).__name__}: {words}\n"
            f"Offline: give a file or folder instead ({READABLE}); on Kaggle attach the data as an input "
            "and give its name or /kaggle/input/...; or load it once with internet, then set HF_HUB_OFFLINE=1."
        ) from error


def _read_hub(source: str, columns: Columns, split: str) -> Iterator[Placed]:
    """Yield the documents of a data set of the hub."""
    yield from _read_rows(load_hub(source, split), source, columns)


def _read_rows(rows: datasets.Dataset, place: str, columns: Columns, begin: Position = START) -> Iterator[Placed]:
    """Yield the documents of a table of `datasets`, some rows at once: row by row it is many times slower."""
    names = columns.columns_to_read(place, rows.column_names)
    rows = rows.select_columns(names)

    for start in range(begin.offset, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        value_lists = [batch[name] for name in names]
        for number, values in enumerate(zip(*value_lists, strict=True), start):
            row = f"{place}, row {number}"
            yield Placed(Position(number), row, columns.document(row, names, values))


# ---------------------------------------------------------------- files


def _read_file(file: Path, columns: Columns, separator: str | None, begin: Position) -> Iterator[Placed]:
    """Return the documents of a file, read by what its suffix says it is.

    Raises:
        UserError: it is no file, or of a type that is not read.
    """
    if not file.is_file():
        raise UserError(f"{file}: got a pipe, socket or device; expected a file, which is read more than once.")
    _refuse_pointer(file)

    match data_suffix(file):
        case ".txt":
            return _read_txt(file, separator, begin)
        case ".jsonl":
            return _read_jsonl(file, columns, begin)
        case ".json":
            return _read_json(file, columns, begin)
        case ".csv":
            return _read_csv(file, columns, begin)
        case ".parquet":
            return _read_parquet(file, columns, begin)
        case ".arrow":
            return _read_arrow(file, columns, begin)
        case suffix:
            raise UserError(f"{file}: cannot read files of type {suffix or '(none)'}. Expected one of {READABLE}.")


def _refuse_pointer(file: Path) -> None:
    """Refuse a file that only points to the data: its lines would be taken for the text.

    Raises:
        UserError: it is such a pointer, or it cannot be read.
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


class _Lines:
    """Lines of a file with their ends, which stay as they are there; to be iterated over once.

    Attributes:
        position: behind the line that was yielded last.
    """

    def __init__(self, file: Path, begin: Position = START) -> None:
        self.file = file
        self.position = begin

    def __iter__(self) -> Iterator[str]:
        """Yield lines.

        Raises:
            UserError: the file cannot be read, or is not UTF-8.
        """
        with _readable(self.file) as stream:
            _skip(stream, self.position.offset)
            for line in stream:
                offset, number = self.position
                self.position = Position(offset + len(line), number + 1)
                if offset == 0:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                yield _decode(line, self.file, number + 1)


@contextmanager
def _readable(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading.

    Raises:
        UserError: it cannot be read, now or later.
    """
    try:
        with _open(file) as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}.") from error


def _skip(stream: IO[bytes], offset: int) -> None:
    """Go to an offset; what is compressed has to be unpacked up to there."""
    if stream.seekable():
        stream.seek(offset)
        return

    while offset > 0 and (chunk := stream.read(min(offset, CHUNK))):
        offset -= len(chunk)


def _open(file: Path) -> IO[bytes]:
    """Open a file for reading its bytes, unpacked where its name says that it is compressed."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return file.open("rb")

    # pyarrow has both compressions built in, and raises OSError for what is damaged or cut off.
    unpacked = pyarrow.CompressedInputStream(file.open("rb"), compression)
    return cast(IO[bytes], io.BufferedReader(unpacked))


def _decode(line: bytes, file: Path, number: int) -> str:
    """Return a line of a file as text.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}:{number}: not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1}). "
            "Convert the file to UTF-8; bytes are not replaced silently."
        ) from None


# ---------------------------------------------------------------- text


def _read_txt(file: Path, separator: str | None, begin: Position) -> Iterator[Placed]:
    """Yield the documents of a text file; see `read` for what separates them."""
    lines = _Lines(file, begin)
    if separator is not None:
        for escaped, character in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
            separator = separator.replace(escaped, character)
        parts = _cut_at_string(lines, separator)
    elif _has_end_of_text(file):
        parts = _cut_at_lines(lines, _is_end_of_text)
    else:
        # Several blank lines in a row are one separator, not empty documents.
        parts = (part for part in _cut_at_lines(lines, _is_blank) if part[1])

    for start, text in parts:
        yield Placed(start, f"{file}:{start.line + 1}", text.strip("\r\n"))


def _has_end_of_text(file: Path) -> bool:
    """Return whether a file has a line that is the end-of-text marker."""
    marker = END_OF_TEXT.encode()
    with _readable(file) as stream:
        begin = stream.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)

        # Much faster than line by line: most texts have no marker anywhere.
        while chunk := begin + stream.read(CHUNK):
            begin = b""
            chunk += stream.readline()
            lines = chunk.split(b"\n") if marker in chunk else []
            if any(line.removesuffix(b"\r") == marker for line in lines):
                return True
    return False


def _is_end_of_text(line: str) -> bool:
    return line == END_OF_TEXT


def _is_blank(line: str) -> bool:
    return not line.strip()


def _without_line_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _cut_at_lines(lines: _Lines, separates: Callable[[str], bool]) -> Iterator[tuple[Position, str]]:
    """Yield (start, text) of what lies between separating lines; after a last separator comes no document."""
    start = lines.position
    part: list[str] = []
    for line in lines:
        if separates(_without_line_end(line)):
            yield start, "".join(part)
            start = lines.position
            part = []
        else:
            part.append(line)

    if part:
        yield start, "".join(part)


def _cut_at_string(lines: _Lines, separator: str) -> Iterator[tuple[Position, str]]:
    """Yield (start, text) of what lies between occurrences of a string; the empty string cuts nowhere."""
    start = lines.position
    part: list[str] = []
    end = ""
    for line in lines:
        # The end of the lines before, in which a separator of several lines may have begun.
        part.append(line)
        end = (end + line)[-len(line) - len(separator) :]
        if not separator or separator not in end:
            continue

        *texts, rest = "".join(part).split(separator)
        for text in texts:
            yield start, text
            number = start.line + text.count("\n") + separator.count("\n")
            start = Position(start.offset + len((text + separator).encode()), number)

        # counted from behind: a byte-order mark is in the file and not in the text
        start = Position(lines.position.offset - len(rest.encode()), start.line)
        part = [rest]
        end = rest

    # A separator at the end of the file ends a document and begins none.
    rest = "".join(part)
    if rest.strip("\r\n"):
        yield start, rest


# ---------------------------------------------------------------- JSON


def _read_jsonl(file: Path, columns: Columns, begin: Position) -> Iterator[Placed]:
    """Yield the documents of a file with one JSON object a line; blank lines are none."""
    lines = _Lines(file, begin)
    start = begin
    for line in lines:
        if line.strip():
            place = f"{file}:{start.line + 1}"
            yield _from_record(start, place, _parse_line(place, line), columns)
        start = lines.position


def _parse_line(place: str, line: str) -> Any:
    """Return the JSON value of a line.

    Raises:
        UserError: it is no JSON.
    """
    try:
        # Without the end of the line, behind which a value that is cut short would be told to end.
        return json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not valid JSON: {error.msg} (column {error.colno}). Expected one object a line."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested as deep
        raise UserError(f"{place}: cannot be read as JSON: {error}.") from None


def _read_json(file: Path, columns: Columns, begin: Position) -> Iterator[Placed]:
    """Yield the documents of a list of objects; or of JSON lines under another name."""
    try:
        content = json.loads("".join(_Lines(file)))
    except json.JSONDecodeError as error:
        # A whole first value, and more on another line: one value a line.
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _read_jsonl(file, columns, begin)
            return
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}.") from None

    for number, record in enumerate(_records(file, content)[begin.offset :], begin.offset):
        yield _from_record(Position(number), f"{file}, record {number}", record, columns)


def _records(file: Path, content: Any) -> list[Any]:
    """Return the objects that a JSON file holds: a list of them, or a single one.

    Raises:
        UserError: it is neither; an object of lists may be a table by columns, or a list under a key.
    """
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        got = type(content).__name__
    elif all(isinstance(value, list) for value in content.values()):
        got = f"an object with the keys {', '.join(content)}"
    else:
        return [content]
    raise UserError(f"{file}: expected a list of objects, one for each document, got {got}.")


def _from_record(start: Position, place: str, record: Any, columns: Columns) -> Placed:
    """Return the document of a JSON object.

    Raises:
        UserError: it is no object, or has no column of documents.
    """
    if not isinstance(record, dict):
        raise UserError(
            f"{place}: expected an object whose keys are columns, got {kind_of(record)}. Write each document as "
            '{"text": "..."}.'
        )
    names = columns.columns_to_read(place, record)
    return Placed(start, place, columns.document(place, names, [record[name] for name in names]))


# ---------------------------------------------------------------- tables


def _read_csv(file: Path, columns: Columns, begin: Position) -> Iterator[Placed]:
    """Yield the documents of a CSV file whose first line names its columns.

    Raises:
        UserError: a line has more or fewer fields than the first, or a quote is not closed.
    """
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long document
    lines = _Lines(file)
    try:
        rows = csv.reader(iter(lines), strict=True)
        header = next(rows, [])
        names = columns.columns_to_read(f"{file}:1", header)
        fields = [header.index(name) for name in names]

        # The reader takes no more lines than a row has, so a row begins where the last one ended.
        if begin != START:
            lines = _Lines(file, begin)
            rows = csv.reader(iter(lines), strict=True)
        start = lines.position
        for row in rows:
            # A blank line is a row without fields: an empty document.
            place = f"{file}:{lines.position.line}"
            if row and len(row) != len(header):
                raise UserError(
                    f"{place}: expected {len(header)} fields as in the first line, got {len(row)}. "
                    "Quote fields that contain commas."
                )
            values = [row[field] if row else None for field in fields]
            yield Placed(start, place, columns.document(place, names, values))
            start = lines.position
    except csv.Error as error:
        raise UserError(f"{file}:{lines.position.line}: not valid CSV: {error}.") from None


def _read_parquet(file: Path, columns: Columns, begin: Position) -> Iterator[Placed]:
    """Yield the documents of a Parquet file, of which only some rows are in memory at once.

    Raises:
        UserError: it is damaged, or a text is not UTF-8.
    """
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = columns.columns_to_read(str(file), table.schema_arrow.names)
            number, groups = _groups_from(table, begin.offset)

            for batch in table.iter_batches(BATCH, row_groups=groups, columns=names):
                value_lists = [batch.column(name).to_pylist() for name in names]
                for values in zip(*value_lists, strict=True):
                    row = f"{file}, row {number}"
                    if number >= begin.offset:
                        yield Placed(Position(number), row, columns.document(row, names, values))
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet: {error}") from error
    except UnicodeDecodeError as error:  # of a whole batch: the error does not say which row
        rows = f"rows {number} to {number + BATCH - 1}"
        raise UserError(f"{file}, {rows}: not UTF-8 ({error}). Convert the file; bytes are not replaced.") from None


def _groups_from(table: pyarrow.parquet.ParquetFile, row: int) -> tuple[int, list[int]]:
    """Return the first row of the group that a row is in, and the numbers of that group and those behind it."""
    first = 0
    for group in range(table.num_row_groups):
        behind = first + table.metadata.row_group(group).num_rows
        if row < behind:
            return first, list(range(group, table.num_row_groups))
        first = behind
    return first, []


def _read_arrow(file: Path, columns: Columns, begin: Position) -> Iterator[Placed]:
    """Yield the documents of a file that `save_to_disk` of `datasets` wrote.

    Raises:
        UserError: it is damaged, or of another program.
    """
    try:
        rows = datasets.Dataset.from_file(str(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Arrow: {error}") from error
    yield from _read_rows(rows, str(file), columns, begin)
