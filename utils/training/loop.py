"""The loop: optimizer steps on accelerate, over any module with the step protocol.

    module(batch, step, counts=..., measure=...) -> output with
        .loss       scalar tensor: sum over terms of weight * sum / counts[term]
        .terms      {name: object with .sum (scalar tensor) and .count (int)}
        .weights    {name: float}      .scalars    {name: float}
    With term_graphs=True (only where `fit` got `term_gradients`) every .sum of a term with a weight has a graph.
    batch: .counts {name: int}, .labels, .documents, .to(device, non_blocking=...), and .as_filler() where a batch
    that only keeps other processes company must differ from one that is learned from

A term is divided by its count in the whole optimizer step, over all micro-batches and processes. The loop
knows these counts before the first forward, so accelerate is kept from dividing by the number of
micro-batches (wrong for a short last window) and DDP's average over processes is undone. Hence 8x1, 4x2, 1x8
accumulation and one or two processes give the same gradient.

A step is numbered by how many were done before it: the module sees 0 .. N-1, records and checkpoints carry
1 .. N. Everything random in it is a function of (seed, step, micro-batch, process), and the data order one of
(seed, epoch): what a run computes depends neither on how often it is interrupted, nor logged, nor evaluated.
"""

import gc
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..advice import advice
from ..config.settings import TrainingConfig
from ..data import batch_order, loader
from ..errors import RunError, UserError
from ..logs.step_logger import StepLogger
from ..machine import device_memory, hardware
from ..machine.stop_signals import STOP_REASONS, StopSignal
from ..parallel.accelerator import engine_kind
from ..parallel.processes import on_main_process
from ..seeding import preserve_rng_and_mode, seed_forward
from . import out_of_memory
from .checkpoints import CheckpointStore
from .early_stopping import EarlyStopping
from .measurements import Clock, HostSum, Measured, TermGradients
from .optimizer import build_optimizer, build_scheduler, taught_parameters
from .out_of_memory import Attempt, OutOfMemory
from .plan import Plan
from .red_flags import RedFlags
from .state import RunState
from .step_guard import StepGuard

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """How a run ended."""

    steps: int
    """Optimizer steps done, those before a resume included."""
    seconds: float
    """Wall-clock time in the loop, sessions before a resume included."""
    stopped_by: str
    """One of `STOP_REASONS`."""
    best_step: int | None = None
    best_bits_per_byte: float | None = None
    """Best evaluation inside the loop. After early stopping the module has the weights of `best_step`."""
    evaluation: dict[str, Any] | None = None
    """The last evaluation record of this session, if there was one."""
    resumed_from: int | None = None
    skipped_steps: int = 0
    """Steps not taken because loss or gradient were not finite."""
    loss_spikes: int = 0
    micro_batch: int = 0
    """Windows of a forward pass at the end: fewer than at the start where those did not fit into memory."""


