"""Does distillation help, and which kind? Bits per byte on unseen text after equal steps on the same batches.

    REAL_MODELS_DIR=... python -m benchmarks.quality --pair neo-4096 --seeds 0 1 2 --variants lm default
    REAL_MODELS_DIR=... python -m benchmarks.quality --table

The yardstick "gold" is the cross-tokenizer loss of TRL's GOLD trainer, with its default settings and the weights
0.7 and 0.3, on the same batches; it needs trl (`pip install --no-deps --target DIR trl`, PYTHONPATH=DIR).

Every run is one line of the results file; a run that is there is not repeated. The teacher's signals are computed
once per window and read by all runs: they do not depend on the student.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, get_scheduler
from transformers.utils import logging as transformers_logging

from models.config import CurriculumConfig, LossConfig, RouterConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.student_aware_router import ROUTER_TERMS
from models.teacher.frozen import FrozenTeacher
from models.text.collate import PairCollator, count_channel
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import PairedBatch, TeacherSignal

# without it every large temporary is mapped and unmapped again, a third of a step's time on a CPU
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**33), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
DATA = Path(os.environ.get("REAL_MODELS_DIR", ""))
NEO = "models/tinystories-neo-chat-3m"
PAIRS = {
    # name: teacher, student's tokenizer, student's weights (None: random Llama), learning rate
    "neo-4096": (NEO, "tokenizers/llama2c-tok4096", None, 2e-3),
    "neo-260k": (NEO, "models/stories260k-llama", "models/stories260k-llama", 1e-3),
    "bit-260k": ("models/bitstories-3m", "models/stories260k-llama", "models/stories260k-llama", 1e-3),
}


@dataclass(frozen=True)
class Variant:
    """One way to train a student."""

    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    gold: bool = False

    @property
    def taught(self) -> bool:
        return bool(self.curriculum.used() - {"lm"}) and not self.gold

    @property
    def routed(self) -> bool:
        return bool(self.curriculum.used() & {*ROUTER_TERMS})


def _variant(kd: float, span: float, lm: float, **loss: object) -> Variant:
    return Variant(CurriculumConfig(kd=Term(kd), span=Term(span), lm=Term(lm)), LossConfig(**loss))


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
    """(training, unseen) stories: every twelfth is unseen; `share` of the training ones is used."""
    texts: list[str] = []
    for name in ("tinystories-v1", "tinystories-v2"):
        raw = (DATA / f"corpora/{name}.txt").read_text(encoding="utf-8")
        texts += [t.strip() for t in raw.split("<|endoftext|>") if t.strip()]
    texts = list(dict.fromkeys(texts))
    train = [t for i, t in enumerate(texts) if i % 12]
    return train[:: round(1 / share)], texts[::12]


class Pair:
    """Models, windows and teacher signals of one pair; prepared once and kept in `cache`."""

    def __init__(self, name: str, share: float, cache: Path) -> None:
        teacher, tokenizer, self.weights, self.learning_rate = PAIRS[name]
        self.student_tokenizer = AutoTokenizer.from_pretrained(DATA / tokenizer)
        teacher_tokenizer = AutoTokenizer.from_pretrained(DATA / teacher)
        model = AutoModelForCausalLM.from_pretrained(DATA / teacher, dtype=torch.float32)
        rows = model.get_output_embeddings().weight.shape[0]
        self.map = VocabularyMap.build(self.student_tokenizer, teacher_tokenizer, len(self.student_tokenizer), rows)
        encoder = PairEncoder(self.student_tokenizer, teacher_tokenizer, 256)
        train, unseen = stories(share)
        self.windows, self.unseen = encoder.windows(train), encoder.windows(unseen)
        self.map = self.map.with_channel(count_channel(self.windows))
        self.end_of_text = encoder.end_of_text
        self.teacher = FrozenTeacher(model, self.map)
        self.file = cache / f"{name}-{share:g}.pt"

    def collator(self, max_depth: int, router: RouterConfig | None = None) -> PairCollator:
        return PairCollator(self.map, self.end_of_text, max_depth, router)

    def signals(self, top_k: int, layers: Sequence[int]) -> list[TeacherSignal]:
        """The teacher's signal of each training window, and its states after some layers."""
        file = self.file.with_suffix(f".k{top_k}" + "".join(f".{layer}" for layer in layers) + ".pt")
        if not file.exists():
            stored, collate = [], self.collator(LossConfig().max_depth)
            for window in self.windows:
                signal = vars(self.teacher.signal(collate([window]), top_k, layers))
                stored.append({k: v.int() if k == "ids" else v for k, v in signal.items()})
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(stored, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").rename(file)
        return [TeacherSignal(**s) for s in torch.load(file, mmap=True)]

    def student(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        if self.weights:
            return AutoModelForCausalLM.from_pretrained(DATA / self.weights, dtype=torch.float32)
        config = LlamaConfig(
            vocab_size=len(self.student_tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        return AutoModelForCausalLM.from_config(config)


def join(signals: list[TeacherSignal], rows: list[torch.Tensor]) -> TeacherSignal:
    """The signal of a batch from those of its windows; `rows`: which rows of each are asked for."""
    parts = [
        (s.ids[r].long(), s.log_probs[r], s.log_tail[r], s.log_mass[r], s.realised)
        for s, r in zip(signals, rows, strict=True)
    ]
    signal = TeacherSignal(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if signals[0].hidden is None:
        return signal
    length = max(s.hidden[0].shape[1] for s in signals)
    layers = zip(*(s.hidden for s in signals), strict=True)
    padded = ([torch.nn.functional.pad(x, (0, 0, 0, length - x.shape[1])) for x in layer] for layer in layers)
    return replace(signal, hidden=tuple(torch.cat(rows) for rows in padded))


def gold_loss(lm: float, kd: float) -> Callable[..., Tensor]:
    """ULDLoss of TRL's GOLD trainer with its default settings and these weights."""
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


class Gold:
    """TRL's GOLD loss (ULDLoss of trl.experimental.gold) on our windows, whose tokens come with byte offsets."""

    def __init__(self) -> None:
        self.loss = gold_loss(lm=0.3, kd=0.7)

    def __call__(self, student: torch.nn.Module, teacher: torch.nn.Module, batch: PairedBatch, windows: list) -> Tensor:
        offsets, labels = [], []
        for side, ids, mask in (
            ("student", batch.student_ids, batch.student_mask),
            ("teacher", batch.teacher_ids, batch.teacher_mask),
        ):
            padded = torch.zeros(*ids.shape, 2, dtype=torch.long)
            for i, window in enumerate(windows):
                span = np.stack([window[f"{side}_starts"], window[f"{side}_ends"]], 1)
                padded[i, : len(span)] = torch.from_numpy(span)
            offsets.append(padded)
            labels.append(ids.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([0]), -100))
        with torch.no_grad():
            teacher_logits = teacher(input_ids=batch.teacher_ids, attention_mask=batch.teacher_mask).logits
        logits = student(input_ids=batch.student_ids, attention_mask=batch.student_mask).logits
        ids = (batch.student_ids, batch.teacher_ids)
        return self.loss(logits, teacher_logits, *labels, *ids, *offsets)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, pair: Pair, side: str) -> float:
    nll = total = 0.0
    model.eval()
    for i in range(0, len(pair.unseen), 12):
        batch = pair.collator(0)(pair.unseen[i : i + 12])
        inputs, labels = batch.scored(side)
        logits = model(**inputs).logits.float()
        nll += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        total += batch.bytes.sum().item()
    return nll / total / math.log(2)


def run(pair: Pair, variant: Variant, seed: int, steps: int, size: int) -> dict:
    """Train one student and measure it."""
    loss = variant.loss
    student = pair.student(seed)
    framework = DistillationFramework(
        student, pair.teacher, pair.map, loss, CurriculumScheduler(variant.curriculum, loss, steps), variant.router
    )
    router = variant.router if framework.router is not None else None
    signals = pair.signals(loss.top_k, framework.router.teacher_layers if router else ()) if variant.taught else []
    gold = Gold() if variant.gold else None
    collate, full_depth = pair.collator(loss.max_depth, router), pair.collator(LossConfig().max_depth)
    if router:
        framework.calibrate([collate(pair.windows[: router.calibration_windows])])
    groups = framework.parameter_groups(pair.learning_rate, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=pair.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_scheduler("cosine", optimizer, steps // 20, steps)
    start, order, last = time.time(), np.zeros(0, dtype=int), []
    rng = np.random.default_rng(seed)
    student.train()
    for step in range(steps):
        if len(order) < size:
            order = np.append(order, rng.permutation(len(pair.windows)))
        chosen, order = order[:size], order[size:]
        batch = collate([pair.windows[i] for i in chosen])
        signal = None
        if variant.taught:
            depths = [full_depth([pair.windows[i]]).depth for i in chosen]
            signal = join([signals[i] for i in chosen], [(d <= loss.max_depth).nonzero()[:, 0] for d in depths])
        if gold is not None:
            gold(student, pair.teacher.model, batch, [pair.windows[i] for i in chosen]).backward()
        else:
            output = framework(batch, step, signal=signal)
            output.loss.backward()
        torch.nn.utils.clip_grad_norm_(framework.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step >= steps - 100 and gold is None and "lm" in output.terms:
            last.append(output.terms["lm"].sum.item() / batch.bytes.sum().item() / math.log(2))
    terms = {} if gold is not None else {name: t.sum.item() / max(t.count, 1) for name, t in output.terms.items()}
    return {
        "bits_per_byte": bits_per_byte(student, pair, "student"),
        "terms": terms,
        "training_bits_per_byte": float(np.mean(last)) if last else None,
        "seconds": round(time.time() - start),
        "epochs": round(steps * size / len(pair.windows), 2),
    }


def table(results: Path, names: Sequence[str], base: str) -> None:
    """Print mean and range over seeds of every variant, per pair and budget; `base`: what they are compared with."""
    groups: dict[tuple, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in results.read_text().splitlines():
        r = json.loads(line)
        groups[r["pair"], r["share"], r["steps"], r["size"]][r["variant"]].append(r)
    for (pair, share, steps, size), variants in groups.items():
        any_run = next(iter(variants.values()))[0]
        print(
            f"\n{pair}: {steps} steps of {size} windows, {share:.0%} of the text ({any_run['epochs']} epochs); ", end=""
        )
        print(f"teacher {any_run['teacher']:.4f}, student before {any_run['initial']:.4f} bits per byte\n")
        print(f"| variant | bits per byte, unseen | seeds | range | against {base} | training text |")
        print("|---|---|---|---|---|---|")
        of_base = {r["seed"]: r["bits_per_byte"] for r in variants.get(base, [])}
        for name in [v for v in names if v in variants]:
            runs = variants[name]
            values = [r["bits_per_byte"] for r in runs]
            change = [r["bits_per_byte"] / of_base[r["seed"]] - 1 for r in runs if r["seed"] in of_base]
            against = f"{np.mean(change):+.2%}" if change else ""
            training = [r["training_bits_per_byte"] for r in runs if r["training_bits_per_byte"]]
            cells = [name, f"{np.mean(values):.4f}", len(values), f"{min(values):.4f} to {max(values):.4f}", against]
            cells.append(f"{np.mean(training):.4f}" if training else "")
            print(f"| {' | '.join(map(str, cells))} |")


def main(variants: dict[str, Variant], results: str, doc: str, base: str) -> None:
    """The command: train the variants that are asked for, print the table."""
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
        if not DATA.name or not DATA.is_dir():
            parser.error("set REAL_MODELS_DIR to a folder with models/, tokenizers/ and corpora/")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        torch.set_num_threads(args.threads)
        pair = Pair(args.pair, args.share, args.cache)
        setting = {"pair": args.pair, "share": args.share, "steps": args.steps, "size": args.size}
        levels = {
            "teacher": bits_per_byte(pair.teacher.model, pair, "teacher"),
            "initial": bits_per_byte(pair.student(args.seeds[0]), pair, "student"),
        }
        for seed in args.seeds:
            for variant in args.variants:
                job = setting | {"variant": variant, "seed": seed}
                done = args.results.read_text().splitlines() if args.results.exists() else []
                if any(job.items() <= json.loads(line).items() for line in done):
                    continue
                result = job | levels | run(pair, variants[variant], seed, args.steps, args.size)
                with args.results.open("a") as out:
                    out.write(json.dumps(result) + "\n")
                print(json.dumps(result), flush=True)
    if args.results.exists():
        table(args.results, list(variants), base)


if __name__ == "__main__":
    main(VARIANTS, "quality-results.jsonl", __doc__, base="lm")
