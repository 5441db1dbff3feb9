"""The student's head and its losses, chunk by chunk: the logits of all positions never exist together.

Shapes: n supervised positions, N KD rows (each at one of these positions), H student width, V student vocabulary,
K tokens that a target names in a row, c rows of one chunk.

How one chunk [c, V] serves everything. The softmax over V, with all tokens that the target does not name merged into
one outcome, is the softmax over K + 1 logits: those of the named tokens and the log-sum-exp of all others. So
`losses.kd_loss` on [c, K + 1] is the KD of the chunk, for every divergence, tail and temperature, and autograd
differentiates only that. On [c, V] there remains: logits -> exponentials -> gradient, in one buffer, in place; then the
two products with which a linear layer goes backward (`head_products`).

A gradient at the merged logit is shared among its tokens in proportion to their exponentials. Hence a row of the
gradient is one number, called its `slope` here, times the row of exponentials, but for the label and the named tokens.
The buffer holds the gradient over the slope, and the slope is multiplied into a narrow factor of the products.

A plain linear head can have this elementwise work compiled (`head_passes`, `head_softmax`): same values up to
float32's rounding.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..divergences import divergence_at
from ..language_model import is_plain_linear
from ..types import SparseTarget
from . import head_passes
from .chunk_size import chunk_rows
from .head_products import HeadPrecision, LinearHead, ModuleHead, precision_of
from .head_softmax import (
    ChunkWeights,
    Comparison,
    NamedTokens,
    chunk_gradient,
    columns_of,
    name_tokens,
    sum_softmax,
    target_of_outcomes,
)
from .losses import PADDING, kd_loss

STEEPEST = 1e34
"""Most of a row's slope, and its inverse the least: what is divided by it, or a state times it, is then a normal number
of float32. It is met where a student gives less than 1e-34 to all tokens beyond the named ones."""


@dataclass(frozen=True)
class HeadComputation:
    """The way in which a head's logits are made and held; the losses do not depend on the last two."""

    scale: float = 1.0
    """Factor on the logits (Cohere; 1 / logits_scaling of Granite)."""
    softcap: float | None = None
    """Bound of the logits: cap * tanh(logits / cap), after scaling (Gemma 2); None: no bound."""
    chunk: int | None = None
    """Most rows of logits to hold at once; None: `chunk_rows`."""
    compiled: bool = False
    """Do the elementwise work of a plain linear head in compiled passes (`head_passes.choose`); any other head does
    without."""


@dataclass(frozen=True)
class HeadTarget:
    """The teacher's distributions at some positions, and the divergence that compares the student with them."""

    distribution: SparseTarget
    """[N] distributions; invalid rows add nothing."""
    rows: Tensor | None
    """[N] position of each distribution, each at most once; None: row i is at position i."""
    temperature: float
    """Temperature of both sides; the divergence is multiplied by its square."""
    kind: str
    """Name of the divergence, a key of `DIVERGENCES`."""
    tail: str
    """Treatment of the tokens that a row does not name: "bucket" or "renormalise"."""
    skew: float
    """Share of the teacher in the mixture of skew_kl and generalised_jsd; other divergences do not read it."""
    interpolation: float | None = None
    """Share of the teacher in what is learned from; None: the teacher alone."""


