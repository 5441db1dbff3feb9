"""Texts that were seen of late, in fixed memory."""

from hashlib import blake2b
from typing import Any

import numpy as np
import torch

BITS = 24
"""Bits of a filter for each text that it takes."""
HASHES = 17
"""Bits that a text sets: the number at which a filter of so many bits errs least."""
ERROR = 2e-5
"""Share of new texts that are taken for repeats, at most: 1 in 100,000 for each of two full filters."""


class RecentTexts:
    """The last texts of a stream, as two Bloom filters that take turns.

    A text is known as long as fewer than `capacity` others follow it, and at most twice as long. None of those is
    missed; of new texts a share of `ERROR` is taken for a repeat.

    Args:
        capacity: texts that a filter takes before the other one is emptied and filled.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bits = capacity * BITS
        self.texts = 0
        self._filters = np.zeros((2, (self.bits + 7) // 8), dtype=np.uint8)

    @property
    def size(self) -> int:
        """Bytes of memory."""
        return int(self._filters.nbytes)

    def add(self, text: str, passes: int) -> bool:
        """Remember a text; return whether it is known from the same pass.

        Args:
            passes: over its source, done before: in the next one it is new again.
        """
        digest = blake2b(text.encode(), digest_size=16, salt=passes.to_bytes(8, "little")).digest()
        first, second = np.frombuffer(digest, dtype="<u8")

        # Two hashes make all the others; odd, so that no bit comes twice in a row. Overflow is part of it.
        numbers = np.arange(HASHES, dtype=np.uint64)
        places = (first + numbers * (second | np.uint64(1))) % np.uint64(self.bits)
        columns = (places >> np.uint64(3)).astype(np.int64)
        masks = np.left_shift(1, (places & np.uint64(7)).astype(np.int64)).astype(np.uint8)
        if ((self._filters[:, columns] & masks) != 0).all(axis=1).any():
            return True

        np.bitwise_or.at(self._filters[0], columns, masks)
        self.texts += 1
        if self.texts == self.capacity:
            self._filters = np.stack([np.zeros_like(self._filters[0]), self._filters[0]])
            self.texts = 0
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return all of it, as a checkpoint holds it."""
        return {"texts": self.texts, "filters": torch.from_numpy(self._filters.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make everything as it was when `state_dict` was called."""
        self.texts = state["texts"]
        self._filters = state["filters"].numpy().copy()
