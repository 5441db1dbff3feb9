"""DistillationFramework: student, frozen teacher and curriculum as one module with one forward.

Shapes: B windows, S student positions, n supervised student positions, N KD rows, H student width.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .config import HEAD_TERMS, ROUTER_TERMS, TERMS, TEXT_TERMS, LossConfig, RouterConfig
from .curriculum import CurriculumScheduler
from .language_model import (
    body_layers,
    body_states,
    check_head,
    depth_and_width,
    evaluating,
    head_logits,
    vocabulary_size,
)
from .losses.chunk_size import chunk_rows
from .losses.head_terms import HeadResult, HeadTerms
from .losses.hidden_state_terms import HIDDEN_STATE_TERMS
from .losses.losses import kl_with_bucket
from .student_aware_router import StudentAwareRouter
from .teacher.cached import CachedTeacher, expect_teacher
from .teacher.frozen import FrozenTeacher
from .teacher.listed import ListedTeacher
from .teacher.mixture import MixtureProjection, TeacherMixture
from .teacher.projection import Projection
from .text.vocabulary import VocabularyMap
from .types import (
    A_BATCH,
    Difference,
    DistillationOutput,
    LossTerm,
    MixtureSignal,
    PairedBatch,
    SparseTarget,
    TeacherSignal,
)
from .validation import expect, expect_count, expect_number

Teacher = FrozenTeacher | CachedTeacher | TeacherMixture

Signal = TeacherSignal | MixtureSignal


SINGLE_TEACHER_TERMS = {"span"}
"""Terms on the student's head that several teachers cannot be mixed in: the spans of each pair are other ones."""

STATISTICS = (*TERMS, "samples")
"""Names of what a step may be told of the steps before: the size of each term, and the mean of the windows' scores."""


class _Compared(NamedTuple):
    """Predictions of both models at some positions (N) where both have read the same bytes."""

    positions: Tensor
    """[N] flat student positions."""
    logits: Tensor
    """[N, V] of the student."""
    teacher: SparseTarget
    """The teacher's distributions on the student's vocabulary."""
    kl: Tensor
    """[N] KL divergence from the teacher in nats, the tail in one bucket."""


