"""Place of a window's tokens in the captured texts, found by content.

A window holds parts of texts behind start markers, packed as the run wants it. Runs of GRAM tokens are looked up by a
hash, and a match is grown in both directions; what a tokenizer cuts otherwise than the captured teacher did has no
place, and the text behind it is found again.

Shapes: N tokens of the captures, T tokens of a window.
"""

import numpy as np

GRAM = 8
"""Tokens that are looked up together."""
MOST_DENSE = 2**24
"""Tokens of captures up to which every place is in the index; of more, one in SPARSE, chosen by its hash."""
SPARSE = 8
MOST_CANDIDATES = 32
"""Places with the same tokens that are compared for the longest match."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)


class CaptureIndex:
    """An index of captured tokens.

    Args:
        ids: [N] tokens.
        segments: [N] number of the text that each belongs to; -1: none.
    """

    def __init__(self, ids: np.ndarray, segments: np.ndarray) -> None:
        self.ids = ids
        self.segments = segments
        hashes = _hashes(ids)
        is_inside = segments[: len(hashes)] == segments[GRAM - 1 :] if len(hashes) else np.zeros(0, bool)
        is_inside = is_inside & (segments[: len(hashes)] >= 0)
        if len(ids) > MOST_DENSE:
            # By the hash, so that both sides choose the same places.
            is_inside = is_inside & (hashes % np.uint64(SPARSE) == 0)

        places = np.flatnonzero(is_inside)
        order = np.argsort(hashes[places], kind="stable")
        self._places = places[order]
        self._hashes = hashes[places][order]

    def locate(self, ids: np.ndarray) -> np.ndarray:
        """Return [T] the place of each token of a window; -1 where it has none."""
        located = np.full(len(ids), -1, dtype=np.int64)
        hashes = _hashes(ids)
        firsts = np.searchsorted(self._hashes, hashes, side="left")
        lasts = np.searchsorted(self._hashes, hashes, side="right")

        begin = 0
        for at in np.flatnonzero(lasts > firsts).tolist():
            if at < begin:
                continue

            candidates = self._places[firsts[at] : min(lasts[at], firsts[at] + MOST_CANDIDATES)]
            matches = [self._match(ids, at, int(place), begin) for place in candidates]
            first, last, place = max(matches, key=lambda match: match[1] - match[0])
            if last - first < GRAM:
                continue
            located[first:last] = np.arange(place, place + last - first)
            begin = last
        return located

    def before(self, located: np.ndarray) -> np.ndarray:
        """Return the places of the predictions behind each token but the last.

        Behind a token that has no place, such as a start marker, it is the one before the next token, in its text.
        """
        places = located[:-1].copy()
        following = located[1:]
        is_lacking = (places < 0) & (following > 0)
        before = np.maximum(following - 1, 0)
        is_lacking &= self.segments[before] == self.segments[np.maximum(following, 0)]
        return np.where(is_lacking, before, places)

    def _match(self, ids: np.ndarray, at: int, place: int, begin: int) -> tuple[int, int, int]:
        """Return the first token, the one behind the last, and the place of the first of the match at a token.

        Args:
            begin: token of the window before which nothing is looked at.
        """
        text = self.segments[place]
        ahead = min(len(ids) - at, len(self.ids) - place)
        is_same = (self.ids[place : place + ahead] == ids[at : at + ahead]) & (
            self.segments[place : place + ahead] == text
        )
        last = at + _leading(is_same)

        back = min(at - begin, place)
        is_same = (self.ids[place - back : place] == ids[at - back : at]) & (
            self.segments[place - back : place] == text
        )
        count = _leading(is_same[::-1])
        return at - count, last, place - count


def _leading(is_true: np.ndarray) -> int:
    """Return how many values are true before the first that is not."""
    return len(is_true) if is_true.all() else int(is_true.argmin())


def _hashes(ids: np.ndarray) -> np.ndarray:
    """Return [T - GRAM + 1] a hash of the tokens that begin at each place."""
    count = len(ids) - GRAM + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)

    values = ids.astype(np.uint64)
    hashes = np.zeros(count, dtype=np.uint64)
    for number in range(GRAM):
        hashes = (hashes ^ values[number : number + count]) * FACTOR
        hashes ^= hashes >> np.uint64(29)
    return hashes