class HeadLosses(NamedTuple):
    """The losses of the supervised positions."""

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
    target: HeadTarget | None = None,
    computation: HeadComputation = HeadComputation(),
) -> HeadLosses:
    """Compute LM and KD of supervised positions: loss = lm_weight * LM + kd_weight * KD.

    The values are those of `losses.next_token_loss` and `losses.kd_loss` on all logits, in float32 (float64 for a
    float64 head) whatever the head computes in. The gradient is computed here, in the same pass as the values, which is
    why the weights have to be known; `backward` only multiplies it by their magnitude and by what it is given, in
    float32. Only a backward that is repeated (`retain_graph`) computes it again. Nothing here waits for a GPU.

    A plain `nn.Linear` head (frozen, tied or biased) computes in autocast's dtype or its own; from half precision its
    gradients are still summed in float32. Any other head (LoRA, quantised, hooked) is called as a module on every
    chunk and differentiated by autograd: same values, same memory, somewhat slower.

    Args:
        states: [n, H] final hidden states at supervised positions.
        head: the layer that makes logits of them.
        labels: [n] the token that each position predicts.
        lm_weight: weight / count of LM; [n] gives each position its own, for a term made of `log_probs`.
        kd_weight: weight / count of KD. A 0 that is a float, not a tensor, costs no gradient.
        target: the teacher's distributions; without them KD costs nothing.
        computation: the way in which logits are made and held.

    Raises:
        ValueError: for shapes that do not fit and a chunk under 1.
    """
    _check(states, labels, target, computation.chunk)

    # Autograd wants every tensor as an argument, and knows of each whether it needs a gradient.
    if is_plain_linear(head):
        module = None
        params = [head.weight, head.bias]
    else:
        module = head
        params = [parameter for parameter in head.parameters() if parameter.requires_grad]

    precision = precision_of(head, states)
    rows_at_once = computation.chunk
    if rows_at_once is None:
        rows_at_once = _rows_that_fit(head, states.device, precision=precision, computation=computation)

    has_kd = target is not None and len(target.distribution.ids) > 0
    row_at = None
    if has_kd and target.rows is not None:
        row_at = _row_at_positions(target.rows, len(labels))

    head_pass = _HeadPass(
        module=module,
        labels=labels,
        target=target if has_kd else None,
        row_at=row_at,
        lm_weight=_as_tensor(lm_weight, states, precision.exact),
        kd_weight=_as_tensor(kd_weight, states, precision.exact),
        learns_lm=isinstance(lm_weight, Tensor) or lm_weight != 0,
        learns_kd=has_kd and (isinstance(kd_weight, Tensor) or kd_weight != 0),
        computation=computation,
        rows_at_once=rows_at_once,
        precision=precision,
        grad_enabled=torch.is_grad_enabled(),
    )
    loss, lm_sum, kd_sum, log_probs = _FusedHead.apply(head_pass, states, *params)

    # A target without rows has a sum of 0, no target has none.
    if target is None:
        kd_sum = None
    return HeadLosses(loss, lm_sum, kd_sum, log_probs)


def _check(
    states: Tensor,
    labels: Tensor,
    target: HeadTarget | None,
    chunk: int | None,
) -> None:
    """Raise a ValueError for shapes that do not fit one another, and for a chunk without rows."""
    if states.dim() != 2 or labels.shape != states.shape[:1]:
        raise ValueError(f"got states {tuple(states.shape)} and labels {tuple(labels.shape)}, expected [n, H] and [n]")

    if target is not None:
        distributions = len(target.distribution.ids)
        positions = len(labels) if target.rows is None else len(target.rows)
        if distributions != positions:
            raise ValueError(f"got a target of {distributions} rows for {positions} positions; pass rows")

    if chunk is not None and chunk < 1:
        raise ValueError(f"got chunk {chunk}, expected at least 1")


def _rows_that_fit(
    head: nn.Module,
    device: torch.device,
    precision: HeadPrecision,
    computation: HeadComputation,
) -> int:
    """Return the number of logit rows to hold at once, from the bytes that a logit takes in this computation."""
    bytes_per_logit = precision.exact.itemsize
    is_compiled = computation.compiled and is_plain_linear(head)
    if computation.softcap and not is_compiled:
        bytes_per_logit *= 2

    # A head that is called holds its logits beside their copy, a compiled pass writes a rounded gradient.
    if precision.is_half and (is_compiled or not is_plain_linear(head)):
        bytes_per_logit += precision.products.itemsize

    vocabulary = getattr(head, "out_features", None) or head.weight.shape[0]
    rows, _ = chunk_rows(vocabulary, device, bytes_per_logit, is_half=precision.is_half)
    return rows


