"""Cost of KD at a share of the positions, beside KD at all of them: a step, its teacher, and the bytes of a cache.

    python -m benchmarks.selection --share 0.2

Random weights and text, with the vocabularies of Qwen2.5 and SmolLM2 and small bodies (see `benchmarks.step_time`), so
that heads make up most of a step, as they do for small models. All arms take turns in one process: in each round the
step, forward and backward without an optimizer, and once more by itself the teacher's part of it. Ratios are those of a
round. The bytes are those of a window in a teacher cache of 64 outcomes a row.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import Run, alternate, describe, machine, table, write
from benchmarks.step_time import (
    STUDENT_VOCABULARY,
    TEACHER_VOCABULARY,
    random_framework,
    random_windows,
    vocabulary_map,
)
from models.chosen_positions import with_places
from models.config import CurriculumConfig, LossConfig
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.teacher.cached import NUMBERS
from models.teacher.kept_rows import RowsByEntropy
from models.text.collate import PairCollator
from models.types import PairedBatch
from utils.teacher_cache.codec import Codec, Said

CACHED_TOP_K = 64
ALL = "all positions"
SCORES = ("student_entropy", "teacher_entropy", "first_student")


class Arms:
    """A pair of models, and what each arm trains it on."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        vocabulary = vocabulary_map(TEACHER_VOCABULARY, STUDENT_VOCABULARY)
        self.framework = random_framework(
            args.shape,
            vocabulary,
            teacher_vocabulary=TEACHER_VOCABULARY,
            student_vocabulary=STUDENT_VOCABULARY,
            teacher_dtype=torch.float32,
            device=self.device,
        )
        collate = PairCollator(vocabulary, (None, None), LossConfig().max_depth)
        windows = random_windows(vocabulary, args.batch, args.length)
        chosen = with_places(windows, collate, self.framework.student, args.share)

        self.batches = dict.fromkeys((ALL, *SCORES), collate(windows).to(self.device))
        self.batches["first_student"] = collate(chosen).to(self.device)
        self.share = args.share
        self.frameworks = {ALL: self.framework}
        for name in SCORES:
            self.frameworks[name] = self._under(vocabulary, name, args.share)

    def _under(self, vocabulary, name: str, share: float) -> DistillationFramework:
        """Return the same models under KD at a share of the positions."""
        loss = LossConfig(select_by=name)
        curriculum = replace(CurriculumConfig(), select=share)
        scheduler = CurriculumScheduler(curriculum, loss, 100)
        return DistillationFramework(self.framework.student, self.framework.teacher, vocabulary, loss, scheduler)

    def step(self, name: str) -> None:
        """Compute the gradient of one batch."""
        self.frameworks[name](self.batches[name], 0).loss.backward()

    def teach(self, name: str) -> object:
        """Return what the teacher says of a batch."""
        return self.framework.teacher.signal(self.batches[name], LossConfig().top_k)

    def clear(self) -> None:
        """Drop the gradients."""
        self.framework.zero_grad(set_to_none=True)

    def cache_bytes(self, name: str) -> float:
        """Return the bytes per student token that a cache keeps of a batch."""
        batch: PairedBatch = self.batches[name]
        signal = self.framework.teacher.signal(batch, CACHED_TOP_K)
        if name == "teacher_entropy":
            signal = RowsByEntropy(self.framework.projection, self.share)(batch, signal)
        arrays = [getattr(signal, number).cpu().numpy() for number in NUMBERS]
        return len(Codec(TEACHER_VOCABULARY, CACHED_TOP_K).encode(Said(*arrays))) / batch.counts["lm"]


def rows_of(arms: Arms, runs: dict[str, list[Run]]) -> list[Sequence[object]]:
    """Return a row of figures for each arm."""
    seconds = {name: np.array([run.seconds for run in measured]) for name, measured in runs.items()}
    every = arms.cache_bytes(ALL)

    rows = []
    for name in (ALL, *SCORES):
        step, teacher = seconds[f"{name}, step"], seconds[f"{name}, teacher"]
        step_ratio = step / seconds[f"{ALL}, step"]
        teacher_ratio = teacher / seconds[f"{ALL}, teacher"]
        size = arms.cache_bytes(name)
        rows.append(
            [
                name,
                f"{np.median(step):.2f}",
                f"{np.median(step_ratio):.2f} ({step_ratio.min():.2f} to {step_ratio.max():.2f})",
                f"{np.median(teacher):.2f}",
                f"{np.median(teacher_ratio):.2f} ({teacher_ratio.min():.2f} to {teacher_ratio.max():.2f})",
                f"{size:.0f}",
                f"{size / every:.2f}",
            ]
        )
    return rows


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    arms = Arms(args)
    works = {}
    for name in (ALL, *SCORES):
        works[f"{name}, step"] = lambda name=name: arms.step(name)
        works[f"{name}, teacher"] = lambda name=name: arms.teach(name)
    runs = alternate(works, arms.device, args.repeats, before=arms.clear)

    facts = machine(arms.device, args.threads)
    rows = rows_of(arms, runs)
    header = ["KD at", "step, s", "of all", "teacher, s", "of all", "cache, bytes per token", "of all"]
    print(f"{describe(facts)}\n\n{table(header, rows)}")
    if args.json:
        write(args.json, {"machine": facts, "settings": {**vars(args), "json": None}, "rows": rows})


if __name__ == "__main__":
    main()
