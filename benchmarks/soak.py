"""Whether a long run grows or slows: memory, open files and time per step of `train.py`, by windows of steps.

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


@dataclass(frozen=True)
class Sample:
    """What was seen of the process at a moment."""

    step: int
    cpu: float
    """Seconds, of the training process."""
    rss: int
    """Bytes, workers included."""
    files: int
    """Open file descriptors, workers included."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--json", type=Path, default=Path("soak.json"))
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        samples = watch(command(Path(folder), args.steps), Path(folder) / "run" / "metrics.jsonl")
    rows = by_window(samples, args.steps)
    result = {"machine": machine(torch.device("cpu"), 1), "steps": args.steps, "windows": rows, **drift(rows)}
    print(f"{describe(result['machine'])}\n\n{table(rows[0], [row.values() for row in rows])}\n")
    print(
        f"from the second window to the last: memory {result['memory_growth_mb']:+.1f} MB, open files "
        f"{result['files_growth']:+d}, CPU time per step {result['time_drift']:+.1%}"
    )
    write(args.json, result)


def command(folder: Path, steps: int) -> list[str]:
    """`python train.py` on a tiny pair with different tokenizers, whose files are written to `folder`."""
    tiny = miniature.build(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny.teacher)).save_pretrained(tiny.teacher)
    often = max(steps // 60, 1)
    return [
        sys.executable, "train.py", "--teacher", str(tiny.teacher), "--student", str(tiny.student),
        "--student-init", "random", "--train-data", str(tiny.text), "--output-dir", str(folder / "run"),
        "--max-length", str(miniature.CONTEXT), "--max-steps", str(steps), "--batch-size", "2",
        "--gradient-accumulation-steps", "1", "--log-every", str(max(often // 5, 1)), "--save-every", str(often),
        "--eval-every", str(often), "--set", "evaluation.max_windows=8", "data.num_workers=1",
        "curriculum.feat.weight=0.1", "curriculum.rel.weight=0.1",
    ]  # fmt: skip


def watch(words: Sequence[str], metrics: Path) -> list[Sample]:
    """Run a command to its end; what was seen of it meanwhile."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    seen, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        time.sleep(0.2)
        try:
            family = [seen, *seen.children(recursive=True)]
            times = seen.cpu_times()
            rss, files = sum(p.memory_info().rss for p in family), sum(p.num_fds() for p in family)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # a worker, or the process itself, ended in between
        samples.append(Sample(last_step(metrics), times.user + times.system, rss, files))
    if process.returncode:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return samples


def last_step(metrics: Path) -> int:
    """Of the last whole record; 0 before there is one."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return 0


def by_window(samples: Sequence[Sample], steps: int) -> list[dict[str, float]]:
    """Largest memory and number of files, and CPU milliseconds per step, of equal windows of steps."""
    rows = []
    for index in range(WINDOWS):
        first, last = steps * index // WINDOWS, steps * (index + 1) // WINDOWS
        inside = [s for s in samples if max(first, 1) <= s.step < last]
        done = inside[-1].step - inside[0].step
        rows.append(
            {
                "steps": f"{first + 1}-{last}",
                "memory MB": round(max(s.rss for s in inside) / 2**20, 1),
                "open files": max(s.files for s in inside),
                "CPU ms per step": round(1000 * (inside[-1].cpu - inside[0].cpu) / max(done, 1), 2),
            }
        )
    return rows


def drift(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The last window against the second."""
    second, last = rows[1], rows[-1]
    return {
        "memory_growth_mb": last["memory MB"] - second["memory MB"],
        "files_growth": last["open files"] - second["open files"],
        "time_drift": last["CPU ms per step"] / second["CPU ms per step"] - 1,
    }


if __name__ == "__main__":
    main()
