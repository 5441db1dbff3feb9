"""A build of torch without kernels for the GPU is noticed before training, with what to install."""

import subprocess

import pytest
import torch

from utils.machine import kernels
from utils.machine.kernels import check_kernels, covers, remedy

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        (CU126, (6, 0), True),
        (CU126, (6, 1), True),
        (CU126, (8, 9), True),
        (CU128, (6, 0), False),
        (CU128, (12, 0), True),
        (CU126, (10, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        ([], (9, 0), False),
        (["gfx90a"], (9, 0), False),
    ],
)
def test_kernels_cover_a_gpu_of_the_same_major_version_or_by_ptx(arch_list, capability, expected):
    assert covers(arch_list, capability) is expected


def test_a_p100_under_a_build_without_its_kernels_is_told_what_to_install(gpu, monkeypatch):
    gpu("Tesla P100-PCIE-16GB", (6, 0), CU128)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("no process is needed to know"))
    problem = check_kernels()
    assert "sm_60" in problem and "sm_70 sm_75" in problem
    assert "https://download.pytorch.org/whl/cu126" in problem and "<2.15" in problem
    assert "cu128" in remedy("B200", (10, 0), CU126) and "CUDA_VISIBLE_DEVICES=" in remedy("K80", (3, 7), CU126)


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        ("", None),
        ("x\nRuntimeError: CUDA error: no kernel image is available for execution on the device\nCompile", "cu128"),
        ("torch.OutOfMemoryError: CUDA out of memory\n", "failed at a first matrix product"),
    ],
)
def test_a_kernel_is_launched_in_another_process_and_its_failure_reported(gpu, monkeypatch, stderr, expected):
    gpu("RTX 4090", (8, 9))
    commands = []

    def fake_run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1 if stderr else 0, "", stderr)

    monkeypatch.setattr(subprocess, "run", fake_run)
    problem = check_kernels()
    assert len(commands) == 1 and "cuda:0" in commands[0][-1]
    assert problem is None if expected is None else expected in problem


@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch succeeds on a GPU")
def test_without_a_gpu_nothing_is_launched_and_a_launch_would_fail(gpu):
    assert check_kernels() is None
    gpu("RTX 4090", (8, 9))
    assert "Error" in check_kernels()


def test_a_launch_that_hangs_is_reported(gpu, monkeypatch):
    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    gpu("RTX 4090", (8, 9))
    monkeypatch.setattr(subprocess, "run", hang)
    assert check_kernels(5.0).endswith("failed at a first matrix product: no answer within 5 s")


def test_a_failure_whose_last_line_is_blank_is_still_a_failure(monkeypatch):
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="a warning\nkilled\n \n")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: failed)
    assert kernels._launch(0, timeout=1.0) == "killed"
