"""FrozenTeacher: a language model that reads a `PairedBatch` and answers with a `TeacherSignal`.

Shapes: B windows, T teacher positions, M unpadded teacher positions, N KD rows, D rows at depth > 0, K tokens of each
row, V teacher vocabulary.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..document_attention import UNCHOSEN, end_to_end
from ..language_model import body_layers, check_head, head_logits, input_device, is_plain_linear, vocabulary_size
from ..losses.chunk_size import chunk_rows
from ..text.vocabulary import VocabularyMap
from ..types import A_BATCH, PairedBatch, Source, TeacherSignal
from ..validation import expect, expect_count
from .top_k import TopK, join_top_k, take_top_k


class HeadReading(NamedTuple):
    """Output of the teacher's head for a batch, in the parts in which it was computed."""

    at_anchors: list[TopK]
    """Rows: the positions that are an anchor, in the order of `PairedBatch.asked`."""
    within_prefix: list[TopK]
    """[D] rows: the same, restricted to the tokens that begin with what the student has read."""
    realised: list[Tensor]
    """[M] log-probability of the text's next token, in the order of `PairedBatch.asked`."""


class FrozenTeacher:
    """A language model that is only ever read.

    No `nn.Module`, so that it is no part of what is trained, saved, wrapped or put into training mode.

    Args:
        model: a transformers language model, in the dtype and on the device where it is to run; accelerate may
            have spread its layers over several. It is put into evaluation mode and its parameters are frozen.
        vocabulary: the vocabulary map of the pair, for the restriction at depth > 0.

    Attributes:
        document_attention: attention that reads isolated documents.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a model whose logits are not head(body(x)), or that has other rows than the map has tokens.
    """

    def __init__(self, model: nn.Module, vocabulary: VocabularyMap) -> None:
        expect("vocabulary", vocabulary, VocabularyMap, "the pair's VocabularyMap")
        self._first_device = check_head(model, "teacher")
        rows = vocabulary_size(model)
        if len(vocabulary.order) != rows:
            raise ValueError(
                f"the vocabulary map holds {len(vocabulary.order):,} teacher tokens, the teacher's head has "
                f"{rows:,} rows; build the map with teacher_vocab_size={rows}"
            )

        # Only now, so that a model that is refused stays as it was.
        self.model = model.eval().requires_grad_(False)
        self.vocabulary_order = vocabulary.order
        order = torch.from_numpy(vocabulary.order).long()
        self.order = order.to(self.device)
        self.document_attention = UNCHOSEN

    @property
    def device(self) -> torch.device:
        """The device of the teacher's signals: that of its head, also after its model was moved."""
        device = self.model.get_output_embeddings().weight.device
        # Offloaded weights have none of their own: accelerate fetches them for each call.
        is_offloaded = device.type == "meta"
        return self._first_device if is_offloaded else device

    def __deepcopy__(self, memo: dict) -> "FrozenTeacher":
        # It is only read, so that copies of a framework share it.
        return self

    @torch.no_grad()
    def states(
        self,
        ids: Tensor,
        layers: Sequence[int],
        source: Source | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the model's body outside of autocast, on ids that lie on any device; see `body_layers`.

        The states after a layer lie on the device of that layer.
        """
        with torch.autocast(self.device.type, enabled=False):
            device = input_device(self.model)
            if source is not None:
                source = source.to(device)
            ids = ids.to(device)
            if positions is None:
                return body_layers(self.model, ids, layers, source)

            positions = positions.to(device)
            if self.document_attention.name is None:
                return body_layers(self.model, ids, layers, source, positions)
            return end_to_end(
                self.model,
                self.document_attention.name,
                ids=ids,
                positions=positions,
                layers=layers,
            )

    @torch.no_grad()
    def signal(
        self,
        batch: PairedBatch,
        top_k: int,
        layers: Sequence[int] = (),
    ) -> TeacherSignal:
        """Return the top-k distributions at the anchors of a batch, and the log-probability of the real text.

        The signal stays on the teacher's device: a copy to another GPU would make that one wait at once.

        Args:
            layers: teacher layers, counted from 1, whose states are returned as well.
        """
        expect("batch", batch, PairedBatch, A_BATCH)
        top_k = expect_count("top_k", top_k, 1)
        device = self.device
        # The model may have been moved since.
        self.order = self.order.to(device)
        batch = batch.to(device, non_blocking=True)

        with torch.autocast(device.type, enabled=False):
            states, hidden = self.states(batch.teacher_ids, layers, batch.teacher_source, batch.teacher_positions)
            position = batch.teacher_held[batch.asked]
            next_ids = batch.teacher_ids.flatten().roll(-1)
            states = states.flatten(0, 1).to(device)
            reading = self._read_head(
                states[position],
                next_ids[position],
                batch,
                top_k=min(top_k, len(self.order)),
            )

            # At depth 0 nothing was read since the anchor: its log mass is 0.
            top = join_top_k(reading.at_anchors).rows(batch.row_asked)
            log_mass = torch.zeros_like(top.log_sum)
            if reading.within_prefix:
                within = join_top_k(reading.within_prefix)
                log_share = within.log_sum - top.log_sum[batch.deep]
                top.ids[batch.deep] = within.ids
                top.log_probs[batch.deep] = within.log_probs
                top.log_tail[batch.deep] = within.log_tail
                # The row of a prefix without any mass is not used, and must not be NaN.
                log_mass[batch.deep] = log_share.clamp_min(torch.finfo(torch.float32).min)

            # Back from the order of computation to that of the text.
            realised = torch.zeros_like(batch.teacher_held, dtype=torch.float32)
            realised[batch.asked] = torch.cat(reading.realised)

        return TeacherSignal(
            ids=top.ids,
            log_probs=top.log_probs,
            log_tail=top.log_tail,
            log_mass=log_mass,
            realised=realised,
            hidden=hidden if layers else None,
        )

    def _read_head(
        self,
        states: Tensor,
        next_ids: Tensor,
        batch: PairedBatch,
        top_k: int,
    ) -> HeadReading:
        """Send states through the head, chunk by chunk: the logits of all positions never exist together.

        Args:
            states: [M, H_T] in the order of `PairedBatch.asked`.
            next_ids: [M] the text's next token at each.
        """
        size = self._chunk_size(states)
        buffer = None
        if is_plain_linear(self.model.get_output_embeddings()):
            buffer = torch.empty(size, len(self.order), device=self.device)
        # Deep rows come with their tokens, which take more than a logit.
        deep_size = math.ceil(size / 4)

        anchors = len(batch.deep_before) - 1
        reading = HeadReading([], [], [])
        for first in range(0, len(states), size):
            chunk = slice(first, first + size)
            logits = head_logits(self.model, states[chunk], out=buffer)
            text_logits = logits.gather(1, next_ids[chunk, None])[:, 0]

            # Anchors come first in the order. A chunk may hold the last of them and other positions.
            first_anchor = min(first, anchors)
            end_anchor = min(first + len(logits), anchors)
            at_anchors, other = logits.tensor_split([end_anchor - first_anchor])

            # Before the top k are taken, which overwrites the logits.
            first_deep = batch.deep_before[first_anchor]
            end_deep = batch.deep_before[end_anchor]
            for start in range(first_deep, end_deep, deep_size):
                part = slice(start, min(start + deep_size, end_deep))
                top = self._top_within_prefix(at_anchors, batch, first, part, top_k)
                reading.within_prefix.append(top)

            top = take_top_k(at_anchors, top_k)
            reading.at_anchors.append(top)
            log_sums = torch.cat([top.log_sum, other.logsumexp(1)])
            reading.realised.append(text_logits - log_sums)
        return reading

    def _chunk_size(self, states: Tensor) -> int:
        """Return the rows of a chunk, such that all chunks are about equal: a small last one reads the whole head."""
        is_plain = is_plain_linear(self.model.get_output_embeddings())
        # Another head makes a copy in half precision besides.
        bytes_per_logit = 4 if is_plain or states.dtype == torch.float32 else 6
        most, _ = chunk_rows(len(self.order), self.device, bytes_per_logit)
        chunks = math.ceil(len(states) / most)
        return math.ceil(len(states) / chunks)

    def _top_within_prefix(
        self,
        logits: Tensor,
        batch: PairedBatch,
        first_anchor: int,
        part: slice,
        top_k: int,
    ) -> TopK:
        """Return the top k of some rows at depth > 0, among the tokens that begin with what the student has read.

        Args:
            logits: [anchors, V] of neighbouring anchors.
            first_anchor: number of the anchor in the first row of `logits`.
            part: a part of `batch.deep`.
        """
        rows = batch.deep[part]
        low = batch.prefix_lo[rows, None]
        high = batch.prefix_hi[rows, None]

        # The tokens with a common beginning are neighbours in the vocabulary map's order.
        most_tokens = int(batch.deep_width[part].max())
        width = max(most_tokens, top_k)
        rank = low + torch.arange(width, device=logits.device)
        token = self.order[rank.clamp_max(len(self.order) - 1)]

        anchor = batch.row_asked[rows] - first_anchor
        restricted = logits[anchor[:, None], token]
        restricted = restricted.masked_fill(rank >= high, -torch.inf)
        top = take_top_k(restricted, top_k)

        # A prefix may have fewer than k tokens.
        is_missing = top.log_probs == -torch.inf
        ids = token.gather(1, top.ids).masked_fill(is_missing, -1)
        return top._replace(ids=ids)
