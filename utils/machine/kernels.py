"""Check that this build of PyTorch has kernels for the GPUs, and the advice where it has none."""

import re
import subprocess
import sys
from collections.abc import Sequence

import torch

OLDEST_SUPPORTED = (5, 0)
"""First compute capability that any torch from 2.6 on has kernels for."""

OLDEST_IN_CURRENT_BUILDS = (7, 5)
"""First compute capability of the builds for CUDA 12.8; those for CUDA 12.6 go back to `OLDEST_SUPPORTED`."""

OLDEST_FOR_TRITON = (7, 0)
"""First compute capability that Triton compiles for."""


def compiles_head(setting: str, device: torch.device) -> bool:
    """Return True if the elementwise work of the student's head is compiled, unless a compiler fails.

    Args:
        setting: `loss.head_passes`.
    """
    if setting == "eager" or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST_FOR_TRITON


def check_kernels(timeout: float = 120.0) -> str | None:
    """Return what to do where this torch build cannot compute on a GPU that it sees; None if it can, or without a GPU.

    Compares the build's list of architectures with each GPU, then multiplies two matrices on it in a process
    of its own, because a CUDA error would poison this one.

    Args:
        timeout: seconds for the product on one GPU.
    """
    if not torch.cuda.is_available():
        return None

    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        arch_list = torch.cuda.get_arch_list()

        # AMD's architectures have names of another kind, which `covers` cannot compare: the product decides there.
        is_nvidia = torch.version.hip is None
        if is_nvidia and not covers(arch_list, capability):
            return remedy(name, capability, arch_list)

        failure = _launch(index, timeout)
        if not failure:
            continue
        if "no kernel image" in failure:
            return remedy(name, capability, arch_list)
        return f"{name} (cuda:{index}) failed at a first matrix product: {failure}"
    return None


def covers(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Return whether a build for `arch_list` has code for a GPU of this compute capability.

    `sm_XY` runs on the same major version from minor Y on; `compute_XY` (PTX) on everything from X.Y on.
    """
    return any(_arch_covers(arch, capability) for arch in arch_list)


def _arch_covers(arch: str, capability: tuple[int, int]) -> bool:
    """Return whether code for one architecture, such as `sm_86` or `compute_90`, runs on a GPU."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False

    kind, major, minor, suffix = match.groups()
    built_for = (int(major), int(minor))
    if suffix == "a":  # for exactly this one
        return built_for == capability
    if built_for > capability:
        return False
    return kind == "compute" or built_for[0] == capability[0]


def remedy(name: str, capability: tuple[int, int], arch_list: Sequence[str]) -> str:
    """Return the message for a GPU that this torch build has no kernels for: got, expected, what to type."""
    needed = f"sm_{capability[0]}{capability[1]}"
    problem = (
        f"{name} needs kernels for {needed}, and the installed torch {torch.__version__} was built for "
        f"{' '.join(arch_list) or 'no GPU'}: the first operation would fail with 'no kernel image is available'. "
    )
    if capability < OLDEST_SUPPORTED:
        advice = "No current torch supports this GPU: use another one, or run on the CPU (CUDA_VISIBLE_DEVICES=)."
        return problem + advice

    if capability < OLDEST_IN_CURRENT_BUILDS:
        install = 'pip install "torch>=2.6,<2.15" --index-url https://download.pytorch.org/whl/cu126'
        note = " (the cu126 builds are the only ones that still have them, the last is 2.14)"
    else:
        install = "pip install --upgrade torch --index-url https://download.pytorch.org/whl/cu128"
        note = ""
    return f"{problem}Install a build that has them{note} and restart the session: {install}"


def _launch(index: int, timeout: float) -> str | None:
    """Multiply two matrices on one GPU in a new process; return the last line of its error output if it fails."""
    code = (
        f"import torch; x = torch.ones(64, 64, device='cuda:{index}'); "
        "assert (x @ x).sum().item() == 64 ** 3; assert (x.half() @ x.half()).sum().item() > 0"
    )
    try:
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s"
    if process.returncode == 0:
        return None

    # warnings may follow the line that matters
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    if errors:
        return errors[-1]
    return lines[-1] if lines else f"exit status {process.returncode}"
