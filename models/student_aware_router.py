"""StudentAwareRouter: losses on hidden states, at places where both models have read the same bytes.

A student layer is compared with the teacher layer at the same relative depth (`feat`, `rel`, `attn`, `contr`), or
with a mixture of teacher layers chosen by a gate that sees the student's own state (`layer`). Every term is about 1
for unrelated states, whatever the batch, the lengths, the widths and the depths.

The teacher's states are standardised per channel, with the statistics of some windows seen before training (a few
channels are huge), and layer-normalised; the student's are projected up to the teacher's width and
layer-normalised. The target is fixed: nothing that is trained can make it trivial.

Shapes: L student layers, M teacher layers, B windows, S and T positions, A anchors, Q sampled anchors of a window,
R runs of anchors, H_S and H_T widths, G heads.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .config import RouterConfig
from .types import LEAST_RELATED, Anchors
from .validation import expect, expect_count

ROUTER_TERMS = ("feat", "rel", "attn", "layer", "contr")
"""Terms that come from hidden states."""
SHARPNESS = 8.0
"""attn: factor of the cosine between a query and a key."""
SAME_TEXT = 0.9999
"""contr: teacher states at least this similar belong to the same text, and are no negatives of each other."""
RIDGE = 1e-2
"""Penalty of the first projections, relative to the mean variance of the student's channels."""


def _shape(what: str, shape: Any) -> tuple[int, int]:
    """Return (layers, width) of a model, both at least 1."""
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        value = f"a {type(shape).__name__}" if isinstance(shape, nn.Module) else repr(shape)
        raise TypeError(f"{what}: got {value}, expected (layers, width) of a model")
    layers, width = (expect_count(f"{what}[{place}]", number, 1) for place, number in enumerate(shape))
    return layers, width


