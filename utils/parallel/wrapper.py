"""What accelerate wraps."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class Shell(nn.Module):
    """What accelerate and DDP wrap instead of the module, which so stays as it is.

    DDP looks for tensors in what a forward returns and expects a gradient for every parameter they depend on.
    It must see the loss and nothing else: a term that was only measured depends on parameters that get none.

    Args:
        autocast: what the module computes in, where accelerate does not see to it.
    """

    def __init__(self, module: nn.Module, autocast: Callable[[], AbstractContextManager] = nullcontext) -> None:
        super().__init__()
        self.module, self.autocast = module, autocast
        kinds = {type(part).__name__ for part in module.modules()}
        named = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
        self._no_split_modules = sorted(kinds & named)  # what accelerate shards apart: transformers' layers

    def forward(self, batch: Any, step: int, **options: Any) -> tuple[Tensor, SimpleNamespace]:
        with self.autocast():
            # not by its __call__: hooks of ZeRO-3 there do not understand its output. So weights that it reads outside
            # of their modules, as the fused head does, count as the shell's, whose loss they understand
            output = self.module.forward(batch, step, **options)
        return output.loss, SimpleNamespace(output=output)
