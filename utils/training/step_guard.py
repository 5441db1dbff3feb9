"""What a healthy run does not do: steps that are not finite, losses that jump, and red flags with the likely cause.

Nothing here makes the host wait for the GPU at a step: `StepGuard` decides on the device and tells at logged steps,
`RedFlags` looks at their records and at labels that are still on the host.
"""

import hashlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.comparability import unspelt_text

log = logging.getLogger(__name__)

EXPLAINED_STEPS = 500
"""For so many steps there is an opinion on how low a loss can be."""

LEAST_VOCABULARY = 64
"""Below this size (toy languages) a loss near zero soon is possible, and no opinion is held."""

LOSSY_CAUSE = (
    "a tokenizer with a small vocabulary of whole words, or whose pre-tokenizer drops white space; byte-level BPE "
    "leaves nothing out"
)

LEAST_COVERAGE = 0.5
"""Share of supervised positions with an anchor."""

MOST_KD = 2.0
"""Nats per token; late in training good pairs are at 0.1 to 0.3."""

REMEMBERED_BATCHES = 65_536
"""Hashes kept to find duplicates, of the current epoch."""

MOST_SKIPPED = 20
"""Optimizer steps in a row that are not finite, after which the run stops."""

TOLD = 20
"""So many steps left out are told one by one; from then on ever more rarely."""

MOST_PENDING = 1000
"""Steps whose outcome is kept on the device before the host has to read it."""

SPIKE_WINDOW, SPIKE_LEAST = 128, 32
"""Finite losses that a new one is compared with, and how many there must be."""

SPIKE_DEVIATIONS, SPIKE_SHARE = 6.0, 0.25
"""A spike is so many robust standard deviations, and such a share of the median, above the median."""


