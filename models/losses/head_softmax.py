"""The softmax of a chunk of raw logits, and the gradient by these logits, where the exponentials are never stored.

Shapes: c rows of one chunk, V student vocabulary, K tokens that a target names in a row.

The compiled passes of `head_passes` read a chunk [c, V] and return two numbers a row. Everything else happens here on
[c, K] numbers, in float32: the logits of the named tokens, of the label, and of "the rest", which are the tokens that
the target does not name. The gradient is then `slope * exponential` in every column but those of the named tokens and
of the label, whose values are computed on their own and written over it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..types import SparseTarget
from . import head_passes
from .losses import PADDING


class NamedTokens(NamedTuple):
    """The tokens that the target of a chunk names."""

    target: SparseTarget
    columns: Tensor
    """[c, K] their ids; padding repeats the largest id of its row."""
    is_token: Tensor
    """[c, K] False for padding."""
    repeated: Tensor
    """[c, K] place in `columns` of the id that padding repeats."""
    values: Tensor
    """[c, K] their logits, scaled and soft-capped."""
    cap_slope: Tensor | None
    """[c, K] derivative of the soft-cap at these logits; None without a cap."""


class SoftmaxRows(NamedTuple):
    """The softmax of the rows of a chunk, summed up."""

    label: Tensor
    """[c, 1] the token that each row predicts."""
    raw_label: Tensor
    """[c, 1] logit of the label, before scale and soft-cap."""
    named: NamedTokens | None
    """The tokens that the target names; None without a target."""
    peak: Tensor
    """[c, 1] largest logit of the rest."""
    rest_total: Tensor
    """[c, 1] sum over the rest of exp(logit - peak)."""
    shift: Tensor
    """[c, 1] number that is subtracted from all logits below, so that no exponential overflows."""
    log_rest: Tensor
    """[c, 1] log-sum-exp of the rest, shifted."""
    named_logits: Tensor | None
    """[c, K] logits of the named tokens, shifted; None without a target."""
    total: Tensor
    """[c, 1] sum of all exponentials, shifted."""


class LogitGradient(NamedTuple):
    """A gradient [c, V] by logits: slope * exponential, but for some columns of each row."""

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


def gather_named(
    logits: Tensor,
    target: SparseTarget,
    scale: float,
    softcap: float | None,
) -> NamedTokens:
    """Gather the tokens that the target of a chunk names, with their adjusted logits, from raw logits [c, V]."""
    columns, is_token = columns_of(target.ids)
    repeated = torch.where(is_token, columns, -1).argmax(1, keepdim=True)
    raw = logits.gather(1, columns)
    return NamedTokens(
        target=target,
        columns=columns,
        is_token=is_token,
        repeated=repeated.expand_as(columns),
        values=head_passes.adjusted(raw, scale, softcap),
        cap_slope=head_passes.softcap_slope(raw, scale, softcap),
    )


def sum_softmax(
    logits: Tensor,
    label: Tensor,
    target: SparseTarget | None,
    *,
    scale: float,
    softcap: float | None,
) -> SoftmaxRows:
    """Sum up the softmax of each row of raw logits.

    Args:
        logits: [c, V]; the named tokens are marked with -inf in it afterwards.
        label: [c, 1].
    """
    raw_label = logits.gather(1, label)

    # Peak and sum over the tokens that the target does not name. The others are few.
    named = None
    if target is not None:
        named = gather_named(logits, target, scale, softcap)
        logits.scatter_(1, named.columns, -torch.inf)
    passes = head_passes.compiled()
    peak, rest_total = passes.row_sums(logits, scale=scale, softcap=softcap)

    # Where the target names every token there is no rest.
    no_rest = peak == -torch.inf
    peak = peak.masked_fill(no_rest, 0.0)
    rest_total = rest_total.masked_fill(no_rest, 1.0)
    log_rest = peak + rest_total.log()
    log_rest = log_rest.masked_fill(no_rest, -torch.inf)

    # From here on logits count from the largest of the row's K + 1 outcomes.
    shift = peak
    if named is not None:
        largest_named = named.values.amax(1, keepdim=True)
        shift = torch.maximum(log_rest, largest_named)
    log_rest = log_rest - shift
    total = log_rest.exp()

    named_logits = None
    if named is not None:
        named_logits = torch.where(named.is_token, named.values - shift, PADDING)
        total = total + named_logits.exp().sum(1, keepdim=True)

    return SoftmaxRows(
        label=label,
        raw_label=raw_label,
        named=named,
        peak=peak,
        rest_total=rest_total,
        shift=shift,
        log_rest=log_rest,
        named_logits=named_logits,
        total=total,
    )


def differentiate_softmax(
    rows: SoftmaxRows,
    lm_weight: Tensor,
    kd_gradient: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
) -> LogitGradient:
    """Return the gradient of a chunk's loss by its raw logits.

    Args:
        lm_weight: [c, 1] weight of LM.
        kd_gradient: [c, K + 1] the weighted gradient of KD, by the logits of the named tokens and of the rest merged;
            None where KD is not learned.
    """
    # That of the rest is divided by its own sum, which is 1 or more: a rest of any smallness has its gradient.
    rest_gradient = lm_weight * rows.log_rest.exp() / rows.total
    if kd_gradient is not None:
        rest_gradient = rest_gradient + kd_gradient[:, -1:]
    slope = rest_gradient / rows.rest_total

    # The label's exponential has the slope of the rest, or its gradient as a named token.
    label_logit = head_passes.adjusted(rows.raw_label, scale, softcap)
    label_gradient = (label_logit - rows.peak).exp() * slope
    named = rows.named
    if named is not None:
        named_gradient = lm_weight * rows.named_logits.exp() / rows.total
        if kd_gradient is not None:
            named_gradient = named_gradient + kd_gradient[:, :-1]
        is_label = named.is_token & (named.columns == rows.label)
        label_as_named = (named_gradient * is_label).sum(1, keepdim=True)
        label_gradient = torch.where(is_label.any(1, keepdim=True), label_as_named, label_gradient)

    # d LM / d logit is the probability, but 1 less at the label; then the chain rule through the soft-cap.
    label_gradient = label_gradient - lm_weight
    label_cap_slope = head_passes.softcap_slope(rows.raw_label, scale, softcap)
    if label_cap_slope is not None:
        label_gradient = label_gradient * label_cap_slope
    if named is None:
        return LogitGradient(slope, rows.label, label_gradient)

    if named.cap_slope is not None:
        named_gradient = named_gradient * named.cap_slope

    # A column that stands twice, as the label or as padding, has the same number at both places.
    named_gradient = torch.where(is_label, label_gradient, named_gradient)
    repeated_gradient = named_gradient.gather(1, named.repeated)
    named_gradient = torch.where(named.is_token, named_gradient, repeated_gradient)
    return LogitGradient(
        slope=slope,
        columns=torch.cat([named.columns, rows.label], 1),
        values=torch.cat([named_gradient, label_gradient], 1),
    )
