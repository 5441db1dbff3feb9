"""Tensors that are cut into a part for each process (FSDP2): put together, or cut in the same way."""

import os
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError


def check_launcher() -> None:
    """Refuse, before anything is built, what a launcher's variables ask for and this program cannot do right.

    Raises:
        UserError: the first version of FSDP.
    """
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    version = os.environ.get("FSDP_VERSION", "1")  # as accelerate reads it
    if is_fsdp and version != "2":
        raise UserError(
            f"accelerate was told to use FSDP in version {version}, expected 2: "
            "--fsdp_version 2, or --config_file configs/accelerate/fsdp2.yaml"
        )


def full(tensor: Tensor) -> Tensor:
    """Return a sharded tensor put together, any other as it is. Call it in every process."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


def shard_like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return a whole tensor, cut as another one of its shape is. Call it in every process."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def gather_nested(value: Any, keep: bool) -> Any:
    """Return nested containers with every sharded tensor put together, on the CPU. Call it in every process.

    Args:
        keep: False: None in place of tensors, in a process that only helps to put them together.
    """
    if isinstance(value, Tensor):
        tensor = full(value)
        return tensor.cpu() if keep else None

    if isinstance(value, dict):
        return {key: gather_nested(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [gather_nested(item, keep) for item in value]
    return value
