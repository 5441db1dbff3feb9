"""The state of a run: all that a step depends on, written to a checkpoint and taken up again in the next session."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..errors import UserError
from ..on_policy.rounds import Rounds
from ..parallel.engine import Engine
from ..seeding import rng_state, set_rng_state
from .checkpoints import Checkpoint
from .early_stopping import EarlyStopping
from .measurements import Clock, IntervalMeans
from .plan import Plan
from .red_flags import RedFlags
from .step_guard import StepGuard
from .step_statistics import StepStatistics


@dataclass(frozen=True)
class StateParts:
    """The state of a run as `CheckpointStore.save` takes it."""

    tensors: dict[str, dict[str, Tensor]]
    """By group."""
    objects: dict[str, Any]
    """Plain containers by name, for `torch.save`."""
    state: dict[str, Any]
    """JSON values."""


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
    means: IntervalMeans
    statistics: StepStatistics
    rounds: Rounds | None = None
    step: int = 0
    awaits_evaluation: bool = False
    """The evaluation that is due at this step was cut short."""

    def parts(self) -> StateParts:
        """Return the state as a checkpoint holds it.

        Call it in every process: the random generators of each are in it.
        """
        # Weights may be spread over the processes.
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
            "awaits_evaluation": self.awaits_evaluation,
            "early_stopping": asdict(self.early),
            "guard": self.guard.state_dict(),
            "means": self.means.state_dict(),
            "flags": None if self.flags is None else self.flags.state_dict(),
        }
        if self.statistics.is_used:
            state["statistics"] = self.statistics.state_dict()
        if self.rounds is not None:
            state["rounds"] = self.rounds.state_dict()
        return StateParts(tensors={"module": learned(self.engine.module)}, objects=objects, state=state)

    def load(self, saved: Checkpoint, path: Path) -> None:
        """Make everything as it was when `parts` was saved. `path` is for messages.

        Raises:
            UserError: that run is cut into other optimizer steps.
        """
        state = saved.state
        self._check_plan(state["plan"], path)

        # The engine's weights first: moments are those of its parameters.
        self.load_weights(saved)
        self.engine.scatter()
        self.engine.load_moments(saved.objects["optimizer"])
        self.scheduler.load_state_dict(saved.objects["scheduler"])
        # Only a session with fp16 has a scale to continue with.
        if self.scaler is not None and "scaler" in saved.objects:
            self.scaler.load_state_dict(saved.objects["scaler"])

        # A run may be continued by more processes than wrote it, which then share generators.
        generators = saved.objects["rng"]
        set_rng_state(generators[PartialState().process_index % len(generators)])

        self.step = state["step"]
        self.awaits_evaluation = state.get("awaits_evaluation", False)
        self.clock.before = state["seconds"]
        self.early.best = state["early_stopping"]["best"]
        self.early.best_step = state["early_stopping"]["best_step"]
        self.early.waited = state["early_stopping"]["waited"]
        self.guard.load_state_dict(state["guard"])
        # Checkpoints from before means were logged have none.
        if "means" in state:
            self.means.load_state_dict(state["means"])
        if self.flags is not None and state["flags"] is not None:
            self.flags.load_state_dict(state["flags"])
        # A run that is continued under another curriculum begins to measure only now.
        if self.statistics.is_used and "statistics" in state:
            self.statistics.load_state_dict(state["statistics"])
        if self.rounds is not None and "rounds" in state:
            self.rounds.load_state_dict(state["rounds"])

    def load_weights(self, saved: Checkpoint) -> None:
        """Give the module, and not yet the engine, the weights of a checkpoint."""
        tensors = saved.tensors["module"]
        module = self.engine.module
        if differing := sorted(tensors.keys() ^ learned(module).keys()):
            raise RuntimeError(f"the checkpoint holds other tensors than are trained here, such as {differing[0]}")
        # Not strict: frozen parameters are not in a checkpoint.
        module.load_state_dict(tensors, strict=False)

    def _check_plan(self, saved: dict[str, Any], path: Path) -> None:
        """Check that a checkpoint was written between the same optimizer steps.

        Raises:
            UserError: with every difference.
        """
        current = self.plan.identity()
        differing = [key for key in current if saved.get(key) != current[key]]
        if not differing:
            return

        lines = "".join(f"  - {key}: {saved.get(key)} -> {current[key]}\n" for key in differing)
        raise UserError(
            f"{path} was written by a run that is cut into other optimizer steps (checkpoint -> now):\n{lines}"
            "Expected the same text, epochs or max_steps, and batch_size x gradient_accumulation_steps x "
            "processes. Put them back to continue it, or start a new run in another --output-dir."
        )


def learned(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of a module without its frozen parameters, which a run has from where it had them at first."""
    # Duplicates too: a tied weight has several names in a state dict.
    names = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    names |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}
