"""Loss terms on hidden states, at places where both models have read the same bytes (anchors).

`HIDDEN_STATE_TERMS` is their table: the loss of each, and how many items it is a sum over. To add a term: a field of
`CurriculumConfig` with its label, and a row here. Each term is averaged over the compared layers of the student, and is
about 1 per item for unrelated states, whatever the batch, the lengths, the widths and the depths.

A text is what the models read by themselves: a window or, where documents are isolated, each document in it.

Shapes: L student layers, M teacher layers, B windows, D texts, S and T positions, A anchors, Q sampled anchors of a
text, U of a window, R runs of anchors, H_S and H_T widths, G heads, P pairs of sampled anchors (Q * Q).
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..config import RouterConfig
from ..types import Anchors

LEAST_RELATED = 4
"""rel: sampled anchors that a text needs for its relations to be compared: six pairs."""
SHARPNESS = 8.0
"""attn: factor of the cosine between a query and a key."""
SAME_TEXT = 0.9999
"""contr: teacher states at least this similar belong to the same text, and are no negatives of each other."""


# ------------------------------------------------------------------------------- what a term is given


class Router(Protocol):
    """The trained parts that bring states of different widths together (`StudentAwareRouter`)."""

    config: RouterConfig
    partner: list[int]
    """For each student layer, the index of the teacher layer at the same relative depth."""
    log_prior: Tensor
    """[L, M] log-probabilities of the teacher's layers before the gate has learned anything."""

    def project(self, layer: int, states: Tensor) -> Tensor:
        """Return states of a student layer [..., H_S] in the teacher's width, layer-normalised [..., H_T]."""

    def standardise(self, layer: int, states: Tensor) -> Tensor:
        """Return states of a teacher layer [..., H_T], standardised per channel and layer-normalised."""

    def log_routing(
        self,
        layer: int,
        states: Tensor,
        text: Tensor,
        texts: int,
    ) -> Tensor:
        """Return [A, M] log-probabilities of the teacher's layers, for the anchors of a student layer."""


class ComparedStates:
    """Hidden states of one batch in the forms that the terms compare; each form is computed once, at its first use.

    Args:
        router: projections, statistics and gates.
        student: L states [B, S, H_S], in float32 or more.
        teacher: M states [B, T, H_T], in the student's dtype.
        anchors: places to compare.
    """

    def __init__(
        self,
        router: Router,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        anchors: Anchors,
    ) -> None:
        self.router = router
        self.student = student
        self.teacher = teacher
        self.anchors = anchors
        self._targets: dict[int, Tensor] = {}

    @property
    def config(self) -> RouterConfig:
        return self.router.config

    @property
    def texts(self) -> int:
        return len(self.anchors.sampled)

    @cached_property
    def at_anchors(self) -> list[Tensor]:
        """L x [A, H_S] states of the student at the anchors."""
        return [at_positions(states, self.anchors.student) for states in self.student]

    @cached_property
    def projected(self) -> list[Tensor]:
        """L x [A, H_T] the same, projected to the teacher's width."""
        return [self.router.project(layer, states) for layer, states in enumerate(self.at_anchors)]

    def target(self, layer: int) -> Tensor:
        """Return [A, H_T] states of a teacher layer at the anchors, standardised."""
        if layer not in self._targets:
            states = at_positions(self.teacher[layer], self.anchors.teacher)
            self._targets[layer] = self.router.standardise(layer, states)
        return self._targets[layer]

    @property
    def partners(self) -> list[Tensor]:
        """L x [A, H_T] target of each student layer, from the teacher layer at its relative depth."""
        return [self.target(layer) for layer in self.router.partner]


# ----------------------------------------------------------------------------------------- the losses


def feature_loss(states: ComparedStates) -> Tensor:
    """Return the distance of the student's states from the teacher's, summed over anchors."""
    sums = []
    for projected, target in zip(states.projected, states.partners, strict=True):
        sums.append(state_distance(projected, target).sum())
    return mean(sums)