class StudentAwareRouter(nn.Module):
    """Compares hidden states of student and teacher.

    Args:
        config: what is compared, and how.
        student_shape: (layers, width) of the student.
        teacher_shape: (layers, width) of the teacher.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a shape that is none, or a width that is not a multiple of the heads.
    """

    def __init__(self, config: RouterConfig, student_shape: tuple[int, int], teacher_shape: tuple[int, int]) -> None:
        super().__init__()
        expect("config", config, RouterConfig, "a RouterConfig")
        depth_s, width_s = _shape("student_shape", student_shape)
        depth_t, width_t = _shape("teacher_shape", teacher_shape)
        config.check_widths(width_s, width_t)
        self.config = config
        self.student_layers = _spread(depth_s, config.layers)
        """Student layers that are compared, counted from 1."""
        self.teacher_layers = _spread(depth_t, config.teacher_layers)
        """Teacher layers that are compared, counted from 1."""
        depth = torch.tensor(self.student_layers)[:, None] / depth_s
        away = torch.tensor(self.teacher_layers)[None] / depth_t - depth
        self.partner = away.abs().argmin(1).tolist()
        """For each student layer, the index of the teacher layer at the same relative depth."""
        layers = (len(self.student_layers), len(self.teacher_layers))
        self.projection = nn.Parameter(torch.randn(layers[0], width_t, width_s) / math.sqrt(width_s))
        self.offset = nn.Parameter(torch.zeros(layers[0], width_t))
        self.gate = nn.Parameter(torch.zeros(*layers, width_s))  # zero: routing starts at the prior
        self.register_buffer("log_prior", (-((away / config.prior_width) ** 2) / 2).log_softmax(1))
        self.register_buffer("mean", torch.zeros(layers[1], width_t))
        self.register_buffer("scale", torch.ones(layers[1], width_t))
        self.is_calibrated = False
        """Whether the teacher's statistics are there: `calibrate` took them, or they were loaded."""
        self.register_load_state_dict_post_hook(_trust_loaded_statistics)

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], anchors: Anchors, terms: set[str]
    ) -> dict[str, Tensor]:
        """Sums of some terms over the items that `PairedBatch.counts` counts; 0, with a gradient of 0, without any.

        Args:
            student: [B, S, H_S] states after `student_layers`, any float dtype.
            teacher: [B, T, H_T] states after `teacher_layers`, on the same device.
            anchors: `PairedBatch.anchors`.
            terms: which of `ROUTER_TERMS`.
        """
        with torch.autocast(student[0].device.type, enabled=False):
            student = [_full(x) for x in student]
            teacher = [x.to(student[0].dtype) for x in teacher]  # one dtype, the student's
            sums = {"rel": self._relations(student, teacher, anchors)} if "rel" in terms else {}
            if terms - {"rel"}:
                own = [x.flatten(0, 1)[anchors.student] for x in student]  # L x [A, H_S]
                projected = [self._project(layer, x) for layer, x in enumerate(own)]  # L x [A, H_T]
                wanted = range(len(teacher)) if "layer" in terms else sorted({*self.partner})
                targets = {m: self._target(m, teacher[m].flatten(0, 1)[anchors.teacher]) for m in wanted}
                partners = [targets[m] for m in self.partner]
                if "feat" in terms:
                    sums["feat"] = _mean([_distance(p, t).sum() for p, t in zip(projected, partners, strict=True)])
                if "attn" in terms:
                    sums["attn"] = self._attention(projected, teacher, anchors)
                if "layer" in terms:
                    sums["layer"] = self._layer_mix(own, projected, targets, anchors, len(student[0]))
                if "contr" in terms:
                    sums["contr"] = self._contrast(projected, partners, anchors)
        return sums

    # --- the terms ----------------------------------------------------------------------------------------------------

    def _relations(self, student: list[Tensor], teacher: list[Tensor], anchors: Anchors) -> Tensor:
        """1 - correlation of the cosines between the anchors of a window (after MiniLMv2, arXiv 2012.15828)."""
        held = anchors.sampled >= 0  # [B, Q]
        at = anchors.sampled.clamp_min(0)
        pairs = (held[:, :, None] & held[:, None]).tril(-1).flatten(1)
        enough = held.sum(1) >= LEAST_RELATED
        sums = []
        for layer, partner in enumerate(self.partner):
            sides = ((student[layer], anchors.student), (teacher[partner], anchors.teacher))
            cosines = (self._cosines(x.flatten(0, 1)[_pick(rows, at)], held) for x, rows in sides)
            r = _correlation(*cosines, pairs[:, None])  # [B, G]
            sums.append(torch.where(enough, (1 - r).mean(1), 0).sum())
        return _mean(sums)

    def _cosines(self, states: Tensor, held: Tensor) -> Tensor:
        """[B, G, Q * Q] cosines between the [B, Q, H] states of a window, their mean taken off."""
        states = states * held[..., None]
        states = states - states.sum(1, keepdim=True) / held.sum(1).clamp_min(1)[:, None, None]
        split = F.normalize(states.unflatten(-1, (self.config.heads, -1)), dim=-1).transpose(1, 2)
        return (split @ split.mT).flatten(2)

    def _attention(self, projected: list[Tensor], teacher: list[Tensor], anchors: Anchors) -> Tensor:
        """Cross-entropy of the student's attention over teacher states with the bytes that its last token covers.

        A key is visible if it ends where the query ends or before, in bytes; that is the causal mask across
        tokenizers. Divided by the log of the number of visible keys.
        """
        (q_start, q_end), (k_start, k_end) = anchors.query_bytes.unbind(-1), anchors.key_bytes.unbind(-1)
        seen = k_end[:, None] <= q_end[..., None]  # [B, Q, T]
        seen[..., 0] = False  # the first position, as everywhere
        overlap = torch.minimum(k_end[:, None], q_end[..., None]) - torch.maximum(k_start[:, None], q_start[..., None])
        share = (overlap.clamp_min(0) * seen).to(projected[0])
        share = share / share.sum(-1, keepdim=True).clamp_min(1)
        size = seen.sum(-1).clamp_min(2).to(share).log()
        heads, at = self.config.heads, anchors.sampled.clamp_min(0)
        sums = []
        for layer, partner in enumerate(self.partner):
            query = _pick(projected[layer], at).unflatten(-1, (heads, -1)).transpose(1, 2)
            key = self._target(partner, teacher[partner]).unflatten(-1, (heads, -1)).transpose(1, 2)
            logits = SHARPNESS * F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT  # [B, G, Q, T]
            log_attention = logits.masked_fill(~seen[:, None], -1e9).log_softmax(-1)
            loss = -(share[:, None] * log_attention).sum(-1).mean(1) / size
            sums.append(torch.where(anchors.attends, loss, 0).sum())
        return _mean(sums)

    def _layer_mix(
        self, own: list[Tensor], projected: list[Tensor], targets: dict[int, Tensor], anchors: Anchors, windows: int
    ) -> Tensor:
        """Distance from the routed mixture of teacher layers, and the routing's divergence from its prior."""
        stacked = torch.stack([targets[m] for m in sorted(targets)])  # [M, A, H_T]
        sums = []
        for layer, states in enumerate(own):
            log_routing = self._log_routing(layer, states, anchors.window, windows)  # [A, M]
            mixture = _norm(torch.einsum("am,mah->ah", log_routing.exp(), stacked))
            loss = _distance(projected[layer], mixture).sum()
            if len(stacked) > 1:
                away = (log_routing.exp() * (log_routing - self.log_prior[layer])).sum()
                loss = loss + self.config.prior_weight * away / math.log(len(stacked))
            sums.append(loss)
        return _mean(sums)

    def _contrast(self, projected: list[Tensor], partners: list[Tensor], anchors: Anchors) -> Tensor:
        """InfoNCE (arXiv 1807.03748): which teacher span belongs to the student's, among those of all processes."""
        queries = [_pool(x, anchors.run, anchors.runs) for x in projected]
        keys = [_pool(x, anchors.run, anchors.runs) for x in partners]
        first, everyone = _gathered(torch.stack(keys))  # [L, all runs, H_T]
        candidates = everyone.shape[1]
        if candidates < 2:
            return _mean([q.sum() * 0 for q in queries])
        sums = []
        index = first + torch.arange(anchors.runs, device=everyone.device)
        for query, key, all_keys in zip(queries, keys, everyone, strict=True):
            # float64: TF32 rounds a state's cosine with itself to less than SAME_TEXT
            cosine = key.double() @ all_keys.double().T
            same = (cosine > SAME_TEXT).scatter(1, index[:, None], False)
            logits = (query @ all_keys.T / self.config.contrastive_temperature).masked_fill(same, -torch.inf)
            size = (~same).sum(1).clamp_min(2).to(logits).log()
            sums.append((F.cross_entropy(logits, index, reduction="none") / size).sum())
        return _mean(sums)

    # --- what they share ----------------------------------------------------------------------------------------------

    def _project(self, layer: int, states: Tensor) -> Tensor:
        return _norm(F.linear(states, self.projection[layer].to(states), self.offset[layer].to(states)))

    def _target(self, layer: int, states: Tensor) -> Tensor:
        return _norm((states - self.mean[layer].to(states)) / self.scale[layer].to(states))

    def _log_routing(self, layer: int, states: Tensor, window: Tensor, windows: int) -> Tensor:
        """[A, M] log-probabilities of the teacher's layers. The gate looks; it does not teach the student."""
        seen = _norm(states.detach())
        gate, prior = self.gate[layer].to(seen), self.log_prior[layer].to(seen)
        if self.config.gate == "position":
            return (F.linear(seen, gate) + prior).log_softmax(1)
        return (F.linear(_means(seen, window, windows), gate) + prior).log_softmax(1)[window]

    @torch.no_grad()
    def routing(self, student: Sequence[Tensor], anchors: Anchors) -> Tensor:
        """[L, M] mean routing over the anchors of a batch; the prior where there are none."""
        if not len(anchors.student):
            return self.log_prior.exp()
        windows = len(student[0])
        own = [_full(x).flatten(0, 1)[anchors.student] for x in student]
        return torch.stack([self._log_routing(n, x, anchors.window, windows).exp().mean(0) for n, x in enumerate(own)])

    @torch.no_grad()
    def calibrate(self, batches: Sequence[tuple[Sequence[Tensor], Sequence[Tensor], Anchors]]) -> None:
        """Take the teacher's statistics, and fit the projections (`initial: ridge`), on (student, teacher, anchors).

        Raises:
            ValueError: if the batches have no anchors, or the teacher's states are not finite.
        """
        if not sum(len(anchors.student) for _, _, anchors in batches):
            raise ValueError(
                "the router found no place where student and teacher have read the same bytes, in "
                f"{sum(len(s[0]) for s, _, _ in batches)} windows; set the weights of {', '.join(ROUTER_TERMS)} to 0"
            )
        self.is_calibrated = True
        for m in range(len(self.teacher_layers)):
            states = torch.cat([_full(t[m]).flatten(0, 1)[a.teacher] for _, t, a in batches])
            self.mean[m], spread = states.mean(0), states.std(0, correction=0)
            # a channel that never changes says nothing and must not be blown up
            self.scale[m] = spread.clamp_min(1e-3 * spread.mean().clamp_min(1e-6))
            if not self.scale[m].isfinite().all():
                raise ValueError(
                    f"the teacher's states after layer {self.teacher_layers[m]} are not finite: it overflows in half "
                    "precision; load it in float32 (--set teacher.dtype=float32)"
                )
        if self.config.initial == "ridge":
            for n, m in enumerate(self.partner):
                own = torch.cat([_full(s[n]).flatten(0, 1)[a.student] for s, _, a in batches])
                target = torch.cat([self._target(m, _full(t[m]).flatten(0, 1)[a.teacher]) for _, t, a in batches])
                weight, offset = _ridge(own, target)
                self.projection[n], self.offset[n] = weight.to(self.projection), offset.to(self.offset)


