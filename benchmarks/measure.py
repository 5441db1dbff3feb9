"""Measurement shared by the benchmarks: seconds, peak memory, interleaved variants, the machine, the tables.

Peak memory is read where the kernel keeps it, not in PyTorch's allocator, which does not see what a library of matrix
products takes. On Linux the high-water mark (VmHWM) is set back before each run through /proc/self/clear_refs; where
that cannot be done it is `ru_maxrss`, which only ever grows: then only runs that take more than all before them are
seen, which is why each variant has a process of its own. On a GPU it is `torch.cuda.max_memory_allocated`.
"""

import ctypes
import gc
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import psutil
import torch

MB = 1e6
STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


@dataclass
class Run:
    """One run of one variant."""

    seconds: float
    """CPU seconds of all threads, in and outside of the kernel; on a GPU seconds of the clock."""
    kernel: float
    """CPU seconds in the kernel: nearly all of it hands out pages of memory."""
    wall: float
    """Seconds of the clock."""
    peak: int
    """Bytes at the peak, above those in use before the run; -1: unknown."""
    host: float
    """Seconds of the clock until the host had nothing left to do; a GPU may then still be computing."""


# ----------------------------------------------------------------------------- peak memory


def _resident(field: str) -> int:
    """Return a field of /proc/self/status in bytes: VmRSS, in use now, or VmHWM, at the peak."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def _reset_peak() -> str:
    """Set the high-water mark back; return the name of the number that tells the peak."""
    try:
        # 5 is the kernel's code for the high-water mark.
        RESET.write_text("5")
        return "VmHWM"
    except OSError:
        return "ru_maxrss"


def _maxrss() -> int:
    """Return the process's peak since it began, in bytes."""
    # macOS counts it in bytes, Linux in kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class _PeakMemory:
    """Peak of the memory on a device since this object was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.source = "torch.cuda"
            self.before = torch.cuda.memory_allocated(device)
            return

        # Memory that glibc has in reserve would hide as much of the peak.
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)

        self.source = _reset_peak()
        self.before = _resident("VmRSS") if self.source == "VmHWM" else _maxrss()

    def read(self) -> int:
        """Return the bytes at the peak above those in use at the start; -1: unknown."""
        if self.source == "torch.cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        if self.source == "VmHWM":
            return _resident("VmHWM") - self.before

        # This mark never goes down: no growth says that an earlier run took more, not that this one took nothing.
        return _maxrss() - self.before or -1


# ----------------------------------------------------------------------------- one run, and rounds of runs


def measure(work: Callable[[], object], device: torch.device) -> Run:
    """Measure one call of a work on a device."""
    gc.collect()
    memory = _PeakMemory(device)
    is_gpu = device.type == "cuda"

    cpu_before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    result = work()
    host = time.perf_counter() - began

    # The host only queues a GPU's work.
    if is_gpu:
        torch.cuda.synchronize(device)
    wall = time.perf_counter() - began
    cpu_after = resource.getrusage(resource.RUSAGE_SELF)

    # The result has to exist until the peak is read: it is part of it.
    peak = memory.read()
    del result

    user = cpu_after.ru_utime - cpu_before.ru_utime
    kernel = cpu_after.ru_stime - cpu_before.ru_stime
    return Run(
        seconds=wall if is_gpu else user + kernel,
        kernel=kernel,
        wall=wall,
        peak=peak,
        host=host,
    )


def alternate(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, list[Run]]:
    """Measure works in rounds in which each runs once, after one round that is not measured.

    Noise of the machine then hits all alike, and the runs of a round can be compared with each other.

    Args:
        before: called before each run, unmeasured.
    """
    runs: dict[str, list[Run]] = {name: [] for name in works}

    for number in range(repeats + 1):
        for name, work in works.items():
            before()
            run = measure(work, device)
            if number > 0:
                runs[name].append(run)

    return runs


# ----------------------------------------------------------------------------- variants in processes of their own


class Worker:
    """A variant in a process of its own, which runs on request."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.runs: list[Run] = []

        # The first answer says that the variant is prepared, or why it cannot be.
        self.skipped = self._answer().get("skipped", "")

    def _answer(self) -> dict:
        """Return the next answer of the process; a process that ends without one counts as skipped."""
        for line in self.process.stdout:
            # Libraries print lines of their own.
            if line.startswith("{"):
                return json.loads(line)

        return {"skipped": f"its process ended with status {self.process.wait()}"}

    def ask(self, question: str) -> dict:
        """Send a line to the process and return its answer."""
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        return self._answer()

    def run(self) -> None:
        """Run the variant once and add the measurement to `runs`, or the reason why not to `skipped`."""
        answer = self.ask("run")
        if "skipped" in answer:
            self.skipped = answer["skipped"]
        else:
            self.runs.append(Run(**answer))

    def close(self) -> None:
        """End the process, which stops at the end of its input."""
        self.process.stdin.close()
        self.process.wait()


