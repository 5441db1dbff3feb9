"""The hardware of this machine, and the choices that follow from it, each with its reason.

Nothing here trusts `torch.cuda.is_available()` alone: a build without kernels for the GPU says True, warns,
and dies at the first operation. Nothing trusts `is_bf16_supported()`: it says True where bf16 is emulated.
"""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import psutil
import torch

from ..errors import UserError

T = TypeVar("T")
Precision = Literal["no", "fp16", "bf16"]

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "safetensors",
    "pydantic",
    "peft",
    "bitsandbytes",
)
"""Packages whose versions are written down, where they are installed."""

ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that torch reads its CUDA allocator's settings from."""

GROWING_BLOCKS = "expandable_segments:True"
"""Setting by which that allocator's blocks grow."""

BF16_CAPABILITY = (8, 0)
"""First NVIDIA compute capability with bf16 and TF32 arithmetic."""

BF16_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16"}
"""CPU capabilities, as torch names them, that multiply bf16 matrices faster than float32 ones (measured on each)."""

FP16_TENSOR_CORES = (7, 0)
"""First NVIDIA compute capability that multiplies matrices in fp16 faster than in float32."""

FP16_CAPABILITY = (6, 0)
"""First NVIDIA compute capability on which fp16 is worth its trouble, for the memory."""

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Choice(Generic[T]):
    """An automatic choice and why it was made: to be logged once."""

    value: T
    reason: str


# ----------------------------------------------------------------------------------------------------- devices

LEAST_SPARE = 0.5
"""Free memory of a GPU that the teacher gets without being asked for it, beside that of the student's."""


def choose_device() -> Choice[torch.device]:
    """Return the device to train on: a CUDA GPU, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return Choice(device, reason=torch.cuda.get_device_name())

    cpu = torch.device("cpu")
    if torch.backends.mps.is_available():
        return Choice(cpu, reason=f"this Apple GPU lacks the float64 that resume and KD need; {cores()} cores")
    if torch.version.cuda is None:
        return Choice(cpu, reason=f"this torch build has no CUDA; {cores()} cores")
    return Choice(cpu, reason=f"no GPU is visible to torch; {cores()} cores")


def unused_gpus(processes: int, used_here: int) -> str | None:
    """Return a hint on the GPUs that a run leaves idle and how to use them; None if it leaves none.

    Args:
        processes: of the run; several come from a launcher, which placed them.
        used_here: GPUs that this process uses.
    """
    count = _gpu_count()
    if processes > 1 or count <= used_here:
        return None

    return (
        f"{count - used_here} of {count} GPUs stay unused; `accelerate launch --multi_gpu --num_processes {count} "
        "train.py ...` with the same flags trains on all of them, and --teacher-device cuda:1 gives the teacher one "
        "of its own (docs/scaling.md)"
    )


def spare_gpu(student: torch.device, processes: int) -> Choice[torch.device] | None:
    """Return a GPU that the teacher can have for itself; None: there is none.

    Args:
        student: device of the student.
        processes: of the run; of several each has its GPU already.
    """
    if processes > 1 or student.type != "cuda" or _gpu_count() < 2:
        return None

    free = {index: torch.cuda.mem_get_info(index)[0] for index in range(_gpu_count())}
    at_student = free.pop(student.index or 0)
    index = max(free, key=lambda gpu: free[gpu])

    # One that drives a screen, or is busy, may have no room for a teacher.
    if free[index] < LEAST_SPARE * at_student:
        return None
    room = f"{free[index] / 2**30:.1f} GiB free"
    reason = f"a GPU of its own, with {room}; --teacher-device {student} puts it with the student"
    return Choice(torch.device("cuda", index), reason=reason)


def choose_teacher_device(requested: str, student: torch.device, processes: int) -> Choice[torch.device]:
    """Return the device on which the teacher computes.

    Args:
        requested: `auto`, `cpu` or a GPU such as `cuda:1`.
        student: device of the student, which is also that of the teacher with `auto`.
        processes: of the run.

    Raises:
        UserError: no such device, or one GPU for the teachers of several processes.
    """
    if requested == "auto":
        return Choice(student, reason="with the student")

    devices = ["cpu", *(f"cuda:{index}" for index in range(_gpu_count()))]
    if requested not in devices:
        raise UserError(
            f"teacher.device {requested}: there is no such device. Expected auto, spread, sharded, "
            f"{', '.join(devices)}."
        )

    # The processes of a run load a teacher each, and all would load it onto this GPU.
    if processes > 1 and requested != "cpu":
        raise UserError(
            f"teacher.device {requested}: each of the {processes} processes has its teacher, and all would share "
            "one GPU. Leave --teacher-device out, or start one process with `python train.py`."
        )
    return Choice(torch.device(requested), reason="asked for")


def _gpu_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


# --------------------------------------------------------------------------------------------------- precision


def choose_precision(requested: Literal["auto", "no", "fp16", "bf16"], device: torch.device) -> Choice[Precision]:
    """Return the mixed precision to train in, by what was asked for and what the device has.

    bf16 needs compute capability 8.0 (emulated and slow below) or a CPU with instructions for it, fp16 a CUDA
    device. A request that the device cannot meet falls back, and the reason says so.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return _choose_on_cuda(requested, capability, name=torch.cuda.get_device_name(device))

    if requested == "no":
        return Choice("no", reason="asked for")
    if device.type == "cpu" and requested in ("auto", "bf16"):
        return _choose_on_cpu(requested)
    if requested == "auto":
        return Choice("no", reason=f"float32 on {device.type}")
    return Choice("no", reason=f"{requested} was asked for, but on {device.type} training is in float32 only")


