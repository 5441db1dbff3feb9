"""The frozen teacher: PairedBatch -> TeacherSignal.

Shapes: B windows, T teacher positions, M unpadded teacher positions, N KD rows, K tokens kept of each, V teacher
vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..language_model import body_layers, check_head, head_logits, input_device, is_plain_linear, vocabulary_size
from ..losses.chunk_size import chunk_rows
from ..text.vocabulary import VocabularyMap
from ..types import A_BATCH, PairedBatch, Source, TeacherSignal
from ..validation import expect, expect_count
from .top_k import _top


class FrozenTeacher:
    """A language model that is only ever read.

    No `nn.Module`, so that it is no part of what is trained, saved, wrapped or put into training mode.

    Args:
        model: a transformers language model, in the dtype and on the device where it is to run; accelerate may
            have spread its layers over several. It is put into evaluation mode and its parameters are frozen.
        vocabulary: the vocabulary map of the pair, for the restriction at depth > 0.

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

        # only now, so that a model that is refused stays as it was
        self.model = model.eval().requires_grad_(False)
        self.vocabulary_order = vocabulary.order
        self.order = torch.from_numpy(vocabulary.order).long().to(self.device)

    @property
    def device(self) -> torch.device:
        """The device of what the teacher says: that of its head, also after its model was moved."""
        device = self.model.get_output_embeddings().weight.device
        is_offloaded = device.type == "meta"  # accelerate fetches the weights for each call
        return self._first_device if is_offloaded else device

    def __deepcopy__(self, memo: dict) -> "FrozenTeacher":
        return self  # read only: copies of what holds it share it

    @torch.no_grad()
    def states(
        self, ids: Tensor, layers: Sequence[int], source: Source | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`body_layers` of ids on any device, outside of autocast; the states after a layer are where it is."""
        with torch.autocast(self.device.type, enabled=False):
            there = input_device(self.model)
            return body_layers(self.model, ids.to(there), layers, source and source.to(there))

    @torch.no_grad()
    def signal(self, batch: PairedBatch, top_k: int, layers: Sequence[int] = ()) -> TeacherSignal:
        """The teacher's top-k distributions at the anchors of a batch, and its probability of the real text.

        The signal stays on the teacher's device: a copy to another GPU would make that one wait at once.

        Args:
            layers: teacher layers, counted from 1, whose states are returned as well.
        """
        expect("batch", batch, PairedBatch, A_BATCH)
        top_k = expect_count("top_k", top_k, 1)
        device = self.device
        if self.order.device != device:  # the model was moved
            self.order = self.order.to(device)
        batch = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, enabled=False):
            states, hidden = self.states(batch.teacher_ids, layers, batch.teacher_source)
            position = batch.teacher_held[batch.asked]
            states = states.flatten(0, 1).to(device)[position]
            following = batch.teacher_ids.flatten().roll(-1)[position, None]
            anchors, total = len(batch.deep_before) - 1, len(position)
            top_k = min(top_k, len(self.order))
            has_plain_head = is_plain_linear(self.model.get_output_embeddings())
            each = 4 if has_plain_head or states.dtype == torch.float32 else 6  # with a copy in half precision
            most, _ = chunk_rows(len(self.order), device, each)
            size = math.ceil(total / math.ceil(total / most))  # a small last chunk would read the whole head again
            few = math.ceil(size / 4)  # deep rows come with their tokens, which take more than a logit
            buffer = torch.empty(size, len(self.order), device=device) if has_plain_head else None
            at_anchors, within, realised = [], [], []
            for lo in range(0, total, size):
                logits = head_logits(self.model, states[lo : lo + size], out=buffer)
                at_text = logits.gather(1, following[lo : lo + size])[:, 0]
                ends = [min(lo, anchors), min(lo + len(logits), anchors)]
                asked, other = logits.tensor_split([ends[1] - ends[0]])
                first, last = batch.deep_before[ends]
                for start in range(first, last, few):
                    within.append(self._within(asked, batch, lo, slice(start, min(start + few, last)), top_k))
                at_anchors.append(_top(asked, top_k))
                realised.append(at_text - torch.cat([at_anchors[-1][-1], other.logsumexp(1)]))
            *columns, log_sum = (torch.cat(c)[batch.row_asked] for c in zip(*at_anchors, strict=True))
            log_mass = torch.zeros_like(log_sum)  # at depth 0 nothing was read since the anchor
            if within:
                *parts, part_sum = (torch.cat(c) for c in zip(*within, strict=True))
                for column, part in zip(columns, parts, strict=True):
                    column[batch.deep] = part
                # a prefix without any mass: its row is not used, and must not be NaN
                log_mass[batch.deep] = (part_sum - log_sum[batch.deep]).clamp_min(torch.finfo(torch.float32).min)
            columns += [log_mass, torch.empty_like(batch.asked, dtype=torch.float32)]
            columns[-1][batch.asked] = torch.cat(realised)
        return TeacherSignal(*columns, hidden if layers else None)

    def _within(
        self, logits: Tensor, batch: PairedBatch, first: int, part: slice, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `_top` gives, with tokens for columns, of some rows at depth > 0: of the tokens that begin as was read.

        Args:
            logits: of neighbouring anchors.
            first: which anchor the first row of `logits` is.
            part: which of `batch.deep`.
        """
        rows = batch.deep[part]
        column = torch.arange(max(int(batch.deep_width[part].max()), top_k), device=logits.device)
        lo, hi = batch.prefix_lo[rows, None], batch.prefix_hi[rows, None]
        token = self.order[(lo + column).clamp_max(len(self.order) - 1)]
        restricted = logits[(batch.row_asked[rows] - first)[:, None], token].masked_fill(lo + column >= hi, -torch.inf)
        at, log_probs, log_tail, log_sum = _top(restricted, top_k)
        return token.gather(1, at).masked_fill(log_probs == -torch.inf, -1), log_probs, log_tail, log_sum
