"""Whether this build of PyTorch has kernels for a GPU."""

import re
import subprocess
import sys
from collections.abc import Sequence

import torch


def check_kernels(timeout: float = 120.0) -> str | None:
    """Whether this torch build can compute on the GPUs it sees: None if so (or without a GPU), else what to do.

    Compares the build's list of architectures with each GPU, then multiplies two matrices on it in a process
    of its own, because a CUDA error would poison this one.
    """
    if not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        if torch.version.hip is None and not covers(torch.cuda.get_arch_list(), capability):
            return remedy(name, capability, torch.cuda.get_arch_list())
        if failure := _launch(index, timeout):
            if "no kernel image" in failure:
                return remedy(name, capability, torch.cuda.get_arch_list())
            return f"{name} (cuda:{index}) failed at a first matrix product: {failure}"
    return None


def covers(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build for `arch_list` has code for a GPU of this compute capability.

    `sm_XY` runs on the same major version from minor Y on; `compute_XY` (PTX) on everything from X.Y on.
    """
    for arch in arch_list:
        if not (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)):
            continue
        built = (int(match[2]), int(match[3]))
        if match[4] == "a":  # for exactly this one
            if built == capability:
                return True
        elif built <= capability and (match[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def remedy(name: str, capability: tuple[int, int], arch_list: Sequence[str]) -> str:
    """The message for a GPU that this torch build has no kernels for: got, expected, what to type."""
    needed = f"sm_{capability[0]}{capability[1]}"
    problem = (
        f"{name} needs kernels for {needed}, and the installed torch {torch.__version__} was built for "
        f"{' '.join(arch_list) or 'no GPU'}: the first operation would fail with 'no kernel image is available'. "
    )
    if capability < (5, 0):
        return (
            problem + "No current torch supports this GPU: use another one, or run on the CPU (CUDA_VISIBLE_DEVICES=)."
        )
    if capability < (7, 5):
        install = 'pip install "torch>=2.6,<2.15" --index-url https://download.pytorch.org/whl/cu126'
        note = " (the cu126 builds are the only ones that still have them, the last is 2.14)"
    else:
        install, note = "pip install --upgrade torch --index-url https://download.pytorch.org/whl/cu128", ""
    return f"{problem}Install a build that has them{note} and restart the session: {install}"


def _launch(index: int, timeout: float) -> str | None:
    """Multiply two matrices on one GPU in a new process; the last line of its error output if it fails."""
    code = (
        f"import torch; x = torch.ones(64, 64, device='cuda:{index}'); "
        "assert (x @ x).sum().item() == 64 ** 3; assert (x.half() @ x.half()).sum().item() > 0"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout:.0f} s"
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()
    return errors[-1].strip() if errors else f"exit status {done.returncode}"
