"""The micro-batches of every optimizer step of one process, and a teacher that is asked about them one step ahead.

    windows --BatchSource.steps--> StepBatches --with_signals--> the same, each with the teacher's signal

They are a function of the seed and the step alone, so a resumed run sees the batches of an uninterrupted one.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch

from ..interfaces import Batch
from ..machine import device_memory
from .batch_order import BatchGeometry, Pacing, micro_batches_in_step, step_batches
from .loader import loader
from .windows import Window


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
class OwnWindows:
    """Windows that the student wrote itself, for a stretch of optimizer steps."""

    end: int
    """The first step behind the stretch."""
    by_slot: Mapping[tuple[int, int], Window | None]
    """(step, slot) -> the window in place of the given one; None: the slot stays empty."""


@dataclass(frozen=True)
class _WithOwnWindows(Sequence[Any]):
    """Given windows, and behind them those that the student wrote."""

    windows: Sequence[Any]
    own: Sequence[Window]

    def __len__(self) -> int:
        return len(self.windows) + len(self.own)

    def __getitem__(self, index: Any) -> Any:
        count = len(self.windows)
        return self.windows[index] if index < count else self.own[index - count]


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
    pacing: Pacing | None = None
    """Of windows that are not all open from the first step on."""

    def steps(
        self, plan: StepPlan, first_step: int, own: OwnWindows | None = None
    ) -> Generator[StepBatches, None, None]:
        """Yield the batches of step `first_step`, of the step after it, and so on.

        Args:
            own: windows that the student wrote, and where the steps end; None: given windows alone, without end.
        """
        step = first_step
        while own is None or step < own.end:
            epoch, step_of_epoch = divmod(step, plan.steps_per_epoch)
            end = plan.steps_per_epoch
            if own is not None:
                end = min(end, own.end - epoch * plan.steps_per_epoch)

            yield from self.stretch(plan, epoch, range(step_of_epoch, end), own)
            step = epoch * plan.steps_per_epoch + end

            # What was buffered in this epoch is written before the next one begins.
            if end == plan.steps_per_epoch:
                self.end_epoch()

    def end_epoch(self) -> None:
        """Do what is due between two epochs."""
        self.after_epoch()

        # Batches of many shapes leave unused blocks of many sizes in the allocator.
        if self.device.type == "cuda":
            device_memory.release()

    def filler(self) -> Batch:
        """Return a batch that is computed and not learned from, for a process that must take part in a forward.

        DDP waits for a forward of every process, also in a short last step that has no windows left for this one.
        """
        batch = self.collate([self.windows[0]])
        return batch.without_anchors() if hasattr(batch, "without_anchors") else batch

    def stretch(self, plan: StepPlan, epoch: int, steps: range, own: OwnWindows | None = None) -> Iterator[StepBatches]:
        """Yield some steps of one epoch."""
        geometry = BatchGeometry(plan.global_batch, plan.micro_batch, plan.processes, self.rank)
        first_step = epoch * plan.steps_per_epoch
        windows, replaced = self._with_own(plan, own, first_step)
        order = step_batches(
            plan.windows,
            geometry,
            seed=self.seed,
            epoch=epoch,
            steps=steps,
            replaced=replaced,
            pacing=self.pacing,
        )

        # One loader a stretch: it prepares the batches of the next step while this one is computed.
        batches = loader(
            windows,
            order,
            self.collate,
            num_workers=self.num_workers,
            pin=self.device.type == "cuda",
            at_once=plan.accumulation,
        )

        # The last step of an epoch may have fewer micro-batches, but the same number in every process.
        for step in steps:
            count = micro_batches_in_step(
                plan.windows,
                step,
                global_batch=plan.global_batch,
                micro_batch=plan.micro_batch,
                processes=plan.processes,
            )
            yield StepBatches(
                step=first_step + step,
                epoch=epoch,
                micro_batches=[MicroBatch(batch) for batch in islice(batches, count)],
            )

    def _with_own(
        self, plan: StepPlan, own: OwnWindows | None, first_step: int
    ) -> tuple[Sequence[Any], dict[tuple[int, int], int | None]]:
        """Return the windows of a stretch, and for the slots of the student's own their index.

        Args:
            first_step: of the epoch.
        """
        if own is None or not own.by_slot:
            return self.windows, {}

        written: list[Window] = []
        replaced: dict[tuple[int, int], int | None] = {}
        for (step, slot), window in own.by_slot.items():
            index = None
            if window is not None:
                index = plan.windows + len(written)
                written.append(window)
            replaced[step - first_step, slot] = index
        return _WithOwnWindows(self.windows, written), replaced


def with_signals(
    steps: Iterator[StepBatches], ask: Callable[[Batch, int], Any], end: int
) -> Generator[StepBatches, None, None]:
    """Yield the steps with the teacher's signals, which are asked for while the step before has still to be computed.

    A teacher on another GPU answers while the student learns from the step before.

    Args:
        ask: (batch, step) -> signal.
        end: the first step that is not taken, which nothing is asked about: behind the run, or behind the texts that
            the student has written so far.
    """
    waiting = None
    for step in steps:
        # The source may have no end, but the run has.
        answered = step
        if step.step < end:
            pairs = [(batch, None if batch is None else ask(batch, step.step)) for batch, _ in step.micro_batches]
            answered = replace(step, micro_batches=[MicroBatch(batch, signal) for batch, signal in pairs])

        # One step late: the questions about this one are already on their way.
        if waiting is not None:
            yield waiting
        waiting = answered

    if waiting is not None:
        yield waiting
