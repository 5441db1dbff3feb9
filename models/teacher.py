"""The frozen teacher: PairedBatch -> TeacherSignal.

Shapes: B windows, T teacher positions, M unpadded teacher positions, N KD rows, V_T teacher vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .causal_lm import body_layers, check_head, head_logits, vocabulary_size
from .outputs import PairedBatch, TeacherSignal
from .vocabulary import VocabularyMap

LOGITS_AT_ONCE = 2**24
"""Teacher logits in memory at a time (elements); a chunk of positions is this over the vocabulary."""


class FrozenTeacher:
    """A causal language model that is only ever read.

    No `nn.Module`, so that it is no part of what is trained, saved, wrapped or put into training mode.

    Args:
        model: a transformers causal language model, in the dtype and on the device where it is to run.
        vocabulary: the vocabulary map of the pair, for the restriction at depth > 0.
    """

    def __init__(self, model: nn.Module, vocabulary: VocabularyMap) -> None:
        check_head(model, "teacher")
        self.model = model.eval().requires_grad_(False)
        self.rank = torch.from_numpy(vocabulary.rank)
        if len(self.rank) != vocabulary_size(model):
            raise ValueError(
                f"the vocabulary map holds {len(self.rank):,} teacher tokens, the teacher's head has "
                f"{vocabulary_size(model):,} rows; build the map with teacher_vocab_size={vocabulary_size(model)}"
            )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def signal(self, batch: PairedBatch, top_k: int, layers: Sequence[int] = ()) -> TeacherSignal:
        """The teacher's top-k distributions at the anchors of a batch, and its probability of the real text.

        Args:
            layers: teacher layers, counted from 1, whose states are returned as well.
        """
        home, device = batch.teacher_ids.device, self.device
        self.rank = self.rank.to(device)
        batch = batch.to(device)
        with torch.autocast(device.type, enabled=False):
            states, hidden = body_layers(self.model, batch.teacher_ids, batch.teacher_mask, layers)
            states = states.flatten(0, 1)
            position = batch.teacher_mask.flatten().nonzero()[:, 0]
            following = batch.teacher_ids.flatten().roll(-1)[position]
            row_at = torch.searchsorted(position, batch.row_teacher)
            size = max(1, LOGITS_AT_ONCE // len(self.rank))
            bounds = torch.arange(0, len(position) + size, size, device=device).clamp_max(len(position))
            # rows follow their anchors' order: the rows of a chunk of positions are neighbours
            row_bounds = torch.searchsorted(row_at, bounds).tolist()
            parts: list[tuple[Tensor, ...]] = []
            for chunk, lo in enumerate(range(0, len(position), size)):
                log_probs = head_logits(self.model, states[position[lo : lo + size]]).log_softmax(1)
                realised = log_probs.gather(1, following[lo : lo + size, None])[:, 0]
                rows = slice(row_bounds[chunk], row_bounds[chunk + 1])
                parts.append((*self._top(log_probs, row_at[rows] - lo, rows, batch, top_k), realised))
        ids, log_probs, log_tail, log_mass, realised = (
            torch.cat(column).to(home) for column in zip(*parts, strict=True)
        )
        states_there = tuple(state.to(home) for state in hidden) if layers else None
        return TeacherSignal(ids, log_probs, log_tail, log_mass, realised, states_there)

    def _top(self, log_probs: Tensor, at: Tensor, rows: slice, batch: PairedBatch, top_k: int) -> tuple[Tensor, ...]:
        """(ids, log-probabilities, log tail, log prefix mass) of some rows; `at`: their row in `log_probs`."""
        log_probs = log_probs[at]
        log_mass = log_probs.new_zeros(len(at))
        deep = (batch.depth[rows] > 0).nonzero()[:, 0]
        lo, hi = (bound[rows][deep, None] for bound in (batch.prefix_lo, batch.prefix_hi))
        restricted = log_probs[deep].masked_fill((self.rank < lo) | (self.rank >= hi), -torch.inf)
        log_mass[deep] = restricted.logsumexp(1)
        # a prefix without any mass: its row is not used, and must not be NaN
        log_mass = log_mass.clamp_min(torch.finfo(torch.float32).min)
        log_probs[deep] = restricted - log_mass[deep, None]
        top, ids = log_probs.topk(min(top_k, log_probs.shape[1]))
        log_tail = log_probs.scatter_(1, ids, -torch.inf).logsumexp(1)
        return ids.masked_fill(top == -torch.inf, -1), top, log_tail, log_mass
