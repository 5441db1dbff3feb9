"""Documents in memory as UTF-8, in one buffer: a text takes its bytes once, and is a Python string where it is read.

A list of strings takes two or four bytes a character as soon as one character of a text is outside of Latin-1 (a
curly quote is), and about 60 more a document.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np


class Texts(Sequence[str]):
    """Documents in the order of their numbers.

    Args:
        content: UTF-8 of all documents of the buffer.
        begins: [documents] int64, place in the buffer of each document's first byte.
        ends: [documents] int64, place behind its last one.
    """

    def __init__(self, content: bytes | bytearray, begins: np.ndarray, ends: np.ndarray) -> None:
        self._content = content
        self._begins = begins
        self._ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Texts":
        """Return texts that are read from elsewhere, each held as a string no longer than it takes to copy it."""
        content = bytearray()
        ends = array("q")
        for text in texts:
            content += text.encode()
            ends.append(len(content))

        places = np.array(ends, dtype=np.int64)
        return cls(content, np.concatenate(([0], places))[:-1], places)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each document."""
        return self._ends - self._begins

    def select(self, chosen: np.ndarray) -> "Texts":
        """Return some of the documents, in the same buffer.

        Args:
            chosen: [documents] bool, or numbers of documents.
        """
        return Texts(self._content, self._begins[chosen], self._ends[chosen])

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self)):
            yield self[number]

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> "Texts": ...
    def __getitem__(self, number: int | slice) -> "str | Texts":
        if isinstance(number, slice):
            return Texts(self._content, self._begins[number], self._ends[number])
        return self._content[self._begins[number] : self._ends[number]].decode()

    def __add__(self, others: Iterable[str]) -> list[str]:
        return [*self, *others]

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # as of a list, which it can be equal to

    def __repr__(self) -> str:
        return f"Texts({list(self[:3])}{', ...' if len(self) > 3 else ''})"
