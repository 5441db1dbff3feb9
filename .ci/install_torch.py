"""Install the build of torch that this machine needs, in the version that constraints.txt pins.

    .venv/bin/python .ci/install_torch.py          choose by the operating system and the GPU
    .venv/bin/python .ci/install_torch.py URL      take it from this package index

PyPI has one build for each operating system: for CUDA on Linux (gigabytes, and without kernels for old GPUs), for the
CPU elsewhere. The others are on PyTorch's own index. Where that cannot be reached, as behind a company's mirror, the
index that pip is set up with has to do.
"""

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
PYTORCH = "https://download.pytorch.org/whl"
CUDA = f"{PYTORCH}/cu128"
OLD_CUDA = f"{PYTORCH}/cu126"
"""The last builds with kernels for GPUs before Turing, such as the P100."""
OLDEST_OF_NEW_CUDA = 7.5
REACHED_WITHIN = 10
"""Seconds."""


class Choice(NamedTuple):
    """Where torch is taken from, and why."""

    index: str | None
    """None: the one that pip is set up with."""
    reason: str


def compute_capabilities() -> list[float] | None:
    """Return the compute capability of every NVIDIA GPU; None without one. An empty list: there are, of unknown age."""
    if shutil.which("nvidia-smi") is None or _output("nvidia-smi", "-L") in (None, ""):
        return None

    answer = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
    return [float(number) for number in re.findall(r"^\d+\.\d+$", answer, re.MULTILINE)]


def _output(*command: str) -> str | None:
    """Return what a command prints; None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def choose(system: str, capabilities: list[float] | None) -> Choice:
    """Return which build a machine needs.

    Args:
        system: as `platform.system` names it.
        capabilities: see `compute_capabilities`.
    """
    if system not in ("Linux", "Windows"):
        return Choice(None, f"{system} has one build")
    if capabilities is None and system == "Linux":
        return Choice(f"{PYTORCH}/cpu", "no NVIDIA GPU: the build for the CPU, without gigabytes of CUDA")
    if capabilities is None:
        return Choice(None, "no NVIDIA GPU: the build for the CPU")

    if capabilities and min(capabilities) < OLDEST_OF_NEW_CUDA:
        return Choice(
            OLD_CUDA, f"a GPU of compute capability {min(capabilities)}: the build that still has its kernels"
        )
    if system == "Windows":
        return Choice(CUDA, "an NVIDIA GPU: the build for CUDA")
    return Choice(None, "an NVIDIA GPU: the build for CUDA")


def is_reachable(index: str) -> bool:
    """Return whether an index answers; pip itself would try for minutes."""
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=REACHED_WITHIN):
            return True
    except (OSError, ValueError):
        return False


def pinned() -> str:
    """Return the requirement in constraints.txt, such as `torch==2.13.0`."""
    return re.search(r"^torch==\S+", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)[0]


def is_installed(requirement: str) -> bool:
    """Return whether any build of this version is there; the build of somebody who chose it stays."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return version.partition("+")[0] == requirement.partition("==")[2]


def install(requirement: str, index: str | None) -> int:
    """Run pip; return its exit code."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
    if index is not None:
        command += ["--index-url", index]
    return subprocess.run(command).returncode


def main(arguments: list[str]) -> int:
    """The command; returns its exit code."""
    requirement = pinned()
    if arguments:
        return install(requirement, arguments[0])
    if is_installed(requirement):
        print(f"{requirement} is installed already")
        return 0

    choice = choose(platform.system(), compute_capabilities())
    print(f"{requirement}: {choice.reason}", flush=True)
    if choice.index is None:
        return install(requirement, None)

    if is_reachable(choice.index) and install(requirement, choice.index) == 0:
        return 0

    print(f"{choice.index} did not serve: {requirement} as the index that pip is set up with has it", flush=True)
    if choice.index == OLD_CUDA:
        print("It may lack kernels for this GPU; train.py and verify_fixes.py will say so.", flush=True)
    return install(requirement, None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
