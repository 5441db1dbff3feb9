"""DistillationFramework: student, frozen teacher and curriculum as one module with one forward.

Shapes: B windows, S student positions, n supervised student positions, N KD rows, H student width.
"""

import torch
from torch import Tensor, nn

from .causal_lm import body_states, check_head, head_logits
from .config import LossConfig
from .curriculum import CurriculumScheduler
from .losses import kd_loss, next_token_loss, outcome_log_probs, span_loss, span_sums
from .outputs import IGNORE, DistillationOutput, LossTerm, PairedBatch, SparseTarget, TeacherSignal
from .projection import Projection
from .teacher import FrozenTeacher
from .vocabulary import VocabularyMap

HEAD_TERMS = ("lm", "kd", "span")
"""Terms that come from the student's head."""


class DistillationFramework(nn.Module):
    """Computes the curriculum's loss of a student on a batch.

    Parameters, state and training mode are the student's; the teacher is held outside of them.

    Args:
        student: a transformers causal language model.
        teacher: None trains without a teacher (LM term only).
        vocabulary: the pair's vocabulary map; needed with a teacher.
        loss: how the teacher's distribution becomes a loss.
        curriculum: weights over the run.

    Raises:
        ValueError: for a student whose logits are not head(body(x)), and for a teacher without a vocabulary map.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        vocabulary: VocabularyMap | None,
        loss: LossConfig,
        curriculum: CurriculumScheduler,
    ) -> None:
        super().__init__()
        check_head(student, "student")
        if teacher is not None and vocabulary is None:
            raise ValueError("got a teacher and no vocabulary map; build one with VocabularyMap.build")
        self.student = student
        # in a tuple, out of reach of parameters(), state_dict(), train(), to() and DDP
        self._frozen = (teacher,)
        self.config = loss
        self.curriculum = curriculum
        self.projection = None if teacher is None else Projection(vocabulary, loss.correction, loss.min_prefix_mass)

    @property
    def teacher(self) -> FrozenTeacher | None:
        return self._frozen[0]

    def forward(
        self,
        batch: PairedBatch,
        step: int | None = None,
        *,
        counts: dict[str, int] | None = None,
        measure: bool = False,
        signal: TeacherSignal | None = None,
    ) -> DistillationOutput:
        """Loss of a batch under the weights of an optimizer step.

        Args:
            batch: windows from `PairCollator`.
            step: optimizer step, counted from 0; None stands for the end of the curriculum. Nothing is logged or
                kept in either case.
            counts: items of every term in the whole optimizer step, over all micro-batches and processes (the sum of
                `batch.counts`); None: this batch is the whole step.
            measure: also measure, without gradient, terms whose weight is 0.
            signal: what the teacher said about this batch, if it is known already (`FrozenTeacher.signal`).

        Returns:
            the weighted total and the raw terms (sum, count).
        """
        weights, scalars = self.curriculum.weights(step), self.curriculum.scalars(step)
        counts = batch.counts if counts is None else counts
        wanted = {t for t in HEAD_TERMS if weights[t] or measure}
        if self.teacher is None and signal is None:
            wanted &= {"lm"}
        terms = self._head_terms(batch, wanted, weights, scalars, signal)
        used = [term.sum * (weights[t] / max(int(counts[t]), 1)) for t, term in terms.items() if weights[t]]
        loss = torch.stack(used).sum() if used else self._no_loss()
        return DistillationOutput(loss, terms, weights, {**scalars, "top_k": self.config.top_k})

    def _no_loss(self) -> Tensor:
        """A zero that backward() accepts."""
        return sum(p.sum() * 0 for p in self.student.parameters() if p.requires_grad)

    def _head_terms(
        self,
        batch: PairedBatch,
        wanted: set[str],
        weights: dict[str, float],
        scalars: dict[str, float],
        signal: TeacherSignal | None,
    ) -> dict[str, LossTerm]:
        """The terms that come from the student's head."""
        if not wanted:
            return {}
        if wanted & {"kd", "span"} and signal is None:
            signal = self.teacher.signal(batch, self.config.top_k)
        logits, labels, position = self._supervised_logits(batch)
        terms = {}
        if "lm" in wanted:
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights["lm"] != 0):
                terms["lm"] = LossTerm(next_token_loss(logits, labels), batch.counts["lm"])
        if "kd" in wanted:
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights["kd"] != 0):
                rows = logits[torch.searchsorted(position, batch.row_student)]
                target = self._target(batch, signal)
                value = kd_loss(rows, target, **self._kd_options(scalars["temperature"]))
                terms["kd"] = LossTerm(value, batch.counts["kd"], skipped=(~target.valid).sum())
        if "span" in wanted:
            with torch.set_grad_enabled(torch.is_grad_enabled() and weights["span"] != 0):
                value = self._span_term(batch, signal, logits, labels, position, scalars["span_temperature"])
                terms["span"] = LossTerm(value, batch.counts["span"])
        return terms

    def _supervised_logits(self, batch: PairedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """([n, V] float32 logits, [n] labels, [n] flat positions) where the student is supervised."""
        position = (batch.labels.flatten() != IGNORE).nonzero()[:, 0]
        states = body_states(self.student, batch.student_ids, batch.student_mask).flatten(0, 1)
        return head_logits(self.student, states[position]), batch.labels.flatten()[position], position

    def _target(self, batch: PairedBatch, signal: TeacherSignal, corrected: bool = True) -> SparseTarget:
        return self.projection.to(batch.student_ids.device)(signal, batch, corrected)

    def _kd_options(self, temperature: float) -> dict:
        c = self.config
        return {"temperature": temperature, "kind": c.divergence, "tail": c.tail, "skew": c.skew}

    def _span_term(
        self,
        batch: PairedBatch,
        signal: TeacherSignal,
        logits: Tensor,
        labels: Tensor,
        position: Tensor,
        temperature: float,
    ) -> Tensor:
        log_probs = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        student = span_sums(log_probs, batch.student_spans.flatten()[position], batch.counts["span"])
        held = batch.teacher_mask.flatten().bool()
        teacher = span_sums(signal.realised, batch.teacher_spans.flatten()[held], batch.counts["span"])
        c = self.config
        return span_loss(student, teacher, temperature=temperature, kind=c.divergence, skew=c.skew)

    @torch.no_grad()
    def compare(self, batch: PairedBatch, signal: TeacherSignal | None = None) -> dict[str, float]:
        """How close the student is to the teacher where both have read exactly the same bytes (depth 0).

        Returns:
            sums over those positions: `agree` (same most probable token), `kl_sum` (KL in nats, at temperature 1, with
            the tail in one bucket), and their `count`.
        """
        signal = signal or self.teacher.signal(batch, self.config.top_k)
        target = self._target(batch, signal, corrected=False)
        logits, _, position = self._supervised_logits(batch)
        rows = target.valid & (batch.depth == 0)
        logits = logits[torch.searchsorted(position, batch.row_student[rows])]
        target = SparseTarget(target.ids[rows], target.probs[rows], target.tail[rows], target.valid[rows])
        best = target.ids.gather(1, target.probs.argmax(1, keepdim=True))[:, 0]
        log_p, log_q = outcome_log_probs(logits, target, "bucket")
        return {
            "agree": float((logits.argmax(1) == best).sum()),
            "kl_sum": float((log_p.exp() * (log_p - log_q)).sum()),
            "count": int(rows.sum()),
        }
