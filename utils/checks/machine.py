"""Checks of the machine: versions, kernels, precision."""

import platform
from typing import Any

import torch

from ..machine import hardware
from ..machine import kernels as gpu_kernels
from ..machine import packages as environment
from .checklist import check

SHOWN = ("torch", "transformers", "accelerate", "datasets")
"""Packages whose versions are printed."""


@check("Python and packages", "install the project's requirements: pip install -c constraints.txt -e .")
def versions() -> tuple:
    packages, wanted = environment.installed_packages(), environment.own_requirements()
    unmet = [str(conflict) for conflict in environment.find_conflicts(wanted, packages) if not conflict.package]
    found = {package.name.lower(): package.version for package in packages}
    value = "; ".join(unmet) or ", ".join(f"{name} {found[name]}" for name in SHOWN)
    floors = ", ".join(demand for demand in wanted if demand.startswith(SHOWN))
    allowed = f"Python {environment.supported_python()}, {floors}"
    return f"Python {platform.python_version()}, {value}", allowed, environment.python_is_supported() and not unmet


@check("package conflicts", "install the versions that are wanted, or use a fresh virtual environment")
def conflicts() -> tuple:
    found = environment.find_conflicts(environment.own_requirements(), environment.installed_packages())
    harmful, harmless = ([c for c in found if c.harmful is harm] for harm in (True, False))
    value = "; ".join(map(str, harmful)) or "none that matters to training"
    if harmless:
        more = f" and {len(harmless) - 4} more" if len(harmless) > 4 else ""
        value += f"; harmless, training does not load who wants it: {'; '.join(map(str, harmless[:4]))}{more}"
    return value, "no harmful one", not harmful


@check("device and kernels", "hide the GPU with CUDA_VISIBLE_DEVICES= to run on the CPU")
def kernels() -> tuple:
    remedy, device = gpu_kernels.check_kernels(), hardware.choose_device()
    return f"{device.value}: {device.reason}", "a first matrix product succeeds", remedy is None, remedy or ""


@check("precision", "set --mixed-precision no and report the device")
def precision(config: Any) -> tuple:
    device = hardware.choose_device().value
    choice = hardware.choose_precision(config.training.mixed_precision, device)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[choice.value]
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    off = ((a.to(device, dtype) @ b.to(device, dtype)).cpu().float() - a @ b).norm() / (a @ b).norm()
    return f"{choice.value} ({choice.reason}); a product is off by {off:.1e}", "below 1e-2", off < 1e-2
