"""Rows of different lengths as one array."""

from collections.abc import Sequence

import numpy as np


def pad_rows(rows: Sequence[np.ndarray], value: int) -> np.ndarray:
    """Return rows as [rows, longest] int64, at least one wide, with `value` behind the shorter ones."""
    longest = max([1, *map(len, rows)])
    padded = np.full((len(rows), longest), value, dtype=np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
