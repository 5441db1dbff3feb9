"""The text nobody trains on, and everything that is measured on it: before, during and after training.

Models and batches are handed in; both sides (`student`, `teacher`) of a batch score the same bytes of text.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..advice import advice
from ..config.settings import EvaluationConfig
from ..data.loader import begun_ahead
from ..data.windows import windows_fingerprint
from ..errors import RunError, UserError
from ..files import write_json
from ..interfaces import Batch, Collator, Side, Teacher, TeacherElsewhere
from ..logs.progress import Progress
from ..logs.time_left import Kind
from ..machine.device_memory import GPU_SCORED_WINDOWS, FittingParts
from ..run_layout import START
from . import scores as scoring
from .comparability import MOST_UNSPELT
from .samples import generate_samples
from .scores import Counted, has_encoder
from .written_text import Judge, Sampling, describe, sample_texts

log = logging.getLogger(__name__)

METRICS = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
SAMPLE_SETTINGS = ("samples", "prompt_tokens", "new_tokens", "generation")
"""Settings of an evaluation that samples depend on."""
ROUTING_BATCHES = 4
"""So many batches are enough to see how hidden states are routed."""
BEGINNING = 2000
"""Characters of a document that are tokenised for its first tokens."""


STARTED_TEXTS, STARTED_TOKENS = 24, 64
"""So many beginnings of texts, so long, tell behind which token a model finds a text likeliest."""

CLEARLY_BETTER = 0.99
"""Share of the bits per byte behind the start token in use; a token with fewer is named in a warning."""


@dataclass(frozen=True)
class TextStart:
    """Tokens that one model reads before a text."""

    ids: Sequence[int] = ()
    """Start markers, in order."""
    candidates: Sequence[int] = ()
    """Tokens that a plain text could start with, the one in use first; empty where there is nothing to compare."""

    @property
    def forced_bos(self) -> int | None:
        """The token that a decoder reads between its own start and a text; None: it reads none."""
        return self.ids[1] if len(self.ids) > 1 else None


@dataclass(frozen=True)
class WindowShare:
    """Windows that this process measures, and the processes whose sums make the whole."""

    first: int
    """Index of its first window."""
    stride: int
    """From one of its windows to the next."""
    summed_over: Accelerator | None
    """Sums are added over its processes; None: this process measures all windows."""
    survives: bool
    """A batch that does not fit into memory is halved; False: other processes wait for this one, so that it raises."""

    @classmethod
    def of_process(cls, accelerator: Accelerator) -> "WindowShare":
        """Return every n-th window, for this one of n processes."""
        return cls(accelerator.process_index, accelerator.num_processes, summed_over=accelerator, survives=True)

    @classmethod
    def everything(cls) -> "WindowShare":
        """Return all windows, for a model that all processes must ask equally often."""
        return cls(0, 1, summed_over=None, survives=False)

    def batches(self, count: int, size: int) -> list[list[int]]:
        """Return the windows of each batch.

        Args:
            count: windows of the text.
            size: windows of a batch; the last one may have fewer.
        """
        windows = range(self.first, count, self.stride)
        starts = range(0, len(windows), size)
        return [list(windows[start : start + size]) for start in starts]


@dataclass(frozen=True)
class HeldOut:
    """The evaluation text of a run."""

    config: EvaluationConfig
    accelerator: Accelerator
    windows: Sequence[dict]
    documents: Sequence[str]
    collate: Collator
    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    """For `student` and `teacher`."""
    batch_size: int
    prompt: Callable[[str, str], tuple[str, list[int]]] | None = None
    """Where documents are conversations or examples: (document, side) -> what is asked last in it, and the token ids
    up to the answer."""
    starts: Mapping[str, TextStart] = field(default_factory=dict)
    """For `student` and `teacher`, what they read before a text; nothing where there is none."""
    judge: nn.Module | None = None
    """The teacher's model, where it computes in this run: it tells how likely it finds what a model has written."""
    together: bool = False
    """Every process asks the teacher about all windows, not about its share: a sharded one must be asked equally often
    by all."""
    progress: Progress = field(default_factory=lambda: Progress(shown=False))
    """Shows how far a measurement is; may end it between two windows."""

    # --- windows and batches ----------------------------------------------------------------------------------------

    @property
    def _process_share(self) -> WindowShare:
        """Windows of this process, where each model is whole in it."""
        return WindowShare.of_process(self.accelerator)

    @property
    def _teacher_share(self) -> WindowShare:
        """Windows on which this process asks the teacher."""
        return WindowShare.everything() if self.together else self._process_share

    def indices(self) -> list[list[int]]:
        """Return the windows of each batch of this process's share."""
        return self._process_share.batches(len(self.windows), self.batch_size)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of this process's share."""
        for indices in self.indices():
            yield self._batch(indices)

    def _batch(self, indices: Sequence[int]) -> Batch:
        return self.collate([self.windows[i] for i in indices])

    # --- metrics of one model ---------------------------------------------------------------------------------------

    def score(self, model: nn.Module, side: Side) -> dict[str, Any]:
        """Return the metrics of a model, over all processes.

        The student computes in float32; of a large teacher a float32 copy may not fit, only its loss is float32.
        """
        share = self._teacher_share if side == "teacher" else self._process_share

        # a GPU is not kept busy by the few windows of a training batch
        device = next(model.parameters()).device
        size = self.batch_size
        if device.type == "cuda":
            size = max(size, GPU_SCORED_WINDOWS)

        batches = share.batches(len(self.windows), size)
        kind: Kind = "teacher window" if side == "teacher" else "student window"
        with self._shown(f"{side} on held-out text", batches, kind) as note:
            return scoring.evaluate(
                model,
                self._scored(side, batches, note),
                device,
                share.summed_over,
                float32=side == "student",
                survives=share.survives,
            )

    def _scored(self, side: Side, batches: Sequence[Sequence[int]], note: Callable[[int], None]) -> Iterator[Counted]:
        """Yield each batch as `scores.evaluate` takes it, and note it once it is done."""
        for indices in batches:
            batch = self._batch(indices)
            inputs, labels = batch.scored(side)
            yield inputs, labels, int(batch.bytes.sum())
            note(len(indices))

    def _shown(
        self, label: str, batches: Sequence[Sequence[int]], kind: Kind
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Return the context in which a measurement of these windows is shown."""
        return self.progress.over(label, sum(map(len, batches)), kind)

    def describe(self, model: nn.Module, side: Side) -> dict[str, Any]:
        """Return metrics, bytes that the model's tokens do not say, number of parameters and dtype of a model."""
        metrics = self.score(model, side)
        unspelt = {"unspelt_bytes": self.unspelt_bytes(side)}
        return metrics | unspelt | scoring.describe_model(model)

    def routing(self, model: nn.Module, measure: Callable[[Any], dict[str, Any] | None]) -> dict[str, Any]:
        """Return `{"routing": ...}` for an evaluation record: the mean over the first windows, the same in every
        process.

        Args:
            model: the student; in evaluation mode and float32 meanwhile.
            measure: batch -> `{student_layers, teacher_layers, weights}`, the mean over its windows (`weights`: a row
                per student layer that sums to 1), or None without a router, and so is the result then: {}.
        """
        first_windows = range(min(len(self.windows), ROUTING_BATCHES * self.batch_size))
        total = torch.zeros((), dtype=torch.float64)

        def measured(part: Sequence[int]) -> tuple[int, dict[str, Any] | None]:
            batch = self._batch(part).to(self.accelerator.device)
            return len(part), measure(batch)

        with scoring.float32_evaluation(model):
            parts = FittingParts(self.batch_size)
            for windows, routing in parts.of(first_windows, measured):
                if routing is None:
                    return {}
                total = total + windows * torch.tensor(routing["weights"], dtype=torch.float64)

        mean = total / len(first_windows)
        return {"routing": {**routing, "weights": mean.tolist()}}

    # --- text that is covered ---------------------------------------------------------------------------------------

    def unspelt_bytes(self, side: Side) -> int:
        """Return the bytes of the text that a side's tokens do not say: dropped, unknown, or changed by a
        normaliser."""
        return sum(int(window[f"{side}_unspelt"]) for window in self.windows)

    def unspelt_shares(self) -> dict[str, float]:
        """Return `unspelt_bytes` of both sides as shares of the text."""
        size = max(sum(int(window["bytes"]) for window in self.windows), 1)
        return {side: self.unspelt_bytes(side) / size for side in ("student", "teacher")}

    def coverage(self) -> dict[str, float]:
        """Count supervised student positions (`lm`), those with an anchor (`kd`) and at depth 0, over all processes."""
        totals = dict.fromkeys(("lm", "kd", "depth0"), 0)
        for batch in self.batches():
            for name in totals:
                totals[name] += batch.counts[name]

        sums = scoring.sum_over_processes(list(totals.values()), self.accelerator)
        return dict(zip(totals, sums, strict=True))

    def log_coverage(self) -> None:
        """Log how much of the text KD reaches."""
        totals = self.coverage()
        positions = max(totals["lm"], 1)
        log.info(
            "coverage: the teacher has a say on %.1f %% of the student's tokens; "
            "before %.1f %% both have read the same",
            100 * totals["kd"] / positions,
            100 * totals["depth0"] / positions,
        )

    def log_unspelt(self, sides: Sequence[str]) -> None:
        """Log how much of the text the tokens of each side leave out."""
        for side, share in self.unspelt_shares().items():
            if side not in sides or not share:
                continue

            level = logging.WARNING if share > MOST_UNSPELT else logging.INFO
            log.log(
                level,
                "the %s's tokens leave out %.1f %% of the bytes of the held-out text (unknown words, dropped spaces or "
                "line breaks): it is not asked to predict them, so that its bits per byte are too low by about as much",
                side,
                100 * share,
            )

    # --- samples ----------------------------------------------------------------------------------------------------

    def prompts(self, side: Side) -> list[tuple[str, list[int]]]:
        """Return the prompts of the samples, from documents spread over the text: as shown, and as a side's model
        reads them.

        Of a text its beginning, of a conversation all up to the last answer.
        """
        return self._prompts(side, self.config.samples)

    def _prompts(self, side: Side, count: int) -> list[tuple[str, list[int]]]:
        """Return `prompts`, so many of them; fewer where there are fewer documents."""
        count = min(count, len(self.documents))
        documents = [self.documents[i * len(self.documents) // count] for i in range(count)]
        if self.prompt is not None:
            return [self.prompt(document, side) for document in documents]

        # the student's tokens say where the beginning ends, so that both sides go on from the same text
        student_tokenizer = self.tokenizers["student"]
        shown = []
        for document in documents:
            ids = _beginning(student_tokenizer, document)
            shown.append(student_tokenizer.decode(ids[: self.config.prompt_tokens]))

        tokenizer = self.tokenizers[side]
        start = list(self._start(side).ids)
        return [(text, start + tokenizer(text, add_special_tokens=False)["input_ids"]) for text in shown]

    def beginnings(self) -> list[str]:
        """Return the prompts of the samples as they are shown."""
        return [text for text, _ in self.prompts("student")]

    def continuations(self, model: nn.Module, side: Side) -> list[str | None]:
        """Return the text with which a model goes on from each prompt; None where it cannot generate, which is
        logged."""
        return self._continue(model, side, [ids for _, ids in self.prompts(side)])

    def sample(self, model: nn.Module) -> dict[str, str] | None:
        """Return the first prompt and how the student goes on from it, to be read while it trains; None without
        prompts, or where it cannot generate."""
        for prompt, ids in self.prompts("student")[:1]:
            [text] = self._continue(model, "student", [ids])
            if text is not None:
                return {"prompt": prompt, "text": text}
        return None

    def _continue(self, model: nn.Module, side: Side, prompts: Sequence[list[int]]) -> list[str | None]:
        """Return the text with which a model goes on from each prompt."""
        texts: list[str | None] = [None] * len(prompts)
        tokens = len(prompts) * self.config.new_tokens
        with advice(f"samples of the {side}"), self.progress.over(f"samples of the {side}", tokens, "token") as note:
            texts = generate_samples(
                model,
                self.tokenizers[side],
                prompts,
                self.config.new_tokens,
                forced_bos=self._start(side).forced_bos,
                float32=side == "student",
                note=note,
            )
        return texts

    def written_text(self, model: nn.Module, side: Side) -> dict[str, Any] | None:
        """Return the metrics of texts that a model writes (`utils.evaluation.written_text`); None where it cannot
        generate, which is logged, or was not asked to."""
        count = self.config.generation
        metrics = None
        if not count or not self.documents:
            return metrics

        tokenizer = self.tokenizers[side]
        sampling = Sampling(
            self.config.new_tokens,
            tokenizer.eos_token_id,
            forced_bos=self._start(side).forced_bos,
        )
        with advice(f"written text of the {side}"):
            prompts = [ids for _, ids in self._prompts(side, count)]
            samples = sample_texts(model, prompts, sampling, float32=side == "student")
            judge = model if side == "teacher" else self.judge
            metrics = describe(samples, tokenizer, self._judges(judge, count))
        return metrics

    def _judges(self, model: nn.Module | None, count: int) -> dict[str, Judge]:
        """Return the judge of texts behind the first prompts, by the name of its metric.

        There is none for encoder-decoder models, and no teacher in parts, which all processes would have to ask alike.
        """
        if model is None or has_encoder(model) or self.together:
            return {}

        prompts = []
        for shown, ids in self._prompts("teacher", count):
            # A text goes on from its beginning, an answer begins behind its prompt.
            is_plain = self.prompt is None
            prompts.append((self._start("teacher").ids, shown) if is_plain else (ids, ""))
        return {"teacher": Judge(model, self.tokenizers["teacher"], prompts)}

    # --- the start of a text ----------------------------------------------------------------------------------------

    def _start(self, side: Side) -> TextStart:
        return self.starts.get(side, TextStart())

    def compare_starts(self, model: nn.Module, side: Side) -> None:
        """Log how likely a model finds the text behind each token that a text could start with.

        Windows are made before any model is loaded, behind the token that the tokenizer suggests: so they depend on
        no computation, which might come out otherwise on another machine. Here the model says whether that was right.
        """
        candidates = self._start(side).candidates
        if len(candidates) < 2 or not self.documents:
            return

        # 1. The beginnings of some texts, with their bytes.
        tokenizer = self.tokenizers[side]
        texts = []
        for document in self.documents[:STARTED_TEXTS]:
            ids = _beginning(tokenizer, document)[:STARTED_TOKENS]
            texts.append((ids, len(tokenizer.decode(ids).encode())))

        # 2. Bits per byte of all of them behind each candidate.
        device = next(model.parameters()).device
        with scoring.float32_evaluation(model) if side == "student" else nullcontext():
            bits = scoring.bits_behind(model, texts, candidates, device)

        # 3. The figures, and a warning where another token is clearly better than the one in use.
        names = dict(zip(candidates, tokenizer.convert_ids_to_tokens(list(candidates)), strict=True))
        figures = ", ".join(f"{bits[start]:.4f} behind {names[start]}" for start in candidates)
        in_use = candidates[0]
        best = min(bits, key=bits.__getitem__)
        log.debug(
            "%s: plain text starts with %s; bits per byte of %d beginnings: %s",
            side,
            names[in_use],
            len(texts),
            figures,
        )
        if bits[best] < CLEARLY_BETTER * bits[in_use]:
            log.warning(
                "the %s finds texts likelier behind %s than behind %s, where they start in this run; to start them "
                "there, in another --output-dir: --set %s.text_start='%s'",
                side,
                names[best],
                names[in_use],
                side,
                names[best],
            )

    # --- before training --------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """Return everything that `measure_start` depends on besides the models."""
        settings = {name: getattr(self.config, name) for name in SAMPLE_SETTINGS}
        return {"windows": windows_fingerprint(self.windows), **settings}

    def measure(self, model: nn.Module, side: Side) -> dict[str, Any]:
        """Return `metrics` (see `describe`), `samples` and `generation` (see `written_text`) of a model.

        Raises:
            UserError: its loss is not finite.
        """
        metrics = self.describe(model, side)
        _require_finite(metrics, side)
        self.compare_starts(model, side)
        return {
            "metrics": metrics,
            "samples": self.continuations(model, side),
            "generation": self.written_text(model, side),
        }

    def measure_teacher(self, teacher: Teacher) -> dict[str, Any]:
        """Return `measure` of a teacher; one whose model is elsewhere writes nothing.

        Raises:
            UserError: its loss is not finite.
        """
        if teacher.model is not None:
            return self.measure(teacher.model, "teacher")

        # 1. The probabilities of the text, which its signals have, over all processes; not as a cache has rounded them.
        running = cast(TeacherElsewhere, getattr(teacher, "teacher", None) or teacher)
        share = self._teacher_share
        batches = share.batches(len(self.windows), self.batch_size)
        nats, tokens, num_bytes = 0.0, 0, 0
        with self._shown("teacher on held-out text", batches, "teacher window") as note:
            begin = partial(running.begin, top_k=1)
            for batch in begun_ahead(map(self._batch, batches), begin):
                batch = batch.to(self.accelerator.device)
                batch_nats, batch_tokens = batch.teacher_nll(running.signal(batch, 1))
                nats += batch_nats
                tokens += batch_tokens
                num_bytes += int(batch.bytes.sum())
                note(len(batch.bytes))
        sums = scoring.sum_over_processes([nats, tokens, num_bytes], share.summed_over)

        # 2. The same record as of a model, but for what only its weights tell.
        metrics = scoring.metrics(sums[0], round(sums[1]), round(sums[2]))
        described = {**metrics, "unspelt_bytes": self.unspelt_bytes("teacher"), "dtype": "unknown"}
        _require_finite(described, "teacher")
        return {"metrics": described, "samples": [None] * len(self.prompts("student")), "generation": None}

    def measure_start(
        self,
        student: nn.Module,
        teacher: Callable[[], dict[str, Any]] | None,
        folder: Path,
    ) -> dict[str, Any]:
        """Measure teacher and untrained student: metrics, samples and written text.

        Measured once a run and stored in `folder`, so that a resumed run has what its first session measured; anew if
        it was measured on something else.

        Args:
            teacher: returns what `measure` says of the teacher; None: there is none.

        Raises:
            UserError: a model's loss is not finite.
        """
        file = folder / START
        measured_on = self.fingerprint()
        if file.is_file():
            stored = _read_start(file)
            if stored.get("measured_on") == measured_on:
                return stored
            log.info("%s is damaged, or was measured on other windows or samples: measuring again", START)

        # the teacher first: a pair whose teacher is broken need not wait for the student
        measures: dict[str, Callable[[], dict[str, Any]]] = {}
        if teacher is not None:
            measures["teacher"] = teacher
        measures["initial_student"] = partial(self.measure, student, "student")

        start: dict[str, Any] = {
            "measured_on": measured_on,
            "samples": {"prompt": self.beginnings()},
            "generation": {},
        }
        for key, measure in measures.items():
            measured = measure()
            start[key] = measured["metrics"]
            start["samples"][key] = measured["samples"]
            start["generation"][key] = measured["generation"]
            # The student has a line of its own, as at every evaluation.
            level = logging.INFO if key == "teacher" else logging.DEBUG
            log.log(level, "%s: %.4f bits/byte on held-out text", key.replace("_", " "), start[key]["bits_per_byte"])

        # written once, and not read by anybody before it is whole
        if self.accelerator.is_main_process:
            write_json(file, start)
        self.accelerator.wait_for_everyone()
        return start

    # --- after training ---------------------------------------------------------------------------------------------

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
            compare: batch -> agreement of student and teacher (see `scores.compare`); not used without a teacher.
        """
        results = dict(scores)
        samples = {**start["samples"], "student": self.continuations(student, "student")}
        if "teacher" in scores:
            results["retention"] = scoring.retention(
                scores["student"], scores["teacher"], scores["initial_student"], self._agreement(student, compare)
            )
            # Bits per byte are those of the best of several teachers, agreement and divergence of all together.
            if "teachers" in scores["teacher"]:
                results["retention"]["agreement_with"] = "mixture"

        # from a list for each model to a row for each prompt
        rows = zip(*samples.values(), strict=True)
        results["samples"] = [dict(zip(samples, row, strict=True)) for row in rows]
        results["generation"] = {**start["generation"], "student": self.written_text(student, "student")}
        return results

    def _agreement(self, student: nn.Module, compare: Callable[[Any], dict[str, float]]) -> dict[str, float | None]:
        """Return how often student and teacher agree on all windows, in batches that fit into memory."""
        share = self._teacher_share
        parts = FittingParts(self.batch_size, survives=share.survives)

        def compare_part(indices: Sequence[int]) -> dict[str, float]:
            return compare(self._batch(indices).to(self.accelerator.device))

        def compare_batch(indices: Sequence[int]) -> dict[str, float]:
            sums = list(parts.of(indices, compare_part))
            note(len(indices))
            return {name: sum(part[name] for part in sums) for name in sums[0]}

        batches = share.batches(len(self.windows), self.batch_size)
        shown = self._shown("student beside teacher", batches, "agreement window")
        with scoring.float32_evaluation(student), shown as note:
            return scoring.compare(compare_batch, batches, share.summed_over)

    def with_baseline(self, results: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        """Return `results` with those of the same student trained without the teacher beside them."""
        texts = self.continuations(model, "student")
        samples = []
        for sample, text in zip(results["samples"], texts, strict=True):
            samples.append({**sample, "baseline": text})
        generation = {**results["generation"], "baseline": self.written_text(model, "student")}
        return {
            **results,
            "baseline": self.describe(model, "student"),
            "samples": samples,
            "generation": generation,
        }


def metrics_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics in a record or in a model's part of a report."""
    return {key: record[key] for key in METRICS}


def _beginning(tokenizer: PreTrainedTokenizerBase, document: str) -> list[int]:
    """Return the first tokens of a document, without a start marker."""
    # not verbose: only the first tokens are used, whatever the model's context length
    return tokenizer(document[:BEGINNING], add_special_tokens=False, verbose=False)["input_ids"]


def _read_start(file: Path) -> dict[str, Any]:
    """Load what `measure_start` has stored; {} where it cannot be read."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _require_finite(metrics: Mapping[str, Any], side: Side) -> None:
    """Check that a loss is finite.

    Raises:
        UserError: it is not; the message says what is probably wrong.
    """
    if math.isfinite(metrics["loss"]):
        return

    dtype = metrics["dtype"]
    if side == "teacher" and "float16" in dtype.split("+"):
        remedy = (
            "Probably values overflow in half precision: --set teacher.dtype=float32, or bfloat16 on a GPU with it."
        )
    else:
        remedy = "Probably the weights are damaged: load the model again, or choose another one."
    raise UserError(
        f"the {side}'s loss on the held-out text is {metrics['loss']}, and nothing can be learnt from that; its "
        f"weights are in {dtype}. Expected a finite loss. {remedy}"
    )
