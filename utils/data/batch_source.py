"""The micro-batches of every optimizer step of one process, and a teacher that is asked about them one step ahead.

    windows --BatchSource.steps--> StepBatches --with_signals--> the same, each with the teacher's signal

They are a function of the seed and the step alone, so a resumed run sees the batches of an uninterrupted one.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch

from ..interfaces import Batch
from ..machine import device_memory
from .batch_order import BatchGeometry, micro_batches_in_step, step_batches
from .loader import loader


class StepPlan(Protocol):
    """Division of the windows into optimizer steps and micro-batches, such as `utils.training.plan.Plan`."""

    @property
    def windows(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def processes(self) -> int: ...
    @property
    def accumulation(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...


class MicroBatch(NamedTuple):
    """The input of one forward pass."""

    batch: Batch | None
    """None where a short last step of an epoch leaves this process nothing to compute."""
    signal: Any = None
    """The teacher's answer, where it was asked ahead."""


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one optimizer step in this process."""

    step: int
    """Steps done before it."""
    epoch: int
    """Counted from 0."""
    micro_batches: Sequence[MicroBatch]

    @property
    def batches(self) -> list[Batch]:
        """The batches that are learned from."""
        return [micro_batch.batch for micro_batch in self.micro_batches if micro_batch.batch is not None]


@dataclass(frozen=True)
class BatchSource:
    """Makes the batches of one process of a run."""

    windows: Sequence[Any]
    """By index."""
    collate: Callable[[list[Any]], Batch]
    seed: int
    """Of the order of windows."""
    rank: int
    """Number of this process."""
    device: torch.device
    """That the batches are for; for a GPU they are pinned."""
    num_workers: int
    """Processes that prepare batches; 0: a thread of this process."""
    after_epoch: Callable[[], None]
    """Called when an epoch has been delivered."""

    def steps(self, plan: StepPlan, first_step: int) -> Generator[StepBatches, None, None]:
        """Yield the batches of step `first_step`, of the step after it, and so on without end."""
        epoch, step_of_epoch = divmod(first_step, plan.steps_per_epoch)
        while True:
            yield from self._epoch(plan, epoch, step_of_epoch)

            # What was buffered in this epoch is written before the next one begins.
            self.after_epoch()
            epoch += 1
            step_of_epoch = 0

            # Batches of many shapes leave unused blocks of many sizes in the allocator.
            if self.device.type == "cuda":
                device_memory.release()

    def filler(self) -> Batch:
        """Return a batch that is computed and not learned from, for a process that must take part in a forward.

        DDP waits for a forward of every process, also in a short last step that has no windows left for this one.
        """
        batch = self.collate([self.windows[0]])
        return batch.without_anchors() if hasattr(batch, "without_anchors") else batch

    def _epoch(self, plan: StepPlan, epoch: int, first_step: int) -> Iterator[StepBatches]:
        """Yield the steps of one epoch, from one of its steps on."""
        geometry = BatchGeometry(plan.global_batch, plan.micro_batch, plan.processes, self.rank)
        order = step_batches(plan.windows, geometry, seed=self.seed, epoch=epoch, start_step=first_step)

        # One loader an epoch: it prepares the batches of the next step while this one is computed.
        batches = loader(
            self.windows,
            order,
            self.collate,
            num_workers=self.num_workers,
            pin=self.device.type == "cuda",
            at_once=plan.accumulation,
        )

        # The last step of an epoch may have fewer micro-batches, but the same number in every process.
        for step in range(first_step, plan.steps_per_epoch):
            count = micro_batches_in_step(
                plan.windows,
                step,
                global_batch=plan.global_batch,
                micro_batch=plan.micro_batch,
                processes=plan.processes,
            )
            yield StepBatches(
                step=epoch * plan.steps_per_epoch + step,
                epoch=epoch,
                micro_batches=[MicroBatch(batch) for batch in islice(batches, count)],
            )


def with_signals(
    steps: Iterator[StepBatches], ask: Callable[[Batch, int], Any], total_steps: int
) -> Generator[StepBatches, None, None]:
    """Yield the steps with the teacher's signals, which are asked for while the step before has still to be computed.

    A teacher on another GPU answers while the student learns from the step before.

    Args:
        ask: (batch, step) -> signal.
        total_steps: of the run. Nothing is asked about the step behind the last one.
    """
    waiting = None
    for step in steps:
        # The source has no end, but the run has.
        answered = step
        if step.step < total_steps:
            pairs = [(batch, None if batch is None else ask(batch, step.step)) for batch, _ in step.micro_batches]
            answered = replace(step, micro_batches=[MicroBatch(batch, signal) for batch, signal in pairs])

        # One step late: the questions about this one are already on their way.
        if waiting is not None:
            yield waiting
        waiting = answered
