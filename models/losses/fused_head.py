"""The student's head and its losses, chunk by chunk: the logits of all positions never exist together.

Shapes: n supervised positions, N KD rows (each at one of these positions), H student width, V student vocabulary,
K kept outcomes, c rows of one chunk.

How one chunk [c, V] serves everything. The softmax over V, with all tokens that the target does not name merged into
one outcome, is the softmax over K + 1 logits: those of the named tokens and the log-sum-exp of all others. So
`losses.kd_loss` on [c, K + 1] is the KD of the chunk, for every divergence, tail and temperature, and autograd
differentiates only that. On [c, V] there remains: logits -> exponentials -> gradient, in one buffer, in place; then the
two products with which a linear layer goes backward. A gradient at the merged logit is shared among its tokens in
proportion to their exponentials, hence a row of the gradient is one number times the row of exponentials, but for the
label and the named tokens.

A plain linear head can have this elementwise work compiled (`head_passes`): same values up to float32's rounding.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..language_model import HALF_BLOCK, has_float32_products, is_plain_linear, linear_into
from ..types import SparseTarget
from . import head_passes
from .chunk_size import chunk_rows
from .losses import PADDING, kd_loss

HALF_SCALE = 16.0
"""Factor on a gradient that is rounded to half precision: 1 / 151,936 is then a normal number of float16. A power of
two, so that it rounds nothing itself."""
SPARE = 8
"""Columns behind a block of a half-precision gradient: one that nothing reads, and seven that keep rows aligned."""
STEEPEST = 1e34
"""Most of a row's slope, and its inverse the least: what is divided by it, or a state times it, is then a normal number
of float32. It is met where a student gives less than 1e-34 to all tokens beyond the named ones."""


class HeadLosses(NamedTuple):
    """What the head's pass over the supervised positions says."""

    loss: Tensor
    """Scalar, the only output with a gradient: the weighted total."""
    lm_sum: Tensor
    """Scalar: sum of the next-token losses (nats)."""
    kd_sum: Tensor | None
    """Scalar: sum of the KD divergences (nats, times temperature squared); None without a target."""
    log_probs: Tensor
    """[n] log-probability of every label."""


