"""The text nobody trains on, and everything that is measured on it: before, during and after training.

Models and batches are handed in; a batch has `scored(side)` -> (what the model is called with, labels), `bytes` and
`to(device)`, and both sides (`student`, `teacher`) of it score the same bytes of text.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..advice import advice
from ..config.settings import EvaluationConfig
from ..data import windows as windows_module
from ..errors import RunError, UserError
from ..files import write_json
from ..machine.device_memory import FittingParts
from ..run_layout import START
from . import samples as samples_module
from . import scores as evaluation
from .comparability import MOST_UNSPELT

log = logging.getLogger(__name__)

METRICS = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
GPU_WINDOWS = 16
"""Windows of a batch to score on a GPU, at least; `evaluation` passes as many of them at once as its logits allow."""
ROUTING_BATCHES = 4
"""So many batches are enough to see how hidden states are routed."""


STARTED_TEXTS, STARTED_TOKENS = 24, 64
"""So many beginnings of texts, so long, tell behind which token a model finds a text likeliest."""

CLEARLY_BETTER = 0.99
"""Share of the bits per byte behind the start token in use; a token with fewer is named in a warning."""


@dataclass(frozen=True)
class TextStart:
    """What one model reads before a text."""

    ids: Sequence[int] = ()
    """Start markers, in order."""
    candidates: Sequence[int] = ()
    """Tokens that a plain text could start with, the one in use first; empty where there is nothing to compare."""

    @property
    def forced_bos(self) -> int | None:
        """What a decoder reads between its own start and a text."""
        return self.ids[1] if len(self.ids) > 1 else None


@dataclass(frozen=True)
class HeldOut:
    """The evaluation text of a run."""

    config: EvaluationConfig
    accelerator: Any
    windows: Sequence[dict]
    documents: list[str]
    collate: Callable[[list[dict]], Any]
    tokenizers: Mapping[str, Any]
    """For `student` and `teacher`."""
    batch_size: int
    prompt: Callable[[str, str], tuple[str, list[int]]] | None = None
    """Where documents are conversations or examples: (document, side) -> what is asked last in it, and the token ids
    up to the answer."""
    starts: Mapping[str, TextStart] = field(default_factory=dict)
    """For `student` and `teacher`, what they read before a text; nothing where there is none."""
    together: bool = False
    """Every process asks the teacher about all windows, not about its share: a sharded one must be asked equally often
    by all."""

    def indices(self, together: bool = False, size: int | None = None) -> list[list[int]]:
        """Windows of each batch: of this process's share, or of all.

        Args:
            size: of a batch; None: `batch_size`.
        """
        first, each = (0, 1) if together else (self.accelerator.process_index, self.accelerator.num_processes)
        mine = range(first, len(self.windows), each)
        size = size or self.batch_size
        return [list(mine[start : start + size]) for start in range(0, len(mine), size)]

    def batches(self, together: bool = False) -> Iterator[Any]:
        """This process's share of the windows, or all of them."""
        for batch in self.indices(together):
            yield self._batch(batch)

    def _batch(self, indices: Sequence[int]) -> Any:
        return self.collate([self.windows[i] for i in indices])

    def score(self, model: nn.Module, side: str) -> dict[str, Any]:
        """Metrics of a model, over all processes.

        The student computes in float32; of a large teacher a float32 copy may not fit, only its loss is float32.
        """
        together = self.together and side == "teacher"
        device = next(model.parameters()).device
        size = max(self.batch_size, GPU_WINDOWS) if device.type == "cuda" else self.batch_size

        batches = (self._batch(windows) for windows in self.indices(together, size))
        scored = ((*batch.scored(side), int(batch.bytes.sum())) for batch in batches)
        summed_over = None if together else self.accelerator
        options = {"float32": side == "student", "survives": not together}
        return evaluation.evaluate(model, scored, device, summed_over, **options)

    def routing(self, model: nn.Module, measure: Callable[[Any], dict[str, Any] | None]) -> dict[str, Any]:
        """`{"routing": ...}` for an evaluation record: the mean over the first windows, the same in every process.

        Args:
            model: the student; in evaluation mode and float32 meanwhile.
            measure: batch -> `{student_layers, teacher_layers, weights}`, the mean over its windows (`weights`: a row
                per student layer that sums to 1), or None without a router, and so is the result then: {}.
        """
        first = range(min(len(self.windows), ROUTING_BATCHES * self.batch_size))
        total = torch.zeros((), dtype=torch.float64)

        def measured(part: Sequence[int]) -> tuple[int, dict[str, Any] | None]:
            batch = self._batch(part).to(self.accelerator.device)
            return len(part), measure(batch)

        with evaluation.float32_evaluation(model):
            for windows, routed in FittingParts(self.batch_size).of(first, measured):
                if routed is None:
                    return {}
                total = total + windows * torch.tensor(routed["weights"], dtype=torch.float64)
        return {"routing": {**routed, "weights": (total / len(first)).tolist()}}

    def describe(self, model: nn.Module, side: str) -> dict[str, Any]:
        """Metrics, bytes that the model's tokens do not say, number of parameters and dtype of a model."""
        unspelt = {"unspelt_bytes": self.unspelt_bytes(side)}
        return self.score(model, side) | unspelt | evaluation.describe_model(model)

    def unspelt_bytes(self, side: str) -> int:
        """Bytes of the text that a side's tokens do not say: dropped, unknown, or changed by a normaliser."""
        return sum(int(window[f"{side}_unspelt"]) for window in self.windows)

    def unspelt_shares(self) -> dict[str, float]:
        """`unspelt_bytes` of both sides as shares of the text."""
        size = max(sum(int(window["bytes"]) for window in self.windows), 1)
        return {side: self.unspelt_bytes(side) / size for side in ("student", "teacher")}

    def prompts(self, side: str) -> list[tuple[str, list[int]]]:
        """Prompts of the samples, from documents spread over the text: as shown, and as a side's model reads them.

        Of a text its beginning, of a conversation all up to the last answer.
        """
        count = min(self.config.samples, len(self.documents))
        chosen = [self.documents[i * len(self.documents) // count] for i in range(count)]
        if self.prompt is not None:
            return [self.prompt(document, side) for document in chosen]
        student, reader = self.tokenizers["student"], self.tokenizers[side]
        lead = list(self._start(side).ids)
        # not verbose: only the first tokens are used, whatever the model's context length
        ids = [student(text[:2000], add_special_tokens=False, verbose=False)["input_ids"] for text in chosen]
        shown = [student.decode(row[: self.config.prompt_tokens]) for row in ids]
        return [(text, lead + reader(text, add_special_tokens=False)["input_ids"]) for text in shown]

    def beginnings(self) -> list[str]:
        """The prompts of the samples as they are shown."""
        return [text for text, _ in self.prompts("student")]

    def continuations(self, model: nn.Module, side: str) -> list[str | None]:
        """How a model goes on from each of the prompts; None where it cannot generate, which is logged."""
        prompts, new_tokens = [ids for _, ids in self.prompts(side)], self.config.new_tokens
        texts: list[str | None] = [None] * len(prompts)
        with advice(f"samples of the {side}"):
            tokenizer, is_student = self.tokenizers[side], side == "student"
            forced_bos = self._start(side).forced_bos
            texts = samples_module.generate_samples(
                model, tokenizer, prompts, new_tokens, forced_bos=forced_bos, float32=is_student
            )
        return texts

    def _start(self, side: str) -> TextStart:
        return self.starts.get(side, TextStart())

    def compare_starts(self, model: nn.Module, side: str) -> None:
        """Tell how likely a model finds the text behind each token that a text could start with.

        Windows are made before any model is loaded, behind the token that the tokenizer suggests: so they depend on
        no computation, which might come out otherwise on another machine. Here the model says whether that was right.
        """
        candidates = self._start(side).candidates
        if len(candidates) < 2 or not self.documents:
            return
        tokenizer = self.tokenizers[side]
        texts = []
        for document in self.documents[:STARTED_TEXTS]:
            ids = tokenizer(document[:2000], add_special_tokens=False, verbose=False)["input_ids"][:STARTED_TOKENS]
            texts.append((ids, len(tokenizer.decode(ids).encode())))

        device = next(model.parameters()).device
        with evaluation.float32_evaluation(model) if side == "student" else nullcontext():
            bits = evaluation.bits_behind(model, texts, candidates, device)
        names = dict(zip(candidates, tokenizer.convert_ids_to_tokens(list(candidates)), strict=True))
        figures = ", ".join(f"{bits[start]:.4f} behind {names[start]}" for start in candidates)
        in_use, best = candidates[0], min(bits, key=bits.__getitem__)
        log.info("%s: plain text starts with %s; bits per byte of %d beginnings: %s",
                 side, names[in_use], len(texts), figures)  # fmt: skip
        if bits[best] < CLEARLY_BETTER * bits[in_use]:
            log.warning(
                "the %s finds texts likelier behind %s than behind %s, where they start in this run; to start them "
                "there, in another --output-dir: --set %s.text_start='%s'",
                side, names[best], names[in_use], side, names[best],
            )  # fmt: skip

    def coverage(self) -> dict[str, float]:
        """Supervised student positions (`lm`), those with an anchor (`kd`) and at depth 0, over all processes."""
        totals = dict.fromkeys(("lm", "kd", "depth0"), 0)
        for batch in self.batches():
            totals = {name: totals[name] + batch.counts[name] for name in totals}
        return dict(zip(totals, evaluation.sum_over_processes([*totals.values()], self.accelerator), strict=True))

    def log_coverage(self) -> None:
        """Tell how much of the text KD reaches."""
        totals = self.coverage()
        shares = [100 * totals[name] / max(totals["lm"], 1) for name in ("kd", "depth0")]
        log.info("coverage: %.1f %% of student positions have an anchor, %.1f %% at depth 0", *shares)

    def log_unspelt(self, sides: Sequence[str]) -> None:
        """Tell how much of the text the tokens of each side leave out."""
        for side, share in self.unspelt_shares().items():
            if side not in sides or not share:
                continue
            level = logging.WARNING if share > MOST_UNSPELT else logging.INFO
            log.log(
                level,
                "the %s's tokens leave out %.1f %% of the bytes of the held-out text (unknown words, dropped spaces or "
                "line breaks): it is not asked to predict them, so that its bits per byte are too low by about as much",
                side, 100 * share,
            )  # fmt: skip

    def fingerprint(self) -> dict[str, Any]:
        """What `measure_start` depends on besides the models."""
        settings = {name: getattr(self.config, name) for name in ("samples", "prompt_tokens", "new_tokens")}
        return {"windows": windows_module.windows_fingerprint(self.windows), **settings}

    def measure(self, model: nn.Module, side: str) -> dict[str, Any]:
        """`metrics` (see `describe`) and `samples` of a model.

        Raises:
            UserError: its loss is not finite.
        """
        described = self.describe(model, side)
        _require_finite(described, side)
        self.compare_starts(model, side)
        return {"metrics": described, "samples": self.continuations(model, side)}

    def measure_start(
        self, student: nn.Module, teacher: Callable[[], dict[str, Any]] | None, folder: Path
    ) -> dict[str, Any]:
        """Teacher and untrained student, metrics and samples.

        Measured once a run and kept in `folder`, so that a resumed run has what its first session measured; anew if
        it was measured on something else.

        Args:
            teacher: what `measure` says of the teacher; None: there is none.

        Raises:
            UserError: a model's loss is not finite.
        """
        file, measured_on = folder / START, self.fingerprint()
        if file.is_file():
            found = _read_start(file)
            if found.get("measured_on") == measured_on:
                return found
            log.info("%s is damaged, or was measured on other windows or samples: measuring again", START)
        measured: dict[str, Any] = {"measured_on": measured_on, "samples": {"prompt": self.beginnings()}}
        parts = {} if teacher is None else {"teacher": teacher}
        for key, measure in (parts | {"initial_student": lambda: self.measure(student, "student")}).items():
            found = measure()
            measured[key], measured["samples"][key] = found["metrics"], found["samples"]
            log.info("%s: %.4f bits per byte on held-out text", key.replace("_", " "), measured[key]["bits_per_byte"])
        if self.accelerator.is_main_process:
            write_json(file, measured)
        self.accelerator.wait_for_everyone()
        return measured

    def scores(self, student: nn.Module, start: Mapping[str, Any]) -> dict[str, Any]:
        """Return metrics of teacher, untrained and trained student: what must be known before an export.

        Args:
            student: after training.
            start: from `measure_start`.

        Raises:
            RunError: the student's loss is not finite.
        """
        models = {key: start[key] for key in ("teacher", "initial_student") if key in start}
        models["student"] = self.describe(student, "student")
        if not math.isfinite(models["student"]["loss"]):
            raise RunError(
                f"the student's loss on the held-out text is {models['student']['loss']} after training: there is "
                "nothing to export. Its checkpoints are kept. Probably training diverged: start a new run, in another "
                "--output-dir, with a lower --learning-rate."
            )
        return {**models, "prompted": self.prompt is not None}

    def results(
        self,
        student: nn.Module,
        start: Mapping[str, Any],
        scores: Mapping[str, Any],
        compare: Callable[[Any], dict[str, float]],
    ) -> dict[str, Any]:
        """Return the models' part of evaluation_report.json: the scores, and what compares the models.

        Args:
            student: after training.
            start: from `measure_start`.
            scores: from `scores`.
            compare: batch -> agreement of student and teacher (see `evaluation.compare`); not used without a teacher.
        """
        results = dict(scores)
        samples = {**start["samples"], "student": self.continuations(student, "student")}
        if "teacher" in scores:
            models = (scores["student"], scores["teacher"], scores["initial_student"])
            results["retention"] = evaluation.retention(*models, self._agreement(student, compare))
        results["samples"] = [dict(zip(samples, row, strict=True)) for row in zip(*samples.values(), strict=True)]
        return results

    def _agreement(self, student: nn.Module, compare: Callable[[Any], dict[str, float]]) -> dict[str, float | None]:
        """Return how often student and teacher agree on all windows, in batches that fit into memory."""
        parts = FittingParts(self.batch_size, survives=not self.together)

        def compared(windows: Sequence[int]) -> dict[str, float]:
            sums = [*parts.of(windows, lambda part: compare(self._batch(part).to(self.accelerator.device)))]
            return {name: sum(part[name] for part in sums) for name in sums[0]}

        with evaluation.float32_evaluation(student):
            summed_over = None if self.together else self.accelerator
            return evaluation.compare(compared, self.indices(self.together), summed_over)

    def with_baseline(self, results: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """`results`, and beside them the same student trained without the teacher."""
        rows = zip(results["samples"], self.continuations(model, "student"), strict=True)
        samples = [{**sample, "baseline": text} for sample, text in rows]
        return {**results, "baseline": self.describe(model, "student"), "samples": samples}


def _read_start(file: Path) -> dict[str, Any]:
    """What `measure_start` has kept; {} where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _require_finite(described: Mapping[str, Any], side: str) -> None:
    if not math.isfinite(described["loss"]):
        dtype = described["dtype"]
        overflow = side == "teacher" and "float16" in dtype.split("+")
        raise UserError(
            f"the {side}'s loss on the held-out text is {described['loss']}, and nothing can be learnt from that; its "
            f"weights are in {dtype}. Expected a finite loss. "
            + (
                "Probably values overflow in half precision: --set teacher.dtype=float32, or bfloat16 on a GPU with it."
                if overflow
                else "Probably the weights are damaged: load the model again, or choose another one."
            )
        )


def metrics_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics in a record or in a model's part of a report."""
    return {key: record[key] for key in METRICS}
