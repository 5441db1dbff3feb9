"""Steps of a run, block after block of a stream."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import ceil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...parallel.processes import on_main_process
from ..batch_source import BatchSource, StepBatches, StepPlan
from .blocks import Block, Blocks, StreamSetUp


@dataclass(frozen=True)
class _PlanOfBlock:
    """The plan of a run, for the windows of one block."""

    plan: StepPlan
    """Of the run."""
    windows: int

    @property
    def micro_batch(self) -> int:
        """Windows per forward pass, at most."""
        return self.plan.micro_batch

    @property
    def global_batch(self) -> int:
        """Windows per optimizer step."""
        return self.plan.global_batch

    @property
    def processes(self) -> int:
        """Processes that share a step."""
        return self.plan.processes

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step and process."""
        return self.plan.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps, with the one that is carried into the next block."""
        return ceil(self.windows / self.global_batch)


class Stream:
    """The batches of a run that reads a stream, in one of its processes.

    The main process makes the blocks, and all read them from the disk: who learns from a window is decided as where all
    windows are known, so a run depends on the number of processes no more than any other.

    Args:
        folder: of the blocks, which all processes see.
        seed: of the order of windows.
        check: called while a block is waited for; it raises where the run is to end.

    Attributes:
        counts: of documents up to the end of the block that was learned from last, by `text.COUNTED`; empty before.
    """

    def __init__(
        self,
        setup: StreamSetUp,
        folder: Path,
        *,
        accelerator: Accelerator,
        global_batch: int,
        seed: int,
        check: Callable[[], None],
    ) -> None:
        self.accelerator = accelerator
        self.counts: dict[str, int] = {}
        self._blocks = Blocks(setup, folder, global_batch=global_batch, seed=seed, check=check)

    def steps(
        self, source: BatchSource, plan: StepPlan, first_step: int, end: int
    ) -> Generator[StepBatches, None, None]:
        """Yield the batches of step `first_step`, of the step after it, and so on, up to step `end`.

        Args:
            source: makes batches of windows; those of a block take the place of its own.
        """
        step = first_step
        while step < end:
            block: Block = on_main_process(self.accelerator, partial(self._blocks.at, step))
            self.counts = block.counts
            windows = block.windows()
            of_block = replace(source, windows=windows)
            plan_of_block = _PlanOfBlock(plan, len(windows))
            steps = range(step - block.first_step, min(block.end, end) - block.first_step)
            for number, batches in zip(count(step), of_block.stretch(plan_of_block, block.number, steps), strict=False):
                # Only now: workers of the loader are forked, which no other thread should disturb.
                if number == step:
                    self._make_next(block, end)
                yield replace(batches, step=number, epoch=block.passes)

            step = block.end
            source.end_epoch()

    def _make_next(self, block: Block, end: int) -> None:
        """Begin to make the block behind one, if there is a step in it."""
        if self.accelerator.is_main_process and block.end < end:
            self._blocks.begin_behind(block)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state of the stream at the beginning of the block of a step, as a checkpoint holds it."""
        return self._blocks.state_dict(step) if self.accelerator.is_main_process else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where a stream of the same text was."""
        if self.accelerator.is_main_process:
            self._blocks.load_state_dict(state)

    def close(self) -> None:
        """Stop making blocks; a later session takes up those that are there."""
        self._blocks.close()

    def remove(self) -> None:
        """Delete all blocks, when training is done."""
        on_main_process(self.accelerator, self._blocks.remove)
