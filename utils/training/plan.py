"""The plan of a run: how its windows are divided into optimizer steps and micro-batches."""

import math
from dataclasses import dataclass, replace
from typing import cast

from ..config.settings import TrainingConfig
from ..data import batch_order


@dataclass(frozen=True)
class Plan:
    """The windows of a run, divided into optimizer steps."""

    windows: int
    """Of one epoch; 0: they come as a stream, and nobody knows how many there are."""
    micro_batch: int
    """Windows per forward pass, at most."""
    global_batch: int
    """Windows per optimizer step."""
    processes: int
    total_steps: int
    """Optimizer steps of the whole run."""

    @classmethod
    def of(cls, config: TrainingConfig, windows: int, processes: int = 1) -> "Plan":
        """Return the plan of a configuration for so many windows."""
        # Also with several processes a micro-batch is that of each.
        micro_batch = cast(int, config.batch_size)  # `auto` is a number by now
        global_batch = micro_batch * config.gradient_accumulation_steps * processes
        # max_steps replaces epochs.
        total_steps = config.max_steps
        if not total_steps:
            total_steps = config.epochs * batch_order.steps_per_epoch(windows, global_batch)

        return cls(
            windows=windows,
            micro_batch=micro_batch,
            global_batch=global_batch,
            processes=processes,
            total_steps=total_steps,
        )

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step and process."""
        return math.ceil(self.global_batch / (self.micro_batch * self.processes))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every window is seen once; the last one may be short."""
        return batch_order.steps_per_epoch(self.windows, self.global_batch)

    def halved(self) -> "Plan":
        """Return the same optimizer steps, in micro-batches of half the windows, rounded up."""
        return replace(self, micro_batch=(self.micro_batch + 1) // 2)

    def __str__(self) -> str:
        windows = "windows of a stream"
        if self.windows:
            windows = f"{self.windows} windows, {self.steps_per_epoch} optimizer steps an epoch"
        steps = f"{self.total_steps} in all" if self.windows else f"{self.total_steps} optimizer steps"
        return (
            f"micro-batch {self.micro_batch} x accumulation {self.accumulation} x processes {self.processes} = "
            f"effective batch of {self.global_batch} windows; {windows}, {steps}"
        )

    def identity(self) -> dict[str, int]:
        """Return the numbers that may not change between a checkpoint and its continuation."""
        return {"windows": self.windows, "windows_per_step": self.global_batch, "total_steps": self.total_steps}
