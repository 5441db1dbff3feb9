"""A teacher that is known by lists of its most probable tokens: `TeacherSignal` as its model would give it.

ListedReader makes the signal of the lists of a batch. ListedTeacher asks a source for them, window by window; nothing
here knows whether that is a server, or where. See `ListSource`.

A server, or a stored capture, lists the most probable tokens of each position and tells the probability of the real
one; the logits of the others are not known. At depth 0 nothing is lost by that. A row at depth > 0 asks for the tokens
that begin with what the student has read, and some of these may not be listed. None of them is more probable than the
last that is, and together they have at most what the list leaves: where that could be more than a small part of the
row's mass, the row is left to the LM term.

Shapes: M unpadded teacher positions, K listed tokens of each, N KD rows, D rows at depth > 0, V teacher vocabulary, T
tokens of a window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..text.vocabulary import VocabularyMap
from ..types import A_BATCH, PairedBatch, TeacherSignal
from ..validation import expect, expect_count

LEAST_LISTED_SHARE = 0.5
"""Share of a row's mass that the listed tokens hold at least, however the mass of the others is spread.

Measured with k = 64 and a teacher of 14,019 tokens, students of 512 and of 105 characters: 11 % of the rows are left
out, and the others are off by 0.004 and 0.007 of their mass on average. With 0.9 that is 22 and 27 %, 0.001 and 0.003.
"""

ROUNDING = 1e-6
"""Mass by which a sum of listed probabilities may be wrong: servers compute and write them in float32."""

UNKNOWN = -math.inf
"""`TeacherSignal.log_mass` of a row that the lists do not tell enough of. That of a model is always finite."""


@dataclass(frozen=True)
class ListedTokens:
    """Most probable tokens of each position of a batch, at temperature 1, in the order of the text."""

    ids: Tensor
    """[M, K] int64 distinct tokens, in any order; -1 where fewer are listed. No token that is left out is more probable
    than one that is listed."""
    log_probs: Tensor
    """[M, K] log-probabilities under the whole vocabulary; -inf where `ids` is -1."""
    realised: Tensor
    """[M] log-probability of the text's next token, listed or not; any number at the last position of a window."""


class WindowLists(NamedTuple):
    """Arrays of a `ListSource` on one window: a row for each token but the first, which nothing predicts."""

    ids: np.ndarray
    """[T - 1, K] int64 tokens; see `ListedTokens`."""
    log_probs: np.ndarray
    """[T - 1, K]."""
    realised: np.ndarray
    """[T - 1] log-probability of each token of the window but the first."""


class ListSource(Protocol):
    """Lists of a teacher's most probable tokens, window by window."""

    def begin(self, windows: Sequence[Sequence[int]], top_k: int) -> None:
        """Begin to fetch what `lists` will be asked for; returns at once."""

    def lists(self, windows: Sequence[Sequence[int]], top_k: int) -> Sequence[Sequence[np.ndarray]]:
        """Return the fields of `WindowLists` for the tokens of each window, with `top_k` tokens a row, or more."""

    def identity(self) -> dict[str, Any]:
        """Return what makes the teacher the one it is."""


@dataclass(frozen=True)
class _Rows:
    """Fields of a `TeacherSignal` for some of its rows, in float64."""

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor
    log_mass: Tensor


