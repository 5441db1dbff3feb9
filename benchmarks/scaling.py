"""What more processes bring: student tokens per second, and what the exchange of gradients costs.

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
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from benchmarks.measure import machine, table, write
from benchmarks.step_time import random_batch, random_framework, vocabulary_map
from utils.parallel.accelerator import build_accelerator
from utils.parallel.wrapper import Shell

ROOT = Path(__file__).resolve().parent.parent


class Wire:
    """How long gradients were under way in a step: the union of the times of its buckets."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def hook(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        begun = time.perf_counter()

        def ended(future: torch.futures.Future) -> torch.Tensor:
            self.spans.append((begun, time.perf_counter()))
            return future.value()

        return allreduce_hook(dist.group.WORLD, bucket).then(ended)

    def take(self) -> float:
        """Seconds since the last call."""
        total, end = 0.0, 0.0
        for begun, ended in sorted(self.spans):
            total, end = total + max(0.0, ended - max(begun, end)), max(end, ended)
        self.spans.clear()
        return total


def work(args: argparse.Namespace) -> None:
    """One process of a launch; the first prints what all measured."""
    torch.set_num_threads(max(1, args.threads))
    accelerator = build_accelerator("no", cpu=args.device == "cpu")
    torch.manual_seed(0)
    vocabulary = vocabulary_map(args.teacher_vocabulary, args.student_vocabulary)
    framework = random_framework(
        args.shape,
        vocabulary,
        teacher_vocabulary=args.teacher_vocabulary,
        student_vocabulary=args.student_vocabulary,
        teacher_dtype=torch.float32,
        device=accelerator.device,
    )
    model, wire = accelerator.prepare(Shell(framework)), Wire()
    if accelerator.num_processes > 1:
        model.register_comm_hook(None, wire.hook)
    batch = random_batch(vocabulary, args.batch, args.length).to(accelerator.device)
    counts = {name: count * accelerator.num_processes for name, count in batch.counts.items()}
    rows = []
    for number in range(2 * args.repeats + 2):
        exchange = number % 2 == 0
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        with nullcontext() if exchange else accelerator.no_sync(model):
            accelerator.backward(model(batch, 0, counts=counts)[0])
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = torch.tensor([time.perf_counter() - began, wire.take()], device=accelerator.device)
        if accelerator.num_processes > 1:
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
        rows += [seconds.tolist()] if number > 1 else []
        framework.zero_grad(set_to_none=True)
    if accelerator.is_main_process:
        with_exchange, without = np.array(rows[0::2]), np.array(rows[1::2])
        step = float(np.median(with_exchange[:, 0]))
        found = {
            "processes": accelerator.num_processes,
            "step": step,
            "tokens_per_second": counts["lm"] / step,
            "not_hidden": max(0.0, 1 - float(np.median(without[:, 0])) / step),
            "on_the_wire": float(np.median(with_exchange[:, 1] / with_exchange[:, 0])),
            "megabytes": sum(p.numel() * p.element_size() for p in framework.student.parameters()) / 1e6,
        }
        print(json.dumps(found), flush=True)


def launch(args: argparse.Namespace, processes: int) -> dict:
    """What so many processes measure."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "-m"]
    given = [f"--{name.replace('_', '-')}={value}" for name, value in vars(args).items() if name in PASSED]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(
        [*command, "benchmarks.scaling", "--worker", *given], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


PASSED = ("device", "shape", "batch", "length", "teacher_vocabulary", "student_vocabulary", "repeats", "threads")


def main() -> None:
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
    args = parser.parse_args()
    if args.worker:
        return work(args)
    found = [launch(args, processes) for processes in args.processes]
    header = ["processes", "s a step", "student tokens/s", "times one", "exchange: not hidden", "on the wire"]
    rows = [
        [
            str(f["processes"]),
            f"{f['step']:.3f}",
            f"{f['tokens_per_second']:,.0f}",
            f"{f['tokens_per_second'] / found[0]['tokens_per_second']:.2f}",
            f"{f['not_hidden']:.0%}",
            f"{f['on_the_wire']:.0%}",
        ]
        for f in found
    ]
    where = machine(torch.device(args.device), args.threads)
    print(f"{where['date']}; {where['cpu']}, {where['cores']} cores; gradients of {found[0]['megabytes']:.0f} MB\n")
    print(table(header, rows))
    if args.output:
        write(args.output, {"machine": where, "found": found})


if __name__ == "__main__":
    main()