class DistillationFramework(nn.Module):
    """The curriculum's loss of a student on a batch.

    Parameters, state and training mode are those of the student and, where the curriculum uses one of its terms, of
    the router; the teacher is held outside of them.

    Args:
        student: a transformers language model, causal or an encoder-decoder as the teacher is.
        teacher: None trains without a teacher (LM term only).
        vocabulary: the pair's vocabulary map; needed with a teacher. Of several teachers that of the first one.
        loss: how the teacher's distribution becomes a loss.
        curriculum: weights over the run.
        router: how hidden states are compared. The router starts uncalibrated: see `calibrate`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: for a student whose logits are not head(body(x)), that has nothing to train or that is trained in
            half precision; for a student, a teacher and a vocabulary map that do not belong together; for
            hidden-state terms without a teacher; for span likelihood with several teachers, whose spans differ; for
            a curriculum that was made for another LossConfig.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        vocabulary: VocabularyMap | None,
        loss: LossConfig,
        curriculum: CurriculumScheduler,
        router: RouterConfig | None = None,
    ) -> None:
        super().__init__()
        # Cheap checks with a remedy each: what does not fit here trains to nonsense, or fails hours later.
        _check_kinds(teacher, vocabulary, loss, curriculum, router)
        check_head(student, "student")
        _check_pair(student, teacher, vocabulary)
        _check_trainable(student)
        _check_precision(student)
        _check_loss(loss, curriculum.loss)

        self.student = student
        # In a tuple, out of reach of parameters(), state_dict(), train(), to() and DDP.
        self._frozen = (teacher,)
        # Not `config`, which transformers.Trainer takes for a model's own.
        self.loss_config = loss
        self.curriculum = curriculum

        # A batch of another pair is told by tokens beyond these rows.
        self.projection: Projection | MixtureProjection | None = None
        self._student_rows = vocabulary_size(student)
        self._teacher_rows = None
        if vocabulary is not None:
            self.projection = Projection(vocabulary, loss.correction, loss.min_prefix_mass)
            self._teacher_rows = len(vocabulary.order)
        if isinstance(teacher, TeacherMixture):
            _check_terms_of_mixture(curriculum)
            self.projection = teacher.projection(loss)

        self.router = self._make_router(router or RouterConfig())
        self._has_warned = False
        self._place_projection()

    def _make_router(self, config: RouterConfig) -> StudentAwareRouter | None:
        """Return a router on the student's device; None where the curriculum has no term on hidden states."""
        routed = self.curriculum.used & {*ROUTER_TERMS}
        if not routed:
            return None

        if self.teacher is None:
            raise ValueError(f"got weights for {', '.join(sorted(routed))} and no teacher, whose states they need")
        if self.teacher.model is None:
            raise ValueError(
                f"got weights for {', '.join(sorted(routed))} and a teacher whose model is elsewhere: it has no states"
            )
        student_shape = depth_and_width(self.student)
        teacher_shape = depth_and_width(self.teacher.model)
        router = StudentAwareRouter(config, student_shape, teacher_shape)
        return router.to(next(self.student.parameters()).device)

    def _apply(self, *args, **options) -> "DistillationFramework":
        """Move or convert parameters, as for any module, and the projection's tables after them."""
        super()._apply(*args, **options)
        self._place_projection()
        return self

    def _place_projection(self) -> None:
        """Put the projection where the student is: before the first step, in which a copy would make the host wait."""
        device = next(self.student.parameters()).device
        if self.projection is not None and device.type != "meta":
            self.projection.to(device)

    @property
    def teacher(self) -> Teacher | None:
        return self._frozen[0]

    @property
    def couples_windows(self) -> bool:
        """True if a term compares the windows of a forward with one another, over all processes.

        A router computes such a term also with a weight of 0, wherever terms are measured.
        """
        return self.router is not None and any(term.couples_windows for term in HIDDEN_STATE_TERMS.values())

    def forward(
        self,
        batch: PairedBatch,
        step: int | None = None,
        *,
        counts: dict[str, int] | None = None,
        measure: bool = False,
        signal: Signal | None = None,
        term_graphs: bool = False,
        statistics: Mapping[str, float] | None = None,
    ) -> DistillationOutput:
        """Return the loss of a batch under the weights of an optimizer step, and its terms.

        Args:
            batch: windows from `PairCollator`.
            step: optimizer step, counted from 0; None stands for the end of the curriculum. Nothing is logged or
                stored in either case.
            counts: items of every term in the whole optimizer step, over all micro-batches and processes (the sum of
                `batch.counts`); None: this batch is the whole step.
            measure: also measure, without gradient, terms whose weight is 0.
            signal: the teacher's signal for this batch, if it is there already (`ask`).
            term_graphs: give lm, kd and span graphs of their own, for a look at each one's gradient, at the price of
                one more pass of the head for each. Without it only the total has a graph with them in it.
            statistics: of the optimizer steps before, as `fit` gives them: the size of each term by its name, for
                `curriculum.balance`, and the mean of `output.samples` over the rows of KD as `samples`, for
                `curriculum.sample_weights`. What is not in it changes nothing.

        Returns:
            the weighted total and the raw terms (sum, count).
        """
        self._check_batch(batch)
        statistics = _checked_statistics(statistics, self.curriculum, step)
        weights = self.curriculum.weights(step, statistics)
        scalars = self.curriculum.scalars(step)
        if not self.curriculum.used and not measure:
            raise ValueError(
                f"curriculum: got 0 for every weight, and nothing is learned; give one of {', '.join(weights)} a "
                "weight, or ask for the terms alone with measure=True"
            )

        # Every term is divided by its items in the whole step, so that micro-batches add up to one batch.
        computed = self._terms_to_compute(batch, weights, measure, signal)
        counts = _checked_counts(batch.counts if counts is None else counts, batch, computed)
        shares = {name: weights[name] / max(counts[name], 1) for name in computed}
        head_shares = {name: shares[name] for name in HEAD_TERMS if name in computed}
        routed = [name for name in ROUTER_TERMS if name in computed]
        if routed:
            self._warn_if_not_calibrated()

        # One forward of either body serves all terms; hidden states are only asked for where a term compares them.
        if signal is None:
            signal = self._ask(batch, computed, step)
        if signal is not None:
            signal = signal.to(batch.student_ids.device)
        layers = self.router.student_layers if routed else ()
        states, hidden = body_layers(
            self.student, batch.student_ids, layers, batch.student_source, batch.student_positions
        )

        # A term that is only measured is no part of the total. The order of the parts fixes the total's rounding.
        terms: dict[str, LossTerm] = {}
        samples = None
        parts = []
        if head_shares:
            head_terms = self._head_terms(batch, states, signal, scalars, statistics, with_target="kd" in head_shares)
            head = _computed(head_terms, head_shares, term_graphs=term_graphs)
            terms |= head.terms
            # Only where they weigh something: how often a run measures must not reach what it learns.
            samples = head.samples if weights["kd"] else None
        if routed:
            terms |= self._hidden_state_terms(batch, hidden, signal, routed, weights)
            parts += [terms[name].sum * shares[name] for name in routed if weights[name]]
        if any(head_shares.values()):
            parts.append(head.loss)
        loss = torch.stack(parts).sum() if parts else self._no_loss()

        scalars["top_k"] = self.loss_config.top_k
        return DistillationOutput(loss, terms, weights, scalars, samples)

    def ask(
        self,
        batch: PairedBatch,
        step: int | None = None,
        measure: bool = False,
    ) -> Signal | None:
        """Return the teacher's signal that `forward` needs for a batch at that step, on the teacher's device.

        Asked before the student works on the batches before it, a teacher on another GPU computes at the same time.
        None where no term needs the teacher, and where it is elsewhere: it begins its answer, and `forward` waits for
        the rest of it.
        """
        self._check_batch(batch)
        weights = self.curriculum.weights(step)
        terms = self._terms_to_compute(batch, weights, measure, signal=None)

        begin = getattr(self.teacher, "begin", None)
        if isinstance(self.teacher, TeacherMixture):
            begin = partial(self.teacher.begin, progress=self.curriculum.progress(step))
        if begin is not None and terms - TEXT_TERMS and begin(batch, self.loss_config.top_k):
            return None
        return self._ask(batch, terms, step)

    # --- before a forward ---------------------------------------------------------------------------------------------

    def _check_batch(self, batch: Any) -> None:
        """Refuse a batch of another pair by its sizes, which are known without a look at a GPU."""
        expect("batch", batch, PairedBatch, A_BATCH)
        # A batch that no collator made may not know its vocabularies.
        if batch.vocabulary_sizes is None:
            return

        model_rows = (self._student_rows, self._teacher_rows)
        for side, size, rows in zip(("student", "teacher"), batch.vocabulary_sizes, model_rows, strict=True):
            if rows is not None and size > rows:
                raise ValueError(
                    f"batch: got tokens of a {side} with {size:,}, and this {side} has {rows:,}; expected a "
                    "PairCollator with the framework's vocabulary map, or are student and teacher swapped?"
                )

    def _ask(self, batch: PairedBatch, terms: set[str], step: int | None) -> Signal | None:
        """Return the teacher's signal, with hidden states if a term compares them; None if no term needs it."""
        if not terms - TEXT_TERMS:
            return None
        layers = self.router.teacher_layers if terms & {*ROUTER_TERMS} else ()
        if isinstance(self.teacher, TeacherMixture):
            progress = self.curriculum.progress(step)
            return self.teacher.signal(batch, self.loss_config.top_k, layers, progress=progress)
        return self.teacher.signal(batch, self.loss_config.top_k, layers)

    def _terms_to_compute(
        self,
        batch: PairedBatch,
        weights: Mapping[str, float],
        measure: bool,
        signal: Signal | None,
    ) -> set[str]:
        """Return the terms with a weight, and with `measure` also those of the others that can be computed.

        Without a teacher and without its signal that is LM alone.

        Raises:
            ValueError: a hidden-state term with a weight cannot, for lack of anchors, states or a router.
        """
        weighted = {name for name, weight in weights.items() if weight}
        terms = {*weights} if measure else weighted
        if isinstance(self.teacher, TeacherMixture):
            terms -= SINGLE_TEACHER_TERMS

        if self.teacher is None and signal is None:
            impossible = sorted(weighted - TEXT_TERMS)
            if impossible:
                warnings.warn(
                    f"{', '.join(impossible)} cannot be computed without a teacher, and LM alone is learned; give "
                    "DistillationFramework a teacher, or these terms the weight 0",
                    stacklevel=3,
                )
            return terms & TEXT_TERMS

        if batch.places is not None:
            terms = self._without_span(terms, weighted)

        # A hidden-state term that cannot be computed is an error if it is to teach, and else left unmeasured.
        obstacle = self._obstacle_to_routing(batch, signal)
        if not obstacle:
            return terms
        impossible = [name for name in ROUTER_TERMS if name in weighted]
        if impossible:
            raise ValueError(f"cannot compute {', '.join(impossible)}: {obstacle}")
        return terms - {*ROUTER_TERMS}

    @staticmethod
    def _without_span(terms: set[str], weighted: set[str]) -> set[str]:
        """Return the terms that a teacher serves which is only asked about chosen positions."""
        if "span" in weighted:
            raise ValueError(
                "cannot compute span: got windows whose positions were chosen before training, and the teacher is not "
                "asked for the probability of all of their text; give span the weight 0, or choose with another "
                "select_by than first_student"
            )
        return terms - {"span"}

    def _obstacle_to_routing(self, batch: PairedBatch, signal: Signal | None) -> str:
        """Return what the terms on hidden states lack, with the remedy; empty where they lack nothing."""
        if batch.anchors is None:
            return "the batch has no anchors; give PairCollator the RouterConfig"
        if signal is not None and signal.hidden is None:
            return "the signal has no hidden states; ask FrozenTeacher.signal for router.teacher_layers"
        return "there is no router" if self.router is None else ""

    def _warn_if_not_calibrated(self) -> None:
        """Warn once of a router that compares the teacher's states as they are."""
        if self.router.is_calibrated or self._has_warned:
            return

        self._has_warned = True
        warnings.warn(
            "the router is not calibrated: a few huge channels of the teacher's states outweigh the others; call "
            "DistillationFramework.calibrate(batches) before the first step",
            stacklevel=3,
        )

    # --- the terms ----------------------------------------------------------------------------------------------------

    def _head_terms(
        self,
        batch: PairedBatch,
        states: Tensor,
        signal: Signal | None,
        scalars: Mapping[str, float],
        statistics: Mapping[str, float],
        *,
        with_target: bool,
    ) -> HeadTerms:
        """Return what computes lm, kd and span from the states [B, S, H] that enter the student's head."""
        return HeadTerms(
            student=self.student,
            batch=batch,
            states=states.flatten(0, 1)[batch.supervised],
            config=self.loss_config,
            scalars=scalars,
            # Span likelihood and sample weights alone look at it, of a single teacher.
            signal=None if isinstance(signal, MixtureSignal) else signal,
            target=self._target(batch, signal) if with_target else None,
            mean_score=statistics.get("samples"),
        )

    def _hidden_state_terms(
        self,
        batch: PairedBatch,
        hidden: Sequence[Tensor],
        signal: Signal,
        names: Sequence[str],
        weights: Mapping[str, float],
    ) -> dict[str, LossTerm]:
        """Compute terms on hidden states: those with a weight, then the others without a gradient."""
        learned = [name for name in names if weights[name]]
        measured = [name for name in names if not weights[name]]

        # Apart, so that a measured term leaves no graph and changes no gradient of a learned one.
        sums: dict[str, Tensor] = {}
        if learned:
            sums |= self.router(hidden, signal.hidden, batch.anchors, {*learned})
        if measured:
            with torch.no_grad():
                sums |= self.router(hidden, signal.hidden, batch.anchors, {*measured})

        terms = {}
        for name in [*learned, *measured]:
            terms[name] = LossTerm(sums[name], batch.counts[name])
        return terms

    def _no_loss(self) -> Tensor:
        """Return a zero that backward() accepts."""
        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return sum(parameter.sum() * 0 for parameter in trained)

    def _target(
        self,
        batch: PairedBatch,
        signal: Signal,
        corrected: bool = True,
    ) -> SparseTarget:
        """Return the teacher's distributions on the student's vocabulary."""
        projection = self.projection.to(batch.student_ids.device)
        return projection(signal, batch, corrected)

    # --- beside training ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def compare(self, batch: PairedBatch, signal: Signal | None = None) -> dict[str, float]:
        """Compare student and teacher where both have read exactly the same bytes (depth 0).

        Returns:
            sums over those positions: `agree` (same most probable token), `kl_sum` (KL in nats, at temperature 1, with
            the tail in one bucket), and their `count`.
        """
        agree = 0.0
        kl_sum = 0.0
        count = 0
        for chunk in self._compared(batch, signal):
            best = chunk.teacher.probs.argmax(1, keepdim=True)
            teacher_best = chunk.teacher.ids.gather(1, best)[:, 0]
            agree += float((chunk.logits.argmax(1) == teacher_best).sum())
            kl_sum += float(chunk.kl.sum())
            count += len(chunk.kl)
        return {"agree": agree, "kl_sum": kl_sum, "count": count}

    @torch.no_grad()
    def differences(
        self,
        batch: PairedBatch,
        most: int,
        guesses: int = 3,
        signal: Signal | None = None,
    ) -> list[Difference]:
        """Return the positions at depth 0 where student and teacher differ most, one of a window at most.

        Args:
            most: positions to return, fewer where the batch has fewer windows.
            guesses: likeliest next tokens of either model, at each position.
        """
        width = batch.student_ids.shape[1]
        largest: dict[int, Difference] = {}
        for chunk in self._compared(batch, signal):
            probabilities = chunk.logits.softmax(1)
            positions, divergences = chunk.positions.tolist(), chunk.kl.tolist()
            for row in chunk.kl.argsort(descending=True).tolist():
                window, position = divmod(positions[row], width)
                kl = divergences[row]
                if window in largest and largest[window].kl >= kl:
                    continue

                largest[window] = Difference(
                    window=window,
                    position=position,
                    kl=kl,
                    teacher=_likeliest(chunk.teacher.ids[row], chunk.teacher.probs[row], guesses),
                    student=_likeliest(None, probabilities[row], guesses),
                )
        return sorted(largest.values(), key=lambda difference: -difference.kl)[:most]

    @torch.no_grad()
    def chosen(self, batch: PairedBatch, share: float, signal: Signal | None = None) -> Tensor:
        """Return the flat student positions at which KD is learned under a share, with the models as they are now."""
        self._check_batch(batch)
        if signal is None:
            signal = self.teacher.signal(batch, self.loss_config.top_k)
        signal = signal.to(batch.student_ids.device)

        with evaluating(self.student):
            states = body_states(self.student, batch.student_ids, batch.student_source, batch.student_positions)
            rows = self._head_terms(batch, states, signal, {"select": share}, {}, with_target=True).chosen
        return batch.row_student if rows is None else batch.row_student[rows]

    def _compared(self, batch: PairedBatch, signal: Signal | None) -> Iterator[_Compared]:
        """Yield what both models predict where they have read the same bytes, in chunks of positions."""
        self._check_batch(batch)
        if signal is None:
            signal = self.teacher.signal(batch, self.loss_config.top_k)
        signal = signal.to(batch.student_ids.device)
        # Uncorrected: the correction knows the real next token, of which nothing may be told when measuring.
        target = self._target(batch, signal, corrected=False)
        states = body_states(self.student, batch.student_ids, batch.student_source, batch.student_positions)
        states = states.flatten(0, 1)

        # Chunk by chunk: the logits of all positions may not fit into memory together.
        is_compared = target.valid & (batch.depth == 0)
        rows = is_compared.nonzero()[:, 0]
        most_rows, _ = chunk_rows(vocabulary_size(self.student), rows.device)
        for chunk in rows.split(most_rows):
            if not len(chunk):
                continue

            logits = head_logits(self.student, states[batch.row_student[chunk]])
            teacher = target.rows(chunk)
            yield _Compared(batch.row_student[chunk], logits, teacher, kl_with_bucket(logits, teacher))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[PairedBatch]) -> None:
        """Fit the router's statistics and first projections on some batches of training text, before the first step.

        Raises:
            TypeError: a batch in place of a list of batches.
            ValueError: if no window has a place where both models have read the same bytes, or no term of the
                curriculum needs a router.
        """
        if isinstance(batches, PairedBatch):
            raise TypeError("batches: got one batch, expected a list of batches; put it in brackets: [batch]")
        if self.router is None:
            raise ValueError(
                f"nothing to calibrate: the weights of {', '.join(ROUTER_TERMS)} are 0, so there is no router; leave "
                "calibrate out, or give one of them a weight"
            )

        compared = []
        with evaluating(self.student):
            for batch in batches:
                self._check_batch(batch)
                hidden = self._student_layers(batch)
                # Its hidden states alone are needed: as few tokens as there can be.
                signal = self.teacher.signal(batch, 1, self.router.teacher_layers)
                teacher_hidden = signal.to(batch.student_ids.device).hidden
                compared.append((hidden, teacher_hidden, batch.anchors))
        self.router.calibrate(compared)

    def _student_layers(self, batch: PairedBatch) -> tuple[Tensor, ...]:
        """Return [B, S, H] the student's states after each layer that the router compares."""
        layers = self.router.student_layers
        _, hidden = body_layers(self.student, batch.student_ids, layers, batch.student_source, batch.student_positions)
        return hidden

    @torch.no_grad()
    def routing(self, batch: PairedBatch) -> dict[str, list] | None:
        """Return the mean share of each teacher layer in each student layer's mixture; None where none is learned.

        Returns:
            `student_layers` and `teacher_layers` (counted from 1) and `weights`, one row per student layer.
        """
        self._check_batch(batch)
        if self.router is None or "layer" not in self.curriculum.used:
            return None

        weights = self.router.routing(self._student_layers(batch), batch.anchors)
        return {
            "student_layers": self.router.student_layers,
            "teacher_layers": self.router.teacher_layers,
            "weights": weights.tolist(),
        }

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict]:
        """Return parameters for the optimizer: the student's, then the router's with their own learning rate.

        Only matrices decay (biases and norms are vectors), and of these not the gates, whose zero is their prior.

        Raises:
            TypeError, ValueError: a learning rate or weight decay that is no number, negative, or not finite.
        """
        learning_rate = expect_number("learning_rate", learning_rate)
        weight_decay = expect_number("weight_decay", weight_decay)

        trained = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        groups = [
            {"name": "student", "params": matrices, "lr": learning_rate, "weight_decay": weight_decay},
            {"name": "student", "params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        ]

        if self.router is not None:
            rate = self.router.config.learning_rate
            gates = [self.router.gate, self.router.offset]
            groups += [
                {"name": "router", "params": [self.router.projection], "lr": rate, "weight_decay": weight_decay},
                {"name": "gates", "params": gates, "lr": rate, "weight_decay": 0.0},
            ]
        return groups


def _computed(
    head_terms: HeadTerms,
    shares: Mapping[str, float],
    *,
    term_graphs: bool,
) -> HeadResult:
    """Compute terms of the student's head.

    Args:
        shares: weight / count of each term that is computed.
    """
    result = head_terms.compute(shares)

    # The terms of one pass share one graph; each with a graph of its own takes one pass more.
    if term_graphs:
        for name, share in shares.items():
            if share:
                result.terms[name].sum = head_terms.compute({name: 1.0}).loss
    return result


# ------------------------------------------------------------------------------------------- checks


def _likeliest(ids: Tensor | None, probabilities: Tensor, count: int) -> list[tuple[int, float]]:
    """Return (token, probability) of the likeliest tokens, the first one most.

    Args:
        ids: [K] token of each probability; None: they are of the whole vocabulary, in order.
    """
    values, places = probabilities.topk(min(count, len(probabilities)))
    tokens = places if ids is None else ids[places]

    # Padding has no probability, and no token.
    pairs = zip(tokens.tolist(), values.tolist(), strict=True)
    return [(token, probability) for token, probability in pairs if token >= 0 and probability > 0]


def _check_kinds(
    teacher: Any,
    vocabulary: Any,
    loss: Any,
    curriculum: Any,
    router: Any,
) -> None:
    """Check that the arguments are what they are called, before anything is computed with them."""
    if teacher is not None:
        expect_teacher(teacher)
    expect("loss", loss, LossConfig, "a LossConfig")
    expect("curriculum", curriculum, CurriculumScheduler, "CurriculumScheduler(curriculum, loss, total_steps)")
    if vocabulary is not None:
        expect("vocabulary", vocabulary, VocabularyMap, "the pair's VocabularyMap, or None")
    if router is not None:
        expect("router", router, RouterConfig, "a RouterConfig, or None")


def _check_trainable(student: nn.Module) -> None:
    """Refuse a student without a single parameter to train."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"the student ({type(student).__name__}) has nothing to train: none of its parameters requires a gradient; "
            "give a model of its own, not the teacher's, or call requires_grad_(True) on what is to be trained"
        )


def _check_precision(student: nn.Module) -> None:
    """Refuse a student whose trained parameters are in half precision: small changes of them are lost in rounding."""
    dtypes = {parameter.dtype for parameter in student.parameters() if parameter.requires_grad}
    half = dtypes & {torch.float16, torch.bfloat16}
    if half:
        short_names = sorted(str(dtype).removeprefix("torch.") for dtype in half)
        names = " and ".join(short_names)
        raise ValueError(
            f"the student's trained parameters are {names}, expected float32: load it with "
            "from_pretrained(..., dtype=torch.float32); half precision comes from autocast"
        )


def _check_pair(
    student: nn.Module,
    teacher: Teacher | ListedTeacher | None,
    vocabulary: VocabularyMap | None,
) -> None:
    """Check that student, teacher and vocabulary map belong together."""
    if vocabulary is None:
        if teacher is not None:
            raise ValueError("got a teacher and no vocabulary map; build one with VocabularyMap.build")
        return

    rows = vocabulary_size(student)
    if rows != vocabulary.student_vocab_size:
        raise ValueError(
            f"the vocabulary map is for a student of {vocabulary.student_vocab_size:,} rows, the student's head has "
            f"{rows:,}; build the map with student_vocab_size={rows}, or are student and teacher swapped?"
        )

    if isinstance(teacher, TeacherMixture):
        for member in teacher.members:
            _check_pair(student, member.teacher, member.vocabulary)
        return

    # A cached teacher holds the running one, or none.
    running = teacher.teacher if isinstance(teacher, CachedTeacher) else teacher
    if running is None:
        return

    if isinstance(running, ListedTeacher) or running.model is None:  # elsewhere: there are no weights to look at
        return
    if not np.array_equal(running.vocabulary_order, vocabulary.order):
        raise ValueError(
            "the teacher was made with another vocabulary map; expected one map for FrozenTeacher, PairCollator and "
            "DistillationFramework"
        )
    teacher_ids = {id(parameter) for parameter in running.model.parameters()}
    if any(id(parameter) in teacher_ids for parameter in student.parameters()):
        raise ValueError(
            "student and teacher share weights, and the teacher's are frozen; load the model a second time for the "
            "teacher"
        )


def _checked_statistics(
    statistics: Mapping[str, float] | None,
    curriculum: CurriculumScheduler,
    step: int | None,
) -> Mapping[str, float]:
    """Return statistics, none as an empty mapping; refuse wrong ones, and none where a curriculum uses them.

    Before the first step there is nothing to know, and empty ones say so of any step.
    """
    if statistics is None and step and curriculum.uses_statistics:
        raise ValueError(
            f"got no statistics in step {step}, expected those of the steps before, of which curriculum.balance and "
            "sample_weights are made; train with `fit`, which gives them, or leave both settings out"
        )
    if statistics is None:
        return {}

    expect("statistics", statistics, Mapping, "a mapping of names to numbers, as `fit` gives it")
    for name, value in statistics.items():
        if name not in STATISTICS:
            raise ValueError(f"statistics: got {name!r}, expected names out of {', '.join(STATISTICS)}")
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(
                f"statistics[{name!r}]: got {value!r}, expected a finite number; where a step has none, keep the one "
                "of the step before, as `fit` does"
            )
    return statistics


def _check_terms_of_mixture(curriculum: CurriculumScheduler) -> None:
    """Refuse terms, and weights of windows, that need a single teacher."""
    if curriculum.weights_windows:
        raise ValueError("got sample_weights and several teachers; expected 0, or one teacher beside whom to weigh")

    terms = sorted(curriculum.used & SINGLE_TEACHER_TERMS)
    if terms:
        raise ValueError(
            f"got a weight for {', '.join(terms)} and several teachers, whose spans of text differ; expected the "
            "weight 0, or one teacher"
        )


def _checked_counts(
    counts: Any,
    batch: PairedBatch,
    terms: set[str],
) -> dict[str, int]:
    """Return the items of some terms in the step, each at least as many as the batch alone has."""
    remedy = "expected the sum of batch.counts over the step"
    expect("counts", counts, Mapping, f"a dict, {remedy.removeprefix('expected ')}")
    lacking = sorted(terms - counts.keys())
    if lacking:
        raise ValueError(f"counts: got none for {', '.join(lacking)}; {remedy}")

    items = {}
    for term in terms:
        items[term] = expect_count(f"counts[{term!r}]", counts[term], 0, remedy)
        # The items of a filler are in no count of the step.
        least = 0 if batch.is_filler else int(batch.counts[term])
        if items[term] < least:
            raise ValueError(f"counts[{term!r}]: got {items[term]}, and this batch alone has {least}; {remedy}")
    return items


def _check_loss(loss: LossConfig, of_curriculum: LossConfig) -> None:
    """Refuse two values for one thing: of temperatures those of the curriculum would be taken without a word."""
    differing = []
    for name, value in vars(loss).items():
        curriculum_value = getattr(of_curriculum, name)
        if value != curriculum_value:
            differing.append(f"loss.{name}: got {value} here and {curriculum_value} in CurriculumScheduler")
    if differing:
        raise ValueError(f"{'; '.join(differing)}; expected one LossConfig for both")
