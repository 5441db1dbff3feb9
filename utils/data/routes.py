"""Routes of documents to teachers that are for some of the text alone: by source, or by a column of tables."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from ..errors import UserError

NO_ROUTE = ""
"""Route of a row without the column, or with a value that is for no teacher in particular."""
MOST_LISTED = 12
"""Columns or values that a message lists."""


@dataclass
class Routes:
    """Route of each document: its source, or what a column of its row says."""

    teachers_for: Collection[str] = ()
    """Routes that teachers are for: sources, or values of the column."""
    column: str | None = None
    """Column of tables that says it; None: the source is the route."""
    of_document: dict[str, str] = field(default_factory=dict)
    """Name of a document -> its source or its value, the first one of a text that several rows have."""
    other_columns: set[str] = field(default_factory=set)
    """Columns that were met and not read, for messages."""

    def route_of(self, name: str) -> str:
        """Return the route of the document with this name."""
        route = self.of_document[name]
        # Values that are for nobody in particular share windows: a column may have as many as there are rows.
        is_of_rest = self.column is not None and route not in self.teachers_for
        return NO_ROUTE if is_of_rest else route

    def fingerprint(self, names: Iterable[str]) -> str:
        """Return a hash of the routes of some documents in their order, 32 hexadecimal digits."""
        total = blake2b(digest_size=16)
        for name in names:
            total.update(f"{self.route_of(name)}\0".encode())
        return total.hexdigest()

    def require_documents(self, names: Iterable[str]) -> None:
        """Check that some document has each value of the column that teachers are for.

        Args:
            names: of all documents of the run.

        Raises:
            UserError: none has one of them: it is misspelt, or the column is.
        """
        if self.column is None:
            return

        values = {self.of_document[name] for name in names} - {NO_ROUTE}
        missing = sorted({*self.teachers_for} - values)
        if not values:
            raise UserError(
                f"only_for: got the column {self.column!r}, which no row has a value in. Expected a column of the "
                f"data; others there: {_listed(self.other_columns)}. Correct its name, or leave out only_for."
            )
        if missing:
            raise UserError(
                f"only_for: got {', '.join(map(repr, missing))} for the column {self.column!r}, which no document "
                f"has. Expected values of the data: {_listed(values)}. Correct it, or leave that teacher out."
            )


def _listed(names: Collection[str]) -> str:
    """Return the first of some names in a message."""
    more = len(names) - MOST_LISTED
    listed = ", ".join(sorted(names)[:MOST_LISTED]) or "none"
    return f"{listed} and {more:,} more" if more > 0 else listed