class RedFlags:
    """Watches a run.

    Args:
        total_steps: optimizer steps of the whole run.
        vocabulary_size: of the student; ln of it is the loss of knowing nothing.
        warmup_steps: while the learning rate rises.
        initial_loss: LM loss in nats per token of the student as it was before training. If None, the first
            evaluation record at step 0 supplies it, or else ln(vocabulary size) stands in.
        ignore: label of an unsupervised position.
        warn: where a warning goes; None: the log.

    Attributes:
        warned: names of the flags raised so far, in order: `copying`, `duplicate_batch`, `zero_gradient`,
            `scheduler`, `coverage`, `kd_high`, `weak_teacher`, `lossy_tokenizer`.
    """

    def __init__(
        self,
        total_steps: int,
        vocabulary_size: int,
        *,
        warmup_steps: int = 0,
        initial_loss: float | None = None,
        ignore: int = -100,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.total_steps, self.vocabulary_size, self.warmup_steps = total_steps, vocabulary_size, warmup_steps
        self.initial_loss, self.ignore = initial_loss, ignore
        self.warned: list[str] = []
        self._warn = warn or log.warning
        self._epoch: int | None = None
        self._batches: dict[int, None] = {}
        self._last_lr: float | None = None

    @classmethod
    def of_run(
        cls, total_steps: int, warmup_ratio: float, student: nn.Module, start: Mapping[str, Any], *, main: bool
    ) -> "RedFlags":
        """Those of a run that starts from `HeldOut.measure_start`; they speak in the main process only."""
        flags = cls(
            total_steps,
            student.get_output_embeddings().weight.shape[0],
            warmup_steps=math.ceil(warmup_ratio * total_steps),
            initial_loss=start["initial_student"]["loss"],
            warn=None if main else lambda _: None,
        )
        if "teacher" in start:
            flags.models(start["teacher"], start["initial_student"])
        return flags

    def batch(self, labels: Tensor, epoch: int, documents: Sequence[str] = ()) -> None:
        """Look for a batch that was already trained on in this epoch.

        Call it when the batch is consumed, not when it is fetched ahead.

        Args:
            labels: [B, S] on the host, before the transfer to the device.
            epoch: number of the epoch; batches of different epochs may be equal.
            documents: named in the warning.
        """
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, {}
        if "duplicate_batch" in self.warned or not (labels != self.ignore).any():
            return
        digest = hashlib.blake2b(labels.contiguous().numpy().tobytes(), digest_size=8).digest()
        key = int.from_bytes(digest, "big")
        if key in self._batches:
            named = f" (documents {', '.join(documents[:3])})" if documents else ""
            self._raise_flag(
                "duplicate_batch",
                f"a batch was seen twice in epoch {epoch}{named}. Likely cause: duplicate documents in the data "
                "(verify_fixes.py measures them), or workers or processes that read the same part of it",
            )
        self._batches[key] = None
        if len(self._batches) > REMEMBERED_BATCHES:
            del self._batches[next(iter(self._batches))]

    def check(self, record: Mapping[str, Any]) -> None:
        """Look at one record of metrics.jsonl, of a training step or of an evaluation of the student."""
        if "terms" not in record:
            if record["step"] == 0 and self.initial_loss is None:
                self.initial_loss = record["loss"]
            self._check_loss(record["step"], record["loss"], "evaluation loss")
            return
        if "lm" in record["terms"]:
            self._check_loss(record["step"], record["terms"]["lm"]["raw"], "LM loss", record.get("epoch"))
        self._check_gradient(record)
        self._check_scheduler(record)
        if record["terms"].get("kd", {}).get("weight"):
            self._check_kd(record)

    def models(self, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
        """Compare the metrics of the teacher and of the untrained student, where they can be compared."""
        if reason := unspelt_text({"student": student, "teacher": teacher}):
            self._raise_flag("lossy_tokenizer", f"{reason}. Likely cause: {LOSSY_CAUSE}")
        else:
            self.teacher(teacher["bits_per_byte"], student["bits_per_byte"])

    def teacher(self, teacher_bits: float, student_bits: float) -> None:
        """Compare the bits per byte of the teacher and of the untrained student on the same text."""
        if teacher_bits >= student_bits:
            self._raise_flag(
                "weak_teacher",
                f"the teacher ({teacher_bits:.3f} bits per byte) is no better on the evaluation text than the student "
                f"before training ({student_bits:.3f}); distillation will not help. Likely cause: a teacher trained on "
                "other text than this, or the wrong model",
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {
            "warned": list(self.warned),
            "initial_loss": self.initial_loss,
            "epoch": self._epoch,
            "batches": list(self._batches),
            "last_lr": self._last_lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: nothing is said twice, nothing seen is forgotten."""
        self.warned = list(state["warned"])
        self.initial_loss = state["initial_loss"]
        self._epoch = state["epoch"]
        self._batches = dict.fromkeys(islice(state["batches"], REMEMBERED_BATCHES))
        self._last_lr = state["last_lr"]

    def _check_loss(self, step: int, loss: float | None, name: str, epoch: float | None = None) -> None:
        floor = self.lowest_plausible_loss(step)
        repeated = epoch is not None and epoch > 2  # a small text learnt by heart explains a low training loss
        if step > 0 and floor is not None and not repeated and loss is not None and loss < floor:
            self._raise_flag(
                "copying",
                f"{name} {loss:.3f} nats per token at step {step} is lower than so few steps explain "
                f"(ln of the vocabulary is {math.log(self.vocabulary_size):.2f}). Likely cause: labels not shifted by "
                "one, so that the student sees the token it predicts and learns to copy; or training text that "
                "repeats itself",
            )

    def lowest_plausible_loss(self, step: int) -> float | None:
        """Nats per token under which nothing but copying leads within `step` steps; None: no opinion.

        A share of the smaller of ln(vocabulary size) and the initial loss, so that a pretrained student is
        measured against itself: 30 % of it for 100 steps, falling with the logarithm of the step to 10 % at
        `EXPLAINED_STEPS`. Of ln(V), real students end at 15 % (105 characters) to 25 %, after many more steps.
        """
        if step > EXPLAINED_STEPS or self.vocabulary_size < LEAST_VOCABULARY:
            return None
        reference = min(math.log(self.vocabulary_size), self.initial_loss or math.inf)
        way = math.log(max(step, 100) / 100) / math.log(EXPLAINED_STEPS / 100)
        share = 0.3 - 0.2 * way
        # Without a measured start the student may be a pretrained one: only a loss no language has is one too low.
        return share * reference if self.initial_loss is not None else min(share * reference, 0.5)

    def _check_gradient(self, record: Mapping[str, Any]) -> None:
        if record.get("grad_norm") == 0:
            self._raise_flag(
                "zero_gradient",
                f"gradient norm 0 at step {record['step']}: nothing is being learnt. Likely cause: all weights of the "
                "curriculum are 0 here, all positions are masked, or the student is frozen",
            )

    def _check_scheduler(self, record: Mapping[str, Any]) -> None:
        step, lr = record["step"], record["lr"]
        if not max(1, self.warmup_steps) < step < self.total_steps:
            return
        rose = self._last_lr is not None and lr > self._last_lr * (1 + 1e-6)  # a cosine past its end rises again
        if lr == 0 or rose:
            self._raise_flag(
                "scheduler",
                f"the learning rate {'is 0' if lr == 0 else 'rises again'} at step {step} of {self.total_steps}: the "
                "schedule is past its end. Likely cause: it is stepped more than once per optimizer step (for "
                "instance once per process or per micro-batch), or was built for fewer steps",
            )
        self._last_lr = lr

    def _check_kd(self, record: Mapping[str, Any]) -> None:
        anchored = (record.get("coverage") or {}).get("anchored")
        if anchored is not None and anchored < LEAST_COVERAGE:
            self._raise_flag(
                "coverage",
                f"KD covers only {anchored:.1%} of the student's tokens (step {record['step']}). Likely cause: the two "
                "tokenizers cut this text at different places, or one of them changes it (normaliser, lower case); "
                "the other tokens learn from the text alone",
            )
        nats = record.get("kd_nats_per_token")
        if nats is not None and nats > MOST_KD and record["step"] > self.settled_step:
            self._raise_flag(
                "kd_high",
                f"KD is still at {nats:.2f} nats per token at step {record['step']} (healthy late in training: 0.1 to "
                "0.3). Likely cause: a learning rate that is too low or too high, a student that is far too small, or "
                "teacher and student that do not read the same text",
            )

    @property
    def settled_step(self) -> int:
        """From here on a high KD is no longer the start of training: after the warm-up and a quarter of the run."""
        return max(self.warmup_steps, self.total_steps // 4, 200)

    def _raise_flag(self, flag: str, message: str) -> None:
        if flag not in self.warned:
            self.warned.append(flag)
            self._warn(f"[RED FLAG] {message}.")


class Spikes:
    """Counts losses far above the recent ones.

    Compared with the median of the last `SPIKE_WINDOW` finite losses; the deviation is 1.4826 times the median
    absolute deviation, the standard deviation of normal noise. Neither NaN nor spikes move a median by much, and a
    constant loss, whose deviation is 0, is judged by its share.
    """

    def __init__(self) -> None:
        self.total = 0
        self.recent: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def add(self, step: int, loss: float) -> None:
        """Take note of the loss of a step."""
        if not math.isfinite(loss):
            return
        if len(self.recent) >= SPIKE_LEAST:
            middle = median(self.recent)
            deviation = 1.4826 * median(abs(value - middle) for value in self.recent)
            if loss - middle > max(SPIKE_DEVIATIONS * deviation, SPIKE_SHARE * abs(middle)):
                self.total += 1
                if self.total.bit_count() == 1:  # 1, 2, 4, 8, ...
                    log.warning(
                        "loss spike at step %d: %.4g, and the median of the %d steps before is %.4g; spike number %d "
                        "of this run, told ever more rarely",
                        step, loss, len(self.recent), middle, self.total,
                    )  # fmt: skip
        self.recent.append(loss)


@dataclass(frozen=True)
class _Step:
    """What is known of a step before the host reads its outcome."""

    step: int
    documents: list[Sequence[str]]
    """By micro-batch of this process."""
    terms: list[list[str]]
    finite: list[Tensor]
    """By micro-batch: for each of its terms, whether its value is finite; [terms] on the device."""
    outcome: Tensor
    """[2] on the device: the loss over all processes, and 1 if the step was left out."""


class StepGuard:
    """Leaves out steps whose loss or gradient is not finite, and names the text; counts loss spikes.

    Args:
        total: tensor -> its sum over all processes, on the device.
        gather: list -> the lists of all processes, joined.
        scaled: with a gradient scaler, which decides itself and looks for its scale by leaving steps out.

    Attributes:
        skipped: steps left out so far.
        exhausted: the last `MOST_SKIPPED` steps were left out.
    """

    def __init__(self, total: Callable[[Tensor], Tensor], gather: Callable[[list], list], scaled: bool) -> None:
        self._total, self._gather, self._scaled = total, gather, scaled
        self.skipped = self._row = 0
        self.exhausted = False
        self.spikes = Spikes()
        self._micro_batches: list[tuple[Sequence[str], list[str], Tensor, Tensor]] = []
        self._pending: list[_Step] = []

    def look(self, output: Any, documents: Sequence[str]) -> None:
        """Take note of a micro-batch: its loss, and which of the terms that weigh something are finite."""
        names = [name for name in output.terms if output.weights[name]]
        loss = output.loss.detach()
        values = torch.stack([output.terms[name].sum.detach().to(loss.dtype) for name in names] or [loss])
        self._micro_batches.append((documents, names, values.isfinite(), loss))

    def forget(self) -> None:
        """Take back the notes on a step that is done again."""
        self._micro_batches = []

    def decide(self, step: int, norm: Tensor) -> Tensor:
        """Whether the step that ends now is to be left out, as a scalar bool tensor. `step`: counted from 1."""
        seen, self._micro_batches = self._micro_batches, []
        loss = torch.stack([loss for *_, loss in seen]).sum() if seen else torch.zeros_like(norm)
        loss = self._total(loss.to(norm.device, torch.float32))
        is_bad = ~norm.isfinite() if self._scaled else ~(norm.isfinite() & loss.isfinite())
        outcome = torch.stack([loss, is_bad.float()])
        documents, terms, finite = ([part[i] for part in seen] for i in range(3))
        self._pending.append(_Step(step, documents, terms, finite, outcome))
        return is_bad

    @property
    def must_read(self) -> bool:
        return len(self._pending) >= MOST_PENDING

    def read(self) -> None:
        """Tell what happened since the last time; the one place that waits for the device. Call it in all processes."""
        pending, self._pending = self._pending, []
        outcomes = torch.stack([step.outcome for step in pending]).tolist() if pending else []
        for seen, (loss, is_bad) in zip(pending, outcomes, strict=True):
            self._row = self._row + 1 if is_bad else 0
            self.exhausted = self.exhausted or self._row >= MOST_SKIPPED
            if not is_bad:
                self.spikes.add(seen.step, loss)
                continue
            self.skipped += 1
            if self.skipped <= TOLD or self.skipped.bit_count() == 1:
                self._tell(seen, loss)

    def explanation(self, step: int) -> str:
        """Why the run stops at this step."""
        return (
            f"loss or gradient were not finite in {MOST_SKIPPED} optimizer steps in a row or more (up to step {step}), "
            "so none of them was taken. The log names their documents. Likely cause: a learning rate that is too high, "
            "activations that overflow in half precision (try --mixed-precision no and --set teacher.dtype=float32), "
            "or weights that were damaged before. The checkpoint of this step has the weights from before the first "
            "of them."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint; `read` first."""
        recent = list(self.spikes.recent)
        return {"skipped": self.skipped, "in_a_row": self._row, "spikes": self.spikes.total, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.skipped, self._row, self.spikes.total = state["skipped"], state["in_a_row"], state["spikes"]
        self.spikes.recent.clear()
        self.spikes.recent.extend(state["recent"])

    def _tell(self, seen: _Step, loss: float) -> None:
        found = []
        for documents, names, finite in zip(seen.documents, seen.terms, seen.finite, strict=True):
            term = next((name for name, right in zip(names, finite.tolist(), strict=False) if not right), None)
            found.append((term, list(documents)))
        found = self._gather(found)
        guilty = [(term, documents) for term, documents in found if term is not None]
        gradient = "the gradient (every term of the loss is finite)"
        what = guilty[0][0] if guilty else gradient if math.isfinite(loss) else "the loss (every term is finite)"
        told = _named(documents for _, documents in guilty or found)
        level = logging.INFO if self._scaled and not guilty else logging.WARNING
        log.log(level, "step %d left out, number %d: %s is not finite; documents %s",
                seen.step, self.skipped, what, told)  # fmt: skip


def _named(batches: Iterable[Sequence[str]], most: int = 16) -> str:
    """Names of documents without repetition; a window's name may be those of several, with commas."""
    names = list(dict.fromkeys(name for batch in batches for window in batch for name in window.split(",") if name))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "without a name"
