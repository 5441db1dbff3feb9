"""Documents of one source, pass after pass, from any of them on."""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...captures.folder import is_captures
from ...config.settings import DataConfig
from ...errors import RunError, UserError
from .. import sources
from ..columns import Columns
from ..documents import FirstPlaces, columns_of, document_text, join_lines

log = logging.getLogger(__name__)

Mark = Sequence[Any]
"""Place in a source where reading can begin, in plain values."""

EDGE = 4096
"""Bytes at the beginning and at the end of a file that tell whether it is the same file."""
SNAPSHOT = 1000
"""Rows of a hub data set between two places that it can be continued at; rows behind one are skipped one by one."""


class Marked(NamedTuple):
    """A document, and the mark to begin at it."""

    mark: Mark
    place: str
    """For messages."""
    value: Any


class Source(Protocol):
    """Files, or a data set of the hub."""

    begin: Mark

    def rows(self, columns: Columns, mark: Mark) -> Iterator[Marked]:
        """Yield the documents from a mark on, once."""

    def fingerprint(self) -> str:
        """Return a hash of what can be looked at without reading it all."""


class Files(Source):
    """The files that a source stands for."""

    begin: Mark = (0, 0, 0)

    def __init__(self, name: str, files: Sequence[Path], separator: str | None) -> None:
        self.name = name
        self.files = files
        self.separator = separator

    def rows(self, columns: Columns, mark: Mark) -> Iterator[Marked]:
        """Yield the documents from a mark on: (number of the file, bytes or rows, lines)."""
        first, *start = mark
        for number in range(first, len(self.files)):
            begin = sources.Position(*start) if number == first else sources.START
            read = partial(sources.read_one_of, self.name, self.files, self.files[number])
            for placed in read(columns=columns, separator=self.separator, begin=begin):
                yield Marked([number, *placed.start], placed.place, placed.value)

    def fingerprint(self) -> str:
        """Return a hash of the size of every file, and of its first and last bytes."""
        digest = blake2b(digest_size=16)
        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                edges = stream.read(EDGE)
                stream.seek(max(size - EDGE, 0))
                edges += stream.read(EDGE)
            digest.update(f"{size} ".encode() + edges)
        return digest.hexdigest()


class Hub(Source):
    """A data set of the hub, of which only the part that is read is downloaded."""

    begin: Mark = (None, 0, 0)

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self.split = split

    def rows(self, columns: Columns, mark: Mark) -> Iterator[Marked]:
        """Yield the documents from a mark on: (state of the data set, rows behind it, rows in all).

        Raises:
            RunError: the hub cannot be read any more.
        """
        try:
            yield from self._rows(columns, mark)
        except UserError:
            raise
        except Exception as error:  # the hub client raises errors of five libraries; most mean: no network
            raise RunError(
                f"{self.name}: the hub cannot be read any more: {type(error).__name__}: {error}. When it can, the same "
                "command continues."
            ) from error

    def _rows(self, columns: Columns, mark: Mark) -> Iterator[Marked]:
        """Yield the documents from a mark on."""
        state, skipped, number = mark
        table = sources.load_hub(self.name, self.split, streaming=True)
        if state is not None:
            table.load_state_dict(state)

        behind = 0
        names: list[str] = []
        for row in table:
            if behind >= skipped:
                place = f"{self.name}, row {number}"
                names = names or columns.columns_to_read(place, row)
                document = columns.document(place, names, [row[name] for name in names])
                yield Marked([state, behind, number], place, document)
                number += 1

            # Its state is taken seldom: it is a copy of everything that iterates below.
            behind += 1
            if behind == SNAPSHOT:
                state = table.state_dict()
                behind = 0
                skipped = 0

    def fingerprint(self) -> str:
        """Return its name; that its rows are the same, the beginning of the text tells."""
        return str(sources.hub_id_of(self.name, self.split))


def open_source(config: DataConfig, name: str) -> Source:
    """Return the source of this name.

    Raises:
        UserError: there is none, or it is a folder of captures.
    """
    if is_captures(name):
        raise UserError(f"{name}: captures of a teacher are windows already: leave out data.streaming.")
    files = sources.files_of(name, config.split)
    if files is None:
        return Hub(name, config.split)
    log.info("Reading %s as a stream: %d file(s), first %s", name, len(files), files[0])
    return Files(name, files, config.document_separator)


class Reader:
    """Documents of a source, which begins again at its end.

    Args:
        places: of the first document of each kind, which are noted there.

    Attributes:
        passes: over the source that are done.
        mark: where the next document begins.
    """

    def __init__(self, config: DataConfig, source: Source, name: str, places: FirstPlaces) -> None:
        self.config = config
        self.source = source
        self.name = name
        self.places = places
        self.columns = columns_of(config)
        self.passes = 0
        self.mark: Mark = source.begin
        self._documents: Iterator[Marked] | None = None
        self._next: Marked | None = None

    def take(self) -> str:
        """Return the text of the next document.

        Raises:
            UserError: it cannot be read, or the source has no document at all.
        """
        if self._documents is None:
            self._documents = self._marked()
            self._next = next(self._documents, None)
        if self._next is None:
            raise UserError(
                f"{self.name}: no document in it, and a stream reads each source again and again. Expected at "
                "least one: leave the source out of data.train."
            )

        # One is read ahead, so that the mark of the next one, or the end, is known.
        _, place, value = self._next
        text = document_text(self.config, place, value, places=self.places, columns=self.columns)
        self._next = next(self._documents, None)
        if self._next is None:
            self.passes += 1
            self.mark = self.source.begin
            self._documents = None
        else:
            self.mark = self._next.mark
        return text

    def _marked(self) -> Iterator[Marked]:
        """Yield the documents from the mark on."""
        rows = self.source.rows(self.columns, self.mark)
        if self.config.document_start is None:
            yield from rows
            return

        start = self.mark
        latest = start

        def lines() -> Iterator[sources.Located]:
            nonlocal latest
            for row in rows:
                latest = row.mark
                yield row.place, row.value

        # When a joined document is yielded, the line that was read last is the first one of the next.
        for place, text in join_lines(lines(), self.config.document_start):
            yield Marked(start, place, text)
            start = latest

    def state_dict(self) -> dict[str, Any]:
        """Return where the reader is, in plain values."""
        return {"passes": self.passes, "mark": self.mark}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a reader was."""
        self.passes = state["passes"]
        self.mark = state["mark"]
        self._documents = None
