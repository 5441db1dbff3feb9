"""Models, windows and teachers of the benchmark: made once, the same for all arms."""

import hashlib
import pickle
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.config import LossConfig, RouterConfig
from models.distillation import Distillation, Method
from models.language_model import vocabulary_size
from models.teacher.cached import CachedTeacher, RememberingCollator
from models.text.collate import PairCollator
from models.text.tokens import MARKER
from models.types import PairedBatch, TeacherSignal
from utils.evaluation.scores import token_nll
from utils.evaluation.written_text import Judge, Sample, Sampling, describe, sample_texts

from .signals import NUMBER, SignalArrays
from .text import Text

ITSELF, TEACHER, ADAPTED = "itself", "the teacher", "itself, adapted"
"""Teachers of a student that was cut: the whole student, whose tokenizer is the same, the other model, and the whole
student after it has learned from the text itself.
"""

TOP_K = 256
MAX_DEPTH = LossConfig().max_depth
SCORED_TOGETHER = 8
"""Windows in a batch that is scored."""
COMPARED_WINDOWS = 8
"""Unseen windows of each corpus on which the student's distributions are compared with the teacher's."""

Window = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Facts that every arm shares."""

    folder: Path
    """For what is made once: models, windows, signals."""
    device: torch.device
    precision: Literal["bf16", "no"]
    """Of autocast in training; students are float32."""
    tokens: int
    """Student tokens that an arm learns from, each once."""
    size: int
    """Windows of a step."""
    length: int
    """Tokens of a window, in either tokenizer."""
    samples: int
    """Texts that a student writes."""
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class _PlainText:
    """The `TextSettings` of a pair that reads plain text."""

    max_length: int
    rows: tuple[int, int]
    cache_dir: Path
    conversations: bool = False
    learn_from: Literal["completions", "all"] = "completions"
    learn_reasoning: bool = True
    decoder_starts: tuple[int, int] | None = None
    text_starts: tuple[str | None, str | None] = (None, None)
    today: date | None = None
    isolate_documents: bool = False


class RealPair:
    """Two models, the windows that arms learn from, and both teachers of the smaller model.

    Args:
        student, teacher: plain folders of transformers.
    """

    def __init__(
        self,
        student: Path,
        teacher: Path,
        text: Text,
        setting: Setting,
    ) -> None:
        self.setting = setting
        device = setting.device
        half = torch.bfloat16 if device.type == "cuda" else torch.float32

        # 1. The models: the smaller one as the origin of students, and as a teacher of its own cuts.
        self.whole = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).to(device)
        itself = AutoModelForCausalLM.from_pretrained(student, dtype=half).to(device)
        other = AutoModelForCausalLM.from_pretrained(teacher, dtype=half).to(device)
        self.tokenizers = {
            "student": AutoTokenizer.from_pretrained(student),
            "teacher": AutoTokenizer.from_pretrained(teacher),
        }

        # 2. What lies between the vocabularies of each pair.
        pair = self._join("teacher", other)
        self.distillations = {
            ITSELF: self._join("student", itself),
            TEACHER: pair,
        }

        # 3. Windows: those of the two tokenizers, of which the student's side serves for the pair of one tokenizer.
        windows, self.unseen = self._read(pair, text)
        self.windows = {
            ITSELF: [_as_both_sides(window) for window in windows],
            TEACHER: windows,
        }
        self.tokens = sum(_supervised(window) for window in windows)

        # 4. Memory of the teachers' answers.
        origin = f"{student.resolve()} {teacher.resolve()} {self.fingerprint}"
        self.digest = hashlib.sha256(origin.encode()).hexdigest()[:12]
        self.signals = {name: self._stored(name) for name in self.distillations}
        self._seed = -1
        self._batches: dict[str, list[PairedBatch]] = {}

        # 5. What students go on writing from, and judges of what they write.
        starts = pair.encoder.starts
        self.prompts = self._beginnings(text, starts[0])
        read = [self.tokenizers["student"].decode(ids[len(starts[0]) :]) for ids, _ in self.prompts]
        self.judges = {
            ITSELF: Judge(itself, self.tokenizers["student"], [(starts[0], prompt) for prompt in read]),
            TEACHER: Judge(other, self.tokenizers["teacher"], [(starts[1], prompt) for prompt in read]),
        }

    def _join(self, side: str, teacher: nn.Module) -> Distillation:
        """Return the pair of the student and a teacher, whose tokenizer is that of a side."""
        tokenizers = {"student": self.tokenizers["student"], "teacher": self.tokenizers[side]}
        text = _PlainText(
            max_length=self.setting.length,
            rows=(vocabulary_size(self.whole), vocabulary_size(teacher)),
            cache_dir=self.setting.folder,
        )
        pair = Method().join(tokenizers, text)
        return replace(pair, teacher=pair.frozen(teacher))

    def _stored(self, name: str) -> SignalArrays:
        """Return the answers of a teacher that are stored so far."""
        file = self.setting.folder / f"signals-{name.split()[-1]}-{self.digest}.npz"
        top_k = min(TOP_K, vocabulary_size(self.distillations[name].teacher.model))
        return SignalArrays(file, top_k)

    def add_adapted(self, model: nn.Module) -> None:
        """Let a model teach that is the whole student, trained on the text that arms learn from."""
        precision = next(self.distillations[ITSELF].teacher.model.parameters()).dtype
        self.distillations[ADAPTED] = self._join("student", model.to(precision))
        self.windows[ADAPTED] = self.windows[ITSELF]
        self.signals[ADAPTED] = self._stored(ADAPTED)

    # --- windows ------------------------------------------------------------------------------------------------------

    def _read(self, pair: Distillation, text: Text) -> tuple[list[Window], dict[str, list[Window]]]:
        """Return the windows to learn from, as many as the tokens of an arm need, and those of each unseen corpus."""
        content = f"{pair.encoder.fingerprint} {self.setting.tokens} {text}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        file = self.setting.folder / f"windows-{self.fingerprint}.pkl"
        if file.exists():
            return pickle.loads(file.read_bytes())

        # All corpora mixed, and always the same windows: seeds differ in their order.
        windows = pair.windows(text.training)
        order = np.random.default_rng(0).permutation(len(windows))
        chosen: list[Window] = []
        tokens = 0
        for index in order:
            if tokens >= self.setting.tokens:
                break
            chosen.append(windows[index] | {NUMBER: len(chosen)})
            tokens += _supervised(windows[index])
        if tokens < self.setting.tokens:
            print(f"the text has {tokens:,} tokens, not {self.setting.tokens:,}: arms learn from all of it, once")

        unseen = {name: pair.windows(documents) for name, documents in text.unseen.items()}
        self.setting.folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps((chosen, unseen)))
        return chosen, unseen

    def _beginnings(self, text: Text, start: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return (prompt, its real continuation) as the student's tokens, of unseen documents of all corpora."""
        prompt_tokens, new_tokens = self.setting.prompt_tokens, self.setting.new_tokens
        by_corpus = []
        for documents in text.unseen.values():
            encoded = self.tokenizers["student"](documents, add_special_tokens=False, verbose=False)["input_ids"]
            long_enough = [ids for ids in encoded if len(ids) >= prompt_tokens + new_tokens // 2]
            by_corpus.append(long_enough)

        # In turns, so that every corpus has its share.
        most = max(map(len, by_corpus))
        documents_in_turn = [ids[number] for number in range(most) for ids in by_corpus if number < len(ids)]
        end = prompt_tokens + new_tokens
        return [
            ([*start, *ids[:prompt_tokens]], ids[prompt_tokens:end])
            for ids in documents_in_turn[: self.setting.samples]
        ]

    @property
    def steps(self) -> int:
        """Optimizer steps of an arm."""
        return len(self.windows[TEACHER]) // self.setting.size

    def windows_of_steps(self, name: str, seed: int) -> list[list[Window]]:
        """Return the windows of each step; the same text for either teacher."""
        windows = self.windows[name]
        order = np.random.default_rng(seed).permutation(len(windows))
        size = self.setting.size
        return [[windows[i] for i in order[first : first + size]] for first in range(0, self.steps * size, size)]

    # --- teachers -----------------------------------------------------------------------------------------------------

    def teacher(self, name: str) -> CachedTeacher:
        """Return a teacher that answers from memory where it can."""
        return CachedTeacher(self.distillations[name].teacher, self.signals[name])

    def batches(self, name: str, seed: int) -> list[PairedBatch]:
        """Return the batches of each step on the device, complete with a teacher's signals.

        They serve all arms of a seed: what is common to them is paid once, and no arm waits for it.
        """
        if seed != self._seed:
            self._seed = seed
            self._batches.clear()
        if name not in self._batches:
            self._batches[name] = self._complete_batches(name, seed)
        return self._batches[name]

    def _complete_batches(self, name: str, seed: int) -> list[PairedBatch]:
        """Compute `batches`; where the teacher has not answered yet, it does now, for all seeds and later runs."""
        began = time.perf_counter()
        store = self.signals[name]
        stored_before = len(store.windows)

        # With what the router samples, which other arms leave aside.
        distillation = self.distillations[name]
        collate = PairCollator(distillation.vocabulary, distillation.encoder.end_of_text, MAX_DEPTH, RouterConfig())
        remember = RememberingCollator(collate, store, ahead=False)
        teacher = self.teacher(name)
        batches = []
        for windows in self.windows_of_steps(name, seed):
            batch = remember(windows).to(self.setting.device)
            batches.append(replace(batch, signal=teacher.signal(batch)))

        answered = len(store.windows) - stored_before
        if answered:
            store.save()
        seconds = time.perf_counter() - began
        print(f"batches of seed {seed}, taught by {name}: {seconds:.0f} s; {answered:,} answers are new", flush=True)
        return batches

    def autocast(self) -> torch.autocast:
        """Return the autocast in which forwards of a training compute."""
        is_half = self.setting.precision == "bf16"
        return torch.autocast(self.setting.device.type, torch.bfloat16, enabled=is_half)

    # --- measurements -------------------------------------------------------------------------------------------------

    def bits_per_byte(self, model: nn.Module, side: Literal["student", "teacher"]) -> dict[str, float]:
        """Return the bits per byte of a model on the unseen documents of each corpus, and on `all` of them."""
        collate = self.distillations[TEACHER].collate
        nats: dict[str, float] = {}
        num_bytes: dict[str, int] = {}
        for corpus, windows in self.unseen.items():
            parts = [windows[i : i + SCORED_TOGETHER] for i in range(0, len(windows), SCORED_TOGETHER)]
            batches = [collate(part) for part in parts]
            nats[corpus], _ = token_nll(model, _scored(batches, side), self.setting.device)
            num_bytes[corpus] = sum(int(batch.bytes.sum()) for batch in batches)

        bits = {corpus: nats[corpus] / num_bytes[corpus] / np.log(2) for corpus in nats}
        bits["all"] = sum(nats.values()) / sum(num_bytes.values()) / np.log(2)
        return {name: float(value) for name, value in bits.items()}

    @cached_property
    def _compared(self) -> list[tuple[PairedBatch, TeacherSignal]]:
        """Unseen windows of each corpus, and what the teacher says of them: computed once, on the device."""
        distillation = self.distillations[TEACHER]
        windows = [window for corpus in self.unseen.values() for window in corpus[:COMPARED_WINDOWS]]

        compared = []
        for first in range(0, len(windows), SCORED_TOGETHER):
            batch = distillation.collate(windows[first : first + SCORED_TOGETHER]).to(self.setting.device)
            compared.append((batch, distillation.teacher.signal(batch, TOP_K)))
        return compared

    def agreement(self, model: nn.Module) -> dict[str, float]:
        """Return how near a student is to the teacher on unseen windows: KL, and how often its first choice is."""
        distillation = replace(self.distillations[TEACHER], method=Method(LossConfig(head_passes="eager")))
        framework = replace(distillation, teacher=None).framework(1, student=model)

        sums = {"kl_sum": 0.0, "agree": 0.0, "count": 0.0}
        for batch, signal in self._compared:
            compared = framework.compare(batch, signal)
            for name in sums:
                sums[name] += float(compared[name])
        return {"kl": sums["kl_sum"] / sums["count"], "top1": sums["agree"] / sums["count"]}

    def written_text(self, model: nn.Module) -> dict[str, float | int | None]:
        """Return the metrics of texts that a student writes behind the beginnings of unseen documents."""
        end = self.distillations[TEACHER].encoder.end_of_text[0]
        sampling = Sampling(self.setting.new_tokens, end)
        samples = sample_texts(model, [prompt for prompt, _ in self.prompts], sampling)
        return describe(samples, self.tokenizers["student"], self.judges)

    def real_text(self) -> dict[str, float | int | None]:
        """Return the same metrics of the real continuations."""
        samples = [Sample(prompt, ids, len(ids) < self.setting.new_tokens) for prompt, ids in self.prompts]
        return describe(samples, self.tokenizers["student"], self.judges)


def _scored(batches: list[PairedBatch], side: str) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Yield inputs and labels of batches."""
    for batch in batches:
        yield batch.scored(side)


def _as_both_sides(window: Window) -> Window:
    """Return a window whose teacher reads what its student reads."""
    columns = {name: value for name, value in window.items() if not name.startswith("teacher_")}
    of_student = {name for name in columns if name.startswith("student_")}
    return columns | {name.replace("student_", "teacher_", 1): columns[name] for name in of_student}


def _supervised(window: Window) -> int:
    """Return the tokens of the student that a window supervises."""
    return int((window["student_roles"][1:] != MARKER).sum())
