"""Bits per byte on unseen text after equal steps on the same batches, for each kind of distillation.

    REAL_MODELS_DIR=... python -m benchmarks.quality --pair neo-4096 --seeds 0 1 2 --variants lm default
    REAL_MODELS_DIR=... python -m benchmarks.quality --table

The yardstick "gold" is the cross-tokenizer loss of TRL's GOLD trainer, with its default settings and the weights
0.7 and 0.3, on the same batches; it needs trl (`pip install --no-deps --target DIR trl`, PYTHONPATH=DIR).

Every run is one line of the results file; a run that is there is not repeated. The teacher's signals are computed
once per window and read by all runs: they do not depend on the student.
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_scheduler
from transformers.utils import logging as transformers_logging

from models.chosen_positions import with_places
from models.config import CurriculumConfig, LossConfig, Ramp, Schedule, Term, values_of
from models.distillation import Distillation, Method
from models.distillation_framework import DistillationFramework
from models.losses.selection import STORED
from models.text.collate import PLACES
from models.types import DistillationOutput, PairedBatch, TeacherSignal
from utils.data.batch_order import Pacing, order_of_epoch
from utils.parallel.accelerator import build_accelerator
from utils.pretrained.layers import LayerChoice, choose_layers, keep_layers
from utils.training.measurements import HostSum, StepSums, TermGradients
from utils.training.step_statistics import StepStatistics

# without it every large temporary is mapped and unmapped again, a third of a step's time on a CPU
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
DATA = Path(os.environ.get("REAL_MODELS_DIR", ""))
NEO = "models/tinystories-neo-chat-3m"
CHOICE_WINDOWS = 16
"""Windows on which is measured how much a layer changes."""


@dataclass(frozen=True)
class Models:
    """A teacher, and a student before its training."""

    teacher: str
    tokenizer: str
    """Folder of the student's tokenizer."""
    weights: str | None
    """Folder of the student; None: a random Llama of width 128."""
    learning_rate: float
    layers: int | None = None
    """Layers that the student takes of its folder; None: all."""
    random: bool = False
    """Only the config of the student is read, and its weights are random."""


STORIES = "models/stories260k-llama"
PAIRS = {
    "neo-4096": Models(NEO, "tokenizers/llama2c-tok4096", None, 2e-3),
    "neo-260k": Models(NEO, STORIES, STORIES, 1e-3),
    "bit-260k": Models("models/bitstories-3m", STORIES, STORIES, 1e-3),
    "random neo-260k": Models(NEO, STORIES, STORIES, 2e-3, random=True),
    "cut neo-260k": Models(NEO, STORIES, STORIES, 2e-3, layers=3),
    "cut neo-neo": Models(NEO, NEO, NEO, 1e-3, layers=4),
}


@dataclass(frozen=True)
class Variant(Method):
    """One way to train a student."""

    gold: bool = False
    """Learn by the loss of TRL's GOLD trainer instead."""

    @property
    def is_taught(self) -> bool:
        """True if the teacher's signal is used."""
        return bool(self.curriculum.used() - {"lm"}) and not self.gold


def _variant(kd: float, span: float, lm: float, **loss: object) -> Variant:
    """Make a variant of constant weights."""
    curriculum = CurriculumConfig(kd=Term(kd), span=Term(span), lm=Term(lm))
    return Variant(LossConfig(**loss), curriculum)


VARIANTS = {
    "lm": _variant(0, 0, 1),
    "default": Variant(),
    "kd": _variant(0.7, 0, 0.3, correction="none"),
    "kd depth 0": _variant(0.7, 0, 0.3, correction="none", max_depth=0),
    "kd + correction": _variant(0.7, 0, 0.3, correction="span"),
    "kd + channel": _variant(0.7, 0, 0.3, correction="channel"),
    "span": _variant(0, 0.7, 0.3),
    "kd + span": _variant(0.7, 0.7, 0.3, correction="none"),
    "kd .1": _variant(0.1, 0, 0.9, correction="none"),
    "kd .3": _variant(0.3, 0, 0.7, correction="none"),
    "kd 1": _variant(1.0, 0, 0.0, correction="none"),
    "kd T 2": _variant(0.7, 0, 0.3, correction="none", temperature=2.0),
    "kd T 4": _variant(0.7, 0, 0.3, correction="none", temperature=4.0),
    "kd renormalise": _variant(0.7, 0, 0.3, correction="none", tail="renormalise"),
    "kd reverse": _variant(0.7, 0, 0.3, correction="none", divergence="reverse_kl"),
    "kd jsd": _variant(0.7, 0, 0.3, correction="none", divergence="jsd"),
    "kd skew": _variant(0.7, 0, 0.3, correction="none", divergence="skew_kl"),
    "k 16": Variant(loss=LossConfig(top_k=16)),
    "k 64": Variant(loss=LossConfig(top_k=64)),
    "gold": Variant(gold=True),
}