def _trust_loaded_statistics(router: StudentAwareRouter, incompatible: Any) -> None:
    """Take a router whose state was loaded for calibrated, as its state was when it was saved."""
    router.is_calibrated = True


def _spread(depth: int, count: int) -> list[int]:
    """At most `count` of the layers 1 .. depth, spread evenly, the last among them."""
    count = min(count, depth)
    return [round((i + 1) * depth / count) for i in range(count)]


def _full(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Half the mean squared distance of layer-normalised states: 1 - their correlation."""
    return (a - b).square().mean(-1) / 2


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _pick(rows: Tensor, at: Tensor) -> Tensor:
    """rows[at], also where there is no row: then a differentiable 0, which a mask takes out."""
    return rows[at] if len(rows) else rows.new_zeros(*at.shape, *rows.shape[1:]) + rows.sum()


def _means(states: Tensor, group: Tensor, groups: int) -> Tensor:
    """[groups, H] mean of the states of each group; 0 for an empty one."""
    sums = states.new_zeros(groups, states.shape[1]).index_add(0, group, states)
    sizes = states.new_zeros(groups).index_add(0, group, states.new_ones(len(states)))
    return sums / sizes.clamp_min(1)[:, None]


def _pool(states: Tensor, run: Tensor, runs: int) -> Tensor:
    """[R, H] direction of the mean state of each run."""
    return F.normalize(_means(states, run, runs), dim=-1)


def _correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Pearson correlation over the masked entries of the last dimension; 0 where one side does not vary."""
    count = mask.sum(-1, keepdim=True).clamp_min(1)
    a, b = (torch.where(mask, x - (x * mask).sum(-1, keepdim=True) / count, 0) for x in (a, b))
    scale = (a.square().sum(-1) * b.square().sum(-1)).clamp_min(1e-12).sqrt()
    return (a * b).sum(-1) / scale


def _ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [H_T, H_S], offset [H_T]) of the ridge regression of y [A, H_T] on x [A, H_S]."""
    x, y = x.double().cpu(), y.double().cpu()
    at_x, at_y = x.mean(0), y.mean(0)
    x, y = x - at_x, y - at_y
    covariance = x.T @ x / len(x)
    penalty = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
    weight = torch.linalg.solve(covariance + penalty * torch.eye(len(covariance), dtype=x.dtype), x.T @ y / len(x)).T
    return weight, at_y - weight @ at_x


def _gathered(keys: Tensor) -> tuple[int, Tensor]:
    """(index of this process's first key, [L, keys of all processes, H]); the teacher's keys need no gradient."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return 0, keys
    sizes = [torch.zeros(1, dtype=torch.int64, device=keys.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([keys.shape[1]], device=keys.device))
    counts = [int(size) for size in sizes]
    padded = F.pad(keys, (0, 0, 0, max(counts) - keys.shape[1])).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    kept = [part[:, :count] for part, count in zip(parts, counts, strict=True)]
    return sum(counts[: dist.get_rank()]), torch.cat(kept, 1)