def relation_loss(states: ComparedStates) -> Tensor:
    """Return 1 - correlation of the cosines between a text's anchors, summed over texts.

    After MiniLMv2 (arXiv 2012.15828). Every pair of sampled anchors is one entry of the correlation.
    """
    anchors = states.anchors
    is_anchor = anchors.sampled >= 0  # [D, Q]
    index = anchors.sampled.clamp_min(0)

    # Each pair once, and no anchor with itself: the triangle below the diagonal.
    is_pair = is_anchor[:, :, None] & is_anchor[:, None]
    pairs = is_pair.tril(-1).flatten(1)  # [D, P]
    has_enough = is_anchor.sum(1) >= LEAST_RELATED

    heads = states.config.heads
    student_positions = pick(anchors.student, index)  # [D, Q]
    teacher_positions = pick(anchors.teacher, index)
    sums = []
    for layer, partner in enumerate(states.router.partner):
        student_rows = at_positions(states.student[layer], student_positions)  # [D, Q, H_S]
        student_cosines = centred_cosines(student_rows, is_anchor, heads)
        teacher_rows = at_positions(states.teacher[partner], teacher_positions)
        teacher_cosines = centred_cosines(teacher_rows, is_anchor, heads)

        correlation = masked_correlation(student_cosines, teacher_cosines, pairs[:, None])  # [D, G]
        loss = (1 - correlation).mean(1)
        sums.append(torch.where(has_enough, loss, 0).sum())
    return mean(sums)


def attention_loss(states: ComparedStates) -> Tensor:
    """Return the cross-entropy of the student's attention over teacher states, summed over sampled anchors.

    The student is to attend to the teacher's tokens that cover the bytes of its own last token. A key is visible if it
    ends where the query ends or before, in bytes, and belongs to its text: that is the causal mask across tokenizers.
    Divided by the log of the number of visible keys, which is the cross-entropy of a student that cannot tell them
    apart.
    """
    anchors = states.anchors
    query_start, query_end = anchors.query_bytes.unsqueeze(2).unbind(-1)  # [B, U, 1]
    key_start, key_end = anchors.key_bytes.unsqueeze(1).unbind(-1)  # [B, 1, T]

    # The first position of the teacher is no key: its state is extreme (massive activations).
    query_begin = anchors.query_begin.unsqueeze(2)  # [B, U, 1]
    is_visible = (key_end <= query_end) & (key_start >= query_begin)  # [B, U, T]
    is_visible[..., 0] = False

    # The target of a query: each visible key's share of its bytes.
    overlap_end = torch.minimum(key_end, query_end)
    overlap = overlap_end - torch.maximum(key_start, query_start)
    covered = (overlap.clamp_min(0) * is_visible).to(states.projected[0])
    share = covered / covered.sum(-1, keepdim=True).clamp_min(1)

    # At least 2 keys, since the log of 1 is 0; a query that sees fewer does not count.
    visible_keys = is_visible.sum(-1).clamp_min(2)
    log_visible = visible_keys.to(share).log()

    heads = states.config.heads
    index = anchors.queries.clamp_min(0)
    sums = []
    for layer, partner in enumerate(states.router.partner):
        query = split_heads(pick(states.projected[layer], index), heads)
        query = F.normalize(query, dim=-1)
        target = states.router.standardise(partner, states.teacher[partner])
        key = F.normalize(split_heads(target, heads), dim=-1)

        logits = SHARPNESS * query @ key.mT  # [B, G, U, T]
        logits = logits.masked_fill(~is_visible[:, None], -1e9)
        log_attention = logits.log_softmax(-1)
        cross_entropy = -(share[:, None] * log_attention).sum(-1)
        loss = cross_entropy.mean(1) / log_visible
        sums.append(torch.where(anchors.attends, loss, 0).sum())
    return mean(sums)


