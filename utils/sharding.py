"""Weights and moments spread over processes (FSDP2), beside the whole module that is evaluated and saved.

What accelerate shards is a twin: the module itself stays whole, on the CPU while the twin is trained. So evaluation,
export and checkpoints are those of any run, and a checkpoint does not tell whether the run was sharded.
"""

import copy
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import UserError


def check_launcher() -> None:
    """Refuse, before anything is built, what a launcher's variables ask for and this program cannot do right.

    Raises:
        UserError: DeepSpeed, or the first version of FSDP.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "accelerate was told to use DeepSpeed, which takes over the optimizer step and the checkpoints of this "
            "program. FSDP2 shards the same (with fsdp_reshard_after_forward as ZeRO-3, without it as ZeRO-2): "
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml train.py ..."
        )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            f"accelerate was told to use FSDP in version {os.environ.get('FSDP_VERSION', '1')}, expected 2: "
            "--fsdp_version 2, or --config_file configs/accelerate/fsdp2.yaml"
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate spreads weights over the processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def twin_of(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """What to hand to accelerate: the module, or its twin where it is going to be sharded."""
    return copy.deepcopy(module.cpu()) if is_sharded(accelerator) else module


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, any other as it is. Call it in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """Nested containers with every sharded tensor put together, on the CPU. Call it in every process."""
    if isinstance(value, Tensor):
        return full(value).cpu()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


@torch.no_grad()
def gather(twin: nn.Module, module: nn.Module) -> None:
    """Give the module the weights of its twin. Call it in every process."""
    if twin is not module:
        own = dict(module.named_parameters())
        for name, parameter in twin.named_parameters():
            own[name].copy_(full(parameter))


@torch.no_grad()
def scatter(module: nn.Module, twin: nn.Module) -> None:
    """Give the twin the weights and buffers of the module. Call it in every process."""
    if twin is not module:
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
            tensor.copy_(_like(own[name], tensor))


def scatter_state(optimizer: torch.optim.Optimizer) -> None:
    """Spread the moments that were just loaded as their parameters are."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = _like(value, parameter)


@contextmanager
def on_device(module: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """The whole module on the device for a while."""
    module.to(accelerator.device)
    yield
    if is_sharded(accelerator):
        module.cpu()


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
    lead, kind = model.base_model, type(model.base_model)
    fully_shard(lead, mesh=mesh, ignored_params=outside)  # the layers share its streams: the next one comes meanwhile
    lead.__class__ = kind  # transformers finds by the class what hidden states are; FSDP needs its hooks alone here
    model.to(accelerator.device)
    model._is_fsdp_managed_module = True  # transformers generates with it in step with the other processes


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
