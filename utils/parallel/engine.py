"""Engines: they take the optimizer steps of a module, which is whole in every process or sharded by FSDP2.

Where weights are sharded, accelerate wraps a twin: the module itself stays whole, on the CPU while the twin is
trained. So evaluation, export and checkpoints are those of any run, and a checkpoint does not tell whether the run was
sharded. The engine for DeepSpeed is in `deepspeed`.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .sharding import full, gather_nested, shard_like
from .wrapper import Shell


class Engine:
    """Weights, gradients and moments whole in every process: one process alone, or DDP.

    Attributes:
        module: what is evaluated and saved.
        twin: what is trained: here the module itself.
        model: the twin as accelerate wraps it; its forward is that of `Shell`.
        optimizer: as it was given to `wrap`.
    """

    sharded = False
    """A process holds but a part of what is trained. Then all must do the same things equally often."""

    def __init__(self, module: nn.Module, accelerator: Accelerator) -> None:
        self.module = module
        self.accelerator = accelerator
        self.twin = self._make_twin()

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the twin, and an optimizer of its parameters, to accelerate."""
        self.optimizer = optimizer
        self.model, self._stepper = self.accelerator.prepare(self._shell(), optimizer)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def wrap_again(self) -> None:
        """Wrap the twin anew: after a forward that raised, DDP still waits for its gradients."""
        self.model = None
        self.accelerator.free_memory()
        self.wrap(self.optimizer)

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager:
        """Return a context for micro-batches before the last: their gradients are exchanged with those of the last."""
        return self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's gradient, averaged over the processes by the end of the last micro-batch."""
        self.accelerator.backward(loss)

    def clip(self, largest: float) -> Tensor:
        """Scale the step's whole gradient down to a norm of `largest`, and return the norm it had (a scalar)."""
        return full(self.accelerator.clip_grad_norm_(self._parameters, largest))

    def update(self, is_bad: Tensor) -> bool:
        """Take the step and forget the gradient; return False if the scaler of fp16 left the step out.

        Args:
            is_bad: scalar, on the device: leave weights and moments untouched.
        """
        # A fused optimizer reads this attribute, which GradScaler sets otherwise: 1 leaves parameters, moments and
        # step count untouched. The host need not wait for the value, as it would to decide by `if`.
        if self.accelerator.scaler is None:
            self.optimizer.found_inf = is_bad.float()

        self._stepper.step()
        was_taken = not self._stepper.step_was_skipped
        self.forget()
        return was_taken

    def forget(self) -> None:
        """Drop the gradient."""
        self._stepper.zero_grad()

    # --- the whole module -------------------------------------------------------------------------------------------

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put the module on the device with its current weights, for the duration of the context."""
        self.gather()
        self.module.to(self.accelerator.device)
        yield

    def gather(self) -> None:
        """Copy the current weights into the module. Call it in every process."""

    def scatter(self) -> None:
        """Continue training from the module's weights. Call it in every process."""

    def moments(self) -> dict[str, Any]:
        """Return the state of an optimizer of the module's parameters, in the main process. Call it in every one."""
        return self.optimizer.state_dict()

    def load_moments(self, state: dict[str, Any]) -> None:
        """Load what `moments` returned, in an engine of this or another kind. Call it in every process."""
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Release everything, so that the accelerator can serve another run."""
        self.forget()

        # the learning rate's schedule still has a reference to the optimizer, and so to moments and weights
        self.optimizer.state.clear()
        self.optimizer.param_groups.clear()

        self.twin = None
        self.model = None
        self.optimizer = None
        self._stepper = None
        self._parameters = None
        self.accelerator.free_memory()

    def _make_twin(self) -> nn.Module:
        return self.module.to(self.accelerator.device)

    def _shell(self) -> Shell:
        return Shell(self.twin)


class FullySharded(Engine):
    """FSDP2: a part of every weight, gradient and moment in each process."""

    sharded = True

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        with super().evaluation():
            yield
        self.module.cpu()

    @torch.no_grad()
    def gather(self) -> None:
        module_parameters = dict(self.module.named_parameters())
        for name, parameter in self.twin.named_parameters():
            module_parameters[name].copy_(full(parameter))

    @torch.no_grad()
    def scatter(self) -> None:
        module_tensors = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        for name, tensor in [*self.twin.named_parameters(), *self.twin.named_buffers()]:
            tensor.copy_(shard_like(module_tensors[name], tensor))

    def moments(self) -> dict[str, Any]:
        return gather_nested(super().moments(), self.accelerator.is_main_process)

    def load_moments(self, state: dict[str, Any]) -> None:
        super().load_moments(state)

        # the optimizer took the moments whole, and its parameters are parts
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                is_moment = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_moment:  # else the step count
                    moments[name] = shard_like(value, parameter)

    def _make_twin(self) -> nn.Module:
        return copy.deepcopy(self.module.cpu())
