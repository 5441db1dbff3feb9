"""DistillationFramework: student, frozen teacher and curriculum as one module with one forward.

Shapes: B windows, S student positions, n supervised student positions, N KD rows, H student width.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import LossConfig, RouterConfig
from .curriculum import CurriculumScheduler
from .language_model import (
    body_layers,
    body_states,
    check_head,
    depth_and_width,
    evaluating,
    head_logits,
    logit_options,
    vocabulary_size,
)
from .losses import head_passes
from .losses.chunk_size import chunk_rows
from .losses.fused_head import head_losses
from .losses.losses import outcome_log_probs, span_loss, span_sums
from .student_aware_router import ROUTER_TERMS, StudentAwareRouter
from .teacher.frozen import FrozenTeacher
from .teacher.projection import Projection
from .text.vocabulary import VocabularyMap
from .types import A_BATCH, DistillationOutput, LossTerm, PairedBatch, SparseTarget, TeacherSignal
from .validation import expect, expect_count, expect_number

HEAD_TERMS = ("lm", "kd", "span")
"""Terms that come from the student's head."""


class DistillationFramework(nn.Module):
    """Computes the curriculum's loss of a student on a batch.

    Parameters, state and training mode are those of the student and, where the curriculum uses one of its terms, of
    the router; the teacher is held outside of them.

    Args:
        student: a transformers language model, causal or an encoder-decoder as the teacher is.
        teacher: None trains without a teacher (LM term only).
        vocabulary: the pair's vocabulary map; needed with a teacher.
        loss: how the teacher's distribution becomes a loss.
        curriculum: weights over the run.
        router: how hidden states are compared. The router starts uncalibrated: see `calibrate`.

    Raises:
        TypeError: an argument of another kind.
        ValueError: for a student whose logits are not head(body(x)), that has nothing to train or that is trained in
            half precision; for a student, a teacher and a vocabulary map that do not belong together; for
            hidden-state terms without a teacher; for a curriculum that was made for another LossConfig.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        vocabulary: VocabularyMap | None,
        loss: LossConfig,
        curriculum: CurriculumScheduler,
        router: RouterConfig | None = None,
    ) -> None:
        super().__init__()
        _check_kinds(teacher, vocabulary, loss, curriculum, router)
        check_head(student, "student")
        _check_pair(student, teacher, vocabulary)
        _check_trainable(student)
        _check_precision(student)
        _check_loss(loss, curriculum.loss)
        self.student = student
        # in a tuple, out of reach of parameters(), state_dict(), train(), to() and DDP
        self._frozen = (teacher,)
        self.loss_config = loss  # not `config`, which transformers.Trainer takes for a model's own
        self.curriculum = curriculum
        self.projection = None if vocabulary is None else Projection(vocabulary, loss.correction, loss.min_prefix_mass)
        self._student_rows = vocabulary_size(student)
        self._teacher_rows = None if vocabulary is None else len(vocabulary.order)
        self.router: StudentAwareRouter | None = None
        self._has_warned = False
        if routed := curriculum.used & {*ROUTER_TERMS}:
            if teacher is None:
                raise ValueError(f"got weights for {', '.join(sorted(routed))} and no teacher, whose states they need")
            config = router or RouterConfig()
            self.router = StudentAwareRouter(config, depth_and_width(student), depth_and_width(teacher.model))
            self.router.to(next(student.parameters()).device)
        self._place_projection()

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
    def teacher(self) -> FrozenTeacher | None:
        return self._frozen[0]

    @property
    def couples_windows(self) -> bool:
        """The contrastive term is computed: it compares the windows of a forward, over all processes.

        A router computes it also with a weight of 0, wherever terms are measured.
        """
        return self.router is not None

    def forward(
        self,
        batch: PairedBatch,
        step: int | None = None,
        *,
        counts: dict[str, int] | None = None,
        measure: bool = False,
        signal: TeacherSignal | None = None,
        term_graphs: bool = False,
    ) -> DistillationOutput:
        """Loss of a batch under the weights of an optimizer step.

        Args:
            batch: windows from `PairCollator`.
            step: optimizer step, counted from 0; None stands for the end of the curriculum. Nothing is logged or
                kept in either case.
            counts: items of every term in the whole optimizer step, over all micro-batches and processes (the sum of
                `batch.counts`); None: this batch is the whole step.
            measure: also measure, without gradient, terms whose weight is 0.
            signal: what the teacher said about this batch, if it is known already (`ask`).
            term_graphs: give lm, kd and span graphs of their own, for a look at each one's gradient, at the price of
                one more pass of the head for each. Without it only the total has a graph with them in it.

        Returns:
            the weighted total and the raw terms (sum, count).
        """
        self._check_batch(batch)
        weights, scalars = self.curriculum.weights(step), self.curriculum.scalars(step)
        if not self.curriculum.used and not measure:
            raise ValueError(
                f"curriculum: got 0 for every weight, and nothing is learned; give one of {', '.join(weights)} a "
                "weight, or ask for the terms alone with measure=True"
            )
        counts = batch.counts if counts is None else counts
        wanted = self._wanted(batch, {t for t in weights if weights[t] or measure}, signal, weights)
        counts = _checked_counts(counts, batch, wanted)
        routed = wanted & {*ROUTER_TERMS}
        if routed:
            self._warn_if_not_calibrated()
        if signal is None:
            signal = self._ask(batch, wanted)
        signal = None if signal is None else signal.to(batch.student_ids.device)
        layers = self.router.student_layers if routed else ()
        states, hidden = body_layers(self.student, batch.student_ids, layers, batch.student_source)
        shares = {t: weights[t] / max(counts[t], 1) for t in wanted}
        head, terms = self._head_terms(batch, states, wanted, shares, scalars, signal)
        if term_graphs:
            for t in {t for t in wanted & {*HEAD_TERMS} if weights[t]}:
                terms[t].sum, _ = self._head_terms(batch, states, {t}, {t: 1.0}, scalars, signal)
        for taught in (True, False):
            of = {t for t in routed if bool(weights[t]) == taught}
            if of:
                with torch.set_grad_enabled(torch.is_grad_enabled() and taught):
                    sums = self.router(hidden, signal.hidden, batch.anchors, of)
                    terms |= {t: LossTerm(sums[t], batch.counts[t]) for t in ROUTER_TERMS if t in of}
        used = [terms[t].sum * shares[t] for t in ROUTER_TERMS if t in routed and weights[t]]
        used += [head] if any(weights[t] for t in wanted & {*HEAD_TERMS}) else []
        loss = torch.stack(used).sum() if used else self._no_loss()
        return DistillationOutput(loss, terms, weights, {**scalars, "top_k": self.loss_config.top_k})

    def ask(self, batch: PairedBatch, step: int | None = None, measure: bool = False) -> TeacherSignal | None:
        """What `forward` needs to know of the teacher about a batch at that step, on the teacher's device.

        Asked before the student works on the batches before it, a teacher on another GPU computes at the same time.
        None where no term needs the teacher.
        """
        self._check_batch(batch)
        weights = self.curriculum.weights(step)
        return self._ask(batch, self._wanted(batch, {t for t in weights if weights[t] or measure}, None, weights))

    def _check_batch(self, batch: Any) -> None:
        """Refuse a batch of another pair by its sizes, which are known without a look at a GPU."""
        expect("batch", batch, PairedBatch, A_BATCH)
        if batch.vocabulary_sizes is None:
            return

        held = (self._student_rows, self._teacher_rows)
        for side, size, rows in zip(("student", "teacher"), batch.vocabulary_sizes, held, strict=True):
            if rows is not None and size > rows:
                raise ValueError(
                    f"batch: got tokens of a {side} with {size:,}, and this {side} has {rows:,}; expected a "
                    "PairCollator with the framework's vocabulary map, or are student and teacher swapped?"
                )

    def _ask(self, batch: PairedBatch, wanted: set[str]) -> TeacherSignal | None:
        if not wanted - {"lm"}:
            return None
        layers = self.router.teacher_layers if wanted & {*ROUTER_TERMS} else ()
        return self.teacher.signal(batch, self.loss_config.top_k, layers)

    def _wanted(
        self, batch: PairedBatch, wanted: set[str], signal: TeacherSignal | None, weights: dict[str, float]
    ) -> set[str]:
        """The terms that can be computed; without a teacher and without its signal that is LM alone.

        Raises:
            ValueError: a hidden-state term with a weight cannot, for lack of anchors, states or a router.
        """
        if self.teacher is None and signal is None:
            if needed := [t for t in sorted(weights) if weights[t] and t != "lm"]:
                warnings.warn(
                    f"{', '.join(needed)} cannot be computed without a teacher, and LM alone is learned; give "
                    "DistillationFramework a teacher, or these terms the weight 0",
                    stacklevel=3,
                )
            return wanted & {"lm"}

        lacks = ""
        if batch.anchors is None:
            lacks = "the batch has no anchors; give PairCollator the RouterConfig"
        elif signal is not None and signal.hidden is None:
            lacks = "the signal has no hidden states; ask FrozenTeacher.signal for router.teacher_layers"
        if self.router is not None and not lacks:
            return wanted
        if needed := [t for t in ROUTER_TERMS if weights[t]]:
            raise ValueError(f"cannot compute {', '.join(needed)}: {lacks or 'there is no router'}")
        return wanted - {*ROUTER_TERMS}

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

    def _no_loss(self) -> Tensor:
        """A zero that backward() accepts."""
        return sum(p.sum() * 0 for p in self.student.parameters() if p.requires_grad)

    def _head_terms(
        self,
        batch: PairedBatch,
        states: Tensor,
        wanted: set[str],
        shares: dict[str, float],
        scalars: dict[str, float],
        signal: TeacherSignal | None,
    ) -> tuple[Tensor, dict[str, LossTerm]]:
        """(sum over terms of share * sum, the terms) of those that come from the student's head.

        Args:
            states: [B, S, H] what enters the head.
            shares: weight / count of every term. Its gradient is computed at once, in one pass over the logits.
        """
        if not wanted & {*HEAD_TERMS}:
            return states.new_zeros(()), {}
        labels, states = batch.labels.flatten()[batch.supervised], states.flatten(0, 1)[batch.supervised]
        head = functools.partial(
            _same_draw(head_losses, states.device),
            states,
            self.student.get_output_embeddings(),
            labels,
            rows=batch.row_supervised,
            compiled=head_passes.choose(self.loss_config.head_passes, states.device)[0],
            **logit_options(self.student),
        )
        lm_share, extra, terms = shares.get("lm", 0.0), 0.0, {}
        if "span" in wanted:
            learns = torch.is_grad_enabled() and bool(shares["span"])
            value, slope, log_probs = self._span_term(batch, signal, head, scalars["span_temperature"], learns)
            terms["span"] = LossTerm(value, batch.counts["span"])
            if slope is None:
                extra = shares["span"] * value
            else:
                # log-probabilities are what LM sums: its weight at each position carries the gradient of this term too
                lm_share = lm_share - shares["span"] * slope
                extra = shares["span"] * (value - (slope * log_probs).sum())
        with_kd: dict = {}
        if "kd" in wanted:
            target = self._target(batch, signal)
            with_kd = {"target": target, **self._kd_options(scalars["temperature"])}
        kd_share = shares.get("kd", 0.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and any(shares[t] for t in wanted & {*HEAD_TERMS})):
            found = head(lm_weight=lm_share, kd_weight=kd_share, **(with_kd if kd_share else {}))
        if "lm" in wanted:
            terms["lm"] = LossTerm(found.lm_sum, batch.counts["lm"])
        if "kd" in wanted:
            kd_sum = found.kd_sum
            if not kd_share:  # measured apart, afterwards: what is learned must not change by a rounding error
                with torch.no_grad():
                    kd_sum = head(lm_weight=0.0, **with_kd).kd_sum
            terms["kd"] = LossTerm(kd_sum, batch.counts["kd"], skipped=(~target.valid).sum())
        return found.loss + extra, {t: terms[t] for t in HEAD_TERMS if t in terms}

    def _target(self, batch: PairedBatch, signal: TeacherSignal, corrected: bool = True) -> SparseTarget:
        return self.projection.to(batch.student_ids.device)(signal, batch, corrected)

    def _kd_options(self, temperature: float) -> dict:
        c = self.loss_config
        return {"temperature": temperature, "kind": c.divergence, "tail": c.tail, "skew": c.skew}

    def _span_term(
        self,
        batch: PairedBatch,
        signal: TeacherSignal,
        head: Callable,
        temperature: float,
        learns: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """(sum over spans, its derivative [n] by the log-probability of each label if it `learns`, these [n])."""
        with torch.no_grad():
            log_probs = head(lm_weight=0.0).log_probs
        teacher = span_sums(signal.realised, batch.teacher_spans.flatten()[batch.teacher_held], batch.counts["span"])
        c = self.loss_config
        with torch.set_grad_enabled(learns):
            leaf = log_probs.clone().requires_grad_(learns)
            student = span_sums(leaf, batch.student_spans.flatten()[batch.supervised], batch.counts["span"])
            value = span_loss(student, teacher, temperature=temperature, kind=c.divergence, skew=c.skew)
            slope = torch.autograd.grad(value, leaf)[0] if learns else None
        return value.detach(), slope, log_probs

    @torch.no_grad()
    def compare(self, batch: PairedBatch, signal: TeacherSignal | None = None) -> dict[str, float]:
        """How close the student is to the teacher where both have read exactly the same bytes (depth 0).

        Returns:
            sums over those positions: `agree` (same most probable token), `kl_sum` (KL in nats, at temperature 1, with
            the tail in one bucket), and their `count`.
        """
        self._check_batch(batch)
        signal = (signal or self.teacher.signal(batch, self.loss_config.top_k)).to(batch.student_ids.device)
        target = self._target(batch, signal, corrected=False)
        states = body_states(self.student, batch.student_ids, batch.student_source)
        rows = (target.valid & (batch.depth == 0)).nonzero()[:, 0]
        agree = kl_sum = 0.0
        for some in rows.split(chunk_rows(vocabulary_size(self.student), rows.device)[0]):
            logits = head_logits(self.student, states.flatten(0, 1)[batch.row_student[some]])
            part = SparseTarget(target.ids[some], target.probs[some], target.tail[some], target.valid[some])
            best = part.ids.gather(1, part.probs.argmax(1, keepdim=True))[:, 0]
            log_p, log_q = outcome_log_probs(logits, part, "bucket")
            agree += float((logits.argmax(1) == best).sum())
            kl_sum += float((log_p.exp() * (log_p - log_q)).sum())
        return {"agree": agree, "kl_sum": kl_sum, "count": len(rows)}

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

        found = []
        with evaluating(self.student):
            for batch in batches:
                self._check_batch(batch)
                hidden = self._student_layers(batch)
                signal = self.teacher.signal(batch, 1, self.router.teacher_layers).to(batch.student_ids.device)
                found.append((hidden, signal.hidden, batch.anchors))
        self.router.calibrate(found)

    def _student_layers(self, batch: PairedBatch) -> tuple[Tensor, ...]:
        layers = self.router.student_layers
        return body_layers(self.student, batch.student_ids, layers, batch.student_source)[1]

    @torch.no_grad()
    def routing(self, batch: PairedBatch) -> dict[str, list] | None:
        """Mean share of each teacher layer in the mixture of each student layer; None where no mixture is learned.

        Returns:
            `student_layers` and `teacher_layers` (counted from 1) and `weights`, one row per student layer.
        """
        self._check_batch(batch)
        if self.router is None or "layer" not in self.curriculum.used:
            return None
        weights = self.router.routing(self._student_layers(batch), batch.anchors)
        layers = {"student_layers": self.router.student_layers, "teacher_layers": self.router.teacher_layers}
        return {**layers, "weights": weights.tolist()}

    def parameter_groups(self, learning_rate: float, weight_decay: float) -> list[dict]:
        """Parameters for the optimizer: the student's, then the router's with their own learning rate.

        Only matrices decay (biases and norms are vectors), and of these not the gates, whose zero is their prior.

        Raises:
            TypeError, ValueError: a learning rate or weight decay that is no number, negative, or not finite.
        """
        learning_rate = expect_number("learning_rate", learning_rate)
        weight_decay = expect_number("weight_decay", weight_decay)
        student = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            ("student", [p for p in student if p.ndim >= 2], learning_rate, weight_decay),
            ("student", [p for p in student if p.ndim < 2], learning_rate, 0.0),
        ]
        if (router := self.router) is not None:
            groups += [
                ("router", [router.projection], router.config.learning_rate, weight_decay),
                ("gates", [router.gate, router.offset], router.config.learning_rate, 0.0),
            ]
        return [dict(zip(("name", "params", "lr", "weight_decay"), group, strict=True)) for group in groups]


def _check_kinds(teacher: Any, vocabulary: Any, loss: Any, curriculum: Any, router: Any) -> None:
    """Check that the arguments are what they are called, before anything is computed with them."""
    if isinstance(teacher, nn.Module) or not (teacher is None or hasattr(teacher, "signal")):
        raise TypeError(f"teacher: got a {type(teacher).__name__}, expected FrozenTeacher(model, vocabulary), or None")

    expect("loss", loss, LossConfig, "a LossConfig")
    expect("curriculum", curriculum, CurriculumScheduler, "CurriculumScheduler(curriculum, loss, total_steps)")
    if vocabulary is not None:
        expect("vocabulary", vocabulary, VocabularyMap, "the pair's VocabularyMap, or None")
    if router is not None:
        expect("router", router, RouterConfig, "a RouterConfig, or None")


def _check_trainable(student: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            f"the student ({type(student).__name__}) has nothing to train: none of its parameters requires a gradient; "
            "give a model of its own, not the teacher's, or call requires_grad_(True) on what is to be trained"
        )


def _check_precision(student: nn.Module) -> None:
    """Refuse a student whose trained parameters are in half precision: small changes of them are lost in rounding."""
    trained = {p.dtype for p in student.parameters() if p.requires_grad}
    if half := trained & {torch.float16, torch.bfloat16}:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in half))
        raise ValueError(
            f"the student's trained parameters are {names}, expected float32: load it with "
            "from_pretrained(..., dtype=torch.float32); half precision comes from autocast"
        )


def _check_pair(student: nn.Module, teacher: FrozenTeacher | None, vocabulary: VocabularyMap | None) -> None:
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

    # One that answers from memory holds the running teacher, or none.
    running = teacher if isinstance(teacher, FrozenTeacher) else getattr(teacher, "teacher", None)
    if running is None:
        return
    if not np.array_equal(running.vocabulary_order, vocabulary.order):
        raise ValueError(
            "the teacher was made with another vocabulary map; expected one map for FrozenTeacher, PairCollator and "
            "DistillationFramework"
        )
    of_teacher = {id(parameter) for parameter in running.model.parameters()}
    if any(id(parameter) in of_teacher for parameter in student.parameters()):
        raise ValueError(
            "student and teacher share weights, and the teacher's are frozen; load the model a second time for the "
            "teacher"
        )


def _checked_counts(counts: Any, batch: PairedBatch, wanted: set[str]) -> dict[str, int]:
    """Return the items of each wanted term in the step, which are no fewer than the batch alone has."""
    remedy = "expected the sum of batch.counts over the step"
    expect("counts", counts, Mapping, f"a dict, {remedy.removeprefix('expected ')}")
    if lacking := sorted(wanted - counts.keys()):
        raise ValueError(f"counts: got none for {', '.join(lacking)}; {remedy}")

    items = {}
    for term in wanted:
        items[term] = expect_count(f"counts[{term!r}]", counts[term], 0, remedy)
        least = 0 if batch.is_filler else int(batch.counts[term])
        if items[term] < least:
            raise ValueError(f"counts[{term!r}]: got {items[term]}, and this batch alone has {least}; {remedy}")
    return items


def _check_loss(loss: LossConfig, of_curriculum: LossConfig) -> None:
    """Refuse two values for one thing: of temperatures those of the curriculum would be taken without a word."""
    differing = []
    for name, given in vars(loss).items():
        if given != (taken := getattr(of_curriculum, name)):
            differing.append(f"loss.{name}: got {given} here and {taken} in CurriculumScheduler")
    if differing:
        raise ValueError(f"{'; '.join(differing)}; expected one LossConfig for both")


def _same_draw(function: Callable, device: torch.device) -> Callable:
    """`function`, in which every call draws the same random numbers: all passes of a head with dropout (an adapter's,
    for one) see one mask, however many passes are measured besides."""

    def call(*args, **options):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            return function(*args, **options)

    return call
