"""The losses of a chunk of raw logits and the gradient by these logits, where the exponentials are never stored.

Shapes: n supervised positions, c rows of one chunk, V student vocabulary, K tokens that a target names in a row.

Only two passes of `head_passes` touch a chunk [c, V]: one returns two numbers a row, one writes the gradient.
Everything between them is arithmetic on [c, K] numbers, in float32: the logits of the named tokens, of the label, and
of "the rest", which are the tokens that the target does not name. It is one function, `chunk_gradient`, which is
compiled as a whole: step by step it is a hundred kernels, and launching them takes longer than the products of a chunk
take on a fast GPU. The gradient is then `slope * exponential` in every column but those of the named tokens and of the
label, whose values are computed on their own and written over it.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..types import SparseTarget
from . import head_passes
from .losses import PADDING, kd_loss


class Comparison(NamedTuple):
    """The way in which a chunk's outcomes are compared with the teacher's; see `losses.kd_loss`."""

    temperature: Tensor
    """Scalar: a number would be compiled for anew whenever a schedule changes it."""
    kind: str
    """A key of `DIVERGENCES`; at an end of `skew` the one that it is there."""
    tail: str
    skew: Tensor
    """Scalar, likewise."""
    interpolation: Tensor | None
    """Scalar, likewise; None where the teacher alone is learned from."""


class ChunkWeights(NamedTuple):
    """Weights of the two losses on a chunk."""

    lm: Tensor
    """[c, 1]."""
    kd: Tensor | None
    """Scalar; None where KD is not learned."""


class NamedTokens(NamedTuple):
    """The tokens that the target of some positions names."""

    target: SparseTarget
    """Its ids are places in `columns`; -1 is padding."""
    columns: Tensor
    """[c, K] ids of the tokens; padding repeats the largest id of its row."""
    is_token: Tensor
    """[c, K] False for padding."""
    repeated: Tensor
    """[c, 1] place in `columns` of the id that padding repeats."""

    def rows(self, part: slice) -> "NamedTokens":
        """Return those of some positions."""
        return NamedTokens(self.target.rows(part), self.columns[part], self.is_token[part], self.repeated[part])


class RawSums(NamedTuple):
    """All that is read from a chunk of raw logits."""

    label: Tensor
    """[c, 1] logit of the token that each row predicts."""
    named: Tensor | None
    """[c, K] logits of the named tokens; None without a target."""
    peak: Tensor
    """[c, 1] largest adjusted logit of the rest; -inf where there is none."""
    rest_total: Tensor
    """[c, 1] sum over the rest of exp(adjusted logit - peak)."""


class ChunkGradient(NamedTuple):
    """The losses of a chunk, and their gradient by its logits: slope * exponential, but for some columns of a row."""

    log_probs: Tensor
    """[c] log-probability of every label."""
    kd_sum: Tensor | None
    """Scalar: sum of the KD divergences; None without a target."""
    peak: Tensor
    """[c, 1] number that logits count from in their exponentials."""
    slope: Tensor
    """[c, 1] factor on the exponentials."""
    columns: Tensor
    """[c, m] columns that differ: the named tokens and the label; one that stands twice has equal values."""
    values: Tensor
    """[c, m] gradient in these columns."""


def columns_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return columns [c, K] to gather named tokens from, and which of them are tokens and not padding.

    Padding repeats the largest token of its row: the columns of a row that are masked are then exactly the named ones.

    Args:
        ids: [c, K] tokens; -1 is padding.
    """
    # A row of nothing but padding (one that is not valid) names any token.
    place = torch.arange(ids.shape[1], device=ids.device)
    is_first = place == 0
    is_empty = ids.amax(1, keepdim=True) < 0
    ids = torch.where(is_first & is_empty, 0, ids)

    is_token = ids >= 0
    largest = ids.amax(1, keepdim=True)
    columns = torch.where(is_token, ids, largest)
    return columns, is_token


def target_of_outcomes(target: SparseTarget, is_token: Tensor) -> SparseTarget:
    """Return a target as one of the outcomes [c, K + 1] of its rows: the tokens that it names in their order, the rest.

    To `kd_loss` these outcomes are a whole vocabulary, whose first K tokens the target names.

    Args:
        is_token: [c, K] False for padding.
    """
    place = torch.arange(is_token.shape[1], device=is_token.device)
    return replace(target, ids=torch.where(is_token, place, -1))


def name_tokens(target: SparseTarget) -> NamedTokens:
    """Return the tokens that a target names, ready to be gathered."""
    columns, is_token = columns_of(target.ids)
    repeated = torch.where(is_token, columns, -1).argmax(1, keepdim=True)
    return NamedTokens(target_of_outcomes(target, is_token), columns, is_token, repeated)


def sum_softmax(
    logits: Tensor,
    label: Tensor,
    tokens: NamedTokens | None,
    *,
    scale: float,
    softcap: float | None,
) -> RawSums:
    """Sum up the softmax of each row of raw logits.

    Args:
        logits: [c, V]; the named tokens are marked with -inf in it afterwards.
        label: [c, 1].
        tokens: those that the target names.
    """
    raw_label = logits.gather(1, label)

    # Peak and sum over the tokens that the target does not name. The others are few.
    raw_named = None
    if tokens is not None:
        raw_named = logits.gather(1, tokens.columns)
        logits.scatter_(1, tokens.columns, -torch.inf)

    row_sums = head_passes.compiled(head_passes.row_sums)
    peak, rest_total = row_sums(logits, scale=scale, softcap=softcap)
    return RawSums(raw_label, raw_named, peak, rest_total)


