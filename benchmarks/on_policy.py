"""Bits per byte and written text of students that learn from given text, from their own, or from both.

    REAL_MODELS_DIR=... python -m benchmarks.on_policy --pair neo-260k --seeds 0 1 2
    REAL_MODELS_DIR=... python -m benchmarks.on_policy --pair neo-260k --table
    REAL_MODELS_DIR=... python -m benchmarks.on_policy --pair neo-260k --cost

Every arm is a whole run of train.py: equal steps, windows and seeds, so that the arms of a seed see the same beginnings
of texts. Windows are as long as a prompt and what may be written behind it. "given, as long" has as many more steps as
the fully on-policy run takes more time. Every run is one line of the results file; a run that is there is not repeated.

A student that cannot write yet learns from given text first, and all arms begin with it:

    REAL_MODELS_DIR=... python -m benchmarks.on_policy --pair neo-4096 --cold-start starts/neo-4096 --steps 1000
    REAL_MODELS_DIR=... python -m benchmarks.on_policy --pair neo-4096 --start starts/neo-4096 --learning-rate 1e-4

The pair smollm2-gemma3 is that of `benchmarks.real_pair`, whose packages it needs.

`--cost` tells where the time of a run goes, and how many tokens a second are written beside `generate` of transformers
alone, in the same batches.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measure import table
from benchmarks.quality import small_llama
from benchmarks.real.sources import STUDENT, TEACHER, Package, plain_folder
from benchmarks.real.tables import change, interval
from utils.logs.records import OWN_TEXT

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("REAL_MODELS_DIR", ""))
PROMPT, NEW = 32, 96
"""Tokens of a prompt, and of what is written behind it."""

Result = dict[str, Any]


@dataclass(frozen=True)
class PairOfModels:
    """A pair of models, the text, and how its student is trained."""

    teacher: str | Package
    student: str | Package
    text: str
    learning_rate: float
    tokenizer_only: bool = False
    """The student is a small Llama with this tokenizer, which has no weights before its cold start."""


NEO = "models/tinystories-neo-chat-3m"
STORIES = "corpora/tinystories-v1.txt"
PAIRS = {
    "neo-260k": PairOfModels(NEO, "models/stories260k-llama", STORIES, 3e-4),
    "neo-4096": PairOfModels(NEO, "tokenizers/llama2c-tok4096", STORIES, 1e-3, tokenizer_only=True),
    "smollm2-gemma3": PairOfModels(TEACHER, STUDENT, "corpora/wikitext2-valid.txt", 1e-5),
}


@dataclass(frozen=True)
class Arm:
    """A way to choose whose text is learned from, and how it is compared with the teacher."""

    share: str
    """Value of `curriculum.on_policy`."""
    divergence: str = "forward_kl"
    temperature: float = 1.0
    """Of the student's sampling."""
    as_long_as: str | None = None
    """Name of an arm whose time this one is given."""

    def flags(self) -> list[str]:
        """Return the arm's flags of train.py."""
        return [
            f"--curriculum.on_policy={self.share}",
            f"--loss.divergence={self.divergence}",
            f"--on-policy.temperature={self.temperature}",
        ]


UP = "{points: [[0, 0], [0.3, 0], [1, 1]]}"
DOWN = "{points: [[0, 1], [0.7, 0], [1, 0]]}"
ARMS = {
    "given": Arm("0"),
    "half": Arm("0.5"),
    "up": Arm(UP),
    "down": Arm(DOWN),
    "own": Arm("1"),
    "given, reverse KL": Arm("0", "reverse_kl"),
    "half, reverse KL": Arm("0.5", "reverse_kl"),
    "up, reverse KL": Arm(UP, "reverse_kl"),
    "down, reverse KL": Arm(DOWN, "reverse_kl"),
    "own, reverse KL": Arm("1", "reverse_kl"),
    "own, reverse KL, T 0.7": Arm("1", "reverse_kl", 0.7),
    "given, JSD": Arm("0", "jsd"),
    "half, JSD": Arm("0.5", "jsd"),
    "own, JSD": Arm("1", "jsd"),
    "given, as long": Arm("0", as_long_as="own"),
}
BASE = "given"


# ------------------------------------------------------------------------------------------ runs