def stories(share: float) -> tuple[list[str], list[str]]:
    """Return (training, unseen) stories: every twelfth is unseen; `share` of the training ones is used."""
    texts: list[str] = []
    for name in ("tinystories-v1", "tinystories-v2"):
        raw = (DATA / f"corpora/{name}.txt").read_text(encoding="utf-8")
        texts += [text.strip() for text in raw.split("<|endoftext|>") if text.strip()]

    # the two files share stories
    texts = list(dict.fromkeys(texts))
    train = [text for number, text in enumerate(texts) if number % 12]
    return train[:: round(1 / share)], texts[::12]


def kd_and_text(kd: Schedule) -> CurriculumConfig:
    """Return a curriculum in which LM has what KD leaves of a weight of 1."""
    if isinstance(kd, Ramp):
        points = tuple((progress, 1 - weight) for progress, weight in kd.points)
        return CurriculumConfig(kd=Term(kd), lm=Term(replace(kd, points=points)))
    return CurriculumConfig(kd=Term(kd), lm=Term(1 - kd))


class Pair:
    """Windows, students and the teacher's signals of one pair of models; signals are kept in a folder."""

    def __init__(self, name: str, share: float, cache: Path) -> None:
        self.models = PAIRS[name]
        self.learning_rate = self.models.learning_rate
        self.tokenizers = {
            "student": AutoTokenizer.from_pretrained(DATA / self.models.tokenizer),
            "teacher": AutoTokenizer.from_pretrained(DATA / self.models.teacher),
        }
        self.student_rows = len(self.tokenizers["student"])
        self.layers: LayerChoice | None = None
        teacher = AutoModelForCausalLM.from_pretrained(DATA / self.models.teacher, dtype=torch.float32)

        whole = self.student(0)
        pair = Distillation.from_models(whole, teacher, self.tokenizers, max_length=256)
        train, self.unseen_texts = stories(share)
        self.windows, self.unseen = pair.windows(train), pair.windows(self.unseen_texts)
        if self.models.layers is not None:
            texts = [torch.from_numpy(window["student_ids"]).long() for window in self.windows[:CHOICE_WINDOWS]]
            self.layers = choose_layers(whole, self.models.layers, texts)
            print(self.layers, flush=True)

        pair = pair.with_counted_channel(self.windows)
        self.teacher = pair.frozen(teacher)
        self.distillation = replace(pair, student=None, teacher=self.teacher)
        # Pairs that differ in their students' weights alone have the same signals.
        self.file = cache / f"{Path(self.models.teacher).name}-{Path(self.models.tokenizer).name}-{share:g}.pt"

    def under(self, method: Method) -> Distillation:
        """Return the pair under other settings of what is learned."""
        return replace(self.distillation, method=method)

    def signals(self, top_k: int, layers: Sequence[int]) -> list[TeacherSignal]:
        """Return the teacher's signal of each training window, and its states after some layers."""
        states = "".join(f".{layer}" for layer in layers)
        file = self.file.with_suffix(f".k{top_k}{states}.pt")

        if not file.exists():
            stored = []
            for window in self.windows:
                signal = vars(self.teacher.signal(self.distillation.collate([window]), top_k, layers))
                # token numbers need no 64 bits
                stored.append({name: value.int() if name == "ids" else value for name, value in signal.items()})

            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(stored, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)

        return [TeacherSignal(**signal) for signal in torch.load(file, mmap=True)]

    def student(self, seed: int) -> torch.nn.Module:
        """Load the student, with the layers that it takes once they are chosen, or make one of random weights."""
        torch.manual_seed(seed)
        if self.models.random:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DATA / self.models.weights))
        if self.models.weights:
            whole = AutoModelForCausalLM.from_pretrained(DATA / self.models.weights, dtype=torch.float32)
            return whole if self.layers is None else keep_layers(whole, self.layers.indices)

        return AutoModelForCausalLM.from_config(small_llama(self.student_rows))


