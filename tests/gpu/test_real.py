"""The tests' access to a real GPU, checked where there is none: torch's own peculiarities are pretended."""

import warnings

import torch

from tests.gpu.real import RealDevice

NOTICE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"


def test_a_peak_can_be_forgotten_before_torch_has_used_the_gpu(monkeypatch):
    def raises(index):
        raise RuntimeError(f"Invalid device argument {index}: did you call init?")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", raises)
    RealDevice().reset_peak(0)


def test_only_waits_are_counted_and_not_the_notice_of_the_watch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(NOTICE, stacklevel=2))
    with RealDevice().watched() as waits:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert [why for why, _ in waits] == ["called a synchronizing CUDA operation"]
