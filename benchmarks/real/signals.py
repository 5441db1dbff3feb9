"""A teacher's answers to windows, computed once: they do not depend on the student.

Plain arrays in memory, and on disk for the next run: this is read more often than it is written, and a GPU must not
wait for the packing that a cache for large texts needs.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.teacher.cached import NUMBERS
from utils.files import write_bytes

NUMBER = "number"
"""Column of a window: its number, by which its signal is found."""


class SignalArrays:
    """The `SignalStore` of one teacher and one list of windows.

    Args:
        file: where the arrays are kept between runs.
        top_k: outcomes of each position.
    """

    def __init__(self, file: Path, top_k: int) -> None:
        self.file = file
        self.top_k = top_k
        self.windows: dict[bytes, tuple[np.ndarray, ...]] = {}
        if file.exists():
            with np.load(file) as stored:
                keys = stored["keys"]
                columns = [np.split(stored[name], stored[f"{name} ends"][:-1]) for name in NUMBERS]
            for key, *arrays in zip(keys, *columns, strict=True):
                self.windows[_key(int(key))] = tuple(arrays)

    @staticmethod
    def keys(windows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Return one key for each window."""
        return [_key(window[NUMBER]) for window in windows]

    def read(self, keys: Sequence[bytes]) -> list[np.ndarray] | None:
        """Return the arrays of a batch; None if one of the windows is missing."""
        if any(key not in self.windows for key in keys):
            return None

        columns = zip(*(self.windows[key] for key in keys), strict=True)
        arrays = [np.concatenate(column) for column in columns]
        arrays[0] = arrays[0].astype(np.int64)
        return arrays

    def keep(
        self,
        keys: Sequence[bytes],
        windows: Sequence[Sequence[np.ndarray]],
        tokens: int,
        seconds: float,
    ) -> list[np.ndarray]:
        """Store the arrays of each window, and return those of the batch."""
        for key, (ids, *others) in zip(keys, windows, strict=True):
            # Token ids need no 64 bits.
            self.windows[key] = (ids.astype(np.int32), *(array.copy() for array in others))
        arrays = self.read(keys)
        assert arrays is not None, "all of them were stored just now"
        return arrays

    def save(self) -> None:
        """Write all arrays, under the file's name only when they are whole."""
        stored: dict[str, np.ndarray] = {"keys": np.array([int(key) for key in self.windows])}
        for name, column in zip(NUMBERS, zip(*self.windows.values(), strict=True), strict=True):
            stored[name] = np.concatenate(column)
            stored[f"{name} ends"] = np.cumsum([len(array) for array in column])

        content = io.BytesIO()
        np.savez(content, **stored)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.file, content.getvalue())


def _key(number: int) -> bytes:
    """Return the key of a window."""
    return str(number).encode()
