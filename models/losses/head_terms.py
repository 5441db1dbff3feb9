"""Loss terms on the student's next-token distributions: LM, KD and span likelihood, in one pass over its head.

Shapes: n supervised student positions, H student width.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LossConfig
from ..language_model import head_logits, logit_options, vocabulary_size
from ..types import LossTerm, PairedBatch, Places, SparseTarget, TeacherSignal
from . import head_passes, sample_weights, selection
from .chunk_size import chunk_rows
from .fused_head import HeadComputation, HeadLosses, HeadTarget, head_losses
from .losses import span_loss, span_sums


class HeadResult(NamedTuple):
    """Terms of a batch that were computed together."""

    loss: Tensor
    """Scalar with the gradient of all terms: sum over terms of share * sum."""
    terms: dict[str, LossTerm]
    """Each term on its own, without a gradient."""
    samples: Tensor | None
    """[3] sums over the rows of KD for sample weights (`DistillationOutput.samples`); None where there are none."""


class SpanResult(NamedTuple):
    """Span likelihood of a batch, as a function of the log-probability of each label."""

    value: Tensor
    """Scalar: sum over the spans."""
    slope: Tensor | None
    """[n] derivative of `value` by the log-probabilities; None where nothing is learned from them."""
    log_probs: Tensor
    """[n] log-probability of each label."""


@dataclass(frozen=True)
class HeadTerms:
    """LM, KD and span likelihood of one batch.

    All terms with a share go through the head together, so that the logits of a position are computed once and their
    gradient is too. Span likelihood, and a KD that is only measured, need one pass more each.
    """

    student: nn.Module
    batch: PairedBatch
    states: Tensor
    """[n, H] what enters the student's head at supervised positions."""
    config: LossConfig
    scalars: Mapping[str, float]
    """Values of this step: `temperature` and `span_temperature`; `skew`, `interpolation`, `select` and `sample_weights`
    where in use."""
    signal: TeacherSignal | None
    """Needed for span likelihood; of several teachers there is none."""
    target: SparseTarget | None
    """Teacher's distributions on the student's vocabulary; needed for KD."""
    mean_score: float | None = None
    """Mean of what windows are weighted by, over the steps before; None: nothing is known of it."""

    def compute(self, shares: Mapping[str, float]) -> HeadResult:
        """Compute some terms, and the gradient of their weighted sum.

        Args:
            shares: at least one term, each with its weight / count; one with share 0 is measured and teaches nothing.
        """
        # The span term is a function of the log-probabilities that LM sums. So its slope, taken off LM's weight at each
        # position, gives the gradient of both in one pass.
        lm_weight: float | Tensor = shares.get("lm", 0.0)
        if lm_weight and self.batch.given is not None:
            lm_weight = lm_weight * self.batch.given
        span = None
        if "span" in shares:
            span = self.span(learns=bool(shares["span"]))
            if span.slope is not None:
                lm_weight = lm_weight - shares["span"] * span.slope

        # A term without a share gives no gradient; without any share the whole pass is a measurement.
        kd_weight = shares.get("kd", 0.0)
        is_learning = torch.is_grad_enabled() and any(shares.values())
        with torch.set_grad_enabled(is_learning):
            head = self._run_head(lm_weight, kd_weight, with_target=bool(kd_weight))

        # In the order in which terms are reported.
        terms = {}
        if "lm" in shares:
            terms["lm"] = self.language_model(head)
        if "kd" in shares:
            terms["kd"] = self.distillation(head)
        loss = head.loss
        if span is not None:
            terms["span"] = LossTerm(span.value, self.batch.counts["span"])
            loss = loss + _beyond_the_head(span, shares["span"])
        return HeadResult(loss, terms, self._sample_sums if "kd" in shares else None)

    def language_model(self, head: HeadLosses) -> LossTerm:
        """Return the next-token cross-entropy that a pass of the head has summed, of given text alone."""
        lm_sum = head.lm_sum
        if self.batch.given is not None:
            lm_sum = -head.log_probs.masked_fill(~self.batch.given, 0.0).sum()
        return LossTerm(lm_sum, self.batch.counts["lm"])

    def distillation(self, head: HeadLosses) -> LossTerm:
        """Return the KD that a pass of the head has summed; measure it apart if that pass left it out.

        A KD that teaches nothing must not change what is learned by a rounding error: it has its own pass.
        """
        kd_sum = head.kd_sum
        if kd_sum is None:
            with torch.no_grad():
                kd_sum = self._run_head(0.0, with_target=True).kd_sum
        # Rows that a memory left out, since KD is learned there nowhere in the run, are not among those.
        unlisted = None
        if self.signal is not None:
            unlisted = self._count(self.signal.log_mass.isneginf() & self._is_stored)
        skipped = self._count(~self.target.valid & self._is_stored)
        return LossTerm(kd_sum, self.batch.counts["kd"], skipped, unlisted)

    def _count(self, is_meant: Tensor) -> Tensor:
        """Return how many positions some of the rows [N] stand for: those behind a stored choice are no rows."""
        if self.batch.places is None:
            return is_meant.sum(dtype=torch.float64)
        rows = self._sums_by_window(torch.ones_like(is_meant))
        return (is_meant * self._places.of / rows[self._row_window]).sum()

    def span(self, learns: bool) -> SpanResult:
        """Compute span likelihood, and its slope if it `learns`, from the log-probabilities of the labels."""
        batch = self.batch
        spans = batch.counts["span"]
        log_probs = self._log_probs
        student_spans = batch.student_spans.flatten()[batch.supervised]
        teacher_spans = batch.teacher_spans.flatten()[batch.teacher_held]
        teacher = span_sums(self.signal.realised, teacher_spans, spans)

        # The log-probabilities are a leaf here: the head itself is differentiated once, in the pass of all terms.
        learns = learns and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns):
            leaf = log_probs.clone().requires_grad_(learns)
            student = span_sums(leaf, student_spans, spans)
            value = span_loss(
                student,
                teacher,
                temperature=self.scalars["span_temperature"],
                kind=self.config.divergence,
                skew=self.scalars.get("skew", 0.0),
            )
            slope = torch.autograd.grad(value, leaf)[0] if learns else None
        return SpanResult(value.detach(), slope, log_probs)

    def _run_head(
        self,
        lm_weight: float | Tensor,
        kd_weight: float = 0.0,
        *,
        with_target: bool = False,
    ) -> HeadLosses:
        """Send the supervised positions through the head.

        Every call draws the same random numbers: all passes of a head with dropout (an adapter's, for one) see one
        mask, however many terms are measured besides.
        """
        device = self.states.device
        compiled, _ = head_passes.choose(self.config.head_passes, device)
        scaling = logit_options(self.student)
        computation = HeadComputation(scaling["scale"], scaling["softcap"], compiled=compiled)
        labels = self.batch.labels.flatten()[self.batch.supervised]

        with self._same_random_numbers():
            return head_losses(
                self.states,
                self.student.get_output_embeddings(),
                labels,
                lm_weight=lm_weight,
                kd_weight=kd_weight,
                target=self._head_target() if with_target else None,
                computation=computation,
            )

    def _head_target(self) -> HeadTarget:
        """Return the teacher's distributions with the divergence that this step compares them by."""
        interpolation = self.scalars.get("interpolation", 1.0)
        target = self.target
        positions = self.batch.row_supervised
        weights = [weight for weight in (self._sample_weights, self._selection_weights) if weight is not None]
        if weights:
            weight = torch.stack(weights).prod(0).to(target.probs.dtype)
            target = replace(target, weight=weight)
        if self.chosen is not None:
            target = target.rows(self.chosen)
            positions = positions[self.chosen]

        return HeadTarget(
            target,
            rows=positions,
            temperature=self.scalars["temperature"],
            kind=self.config.divergence,
            tail=self.config.tail,
            skew=self.scalars.get("skew", 0.0),
            # A share of 1 is no mixture, bit for bit.
            interpolation=None if interpolation == 1 else interpolation,
        )

    @cached_property
    def _log_probs(self) -> Tensor:
        """Return [n] the log-probability of each label, from a pass of its own, without a gradient."""
        with torch.no_grad():
            return self._run_head(0.0).log_probs

    # --- weights of windows in KD

    @cached_property
    def _window_scores(self) -> Tensor | None:
        """Return [B] what windows are weighted by; None: they all weigh alike.

        Raises:
            ValueError: the teacher was not asked for the probability of all of the text.
        """
        if not self.scalars.get("sample_weights"):
            return None
        if self.batch.places is not None:
            raise ValueError(
                f"got sample_weights and select_by {selection.STORED}, under which the teacher is not asked for the "
                "probability of all of the text; leave sample_weights at 0, or choose by another select_by"
            )
        excess = sample_weights.excess_losses(self.batch, self.signal, self._log_probs)
        return sample_weights.frontier(excess)

    @cached_property
    def _sample_weights(self) -> Tensor | None:
        """Return [N] the weight of the window of each row of the target; None: they all weigh alike."""
        if self._window_scores is None or self.mean_score is None:
            return None
        degree = self.scalars["sample_weights"]
        weights = sample_weights.window_weights(self._window_scores, self.mean_score, degree)
        return weights[self._row_window]

    @property
    def _sample_sums(self) -> Tensor | None:
        """Return [3] sums over the rows: scores of windows, their weights, the square of each weight less 1."""
        if self._window_scores is None:
            return None
        scores = self._window_scores[self._row_window]
        weights = torch.ones_like(scores) if self._sample_weights is None else self._sample_weights.to(scores.dtype)
        return torch.stack([scores.sum(), weights.sum(), (weights - 1).square().sum()])

    @property
    def _row_window(self) -> Tensor:
        """Return [N] the window of each row of the target."""
        return self.batch.row_student // self.batch.student_ids.shape[1]

    # --- positions that KD is learned at

    @property
    def _select(self) -> float:
        """Return the share of each window's positions that KD is learned at."""
        return self.scalars.get("select", 1.0)

    @cached_property
    def chosen(self) -> Tensor | None:
        """Return [m] the rows of the target that KD is learned at; None: all."""
        if self._select == 1:
            return None
        if self.config.select_by == selection.STORED:
            return selection.choose_by_places(self._places, self.batch.window_rows, self._select)

        scores = self._scores()
        # What the teacher cannot judge teaches nothing.
        scores = scores.masked_fill(~self.target.valid, -torch.inf)
        return selection.choose(scores, self._row_window, self.batch.window_rows, self._select)

    @cached_property
    def _selection_weights(self) -> Tensor | None:
        """Return [N] how many positions a chosen one stands for, each those of its window; None: for itself alone.

        So KD is the mean over the chosen positions of each window, and a window weighs as much as it does without a
        choice, however few are chosen of it: as many positions as the teacher can judge, where that is known.
        """
        if self._select == 1:
            return None
        if self.config.select_by == selection.STORED:
            return selection.positions_of_a_chosen_one(self._places.of, self._select)

        positions = self._sums_by_window(torch.ones_like(self.target.valid))
        judged = self._sums_by_window(self.target.valid | ~self._is_stored)
        return selection.positions_of_a_chosen_one(positions, self._select, judged)[self._row_window]

    @property
    def _is_stored(self) -> Tensor:
        """Return [N] bool: which rows a memory has not left out, where KD is learned nowhere in the run."""
        return torch.ones_like(self.target.valid) if self.signal is None else self.signal.is_stored

    def _sums_by_window(self, of_rows: Tensor) -> Tensor:
        """Return [B] float64 the sums of something [N] over the rows of each window."""
        sums = of_rows.new_zeros(len(self.batch.window_rows), dtype=torch.float64)
        return sums.index_add_(0, self._row_window, of_rows.double())

    @property
    def _places(self) -> Places:
        """Return the places of the rows.

        Raises:
            ValueError: the batch comes without.
        """
        if self.batch.places is None:
            raise ValueError(
                f"got select_by {selection.STORED} and a batch without places; choose the positions of the windows "
                "before training: models.chosen_positions.with_places"
            )
        return self.batch.places

    @torch.no_grad()
    def _scores(self) -> Tensor:
        """Return [N] the score of every row of the target; no logits of all of them exist at once."""
        name = self.config.select_by
        score = selection.SCORES[name]
        positions = self.batch.row_supervised
        labels = self.batch.labels.flatten()[self.batch.supervised][positions]
        if not len(labels):
            return labels.float()
        if name in selection.WITHOUT_STUDENT:
            return score(selection.Evidence(self.target, None, labels))

        rows, _ = chunk_rows(vocabulary_size(self.student), labels.device)
        scores = []
        with self._same_random_numbers():
            for first in range(0, len(labels), rows):
                part = slice(first, first + rows)
                logits = head_logits(self.student, self.states[positions[part]])
                scores.append(score(selection.Evidence(self.target.rows(part), logits, labels[part])))
        return torch.cat(scores)

    def _same_random_numbers(self) -> AbstractContextManager:
        """Return a context in which the head draws what each of its passes draws; the CPU's generator is forked too."""
        device = self.states.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _beyond_the_head(span: SpanResult, share: float) -> Tensor:
    """Return what the head's pass lacks of the share of span likelihood in the loss.

    With a slope, that pass has summed -slope * log-probability as if it were LM: this is corrected here, without a
    gradient, since that of the pass is right already.
    """
    if span.slope is None:
        return share * span.value
    return share * (span.value - (span.slope * span.log_probs).sum())
