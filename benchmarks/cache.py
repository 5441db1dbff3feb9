"""What the teacher cache saves, takes and changes.

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
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks import quality, step_time
from benchmarks.measure import describe, machine, measure, table, write
from models.config import CurriculumConfig, LossConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.teacher.cached import CachedTeacher, RememberingCollator
from models.teacher.frozen import FrozenTeacher
from models.text.collate import PairCollator
from models.text.vocabulary import VocabularyMap
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
LM_ALONE = CurriculumConfig(kd=Term(0.0), lm=Term(1.0))
CACHES = {
    "64": Codec(0, 64),
    "256": Codec(0, 256),
    "adaptive": Codec(0, "adaptive"),
    "64, float32": Codec(0, 64, "float32"),
}


@dataclass
class Setting:
    """A pair, its windows in batches, and how to make its student."""

    student: nn.Module
    teacher: FrozenTeacher
    vocabulary: VocabularyMap
    collate: PairCollator
    batches: list[list[dict]]

    def framework(self, teacher: FrozenTeacher | CachedTeacher, weights: CurriculumConfig = WEIGHTS, **loss: object):
        config = LossConfig(**loss)
        schedule = CurriculumScheduler(weights, config, 100)
        return DistillationFramework(self.student, teacher, self.vocabulary, config, schedule)

    def cache(self, codec: Codec, folder: Path) -> TeacherCache:
        codec = replace(codec, vocabulary=len(self.vocabulary.segments))
        return open_cache(CacheConfig(str(folder)), codec, {}, "benchmark", main=True)


def real(size: int) -> Setting:
    pair = quality.Pair("neo-4096", 1.0, Path(tempfile.gettempdir()))
    batches = [pair.windows[i : i + size] for i in range(0, 8 * size, size)]
    return Setting(pair.student(0), pair.teacher, pair.map, pair.collator(LossConfig().max_depth), batches)


def tiny_bodies(length: int) -> Setting:
    torch.manual_seed(0)
    sizes = (step_time.TEACHER_VOCABULARY, step_time.STUDENT_VOCABULARY)
    vocabulary = step_time.vocabulary_map(*sizes)
    teacher, student = map(AutoModelForCausalLM.from_config, step_time.shapes("tiny", *sizes))
    with torch.no_grad():
        teacher.model.norm.weight.mul_(PEAKED)
    collate = PairCollator(vocabulary, (None, None), LossConfig().max_depth)
    windows = step_time.random_windows(vocabulary, 2, length)
    return Setting(student, FrozenTeacher(teacher, vocabulary), vocabulary, collate, [[w] for w in windows])


def steps(setting: Setting, folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds of a step of each kind, and of what a worker does for one."""
    cache = setting.cache(CACHES["64"], folder)
    cached, remember = CachedTeacher(setting.teacher, cache), RememberingCollator(setting.collate, cache)
    plain = [setting.collate(windows) for windows in setting.batches]
    for windows in setting.batches:
        cached.signal(remember(windows))
    cache.flush()
    ready = [remember(windows) for windows in setting.batches]
    frameworks = {
        "LM only": (setting.framework(setting.teacher, LM_ALONE), plain),
        "cached": (setting.framework(cached, top_k=64), ready),
        "online": (setting.framework(setting.teacher, top_k=ONLINE_TOP_K), plain),
    }
    setting.student.train()

    def step(framework: DistillationFramework, batch: object) -> None:
        framework(batch, 50).loss.backward()
        framework.zero_grad(set_to_none=True)

    works: dict[str, Callable[[int], object]] = {
        name: (lambda i, f=framework, b=batches: step(f, b[i])) for name, (framework, batches) in frameworks.items()
    }
    works |= {
        "collate": lambda i: setting.collate(setting.batches[i]),
        "and read": lambda i: remember(setting.batches[i]),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            run = measure(lambda work=work, n=number: work(n % len(setting.batches)), CPU)
            found[name] += [run.seconds] if number else []
    seconds = {name: median(values) for name, values in found.items()}
    ratio = median(c / lm for c, lm in zip(found["cached"], found["LM only"], strict=True))  # of each round
    return seconds | {"ratio": ratio, "tokens": float(np.mean([batch.counts["lm"] for batch in plain]))}


@torch.no_grad()
def errors(setting: Setting, name: str, folder: Path, batches: int) -> dict[str, float]:
    """Size of a cache, the mass it keeps, and what it changes."""
    cache = setting.cache(CACHES[name], folder)
    cached, remember = CachedTeacher(setting.teacher, cache), RememberingCollator(setting.collate, cache)
    off, weighted, kept, kd = [], [], [], {t: [0.0, 0.0] for t in (1.0, 2.0, 4.0)}
    setting.student.eval()
    for windows in setting.batches[:batches]:
        batch = remember(windows)
        here, exact = cached.signal(batch), setting.teacher.signal(batch, cache.top_k)
        known = here.ids >= 0
        error = (here.log_probs - exact.log_probs)[known].abs()
        off.append(error)
        weighted.append((error * exact.log_probs[known].exp()).sum() / len(known))
        kept.append(1 - here.log_tail.exp())
        full = setting.teacher.signal(batch, ONLINE_TOP_K)
        for t, sums in kd.items():
            framework = setting.framework(setting.teacher, temperature=t)
            for i, signal in enumerate((full, here)):
                sums[i] += float(framework(batch, 50, signal=signal).terms["kd"].sum)
    mass, off = torch.cat(kept), torch.cat(off)
    return {
        "bytes": cache.written.bytes / cache.written.tokens,
        "error": float(off.mean()),
        "weighted": float(torch.stack(weighted).mean()),
        "mass": float(mass.mean()),
        "worst": float(mass.kthvalue(max(1, round(0.01 * len(mass)))).values),
        **{f"kd {t:g}": cached_sum / online - 1 for t, (online, cached_sum) in kd.items()},
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
    """(student, loss of every step) of a run of `TRAINED`, on the same batches of `size` windows as every other."""
    codec, top_k, _ = TRAINED[name]
    student, loss, teacher = pair.student(0), LossConfig(top_k=top_k), pair.teacher
    collate = pair.collator(loss.max_depth)
    if codec is not None:
        codec = replace(codec, vocabulary=len(pair.map.segments))
        cache = open_cache(CacheConfig(str(folder)), codec, {}, "benchmark", main=True)
        teacher, collate = CachedTeacher(teacher, cache), RememberingCollator(collate, cache)
    framework = DistillationFramework(student, teacher, pair.map, loss, CurriculumScheduler(WEIGHTS, loss, steps))
    optimizer = torch.optim.AdamW(framework.parameter_groups(pair.learning_rate, 0.1), betas=(0.9, 0.95))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, pair.learning_rate, steps)
    random, order, losses = np.random.default_rng(0), np.zeros(0, dtype=int), []
    student.train()
    for step in range(steps):
        if len(order) < size:
            order = np.append(order, random.permutation(len(pair.windows)))
        chosen, order = order[:size], order[size:]
        value = framework(collate([pair.windows[i] for i in chosen]), step).loss
        value.backward()
        torch.nn.utils.clip_grad_norm_(framework.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return student, losses


def trained(pair: quality.Pair, steps: int, size: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Bits per byte on unseen stories after every run of `TRAINED`, and what the cache has changed."""
    found: dict[str, dict[str, float]] = {}
    losses: dict[str, np.ndarray] = {}
    for name, (_, _, reference) in TRAINED.items():
        student, values = train(pair, name, steps, size, scratch / name)
        losses[name] = np.array(values)
        bits = quality.bits_per_byte(student, pair, "student")
        found[name] = {
            "bits_per_byte": bits,
            "against": bits / (found[reference]["bits_per_byte"] if reference in found else bits) - 1,
            "loss": float(np.abs(losses[name] / losses[reference] - 1).max()),
        }
        print(name, found[name], flush=True)
    return found


def measured(repeats: int, scratch: Path) -> dict[str, dict[str, float]]:
    """Prints the tables of steps and of errors; returns what is in them."""
    content, timed, sizes = {}, [], []
    for name, setting in (("real, 4 x 256", real(4)), ("tiny bodies, 1 x 512", tiny_bodies(512))):
        found = content[name] = steps(setting, Path(scratch, name, "steps"), repeats)
        columns = ("LM only", "cached", "online", "collate", "and read")
        timed.append([name, *(f"{found[c]:.3f}" for c in columns), f"{found['ratio']:.2f}"])
        for cache in CACHES:
            size = content[f"{name}: {cache}"] = errors(setting, cache, Path(scratch, name, cache), 4)
            shares = [f"{size[c]:.2%}" for c in ("mass", "worst")]
            kd = [f"{size[c]:+.2%}" for c in ("kd 1", "kd 2", "kd 4")]
            numbers = [f"{size['bytes']:.1f}", f"{size['error']:.4f}", f"{size['weighted']:.4f}"]
            sizes.append([name, cache, *numbers, *shares, *kd])
    print(table(["s a step", "LM only", "cached", "online", "collate", "collate and read", "cached / LM only"], timed))
    header = ["", "top k", "bytes/student token", "mean error, nats", "by probability"]
    print("\n" + table([*header, "mass kept", "worst 1 % of rows", "KD, T 1", "T 2", "T 4"], sizes))
    return content


def main() -> None:
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
    with tempfile.TemporaryDirectory() as scratch:
        if args.train:
            pair = quality.Pair(args.pair, args.share, Path(scratch))
            content = {"pair": args.pair, "share": args.share, "steps": args.train, "windows": len(pair.windows)}
            print(f"{args.pair}: {len(pair.windows):,} windows, {args.train} steps of {WINDOWS}", flush=True)
            content["trained"] = trained(pair, args.train, WINDOWS, Path(scratch))
            header = [
                "teacher",
                "compared with",
                "bits/byte, unseen",
                "against it",
                "largest difference of a step's loss",
            ]
            rows = [
                [name, TRAINED[name][2], f"{run['bits_per_byte']:.4f}", f"{run['against']:+.2%}", f"{run['loss']:.1e}"]
                for name, run in content["trained"].items()
            ]
            print("\n" + table(header, rows))
        else:
            content = measured(args.repeats, Path(scratch))
    if args.out:
        write(args.out, {"machine": where, **content})


if __name__ == "__main__":
    main()