def small_llama(vocabulary: int) -> LlamaConfig:
    """Return the config of the student of pairs that have no weights for one."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def join(signals: list[TeacherSignal], rows: list[torch.Tensor]) -> TeacherSignal:
    """Return the signal of a batch, from those of its windows.

    Args:
        rows: the rows of each window's signal that the batch asks for.
    """
    parts = []
    for signal, chosen in zip(signals, rows, strict=True):
        at_rows = (
            signal.ids[chosen].long(),
            signal.log_probs[chosen],
            signal.log_tail[chosen],
            signal.log_mass[chosen],
        )
        parts.append((*at_rows, signal.realised))
    joined = TeacherSignal(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if signals[0].hidden is None:
        return joined

    # states are as long as their window
    length = max(signal.hidden[0].shape[1] for signal in signals)
    layers = []
    for states in zip(*(signal.hidden for signal in signals), strict=True):
        padded = [torch.nn.functional.pad(state, (0, 0, 0, length - state.shape[1])) for state in states]
        layers.append(torch.cat(padded))
    return replace(joined, hidden=tuple(layers))


def gold_loss(lm: float, kd: float) -> Callable[..., Tensor]:
    """Make the ULDLoss of TRL's GOLD trainer with its default settings and these weights."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = SimpleNamespace(
        uld_crossentropy_weight=lm,
        uld_distillation_weight=kd,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=True,
        uld_skip_teacher_eos=True,
        use_extended_uld=True,
        uld_token_merge_strategy="observed",
    )
    return ULDLoss(settings)


def merged_probabilities(
    probs: Tensor,
    groups: Sequence[Sequence[int]],
    token_ids: Sequence[int],
) -> Tensor:
    """Return what ULDLoss merges by "observed", in a few operations: its own loop over groups takes minutes on a GPU.

    Args:
        probs: [T, V] distributions.
        groups: positions of each group, neighbours.
        token_ids: [T] the text.

    Returns:
        [groups, V]: the distribution at the first position of each group, times the probabilities of the group's later
        tokens.
    """
    first = torch.tensor([group[0] for group in groups], device=probs.device)
    later = [(number, position) for number, group in enumerate(groups) for position in group[1:]]
    if not later:
        return probs[first]

    number, position = torch.tensor(later, device=probs.device).T
    tokens = torch.tensor(token_ids, device=probs.device)
    log_probs = probs[position, tokens[position]].clamp_min(1e-8).log()
    log_factors = torch.zeros(len(groups), device=probs.device, dtype=probs.dtype).index_add(0, number, log_probs)
    return probs[first] * log_factors.exp()[:, None]


class Gold:
    """TRL's GOLD loss (ULDLoss of trl.experimental.gold) on our windows, whose tokens come with byte offsets."""

    def __init__(self) -> None:
        self.loss = gold_loss(lm=0.3, kd=0.7)
        self.loss._merge_probabilities_with_alignment_groups = merged_probabilities

    def __call__(self, student: torch.nn.Module, teacher: torch.nn.Module, batch: PairedBatch, windows: list) -> Tensor:
        offsets, labels = [], []
        for side, ids, mask in (
            ("student", batch.student_ids, batch.student_mask),
            ("teacher", batch.teacher_ids, batch.teacher_mask),
        ):
            padded = torch.zeros(*ids.shape, 2, dtype=torch.long)
            for row, window in enumerate(windows):
                span = np.stack([window[f"{side}_starts"], window[f"{side}_ends"]], 1)
                padded[row, : len(span)] = torch.from_numpy(span)
            offsets.append(padded)

            # nothing predicts the first token
            is_padding = mask == 0
            labels.append(ids.masked_fill(is_padding, -100).index_fill(1, torch.tensor([0]), -100))

        device = next(student.parameters()).device
        batch = batch.to(device)
        labels = [ids.to(device) for ids in labels]
        with torch.no_grad():
            teacher_logits = teacher(input_ids=batch.teacher_ids, attention_mask=batch.teacher_mask).logits
        logits = student(input_ids=batch.student_ids, attention_mask=batch.student_mask).logits
        return self.loss(logits, teacher_logits, *labels, batch.student_ids, batch.teacher_ids, *offsets)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, pair: Pair, side: str) -> float:
    """Measure a model on the unseen stories, as the student or the teacher of the pair."""
    nats = num_bytes = 0.0
    model.eval()
    for start in range(0, len(pair.unseen), 12):
        batch = pair.distillation.collate(pair.unseen[start : start + 12])
        inputs, labels = batch.scored(side)
        logits = model(**inputs).logits.float()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        num_bytes += batch.bytes.sum().item()
    return nats / num_bytes / math.log(2)


