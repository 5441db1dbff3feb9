"""Parts about logits: the student's head beside its bare products and its peers, the teacher's top-k."""

import argparse
import functools
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from benchmarks import peers
from benchmarks.gpu.settings import Bench
from benchmarks.gpu.timing import Measured, measure_fitting, ratio, seconds
from models.losses import head_passes
from models.teacher.top_k import exact_top_k

VARIANTS = {
    "bare": "",
    "plain": "",
    "fused": "",
    "fused-compiled": "",
    "liger-1024": "liger_kernel",
    "trl-chunked": "trl",
    "gkd": "trl",
}
"""Variant of `benchmarks.peers` -> the package that it needs."""
TOP_K = 256


def head(bench: Bench, precision: str) -> Iterator[dict]:
    """Yield, per size, the time and memory of the fused head and of what does comparable work on the same tensors."""
    bench.require_precision(precision)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

    for vocabulary, tokens in bench.scale.heads:
        arguments = _arguments(bench, precision, vocabulary=vocabulary, tokens=tokens)
        for row in _rows_of_size(bench, arguments):
            yield {"V": vocabulary, "N": tokens, **row}


def _arguments(bench: Bench, precision: str, *, vocabulary: int, tokens: int) -> argparse.Namespace:
    """Return the arguments of `benchmarks.peers` for a size."""
    sizes = {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "width": bench.scale.head_width,
        "top-k": min(TOP_K, vocabulary // 4),
        "device": str(bench.device),
        "precision": precision,
    }
    return peers.parser("").parse_args([f"--{name}={value}" for name, value in sizes.items()])


def _rows_of_size(bench: Bench, arguments: argparse.Namespace) -> Iterator[dict]:
    """Yield the rows of one size: variants that were measured, then those that were not and why."""
    problem = peers.Problem(arguments)
    absent = _absent_variants(problem.device)
    works = {name: _work(name, problem) for name in VARIANTS if name not in absent}

    def clear() -> None:
        problem.states.grad = None
        problem.weight.grad = None

    measured = measure_fitting(
        works,
        bench.device,
        repeats=bench.scale.repeats,
        before=clear,
        foreign=[name for name in works if VARIANTS[name]],
    )
    yield from _rows(measured, returned=_bytes_returned(problem))

    for name, reason in (measured.failures | absent).items():
        yield {"variant": peers.VARIANTS[name].title, "result": reason}


def _absent_variants(device: torch.device) -> dict[str, str]:
    """Return the variants that this machine lacks, and the reasons."""
    absent = {}
    for name, package in VARIANTS.items():
        if package and importlib.util.find_spec(package) is None:
            absent[name] = f"{package} is not installed"

    # torch.compile needs a compiler that works, which no package tells.
    if error := head_passes.try_passes(device):
        absent["fused-compiled"] = f"torch.compile does not work here: {error}"
    return absent


def _work(name: str, problem: peers.Problem) -> Callable[[], None]:
    """Return a variant's forward and backward.

    It is prepared in its first call: a failure to prepare is then a failure of this variant alone.
    """
    # The folder is for float64 references, which nothing here needs.
    folder = Path(tempfile.gettempdir())

    @functools.cache
    def prepared() -> peers.Work:
        return peers.Work(peers.VARIANTS[name], problem, folder)

    return lambda: prepared()()


def _bytes_returned(problem: peers.Problem) -> int:
    """Return the bytes of the two gradients that every loss leaves behind."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (problem.states, problem.weight))


def _rows(measured: Measured, returned: int) -> Iterator[dict]:
    """Yield a row for each measured variant.

    Args:
        returned: bytes that are no memory of a loss's own.
    """
    above = {}
    for name, runs in measured.runs.items():
        expected = returned if peers.VARIANTS[name].loss else 0
        above[name] = max(0, max(run.peak for run in runs) - expected)

    for name, runs in measured.runs.items():
        variant = peers.VARIANTS[name]
        row = {
            "variant": variant.title.strip("*"),
            "computes": variant.computes,
            "ms": seconds(runs) * 1e3,
            "host_ms": median(run.host for run in runs) * 1e3,
            "MiB": above[name] / 2**20,
        }
        if busy := measured.busy.get(name):
            row["busy_ms"] = busy * 1e3
            if bare := measured.busy.get("bare"):
                row["busy_times_bare"] = busy / bare

        # Ratios, where what they compare with has fitted into memory.
        if "bare" in measured.runs:
            row["times_bare"] = ratio(runs, measured.runs["bare"])
        if above.get("plain") and variant.loss:
            row["memory_of_plain"] = above[name] / above["plain"]
        yield row


def top_k(bench: Bench) -> Iterator[dict]:
    """Yield the time of finding the teacher's largest logits, and of a softmax over them for comparison."""
    vocabulary = bench.scale.teacher_vocabulary
    tokens = min(1024, bench.scale.heads[0][1])
    logits = torch.randn(tokens, vocabulary, device=bench.device)

    works = {
        "torch.topk": lambda: logits.topk(TOP_K),
        "exact_top_k (in use)": lambda: exact_top_k(logits, TOP_K),
        "log_softmax": lambda: logits.log_softmax(1),
    }
    measured = measure_fitting(works, bench.device, bench.scale.repeats)

    for name, runs in measured.runs.items():
        yield {"V": vocabulary, "N": tokens, "what": name, "ms": seconds(runs) * 1e3}