def serve(prepare: Callable[[], tuple[Callable[[], object], Callable[[], object]]], device: torch.device) -> None:
    """Answer a `Worker`, in its process, until it closes.

    Args:
        prepare: returns (the work to measure, a call before each run that is not measured). A line other than "run"
            goes to the work's method `answer`.
    """
    # A peer that is missing, or has another version than the benchmark knows, is left out of the table.
    try:
        work, before = prepare()
    except (ImportError, AttributeError) as error:
        print(json.dumps({"skipped": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print("{}", flush=True)

    for line in sys.stdin:
        question = line.strip()
        if question == "run":
            before()
            answer = asdict(measure(work, device))
        else:
            answer = work.answer(question)
        print(json.dumps(answer), flush=True)


def _seconds_of(worker: Worker) -> float:
    """Return the CPU seconds of a worker's runs."""
    return sum(run.seconds for run in worker.runs)


def interleave(workers: dict[str, Worker], repeats: int, limit: float) -> None:
    """Run all variants in rounds in which each runs once, after one round that is not measured.

    Noise of the machine hits all alike. A variant that has taken more than `limit` CPU seconds runs no more; its
    unmeasured run counts if it alone took as many.
    """
    for number in range(repeats + 1):
        for worker in workers.values():
            if not worker.skipped and _seconds_of(worker) < limit:
                worker.run()

        # The first round warms up, but a variant so slow that it has no second run needs it as its only figure.
        if number == 0:
            for worker in workers.values():
                if _seconds_of(worker) < limit:
                    worker.runs.clear()


def summary(runs: Sequence[Run]) -> dict:
    """Return medians of seconds, kernel seconds and peak, the range of seconds, the number of runs."""
    seconds = [run.seconds for run in runs]
    return {
        "seconds": median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "kernel": median(run.kernel for run in runs),
        "wall": median(run.wall for run in runs),
        "peak": median(run.peak for run in runs),
        "runs": len(runs),
    }


# ----------------------------------------------------------------------------- reports


def _processor() -> str:
    """Return the name of the CPU."""
    # Linux knows the model, which `platform` does not tell.
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = re.findall(r"model name\s*: (.*)", info.read_text())
        if models and models[0]:
            return models[0]

    return platform.processor() or platform.machine()


def machine(device: torch.device, threads: int) -> dict:
    """Return facts about the machine and the time, for the JSON file and the line above the table."""
    is_gpu = device.type == "cuda"
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": [round(load, 1) for load in os.getloadavg()],
        "memory": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peak memory": "torch.cuda" if is_gpu else _reset_peak(),
    }
    if is_gpu:
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def describe(facts: dict) -> str:
    """Return the line above a table: facts from `machine` in words."""
    gpu = f", {facts['gpu']}" if "gpu" in facts else ""
    return (
        f"{facts['date']}; {facts['cpu']}{gpu}, {facts['cores']} cores (load {facts['load'][0]} at the start), "
        f"{facts['threads']} thread(s), torch {facts['torch']}; peak memory from {facts['peak memory']}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    rule = ["---"] * len(header)
    lines = []
    for cells in (header, rule, *rows):
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write(file: Path, content: dict) -> None:
    """Write content as JSON, and print where it is."""
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten: {file}")
