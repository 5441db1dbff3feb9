"""What accelerate wraps."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class Shell(nn.Module):
    """What accelerate and DDP wrap instead of the module, which so stays as it is.

    DDP looks for tensors in what a forward returns and expects a gradient for every parameter they depend on.
    It must see the loss and nothing else: a term that was only measured depends on parameters that get none.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        kinds = {type(part).__name__ for part in module.modules()}
        named = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
        self._no_split_modules = sorted(kinds & named)  # what accelerate shards apart: transformers' layers

    def forward(self, batch: Any, step: int, **options: Any) -> tuple[Tensor, SimpleNamespace]:
        output = self.module(batch, step, **options)
        return output.loss, SimpleNamespace(output=output)
