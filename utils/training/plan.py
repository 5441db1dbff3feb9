"""How windows become optimizer steps, and what takes them: plan, accelerator, optimizer, schedule."""

import math
from dataclasses import dataclass, replace

from ..config.settings import TrainingConfig
from ..data import batch_order


@dataclass(frozen=True)
class Plan:
    """How the windows become optimizer steps."""

    windows: int
    micro_batch: int
    """Windows per forward pass, at most."""
    global_batch: int
    """Windows per optimizer step."""
    processes: int
    total_steps: int

    @classmethod
    def of(cls, config: TrainingConfig, windows: int, processes: int = 1) -> "Plan":
        """The plan of a configuration for so many windows."""
        global_batch = config.batch_size * config.gradient_accumulation_steps * processes
        steps = config.max_steps or config.epochs * batch_order.steps_per_epoch(windows, global_batch)
        return cls(windows, config.batch_size, global_batch, processes, steps)

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step and process."""
        return math.ceil(self.global_batch / (self.micro_batch * self.processes))

    def halved(self) -> "Plan":
        """The same optimizer steps, in micro-batches of half the windows, rounded up."""
        return replace(self, micro_batch=(self.micro_batch + 1) // 2)

    @property
    def steps_per_epoch(self) -> int:
        return batch_order.steps_per_epoch(self.windows, self.global_batch)

    def __str__(self) -> str:
        return (
            f"micro-batch {self.micro_batch} x accumulation {self.accumulation} x processes {self.processes} = "
            f"effective batch of {self.global_batch} windows; {self.windows} windows, {self.steps_per_epoch} optimizer "
            f"steps an epoch, {self.total_steps} in all"
        )

    def identity(self) -> dict[str, int]:
        """What may not change between a checkpoint and its continuation."""
        return {"windows": self.windows, "windows_per_step": self.global_batch, "total_steps": self.total_steps}
