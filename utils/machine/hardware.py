"""What this machine can do, and the choices that follow from it, each with its reason.

Nothing here trusts `torch.cuda.is_available()` alone: a build without kernels for the GPU says True, warns,
and dies at the first operation. Nothing trusts `is_bf16_supported()`: it says True where bf16 is emulated.
"""

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import psutil
import torch

from ..errors import UserError

T = TypeVar("T")
Precision = Literal["no", "fp16", "bf16"]

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "safetensors", "pydantic")
PACKAGES += ("peft", "bitsandbytes")  # where they are installed

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that torch reads its CUDA allocator's settings from."""
BF16_CAPABILITY = (8, 0)
"""First NVIDIA compute capability with bf16 and TF32 arithmetic."""


@dataclass(frozen=True)
class Choice(Generic[T]):
    """An automatic choice and why it was made: to be logged once."""

    value: T
    reason: str


def choose_device() -> Choice[torch.device]:
    """The device to train on: a CUDA GPU, else the CPU."""
    if torch.cuda.is_available():
        return Choice(torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name())
    if torch.backends.mps.is_available():
        return Choice(torch.device("cpu"), f"this Apple GPU lacks the float64 that resume and KD need; {cores()} cores")
    why = "this torch build has no CUDA" if torch.version.cuda is None else "no GPU is visible to torch"
    return Choice(torch.device("cpu"), f"{why}; {cores()} cores")


def unused_gpus(processes: int, used_here: int) -> str | None:
    """What a run leaves idle on this machine and how to use it; None if nothing.

    Args:
        processes: of the run; several come from a launcher, which placed them.
        used_here: GPUs that this process uses.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes > 1 or count <= used_here:
        return None
    return (
        f"{count - used_here} of {count} GPUs stay unused; `accelerate launch --multi_gpu --num_processes {count} "
        "train.py ...` with the same flags trains on all of them, and --teacher-device cuda:1 gives the teacher one "
        "of its own (docs/scaling.md)"
    )


def choose_teacher_device(requested: str, student: torch.device, processes: int) -> Choice[torch.device]:
    """Where the teacher computes.

    Raises:
        UserError: no such device, or one GPU for the teachers of several processes.
    """
    if requested == "auto":
        return Choice(student, "with the student")
    known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    if requested not in known:
        raise UserError(
            f"teacher.device {requested}: there is no such device. Expected auto, spread, sharded, {', '.join(known)}."
        )
    if processes > 1 and requested != "cpu":
        raise UserError(
            f"teacher.device {requested}: each of the {processes} processes has its teacher, and all would share "
            "one GPU. Leave --teacher-device out, or start one process with `python train.py`."
        )
    return Choice(torch.device(requested), "asked for")


def choose_precision(requested: Literal["auto", "no", "fp16", "bf16"], device: torch.device) -> Choice[Precision]:
    """The mixed precision to train in, given what was asked for and what the device has.

    bf16 needs compute capability 8.0 (emulated and slow below), fp16 a CUDA device. A request that the
    device cannot meet falls back, and the reason says so.
    """
    if device.type == "cuda":
        return _choose_on_cuda(requested, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    if device.type == "cpu" and requested == "bf16":
        return Choice("bf16", "asked for; on a CPU it is seldom faster")
    if requested in ("fp16", "bf16"):
        return Choice("no", f"{requested} was asked for, but on {device.type} training is in float32 only")
    return Choice("no", "asked for" if requested == "no" else f"float32 on {device.type}")


def _choose_on_cuda(requested: str, capability: tuple[int, int], name: str) -> Choice[Precision]:
    version = f"compute capability {capability[0]}.{capability[1]}"
    has_bf16 = capability >= BF16_CAPABILITY
    if requested == "no":
        return Choice("no", "asked for")
    if requested == "fp16":
        return Choice("fp16", "asked for")
    if requested == "bf16" and not has_bf16:
        return Choice("fp16", f"bf16 was asked for, but {name} ({version}) lacks it (it needs 8.0); fp16 instead")
    if has_bf16:
        return Choice("bf16", "asked for" if requested == "bf16" else f"{name} ({version}) has bf16")
    if capability >= (7, 0):
        return Choice("fp16", f"{name} ({version}) has fp16 tensor cores and no bf16")
    if capability >= (6, 0):
        return Choice("fp16", f"{name} ({version}) has no bf16; fp16 saves memory there, not time")
    return Choice("no", f"{name} ({version}) has neither bf16 nor usable fp16")


def configure_backends(device: torch.device) -> list[str]:
    """Switch on what is fast and exact enough; returns what was done, with reasons, for the log.

    TF32 by `torch.set_float32_matmul_precision`: the one switch that every torch from 2.6 on has, that
    warns nowhere and leaves both the old and the new getters readable (setting
    `torch.backends.cuda.matmul.fp32_precision` makes the old getters raise, which torch.compile calls).
    On a CPU nothing is set: there it would lower the precision of oneDNN's matrix products.
    Attention is SDPA by the models' own setting; torch picks its kernel.
    """
    if device.type != "cuda":
        return []
    capability = torch.cuda.get_device_capability(device)
    if capability < BF16_CAPABILITY:
        return ["attention: SDPA, memory-efficient kernels (flash needs compute capability 8.0)"]
    torch.set_float32_matmul_precision("high")
    return [
        "TF32 for float32 matrix products (compute capability 8.0 or more)",
        "attention: SDPA, flash kernels in half precision",
    ]


def describe() -> dict[str, Any]:
    """Machine and versions as plain containers, for config.yaml and the report. Sizes in GiB."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cuda": torch.version.cuda,
        "torch_arch_list": torch.cuda.get_arch_list() if torch.cuda.is_available() else [],
        "gpus": gpus,
        "cores": cores(),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "place": notebook_service(),
    }


def notebook_service() -> Literal["kaggle", "colab", "elsewhere"]:
    """Which notebook service this runs on, by the variables that each sets."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else "elsewhere"


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_use(device: torch.device) -> dict[str, float]:
    """Return `peak_memory_mb` and, on a GPU, `reserved_memory_mb`: what torch took of the card, with gaps, in MiB."""
    use = {"peak_memory_mb": peak_memory_mb(device)}
    if device.type == "cuda":
        use["reserved_memory_mb"] = torch.cuda.max_memory_reserved(device) / 2**20
    return use


def configure_allocator() -> str | None:
    """Let torch's CUDA allocator grow its blocks, and return what was done; call it before anything is on a GPU.

    Batches have many shapes: blocks of fixed sizes that were cut for one do not serve the next, and memory that is free
    in pieces cannot be had. A setting of the user's own stays as it is.
    """
    if sys.platform != "linux" or torch.version.hip is not None:
        return None
    if any(os.environ.get(name) for name in ALLOCATOR_SETTINGS):
        return None
    for name in ALLOCATOR_SETTINGS:  # the first is read up to torch 2.9, and later ones warn where it stands alone
        os.environ[name] = "expandable_segments:True"
    return "allocator: expandable segments, as batches have many shapes"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far, in MiB: allocated by torch on a GPU, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- kernels --------------------------------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
