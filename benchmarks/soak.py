"""Memory, open files and time per step of a long run of `train.py`, by windows of steps: does it grow or slow down?

    python -m benchmarks.soak                     3,000 steps of a tiny pair, about five minutes on one core
    python -m benchmarks.soak --steps 600

The real program in a process of its own, looked at from outside five times a second: resident memory and open files of
it and its data worker. It logs 300 times, and evaluates, saves and prunes checkpoints 60 times. Seconds are CPU seconds
of the process, which neighbours on the machine do not change much; they include evaluations and checkpoints, of which
every window has the same number. Growth and drift compare the last window with the second: the first one fills caches.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.measure import describe, machine, table, write
from utils.checks import miniature

ROOT = Path(__file__).resolve().parent.parent
WINDOWS = 6
CHECKPOINTS = 60
LOGS_A_CHECKPOINT = 5
INTERVAL = 0.2
"""Seconds between two samples."""
END_OF_LOG = 20_000
"""Bytes at the end of metrics.jsonl in which the last record is looked for."""


@dataclass(frozen=True)
class Sample:
    """Resources of the process at a moment."""

    step: int
    cpu: float
    """Seconds, of the training process."""
    rss: int
    """Bytes, workers included."""
    files: int
    """Open file descriptors, workers included."""


def main(argv: Sequence[str] | None = None) -> None:
    """Watch a run, print the table of its windows and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--json", type=Path, default=Path("soak.json"))
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        words = command(Path(folder), args.steps)
        samples = watch(words, Path(folder) / "run" / "metrics.jsonl")

    rows = by_window(samples, args.steps)
    facts = machine(torch.device("cpu"), 1)
    result = {"machine": facts, "steps": args.steps, "windows": rows, **drift(rows)}

    print(f"{describe(facts)}\n\n{table(rows[0], [row.values() for row in rows])}\n")
    print(
        f"from the second window to the last: memory {result['memory_growth_mb']:+.1f} MB, open files "
        f"{result['files_growth']:+d}, CPU time per step {result['time_drift']:+.1%}"
    )
    write(args.json, result)


def command(folder: Path, steps: int) -> list[str]:
    """Return `python train.py` on a tiny pair with different tokenizers, whose files are written to `folder`."""
    pair = miniature.build(folder)

    # The miniature comes without weights; train.py gives the student some, but not the teacher.
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pair.teacher))
    teacher.save_pretrained(pair.teacher)

    steps_a_checkpoint = max(steps // CHECKPOINTS, 1)
    steps_a_log = max(steps_a_checkpoint // LOGS_A_CHECKPOINT, 1)
    flags = {
        "--teacher": pair.teacher,
        "--student": pair.student,
        "--student-init": "random",
        "--train-data": pair.text,
        "--output-dir": folder / "run",
        "--max-length": miniature.CONTEXT,
        "--max-steps": steps,
        "--batch-size": 2,
        "--gradient-accumulation-steps": 1,
        "--log-every": steps_a_log,
        "--save-every": steps_a_checkpoint,
        "--eval-every": steps_a_checkpoint,
    }
    settings = {
        "evaluation.max_windows": 8,
        "data.num_workers": 1,
        # Terms on hidden states, so that the router's part of a run is watched, too.
        "curriculum.feat.weight": 0.1,
        "curriculum.rel.weight": 0.1,
    }

    words = [sys.executable, "train.py"]
    for flag, value in flags.items():
        words += [flag, str(value)]
    words.append("--set")
    words += [f"{key}={value}" for key, value in settings.items()]
    return words


def watch(words: Sequence[str], metrics: Path) -> list[Sample]:
    """Run a command to its end; return samples of its resources in the order of time.

    Args:
        metrics: the file in which the command logs its steps.

    Raises:
        SystemExit: the command failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    training = psutil.Process(process.pid)

    samples = []
    while process.poll() is None:
        time.sleep(INTERVAL)
        try:
            samples.append(take_sample(training, metrics))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # a worker, or the process itself, ended in between

    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return samples


def take_sample(training: psutil.Process, metrics: Path) -> Sample:
    """Return the resources that a training process and its workers have now."""
    family = [training, *training.children(recursive=True)]
    times = training.cpu_times()
    rss = sum(process.memory_info().rss for process in family)
    files = sum(process.num_fds() for process in family)

    return Sample(
        step=last_step(metrics),
        cpu=times.user + times.system,
        rss=rss,
        files=files,
    )


def last_step(metrics: Path) -> int:
    """Return the step of the last whole record; 0 before there is one."""
    if not metrics.exists():
        return 0

    # Only the end, since the file grows and is read five times a second.
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - END_OF_LOG))
        lines = file.read().splitlines()

    # The last line may be half written, and not every record is of a step.
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0


def by_window(samples: Sequence[Sample], steps: int) -> list[dict[str, float]]:
    """Return largest memory and number of files, and CPU milliseconds per step, of equal windows of steps."""
    rows = []
    for index in range(WINDOWS):
        first = steps * index // WINDOWS
        last = steps * (index + 1) // WINDOWS

        # Before step 1 the program loads: that is no training.
        inside = [sample for sample in samples if max(first, 1) <= sample.step < last]
        trained_steps = inside[-1].step - inside[0].step
        cpu_seconds = inside[-1].cpu - inside[0].cpu
        rows.append(
            {
                "steps": f"{first + 1}-{last}",
                "memory MB": round(max(sample.rss for sample in inside) / 2**20, 1),
                "open files": max(sample.files for sample in inside),
                "CPU ms per step": round(1000 * cpu_seconds / max(trained_steps, 1), 2),
            }
        )
    return rows


def drift(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the change from the second window to the last."""
    second = rows[1]
    last = rows[-1]
    return {
        "memory_growth_mb": last["memory MB"] - second["memory MB"],
        "files_growth": last["open files"] - second["open files"],
        "time_drift": last["CPU ms per step"] / second["CPU ms per step"] - 1,
    }


if __name__ == "__main__":
    main()