def layer_loss(states: ComparedStates) -> Tensor:
    """Return the distance of the student's states from the gate's mixture of teacher layers, summed over anchors.

    The divergence of the mixture's weights from their prior is added, divided by the log of the number of layers.
    """
    router = states.router
    layers = len(states.teacher)
    targets = [states.target(layer) for layer in range(layers)]
    stacked_targets = torch.stack(targets)  # [M, A, H_T]

    sums = []
    for layer, projected in enumerate(states.projected):
        log_routing = router.log_routing(  # [A, M]
            layer,
            states.at_anchors[layer],
            text=states.anchors.text,
            texts=states.texts,
        )
        mixture = torch.einsum("am,mah->ah", log_routing.exp(), stacked_targets)
        mixture = layer_normalise(mixture)
        loss = state_distance(projected, mixture).sum()

        # With one layer there is nothing to choose, and its log is 0.
        if layers > 1:
            log_ratio = log_routing - router.log_prior[layer]
            divergence = (log_routing.exp() * log_ratio).sum()
            loss = loss + states.config.prior_weight * divergence / math.log(layers)
        sums.append(loss)
    return mean(sums)


def contrastive_loss(states: ComparedStates) -> Tensor:
    """Return the cross-entropy of telling which teacher state belongs to a span, summed over spans.

    InfoNCE (arXiv 1807.03748); the candidates are the spans in the batches of all processes. Divided by the log of
    their number.
    """
    anchors = states.anchors
    queries = [run_directions(rows, anchors) for rows in states.projected]
    keys = [run_directions(rows, anchors) for rows in states.partners]
    first, candidates = gather_keys(torch.stack(keys))  # [L, runs of all processes, H_T]
    if candidates.shape[1] < 2:
        return mean([query.sum() * 0 for query in queries])

    # Position of the right key of each span among the candidates.
    index = first + torch.arange(anchors.runs, device=candidates.device)
    sums = []
    for query, key, layer_candidates in zip(queries, keys, candidates, strict=True):
        # In float64, since TF32 rounds a state's cosine with itself to less than SAME_TEXT.
        cosine = key.double() @ layer_candidates.double().T
        is_copy = (cosine > SAME_TEXT).scatter(1, index[:, None], False)

        logits = query @ layer_candidates.T / states.config.contrastive_temperature
        logits = logits.masked_fill(is_copy, -torch.inf)
        negatives_and_own = (~is_copy).sum(1).clamp_min(2)
        log_candidates = negatives_and_own.to(logits).log()
        loss = F.cross_entropy(logits, index, reduction="none") / log_candidates
        sums.append(loss.sum())
    return mean(sums)


# ------------------------------------------------------------------------------------ the items of each


def count_anchors(anchors: Anchors) -> int:
    """Return A."""
    return len(anchors.student)


def count_related_texts(anchors: Anchors) -> int:
    """Return the number of texts with enough sampled anchors to compare their relations."""
    sampled = (anchors.sampled >= 0).sum(1)  # [D]
    return int((sampled >= LEAST_RELATED).sum())


def count_attending(anchors: Anchors) -> int:
    """Return the number of sampled anchors that have something to attend to."""
    return int(anchors.attends.sum())


def count_runs(anchors: Anchors) -> int:
    """Return R."""
    return anchors.runs


# ------------------------------------------------------------------------------------------- the table


class HiddenStateTerm(NamedTuple):
    """A term of the curriculum that is computed from hidden states."""

    loss: Callable[[ComparedStates], Tensor]
    """Sum of the term over its items in a batch (a scalar); a 0 with a gradient of 0 where it has none."""
    count: Callable[[Anchors], int]
    """Number of these items, read from anchors in the host's memory."""
    couples_windows: bool = False
    """The term compares the windows of a batch with one another, so that the size of a micro-batch matters."""


# In the order of computation, which fixes the order in which gradients of a state are summed: rel stays the first.
HIDDEN_STATE_TERMS = {
    "rel": HiddenStateTerm(
        loss=relation_loss,
        count=count_related_texts,
    ),
    "feat": HiddenStateTerm(
        loss=feature_loss,
        count=count_anchors,
    ),
    "attn": HiddenStateTerm(
        loss=attention_loss,
        count=count_attending,
    ),
    "layer": HiddenStateTerm(
        loss=layer_loss,
        count=count_anchors,
    ),
    "contr": HiddenStateTerm(
        loss=contrastive_loss,
        count=count_runs,
        couples_windows=True,
    ),
}


def count_items(anchors: Anchors) -> dict[str, int]:
    """Return the items of every term in a batch whose anchors are in the host's memory."""
    counts = {}
    for name, term in HIDDEN_STATE_TERMS.items():
        counts[name] = term.count(anchors)
    return counts