def fit(
    module: nn.Module,
    dataset: Sequence[Any],
    collate: Callable[[list[Any]], Any],
    config: TrainingConfig,
    *,
    accelerator: Accelerator,
    logger: StepLogger,
    evaluate: Callable[[int], dict[str, Any] | None] | None = None,
    evaluate_every: int = 0,
    checkpoints: CheckpointStore | None = None,
    resume_from: Path | None = None,
    flags: RedFlags | None = None,
    stop: StopSignal | None = None,
    num_workers: int = 0,
    term_gradients: bool = False,
    forecast: str = "",
    settle: Callable[[], None] = lambda: None,
    ask: Callable[[Any, int, bool], Any] | None = None,
    waits: bool = False,
) -> FitResult:
    """Train `module` on `dataset` for the steps that `Plan.of(config, len(dataset), processes)` says.

    Args:
        module: see the step protocol above; its `state_dict()` is what checkpoints hold.
        dataset: windows by index.
        collate: list of windows -> batch.
        accelerator: from `build_accelerator`. Nothing may be prepared with it while the loop runs.
        logger: decides which steps are logged; records go to it.
        evaluate: (steps done) -> evaluation record or None. Called in every process; must return the same in all.
        evaluate_every: steps between its calls; 0: never.
        checkpoints: None saves nothing.
        resume_from: a checkpoint that `checkpoints.resume_point` returned.
        flags: red flags to watch for.
        stop: asks the loop to stop at the next step boundary.
        num_workers: processes that prepare batches.
        term_gradients: log the norm of the gradient that each term contributes to the student (`TermGradients`).
        ask: (batch, step, measured) -> `signal` for the module's forward, or None. Called for a step's batches before
            those of the step before are worked on: a teacher on another GPU computes meanwhile. None: the module asks.
        forecast: of the memory that this takes, for the message where it does not fit.
        waits: forwards of different processes wait for each other: one that does not fit into memory ends the run.
        settle: called in every process before a checkpoint and before an epoch: what waits is to be on the disk then.

    Raises:
        TypeError, ValueError: an argument of another kind, or a negative number.
        UserError: no windows, nothing to train, a batch size that is not known yet, or a checkpoint of another plan.
        RunError: loss or gradient were not finite `guards.MOST_SKIPPED` times in a row (a checkpoint is saved), or a
            checkpoint could not be written.
        OutOfMemory: also in micro-batches of one window.
    """
    _check_arguments(module, dataset, collate, config, accelerator)
    for name, count in {"evaluate_every": evaluate_every, "num_workers": num_workers}.items():
        if count < 0:
            raise ValueError(f"{name}: got {count}, expected 0 or more")

    sharded = engine_kind(accelerator).sharded
    if term_gradients and sharded:
        raise UserError("logging.term_gradients needs whole weights, and they are sharded: leave one of the two out.")
    if not len(dataset):
        raise UserError("got 0 training windows, expected at least 1. Give more text, or a smaller data.max_length.")
    loop = TrainingLoop(
        module=module,
        dataset=dataset,
        collate=collate,
        config=config,
        accelerator=accelerator,
        logger=logger,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        checkpoints=checkpoints,
        flags=flags,
        stop=stop,
        num_workers=num_workers,
        term_gradients=term_gradients,
        settle=settle,
        ask=ask,
        waits=waits or sharded,
    )
    try:
        with out_of_memory.explained(forecast):
            if resume_from is not None:
                loop.resume(resume_from)
            return loop.run()
    finally:
        loop.close()


def _check_arguments(module: Any, dataset: Any, collate: Any, config: Any, accelerator: Any) -> None:
    """Check that the arguments of `fit` are what they are called, before anything is prepared with them."""
    kinds = {
        "module": (module, nn.Module, "a DistillationFramework, or another module with the step protocol"),
        "dataset": (dataset, Sized, "windows by index, such as the list that PairEncoder.windows returns"),
        "collate": (collate, Callable, "a function that makes a batch of windows, such as a PairCollator"),
        "config": (config, TrainingConfig, "a TrainingConfig"),
        "accelerator": (accelerator, Accelerator, "an Accelerator, from utils.parallel.accelerator.build_accelerator"),
    }
    for name, (value, kind, expected) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got a {type(value).__name__}, expected {expected}")

    if isinstance(dataset, str | Mapping):
        raise TypeError(f"dataset: got a {type(dataset).__name__}, expected {kinds['dataset'][2]}")
    if config.batch_size == "auto":
        raise UserError(
            "batch_size: got auto, expected a number: what fits into memory is found before training, by "
            "utils.forecast.batch_size.settle in train.py. Give a TrainingConfig with the number of windows of a "
            "forward pass."
        )


