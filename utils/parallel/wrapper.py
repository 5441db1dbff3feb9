"""The module that accelerate wraps in place of the trained one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class Shell(nn.Module):
    """Stand-in for the trained module, which accelerate and DDP wrap, so that the module itself stays as it is.

    DDP looks for tensors in what a forward returns and expects a gradient for every parameter they depend on.
    It must see the loss and nothing else: a term that was only measured depends on parameters that get none.

    Args:
        autocast: precision the module computes in, where accelerate does not see to it.
    """

    def __init__(self, module: nn.Module, autocast: Callable[[], AbstractContextManager] = nullcontext) -> None:
        super().__init__()
        self.module = module
        self.autocast = autocast
        self._no_split_modules = _layer_classes(module)

    def forward(self, batch: Any, step: int, **options: Any) -> tuple[Tensor, SimpleNamespace]:
        """Return the loss, and everything else hidden in an object that DDP does not look into."""
        with self.autocast():
            # Not by its __call__: hooks of ZeRO-3 there do not understand its output. So weights that it reads outside
            # of their modules, as the fused head does, count as the shell's, whose loss they understand.
            output = self.module.forward(batch, step, **options)
        return output.loss, SimpleNamespace(output=output)


def _layer_classes(module: nn.Module) -> list[str]:
    """Return the class names of transformers' layers in a module: accelerate shards each layer apart."""
    classes = set()
    declared: set[str] = set()
    for part in module.modules():
        classes.add(type(part).__name__)
        declared.update(getattr(part, "_no_split_modules", None) or ())

    # a model also declares layers that it could have and does not, which accelerate would look for in vain
    return sorted(classes & declared)
