"""Choices follow from what the hardware has, and each says why."""

import json
import os

import pytest
import torch

from utils.errors import UserError
from utils.machine import hardware
from utils.machine.hardware import (
    choose_device,
    choose_precision,
    choose_teacher_device,
    configure_backends,
    describe,
    peak_memory_mb,
    spare_gpu,
    unused_gpus,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "capability", "requested", "expected", "reason"),
    [
        ("Tesla P100", (6, 0), "auto", "fp16", "saves memory there, not time"),
        ("Tesla T4", (7, 5), "auto", "fp16", "tensor cores"),
        ("A100", (8, 0), "auto", "bf16", "has bf16"),
        ("RTX 4090", (8, 9), "auto", "bf16", "8.9"),
        ("Tesla T4", (7, 5), "bf16", "fp16", "bf16 was asked for, but Tesla T4 (compute capability 7.5) lacks it"),
        ("RTX 4090", (8, 9), "fp16", "fp16", "asked for"),
        ("RTX 4090", (8, 9), "no", "no", "asked for"),
        ("GTX 980", (5, 2), "auto", "no", "neither"),
    ],
)
def test_precision_follows_the_compute_capability(gpu, name, capability, requested, expected, reason):
    gpu(name, capability)
    choice = choose_precision(requested, GPU)
    assert choice.value == expected and reason in choice.reason


@pytest.mark.parametrize(
    ("capabilities", "requested", "expected", "reason"),
    [
        ({"avx2": True, "avx512_bf16": False}, "auto", "no", "no instructions for bf16"),
        ({"avx512_bf16": True}, "auto", "bf16", "AVX512_BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "auto", "bf16", "this CPU has AMX"),
        ({"avx512_bf16": True}, "no", "no", "asked for"),
        ({"avx512_bf16": True}, "fp16", "no", "fp16 was asked for, but on cpu training is in float32 only"),
        ({}, "bf16", "bf16", "asked for; this CPU has no instructions for it"),
        ({"avx512_bf16": True}, "bf16", "bf16", "asked for; this CPU has AVX512_BF16"),
    ],
)
def test_a_cpu_trains_in_bf16_where_it_has_instructions_for_it(cpu, capabilities, requested, expected, reason):
    cpu(**capabilities)
    choice = choose_precision(requested, CPU)
    assert choice.value == expected and reason in choice.reason


def test_a_torch_that_tells_nothing_of_the_cpu_trains_in_float32(cpu, monkeypatch):
    cpu(amx_bf16=True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert choose_precision("auto", CPU).value == "no"


def test_the_device_agrees_with_accelerate_and_has_a_reason():
    from accelerate import PartialState

    choice = choose_device()
    assert choice.value.type == PartialState().device.type and choice.reason


@pytest.mark.parametrize(("count", "processes", "used", "said"), [(2, 1, 1, "1 of 2"), (2, 2, 1, ""), (2, 1, 2, "")])
def test_a_plain_start_tells_what_it_leaves_unused_and_the_command_that_uses_it(
    gpu, monkeypatch, count, processes, used, said
):
    gpu("Tesla T4", (7, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    told = unused_gpus(processes, used) or ""
    assert said in told and bool(told) == bool(said) == ("--num_processes 2" in told)


def test_the_teacher_computes_where_it_is_told_to_and_no_gpu_serves_two_processes(gpu, monkeypatch):
    gpu("Tesla T4", (7, 5))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_teacher_device("auto", GPU, 2).value == GPU
    assert choose_teacher_device("cuda:1", GPU, 1).value == torch.device("cuda", 1)
    assert choose_teacher_device("cpu", GPU, 2).value == CPU
    with pytest.raises(
        UserError, match=r"cuda:2: there is no such device.* auto, spread, sharded, cpu, cuda:0, cuda:1"
    ):
        choose_teacher_device("cuda:2", GPU, 1)
    with pytest.raises(UserError, match="each of the 2 processes"):
        choose_teacher_device("cuda:1", GPU, 2)


@pytest.mark.parametrize(
    ("student", "processes", "free", "expected"),
    [
        (GPU, 1, [14, 15], "cuda:1"),
        (GPU, 1, [14, 9, 15], "cuda:2"),
        (torch.device("cuda", 1), 1, [14, 15], "cuda:0"),
        (GPU, 1, [14, 6], None),  # it drives a screen, or is busy
        (GPU, 1, [14], None),
        (GPU, 2, [14, 15], None),  # each process has one
        (CPU, 1, [14, 15], None),
    ],
)
def test_a_second_gpu_with_room_is_the_teachers(monkeypatch, student, processes, free, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index] * 2**30, 16 * 2**30))
    spare = spare_gpu(student, processes)
    assert (None if spare is None else str(spare.value)) == expected
    assert spare is None or str(student) in spare.reason


def test_tf32_is_set_by_an_interface_that_leaves_all_getters_readable(gpu):
    before = torch.get_float32_matmul_precision()
    try:
        assert configure_backends(CPU) == []
        gpu("Tesla T4", (7, 5))
        configure_backends(GPU)
        assert torch.get_float32_matmul_precision() == before
        gpu("A100", (8, 0))
        assert any("TF32" in line for line in configure_backends(GPU))
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_description_is_plain_and_names_versions_and_sizes():
    description = json.loads(json.dumps(describe()))
    assert description["packages"]["torch"] == torch.__version__ and description["cores"] >= 1
    assert description["ram_gib"] > 0 and isinstance(description["gpus"], list)


def test_peak_memory_on_a_cpu_is_that_of_the_process():
    before = peak_memory_mb(CPU)
    block = torch.ones(2**26)  # 256 MiB
    assert before > 50 and peak_memory_mb(CPU) >= max(before, block.nbytes / 2**20)


@pytest.fixture
def no_allocator_settings(monkeypatch):
    """Also afterwards: what is set here would bind every test that follows."""
    for name in hardware.ALLOCATOR_SETTINGS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_allocator_settings")
def test_the_allocator_grows_its_blocks_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    assert "expandable" in hardware.configure_allocator()
    assert {os.environ[name] for name in hardware.ALLOCATOR_SETTINGS} == {"expandable_segments:True"}
    for name in hardware.ALLOCATOR_SETTINGS:
        for other in hardware.ALLOCATOR_SETTINGS:
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, "max_split_size_mb:128")
        assert hardware.configure_allocator() is None
        assert os.environ[name] == "max_split_size_mb:128"


@pytest.mark.usefixtures("no_allocator_settings")
@pytest.mark.parametrize("is_started", [False, True])
def test_an_allocator_that_has_read_its_variables_is_told_itself(monkeypatch, is_started):
    """bitsandbytes starts CUDA when it is imported, before a run begins."""
    settings = []
    monkeypatch.setattr(hardware.sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_started)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    hardware.configure_allocator()
    assert settings == ["expandable_segments:True"] * is_started


@pytest.mark.usefixtures("no_allocator_settings")
def test_other_systems_have_no_such_blocks(monkeypatch):
    monkeypatch.setattr(hardware.sys, "platform", "win32")
    assert hardware.configure_allocator() is None
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


def test_on_a_gpu_what_torch_reserved_is_told_beside_what_it_gave_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**20)
    assert hardware.memory_use(torch.device("cuda:0")) == {"peak_memory_mb": 3.0, "reserved_memory_mb": 5.0}
    assert set(hardware.memory_use(CPU)) == {"peak_memory_mb"}