class TrainingLoop:
    """One run of `fit`, whose arguments it takes."""

    def __init__(
        self,
        *,
        module: nn.Module,
        dataset: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        config: TrainingConfig,
        accelerator: Accelerator,
        logger: StepLogger,
        evaluate: Callable[[int], dict[str, Any] | None] | None,
        evaluate_every: int,
        checkpoints: CheckpointStore | None,
        flags: RedFlags | None,
        stop: StopSignal | None,
        num_workers: int,
        term_gradients: bool,
        settle: Callable[[], None],
        ask: Callable[[Any, int, bool], Any] | None,
        waits: bool,
    ) -> None:
        self.module, self.dataset, self.collate, self.config = module, dataset, collate, config
        self.accelerator, self.logger, self.checkpoints = accelerator, logger, checkpoints
        self.evaluate, self.evaluate_every = evaluate, evaluate_every if evaluate is not None else 0
        self.flags, self.stop, self.num_workers = flags, stop, num_workers
        self.term_gradients, self.settle, self.ask, self.waits = term_gradients, settle, ask, waits
        self.plan = Plan.of(config, len(dataset), accelerator.num_processes)
        self.evaluation: dict[str, Any] | None = None
        self.resumed_from: int | None = None
        self._saved_step: int | None = None
        self._prepare()
        self._host = HostSum(accelerator, sorted(collate([dataset[0]]).counts))

    def _prepare(self) -> None:
        accelerator = self.accelerator
        accelerator.gradient_accumulation_steps = 1  # `accelerate launch` may have set it; the loop counts itself
        # With fp16 the scaler must decide on the host whether to step: accelerate cannot see it on the device.
        self.scaler = accelerator.scaler
        self.engine = engine_kind(accelerator)(self.module, accelerator)
        optimizer = build_optimizer(self.engine.twin, self.config, fused=self.scaler is None)
        self.scheduler = build_scheduler(optimizer, self.config, self.plan.total_steps)
        self._taught = taught_parameters(optimizer.param_groups)
        self.engine.wrap(optimizer)
        if self.scaler is not None:  # an accelerator that served another run before has its scale
            self.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())
        self.early, self._clock = EarlyStopping(self.config.patience), Clock()
        total = partial(accelerator.reduce, reduction="sum")
        self.guard = StepGuard(total, gather_object, scaled=self.scaler is not None)
        self.state = RunState(
            engine=self.engine,
            scheduler=self.scheduler,
            scaler=self.scaler,
            plan=self.plan,
            early=self.early,
            guard=self.guard,
            flags=self.flags,
            clock=self._clock,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        """Steps until something stops the run; saves at the end."""
        self.logger.truncate_after(self.step)
        log.info("%s, from step %d", self.plan, self.step)
        self.engine.model.train()
        windows = self._one_ahead()
        while (reason := self._reason_to_stop()) is None and not self.guard.exhausted:
            if self._advance(*self._clock.delivered(windows)):
                self._at_boundary()
            else:
                windows.close()
                self._halve()
                windows = self._one_ahead()
        windows.close()
        self.guard.read()
        self._save()
        self.engine.gather()
        self.module.to(self.accelerator.device)
        if self.guard.exhausted:
            raise RunError(self.guard.explanation(self.step))
        if reason == "early_stopping":
            self._take_best()
        log.info("training ended after step %d of %d: %s", self.step, self.plan.total_steps, reason)
        share = 100 * self._clock.waited / max(self._clock.total() - self._clock.before, 1e-9)
        log.info("%.1f %% of this session was spent waiting for batches (data.num_workers %d)", share, self.num_workers)
        return FitResult(
            steps=self.step,
            seconds=self._clock.total(),
            stopped_by=reason,
            best_step=self.early.best_step,
            best_bits_per_byte=self.early.best,
            evaluation=self.evaluation,
            resumed_from=self.resumed_from,
            skipped_steps=self.guard.skipped,
            loss_spikes=self.guard.spikes.total,
            micro_batch=self.plan.micro_batch,
        )

    def _one_ahead(self) -> Iterator[tuple[int, list[tuple[Any, Any]]]]:
        """(epoch, micro-batches of one step, each with its signal), the next step's signals already asked for."""
        waiting = None
        for step, (epoch, window) in enumerate(self._windows(), start=self.step):
            asks = self.ask if step < self.plan.total_steps else None
            measured = self.logger.due(step + 1)
            pairs = [(b, None if asks is None or b is None else asks(b, step, measured)) for b in window]
            now, waiting = ((epoch, pairs), None) if self.ask is None else (waiting, (epoch, pairs))
            if now is not None:
                yield now

    def _windows(self) -> Iterator[tuple[int, list[Any]]]:
        """(epoch, this process's micro-batches of one optimizer step), from the current step on, without end.

        A micro-batch is None where a short last step leaves this process nothing.
        """
        plan, sizes = self.plan, {"global_batch": self.plan.global_batch, "micro_batch": self.plan.micro_batch}
        epoch, first = divmod(self.step, plan.steps_per_epoch)
        while True:
            order = batch_order.step_batches(
                plan.windows,
                batch_order.BatchGeometry(**sizes, processes=plan.processes, rank=self.accelerator.process_index),
                seed=self.config.seed,
                epoch=epoch,
                start_step=first,
            )
            pin = self.accelerator.device.type == "cuda"
            batches = loader.loader(self.dataset, order, self.collate, self.num_workers, pin, plan.accumulation)
            for step in range(first, plan.steps_per_epoch):
                count = batch_order.micro_batches_in_step(plan.windows, step, **sizes, processes=plan.processes)
                yield epoch, list(islice(batches, count))
            del batches
            self.settle()
            epoch, first = epoch + 1, 0
            if self.accelerator.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def _reason_to_stop(self) -> str | None:
        """Why no further step is taken; the same in every process."""
        if self.step >= self.plan.total_steps:
            return "finished"
        if self.early.exhausted:
            return "early_stopping"
        requested = self.stop.requested() if self.stop is not None else None
        return self._host.any_of(requested, STOP_REASONS)

    def _at_boundary(self) -> None:
        """What happens between two steps: evaluation, checkpoint, progress."""
        self.logger.progress(self.step)
        improved = False
        if self.evaluate_every and self.step % self.evaluate_every == 0:
            improved = self._evaluate()
        if self.step % self.config.save_every == 0 or (improved and self.config.patience):
            self._save()

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def _advance(self, epoch: int, window: list[tuple[Any, Any]]) -> bool:
        """One optimizer step on a window of micro-batches. False, in every process: it does not fit into memory."""
        counts = self._host.sum_counts([batch.counts for batch, _ in window if batch is not None])
        measured = Measured() if self.logger.due(self.step + 1) else None
        if measured is not None and self.term_gradients:
            measured.gradients = TermGradients(self._taught)
        if not self._differentiate(window, counts, measured):
            return False
        for batch, _ in window:
            if batch is not None:
                self._watch(lambda flags, batch=batch: flags.batch(batch.labels, epoch + 1, batch.documents))
        lr = self.engine.optimizer.param_groups[0]["lr"]
        norm = self.engine.clip(self.config.max_grad_norm)
        self._update(norm)
        self.state.step += 1
        self._clock.tokens += counts.get("lm", 0)
        if measured is not None:
            self._log_step(measured, counts, lr, norm)
        if measured is not None or self.accelerator.device.type == "cpu" or self.guard.must_read:
            self.guard.read()
        return True

    def _differentiate(self, window: list[tuple[Any, Any]], counts: dict[str, int], measured: Measured | None) -> bool:
        """The gradient of a step, micro-batch by micro-batch. False, in every process: one does not fit into memory.

        Processes agree once all forwards are done, before the backward in which they exchange gradients: whoever
        fails later, or in a forward in which they already wait for each other (the contrastive term), ends the run.
        """
        alone = self.accelerator.num_processes == 1
        attempt = Attempt(survive=alone or not (counts.get("contr") or self.waits))
        for index, (batch, signal) in enumerate(window):
            is_last = index == len(window) - 1
            with nullcontext() if is_last else self.engine.no_sync():
                loss = attempt(self._forward, batch, signal, index, counts, measured)
                if is_last:
                    attempt.failed = bool(self._host([float(attempt.failed)])[0])
                    attempt.survive = alone
                attempt(self.engine.backward, loss, is_last)
            del loss
        return not attempt.failed

    def _halve(self) -> None:
        """Take back a step that does not fit into memory, and go on in micro-batches of half the size.

        Raises:
            OutOfMemory: there is but one window in each; the steps before are saved.
        """
        self.engine.forget()
        self.guard.forget()
        device_memory.release()
        if self.plan.micro_batch == 1:
            self._save()
            raise OutOfMemory(f"out of memory in optimizer step {self.step + 1}, in micro-batches of one window")
        if self.plan.processes > 1:
            # DDP cannot take back a forward: some processes would exchange gradients that others do not have
            self.engine.wrap_again()
        self.plan = out_of_memory.halved(self.plan, self.step, "contr" in self._host.names)

    def _forward(
        self, batch: Any, signal: Any, index: int, counts: dict[str, int], measured: Measured | None
    ) -> Tensor:
        """What to differentiate of one micro-batch."""
        rank, device = self.accelerator.process_index, self.accelerator.device
        idle = batch is None
        if idle:  # DDP waits for every process: take part with a loss of 0
            batch = self.collate([self.dataset[0]])
            batch = batch.as_filler() if hasattr(batch, "as_filler") else batch
        seed_forward(device, self.config.seed, self.step, index, rank)
        batch = batch.to(device, non_blocking=True)
        looked_at = measured is not None and measured.gradients is not None
        extra = ({"term_graphs": True} if looked_at else {}) | ({} if signal is None else {"signal": signal})
        loss, hidden = self.engine.model(batch, self.step, counts=counts, measure=measured is not None, **extra)
        if looked_at and not idle:
            measured.gradients.add(hidden.output, counts, 1.0 if self.scaler is None else self.scaler.get_scale())
        if not idle:
            self.guard.look(hidden.output, batch.documents)
        if measured is not None:
            measured.add(hidden.output, idle)
        # DDP averages gradients over processes; counts are global, so the sum is wanted
        return loss * (0 if idle else self.plan.processes)

    def _update(self, norm: Tensor) -> None:
        """Take the step, unless the gradient is not finite; that is decided without waiting for the device."""
        is_bad = self.guard.decide(self.step + 1, norm.detach())
        self.engine.update(is_bad)
        with warnings.catch_warnings():
            # torch takes a first step that the scaler of fp16 leaves out for a wrong order of calls
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            # also after a step that was left out, in every precision: the schedule is one over steps, as the curriculum
            self.scheduler.step()

    def _log_step(self, measured: Measured, counts: dict[str, int], lr: float, norm: Tensor) -> None:
        told = measured.record(self._host, counts, self.accelerator)
        record = {
            "step": self.step,
            "epoch": self.step / self.plan.steps_per_epoch,
            "progress": self.step / self.plan.total_steps,
            "loss": told["loss"],
            "lr": lr,
            "grad_norm": norm.item(),
            "tokens_per_second": self._clock.tokens_per_second(),
            **hardware.memory_use(self.accelerator.device),
            **told,
        }
        self.logger.training(record, measured.weights)
        self._watch(lambda flags: flags.check(record))

    def _watch(self, look: Callable[[RedFlags], None]) -> None:
        """Look for red flags; where that fails, no more of them are looked for."""
        if self.flags is None:
            return
        flags, self.flags = self.flags, None
        with advice("further red flags"):
            look(flags)
            self.flags = flags

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """Evaluate without leaving a trace in the training; True if it is the best so far."""
        with self._clock.paused(), preserve_rng_and_mode(self.module), self.engine.evaluation():
            record = self.evaluate(self.step)
        if record is None:
            return False
        self.evaluation = record
        self.logger.evaluation(record)
        self._watch(lambda flags: flags.check(record))
        improved = self.early.update(self.step, record["bits_per_byte"])
        if self.early.exhausted:
            log.info(
                "no better evaluation than %.4f bits per byte (step %s) in %d in a row",
                self.early.best if self.early.best is not None else math.nan, self.early.best_step, self.early.waited,
            )  # fmt: skip
        return improved

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint of this step boundary, once."""
        if self.checkpoints is None or self._saved_step == self.step:
            return
        self.settle()
        with self._clock.paused():
            self.guard.read()
            protect, parts = [] if self.early.best_step is None else [self.early.best_step], self.state.parts()
            on_main_process(self.accelerator, lambda: self.checkpoints.save(self.step, **parts, protect=protect))
        self._saved_step = self.step

    def resume(self, path: Path) -> None:
        """Take up a checkpoint: afterwards everything is as it was at that step boundary.

        Raises:
            UserError: it is damaged, or its steps are cut differently.
        """
        if self.checkpoints is None:
            raise ValueError("resume_from was given without checkpoints")
        self.state.load(self.checkpoints.load(path), path)
        self.resumed_from = self._saved_step = self.step
        log.info("resumed from %s at step %d of %d", path, self.step, self.plan.total_steps)

    def _take_best(self) -> None:
        """After early stopping: put back the weights of the best evaluation."""
        if self.early.best_step in (None, self.step):
            return
        path = None if self.checkpoints is None else self.checkpoints.steps().get(self.early.best_step)
        if path is None:
            log.warning("there is no checkpoint of the best step %d: the last weights stay", self.early.best_step)
            return
        self.state.load_weights(self.checkpoints.load(path))
        log.info("weights of step %d, the best evaluation, put back", self.early.best_step)

    def close(self) -> None:
        """Let go of everything, so that the accelerator can serve another run."""
        self._host.close()
        self.engine.close()
        self.engine = self.scheduler = self.state = None