class ListedReader:
    """Makes the signal of a batch from lists.

    Args:
        vocabulary: the vocabulary map of the pair, for the restriction at depth > 0.
    """

    def __init__(self, vocabulary: VocabularyMap) -> None:
        expect("vocabulary", vocabulary, VocabularyMap, "the pair's VocabularyMap")
        order = torch.from_numpy(vocabulary.order).long()
        self.size = len(order)
        # [V] place of each token in the vocabulary map's order.
        self.rank = torch.empty_like(order)
        self.rank[order] = torch.arange(self.size)

    @torch.no_grad()
    def __call__(
        self,
        listed: ListedTokens,
        batch: PairedBatch,
        top_k: int,
    ) -> TeacherSignal:
        """Return the signal of a batch on the host, where the lists are.

        Raises:
            ValueError: lists of another number of positions than the batch has, or tokens beyond the vocabulary.
        """
        expect("batch", batch, PairedBatch, A_BATCH)
        top_k = expect_count("top_k", top_k, 1)
        batch = batch.to("cpu")
        self._check(listed, batch)

        # 1. Every row from the list of its anchor, as at depth 0.
        position = batch.asked[batch.row_asked]
        ids = listed.ids[position]
        probs = _probabilities(listed.log_probs[position])
        width = min(top_k, ids.shape[1])
        rows = self._whole(ids, probs, width)

        # 2. Rows at depth > 0 from the part of it that begins with what the student has read.
        if len(batch.deep):
            deep = self._restricted(listed, batch, width)
            rows.ids[batch.deep] = deep.ids
            rows.log_probs[batch.deep] = deep.log_probs
            rows.log_tail[batch.deep] = deep.log_tail
            rows.log_mass[batch.deep] = deep.log_mass

        # 3. A position whose list is empty tells nothing.
        is_empty = (ids < 0).all(1)
        rows.log_mass[is_empty] = UNKNOWN

        return TeacherSignal(
            ids=rows.ids,
            log_probs=rows.log_probs.float(),
            log_tail=rows.log_tail.float(),
            log_mass=rows.log_mass.float(),
            realised=listed.realised.float(),
        )

    def _check(self, listed: ListedTokens, batch: PairedBatch) -> None:
        """Refuse lists that are not those of this batch."""
        positions = len(batch.teacher_held)
        if len(listed.ids) != positions or len(listed.realised) != positions:
            raise ValueError(
                f"listed: got lists of {len(listed.ids):,} positions and {len(listed.realised):,} real tokens, "
                f"expected {positions:,}, one for each teacher token of the batch"
            )
        if listed.ids.numel() and int(listed.ids.max()) >= self.size:
            raise ValueError(
                f"listed: got the token {int(listed.ids.max()):,} of a vocabulary of {self.size:,}; expected the "
                "lists of the teacher whose tokenizer the vocabulary map was built with"
            )

    def _whole(self, ids: Tensor, probs: Tensor, width: int) -> _Rows:
        """Return rows at depth 0: the most probable listed tokens, and the mass of all others.

        Args:
            ids: [N, K] tokens of each row's anchor.
            probs: [N, K] float64.
        """
        top, columns = probs.topk(width)
        # Of a whole vocabulary the rest is summed, not what is left of 1: exact also where it is tiny.
        is_whole = (ids >= 0).sum(1) == self.size
        unlisted = torch.where(is_whole, 0.0, _left_of_one(probs.sum(1)))
        tail = unlisted + probs.scatter(1, columns, 0.0).sum(1)
        return _Rows(
            ids=ids.gather(1, columns),
            log_probs=top.log(),
            log_tail=tail.log(),
            log_mass=torch.zeros_like(tail),
        )

    def _restricted(self, listed: ListedTokens, batch: PairedBatch, width: int) -> _Rows:
        """Return the D rows at depth > 0: listed tokens that begin with what was read, by their share of its mass."""
        position = batch.asked[batch.row_asked[batch.deep]]
        ids, probs, least = self._with_real_tokens(listed, batch, position)
        is_listed = ids >= 0
        rank = torch.where(is_listed, self.rank[ids.clamp_min(0)], -1)
        low = batch.prefix_lo[batch.deep]
        high = batch.prefix_hi[batch.deep]
        begins = (rank >= low[:, None]) & (rank < high[:, None])

        # 1. What the others could have: each at most as much as the last that is listed, all at most what is left.
        begin_unlisted = (high - low) - begins.sum(1)
        all_unlisted = self.size - is_listed.sum(1)
        left_of_one = torch.where(all_unlisted > 0, _left_of_one(probs.sum(1)), 0.0)
        most = torch.minimum(begin_unlisted * least, left_of_one + ROUNDING)

        # 2. What they are taken to have: an equal part each, which lies within these bounds but for rounding.
        expected = left_of_one * begin_unlisted / all_unlisted.clamp_min(1)
        unlisted = torch.minimum(expected, most)

        # 3. The distribution of what begins so.
        mass = torch.where(begins, probs, 0.0)
        top, columns = mass.topk(width)
        listed_mass = mass.sum(1)
        whole = listed_mass + unlisted
        tail = unlisted + mass.scatter(1, columns, 0.0).sum(1)
        is_token = begins.gather(1, columns)
        log_whole = whole.log().clamp_min(torch.finfo(torch.float32).min)

        # 4. A row whose mass could be elsewhere tells nothing.
        is_enough = listed_mass >= LEAST_LISTED_SHARE * (listed_mass + most)
        return _Rows(
            ids=torch.where(is_token, ids.gather(1, columns), -1),
            log_probs=torch.where(is_token, top.log() - log_whole[:, None], -torch.inf),
            log_tail=tail.log() - log_whole,
            log_mass=torch.where(is_enough, log_whole, UNKNOWN),
        )

    def _with_real_tokens(
        self,
        listed: ListedTokens,
        batch: PairedBatch,
        position: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and float64 masses [D, K + 1] of some positions with their real token, and each list's least mass.

        The real token has a column of its own, empty where it is among the listed ones.
        """
        ids = listed.ids[position]
        probs = _probabilities(listed.log_probs[position])
        # An empty list bounds nothing; 1 stands for that, since infinity times no tokens is no number.
        least = probs.masked_fill(ids < 0, torch.inf).amin(1).clamp_max(1)

        next_ids = batch.teacher_ids.flatten().roll(-1)
        real = next_ids[batch.teacher_held[position]]
        realised = _probabilities(listed.realised[position])
        is_new = (ids != real[:, None]).all(1)
        real = torch.where(is_new, real, -1)
        realised = torch.where(is_new, realised, 0.0)

        ids = torch.cat([ids, real[:, None]], 1)
        probs = torch.cat([probs, realised[:, None]], 1)
        return ids, probs, least


def _probabilities(log_probs: Tensor) -> Tensor:
    """Return probabilities in float64, in which what the listed ones leave of 1 is known well."""
    return log_probs.double().exp()


def _left_of_one(sums: Tensor) -> Tensor:
    """Return the mass that is left of 1; rounding may have made a sum larger."""
    return (1 - sums).clamp_min(0)


class ListedTeacher:
    """A teacher whose model is elsewhere, and which is asked for lists; the framework takes it like any other.

    Args:
        source: lists of windows.
        vocabulary: the vocabulary map of the pair.
    """

    model = None
    """There is none in this process."""

    def __init__(self, source: ListSource, vocabulary: VocabularyMap) -> None:
        self.source = source
        self.read = ListedReader(vocabulary)

    def __deepcopy__(self, memo: dict) -> "ListedTeacher":
        # Copies of a framework share it, as they do a model.
        return self

    def identity(self) -> dict[str, Any]:
        """Return what makes it this teacher."""
        return self.source.identity()

    def begin(self, batch: PairedBatch, top_k: int) -> bool:
        """Begin to fetch the lists of a batch, for a `signal` that is asked for later; returns True, at once."""
        self.source.begin(_windows(batch), self._most(top_k))
        return True

    @torch.no_grad()
    def signal(
        self,
        batch: PairedBatch,
        top_k: int,
        layers: Sequence[int] = (),
    ) -> TeacherSignal:
        """Return what `FrozenTeacher.signal` returns, on the host.

        Raises:
            ValueError: hidden states are asked for, or the batch has prompts for an encoder.
        """
        if layers:
            raise ValueError(f"layers: got {list(layers)}, expected none: this teacher's model is elsewhere")
        if batch.teacher_source is not None:
            raise ValueError(
                "batch: got prompts for an encoder, expected text for a causal model: lists have no others"
            )
        top_k = self._most(expect_count("top_k", top_k, 1))
        windows = [WindowLists(*arrays) for arrays in self.source.lists(_windows(batch), top_k)]
        return self.read(join_windows(windows), batch, top_k)

    def _most(self, top_k: int) -> int:
        """Return the tokens that a list can have."""
        return min(top_k, self.read.size)


def join_windows(windows: Sequence[WindowLists]) -> ListedTokens:
    """Return the lists of a batch; each window has an empty one behind its last token, where the text ends."""
    ids = []
    log_probs = []
    realised = []
    for window in windows:
        ids.append(np.pad(window.ids, ((0, 1), (0, 0)), constant_values=-1))
        log_probs.append(np.pad(window.log_probs, ((0, 1), (0, 0)), constant_values=-np.inf))
        realised.append(np.pad(window.realised, (0, 1)))
    return ListedTokens(
        ids=torch.from_numpy(np.concatenate(ids)),
        log_probs=torch.from_numpy(np.concatenate(log_probs)),
        realised=torch.from_numpy(np.concatenate(realised)),
    )


def _windows(batch: PairedBatch) -> list[list[int]]:
    """Return the teacher's tokens of each window, without padding; of isolated documents those of each document."""
    lengths = batch.teacher_mask.sum(1).tolist()
    rows = batch.teacher_ids.tolist()
    windows = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    if batch.teacher_positions is None:
        return windows

    documents = []
    for window, positions in zip(windows, batch.teacher_positions, strict=True):
        begins = (positions[: len(window)] == 0).nonzero().flatten().tolist()
        documents += [window[begin:end] for begin, end in zip(begins, [*begins[1:], None], strict=True)]
    return documents
