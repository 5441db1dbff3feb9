"""Parts that need no code of this project: the speed of the card, and the kernels of its attention."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.settings import Bench
from benchmarks.gpu.timing import measure_fitting, repeated, seconds, sees_kernels

PACKAGES = ("torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "peft", "bitsandbytes")
PEERS = ("liger_kernel", "trl")
WINDOWS = 4
HEADS = 15
KEY_VALUE_HEADS = 5
HEAD_WIDTH = 64
"""Sizes of attention: windows, and the heads of SmolLM2-360M."""
TIMES = 10
"""Calls in one timing of attention."""
KERNEL_WORDS = ("flash", "fmha", "cudnn", "softmax")
"""Words in the names of the kernels of attention."""


def where(bench: Bench) -> Iterator[dict]:
    """Yield versions, the card as its driver describes it, and the speed of copies and of products."""
    yield {"what": "versions", "result": ", ".join(_versions())}

    if bench.device.type == "cuda" and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True)
        yield {"what": "nvidia-smi", "result": "; ".join(answer.stdout.splitlines())}

    yield {"what": "copy", "TB_per_s": _copy_speed(bench)}

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
    for name, dtype in dtypes.items():
        yield {"what": f"products in {name}", "TFLOP_per_s": _product_speed(bench, dtype)}

    # Last: the setting stays for the rest of the process.
    if bench.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        yield {"what": "products in float32, TF32 allowed", "TFLOP_per_s": _product_speed(bench, torch.float32)}


def _versions() -> Iterator[str]:
    """Yield name and version of the packages that are installed."""
    for name in (*PACKAGES, *PEERS):
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue


def _copy_speed(bench: Bench) -> float:
    """Return terabytes a second, read and written."""
    source = torch.zeros(bench.scale.copied, dtype=torch.uint8, device=bench.device)
    target = torch.zeros_like(source)

    measured = measure_fitting({"copy": lambda: target.copy_(source)}, bench.device, bench.scale.repeats)
    return 2 * bench.scale.copied / seconds(measured.runs["copy"]) / 1e12


def _product_speed(bench: Bench, dtype: torch.dtype) -> float:
    """Return tera-operations a second of a product of square matrices."""
    side = bench.scale.matrix
    factor = torch.randn(side, side, device=bench.device, dtype=dtype)

    measured = measure_fitting({"product": lambda: factor @ factor}, bench.device, bench.scale.repeats)
    # A multiplication and an addition for each of the side**3 pairs.
    return 2 * side**3 / seconds(measured.runs["product"]) / 1e12


def attention(bench: Bench) -> Iterator[dict]:
    """Yield, per dtype, the kernels and the cost of attention with grouped heads and with repeated ones."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        queries = _random_states(bench, HEADS, dtype)
        keys = _random_states(bench, KEY_VALUE_HEADS, dtype)

        # Keys serve as values, too. The defaults bind the tensors of this dtype.
        def grouped(queries: Tensor = queries, keys: Tensor = keys) -> None:
            states = F.scaled_dot_product_attention(queries, keys, keys, is_causal=True, enable_gqa=True)
            states.sum().backward()

        def repeated_heads(queries: Tensor = queries, keys: Tensor = keys) -> None:
            keys = keys.repeat_interleave(HEADS // KEY_VALUE_HEADS, 1)
            F.scaled_dot_product_attention(queries, keys, keys, is_causal=True).sum().backward()

        works = {"grouped": grouped, "repeated": repeated_heads}
        loops = {name: repeated(work, TIMES) for name, work in works.items()}
        measured = measure_fitting(loops, bench.device, bench.scale.repeats)

        for name, runs in measured.runs.items():
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "heads": name,
                "ms": seconds(runs) / TIMES * 1e3,
                "MiB": max(run.peak for run in runs) / 2**20,
                "kernels": "; ".join(_kernels(works[name])),
            }


def _random_states(bench: Bench, heads: int, dtype: torch.dtype) -> Tensor:
    """Return random states [windows, heads, tokens, width of a head], with a gradient."""
    shape = (WINDOWS, heads, bench.scale.attended, HEAD_WIDTH)
    return torch.randn(shape, device=bench.device, dtype=dtype).requires_grad_()


def _kernels(work: Callable[[], object]) -> list[str]:
    """Return names of kernels of attention that a work launches, three at most."""
    if not sees_kernels():
        return ["not seen: this torch build has no CUDA profiler"]

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()

    names = []
    for event in profiler.key_averages():
        if any(word in event.key.lower() for word in KERNEL_WORDS):
            names.append(event.key[:60])
    return names[:3]