def _choose_on_cpu(requested: Literal["auto", "bf16"]) -> Choice[Precision]:
    """Return the mixed precision for this machine's CPU, on which bf16 computes everywhere, but seldom fast."""
    instructions = bf16_instructions()
    if requested == "bf16":
        speed = f"has {instructions}" if instructions else "has no instructions for it and is slow at it"
        return Choice("bf16", reason=f"asked for; this CPU {speed}")
    if instructions:
        return Choice("bf16", reason=f"this CPU has {instructions}, which multiplies bf16 faster than float32")
    return Choice("no", reason="float32: this CPU has no instructions for bf16")


def bf16_instructions() -> str | None:
    """Return the name of the instructions by which this CPU multiplies bf16 matrices; None: torch knows of none.

    An older torch does not tell what a CPU has.
    """
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name for key, name in BF16_INSTRUCTIONS.items() if capabilities.get(key)), None)


def _choose_on_cuda(
    requested: Literal["auto", "no", "fp16", "bf16"], capability: tuple[int, int], name: str
) -> Choice[Precision]:
    """Return the mixed precision for an NVIDIA GPU of this compute capability."""
    version = f"compute capability {capability[0]}.{capability[1]}"
    has_bf16 = capability >= BF16_CAPABILITY

    # A request is met wherever the GPU can, fp16 also where it is slow.
    if requested == "no":
        return Choice("no", reason="asked for")
    if requested == "fp16":
        return Choice("fp16", reason="asked for")
    if requested == "bf16" and has_bf16:
        return Choice("bf16", reason="asked for")
    if requested == "bf16":
        return Choice("fp16", f"bf16 was asked for, but {name} ({version}) lacks it (it needs 8.0); fp16 instead")

    # auto: the fastest that loses no accuracy
    if has_bf16:
        return Choice("bf16", reason=f"{name} ({version}) has bf16")
    if capability >= FP16_TENSOR_CORES:
        return Choice("fp16", reason=f"{name} ({version}) has fp16 tensor cores and no bf16")
    if capability >= FP16_CAPABILITY:
        return Choice("fp16", reason=f"{name} ({version}) has no bf16; fp16 saves memory there, not time")
    return Choice("no", reason=f"{name} ({version}) has neither bf16 nor usable fp16")


# -------------------------------------------------------------------------------------------- torch's settings


def configure_backends(device: torch.device) -> list[str]:
    """Switch on what is fast and exact enough; return what was done, with reasons, for the log.

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


def configure_allocator() -> str | None:
    """Let torch's CUDA allocator grow its blocks, and return what was done; call it before anything is on a GPU.

    Batches have many shapes: blocks of fixed sizes that were cut for one do not serve the next, and memory that is free
    in pieces cannot be had. A setting of the user's own stays as it is.
    """
    if sys.platform != "linux" or torch.version.hip is not None:
        return None
    if any(os.environ.get(name) for name in ALLOCATOR_SETTINGS):
        return None

    # torch up to 2.9 reads the first variable only, and later ones warn where it stands alone
    for name in ALLOCATOR_SETTINGS:
        os.environ[name] = GROWING_BLOCKS

    # torch reads them when it starts CUDA, as bitsandbytes, which peft imports, makes it do
    if torch.cuda.is_initialized():
        _set_allocator(GROWING_BLOCKS)
    return "allocator: expandable segments, as batches have many shapes"


def _set_allocator(setting: str) -> None:
    """Change a setting of torch's allocator after CUDA has started."""
    anew = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # the CUDA function's successor
    if anew is None:
        anew = torch.cuda.memory._set_allocator_settings
    anew(setting)


# ------------------------------------------------------------------------------------------------------ memory


def free_memory(device: torch.device) -> int:
    """Return the bytes that a process can still take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available


def memory_use(device: torch.device) -> dict[str, float]:
    """Return `peak_memory_mb` and, on a GPU, `reserved_memory_mb`: what torch took of the card, with gaps, in MiB."""
    use = {"peak_memory_mb": peak_memory_mb(device)}
    if device.type == "cuda":
        use["reserved_memory_mb"] = torch.cuda.max_memory_reserved(device) / MIB
    return use


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory in use so far, in MiB: allocated by torch on a GPU, resident in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / MIB

    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # in bytes on macOS, in KiB on Linux
    if sys.platform == "darwin":
        return peak / MIB
    return peak / 2**10


# -------------------------------------------------------------------------------------------- what is written down


def describe() -> dict[str, Any]:
    """Return machine and versions as plain containers, for config.yaml and the report. Sizes in GiB."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _package_versions(),
        "cuda": torch.version.cuda,
        "torch_arch_list": torch.cuda.get_arch_list() if torch.cuda.is_available() else [],
        "gpus": [_describe_gpu(index) for index in range(_gpu_count())],
        "cores": cores(),
        "ram_gib": round(psutil.virtual_memory().total / GIB, 1),
        "place": notebook_service(),
    }


def _describe_gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / GIB, 1),
    }


def _package_versions() -> dict[str, str]:
    """Return the versions of those of `PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue

        if version:  # else: what an interrupted uninstall left
            versions[name] = version
    return versions


def notebook_service() -> Literal["kaggle", "colab", "elsewhere"]:
    """Return the notebook service this runs on, by the variables that each sets."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    if "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "elsewhere"


def cores() -> int:
    """Return the number of cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux: a container or batch system may have given it a few
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
