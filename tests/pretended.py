"""Machines that are not there, as far as choices look at them: which device, what it can compute in, how many."""

from types import SimpleNamespace

import pytest
import torch

DEVICES: dict[str, tuple[str, tuple[int, int], int, int]] = {
    "P100": ("Tesla P100-PCIE-16GB", (6, 0), 1, 16),
    "T4": ("Tesla T4", (7, 5), 1, 16),
    "T4 x2": ("Tesla T4", (7, 5), 2, 16),
    "A10": ("NVIDIA A10", (8, 6), 1, 24),
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 1, 80),
}
"""Name, compute capability, how many of them, GB of each."""
MACHINES = ("cpu", *DEVICES)


def pretend(patch: pytest.MonkeyPatch, machine: str) -> None:
    """Let torch say that it is on one of `MACHINES`; nothing can be computed on a GPU that is not there."""
    if machine == "cpu":
        patch.setattr(torch.cuda, "is_available", lambda: False)
        return

    name, capability, count, size = DEVICES[machine]
    properties = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        total_memory=int(size * 1e9),
    )
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    patch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    patch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
