"""Time that the teacher cache saves, room that it takes, and numbers that it changes.

    REAL_MODELS_DIR=... python -m benchmarks.cache
    REAL_MODELS_DIR=... python -m benchmarks.cache --train 300 --pair neo-260k

Steps are forward and backward of the framework, without optimizer, on the same batches; "cached" has its signal
attached, as a DataLoader's worker does, and what the worker takes is a column of its own. "real" is the pair neo-4096
of `benchmarks.quality` on stories; "tiny bodies" has two layers and the vocabularies of Qwen2.5 (151,936) and SmolLM2
(49,152), random weights and random text, and the teacher's logits are scaled until its distributions are as peaked as
a trained model's. Runs alternate in one process; with one thread seconds are CPU seconds.

Errors are those of the log-probabilities that are kept, and of the KD term at several temperatures against the running
teacher's top 256. `--train` trains the real pair for so many steps with the teacher and with each cache.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks import quality, step_time
from benchmarks.measure import describe, machine, measure, table, write
from models.config import CurriculumConfig, LossConfig, Term
from models.distillation import LM_ONLY, Distillation, Method
from models.distillation_framework import DistillationFramework
from models.teacher.cached import CachedTeacher, RememberingCollator
from models.teacher.frozen import FrozenTeacher
from utils.config.settings import CacheConfig
from utils.teacher_cache.codec import Codec
from utils.teacher_cache.manifest import open_cache
from utils.teacher_cache.store import TeacherCache

CPU = torch.device("cpu")
ONLINE_TOP_K = 256
PEAKED = 12.0
"""Scale of the random teacher's logits."""
WEIGHTS = CurriculumConfig(kd=Term(0.7), lm=Term(0.3))
WINDOWS = 8
"""Of a step of `--train`."""
CACHES = {
    "64": Codec(0, 64),
    "256": Codec(0, 256),
    "adaptive": Codec(0, "adaptive"),
    "64, float32": Codec(0, 64, "float32"),
}


@dataclass
class Setting:
    """A pair of models and its windows in batches."""

    distillation: Distillation
    batches: list[list[dict]]

    @property
    def teacher(self) -> FrozenTeacher:
        """The running teacher."""
        return self.distillation.teacher

    @property
    def student(self) -> nn.Module:
        """The one student of all frameworks."""
        return self.distillation.student

    def framework(
        self, teacher: FrozenTeacher | CachedTeacher, weights: CurriculumConfig = WEIGHTS, **loss: object
    ) -> DistillationFramework:
        """Make a framework under a teacher, with some settings of the loss."""
        method = Method(LossConfig(**loss), weights)
        return replace(self.distillation, method=method).framework(100, teacher=teacher)

    def cache(self, codec: Codec, folder: Path) -> TeacherCache:
        """Open an empty cache."""
        return empty_cache(codec, self.distillation, folder)


def empty_cache(codec: Codec, distillation: Distillation, folder: Path) -> TeacherCache:
    """Open a cache of a pair's teacher in a new folder."""
    codec = replace(codec, vocabulary=len(distillation.vocabulary.segments))
    return open_cache(CacheConfig(str(folder)), codec, {}, "benchmark", main=True)


def real(size: int) -> Setting:
    """Make the setting of two trained models on stories."""
    pair = quality.Pair("neo-4096", 1.0, Path(tempfile.gettempdir()))
    batches = [pair.windows[start : start + size] for start in range(0, 8 * size, size)]
    return Setting(replace(pair.distillation, student=pair.student(0)), batches)


def tiny_bodies(length: int) -> Setting:
    """Make the setting of real vocabularies, random weights and random text."""
    torch.manual_seed(0)
    sizes = (step_time.TEACHER_VOCABULARY, step_time.STUDENT_VOCABULARY)
    vocabulary = step_time.vocabulary_map(*sizes)
    teacher, student = map(AutoModelForCausalLM.from_config, step_time.shapes("tiny", *sizes))
    with torch.no_grad():
        teacher.model.norm.weight.mul_(PEAKED)

    distillation = Distillation(
        encoder=SimpleNamespace(end_of_text=(None, None), isolates=False),  # no text is read
        vocabulary=vocabulary,
        student=student,
        teacher=FrozenTeacher(teacher, vocabulary),
    )
    windows = step_time.random_windows(vocabulary, 2, length)
    return Setting(distillation, [[window] for window in windows])


