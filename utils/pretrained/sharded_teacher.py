"""A frozen teacher whose layers are divided among the processes."""

import inspect

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..errors import UserError
from .families import body


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