def chunk_gradient(
    label: Tensor,
    sums: RawSums,
    tokens: NamedTokens | None,
    comparison: Comparison | None,
    *,
    weights: ChunkWeights,
    scale: float,
    softcap: float | None,
) -> ChunkGradient:
    """Return the losses of a chunk and their gradient by its raw logits.

    Args:
        label: [c, 1] the token that each row predicts.
        comparison: as `tokens`, None without a target.
    """
    rest = _rest_of(sums)
    log_rest = rest.log_total
    label_logit = head_passes.adjusted(sums.label, scale, softcap)

    if tokens is None or comparison is None:
        slope = weights.lm / rest.total
        label_gradient = (label_logit - rest.peak).exp() * slope - weights.lm
        label_gradient = _through_softcap(label_gradient, sums.label, scale, softcap)
        log_probs = (label_logit - log_rest)[:, 0]
        return ChunkGradient(log_probs, None, rest.peak, slope, columns=label, values=label_gradient)

    # From here on logits count from the largest of the row's K + 1 outcomes.
    named = head_passes.adjusted(sums.named, scale, softcap)
    shift = torch.maximum(log_rest, named.amax(1, keepdim=True))
    log_rest = log_rest - shift
    named = torch.where(tokens.is_token, named - shift, PADDING)
    total = log_rest.exp() + named.exp().sum(1, keepdim=True)

    # To KD the outcomes are a whole vocabulary, of which the target names all but the last.
    outcomes = torch.cat([named, log_rest], 1)
    kd_sum, kd_gradient = _divergence(outcomes, tokens.target, comparison, weights.kd)

    # That of the rest is divided by its own sum, which is 1 or more: a rest of any smallness has its gradient.
    rest_gradient = weights.lm * log_rest.exp() / total
    named_gradient = weights.lm * named.exp() / total
    if kd_gradient is not None:
        rest_gradient = rest_gradient + kd_gradient[:, -1:]
        named_gradient = named_gradient + kd_gradient[:, :-1]
    slope = rest_gradient / rest.total

    # The label's exponential has the slope of the rest, or its gradient as a named token; d LM / d logit is the
    # probability, but 1 less at the label.
    is_label = tokens.is_token & (tokens.columns == label)
    label_as_named = (named_gradient * is_label).sum(1, keepdim=True)
    label_as_rest = (label_logit - rest.peak).exp() * slope
    label_gradient = torch.where(is_label.any(1, keepdim=True), label_as_named, label_as_rest) - weights.lm
    label_gradient = _through_softcap(label_gradient, sums.label, scale, softcap)
    named_gradient = _through_softcap(named_gradient, sums.named, scale, softcap)

    return ChunkGradient(
        log_probs=(label_logit - shift - total.log())[:, 0],
        kd_sum=kd_sum,
        peak=rest.peak,
        slope=slope,
        columns=torch.cat([tokens.columns, label], 1),
        values=_values(tokens, named_gradient, label_gradient, is_label),
    )


def _divergence(
    outcomes: Tensor,
    target: SparseTarget,
    comparison: Comparison,
    weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the divergences of a chunk, and its weighted gradient; None for it where nothing is learned."""

    def divergence(outcomes: Tensor) -> Tensor:
        return kd_loss(outcomes, target, **comparison._asdict())

    if weight is None:
        return divergence(outcomes), None
    gradient, value = torch.func.grad_and_value(divergence)(outcomes)
    return value, gradient * weight


def _values(
    tokens: NamedTokens,
    named_gradient: Tensor,
    label_gradient: Tensor,
    is_label: Tensor,
) -> Tensor:
    """Return [c, K + 1] the gradients in the columns of the named tokens and of the label.

    A column that stands twice, as the label or as padding, has the same number at both places.
    """
    named_gradient = torch.where(is_label, label_gradient, named_gradient)
    repeated_gradient = named_gradient.gather(1, tokens.repeated)
    named_gradient = torch.where(tokens.is_token, named_gradient, repeated_gradient)
    return torch.cat([named_gradient, label_gradient], 1)


class _Rest(NamedTuple):
    """The tokens that a target does not name, merged into one."""

    peak: Tensor
    """[c, 1] largest of their logits; 0 where there is none."""
    total: Tensor
    """[c, 1] sum of their exponentials, counted from the peak; 1 where there is none."""
    log_total: Tensor
    """[c, 1] log-sum-exp of their logits; -inf where there is none."""


def _rest_of(sums: RawSums) -> _Rest:
    """Return what is read of the rest, as finite as it can be where the target names every token."""
    no_rest = sums.peak == -torch.inf
    peak = sums.peak.masked_fill(no_rest, 0.0)
    total = sums.rest_total.masked_fill(no_rest, 1.0)
    log_total = (peak + total.log()).masked_fill(no_rest, -torch.inf)
    return _Rest(peak, total, log_total)


def _through_softcap(gradient: Tensor, raw: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return a gradient by soft-capped logits as one by the logits before the cap, but for the scale."""
    cap_slope = head_passes.softcap_slope(raw, scale, softcap)
    return gradient if cap_slope is None else gradient * cap_slope
