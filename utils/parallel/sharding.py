"""Tensors that are cut into a part for each process (FSDP2), and a frozen model whose layers are."""

import inspect
import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from ..pretrained.families import body


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


def shard_layers(model: nn.Module, accelerator: Accelerator) -> None:
    """Cut every layer of a frozen transformers model on the CPU into a part for each process, on its device.

    A layer is whole only while it computes, so every process must run the model equally often. Embedding, last norm and
    head stay whole: the head may be called by itself, and so often as each process needs.

    Raises:
        UserError: transformers does not say what a layer is, or this torch cannot leave parts of a model whole.
    """
    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(f"teacher.device sharded: got torch {torch.__version__}, expected 2.7 or newer")
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    if not layers:
        raise UserError(f"teacher.device sharded: transformers does not tell the layers of a {type(model).__name__}")
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = {parameter for parameter in model.parameters() if id(parameter) not in inside}
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    lead = body(model)
    kind = type(lead)
    fully_shard(lead, mesh=mesh, ignored_params=outside)  # the layers share its streams: the next one comes meanwhile
    lead.__class__ = kind  # transformers finds by the class what hidden states are; FSDP needs its hooks alone here
    model.to(accelerator.device)
    model._is_fsdp_managed_module = True  # transformers generates with it in step with the other processes
