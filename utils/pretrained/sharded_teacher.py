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
    layers = _layers(model)
    outside = _parameters_outside(layers, model)

    # Layers first: what a module's parts have sharded already, fully_shard leaves to them.
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)

    # The body around them too: its layers then share streams, and fetch the next one while one computes.
    lead = body(model)
    original_class = type(lead)
    fully_shard(lead, mesh=mesh, ignored_params=outside)
    # transformers recognises by the class which outputs are hidden states; of FSDP only the hooks are needed on it.
    lead.__class__ = original_class

    model.to(accelerator.device)
    model._is_fsdp_managed_module = True  # transformers generates with it in step with the other processes


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers model.

    Raises:
        UserError: transformers does not say what a layer is.
    """
    class_names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in class_names]
    if not layers:
        raise UserError(f"teacher.device sharded: transformers does not tell the layers of a {type(model).__name__}")
    return layers


def _parameters_outside(layers: list[nn.Module], model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of a model that none of its layers has."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {parameter for parameter in model.parameters() if id(parameter) not in inside}
