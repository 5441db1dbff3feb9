"""The gradient of one optimizer step: its micro-batches one after the other, over all processes.

A term is divided by its count in the whole optimizer step, over all micro-batches and processes. These counts are
known before the first forward, so accelerate is kept from dividing by the number of micro-batches (wrong for a short
last step) and DDP's average over processes is undone. Hence 8x1, 4x2, 1x8 accumulation and one or two processes give
the same gradient.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..data.batch_source import BatchSource, MicroBatch, StepBatches
from ..errors import TeacherGone
from ..interfaces import Batch, StepOutput
from ..parallel.engine import Engine
from ..seeding import seed_forward
from .measurements import HostSum, StepSums
from .out_of_memory import Attempt
from .step_guard import StepGuard


@dataclass(frozen=True)
class StepWork:
    """One optimizer step, as it is to be computed."""

    batches: StepBatches
    counts: Mapping[str, int]
    """Items of every term in the whole step, over all micro-batches and processes."""
    sums: StepSums
    """Takes what the micro-batches say."""
    is_logged: bool
    """Terms whose weight is 0 are measured too."""
    options: Mapping[str, Any]
    """Further arguments of the module's forward, the same in every micro-batch."""


class StepGradient:
    """Adds up the gradient of an optimizer step in the parameters' `.grad`.

    Args:
        engine: computes forward and backward.
        accelerator: from `build_accelerator`.
        source: of the batches.
        guard: looks at each output.
        host: sums over processes.
        forward_communicates: processes exchange data within a forward.
        check: called before each micro-batch; may raise to end the step.
    """

    def __init__(
        self,
        engine: Engine,
        accelerator: Accelerator,
        source: BatchSource,
        *,
        guard: StepGuard,
        host: HostSum,
        forward_communicates: bool,
        check: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.accelerator = accelerator
        self.source = source
        self.guard = guard
        self.host = host
        self.forward_communicates = forward_communicates
        self.check = check

    def add_up(self, work: StepWork) -> bool:
        """Compute the gradient, micro-batch by micro-batch. False, in every process: one does not fit into memory.

        Processes agree once all forwards are done, before the backward in which they exchange gradients: whoever
        fails later, or in a forward in which they already wait for each other, ends the run.

        Raises:
            TeacherGone: in every process, where one has lost the teacher's server.
        """
        is_single = self.accelerator.num_processes == 1
        attempt = Attempt(survive=is_single or not self.forward_communicates)

        micro_batches = work.batches.micro_batches
        for index, micro_batch in enumerate(micro_batches):
            self.check()
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else self.engine.no_sync():
                loss = attempt(self._forward, work, index, micro_batch)
                # From here on processes wait for one another, and nobody may leave alone.
                if is_last:
                    attempt.failed = self._any_failed(attempt)
                    attempt.survive = is_single
                attempt(self.engine.backward, loss, is_last)

            # The graph must be gone before the next forward, or two of them are in memory.
            del loss
        return not attempt.failed

    def _any_failed(self, attempt: Attempt) -> bool:
        """Return whether a forward did not fit in some process.

        Raises:
            TeacherGone: some process has lost the teacher's server.
        """
        failures, losses = self.host([float(attempt.failed), float(attempt.gone is not None)])
        if losses:
            error = attempt.gone or TeacherGone("the teacher's server has not answered another process of this run")
            error.in_every_process = True
            raise error
        return bool(failures)

    def _forward(self, work: StepWork, index: int, micro_batch: MicroBatch) -> Tensor:
        """Return the loss of one micro-batch, as it is to be differentiated."""
        batch = micro_batch.batch
        is_idle = batch is None
        if is_idle:
            batch = self.source.filler()

        # Everything random in a forward depends on these alone, so that a step can be done again.
        device = self.accelerator.device
        step = work.batches.step
        seed_forward(device, self.source.seed, step, index, self.accelerator.process_index)
        batch = batch.to(device, non_blocking=True)

        # Only what is needed: a module need not know the options that it is never given.
        options = dict(work.options)
        if work.sums.gradients is not None:
            options["term_graphs"] = True
        if micro_batch.signal is not None:
            options["signal"] = micro_batch.signal
        loss, hidden = self.engine.model(batch, step, counts=work.counts, measure=work.is_logged, **options)
        self._take_notes(work, hidden.output, micro_batch.batch)

        # DDP averages gradients over processes; counts are global, so the sum is wanted. An idle process takes part
        # with a loss of 0.
        factor = 0 if is_idle else self.accelerator.num_processes
        return loss * factor

    def _take_notes(self, work: StepWork, output: StepOutput, batch: Batch | None) -> None:
        """Note what an output says, before the backward frees its graph; `batch` is None for an idle process."""
        sums = work.sums
        if batch is not None:
            if sums.gradients is not None:
                scaler = self.accelerator.scaler
                scale = 1.0 if scaler is None else scaler.get_scale()
                sums.gradients.add(output, work.counts, scale)
            self.guard.look(output, batch.documents)
        sums.add(output, is_idle=batch is None)
