"""Student tokens per second of more processes, and the cost of the exchange of gradients.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --processes 1 2 --device cuda --shape smollm2-135m

Every number of processes works through the same windows, `--batch` to a process and forward. A step is forward and
backward of the framework (teacher, LM and KD) under DDP as accelerate wraps it, without an optimizer. "Not hidden" is
the share of a step that goes away when gradients stay where they are (`no_sync`); "on the wire" the share during which
an exchange was under way, from the first that is begun to its end. What is on the wire and not missing was hidden
behind the backward pass. Medians of alternating runs; the slowest process of each counts. Processes that share cores
share their speed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.measure import machine, table, write
from benchmarks.step_time import random_batch, random_framework, vocabulary_map
from models.distillation_framework import DistillationFramework
from models.text.vocabulary import VocabularyMap
from models.types import PairedBatch
from utils.parallel.accelerator import build_accelerator
from utils.parallel.wrapper import Shell

ROOT = Path(__file__).resolve().parent.parent
PASSED = ("device", "shape", "batch", "length", "teacher_vocabulary", "student_vocabulary", "repeats", "threads")
"""Arguments of the command that its worker processes are given, too."""


class Wire:
    """Times during which gradients were under way in a step."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []
        """(begin, end) of the exchange of each bucket, in seconds of the clock."""

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Exchange a bucket as DDP does by default, and note the time that it takes."""
        begun = time.perf_counter()

        def note_end(future: torch.futures.Future) -> torch.Tensor:
            self.spans.append((begun, time.perf_counter()))
            return future.value()

        return allreduce_hook(dist.group.WORLD, bucket).then(note_end)

    def take(self) -> float:
        """Return the seconds since the last call in which at least one exchange was under way."""
        total = 0.0
        latest_end = 0.0

        # Buckets overlap: of each, only the time after all earlier ones counts.
        for begun, ended in sorted(self.spans):
            total += max(0.0, ended - max(begun, latest_end))
            latest_end = max(latest_end, ended)

        self.spans.clear()
        return total


class Replica:
    """The framework of one process, wrapped for training with the others."""

    def __init__(self, accelerator: Accelerator, framework: DistillationFramework, batch: PairedBatch) -> None:
        self.accelerator = accelerator
        self.framework = framework
        self.batch = batch

        # Losses are divided by the items of all processes, each of which has a batch like this one.
        self.counts = {name: count * accelerator.num_processes for name, count in batch.counts.items()}

        self.wire = Wire()
        self.model: nn.Module = accelerator.prepare(Shell(framework))
        if accelerator.num_processes > 1:
            self.model.register_comm_hook(None, self.wire.hook)

    def time_step(self, exchange: bool) -> list[float]:
        """Return seconds of (a step, its exchange of gradients) in the slowest process."""
        accelerator = self.accelerator
        accelerator.wait_for_everyone()

        began = time.perf_counter()
        with nullcontext() if exchange else accelerator.no_sync(self.model):
            loss = self.model(self.batch, 0, counts=self.counts)[0]
            accelerator.backward(loss)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        step_seconds = time.perf_counter() - began

        seconds = torch.tensor([step_seconds, self.wire.take()], device=accelerator.device)
        if accelerator.num_processes > 1:
            dist.all_reduce(seconds, dist.ReduceOp.MAX)

        self.framework.zero_grad(set_to_none=True)
        return seconds.tolist()


def work(args: argparse.Namespace) -> None:
    """Measure in one process of a launch; the first one prints the result as JSON."""
    torch.set_num_threads(max(1, args.threads))
    accelerator = build_accelerator("no", cpu=args.device == "cpu")
    torch.manual_seed(0)

    vocabulary = vocabulary_map(args.teacher_vocabulary, args.student_vocabulary)
    framework = framework_of(args, vocabulary, accelerator.device)
    batch = random_batch(vocabulary, args.batch, args.length).to(accelerator.device)
    replica = Replica(accelerator, framework, batch)

    # One step of each kind warms up: DDP arranges its buckets in the first exchange.
    with_exchange = []
    without_exchange = []
    for number in range(args.repeats + 1):
        exchanged = replica.time_step(exchange=True)
        unexchanged = replica.time_step(exchange=False)
        if number > 0:
            with_exchange.append(exchanged)
            without_exchange.append(unexchanged)

    if accelerator.is_main_process:
        result = summarise(replica, np.array(with_exchange), np.array(without_exchange))
        print(json.dumps(result), flush=True)


def framework_of(args: argparse.Namespace, vocabulary: VocabularyMap, device: torch.device) -> DistillationFramework:
    """Return a framework of random models in float32."""
    return random_framework(
        args.shape,
        vocabulary,
        teacher_vocabulary=args.teacher_vocabulary,
        student_vocabulary=args.student_vocabulary,
        teacher_dtype=torch.float32,
        device=device,
    )


def summarise(replica: Replica, with_exchange: np.ndarray, without_exchange: np.ndarray) -> dict:
    """Return the figures of one number of processes.

    Args:
        with_exchange, without_exchange: [repeats, 2] seconds of (a step, its exchange).
    """
    step = float(np.median(with_exchange[:, 0]))
    step_without = float(np.median(without_exchange[:, 0]))
    on_the_wire = with_exchange[:, 1] / with_exchange[:, 0]

    # Gradients have the sizes of the student's parameters.
    parameters = replica.framework.student.parameters()
    gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    return {
        "processes": replica.accelerator.num_processes,
        "step": step,
        "tokens_per_second": replica.counts["lm"] / step,
        "not_hidden": max(0.0, 1 - step_without / step),
        "on_the_wire": float(np.median(on_the_wire)),
        "megabytes": gradient_bytes / 1e6,
    }


def launch(args: argparse.Namespace, processes: int) -> dict:
    """Return the figures of a number of processes.

    Raises:
        SystemExit: they failed; the message is the end of their errors.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "-m"]
    command += ["benchmarks.scaling", "--worker"]
    for name, value in vars(args).items():
        if name in PASSED:
            command.append(f"--{name.replace('_', '-')}={value}")

    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])

    # Libraries print lines of their own.
    answer = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return json.loads(answer)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=["tiny", "smollm2-135m", "smollm2-360m"], default="tiny")
    parser.add_argument("--batch", type=int, default=2, help="windows per process")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--teacher-vocabulary", type=int, default=8_000)
    parser.add_argument("--student-vocabulary", type=int, default=4_000)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of each process on a CPU")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(results: list[dict]) -> str:
    """Return the table; the first number of processes is the one that the others are compared with."""
    base = results[0]["tokens_per_second"]
    rows = []
    for result in results:
        rows.append(
            [
                str(result["processes"]),
                f"{result['step']:.3f}",
                f"{result['tokens_per_second']:,.0f}",
                f"{result['tokens_per_second'] / base:.2f}",
                f"{result['not_hidden']:.0%}",
                f"{result['on_the_wire']:.0%}",
            ]
        )

    header = ["processes", "s a step", "student tokens/s", "times one", "exchange: not hidden", "on the wire"]
    return table(header, rows)


def main() -> None:
    """Measure every number of processes and print the table; with `--worker`, be one of these processes."""
    args = parse_arguments()
    if args.worker:
        work(args)
        return

    results = [launch(args, processes) for processes in args.processes]

    facts = machine(torch.device(args.device), args.threads)
    megabytes = results[0]["megabytes"]
    print(f"{facts['date']}; {facts['cpu']}, {facts['cores']} cores; gradients of {megabytes:.0f} MB\n")
    print(report(results))
    if args.output:
        write(args.output, {"machine": facts, "found": results})


if __name__ == "__main__":
    main()
