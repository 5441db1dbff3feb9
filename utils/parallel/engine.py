"""What takes the steps of a module: it whole in every process (alone, or DDP), or a twin that FSDP2 shards.

Where weights are sharded, what accelerate wraps is a twin: the module itself stays whole, on the CPU while the twin is
trained. So evaluation, export and checkpoints are those of any run, and a checkpoint does not tell whether the run was
sharded. DeepSpeed: `zero`.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from .sharding import full, like, whole
from .wrapper import Shell


class Engine:
    """Weights, gradients and moments whole in every process.

    Attributes:
        module: what is evaluated and saved.
        twin: what is trained: the module.
        model: the twin as accelerate wraps it; its forward is that of `Shell`.
        optimizer: as it was given to `wrap`.
    """

    sharded = False
    """Whether a process holds but a part of what is trained. Then all must do the same things equally often."""

    def __init__(self, module: nn.Module, accelerator: Accelerator) -> None:
        self.module, self.accelerator = module, accelerator
        self.twin = self._make_twin()

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the twin, and an optimizer of its parameters, to accelerate."""
        self.optimizer = optimizer
        self.model, self._stepper = self.accelerator.prepare(self._shell(), optimizer)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def wrap_again(self) -> None:
        """After a forward that DDP waits for and that did not come to its end."""
        self.model = None
        self.accelerator.free_memory()
        self.wrap(self.optimizer)

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager:
        """For micro-batches before the last: their gradients are exchanged with those of the last."""
        return self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's gradient, averaged over the processes by the end of the last micro-batch."""
        self.accelerator.backward(loss)

    def clip(self, largest: float) -> Tensor:
        """The norm of the step's whole gradient, which is shortened to `largest`."""
        return full(self.accelerator.clip_grad_norm_(self._parameters, largest))

    def update(self, is_bad: Tensor) -> bool:
        """Take the step and forget the gradient; False: the scaler of fp16 left it out.

        Args:
            is_bad: scalar, on the device: leave weights and moments untouched.
        """
        if self.accelerator.scaler is None:
            # what GradScaler tells a fused optimizer: 1 leaves parameters, moments and step count untouched
            self.optimizer.found_inf = is_bad.float()
        self._stepper.step()
        taken = not self._stepper.step_was_skipped
        self.forget()
        return taken

    def forget(self) -> None:
        """Drop the gradient."""
        self._stepper.zero_grad()

    # --- the whole module -------------------------------------------------------------------------------------------

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The module on the device, with the weights of now."""
        self.gather()
        self.module.to(self.accelerator.device)
        yield

    def gather(self) -> None:
        """Give the module the weights as they are now. Call it in every process."""

    def scatter(self) -> None:
        """Train on from the module's weights. Call it in every process."""

    def moments(self) -> dict[str, Any]:
        """The state of an optimizer of the module's parameters, in the main process. Call it in every process."""
        return self.optimizer.state_dict()

    def load_moments(self, state: dict[str, Any]) -> None:
        """Take up what `moments` returned, in an engine of this or another kind. Call it in every process."""
        self.optimizer.load_state_dict(state)

    def close(self) -> None:
        """Let go of everything, so that the accelerator can serve another run."""
        self.forget()
        self.optimizer.state.clear()  # its schedule still knows it
        self.optimizer.param_groups.clear()
        self.twin = self.model = self.optimizer = self._stepper = self._parameters = None
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
        own = dict(self.module.named_parameters())
        for name, parameter in self.twin.named_parameters():
            own[name].copy_(full(parameter))

    @torch.no_grad()
    def scatter(self) -> None:
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for name, tensor in [*self.twin.named_parameters(), *self.twin.named_buffers()]:
            tensor.copy_(like(own[name], tensor))

    def moments(self) -> dict[str, Any]:
        return whole(super().moments(), self.accelerator.is_main_process)

    def load_moments(self, state: dict[str, Any]) -> None:
        super().load_moments(state)
        for parameter, moments in self.optimizer.state.items():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    moments[name] = like(value, parameter)

    def _make_twin(self) -> nn.Module:
        return copy.deepcopy(self.module.cpu())