# ---------------------------------------------------------------------------------- what the losses share


def layer_normalise(states: Tensor) -> Tensor:
    """Return states with mean 0 and variance 1 over their channels."""
    return F.layer_norm(states, states.shape[-1:])


def state_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return half the mean squared distance of layer-normalised states, which is 1 - their correlation."""
    return (a - b).square().mean(-1) / 2


def masked_correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Return Pearson's correlation over the masked entries of the last dimension; 0 where one side does not vary."""
    count = mask.sum(-1, keepdim=True).clamp_min(1)
    a = _centred(a, mask, count)
    b = _centred(b, mask, count)
    squared_scale = a.square().sum(-1) * b.square().sum(-1)
    scale = squared_scale.clamp_min(1e-12).sqrt()
    return (a * b).sum(-1) / scale


def _centred(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Take off the mean over the masked entries; the other entries become 0."""
    mean_value = (values * mask).sum(-1, keepdim=True) / count
    return torch.where(mask, values - mean_value, 0)


def centred_cosines(states: Tensor, is_anchor: Tensor, heads: int) -> Tensor:
    """Return [D, G, P] cosines between the [D, Q, H] states of each text, their mean taken off.

    All states of a model lie in one direction, more or less; their mean would be all that the cosines tell.
    """
    states = states * is_anchor[..., None]
    count = is_anchor.sum(1).clamp_min(1)
    states = states - states.sum(1, keepdim=True) / count[:, None, None]

    parts = states.unflatten(-1, (heads, -1))
    directions = F.normalize(parts, dim=-1).transpose(1, 2)
    return (directions @ directions.mT).flatten(2)


def split_heads(states: Tensor, heads: int) -> Tensor:
    """Return [B, items, H] states as [B, G, items, H / G]."""
    parts = states.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2)


def at_positions(states: Tensor, positions: Tensor) -> Tensor:
    """Return [..., H] the states [B, S, H] at flat positions [...]."""
    return states.flatten(0, 1)[positions]


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Return rows[index]; where there is no row at all a differentiable 0, which a mask takes out later."""
    if len(rows):
        return rows[index]
    shape = [*index.shape, *rows.shape[1:]]
    return rows.new_zeros(shape) + rows.sum()


def group_means(states: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return [groups, H] the mean of the states [A, H] of each group [A]; 0 for an empty one."""
    width = states.shape[1]
    ones = states.new_ones(len(states))
    sums = states.new_zeros(groups, width).index_add(0, group, states)
    sizes = states.new_zeros(groups).index_add(0, group, ones)
    return sums / sizes.clamp_min(1)[:, None]


def run_directions(states: Tensor, anchors: Anchors) -> Tensor:
    """Return [R, H] the direction of the mean state of each run of anchors."""
    means = group_means(states, anchors.run, anchors.runs)
    return F.normalize(means, dim=-1)


def mean(values: list[Tensor]) -> Tensor:
    """Return the mean of scalars."""
    return torch.stack(values).mean()


def gather_keys(keys: Tensor) -> tuple[int, Tensor]:
    """Return the index of this process's first key, and [L, R of all processes, H_T] the keys of all.

    The keys are the teacher's, so that no gradient has to pass between processes.
    """
    is_distributed = dist.is_available() and dist.is_initialized()
    if not is_distributed or dist.get_world_size() == 1:
        return 0, keys

    # The processes have different numbers of keys, and all_gather wants equal shapes: pad to the most.
    processes = dist.get_world_size()
    count = torch.tensor([keys.shape[1]], device=keys.device)
    gathered_counts = [torch.zeros_like(count) for _ in range(processes)]
    dist.all_gather(gathered_counts, count)
    counts = [int(number) for number in gathered_counts]
    padding = max(counts) - keys.shape[1]
    padded = F.pad(keys, (0, 0, 0, padding)).contiguous()

    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    without_padding = [part[:, :length] for part, length in zip(parts, counts, strict=True)]
    first = sum(counts[: dist.get_rank()])
    return first, torch.cat(without_padding, 1)
