"""Several processes and GPUs: the accelerator, and the engines that take a step on whole or sharded weights.

- `accelerator`: accelerate's object as the loop needs it, and the engine that belongs to it.
- `engine`: the steps of a module that is whole in every process, or sharded by FSDP2.
- `deepspeed`: the settings and the engine for ZeRO-2 and ZeRO-3.
- `wrapper`: the module that accelerate wraps in place of the trained one.
- `sharding`: sharded tensors, put together or cut.
- `processes`: who goes first, and how a failure in one process ends all.
"""

from .accelerator import build_accelerator, engine_kind, temporary_accelerator
from .engine import Engine
from .processes import main_process_first, on_main_process

__all__ = [
    "Engine",
    "build_accelerator",
    "engine_kind",
    "main_process_first",
    "on_main_process",
    "temporary_accelerator",
]
