"""Weights that suit a student which is trained, cut or random, and what divergence and temperature do to its writing.

    REAL_MODELS_DIR=... python -m benchmarks.situations
    REAL_MODELS_DIR=... python -m benchmarks.situations --table

Every arm is KD .7 + LM .3 ("off"), unless it says otherwise. "on": feat 1 and attn 1 throughout; "early": both are 1 up
to 40 % of the steps and 0 from 45 % on. "KD falling": from .7 to 0 at half of the steps, LM from .3 to 1. Arms of a
pair see the same batches and the same first student for a seed. Besides bits per byte, the texts are measured that a
student writes at temperature 1 behind the beginnings of unseen stories (`utils.evaluation.written_text`). See
benchmarks/quality.py.

Every run is a line of the results file, written when it ends; a run that is there is not repeated.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from benchmarks.measure import table
from benchmarks.quality import MALLOC, Pair, Variant, bits_per_byte, kd_and_text, prepare, train
from models.config import CurriculumConfig, LossConfig, Ramp, Schedule, Term
from models.distillation import LM_ONLY
from utils.evaluation.written_text import Judge, Sample, Sampling, describe, sample_texts

STEPS = 160
SIZE = 4
"""Windows of a step."""
SHARE = 1 / 3
"""Of the training stories: no window is read twice."""
SMALL_SHARE = 1 / 32
"""Of the training stories: each window is read six times."""
TOP_K = 64
SCORED_WINDOWS = 96
"""Windows of unseen stories on which bits per byte are measured."""
PROMPTS = 48
PROMPT_TOKENS = 24
NEW_TOKENS = 96

FALLING = Ramp(((0.0, 0.7), (0.5, 0.0)))
"""Weight of KD in a run whose second half learns from the text alone; LM has the rest of 1."""
_EARLY = Ramp(((0.4, 1.0), (0.45, 0.0)))
_LOSS = LossConfig(top_k=TOP_K, head_passes="eager")


def _hidden(weight: Schedule) -> Variant:
    """Make an arm of KD .7 + LM .3 and terms on hidden states."""
    return Variant(_LOSS, replace(CurriculumConfig(), feat=Term(weight), attn=Term(weight)))


def _loss(**settings: object) -> Variant:
    """Make an arm of KD .7 + LM .3 with other settings of the loss."""
    return Variant(replace(_LOSS, **settings))


ARMS = {
    "text alone": Variant(_LOSS, LM_ONLY),
    "off": Variant(_LOSS),
    "on": _hidden(1.0),
    "early": _hidden(_EARLY),
    "T 2": _loss(temperature=2.0),
    "reverse KL": _loss(divergence="reverse_kl"),
    "JSD": _loss(divergence="jsd"),
    "KD .3": Variant(_LOSS, kd_and_text(0.3)),
    "KD falling": Variant(_LOSS, kd_and_text(FALLING)),
}


@dataclass(frozen=True)
class Part:
    """Arms of one pair."""

    pair: str
    arms: Sequence[str]
    seeds: int
    share: float = SHARE
    """Of the training stories."""


_HIDDEN_ARMS = ("off", "on", "early")
_KD_ARMS = ("text alone", "off", "KD .3", "KD falling")
_LOSS_ARMS = ("text alone", "T 2", "reverse KL", "JSD")
PLAN = (
    Part("cut neo-260k", _KD_ARMS, 3, SMALL_SHARE),
    Part("cut neo-260k", _KD_ARMS, 3),
    Part("cut neo-neo", _KD_ARMS, 2),
    Part("neo-260k", _KD_ARMS, 2, SMALL_SHARE),
    Part("neo-260k", _KD_ARMS, 2),
    Part("cut neo-260k", _HIDDEN_ARMS, 3),
    Part("neo-260k", ("off", "T 2", "reverse KL", "JSD"), 2),
    Part("random neo-260k", _HIDDEN_ARMS, 3),
    Part("neo-260k", _HIDDEN_ARMS, 3),
    Part("cut neo-260k", _LOSS_ARMS, 2),
    Part("random neo-260k", _LOSS_ARMS, 2),
    Part("cut neo-neo", _HIDDEN_ARMS, 3),
)
"""In the order of their worth: a run that ends early has the first of them."""


class Writing:
    """Beginnings of unseen stories that a student writes on from, and the teacher as the judge of what it writes."""

    def __init__(self, pair: Pair) -> None:
        self.tokenizer = pair.tokenizers["student"]
        encoder = pair.distillation.encoder
        self.end = encoder.end_of_text[0]
        start, teacher_start = encoder.starts

        encoded = self.tokenizer(pair.unseen_texts, add_special_tokens=False, verbose=False)["input_ids"]
        texts = [ids for ids in encoded if len(ids) >= PROMPT_TOKENS + NEW_TOKENS][:PROMPTS]
        self.prompts = [[*start, *ids[:PROMPT_TOKENS]] for ids in texts]
        self.continuations = [ids[PROMPT_TOKENS:][:NEW_TOKENS] for ids in texts]

        read = [self.tokenizer.decode(ids[:PROMPT_TOKENS]) for ids in texts]
        prompts = [(teacher_start, prompt) for prompt in read]
        self.judges = {"teacher": Judge(pair.teacher.model, pair.tokenizers["teacher"], prompts)}

    def measure(self, student: torch.nn.Module, seed: int) -> dict[str, float | int | None]:
        """Return the metrics of the texts that a student writes."""
        samples = sample_texts(student, self.prompts, Sampling(NEW_TOKENS, self.end, seed=seed))
        return describe(samples, self.tokenizer, self.judges)

    def measure_real_text(self) -> dict[str, float | int | None]:
        """Return the metrics of the stories themselves, as far as a student would go on."""
        pairs = zip(self.prompts, self.continuations, strict=True)
        samples = [Sample(prompt, ids, has_ended=False) for prompt, ids in pairs]
        return describe(samples, self.tokenizer, self.judges)


class Benchmark:
    """The runs of the plan that the results file lacks."""

    def __init__(self, results: Path, cache: Path) -> None:
        self.results = results
        self.cache = cache

    def done(self) -> list[dict]:
        """Return the results that are there."""
        return [json.loads(line) for line in self.results.read_text().splitlines()] if self.results.exists() else []

    def run(self, part: Part) -> None:
        """Do the runs of a part, and add a line to the results for each."""
        what = {"pair": part.pair, "share": part.share}
        jobs = [what | {"arm": arm, "seed": seed} for seed in range(part.seeds) for arm in part.arms]
        missing = [job for job in jobs if not any(job.items() <= line.items() for line in self.done())]
        if not missing:
            return

        pair = Pair(part.pair, part.share, self.cache)
        pair.unseen = pair.unseen[:SCORED_WINDOWS]
        writing = Writing(pair)
        levels = {
            "teacher": bits_per_byte(pair.teacher.model, pair, "teacher"),
            "before": bits_per_byte(pair.student(0), pair, "student"),
            "written_before": writing.measure(pair.student(0), 0),
            "written_really": writing.measure_real_text(),
        }
        for job in missing:
            student, training = train(pair, ARMS[job["arm"]], job["seed"], STEPS, SIZE)
            result = job | levels | training | {"bits_per_byte": bits_per_byte(student, pair, "student")}
            result["written"] = writing.measure(student, job["seed"])
            with self.results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{job}: {result['bits_per_byte']:.4f} bits per byte, {result['seconds']} s", flush=True)


def tables(results: Sequence[dict]) -> str:
    """Return the table of each pair: mean over seeds, and the changes against `off`, seed by seed."""
    parts = []
    for pair, share in dict.fromkeys((part.pair, part.share) for part in PLAN):
        lines = [line for line in results if (line["pair"], line["share"]) == (pair, share)]
        if not lines:
            continue

        first = lines[0]
        before = f"teacher {first['teacher']:.4f}, student before {first['before']:.4f} bits per byte"
        title = f"**{pair}**: {STEPS} steps of {SIZE} windows ({first['epochs']} epochs); {before}"
        header = ["arm", "bits per byte, unseen", "seeds", "range", "against off", "range", "the teacher's bits/byte"]
        header += ["repeated 4-grams", "ended", "tokens"]
        off = {line["seed"]: line["bits_per_byte"] for line in lines if line["arm"] == "off"}
        rows = _levels(lines)
        for arm in ARMS:
            runs = [line for line in lines if line["arm"] == arm]
            if runs:
                rows.append([arm, *_bits(runs, off), *_written(runs)])
        parts.append(f"{title}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def _levels(lines: Sequence[dict]) -> list[list[str]]:
    """Return the rows of the stories themselves and of the student before its training, with written text alone."""
    rows = []
    for title, name in (("the stories", "written_really"), ("before training", "written_before")):
        measured = [{"written": line[name]} for line in lines if name in line]
        if measured:
            rows.append([title, "", "", "", "", "", *_written(measured[:1])])
    return rows


def _bits(runs: Sequence[dict], off: dict[int, float]) -> list[str]:
    """Return the cells of the bits per byte of an arm's runs."""
    values = [run["bits_per_byte"] for run in runs]
    changes = [run["bits_per_byte"] / off[run["seed"]] - 1 for run in runs if run["seed"] in off]
    return [
        f"{mean(values):.4f}",
        str(len(values)),
        f"{min(values):.4f} to {max(values):.4f}",
        f"{mean(changes):+.2%}" if changes else "",
        f"{min(changes):+.2%} to {max(changes):+.2%}" if changes else "",
    ]


def _written(runs: Sequence[dict]) -> list[str]:
    """Return the cells of the written text of an arm's runs."""
    cells = []
    for name, form in (
        ("teacher_bits_per_byte", "{:.3f}"),
        ("repeated_4grams", "{:.1%}"),
        ("ended", "{:.0%}"),
        ("tokens", "{:.0f}"),
    ):
        values = [run["written"][name] for run in runs if run["written"][name] is not None]
        cells.append(form.format(mean(values)) if values else "")
    return cells


def main() -> None:
    """Do the runs that the results file lacks, and print the tables."""
    if sys.platform == "linux" and not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(".situations-cache"))
    parser.add_argument("--results", type=Path, default=Path("situations-results.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    args = parser.parse_args()

    benchmark = Benchmark(args.results, args.cache)
    if not args.table:
        prepare(parser, args.threads)
        for part in PLAN:
            benchmark.run(part)
    print(tables(benchmark.done()))


if __name__ == "__main__":
    main()
