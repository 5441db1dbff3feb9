"""Scenarios on a GPU, each in a process of its own; skipped, saying why, where a device can neither be had nor made."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Place, make_place
from tests.gpu.pretended import CannotBuild, build

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900
"""Seconds for a scenario, on a machine that does much else besides."""


@pytest.fixture(scope="session")
def gpu_kind() -> str:
    """`real` with GPU_TESTS=1, else `pretended`."""
    if os.environ.get("GPU_TESTS") == "1":
        import torch

        if not torch.cuda.is_available():
            pytest.fail("GPU_TESTS=1 asks for tests on a real GPU, and torch sees none")
        return "real"
    try:
        build()
    except CannotBuild as reason:
        pytest.skip(str(reason))
    return "pretended"


@pytest.fixture(scope="session")
def gpu_environment(gpu_kind, tmp_path_factory) -> dict[str, str]:
    """Variables of a scenario's process."""
    # DeepSpeed would look for CUDA's own libraries
    own = {"DS_ACCELERATOR": "cpu"} if gpu_kind == "pretended" else {}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own["CURRICULUM_DISTILLATION_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, **own, "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="session")
def start(gpu_environment) -> Callable[..., subprocess.Popen]:
    """Start a scenario: (name, variables=..., **arguments) -> its process."""

    def start(name: str, variables: dict[str, str] | None = None, **arguments: Any) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.gpu.scenarios", name, json.dumps(arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env={**gpu_environment, **(variables or {})}, **pipes)

    return start


def result_of(process: subprocess.Popen) -> Any:
    """Return what a scenario found, once it has ended."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="session")
def scenario(start) -> Callable[..., Any]:
    """Run a scenario: (name, **arguments) -> what it found."""
    return lambda name, **arguments: result_of(start(name, **arguments))


@pytest.fixture(scope="session")
def gpu_place(tmp_path_factory) -> Place:
    """A set-up whose models have grouped heads."""
    return make_place(tmp_path_factory.mktemp("place"), key_value_heads=1, dropout=0.0)