def steps(setting: Setting, folder: Path, repeats: int) -> dict[str, float]:
    """Measure the median seconds of a step of each kind, and of what a worker does for one."""
    # 1. Batches with and without what the cache knows of them.
    collate = setting.distillation.collate
    cache = setting.cache(CACHES["64"], folder)
    cached = CachedTeacher(setting.teacher, cache)
    remember = RememberingCollator(collate, cache)
    plain = [collate(windows) for windows in setting.batches]
    for windows in setting.batches:
        cached.signal(remember(windows))
    cache.flush()
    ready = [remember(windows) for windows in setting.batches]

    # 2. What is timed, by the number of the batch.
    def step(framework: DistillationFramework, batches: list, number: int) -> None:
        framework(batches[number], 50).loss.backward()
        framework.zero_grad(set_to_none=True)

    alone = setting.framework(setting.teacher, LM_ONLY)
    online = setting.framework(setting.teacher, top_k=ONLINE_TOP_K)
    works: dict[str, Callable[[int], object]] = {
        "LM only": partial(step, alone, plain),
        "cached": partial(step, setting.framework(cached, top_k=64), ready),
        "online": partial(step, online, plain),
        "collate": lambda number: collate(setting.batches[number]),
        "and read": lambda number: remember(setting.batches[number]),
    }

    # 3. In turns, so that a busy machine slows all of them; the first round warms up.
    setting.student.train()
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(repeats + 1):
        number = round_number % len(setting.batches)
        for name, work in works.items():
            seconds = measure(partial(work, number), CPU).seconds
            if round_number:
                times[name].append(seconds)

    medians = {name: median(values) for name, values in times.items()}
    ratios = [cached_time / lm for cached_time, lm in zip(times["cached"], times["LM only"], strict=True)]
    tokens = float(np.mean([batch.counts["lm"] for batch in plain]))
    return {**medians, "ratio": median(ratios), "tokens": tokens}


@torch.no_grad()
def errors(setting: Setting, name: str, folder: Path, batches: int) -> dict[str, float]:
    """Measure the size of a cache, the mass it keeps, and how it changes log-probabilities and the KD term."""
    cache = setting.cache(CACHES[name], folder)
    cached = CachedTeacher(setting.teacher, cache)
    remember = RememberingCollator(setting.distillation.collate, cache)

    differences, by_probability, masses = [], [], []
    kd = {temperature: [0.0, 0.0] for temperature in (1.0, 2.0, 4.0)}
    setting.student.eval()
    for windows in setting.batches[:batches]:
        batch = remember(windows)
        stored = cached.signal(batch)
        exact = setting.teacher.signal(batch, cache.top_k)
        full = setting.teacher.signal(batch, ONLINE_TOP_K)

        is_kept = stored.ids >= 0
        difference = (stored.log_probs - exact.log_probs)[is_kept].abs()
        differences.append(difference)
        by_probability.append((difference * exact.log_probs[is_kept].exp()).sum() / len(is_kept))
        masses.append(1 - stored.log_tail.exp())

        for temperature, sums in kd.items():
            framework = setting.framework(setting.teacher, temperature=temperature)
            for column, signal in enumerate((full, stored)):
                sums[column] += float(framework(batch, 50, signal=signal).terms["kd"].sum)

    mass = torch.cat(masses)
    worst_rank = max(1, round(0.01 * len(mass)))
    return {
        "bytes": cache.written.bytes / cache.written.tokens,
        "error": float(torch.cat(differences).mean()),
        "weighted": float(torch.stack(by_probability).mean()),
        "mass": float(mass.mean()),
        "worst": float(mass.kthvalue(worst_rank).values),
        **{f"kd {temperature:g}": stored_sum / online - 1 for temperature, (online, stored_sum) in kd.items()},
    }


TRAINED = {
    # name: what is kept (None: the teacher runs), top k, which run it is compared with
    "online, 64": (None, 64, "online, 64"),
    "64": (CACHES["64"], 64, "online, 64"),
    "online, 256": (None, 256, "online, 256"),
    "256, float32": (Codec(0, 256, "float32"), 256, "online, 256"),
    "256": (CACHES["256"], 256, "online, 256"),
    "adaptive": (CACHES["adaptive"], 256, "online, 256"),
}


