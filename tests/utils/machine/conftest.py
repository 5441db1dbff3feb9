"""A GPU that torch is made to see."""

import pytest
import torch

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
"""Architectures of torch's builds for CUDA 12.6."""


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that torch sees one GPU; returns a function that sets its properties."""

    def pretend(name: str, capability: tuple[int, int], arch_list: list[str] = CU126) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: arch_list)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # what a T4 says

    return pretend
