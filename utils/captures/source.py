"""CaptureSource: the lists of windows from a folder of captures, for `models.teacher.listed`."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config.protocols import RunConfig
from ..errors import UserError
from .folder import Captures, digest_of, open_captures
from .index import CaptureIndex

log = logging.getLogger(__name__)

CAPTURED = "captured "
"""Beginning of the name by which caches know captures."""


class CaptureSource:
    """Lists of windows from captures. The folder is only read.

    Args:
        rows: tokens of the vocabulary map; listed ones beyond are left to the tail.
        model: name of the captured teacher, as the user states it.
    """

    def __init__(self, captures: Captures, rows: int, model: str | None = None) -> None:
        self.captures = captures
        self.rows = rows
        self.model = model
        self.index = CaptureIndex(captures.ids, captures.segments)

    def identity(self) -> dict[str, Any]:
        """Return what makes the teacher the one it is: the content of the folder, and the model that it is said to be.

        What is read of the lists follows from the content.
        """
        stated = {} if self.model is None else {"model": self.model}
        return {"captures": self.captures.digest, **stated}

    def begin(self, windows: Sequence[Sequence[int]], top_k: int) -> None:
        """Return at once: nothing is asked for."""

    def lists(self, windows: Sequence[Sequence[int]], top_k: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return ids, log-probabilities and those of the real tokens, for each window.

        A position that was not captured has an empty list. A real token that is not listed is taken to have an equal
        part of what the list leaves.
        """
        return [self._window(np.asarray(window, dtype=np.int64)) for window in windows]

    def _window(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the lists of one window; see `lists`."""
        places = self.index.before(self.index.locate(window))
        ids = np.full((len(places), self.captures.ranks), -1, dtype=np.int64)
        log_probs = np.full(ids.shape, -np.inf)

        row_of = np.searchsorted(self.captures.begins, places, side="right") - 1
        for row in np.unique(row_of[places >= 0]).tolist():
            # Behind the last token of a row there may be no list.
            position = places - self.captures.begins[row]
            is_here = (places >= 0) & (row_of == row) & (position < self.captures.listed_to[row])
            if not is_here.any():
                continue

            # Rows may be long, and a window reads a small part of one.
            begin, end = int(position[is_here].min()), int(position[is_here].max()) + 1
            row_ids, row_log_probs = self.captures.lists(row, begin, end)
            ids[is_here] = row_ids[position[is_here] - begin]
            log_probs[is_here] = row_log_probs[position[is_here] - begin]

        is_beyond = ids >= self.rows
        ids = np.where(is_beyond, -1, ids)
        log_probs = np.where(is_beyond, -np.inf, log_probs)
        return ids, log_probs, self._realised(window[1:], ids, log_probs)

    def _realised(self, real: np.ndarray, ids: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """Return the log-probability of each real token; of one that is not listed, that of an equal part."""
        is_real = ids == real[:, None]
        listed = np.where(is_real, log_probs, -np.inf).max(1)

        is_token = ids >= 0
        left = np.maximum(1 - np.exp(log_probs).sum(1), SMALLEST)
        unlisted = np.maximum(self.rows - is_token.sum(1), 1)
        # None of the others is more probable than the last that is listed.
        last = np.where(is_token.any(1), np.where(is_token, log_probs, np.inf).min(1), 0.0)
        return np.where(is_real.any(1), listed, np.minimum(np.log(left / unlisted), last))


SMALLEST = 1e-6
"""Mass that the tokens of a list leave at least: their numbers are rounded."""


def connect_captures(config: RunConfig, *, rows: int, top_k: int) -> CaptureSource:
    """Return the lists of the folder that a run names as its teacher, once it was checked.

    Args:
        rows: tokens of the vocabulary map.
        top_k: outcomes that the loss, or the cache, keeps.

    Raises:
        UserError: there is no such folder, or it is of no use to this run.
    """
    captures = open_captures(str(config.teacher.name), str(config.teacher.tokenizer))
    if min(top_k, rows) > captures.ranks:
        raise UserError(
            f"{config.teacher.name}: its lists have {captures.ranks} tokens that can be read, and the run wants "
            f"{top_k}. Give --top-k {captures.ranks} (with a cache: --cache-top-k {captures.ranks}), or fewer."
        )
    return CaptureSource(captures, rows, config.teacher.model)


def captured_name(config: RunConfig) -> str:
    """Return the name by which a cache knows a run's captures: the content of their folder."""
    return f"{CAPTURED}{digest_of(str(config.teacher.name))}"