def head_losses(
    states: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    lm_weight: float | Tensor,
    kd_weight: float | Tensor = 0.0,
    target: SparseTarget | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    compiled: bool = False,
    **options,
) -> HeadLosses:
    """LM and KD of supervised positions from the states that enter the head: loss = lm_weight * LM + kd_weight * KD.

    The values are those of `losses.next_token_loss` and `losses.kd_loss` on all logits, in float32 (float64 for a
    float64 head) whatever the head computes in. The gradient is computed here, in the same pass as the values, which is
    why the weights have to be known; `backward` only multiplies it by their magnitude and by what it is given, in
    float32. Only a backward that is repeated (`retain_graph`) computes it again. Nothing here waits for a GPU.

    A plain `nn.Linear` head (frozen, tied or biased) computes in autocast's dtype or its own; from half precision its
    gradients are still summed in float32. Any other head (LoRA, quantised, hooked) is called as a module on every
    chunk and differentiated by autograd: same values, same memory, somewhat slower.

    Args:
        states: [n, H] final hidden states at supervised positions.
        labels: [n] the token that each position predicts.
        lm_weight: weight / count of LM; [n] gives each position its own, for a term made of `log_probs`.
        kd_weight: weight / count of KD. A 0 that is a float, not a tensor, costs no gradient; without a target KD
            costs nothing.
        target: [N] what the teacher says; its invalid rows add nothing.
        rows: [N] position of each row of the target, each at most once; None: row i is at position i.
        scale: factor on the logits (Cohere; 1 / logits_scaling of Granite).
        softcap: cap * tanh(logits / cap), after scaling (Gemma 2).
        chunk: most rows of logits to hold at once; None: `chunk_rows`.
        compiled: do the elementwise work of a plain linear head in compiled passes (`head_passes.choose`); any other
            head does without.
        options: of `kd_loss`, needed with a target: temperature, kind, tail, skew.

    Raises:
        ValueError: for shapes that do not fit and a chunk under 1.
    """
    _check(states, labels, target, rows, chunk)
    linear = is_plain_linear(head)
    weight = getattr(head, "weight", None)
    params = [head.weight, head.bias] if linear else [p for p in head.parameters() if p.requires_grad]
    kind = states.device.type
    dtype = weight.dtype if weight is not None and weight.is_floating_point() else states.dtype
    autocast = torch.is_autocast_enabled(kind) and dtype != torch.float64
    compute = torch.get_autocast_dtype(kind) if autocast else dtype
    exact = torch.promote_types(compute, torch.float32)
    vocabulary = getattr(head, "out_features", None) or weight.shape[0]
    size = exact.itemsize * (2 if softcap else 1)
    if not linear and compute != exact:
        size += compute.itemsize
    chunk = chunk or chunk_rows(vocabulary, states.device, size)[0]

    has_kd = target is not None and len(target.ids) > 0
    job = _Job(
        head=None if linear else head,
        labels=labels,
        target=target if has_kd else None,
        index=_row_at(rows, len(labels)) if has_kd and rows is not None else None,
        lm_weight=_as_tensor(lm_weight, states, exact),
        kd_weight=_as_tensor(kd_weight, states, exact),
        learns_lm=isinstance(lm_weight, Tensor) or lm_weight != 0,
        learns_kd=has_kd and (isinstance(kd_weight, Tensor) or kd_weight != 0),
        options=options,
        scale=scale,
        softcap=softcap,
        rows=chunk,
        compiled=compiled and linear,
        cast=dtype,
        compute=compute,
        autocast=autocast,
        grad=torch.is_grad_enabled(),
    )
    loss, lm_sum, kd_sum, log_probs = _Fused.apply(job, states, *params)
    return HeadLosses(loss, lm_sum, None if target is None else kd_sum, log_probs)


def _check(states: Tensor, labels: Tensor, target: SparseTarget | None, rows: Tensor | None, chunk: int | None) -> None:
    if states.dim() != 2 or labels.shape != states.shape[:1]:
        raise ValueError(f"got states {tuple(states.shape)} and labels {tuple(labels.shape)}, expected [n, H] and [n]")
    placed = labels if rows is None else rows
    if target is not None and len(target.ids) != len(placed):
        raise ValueError(f"got a target of {len(target.ids)} rows for {len(placed)} positions; pass rows")
    if chunk is not None and chunk < 1:
        raise ValueError(f"got chunk {chunk}, expected at least 1")


