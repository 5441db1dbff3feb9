"""Checks of the machine: versions of packages, kernels of the device, precision."""

import platform
from typing import NamedTuple

import torch

from ..config.protocols import RunConfig
from ..machine import hardware, packages
from ..machine import kernels as gpu_kernels
from .checklist import Measured

SHOWN = ("torch", "transformers", "accelerate", "datasets")
"""Packages whose versions are printed."""

MOST_HARMLESS = 4
"""Conflicts printed of those that do not matter to training."""


def versions() -> Measured:
    """Compare Python and the installed packages with what the project requires."""
    installed = packages.installed_packages()
    requirements = packages.own_requirements()
    # A conflict without a package is a requirement of the project itself.
    conflicts = packages.find_conflicts(requirements, installed)
    unmet = [str(conflict) for conflict in conflicts if not conflict.package]

    version_of = {package.name.lower(): package.version for package in installed}
    value = "; ".join(unmet) or ", ".join(f"{name} {version_of[name]}" for name in SHOWN)
    floors = ", ".join(requirement for requirement in requirements if requirement.startswith(SHOWN))
    return Measured(
        f"Python {platform.python_version()}, {value}",
        f"Python {packages.supported_python()}, {floors}",
        passed=packages.python_is_supported() and not unmet,
    )


def conflicts() -> Measured:
    """Look for installed packages whose requirements are not met; only those that training loads fail the check."""
    every = packages.find_conflicts(packages.own_requirements(), packages.installed_packages())
    harmful = [str(conflict) for conflict in every if conflict.harmful]
    harmless = [str(conflict) for conflict in every if not conflict.harmful]

    # Hosted notebooks come with many packages that training never loads, so these are a note only.
    value = "; ".join(harmful) or "none that matters to training"
    if harmless:
        rest = len(harmless) - MOST_HARMLESS
        more = f" and {rest} more" if rest > 0 else ""
        shown = "; ".join(harmless[:MOST_HARMLESS])
        value += f"; harmless, training does not load who wants it: {shown}{more}"
    return Measured(value, "no harmful one", passed=not harmful)


def kernels() -> Measured:
    """Compute a first matrix product on the device; the remedy for a failure depends on the GPU."""
    remedy = gpu_kernels.check_kernels()
    device = hardware.choose_device()
    return Measured(
        f"{device.value}: {device.reason}",
        "a first matrix product succeeds",
        passed=remedy is None,
        hint=remedy or "",
    )


class ProductError(NamedTuple):
    choice: hardware.Choice[hardware.Precision]
    """The precision of the run, and why."""
    error: float
    """Relative error of a matrix product in that precision."""


def precision(config: RunConfig) -> ProductError:
    """Compare a matrix product on the device, in the precision of the run, with that of the CPU in float32."""
    device = hardware.choose_device().value
    choice = hardware.choose_precision(config.training.mixed_precision, device)
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[choice.value]

    # A generator of its own, so that what later checks draw does not depend on this one.
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a @ b
    product = a.to(device, dtype) @ b.to(device, dtype)
    difference = product.cpu().float() - exact
    return ProductError(choice, (difference.norm() / exact.norm()).item())
