"""What survives from one session of a run to the next: all that a step depends on, as a checkpoint holds it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..errors import UserError
from ..parallel.engine import Engine
from ..seeding import rng_state, set_rng_state
from .checkpoints import Checkpoint
from .early_stopping import EarlyStopping
from .measurements import Clock
from .plan import Plan
from .red_flags import RedFlags
from .step_guard import StepGuard


@dataclass
class RunState:
    """The parts of a run that change while it runs, and how many optimizer steps it has done."""

    engine: Engine
    """Has the weights and moments."""
    scheduler: Any
    scaler: torch.amp.GradScaler | None
    plan: Plan
    early: EarlyStopping
    guard: StepGuard
    flags: RedFlags | None
    clock: Clock
    step: int = 0

    def parts(self) -> dict[str, Any]:
        """What `CheckpointStore.save` takes: tensors, objects for `torch.save`, and plain values.

        Call it in every process: the random generators of each are in it.
        """
        self.engine.gather()
        objects = {
            "optimizer": self.engine.moments(),
            "scheduler": self.scheduler.state_dict(),
            "rng": gather_object([rng_state()]),
        }
        if self.scaler is not None:
            objects["scaler"] = self.scaler.state_dict()
        state = {
            "step": self.step,
            "plan": self.plan.identity(),
            "seconds": self.clock.total(),
            "early_stopping": asdict(self.early),
            "guard": self.guard.state_dict(),
            "flags": None if self.flags is None else self.flags.state_dict(),
        }
        return {"tensors": {"module": learned(self.engine.module)}, "objects": objects, "state": state}

    def load(self, saved: Checkpoint, path: Path) -> None:
        """Make everything as it was when `parts` was saved. `path` is for messages.

        Raises:
            UserError: that run is cut into other optimizer steps.
        """
        state = saved.state
        plan, here = state["plan"], self.plan.identity()
        if differing := [key for key in here if plan.get(key) != here[key]]:
            lines = "".join(f"  - {key}: {plan.get(key)} -> {here[key]}\n" for key in differing)
            raise UserError(
                f"{path} was written by a run that is cut into other optimizer steps (checkpoint -> now):\n{lines}"
                "Expected the same text, epochs or max_steps, and batch_size x gradient_accumulation_steps x "
                "processes. Put them back to continue it, or start a new run in another --output-dir."
            )
        self.load_weights(saved)
        self.engine.scatter()
        self.engine.load_moments(saved.objects["optimizer"])
        self.scheduler.load_state_dict(saved.objects["scheduler"])
        if self.scaler is not None and "scaler" in saved.objects:
            self.scaler.load_state_dict(saved.objects["scaler"])
        generators = saved.objects["rng"]
        set_rng_state(generators[PartialState().process_index % len(generators)])
        self.step = state["step"]
        kept = state["early_stopping"]
        self.early.best, self.early.best_step, self.early.waited = kept["best"], kept["best_step"], kept["waited"]
        self.guard.load_state_dict(state["guard"])
        if self.flags is not None and state["flags"] is not None:
            self.flags.load_state_dict(state["flags"])
        self.clock.before = state["seconds"]

    def load_weights(self, saved: Checkpoint) -> None:
        """Give the module, and not yet the engine, the weights of a checkpoint."""
        tensors = saved.tensors["module"]
        module = self.engine.module
        if differing := sorted(tensors.keys() ^ learned(module).keys()):
            raise RuntimeError(f"the checkpoint holds other tensors than are trained here, such as {differing[0]}")
        module.load_state_dict(tensors, strict=False)


def learned(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module without its frozen parameters: a run has them from where it had them at its start."""
    kept = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    kept |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name in kept}
