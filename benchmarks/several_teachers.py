"""Bits per byte of a student of several teachers, beside those of students of each of them alone.

    REAL_MODELS_DIR=... python -m benchmarks.several_teachers --seeds 0 1 2

All arms see the same windows, cut where all tokenizers agree, in the same order, and take the same steps.
"""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import table
from benchmarks.quality import stories
from benchmarks.real.tables import change, interval
from models.config import Ramp
from models.distillation import Distillation, Method, TeacherShare
from models.teacher.mixture import Mix
from models.types import IGNORE, PairedBatch

DATA = Path(os.environ.get("REAL_MODELS_DIR", ""))
STUDENT = "models/stories260k-llama"
TEACHERS = ("models/tinystories-neo-chat-3m", "models/bitstories-3m", "models/babyllama-char-0.9m")
LENGTH = 128


@dataclass(frozen=True)
class Arm:
    """Weights of the teachers, and how they are mixed."""

    weights: tuple[float | Ramp, ...]
    mix: Mix = "weights"


FADING_OUT = Ramp(((0.0, 1.0), (0.5, 1.0), (0.5001, 0.0)))
FADING_IN = Ramp(((0.5, 0.0), (0.5001, 1.0)))
ARMS = {
    "lm alone": None,
    "neo": Arm((1.0, 0.0, 0.0)),
    "bit": Arm((0.0, 1.0, 0.0)),
    "char": Arm((0.0, 0.0, 1.0)),
    "neo + bit": Arm((1.0, 1.0, 0.0)),
    "3 neo + bit": Arm((3.0, 1.0, 0.0)),
    "neo + bit, likelihood": Arm((1.0, 1.0, 0.0), "likelihood"),
    "bit, then neo": Arm((FADING_IN, FADING_OUT, 0.0)),
    "neo + bit + char": Arm((1.0, 1.0, 1.0)),
    "neo + bit + char, likelihood": Arm((1.0, 1.0, 1.0), "likelihood"),
}
BASE = "neo"


@dataclass(frozen=True)
class _Text:
    """The settings of the text that `Method.join` needs."""

    rows: tuple[int, ...]
    max_length: int = LENGTH
    conversations: bool = False
    learn_from: str = "completions"
    decoder_starts: None = None
    today: None = None
    cache_dir: None = None
    text_starts: tuple[None, ...] = field(default=(None,) * (1 + len(TEACHERS)))


@dataclass(frozen=True)
class Setting:
    """A student with all teachers, and the text."""

    pair: Distillation
    teachers: list[torch.nn.Module]
    windows: list[dict]
    unseen: list[PairedBatch]

    @classmethod
    def load(cls, share: float, unseen: int) -> "Setting":
        """Load models and text.

        Args:
            share: of the training text.
            unseen: stories to measure on.
        """
        names = (STUDENT, *TEACHERS)
        roles = ("student", "teacher", "teacher_2", "teacher_3")
        tokenizers = {role: AutoTokenizer.from_pretrained(DATA / name) for role, name in zip(roles, names, strict=True)}
        teachers = [_load(name) for name in TEACHERS]
        rows = tuple(model.get_output_embeddings().weight.shape[0] for model in (_load(STUDENT), *teachers))

        shares = tuple(TeacherShare() for _ in TEACHERS)
        pair = Method(teachers=shares).join(tokenizers, _Text(rows))
        train, held_out = stories(share)
        unseen_windows = pair.encoder.windows(held_out[:unseen])
        batches = [pair.collate(unseen_windows[first : first + 16]) for first in range(0, len(unseen_windows), 16)]
        return cls(pair, teachers, pair.encoder.windows(train), batches)

    def train(self, arm: Arm | None, args: argparse.Namespace, seed: int) -> float:
        """Train a student and return its bits per byte on the unseen text."""
        student = _load(STUDENT)
        pair = self.pair.without_teacher()
        teacher = None
        if arm is not None:
            shares = tuple(TeacherShare(weight) for weight in arm.weights)
            pair = replace(self.pair, method=Method(teachers=shares, mix=arm.mix))
            frozen = [member.frozen(model) for member, model in zip(pair.members, self.teachers, strict=True)]
            teacher = pair.mixture(frozen)

        module = pair.framework(args.steps, student=student, teacher=teacher).train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
        order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed)).tolist()
        for step in range(args.steps):
            chosen = order[step * args.batch_size : (step + 1) * args.batch_size]
            batch = pair.collate([self.windows[index] for index in chosen])
            module(batch, step).loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return bits_per_byte(student, self.unseen, "student")


def _load(name: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(DATA / name, dtype=torch.float32).eval()


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, batches: Sequence[PairedBatch], side: str) -> float:
    """Return the bits per byte of a model on one side of some batches."""
    model.eval()
    nats = 0.0
    size = 0
    for batch in batches:
        inputs, labels = batch.scored(side)
        logits = model(**inputs).logits.flatten(0, 1)
        nats += float(functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum"))
        size += int(batch.bytes.sum())
    return nats / size / math.log(2)


def main() -> None:
    """Train every arm with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--share", type=float, default=0.25, help="of the training text")
    parser.add_argument("--unseen", type=int, default=40, help="stories to measure on")
    args = parser.parse_args()

    setting = Setting.load(args.share, args.unseen)
    print(f"student before: {bits_per_byte(_load(STUDENT), setting.unseen, 'student'):.4f}", flush=True)
    for number, (name, model) in enumerate(zip(TEACHERS, setting.teachers, strict=True)):
        of_teacher = [batch.mixed.batches[number] for batch in setting.unseen]
        print(f"{name}: {bits_per_byte(model, of_teacher, 'teacher'):.4f}", flush=True)

    bits: dict[str, list[float]] = {}
    for name in args.arms:
        bits[name] = [setting.train(ARMS[name], args, seed) for seed in args.seeds]
        print(name, *(f"{value:.4f}" for value in bits[name]), flush=True)

    rows = []
    for name, values in bits.items():
        beside = [100 * (value / base - 1) for value, base in zip(values, bits.get(BASE, values), strict=True)]
        rows.append([name, interval(values), change(beside)])
    print(table(["teachers", "bits/byte", f"from {BASE}"], rows))


if __name__ == "__main__":
    main()