def _as_tensor(weight: float | Tensor, states: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight as a tensor on the device of the states."""
    if isinstance(weight, Tensor):
        return weight.detach().to(dtype)
    # Filled where it is needed: a copy from the host would wait for the device.
    return states.new_full((), weight, dtype=dtype)


def _row_at_positions(rows: Tensor, positions: int) -> Tensor:
    """Return [n] the row of the target at each position, or -1.

    A chunk finds its rows in it without asking the GPU how many there are.
    """
    row_at = rows.new_full((positions,), -1)
    numbers = torch.arange(len(rows), device=rows.device)
    return row_at.scatter_(0, rows, numbers)


class _ChunkLosses(NamedTuple):
    """The losses of a chunk."""

    log_probs: Tensor
    """[c] log-probability of every label."""
    kd_sum: Tensor | None
    """Scalar: sum of the KD divergences; None without a target."""


class _ChunkSoftmax(NamedTuple):
    """The softmax of a chunk, whose logits [c, V] were overwritten by a gradient over the slope of its row."""

    total: Tensor
    """[c, 1] sum of the exponentials, counted from the row's largest logit."""
    slope: Tensor
    """[c, 1] gradient of the loss by each exponential of a token that the target does not name."""
    kd_sum: Tensor | None
    """Scalar: sum of the KD divergences; None without a target."""


class _PassResult(NamedTuple):
    """All that a pass over the positions computes."""

    log_probs: Tensor
    """[n] log-probability of every label."""
    kd_sum: Tensor
    """Scalar: sum of the KD divergences; 0 without a target."""
    gradients: list[Tensor | None]
    """Gradients by the states and by each parameter, over magnitude * scale / boost; None where none is needed."""


@dataclass(frozen=True)
class _HeadPass:
    """One pass of a head over the supervised positions: all of its inputs that are not differentiated."""

    module: nn.Module | None
    """A head that is called; None for a plain linear layer."""
    labels: Tensor
    """[n]."""
    target: HeadTarget | None
    """None also for a target without rows."""
    row_at: Tensor | None
    """[n] row of the target at each position, or -1; None: row i is at position i."""
    lm_weight: Tensor
    """Scalar or [n]."""
    kd_weight: Tensor
    """Scalar."""
    learns_lm: bool
    """A gradient of LM is needed."""
    learns_kd: bool
    """A gradient of KD is needed."""
    computation: HeadComputation
    """Scale, soft-cap, and the choice of compiled passes."""
    rows_at_once: int
    """Most rows of a chunk."""
    precision: HeadPrecision
    """Dtypes of products and sums."""
    grad_enabled: bool
    """Gradients were enabled where the pass was asked for; inside an autograd function they never are."""

    def run(self, states: Tensor, params: Sequence[Tensor | None], needs: Sequence[bool]) -> _PassResult:
        """Compute values, and the gradients that are needed by the states and each parameter."""
        exact = self.precision.exact
        log_probs = states.new_empty(len(states), dtype=exact)
        kd_sum = states.new_zeros((), dtype=exact)
        learns = any(needs) and (self.learns_lm or self.learns_kd)

        # Gradients are computed with weights of order 1 (see `magnitude`), and boosted where they are rounded.
        factor = self.precision.boost / self.magnitude
        lm_weight = (self.lm_weight * factor).expand(len(states))
        kd_weight = self.kd_weight * factor

        # All dtypes were chosen before; autocast would choose those of the products anew.
        with torch.autocast(states.device.type, enabled=False):
            head = self._chunked_head(states, params, needs)
            compute_chunk: Callable[..., Any] = self._compiled_chunk if self._is_compiled else self._eager_chunk
            for first in range(0, len(states), self.rows_at_once):
                part = slice(first, first + self.rows_at_once)
                weights = ChunkWeights(lm=lm_weight[part, None], kd=kd_weight)
                chunk = compute_chunk(head, part, weights, learns)

                log_probs[part] = chunk.log_probs
                if chunk.kd_sum is not None:
                    kd_sum += chunk.kd_sum

        return _PassResult(log_probs, kd_sum, head.gradients)

    @property
    def _is_compiled(self) -> bool:
        """Return True where the elementwise work goes through compiled passes."""
        return self.computation.compiled and self.module is None

    def _chunked_head(
        self, states: Tensor, params: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> LinearHead | ModuleHead:
        """Return the head with memory for its chunks and gradients."""
        if self.module is not None:
            return ModuleHead(self.module, states, params=params, needs=needs, precision=self.precision)
        return LinearHead(
            states,
            params,
            needs=needs,
            precision=self.precision,
            rows=self.rows_at_once,
            compiled=self._is_compiled,
        )

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """Return the power of two above both weights; computed once for forward and backward.

        What is computed is then a gradient of order 1, never one divided by a count, and dividing and multiplying by a
        power of two rounds nothing.
        """
        # Without positions there is no largest weight of LM.
        largest = self.kd_weight.abs()
        if self.lm_weight.numel():
            largest = torch.maximum(largest, self.lm_weight.abs().amax())

        # frexp writes a number as m * 2 ** exponent with m in [0.5, 1).
        exponent = torch.frexp(largest).exponent
        return torch.ldexp(torch.ones_like(largest), exponent)

    def _target_at(self, part: slice) -> SparseTarget | None:
        """Return the target of some positions."""
        if self.target is None:
            return None

        whole = self.target.distribution
        if self.row_at is None:
            return whole.rows(part)

        # A position without a row takes the first one, marked as invalid.
        row = self.row_at[part]
        has_row = row >= 0
        target = whole.rows(row.clamp_min(0))
        return replace(target, valid=target.valid & has_row)

    def _eager_chunk(
        self,
        head: LinearHead | ModuleHead,
        part: slice,
        weights: ChunkWeights,
        learns: bool,
    ) -> _ChunkLosses:
        """Compute the losses of a chunk, and add its gradients to those of the head, step by step."""
        logits = head.logits(part)
        tanh = _adjust_in_place(logits, self.computation.scale, self.computation.softcap)

        # No exponential of a logit that counts from the largest of its row overflows.
        logits -= logits.amax(1, keepdim=True)
        label = self.labels[part, None]
        label_logit = logits.gather(1, label)

        target = self._target_at(part)
        if target is None:
            softmax = _plain_chunk(logits, weights)
        else:
            softmax = self._distilled_chunk(logits, target, weights, learns)

        if learns:
            logits.scatter_add_(1, label, -weights.lm / _divisor(softmax.slope))
            if tanh is not None:  # d tanh = 1 - tanh ** 2
                logits.addcmul_(logits, tanh.square_(), value=-1)
            head.backward(part, logits, slope=softmax.slope)

        log_probs = (label_logit - softmax.total.log())[:, 0]
        return _ChunkLosses(log_probs, softmax.kd_sum)

    def _distilled_chunk(
        self,
        logits: Tensor,
        target: SparseTarget,
        weights: ChunkWeights,
        learns: bool,
    ) -> _ChunkSoftmax:
        """Overwrite the logits [c, V] of a chunk with a target by their gradient over the slope, but for the label."""
        columns, is_token = columns_of(target.ids)
        named_logits = torch.where(is_token, logits.gather(1, columns), PADDING)

        # Summed over what is left, not total - sum: exact also where the rest is tiny.
        others = logits.exp_().scatter_(1, columns, 0.0)
        rest = others.sum(1, keepdim=True)
        named_masses = named_logits.exp()
        total = rest + named_masses.sum(1, keepdim=True)

        outcomes = torch.cat([named_logits, rest.log()], 1)
        kd_sum, kd_gradient = self._kd(outcomes, target, is_token, learns and self.learns_kd)

        # At a token of the rest, LM's gradient goes with its share of all exponentials, KD's with its share of those of
        # the rest.
        slope = weights.lm / total
        named_gradient = named_masses * (weights.lm / total)
        if kd_gradient is not None:
            kd_gradient *= weights.kd
            divisor = rest.clamp_min(torch.finfo(rest.dtype).tiny)
            slope = slope + kd_gradient[:, -1:] / divisor

            # Bounded, so that the quotients by it neither overflow nor vanish; but a row that learns nothing keeps 0.
            no_kd = (kd_gradient == 0).all(1, keepdim=True)
            is_silent = no_kd & (weights.lm == 0)
            size = slope.abs().clamp(1 / STEEPEST, STEEPEST)
            slope = size.copysign(slope).masked_fill(is_silent, 0.0)
            named_gradient = named_gradient + kd_gradient[:, :-1]

        if learns:
            logits.scatter_add_(1, columns, named_gradient / _divisor(slope))
        return _ChunkSoftmax(total, slope, kd_sum)

    def _compiled_chunk(
        self,
        head: LinearHead,
        part: slice,
        weights: ChunkWeights,
        learns: bool,
    ) -> _ChunkLosses:
        """Compute the losses of a chunk, and add its gradients to those of the head, by compiled passes."""
        scaling = {"scale": self.computation.scale, "softcap": self.computation.softcap}
        logits = head.logits(part)
        label = self.labels[part, None]
        tokens = None if self._named_tokens is None else self._named_tokens.rows(part)
        sums = sum_softmax(logits, label, tokens, **scaling)

        if not (learns and self.learns_kd):
            weights = weights._replace(kd=None)
        differentiate = head_passes.compiled(chunk_gradient, for_any_shape=True)
        gradient = differentiate(label, sums, tokens, self._comparison, weights=weights, **scaling)

        if learns:
            head.backward_passes(part, logits, gradient, **scaling)
        return _ChunkLosses(gradient.log_probs, gradient.kd_sum)

    @functools.cached_property
    def _named_tokens(self) -> NamedTokens | None:
        """Return the tokens that the target names, of all positions: once a pass, for every chunk costs launches."""
        target = self._target_at(slice(None))
        return None if target is None else name_tokens(target)

    @functools.cached_property
    def _comparison(self) -> Comparison | None:
        """Return the settings of KD as a compiled function takes them."""
        if self.target is None:
            return None
        scalar = functools.partial(self.kd_weight.new_full, ())
        interpolation = self.target.interpolation
        return Comparison(
            temperature=scalar(self.target.temperature),
            kind=divergence_at(self.target.kind, self.target.skew),
            tail=self.target.tail,
            skew=scalar(self.target.skew),
            interpolation=None if interpolation is None else scalar(interpolation),
        )

    def _kd(
        self,
        outcomes: Tensor,
        target: SparseTarget,
        is_token: Tensor,
        learns: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum of a chunk's divergences, and its gradient [c, K + 1] by the outcomes if it `learns`.

        Args:
            outcomes: [c, K + 1] logits of the named tokens and, merged into one, of all others.
            is_token: [c, K] False for padding.
        """
        settings = self.target
        with torch.set_grad_enabled(learns):
            kd_sum = kd_loss(
                outcomes.requires_grad_(learns),
                target_of_outcomes(target, is_token),
                temperature=settings.temperature,
                kind=settings.kind,
                tail=settings.tail,
                skew=settings.skew,
                interpolation=settings.interpolation,
            )
            gradient = torch.autograd.grad(kd_sum, outcomes)[0] if learns else None
        return kd_sum.detach(), gradient


def _adjust_in_place(logits: Tensor, scale: float, softcap: float | None) -> Tensor | None:
    """Scale and soft-cap logits [c, V] in place; return the tanh, which the gradient needs, or None without a cap."""
    if softcap:
        tanh = torch.tanh_(logits * (scale / softcap))
        torch.mul(tanh, softcap, out=logits)
        return tanh

    if scale != 1:
        logits *= scale
    return None


def _plain_chunk(logits: Tensor, weights: ChunkWeights) -> _ChunkSoftmax:
    """Overwrite the logits [c, V] of a chunk without a target by their gradient over the slope, but for the label."""
    total = logits.exp_().sum(1, keepdim=True)
    return _ChunkSoftmax(total, slope=weights.lm / total, kd_sum=None)


def _divisor(slope: Tensor) -> Tensor:
    """Return slopes to divide by; where one is 0 so are the numbers that it divides."""
    return torch.where(slope == 0, 1.0, slope)


class _FusedHead(torch.autograd.Function):
    """A head pass as one differentiable step: (loss, LM sum, KD sum, log-probabilities).

    Its inputs are the pass, the states and the head's parameters, each an argument of its own, as autograd wants them.
    """

    @staticmethod
    def forward(
        ctx: Any, head_pass: _HeadPass, states: Tensor, *params: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute values and gradients in one pass."""
        # In here gradients are always disabled: the pass knows what the caller had.
        needs = tuple(need and head_pass.grad_enabled for need in ctx.needs_input_grad[1:])
        result = head_pass.run(states, params, needs)

        ctx.head_pass = head_pass
        ctx.needs = needs
        ctx.gradients = result.gradients
        ctx.save_for_backward(states, *params)

        # The weighted total is differentiated; the sums are there to be logged.
        lm_sum = -result.log_probs.sum()
        lm_loss = -(head_pass.lm_weight * result.log_probs).sum()
        loss = lm_loss + head_pass.kd_weight * result.kd_sum
        ctx.mark_non_differentiable(lm_sum, result.kd_sum, result.log_probs)
        return loss, lm_sum, result.kd_sum, result.log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the gradients by that of the loss."""
        states, *params = ctx.saved_tensors  # raises where the graph is gone
        head_pass = ctx.head_pass
        share = head_pass.computation.scale / head_pass.precision.boost
        factor = grad * head_pass.magnitude * share

        if head_pass.module is None:
            # They are given away, so they may be scaled in place: no second [V, H]. A repeated backward computes anew.
            gradients = ctx.gradients
            ctx.gradients = None
            if gradients is None:
                gradients = head_pass.run(states, params, ctx.needs).gradients
            scaled = [None if gradient is None else gradient.mul_(factor) for gradient in gradients]
        else:
            # They are kept: another run of a module would draw another dropout.
            scaled = [None if gradient is None else gradient * factor for gradient in ctx.gradients]

        tensors = (states, *params)
        return None, *(
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(scaled, tensors, strict=True)
        )
