"""The machine: devices, their memory, kernels, installed packages, and the signals it sends.

- `hardware`: what this machine has, and the device, precision and backends that are chosen for it, with reasons.
- `device_memory`: memory that runs out: how it is recognised, given back, and work in parts that fit.
- `kernels`: check that this build of PyTorch can compute on the GPUs.
- `jupyter`: the kernel of a notebook, recognised.
- `launcher`: the number of a process among several, and its end.
- `packages`: packages that are missing or too old, and their installation in a notebook.
- `torch_build`: facts about the installed torch that need not load it.
- `stop_signals`: signals and the time limit that end a run at the next step, with a checkpoint.

Only `packages` and `stop_signals` are imported here. `packages` installs what is missing, so it must load where torch,
accelerate or psutil cannot be imported yet; import from the others by their own names.
"""

from .packages import find_conflicts, install_missing, installed_packages, own_requirements, require
from .stop_signals import STOP_REASONS, STOP_SIGNALS, Interrupted, StopSignal, ignore_stop_signals, stop_signals_delayed

__all__ = [
    "STOP_REASONS",
    "STOP_SIGNALS",
    "Interrupted",
    "StopSignal",
    "find_conflicts",
    "ignore_stop_signals",
    "install_missing",
    "installed_packages",
    "own_requirements",
    "require",
    "stop_signals_delayed",
]
