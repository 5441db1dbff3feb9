"""Red flags: signs in a run's numbers that something is wrong, each said once, with the likely cause.

`RedFlags` reads the records of logged steps, and labels that are still on the host: it never waits for the device.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from ..evaluation.comparability import unspelt_text

log = logging.getLogger(__name__)

EXPLAINED_STEPS = 500
"""Steps for which there is an opinion on how low a loss can be."""

LEAST_VOCABULARY = 64
"""Size of the vocabulary below which there is none: a loss near zero soon is possible in toy languages."""

LEAST_COVERAGE = 0.5
"""Share of supervised positions with an anchor."""

CUT_APART = "the two tokenizers cut this text at different places, or one of them changes it (normaliser, lower case)"
NOBODY_ASKED = "text that none of the teachers is asked about (only_for, their weights at this step)"
"""Likely causes of a small coverage."""

MOST_KD = 2.0
"""Nats per token; late in training good pairs are at 0.1 to 0.3."""

REMEMBERED_BATCHES = 65_536
"""Hashes of the current epoch in which duplicates are looked for."""
MOST_UNLISTED = 0.1
"""Share of the student's tokens that may be lost to the length of a served teacher's lists."""

LOSSY_CAUSE = (
    "a tokenizer with a small vocabulary of whole words, or whose pre-tokenizer drops white space; byte-level BPE "
    "leaves nothing out"
)


class RedFlags:
    """Watches a run.

    Args:
        total_steps: optimizer steps of the whole run.
        vocabulary_size: of the student; ln of it is the loss of knowing nothing.
        warmup_steps: while the learning rate rises.
        initial_loss: LM loss in nats per token of the student as it was before training. If None, the first
            evaluation record at step 0 supplies it, or else ln(vocabulary size) stands in.
        text_repeats: the training text repeats itself, so that a low loss after few steps says nothing.
        ignore: label of an unsupervised position.
        warn: where a warning goes; None: the log.

    Attributes:
        warned: names of the flags raised so far, in order: `copying`, `duplicate_batch`, `zero_gradient`,
            `scheduler`, `coverage`, `unlisted`, `kd_high`, `weak_teacher`, `lossy_tokenizer`.
    """

    def __init__(
        self,
        total_steps: int,
        vocabulary_size: int,
        *,
        warmup_steps: int = 0,
        initial_loss: float | None = None,
        text_repeats: bool = False,
        ignore: int = -100,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.vocabulary_size = vocabulary_size
        self.warmup_steps = warmup_steps
        self.initial_loss = initial_loss
        self.text_repeats = text_repeats
        self.has_several_teachers = False
        self.ignore = ignore
        self.warned: list[str] = []
        self._warn = warn or log.warning
        self._epoch: int | None = None
        # A dict, for its order: when there are too many, the oldest hash goes.
        self._batches: dict[int, None] = {}
        self._last_lr: float | None = None

    @classmethod
    def of_run(
        cls,
        total_steps: int,
        warmup_ratio: float,
        student: nn.Module,
        start: Mapping[str, Any],
        *,
        main: bool,
        text_repeats: bool = False,
    ) -> "RedFlags":
        """Return those of a run that starts from `HeldOut.measure_start`; only those of the main process warn."""
        # The head has a row for every token, also for those that a tokenizer never makes.
        flags = cls(
            total_steps,
            student.get_output_embeddings().weight.shape[0],
            warmup_steps=math.ceil(warmup_ratio * total_steps),
            initial_loss=start["initial_student"]["loss"],
            text_repeats=text_repeats,
            warn=None if main else ignore_message,
        )

        if "teacher" in start:
            flags.has_several_teachers = "teachers" in start["teacher"]
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
        # A window is seen again in every epoch.
        if epoch != self._epoch:
            self._epoch = epoch
            self._batches = {}

        # Batches without a supervised position are all equal.
        is_supervised = (labels != self.ignore).any()
        if "duplicate_batch" in self.warned or not is_supervised:
            return

        # 8 bytes: two of 65,536 are equal by chance with a probability of 1e-10.
        digest = hashlib.blake2b(labels.contiguous().numpy().tobytes(), digest_size=8).digest()
        key = int.from_bytes(digest, "big")
        if key in self._batches:
            names = f" (documents {', '.join(documents[:3])})" if documents else ""
            self._raise_flag(
                "duplicate_batch",
                f"a batch was seen twice in epoch {epoch}{names}. Likely cause: duplicate documents in the data "
                "(verify_fixes.py measures them), or workers or processes that read the same part of it",
            )

        self._batches[key] = None
        if len(self._batches) > REMEMBERED_BATCHES:
            del self._batches[next(iter(self._batches))]

    def check(self, record: Mapping[str, Any]) -> None:
        """Look at one record of metrics.jsonl, of a training step or of an evaluation of the student."""
        # A record without terms is that of an evaluation.
        if "terms" not in record:
            if record["step"] == 0 and self.initial_loss is None:
                self.initial_loss = record["loss"]
            self._check_loss(record["step"], record["loss"], "evaluation loss")
            return

        terms = record["terms"]
        # KD has no such floor: a student may come as close to its teacher as it can.
        if "lm" in terms:
            self._check_loss(record["step"], terms["lm"]["raw"], "LM loss", epoch=record.get("epoch"))
        self._check_gradient(record)
        self._check_scheduler(record)
        if terms.get("kd", {}).get("weight"):
            self._check_kd(record)

    def models(self, teacher: Mapping[str, Any], student: Mapping[str, Any]) -> None:
        """Compare the metrics of the teacher and of the untrained student, where they can be compared."""
        # Bits per byte of texts that a tokenizer has changed say nothing about the models.
        reason = unspelt_text({"student": student, "teacher": teacher})
        if reason:
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
        """Return plain containers, for a checkpoint."""
        return {
            "warned": list(self.warned),
            "initial_loss": self.initial_loss,
            "epoch": self._epoch,
            "batches": list(self._batches),
            "last_lr": self._last_lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken: nothing is said twice, no batch is forgotten."""
        self.warned = list(state["warned"])
        self.initial_loss = state["initial_loss"]
        self._epoch = state["epoch"]
        # Checkpoints that were written with a larger limit stay readable.
        self._batches = dict.fromkeys(islice(state["batches"], REMEMBERED_BATCHES))
        self._last_lr = state["last_lr"]

    @property
    def settled_step(self) -> int:
        """From here on a high KD is no longer the start of training: after the warm-up and a quarter of the run."""
        return max(self.warmup_steps, self.total_steps // 4, 200)

    def lowest_plausible_loss(self, step: int) -> float | None:
        """Return the nats per token below which nothing but copying leads within `step` steps; None: no opinion.

        There is none on a text that repeats itself, which is learnt in few steps.

        A share of the smaller of ln(vocabulary size) and the initial loss, so that a pretrained student is
        measured against itself: 30 % of it for 100 steps, falling with the logarithm of the step to 10 % at
        `EXPLAINED_STEPS`. Of ln(V), real students end at 15 % (105 characters) to 25 %, after many more steps.
        """
        if self.text_repeats or step > EXPLAINED_STEPS or self.vocabulary_size < LEAST_VOCABULARY:
            return None

        reference = min(math.log(self.vocabulary_size), self.initial_loss or math.inf)
        decline = math.log(max(step, 100) / 100) / math.log(EXPLAINED_STEPS / 100)
        floor = (0.3 - 0.2 * decline) * reference

        # Without a measured start the student may be a pretrained one: only a loss no language has is one too low.
        if self.initial_loss is None:
            return min(floor, 0.5)
        return floor

    def _check_loss(self, step: int, loss: float | None, name: str, epoch: float | None = None) -> None:
        """Look for a loss that falls faster than learning explains."""
        floor = self.lowest_plausible_loss(step)
        if step == 0 or floor is None or loss is None:
            return
        # A small text learnt by heart explains a low training loss.
        is_repeated = epoch is not None and epoch > 2
        is_too_low = loss < floor  # NaN is not
        if is_repeated or not is_too_low:
            return

        self._raise_flag(
            "copying",
            f"{name} {loss:.3f} nats per token at step {step} is lower than so few steps explain "
            f"(ln of the vocabulary is {math.log(self.vocabulary_size):.2f}). Likely cause: labels not shifted by "
            "one, so that the student sees the token it predicts and learns to copy; or training text that "
            "repeats itself",
        )

    def _check_gradient(self, record: Mapping[str, Any]) -> None:
        """Look for a step that learns nothing; None stands for a gradient that is not finite, which others tell."""
        if record.get("grad_norm") == 0:
            self._raise_flag(
                "zero_gradient",
                f"gradient norm 0 at step {record['step']}: nothing is being learnt. Likely cause: all weights of the "
                "curriculum are 0 here, all positions are masked, or the student is frozen",
            )

    def _check_scheduler(self, record: Mapping[str, Any]) -> None:
        """Look for a schedule that is past its end before the run is."""
        step = record["step"]
        lr = record["lr"]
        # A learning rate rises in the warm-up, and is 0 at the last step.
        if not max(1, self.warmup_steps) < step < self.total_steps:
            return

        # A cosine past its end rises again; the margin is for rounding.
        rose = self._last_lr is not None and lr > self._last_lr * (1 + 1e-6)
        symptom = "is 0" if lr == 0 else "rises again"
        if lr == 0 or rose:
            self._raise_flag(
                "scheduler",
                f"the learning rate {symptom} at step {step} of {self.total_steps}: the "
                "schedule is past its end. Likely cause: it is stepped more than once per optimizer step (for "
                "instance once per process or per micro-batch), or was built for fewer steps",
            )
        self._last_lr = lr

    def _check_kd(self, record: Mapping[str, Any]) -> None:
        """Look for KD that reaches few tokens, or that does not fall."""
        step = record["step"]

        # Tokens without an anchor learn from the text alone, which is no error, but seldom what is wanted.
        coverage = record.get("coverage") or {}
        anchored = coverage.get("anchored")
        unlisted = coverage.get("unlisted", 0.0)
        if unlisted > MOST_UNLISTED:
            self._raise_flag(
                "unlisted",
                f"the teacher's lists are too short for {unlisted:.1%} of the student's tokens (step {step}), which "
                "learn from the text alone. Likely cause: the student's tokens are much shorter than the teacher's, or "
                "captures are of other text. A larger served.listed has a server list more",
            )
        if anchored is not None and anchored < LEAST_COVERAGE:
            cause = CUT_APART if not self.has_several_teachers else f"{NOBODY_ASKED}, or {CUT_APART}"
            self._raise_flag(
                "coverage",
                f"KD covers only {anchored:.1%} of the student's tokens (step {step}). Likely cause: {cause}; the "
                "other tokens learn from the text alone",
            )

        nats = record.get("kd_nats_per_token")
        if nats is not None and nats > MOST_KD and step > self.settled_step:
            self._raise_flag(
                "kd_high",
                f"KD is still at {nats:.2f} nats per token at step {step} (healthy late in training: 0.1 to "
                "0.3). Likely cause: a learning rate that is too low or too high, a student that is far too small, or "
                "teacher and student that do not read the same text",
            )

    def _raise_flag(self, flag: str, message: str) -> None:
        """Warn, unless this flag was raised before, in this session or an earlier one."""
        if flag not in self.warned:
            self.warned.append(flag)
            self._warn(f"[RED FLAG] {message}.")


def ignore_message(message: str) -> None:
    """Take a warning and drop it: the main process says it."""