def _as_tensor(weight: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    # filled where it is needed: a copy from the host would wait
    return weight.detach().to(dtype) if isinstance(weight, Tensor) else like.new_full((), weight, dtype=dtype)


def _row_at(rows: Tensor, positions: int) -> Tensor:
    """[n] row of the target at each position, or -1: a chunk finds its rows without asking the GPU how many."""
    return rows.new_full((positions,), -1).scatter_(0, rows, torch.arange(len(rows), device=rows.device))


@dataclass
class _Job:
    """All that is not differentiated."""

    head: nn.Module | None
    """None for a plain linear layer."""
    labels: Tensor
    target: SparseTarget | None
    index: Tensor | None
    lm_weight: Tensor
    kd_weight: Tensor
    learns_lm: bool
    learns_kd: bool
    options: dict
    scale: float
    softcap: float | None
    rows: int
    compiled: bool
    cast: torch.dtype
    compute: torch.dtype
    autocast: bool
    grad: bool

    @property
    def exact(self) -> torch.dtype:
        return torch.promote_types(self.compute, torch.float32)

    @property
    def boost(self) -> float:
        return 1.0 if self.compute == self.exact else HALF_SCALE

    def magnitude(self) -> Tensor:
        """The power of two above both weights: what is computed is a gradient of order 1, never one divided by a
        count, and dividing and multiplying by a power of two rounds nothing."""
        most = self.kd_weight.abs()
        if self.lm_weight.numel():
            most = torch.maximum(most, self.lm_weight.abs().amax())
        return torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent)

    def target_of(self, part: slice) -> SparseTarget | None:
        """The target at some positions; where there is no row it is invalid."""
        t = self.target
        if t is None:
            return None
        if self.index is None:
            return SparseTarget(t.ids[part], t.probs[part], t.tail[part], t.valid[part])
        row = self.index[part]
        at = row.clamp_min(0)
        return SparseTarget(t.ids[at], t.probs[at], t.tail[at], t.valid[at] & (row >= 0))

    def run(self, states: Tensor, params: tuple, needs: tuple) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """(log-probabilities [n], KD sum, gradients over magnitude * scale / boost); `needs`: which gradients."""
        with torch.autocast(states.device.type, enabled=False):
            head = (_Linear if self.head is None else _Module)(self, states, params, needs)
            log_probs = states.new_empty(len(states), dtype=self.exact)
            kd_sum = states.new_zeros((), dtype=self.exact)
            learns = any(needs) and (self.learns_lm or self.learns_kd)
            factor = self.boost / self.magnitude()
            lm_weight, kd_weight = (self.lm_weight * factor).expand(len(states)), self.kd_weight * factor
            for first in range(0, len(states), self.rows):
                part = slice(first, first + self.rows)
                logits = head.logits(part)
                if self.compiled:
                    weights = _ChunkWeights(lm_weight[part, None], kd_weight)
                    log_probs[part], kd = self._compiled_chunk(head, logits, part, weights, learns)
                    if kd is not None:
                        kd_sum += kd
                    continue
                capped = _adjust(logits, self.scale, self.softcap)
                log_probs[part], kd, slope = self._chunk(logits, part, lm_weight[part, None], kd_weight, learns)
                if kd is not None:
                    kd_sum += kd
                if learns:
                    if capped is not None:  # d tanh = 1 - tanh ** 2
                        logits.addcmul_(logits, capped.square_(), value=-1)
                    head.backward(part, logits, slope)
        return log_probs, kd_sum, head.gradients

    def _chunk(
        self, logits: Tensor, part: slice, lm_weight: Tensor, kd_weight: Tensor, learns: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(log-probabilities of the labels [c], KD sum, slope [c, 1]); the logits [c, V] are overwritten by their
        gradient over the slope of their row."""
        logits -= logits.amax(1, keepdim=True)
        label = self.labels[part, None]
        at_label = logits.gather(1, label)
        target = self.target_of(part)
        if target is None:
            total = logits.exp_().sum(1, keepdim=True)
            kd, slope = None, lm_weight / total
        else:
            columns, kept = _columns(target.ids)
            listed = torch.where(kept, logits.gather(1, columns), PADDING)
            # summed over what is left, not total - sum: exact also where the rest is tiny
            rest = logits.exp_().scatter_(1, columns, 0.0).sum(1, keepdim=True)
            masses = listed.exp()
            total = rest + masses.sum(1, keepdim=True)
            kd, at_kd = self._kd(torch.cat([listed, rest.log()], 1), target, kept, learns and self.learns_kd)
            slope, at_listed = lm_weight / total, masses * (lm_weight / total)
            if at_kd is not None:
                at_kd *= kd_weight
                silent = (lm_weight == 0) & (at_kd == 0).all(1, keepdim=True)
                slope = slope + at_kd[:, -1:] / rest.clamp_min(torch.finfo(rest.dtype).tiny)
                # bounded: the quotients below neither overflow nor vanish
                slope = slope.abs().clamp(1 / STEEPEST, STEEPEST).copysign(slope).masked_fill(silent, 0.0)
                at_listed = at_listed + at_kd[:, :-1]
        if learns:
            over = torch.where(slope == 0, 1.0, slope)
            if target is not None:
                logits.scatter_add_(1, columns, at_listed / over)
            logits.scatter_add_(1, label, -lm_weight / over)
        return (at_label - total.log())[:, 0], kd, slope

    def _compiled_chunk(
        self, head: "_Linear", logits: Tensor, part: slice, weights: "_ChunkWeights", learns: bool
    ) -> tuple[Tensor, Tensor | None]:
        """As `_chunk`, with the gradient's products: (log-probabilities of the labels [c], KD sum).

        The exponentials are never stored. So what `_chunk` adds to them at the label and at the named tokens is
        computed on its own here, in float32, and written over the gradient of all other tokens at the end.
        """
        rows = self._softmax_rows(logits, part)
        kd, at_kd = None, None
        if rows.named is not None:
            outcomes = torch.cat([rows.named_logits, rows.log_rest], 1)
            kd, at_kd = self._kd(outcomes, rows.named.target, rows.named.kept, learns and self.learns_kd)
        if learns:
            at_kd = None if at_kd is None else at_kd * weights.kd
            head.backward_passes(part, logits, rows.peak, self._gradient_of(rows, weights.lm, at_kd))

        label = head_passes.adjusted(rows.raw_label, self.scale, self.softcap)
        return (label - rows.shift - rows.total.log())[:, 0], kd

    def _softmax_rows(self, logits: Tensor, part: slice) -> "_SoftmaxRows":
        """Sum up the softmax of each row of raw logits, in which the named tokens are marked with -inf afterwards."""
        label = self.labels[part, None]
        raw_label = logits.gather(1, label)
        named = self._named(logits, part)

        # Peak and sum over the tokens that the target does not name. The others are few.
        if named is not None:
            logits.scatter_(1, named.columns, -torch.inf)
        peak, rest_total = head_passes.compiled().row_sums(logits, self.scale, self.softcap)

        # Where the target names every token there is no rest.
        no_rest = peak == -torch.inf
        peak = peak.masked_fill(no_rest, 0.0)
        rest_total = rest_total.masked_fill(no_rest, 1.0)
        log_rest = (peak + rest_total.log()).masked_fill(no_rest, -torch.inf)

        # From here on logits count from the largest of the row's K + 1 outcomes.
        shift = peak if named is None else torch.maximum(log_rest, named.values.amax(1, keepdim=True))
        log_rest = log_rest - shift
        total = log_rest.exp()
        named_logits = None
        if named is not None:
            named_logits = torch.where(named.kept, named.values - shift, PADDING)
            total = total + named_logits.exp().sum(1, keepdim=True)
        return _SoftmaxRows(label, raw_label, named, peak, rest_total, shift, log_rest, named_logits, total)

    def _gradient_of(self, rows: "_SoftmaxRows", lm_weight: Tensor, at_kd: Tensor | None) -> "_Gradient":
        """Return the gradient by the raw logits of a chunk, as a factor on the exponentials and what differs from it.

        Args:
            at_kd: [c, K + 1] the part of KD, by the logits of the named tokens and of all others merged.
        """
        # That of the rest is divided by its own sum, which is 1 or more: a rest of any smallness has its gradient.
        at_rest = lm_weight * rows.log_rest.exp() / rows.total
        if at_kd is not None:
            at_rest = at_rest + at_kd[:, -1:]
        slope = at_rest / rows.rest_total
        at_label = (head_passes.adjusted(rows.raw_label, self.scale, self.softcap) - rows.peak).exp() * slope

        named = rows.named
        if named is not None:
            at_named = lm_weight * rows.named_logits.exp() / rows.total
            if at_kd is not None:
                at_named = at_named + at_kd[:, :-1]
            is_label = named.kept & (named.columns == rows.label)
            at_named_label = (at_named * is_label).sum(1, keepdim=True)
            at_label = torch.where(is_label.any(1, keepdim=True), at_named_label, at_label)

        at_label = at_label - lm_weight
        cap_slope = head_passes.softcap_slope(rows.raw_label, self.scale, self.softcap)
        if cap_slope is not None:
            at_label = at_label * cap_slope
        if named is None:
            return _Gradient(slope, rows.label, at_label)

        if named.cap_slope is not None:
            at_named = at_named * named.cap_slope
        # a column that stands twice, as the label or as padding, has the same number at both places
        at_named = torch.where(is_label, at_label, at_named)
        at_named = torch.where(named.kept, at_named, at_named.gather(1, named.repeated))
        return _Gradient(slope, torch.cat([named.columns, rows.label], 1), torch.cat([at_named, at_label], 1))

    def _named(self, logits: Tensor, part: slice) -> "_Named | None":
        """Gather the tokens that the target of a chunk names; None without a target."""
        target = self.target_of(part)
        if target is None:
            return None
        columns, kept = _columns(target.ids)
        raw = logits.gather(1, columns)
        return _Named(
            target=target,
            columns=columns,
            kept=kept,
            repeated=torch.where(kept, columns, -1).argmax(1, keepdim=True).expand_as(columns),
            values=head_passes.adjusted(raw, self.scale, self.softcap),
            cap_slope=head_passes.softcap_slope(raw, self.scale, self.softcap),
        )

    def _kd(self, outcomes: Tensor, target: SparseTarget, kept: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
        """(KD sum, its gradient or None) from the logits [c, K + 1] of the named tokens and of all others merged."""
        ids = torch.where(kept, torch.arange(kept.shape[1], device=kept.device), -1)
        merged = SparseTarget(ids, target.probs, target.tail, target.valid)
        with torch.set_grad_enabled(learns):
            kd = kd_loss(outcomes.requires_grad_(learns), merged, **self.options)
            return kd.detach(), torch.autograd.grad(kd, outcomes)[0] if learns else None


class _ChunkWeights(NamedTuple):
    """Weights of the two losses on a chunk."""

    lm: Tensor
    """[c, 1]."""
    kd: Tensor
    """Scalar."""


class _Named(NamedTuple):
    """The tokens that the target of a chunk names."""

    target: SparseTarget
    columns: Tensor
    """[c, K] their ids; padding repeats the largest id of its row."""
    kept: Tensor
    """[c, K] which are not padding."""
    repeated: Tensor
    """[c, K] place in `columns` of the id that padding repeats."""
    values: Tensor
    """[c, K] their logits, scaled and soft-capped."""
    cap_slope: Tensor | None
    """[c, K] derivative of the soft-cap there."""


class _SoftmaxRows(NamedTuple):
    """The softmax of the rows of a chunk, summed up; "the rest" are the tokens that the target does not name."""

    label: Tensor
    """[c, 1]."""
    raw_label: Tensor
    """[c, 1] logit of the label, before scale and soft-cap."""
    named: _Named | None
    peak: Tensor
    """[c, 1] largest logit of the rest."""
    rest_total: Tensor
    """[c, 1] sum over the rest of exp(logit - peak)."""
    shift: Tensor
    """[c, 1] what is subtracted from all logits below, so that no exponential overflows."""
    log_rest: Tensor
    """[c, 1] log-sum-exp of the rest, shifted."""
    named_logits: Tensor | None
    """[c, K] logits of the named tokens, shifted."""
    total: Tensor
    """[c, 1] sum of all exponentials, shifted."""


class _Gradient(NamedTuple):
    """A gradient [c, V] by logits: slope * exponential, but for some columns of each row."""

    slope: Tensor
    """[c, 1]."""
    columns: Tensor
    """[c, m] what differs: the named tokens and the label; one that stands twice has equal values."""
    values: Tensor
    """[c, m]."""


def _columns(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(columns [c, K] of the named tokens, which of them are not padding); padding repeats a token of its row."""
    first = torch.arange(ids.shape[1], device=ids.device) == 0
    ids = torch.where(first & (ids.amax(1, keepdim=True) < 0), 0, ids)  # nothing but padding: any token
    kept = ids >= 0
    return torch.where(kept, ids, ids.amax(1, keepdim=True)), kept


def _adjust(logits: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Scale and soft-cap in place; returns the tanh, which the gradient needs."""
    if softcap:
        capped = torch.tanh_(logits * (scale / softcap))
        torch.mul(capped, softcap, out=logits)
        return capped
    if scale != 1:
        logits *= scale
    return None


class _Linear:
    """A plain linear layer, one chunk at a time, in one buffer."""

    def __init__(self, job: _Job, states: Tensor, params: tuple, needs: tuple) -> None:
        weight, bias = params
        self.job = job
        self.states, self.compute = states.detach(), job.compute
        self.weight = weight.detach().to(job.compute)
        self.bias = None if bias is None else bias.detach().to(job.compute)
        shape = min(job.rows, len(states)), len(weight)
        self.buffer = states.new_empty(shape, dtype=job.exact)
        self.is_half = job.compute != job.exact
        width = 0
        if self.is_half:
            width = min(HALF_BLOCK, shape[1]) + (SPARE if job.compiled else 0)
        self.rounded = states.new_empty((shape[0], width), dtype=job.compute)
        self.gradients = [
            torch.zeros_like(t, dtype=job.exact, memory_format=torch.contiguous_format) if need else None
            for t, need in zip((states, *params), needs, strict=True)
        ]

    def logits(self, part: slice) -> Tensor:
        x = self.states[part].to(self.compute)
        return linear_into(self.buffer[: len(x)], x, self.weight, self.bias)

    def backward(self, part: slice, gradient: Tensor, slope: Tensor) -> None:
        d_states, d_weight, d_bias = self.gradients
        x = self.states[part].to(self.compute)
        if d_bias is not None:
            d_bias.addmv_(gradient.t(), slope[:, 0])

        if not self.is_half:  # the rows' slopes go into the narrow factors: a pass over [c, V] less
            if d_states is not None:
                torch.mm(gradient, self.weight, out=d_states[part]).mul_(slope)
            if d_weight is not None:
                d_weight.addmm_(gradient.t(), x * slope)
            return

        # a block of tokens at a time: bounds the rounded gradient and the float32 products
        for block in self._blocks():
            rounded = self.rounded[: len(x), : len(self.weight[block])]
            self._multiply_half(part, block, torch.mul(gradient[:, block], slope, out=rounded))

    def backward_passes(self, part: slice, logits: Tensor, peak: Tensor, gradient: "_Gradient") -> None:
        """Add the products with a gradient that is written by compiled passes over raw logits [c, V]."""
        shape = (self.job.scale, self.job.softcap)
        write = head_passes.compiled().softmax_gradient
        if not self.is_half:
            write(logits, peak, gradient.slope, None, *shape)
            logits.scatter_(1, gradient.columns, gradient.values)
            self._multiply(part, logits)
            return

        values = gradient.values.to(self.compute)
        for block in self._blocks():
            width = len(self.weight[block])
            rounded = self.rounded[: len(logits), : width + SPARE]
            write(logits[:, block], peak, gradient.slope, rounded[:, :width], *shape)

            # what belongs to another block goes to a spare column: choosing would wait for the GPU
            column = gradient.columns - block.start
            column = torch.where((column >= 0) & (column < width), column, width)
            rounded = rounded.scatter_(1, column, values)[:, :width]
            self._multiply_half(part, block, rounded)
            if self.gradients[2] is not None:
                self.gradients[2][block] += rounded.sum(0, dtype=self.job.exact)

    def _blocks(self) -> list[slice]:
        starts = range(0, len(self.weight), HALF_BLOCK)
        return [slice(start, start + HALF_BLOCK) for start in starts]

    def _multiply(self, part: slice, gradient: Tensor) -> None:
        """Add the products with a gradient [c, V] in full precision."""
        d_states, d_weight, d_bias = self.gradients
        if d_states is not None:
            torch.mm(gradient, self.weight, out=d_states[part])
        if d_weight is not None:
            d_weight.addmm_(gradient.t(), self.states[part].to(self.compute))
        if d_bias is not None:
            d_bias += gradient.sum(0)

    def _multiply_half(self, part: slice, block: slice, rounded: Tensor) -> None:
        """Add the products with a half-precision gradient [c, block of V]."""
        d_states, d_weight, _ = self.gradients
        if d_states is not None:
            d_states[part] += _product(rounded, self.weight[block])
        if d_weight is not None:
            d_weight[block] += _product(rounded.t(), self.states[part].to(self.compute))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 from half-precision factors: a half-precision result could overflow, whatever the loss scale."""
    if has_float32_products(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


class _Module:
    """Any other head: called on a chunk and differentiated by autograd, the chunk's graph then dropped."""

    def __init__(self, job: _Job, states: Tensor, params: tuple, needs: tuple) -> None:
        self.job, self.states, self.needs = job, states.detach(), needs
        self.learned = [p for p, need in zip(params, needs[1:], strict=True) if need]
        self.gradients = [
            torch.zeros_like(t, dtype=job.exact) if need else None
            for t, need in zip((states, *params), needs, strict=True)
        ]

    def logits(self, part: slice) -> Tensor:
        job = self.job
        kind = self.states.device.type
        with torch.set_grad_enabled(any(self.needs)), torch.autocast(kind, job.compute, enabled=job.autocast):
            self.x = self.states[part].requires_grad_(self.needs[0])
            self.out = job.head(self.x.to(job.cast))
        return self.out.detach().to(job.exact, copy=True)

    def backward(self, part: slice, gradient: Tensor, slope: Tensor) -> None:
        gradient *= slope
        wanted = [self.x] * self.needs[0] + self.learned
        found = torch.autograd.grad(self.out, wanted, gradient.to(self.out.dtype), allow_unused=True)
        d_states, *sums = self.gradients
        sums = [d_states[part] for _ in wanted[: self.needs[0]]] + [g for g in sums if g is not None]
        for total, new in zip(sums, found, strict=True):
            if new is not None:
                total += new
        del self.x, self.out


class _Fused(torch.autograd.Function):
    """(loss, LM sum, KD sum, log-probabilities); inputs: the job, the states, the head's parameters."""

    @staticmethod
    def forward(ctx, job: _Job, states: Tensor, *params: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = tuple(need and job.grad for need in ctx.needs_input_grad[1:])
        log_probs, kd_sum, ctx.ready = job.run(states, params, needs)
        ctx.job, ctx.needs = job, needs
        ctx.save_for_backward(states, *params)
        lm_sum = -log_probs.sum()
        loss = -(job.lm_weight * log_probs).sum() + job.kd_weight * kd_sum
        ctx.mark_non_differentiable(lm_sum, kd_sum, log_probs)
        return loss, lm_sum, kd_sum, log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        states, *params = ctx.saved_tensors  # raises where the graph is gone
        job = ctx.job
        factor = grad * job.magnitude() * (job.scale / job.boost)
        if job.head is None:
            ready, ctx.ready = ctx.ready or job.run(states, tuple(params), ctx.needs)[2], None
            # given away, so they may be scaled in place: no second [V, H]
            scaled = [g if g is None else g.mul_(factor) for g in ready]
        else:  # kept: another run would draw another dropout
            scaled = [g if g is None else g * factor for g in ctx.ready]
        return None, *(g if g is None else g.to(t.dtype) for g, t in zip(scaled, (states, *params), strict=True))