def run(args: argparse.Namespace, name: str, seed: int, known: Sequence[Result]) -> Result:
    """Train one arm, and return what its run left."""
    arm = ARMS[name]
    steps = args.steps
    if arm.as_long_as is not None:
        ratio = _seconds(known, arm.as_long_as) / _seconds(known, BASE)
        steps = round(steps * ratio)

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        began = time.perf_counter()
        _train([*_arguments(args, seed, steps), *arm.flags()], output)
        seconds = time.perf_counter() - began
        report = json.loads((output / "evaluation_report.json").read_text(encoding="utf-8"))
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "pair": args.pair,
        "arm": name,
        "seed": seed,
        "steps": steps,
        "learning_rate": args.learning_rate or PAIRS[args.pair].learning_rate,
        "command_seconds": seconds,
        "report": {key: report[key] for key in ("student", "teacher", "initial_student", "run", "retention")},
        "generation": report.get("generation"),
        "rounds": [record for line in lines if (record := json.loads(line)).get("split") == OWN_TEXT],
    }


def _train(arguments: Sequence[str], output: Path) -> None:
    """Run train.py.

    Raises:
        SystemExit: It failed; with the end of what it printed.

    """
    finished = subprocess.run(
        [sys.executable, "train.py", *arguments, "--output-dir", str(output)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        said = (finished.stdout + finished.stderr)[-3000:]
        raise SystemExit(f"train.py ended with {finished.returncode}:\n{said}")


def make_start(args: argparse.Namespace) -> None:
    """Write a student that has learned from given text alone to `args.cold_start`."""
    pair = PAIRS[args.pair]
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(args, args.seeds[0], args.steps)
        if pair.tokenizer_only:
            untrained = _write_untrained(_folder(pair.student), Path(folder) / "untrained")
            arguments += ["--student", str(untrained), "--student-init", "random"]
        output = Path(folder) / "run"
        _train([*arguments, *ARMS[BASE].flags()], output)
        report = json.loads((output / "evaluation_report.json").read_text(encoding="utf-8"))
        shutil.copytree(output / "student", args.cold_start)
    print(f"{args.cold_start}: {report['student']['bits_per_byte']:.4f} bits per byte")


def _write_untrained(tokenizer_folder: Path, folder: Path) -> Path:
    """Write the config of a small Llama beside a copy of its tokenizer, and return the folder."""
    shutil.copytree(tokenizer_folder, folder)
    config = small_llama(len(AutoTokenizer.from_pretrained(folder)))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


def _folder(model: str | Package) -> Path:
    """Return the folder of a model: one of the data, or that of an installed package as a plain one."""
    if isinstance(model, Package):
        return plain_folder(None, model, Path(tempfile.gettempdir()) / "on-policy")
    return DATA / model


def _arguments(args: argparse.Namespace, seed: int, steps: int) -> list[str]:
    """Return the flags of train.py that all arms have in common."""
    pair = PAIRS[args.pair]
    student = args.start or _folder(pair.student)
    rate = args.learning_rate or pair.learning_rate
    return [
        *("--teacher", str(_folder(pair.teacher)), "--student", str(student)),
        *("--train-data", str(DATA / pair.text), "--max-length", str(PROMPT + NEW), "--batch-size", "8"),
        *("--learning-rate", str(rate), "--max-steps", str(steps), "--eval-every", "0"),
        *("--on-policy.every", str(args.every), "--on-policy.prompt-tokens", str(PROMPT)),
        *("--on-policy.new-tokens", str(NEW), "--training.seed", str(seed)),
        *("--evaluation.generation", "64", "--evaluation.without-teacher", "false"),
        *("--training.gradient-accumulation-steps", "1"),
    ]


def _seconds(results: Sequence[Result], name: str) -> float:
    """Return the mean seconds of training of an arm's runs."""
    seconds = [result["report"]["run"]["seconds"] for result in results if result["arm"] == name]
    if not seconds:
        raise SystemExit(f"the time of {name!r} is not known: run it first")
    return statistics.fmean(seconds)


# ------------------------------------------------------------------------------------------ tables


def tables(results: Sequence[Result]) -> str:
    """Return the results, arm by arm, with differences from given text that are paired by seed."""
    if not results:
        raise SystemExit("no results of this pair yet: run the same command without --table")
    base = {result["seed"]: _bits(result) for result in results if result["arm"] == BASE}
    rows = []
    for name in ARMS:
        runs = [result for result in results if result["arm"] == name]
        if runs:
            differences = [100 * (_bits(r) / base[r["seed"]] - 1) for r in runs if r["seed"] in base]
            rows.append([name, len(runs), *_cells(runs), change(differences) or "-"])
    header = ["arm", "seeds", "steps", "seconds", "bits/byte", "teacher's of its text", "repeated", "ended", "tokens"]
    levels = results[0]["report"]
    caption = ", ".join(
        f"{role.replace('_', ' ')} {levels[role]['bits_per_byte']:.4f}" for role in ("teacher", "initial_student")
    )
    return f"bits per byte: {caption}\n\n" + table([*header, "bits/byte from given"], rows)


def _bits(result: Result) -> float:
    return result["report"]["student"]["bits_per_byte"]


def _cells(runs: Sequence[Result]) -> list[str]:
    """Return the columns of an arm."""
    written = [run["generation"]["student"] for run in runs]
    return [
        str(runs[0]["steps"]),
        f"{statistics.fmean(run['report']['run']['seconds'] for run in runs):.0f}",
        interval([_bits(run) for run in runs]),
        interval([text["teacher_bits_per_byte"] for text in written]),
        _percent(text["repeated_4grams"] for text in written),
        _percent(text["ended"] for text in written),
        f"{statistics.fmean(text['tokens'] for text in written):.0f}",
    ]


def _percent(shares: Any) -> str:
    return f"{100 * statistics.fmean(shares):.0f} %"


# ------------------------------------------------------------------------------------------ cost


def cost(results: Sequence[Result], args: argparse.Namespace) -> str:
    """Return where the time of a round goes in the fully on-policy arms, and how fast its texts are written."""
    alone = _generate_alone(args)
    rows = []
    for name in ARMS:
        runs = [result for result in results if result["arm"] == name and name.startswith("own")]
        if not runs:
            continue

        rounds = sum(len(run["rounds"]) for run in runs)
        writing = sum(record["seconds"] for run in runs for record in run["rounds"]) / rounds
        training = sum(run["report"]["run"]["seconds"] for run in runs) / rounds
        speed = statistics.median(record["written_tokens_per_second"] for run in runs for record in run["rounds"])
        cells = [f"{writing:.2f}", f"{training - writing:.2f}", f"{speed:.0f}", f"{speed / alone:.2f}"]
        rows.append([name, len(runs), *cells])
    if not rows:
        raise SystemExit("no run of the arm 'own' yet")

    header = ["arm", "runs", "writing, s a round", "asking the teacher and learning, s", "tokens written a second"]
    text = f"`generate` alone, 64 prompts at once: {alone:.0f} tokens a second"
    return f"{table([*header, 'of `generate` alone'], rows)}\n\n{text}"


def _generate_alone(args: argparse.Namespace) -> float:
    """Return the tokens a second that transformers writes behind prompts of the same length, sampling."""
    pair = PAIRS[args.pair]
    folder = args.start or _folder(pair.student)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer((DATA / pair.text).read_text(encoding="utf-8")[:200_000])["input_ids"]
    prompts = torch.tensor([ids[n * PROMPT : (n + 1) * PROMPT] for n in range(64)])

    rates = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.no_grad():
            written = model.generate(prompts, do_sample=True, max_new_tokens=NEW, min_new_tokens=NEW)
        tokens = written.shape[0] * (written.shape[1] - PROMPT)
        rates.append(tokens / (time.perf_counter() - began))
    return statistics.median(rates)


# ------------------------------------------------------------------------------------------ command


def read_results(file: Path, pair: str) -> list[Result]:
    """Return the results of a pair that are on the disk."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [result for line in lines if (result := json.loads(line))["pair"] == pair]


def _is_there(results: Sequence[Mapping[str, Any]], name: str, seed: int) -> bool:
    return any(result["arm"] == name and result["seed"] == seed for result in results)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--pair", choices=[*PAIRS], default="neo-260k")
    made.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=200, help="optimizer steps of 8 windows")
    made.add_argument("--every", type=int, default=20, help="steps of a round")
    made.add_argument("--learning-rate", type=float, help="in place of the pair's")
    made.add_argument("--start", help="folder of the student that all arms begin with")
    made.add_argument("--cold-start", help="write such a student to this folder, and do nothing else")
    made.add_argument("--results", type=Path, default=Path("on-policy-results.jsonl"))
    made.add_argument("--table", action="store_true", help="print the table of the results alone")
    made.add_argument("--cost", action="store_true", help="print where the time goes")
    return made


def main(arguments: list[str] | None = None) -> None:
    """Run what is missing and print the table."""
    args = parser().parse_args(arguments)
    if args.cold_start:
        make_start(args)
        return

    results = read_results(args.results, args.pair)
    if not (args.table or args.cost):
        _run_missing(args, results)
    print(cost(results, args) if args.cost else tables(results))


def _run_missing(args: argparse.Namespace, results: list[Result]) -> None:
    """Run the arms that have no result yet, and add them to the results and their file."""
    for seed in args.seeds:
        for name in args.arms:
            if _is_there(results, name, seed):
                continue
            result = run(args, name, seed, results)
            results.append(result)

            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{name}, seed {seed}: {_bits(result):.4f} bits per byte", flush=True)


if __name__ == "__main__":
    main()