def train(pair: quality.Pair, name: str, steps: int, size: int, folder: Path) -> tuple[nn.Module, list[float]]:
    """Do a run of `TRAINED`, on the same batches as every other; return the student and the loss of every step.

    Args:
        size: windows of a step.
    """
    codec, top_k, _ = TRAINED[name]
    distillation = pair.under(Method(LossConfig(top_k=top_k), WEIGHTS))
    teacher, collate = pair.teacher, distillation.collate
    if codec is not None:
        cache = empty_cache(codec, distillation, folder)
        teacher = CachedTeacher(teacher, cache)
        collate = RememberingCollator(collate, cache)

    student = pair.student(0)
    framework = distillation.framework(steps, student=student, teacher=teacher)
    optimizer = torch.optim.AdamW(framework.parameter_groups(pair.learning_rate, 0.1), betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, pair.learning_rate, steps)

    losses = []
    student.train()
    for step, chosen in zip(range(steps), quality.window_order(len(pair.windows), size, 0), strict=False):
        loss = framework(collate([pair.windows[i] for i in chosen]), step).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(framework.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return student, losses


def trained(pair: quality.Pair, steps: int, size: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Measure bits per byte on unseen stories after every run of `TRAINED`, and what the cache has changed."""
    results: dict[str, dict[str, float]] = {}
    losses: dict[str, np.ndarray] = {}
    for name, (_, _, reference) in TRAINED.items():
        student, values = train(pair, name, steps, size, scratch / name)
        losses[name] = np.array(values)

        bits = quality.bits_per_byte(student, pair, "student")
        reference_bits = results[reference]["bits_per_byte"] if reference in results else bits
        results[name] = {
            "bits_per_byte": bits,
            "against": bits / reference_bits - 1,
            "loss": float(np.abs(losses[name] / losses[reference] - 1).max()),
        }
        print(name, results[name], flush=True)
    return results


def measured(repeats: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Print the tables of steps and of errors; return their content."""
    columns = ("LM only", "cached", "online", "collate", "and read")
    content, step_rows, error_rows = {}, [], []
    for name, setting in (("real, 4 x 256", real(4)), ("tiny bodies, 1 x 512", tiny_bodies(512))):
        timed = content[name] = steps(setting, Path(scratch, name, "steps"), repeats)
        step_rows.append([name, *(f"{timed[column]:.3f}" for column in columns), f"{timed['ratio']:.2f}"])

        for cache in CACHES:
            size = content[f"{name}: {cache}"] = errors(setting, cache, Path(scratch, name, cache), 4)
            numbers = [f"{size['bytes']:.1f}", f"{size['error']:.4f}", f"{size['weighted']:.4f}"]
            shares = [f"{size[column]:.2%}" for column in ("mass", "worst")]
            kd = [f"{size[column]:+.2%}" for column in ("kd 1", "kd 2", "kd 4")]
            error_rows.append([name, cache, *numbers, *shares, *kd])

    of_steps = ["s a step", "LM only", "cached", "online", "collate", "collate and read", "cached / LM only"]
    print(table(of_steps, step_rows))
    of_sizes = ["", "top k", "bytes/student token", "mean error, nats", "by probability"]
    of_changes = ["mass kept", "worst 1 % of rows", "KD, T 1", "T 2", "T 4"]
    print("\n" + table([*of_sizes, *of_changes], error_rows))
    return content


def measured_training(args: argparse.Namespace, scratch: Path) -> dict:
    """Train as `--train` asks for, and print the table; return its content."""
    pair = quality.Pair(args.pair, args.share, scratch)
    print(f"{args.pair}: {len(pair.windows):,} windows, {args.train} steps of {WINDOWS}", flush=True)
    runs = trained(pair, args.train, WINDOWS, scratch)

    rows = []
    for name, run in runs.items():
        numbers = [f"{run['bits_per_byte']:.4f}", f"{run['against']:+.2%}", f"{run['loss']:.1e}"]
        rows.append([name, TRAINED[name][2], *numbers])
    header = ["teacher", "compared with", "bits/byte, unseen", "against it", "largest difference of a step's loss"]
    print("\n" + table(header, rows))

    setting = {"pair": args.pair, "share": args.share, "steps": args.train, "windows": len(pair.windows)}
    return {**setting, "trained": runs}


def main() -> None:
    """Print the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS")
    parser.add_argument("--pair", choices=sorted(quality.PAIRS), default="neo-260k", help="of --train")
    parser.add_argument("--share", type=float, default=0.25, help="of the stories, for --train")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not quality.DATA.name or not quality.DATA.is_dir():
        parser.error("set REAL_MODELS_DIR to a folder with models/, tokenizers/ and corpora/")

    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    where = machine(CPU, args.threads)
    print(describe(where) + "\n", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        content = measured_training(args, scratch) if args.train else measured(args.repeats, scratch)
    if args.out:
        write(args.out, {"machine": where, **content})


if __name__ == "__main__":
    main()
