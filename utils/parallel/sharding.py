"""Tensors that are cut into a part for each process (FSDP2), and a frozen model whose layers are."""

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
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            f"accelerate was told to use FSDP in version {os.environ.get('FSDP_VERSION', '1')}, expected 2: "
            "--fsdp_version 2, or --config_file configs/accelerate/fsdp2.yaml"
        )


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, any other as it is. Call it in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor cut as another one of its shape is. Call it in every process."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def whole(value: Any, kept: bool) -> Any:
    """Nested containers with every sharded tensor put together, on the CPU. Call it in every process.

    Args:
        kept: False: None in place of tensors, in a process that only helps to put them together.
    """
    if isinstance(value, Tensor):
        together = full(value)
        return together.cpu() if kept else None
    if isinstance(value, dict):
        return {key: whole(item, kept) for key, item in value.items()}
    return [whole(item, kept) for item in value] if isinstance(value, list) else value
