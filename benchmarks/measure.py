"""What the speed and memory benchmarks share: seconds, peak memory, interleaved variants, the machine, the table.

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
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Run:
    """One run of one variant."""

    seconds: float
    """CPU seconds of all threads, in and outside of the kernel; on a GPU seconds of the clock."""
    kernel: float
    """CPU seconds in the kernel: nearly all of it hands out pages of memory."""
    wall: float
    peak: int
    """Bytes at the peak, above what was there before the run; -1: not known."""
    host: float
    """Seconds of the clock until the host had nothing left to do; a GPU may then still be computing."""


def _resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def _reset_peak() -> str:
    """Set the high-water mark back; returns how the peak can be read."""
    try:
        RESET.write_text("5")
        return "VmHWM"
    except OSError:
        return "ru_maxrss"


def _maxrss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(work: Callable[[], object], device: torch.device) -> Run:
    """Run once; what the work returns is kept until the peak was read."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)  # memory that glibc holds in reserve would hide as much of the peak
        how = _reset_peak()
        before = _resident("VmRSS") if how == "VmHWM" else _maxrss()
    wall, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    kept = work()
    host = time.perf_counter() - wall
    if cuda:
        torch.cuda.synchronize(device)
    wall, now = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    if cuda:
        peak = torch.cuda.max_memory_allocated(device) - before
    elif how == "VmHWM":
        peak = _resident("VmHWM") - before
    else:
        peak = _maxrss() - before or -1
    del kept
    user, kernel = now.ru_utime - cpu.ru_utime, now.ru_stime - cpu.ru_stime
    return Run(wall if cuda else user + kernel, kernel, wall, peak, host)


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


class Worker:
    """A variant in a process of its own, which runs when it is told to."""

    def __init__(self, command: Sequence[str], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.runs: list[Run] = []
        self.skipped = self._answer().get("skipped", "")

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):  # a library may print
                return json.loads(line)
        return {"skipped": f"its process ended with status {self.process.wait()}"}

    def ask(self, what: str) -> dict:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def run(self) -> None:
        answer = self.ask("run")
        if "skipped" in answer:
            self.skipped = answer["skipped"]
        else:
            self.runs.append(Run(**answer))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(prepare: Callable[[], tuple[Callable[[], object], Callable[[], object]]], device: torch.device) -> None:
    """The other end of a `Worker`.

    Args:
        prepare: returns (what is measured, what is done before each run, unmeasured).
    """
    try:
        work, before = prepare()
    except (ImportError, AttributeError) as error:
        print(json.dumps({"skipped": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print("{}", flush=True)
    for line in sys.stdin:
        if line.strip() == "run":
            before()
            print(json.dumps(asdict(measure(work, device))), flush=True)
        else:
            print(json.dumps(work.answer(line.strip())), flush=True)


def interleave(workers: dict[str, Worker], repeats: int, limit: float) -> None:
    """One unmeasured round, then rounds in which every variant runs once: noise of the machine hits all alike.

    A variant that has taken more than `limit` CPU seconds runs no more; its unmeasured run counts if it alone did.
    """
    for number in range(repeats + 1):
        for worker in workers.values():
            if not worker.skipped and sum(r.seconds for r in worker.runs) < limit:
                worker.run()
        if number == 0:
            for worker in workers.values():
                if sum(r.seconds for r in worker.runs) < limit:
                    worker.runs.clear()


def summary(runs: Sequence[Run]) -> dict:
    """Medians of seconds, kernel seconds and peak, the range of seconds, the number of runs."""
    seconds = [r.seconds for r in runs]
    return {
        "seconds": median(seconds),
        "least": min(seconds),
        "most": max(seconds),
        "kernel": median(r.kernel for r in runs),
        "wall": median(r.wall for r in runs),
        "peak": median(r.peak for r in runs),
        "runs": len(runs),
    }


def machine(device: torch.device, threads: int) -> dict:
    """Where and when, for the JSON file and the line above the table."""
    model = ""
    if (info := Path("/proc/cpuinfo")).exists():
        model = (re.findall(r"model name\s*: (.*)", info.read_text()) or [""])[0]
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": [round(x, 1) for x in os.getloadavg()],
        "memory": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peak memory": "torch.cuda" if device.type == "cuda" else _reset_peak(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def describe(found: dict) -> str:
    gpu = f", {found['gpu']}" if "gpu" in found else ""
    return (
        f"{found['date']}; {found['cpu']}{gpu}, {found['cores']} cores (load {found['load'][0]} at the start), "
        f"{found['threads']} thread(s), torch {found['torch']}; peak memory from {found['peak memory']}"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten: {file}")