def window_order(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the windows of each step: every window once before any comes again."""
    rng = np.random.default_rng(seed)
    order = np.zeros(0, dtype=int)
    while True:
        if len(order) < size:
            order = np.append(order, rng.permutation(count))
        yield order[:size]
        order = order[size:]


def _order(
    pair: Pair,
    framework: DistillationFramework,
    size: int,
    seed: int,
    signals: Sequence[TeacherSignal],
) -> Iterator[np.ndarray]:
    """Yield the windows of each step; by the teacher's bits per byte where the curriculum does not open all text."""
    count = len(pair.windows)
    if not framework.curriculum.opens_text:
        yield from window_order(count, size, seed)
        return

    bits = []
    for window, signal in zip(pair.windows, signals, strict=True):
        batch = pair.distillation.collate([window])
        bits.append(batch.teacher_nll_by_window(signal).item() / batch.bytes.item())

    pacing = Pacing(np.argsort(bits, kind="stable"), framework.curriculum.open_text)
    for epoch in itertools.count():
        order = order_of_epoch(count, seed, epoch, global_batch=size, pacing=pacing)
        yield from np.split(order, range(size, count, size))


def run(pair: Pair, variant: Variant, seed: int, steps: int, size: int) -> dict:
    """Train one student and measure it on text that nobody was trained on."""
    student, training = train(pair, variant, seed, steps, size)
    return {"bits_per_byte": bits_per_byte(student, pair, "student"), **training}


def train(pair: Pair, variant: Variant, seed: int, steps: int, size: int) -> tuple[torch.nn.Module, dict]:
    """Train one student; return it and what the training was like."""
    # 1. The student, and the signals that it will be taught by.
    distillation = pair.under(variant)
    student = pair.student(seed)
    framework = distillation.framework(steps, student=student)
    signals = []
    if variant.is_taught:
        signals = pair.signals(variant.loss.top_k, framework.router.teacher_layers if framework.router else ())
    gold = Gold() if variant.gold else None

    if framework.router is not None:
        framework.calibrate([distillation.collate(pair.windows[: variant.router.calibration_windows])])
    groups = framework.parameter_groups(pair.learning_rate, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=pair.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_scheduler("cosine", optimizer, steps // 20, steps)

    # 2. Steps, on the same batches for every variant; the choice of positions is a part of the training's time.
    started = time.process_time()
    chosen_windows = _windows_of(pair, variant, student)
    last_bits: list[float] = []
    terms: dict[str, float] = {}
    statistics = StepStatistics(framework)
    student.train()
    for step, chosen in zip(range(steps), _order(pair, framework, size, seed, signals), strict=False):
        windows = [chosen_windows[i] for i in chosen]
        batch = distillation.collate(windows)
        if gold is not None:
            gold(student, pair.teacher.model, batch, windows).backward()
        else:
            signal = _signal_of(pair, variant, signals, chosen_windows, chosen) if variant.is_taught else None
            output = _forward(framework, statistics, batch, step, signal)
            output.loss.backward()
            terms = {name: term.sum.item() / max(term.count, 1) for name, term in output.terms.items()}
            if step >= steps - 100 and "lm" in output.terms:
                last_bits.append(output.terms["lm"].sum.item() / batch.bytes.sum().item() / math.log(2))

        torch.nn.utils.clip_grad_norm_(framework.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return student, {
        "terms": terms,
        "training_bits_per_byte": float(np.mean(last_bits)) if last_bits else None,
        "seconds": time.process_time() - started,
        "epochs": round(steps * size / len(pair.windows), 2),
    }


def _forward(
    framework: DistillationFramework,
    statistics: StepStatistics,
    batch: PairedBatch,
    step: int,
    signal: TeacherSignal | None,
) -> DistillationOutput:
    """Return the output of a step of one micro-batch, and take from it what the next step's weights are made of."""
    if not statistics.is_used:
        return framework(batch, step, signal=signal)

    trained = [parameter for parameter in framework.student.parameters() if parameter.requires_grad]
    sums = StepSums(gradients=TermGradients(trained) if statistics.needs_gradients else None)
    term_graphs = statistics.needs_gradients
    output = framework(batch, step, signal=signal, term_graphs=term_graphs, **statistics.options())
    if sums.gradients is not None:
        sums.gradients.add(output, batch.counts)
    sums.add(output, is_idle=False)

    accelerator = build_accelerator("no", cpu=True)
    statistics.take(sums, batch.counts, host=HostSum(accelerator, []), accelerator=accelerator)
    return output


def _windows_of(pair: Pair, variant: Variant, student: torch.nn.Module) -> Sequence[dict]:
    """Return the training windows, with positions that the untrained student chooses where a variant asks for it."""
    if not variant.is_taught or variant.loss.select_by != STORED:
        return pair.windows
    share = max(values_of(variant.curriculum.select))
    return with_places(pair.windows, pair.under(variant).collate, student, share)


def _signal_of(
    pair: Pair,
    variant: Variant,
    signals: list[TeacherSignal],
    windows: Sequence[dict],
    chosen: np.ndarray,
) -> TeacherSignal:
    """Return the stored signal of a batch of windows, at the depths and positions that a variant learns from."""
    rows = []
    for number in chosen:
        depth = pair.distillation.collate([pair.windows[number]]).depth
        row = (depth <= variant.loss.max_depth).nonzero()[:, 0]
        places = windows[number].get(PLACES)
        rows.append(row if places is None else row[torch.from_numpy(places >= 0)])
    return join([signals[number] for number in chosen], rows)


def table(results: Path, names: Sequence[str], base: str) -> None:
    """Print mean and range over seeds of every variant, per pair and budget.

    Args:
        base: the variant that the others are compared with, seed by seed.
    """
    groups: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in results.read_text().splitlines():
        result = json.loads(line)
        setting = (result["pair"], result["share"], result["steps"], result["size"])
        groups[setting][result["variant"]].append(result)

    for (pair, share, steps, size), variants in groups.items():
        any_run = next(iter(variants.values()))[0]
        text = f"{share:.0%} of the text ({any_run['epochs']} epochs)"
        before = f"teacher {any_run['teacher']:.4f}, student before {any_run['initial']:.4f} bits per byte"
        print(f"\n{pair}: {steps} steps of {size} windows, {text}; {before}\n")

        print(f"| variant | bits per byte, unseen | seeds | range | against {base} | training text |")
        print("|---|---|---|---|---|---|")
        base_of_seed = {result["seed"]: result["bits_per_byte"] for result in variants.get(base, [])}
        for name in names:
            if name in variants:
                print(f"| {' | '.join(_cells(name, variants[name], base_of_seed))} |")


def _cells(name: str, runs: list[dict], base_of_seed: dict[int, float]) -> list[str]:
    """Return the row of one variant."""
    values = [run["bits_per_byte"] for run in runs]
    changes = [run["bits_per_byte"] / base_of_seed[run["seed"]] - 1 for run in runs if run["seed"] in base_of_seed]
    training = [run["training_bits_per_byte"] for run in runs if run["training_bits_per_byte"]]
    return [
        name,
        f"{np.mean(values):.4f}",
        str(len(values)),
        f"{min(values):.4f} to {max(values):.4f}",
        f"{np.mean(changes):+.2%}" if changes else "",
        f"{np.mean(training):.4f}" if training else "",
    ]


def main(variants: dict[str, Variant], results: str, doc: str, base: str) -> None:
    """Train the variants that the command line asks for, and print the table."""
    if sys.platform == "linux" and not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="neo-4096")
    parser.add_argument("--variants", nargs="+", choices=variants, default=list(variants))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--size", type=int, default=12, help="windows a step")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training stories")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(".quality-cache"))
    parser.add_argument("--results", type=Path, default=Path(results))
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    args = parser.parse_args()

    if not args.table:
        prepare(parser, args.threads)
        train_missing(args, variants)
    if args.results.exists():
        table(args.results, list(variants), base)


def prepare(parser: argparse.ArgumentParser, threads: int) -> None:
    """Check that the data is there, silence transformers, and choose the threads; without data the program ends."""
    if not (DATA / NEO).is_dir():
        parser.error("set REAL_MODELS_DIR to a folder with models/, tokenizers/ and corpora/")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)


def train_missing(args: argparse.Namespace, variants: dict[str, Variant]) -> None:
    """Do the runs that the results file lacks, and add a line to it for each."""
    pair = Pair(args.pair, args.share, args.cache)
    setting = {"pair": args.pair, "share": args.share, "steps": args.steps, "size": args.size}
    levels = {
        "teacher": bits_per_byte(pair.teacher.model, pair, "teacher"),
        "initial": bits_per_byte(pair.student(args.seeds[0]), pair, "student"),
    }

    for seed in args.seeds:
        for variant in args.variants:
            job = setting | {"variant": variant, "seed": seed}
            lines = args.results.read_text().splitlines() if args.results.exists() else []
            if any(job.items() <= json.loads(line).items() for line in lines):
                continue

            result = job | levels | run(pair, variants[variant], seed, args.steps, args.size)
            with args.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(VARIANTS, "quality-results.jsonl", __doc__, base="lm")
