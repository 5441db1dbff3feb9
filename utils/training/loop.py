"""The loop: optimizer steps on accelerate, over any module with the step protocol.

    module(batch, step, counts=..., measure=...) -> output with
        .loss       scalar tensor: sum over terms of weight * sum / counts[term]
        .terms      {name: object with .sum (scalar tensor) and .count (int)}
        .weights    {name: float}      .scalars    {name: float}
    With term_graphs=True (only where `fit` got `term_gradients`) every .sum of a term with a weight has a graph.
    module.couples_windows: bool, a term compares the windows of a forward with one another, over all processes
    module.curriculum, where there is one: with its .uses_statistics every forward gets statistics={name: float}, of
        the steps before, for its .balance and sample weights (`step_statistics`)
batch: .counts {name: int}, .labels, .documents, .to(device, non_blocking=...), and .without_anchors() where a batch
    that only keeps other processes company must differ from one that is learned from

A step is numbered by how many were done before it: the module sees 0 .. N-1, records and checkpoints carry
1 .. N. Everything random in it is a function of (seed, step, micro-batch, process), and the data order one of
(seed, epoch): what a run computes depends neither on how often it is interrupted, nor logged, nor evaluated.
How the gradient of a step is made of its micro-batches: `gradient`.
"""

import logging
import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..advice import advice
from ..config.settings import TrainingConfig
from ..data.batch_source import BatchSource, OwnWindows, StepBatches, with_signals
from ..errors import RunError, TeacherGone, UserError
from ..interfaces import Batch
from ..logs.step_logger import StepLogger
from ..machine import device_memory, hardware
from ..machine.stop_signals import STOP_REASONS, Interrupted
from ..on_policy.rounds import Rounds
from ..parallel.accelerator import accelerator_for, engine_kind
from ..parallel.processes import on_main_process
from ..seeding import preserve_rng_and_mode
from .early_stopping import EarlyStopping
from .gradient import StepGradient, StepWork
from .measurements import Clock, HostSum, IntervalMeans, StepSums, TermGradients, supervised_tokens
from .optimizer import build_optimizer, build_scheduler, taught_parameters
from .options import LoopOptions
from .out_of_memory import OutOfMemory, explain_out_of_memory, halve_micro_batches
from .plan import Plan
from .state import RunState
from .step_guard import StepGuard
from .step_statistics import StepStatistics

log = logging.getLogger(__name__)

MUCH_WAITING = 5.0
"""Per cent of a session's time spent waiting for batches from which the console says so: more workers may help."""

_STEP_PROTOCOL = "a DistillationFramework, or another module with the step protocol"


@dataclass(frozen=True)
class FitResult:
    """The end of a run."""

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
    """Steps done at the checkpoint that was continued."""
    skipped_steps: int = 0
    """Steps not taken because loss or gradient were not finite."""
    loss_spikes: int = 0
    micro_batch: int = 0
    """Windows of a forward pass at the end: fewer than at the start where those did not fit into memory."""


def fit(
    module: nn.Module,
    dataset: Sequence[Any],
    collate: Callable[[list[Any]], Batch],
    config: TrainingConfig,
    *,
    accelerator: Accelerator | None = None,
    options: LoopOptions | None = None,
) -> FitResult:
    """Train `module` on `dataset` for the steps that `Plan.of(config, len(dataset), processes)` says.

    Args:
        module: see the step protocol above; its `state_dict()` is what checkpoints hold.
        dataset: windows by index.
        collate: list of windows -> batch.
        accelerator: from `build_accelerator`. Nothing may be prepared with it while the loop runs. None: one for this
            machine, in the precision of `config`.
        options: what is done beside training; None: steps are logged on the console, nothing else.

    Raises:
        TypeError: an argument of another kind.
        UserError: no windows, nothing to train, a batch size that is not known yet, or a checkpoint of another plan.
        RunError: loss or gradient were not finite `step_guard.MOST_SKIPPED` times in a row (a checkpoint is saved), or
            a checkpoint could not be written.
        OutOfMemory: also in micro-batches of one window.
    """
    options = LoopOptions() if options is None else options
    if not isinstance(options, LoopOptions):
        raise TypeError(f"options: got a {type(options).__name__}, expected LoopOptions(...), or None")
    _check_arguments(module, dataset, collate, config, accelerator)
    if accelerator is None:
        accelerator = accelerator_for(config.mixed_precision)
    if engine_kind(accelerator).sharded:
        _check_sharded(module, options)
    _check_companions(getattr(module, "curriculum", None), options)
    if not len(dataset):
        raise UserError("got 0 training windows, expected at least 1. Give more text, or a smaller data.max_length.")

    loop = TrainingLoop(
        module=module,
        dataset=dataset,
        collate=collate,
        config=config,
        accelerator=accelerator,
        options=options,
    )
    try:
        with explain_out_of_memory(options.forecast):
            loop.resume()
            return loop.run()
    finally:
        loop.close()


def _check_companions(curriculum: Any, options: LoopOptions) -> None:
    """Refuse schedules of which the options lack what follows them.

    Raises:
        UserError: with what is lacking.
    """
    if options.rounds is None and getattr(curriculum, "uses_own_text", False):
        raise UserError(
            "curriculum.on_policy: got a share above 0 and nothing that writes, expected LoopOptions(rounds=...) with "
            "utils.on_policy.rounds.Rounds; or leave it at 0."
        )
    if options.pacing is None and getattr(curriculum, "opens_text", False):
        raise UserError(
            "curriculum.open_text: got a share below 1 and no windows by difficulty, expected LoopOptions(pacing=...) "
            "with utils.data.batch_order.Pacing; or leave it at 1."
        )


def _check_sharded(module: nn.Module, options: LoopOptions) -> None:
    """Refuse what needs whole weights in a run that shards them.

    Raises:
        UserError: with the setting.
    """
    needs = {
        "logging.term_gradients needs whole weights": options.term_gradients,
        "curriculum.balance: gradient needs whole weights": StepStatistics(module).needs_gradients,
        "curriculum.on_policy needs whole weights to write with": options.rounds is not None,
    }
    for need, is_used in needs.items():
        if is_used:
            raise UserError(f"{need}, and they are sharded: leave one of the two out.")


def _check_arguments(module: Any, dataset: Any, collate: Any, config: Any, accelerator: Any) -> None:
    """Check that the arguments of `fit` are what they are called, before anything is prepared with them."""
    kinds = {
        "module": (module, nn.Module, _STEP_PROTOCOL),
        "dataset": (dataset, Sized, "windows by index, such as the list that PairEncoder.windows returns"),
        "collate": (collate, Callable, "a function that makes a batch of windows, such as a PairCollator"),
        "config": (config, TrainingConfig, "a TrainingConfig"),
        "accelerator": (
            accelerator,
            Accelerator | None,
            "an Accelerator, from build_accelerator",
        ),
    }
    for name, (value, kind, expected) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got a {type(value).__name__}, expected {expected}")

    # Text and mappings have a length too, and would be read letter by letter, or by key.
    if isinstance(dataset, str | Mapping):
        raise TypeError(f"dataset: got a {type(dataset).__name__}, expected {kinds['dataset'][2]}")

    if not hasattr(module, "couples_windows"):
        raise TypeError(f"module: got a {type(module).__name__} without couples_windows, expected {_STEP_PROTOCOL}")

    if config.batch_size == "auto":
        raise UserError(
            "batch_size: got auto, expected a number: what fits into memory is found before training, by "
            "choose_batch_size in train.py. Give a TrainingConfig with the number of windows of a "
            "forward pass."
        )


class TrainingLoop:
    """One run of `fit`, whose arguments it takes.

    A step can be watched from outside through `advance` (a whole step) and `update` (its gradient, just before it is
    used).

    Attributes:
        step: optimizer steps done.
        plan: how windows become steps; its micro-batches shrink where they do not fit into memory.
        engine: the module as it is trained.
        logger: says which steps are logged.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        dataset: Sequence[Any],
        collate: Callable[[list[Any]], Batch],
        config: TrainingConfig,
        accelerator: Accelerator,
        options: LoopOptions,
    ) -> None:
        self.module = module
        self.config = config
        self.accelerator = accelerator
        self.options = options
        windows = 0 if options.stream is not None else len(dataset)
        self.plan = Plan.of(config, windows, accelerator.num_processes)
        self.logger = options.logger or _console_logger(self.plan.total_steps, accelerator)
        self.flags = options.flags  # None from the moment on at which looking for them fails

        self.evaluation: dict[str, Any] | None = None
        self.resumed_from: int | None = None
        self._saved_step: int | None = None

        self._prepare()

        # All processes must add up the same terms: those of any batch.
        self._host = HostSum(accelerator, sorted(collate([dataset[0]]).counts))
        self._source = BatchSource(
            dataset,
            collate,
            seed=config.seed,
            rank=accelerator.process_index,
            device=accelerator.device,
            num_workers=options.num_workers,
            after_epoch=options.before_checkpoint,
            pacing=options.pacing,
        )
        self._gradient = StepGradient(
            self.engine,
            accelerator,
            self._source,
            guard=self.guard,
            host=self._host,
            forward_communicates=options.forward_communicates or self.engine.sharded or module.couples_windows,
            check=options.check,
        )

    def _prepare(self) -> None:
        """Give module and optimizer to accelerate, and gather what a checkpoint holds."""
        accelerator = self.accelerator
        accelerator.gradient_accumulation_steps = 1  # `accelerate launch` may have set it; the loop counts itself

        # With fp16 the scaler must decide on the host whether to step: accelerate cannot see it on the device.
        scaler = accelerator.scaler
        self.engine = engine_kind(accelerator)(self.module, accelerator)
        optimizer = build_optimizer(self.engine.twin, self.config, fused=scaler is None)
        self.scheduler = build_scheduler(optimizer, self.config, self.plan.total_steps)
        self._taught = taught_parameters(optimizer.param_groups)
        self.engine.wrap(optimizer)

        # An accelerator that served another run before has its scale.
        if scaler is not None:
            scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())

        self.early = EarlyStopping(self.config.patience)
        self._clock = Clock()
        self._means = IntervalMeans()
        total = partial(accelerator.reduce, reduction="sum")
        self.guard = StepGuard(total, gather_object, scaled=scaler is not None)
        self.statistics = StepStatistics(self.module)
        self.state = RunState(
            engine=self.engine,
            scheduler=self.scheduler,
            scaler=scaler,
            plan=self.plan,
            early=self.early,
            guard=self.guard,
            flags=self.flags,
            clock=self._clock,
            means=self._means,
            statistics=self.statistics,
            rounds=self.options.rounds,
            stream=self.options.stream,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    # --- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> FitResult:
        """Take steps until something stops the run; save at the end."""
        self.logger.truncate_after(self.step)
        if self.options.rounds is not None:
            self.options.rounds.truncate_after(self.resumed_from)
        log.info("%s%s", self.plan, f", from step {self.step}" if self.step else "")
        self.engine.model.train()
        self.logger.begin(self.step)
        reason = self._take_steps()

        # Save before anything can raise: whatever ended the run, the next session continues from here.
        self._read_device()
        self._save()
        self.engine.gather()
        self.module.to(self.accelerator.device)

        if self.guard.exhausted:
            raise RunError(self.guard.explanation(self.step))
        if reason == "early_stopping":
            self._take_best()
        self._log_end(reason)
        return self._result(reason)

    def _take_steps(self) -> str | None:
        """Take optimizer steps until there is a reason to stop; None: too many steps were not finite."""
        batches = self._batches()
        reason = None
        try:
            # The last session was stopped in the evaluation that was due where it ended.
            if self.state.awaits_evaluation:
                self._evaluate_and_save()

            while (reason := self._reason_to_stop()) is None and not self.guard.exhausted:
                if self.advance(self._clock.delivered(batches)):
                    self._at_boundary()
                else:
                    # The batches that are prepared are too large as well.
                    batches.close()
                    self._halve_micro_batches()
                    batches = self._batches()
        except Interrupted as interrupted:
            # Nothing of the step that was under way is in the weights, and the next session takes it anew.
            self._take_back()
            reason = str(interrupted)
        except TeacherGone as error:
            # Else other processes would wait for this one in the middle of their step.
            if error.in_every_process or self.accelerator.num_processes == 1:
                self._take_back()
                self._save()
            raise
        batches.close()
        return reason

    def _batches(self) -> Generator[StepBatches, None, None]:
        """Yield the batches of each step from the current one on, with the teacher's signals if it is asked ahead."""
        total = self.plan.total_steps
        if self.options.stream is not None:
            stream = self.options.stream.steps(self._source, self.plan, self.step, total)
            yield from self._with_signals(stream, total)
            return
        if self.options.rounds is None:
            yield from self._with_signals(self._source.steps(self.plan, self.step), total)
            return

        # Round by round: the student's weights at the begin of the next one are not known before.
        step = self.step
        while step < total:
            windows = self._begin_round(self.options.rounds, step)
            yield from self._with_signals(self._source.steps(self.plan, step, windows), windows.end)
            step = windows.end

    def _with_signals(self, steps: Generator[StepBatches, None, None], end: int) -> Generator[StepBatches, None, None]:
        """Return steps, up to `end`, with the teacher's signals if it is asked ahead."""
        if self.options.prefetch_teacher is None:
            return steps
        return with_signals(steps, self._ask_teacher, end)

    def _begin_round(self, rounds: Rounds, step: int) -> OwnWindows:
        """Return the windows that the student writes itself in the round of a step.

        Raises:
            Interrupted: a signal came while it wrote, or the hours were over; or its texts show that it loses itself,
                and that ends the run.
        """
        stop = self.options.stop
        ending = nullcontext() if stop is None else stop.at_once()
        with ending, self._clock.writing(), preserve_rng_and_mode(self.module), self.engine.evaluation():
            begun = rounds.begin(self.plan, step)

        if begun.record is not None:
            self.logger.own_text(begun.record)
        if begun.signs and rounds.ends_on_collapse:
            log.warning("on_policy.stop_on_collapse: training ends here, before anything of this text is learned")
            raise Interrupted("collapse")
        return begun.windows

    def _ask_teacher(self, batch: Batch, step: int) -> Any:
        return self.options.prefetch_teacher(batch, step, self.logger.due(step + 1))

    def _reason_to_stop(self) -> str | None:
        """Return why no further step is taken, one of `STOP_REASONS`, or None; the same in every process."""
        if self.step >= self.plan.total_steps:
            return "finished"
        if self.early.exhausted:
            return "early_stopping"

        # A signal may have reached only one process, and all must stop at the same step.
        stop = self.options.stop
        requested = None if stop is None else stop.requested()
        return self._host.any_of(requested, STOP_REASONS)

    def _at_boundary(self) -> None:
        """Show progress, evaluate and save between two steps, where that is due."""
        self.logger.progress(self.step)
        every = self.options.evaluate_every
        self.state.awaits_evaluation = bool(self.options.evaluate and every and self.step % every == 0)
        self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        """Evaluate and save, where that is due."""
        improved = False
        if self.state.awaits_evaluation:
            improved = self._evaluate()
            self.state.awaits_evaluation = False

        # Early stopping goes back to the best weights, so they must be on the disk.
        is_best = improved and self.config.patience
        if self.step % self.config.save_every == 0 or is_best:
            self._save()

    def _log_end(self, reason: str) -> None:
        """Log why the run ended, and whether it was the data that it waited for."""
        log.info("training ended after step %d of %d: %s", self.step, self.plan.total_steps, reason)
        waited = 100 * self._clock.waited / max(self._clock.total() - self._clock.before, 1e-9)
        workers = self.options.num_workers
        level = logging.DEBUG if waited < MUCH_WAITING else logging.INFO
        log.log(level, "%.1f %% of this session was spent waiting for batches (data.num_workers %d)", waited, workers)

    def _result(self, reason: str) -> FitResult:
        """Return the end of the run for the caller."""
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

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def advance(self, batches: StepBatches) -> bool:
        """Take one optimizer step. False, in every process: it does not fit into memory, and nothing was changed."""
        counts = self._host.sum_counts([batch.counts for batch in batches.batches])
        is_logged = self.logger.due(self.step + 1)
        sums = self._step_sums(is_logged)
        work = StepWork(batches, counts, sums, is_logged, self.statistics.options())
        if not self._gradient.add_up(work):
            return False

        # Only now: a step that is done again must not look like text that repeats itself.
        self._check_batches(batches)

        # The rate of this step, before the schedule moves on.
        lr = self.engine.optimizer.param_groups[0]["lr"]
        norm = self.engine.clip(self.config.max_grad_norm)
        self.update(norm)
        self.state.step += 1
        self._clock.tokens += int(supervised_tokens(counts))
        self._means.add(sums, counts, norm)
        self.statistics.take(sums, counts, host=self._host, accelerator=self.accelerator)

        if is_logged:
            self._log_step(sums, lr=lr, epoch=self._epochs(batches))
        # Reading waits for the device. A logged step waits anyway, and a CPU has computed everything.
        if is_logged or self.accelerator.device.type == "cpu" or self.guard.must_read:
            self.guard.read()
        if self._means.must_read:
            self._means.read(self._host)
        return True

    def _read_device(self) -> None:
        """Read what the steps since the last time have left on the device."""
        self.guard.read()
        self._means.read(self._host)

    def update(self, norm: Tensor) -> None:
        """Take the step, unless the gradient is not finite; that is decided without waiting for the device.

        Args:
            norm: scalar, of the whole gradient before clipping.
        """
        is_bad = self.guard.decide(self.step + 1, norm.detach())
        self.engine.update(is_bad)

        with warnings.catch_warnings():
            # torch takes a first step that the scaler of fp16 leaves out for a wrong order of calls
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            # also after a step that was left out, in every precision: the schedule is one over steps, as the curriculum
            self.scheduler.step()

    def _step_sums(self, is_logged: bool) -> StepSums:
        """Return what takes the sums of the step that begins."""
        if self.statistics.needs_gradients or (is_logged and self.options.term_gradients):
            return StepSums(gradients=TermGradients(self._taught))
        return StepSums()

    def _take_back(self) -> None:
        """Forget what the step under way has computed so far."""
        self.engine.forget()
        self.guard.forget()

    def _halve_micro_batches(self) -> None:
        """Take back a step that does not fit into memory, and go on in micro-batches of half the size.

        Raises:
            OutOfMemory: there is but one window in each; the steps before are saved.
        """
        self._take_back()
        device_memory.release()

        if self.plan.micro_batch == 1:
            self._save()
            raise OutOfMemory(f"out of memory in optimizer step {self.step + 1}, in micro-batches of one window")
        if self.plan.processes > 1:
            # DDP cannot take back a forward: some processes would exchange gradients that others do not have
            self.engine.wrap_again()
        self.plan = halve_micro_batches(self.plan, self.step, couples_windows=self.module.couples_windows)

    def _epochs(self, batches: StepBatches) -> float:
        """Return the epochs done behind a step; of a stream, whose length nobody knows, those that are whole."""
        return batches.epoch if self.options.stream is not None else self.step / self.plan.steps_per_epoch

    def _log_step(self, sums: StepSums, *, lr: float, epoch: float) -> None:
        """Write the record of the steps since the last one: means, and the schedules' values at the step just taken.

        Args:
            sums: of that step.
            epoch: epochs done behind it.
        """
        self._means.read(self._host)
        means = self._means.record()
        if sums.gradients is not None:
            norms = sums.gradients.norms(sums.weights, self.accelerator)
            for name in means["terms"].keys() & norms.keys():
                means["terms"][name]["grad_norm"] = norms[name]

        if self.statistics.spread is not None:
            means["sample_spread"] = self.statistics.spread
        record = {
            "step": self.step,
            "epoch": epoch,
            "progress": self.step / self.plan.total_steps,
            "loss": means.pop("loss"),
            "lr": lr,
            "grad_norm": means.pop("grad_norm"),
            "tokens_per_second": self._clock.tokens_per_second(),
            **hardware.memory_use(self.accelerator.device),
            **means,
        }
        self.logger.training(record)
        self._check_record(record)

    # --- red flags --------------------------------------------------------------------------------------------------

    def _check_batches(self, batches: StepBatches) -> None:
        """Look for red flags in a step's batches; where that fails, no more of them are looked for."""
        # While few windows are open they are meant to come again.
        if self.flags is None or self.options.pacing is not None:
            return
        flags = self.flags
        self.flags = None
        with advice("further red flags"):
            for batch in batches.batches:
                # short texts of a student may well be equal, and are no duplicates in the data
                if batch.counts.get("own"):
                    continue
                flags.batch(batch.labels, batches.epoch + 1, batch.documents)
            self.flags = flags

    def _check_record(self, record: Mapping[str, Any]) -> None:
        """Look for red flags in a record; where that fails, no more of them are looked for."""
        if self.flags is None:
            return
        flags = self.flags
        self.flags = None
        with advice("further red flags"):
            flags.check(record)
            self.flags = flags

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """Evaluate without leaving a trace in the training; True if it is the best so far."""
        with self._clock.paused(), preserve_rng_and_mode(self.module), self.engine.evaluation():
            record = self.options.evaluate(self.step)
        if record is None:
            return False

        self.evaluation = record
        self.logger.evaluation(record)
        self._check_record(record)

        improved = self.early.update(self.step, record["bits_per_byte"])
        if self.early.exhausted:
            best = math.nan if self.early.best is None else self.early.best
            log.info(
                "no better evaluation than %.4f bits per byte (step %s) in %d in a row",
                best,
                self.early.best_step,
                self.early.waited,
            )
        return improved

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint of this step boundary, once."""
        store = self.options.checkpoints
        if store is None or self._saved_step == self.step:
            return

        self.options.before_checkpoint()
        with self._clock.paused():
            self._read_device()
            parts = self.state.parts()
            best_step = self.early.best_step
            save = partial(
                store.save,
                self.step,
                tensors=parts.tensors,
                objects=parts.objects,
                state=parts.state,
                protect=[] if best_step is None else [best_step],
            )
            with self.options.writing():
                on_main_process(self.accelerator, save)
        self._saved_step = self.step

    def resume(self) -> None:
        """Take up the checkpoint `resume_from`, if there is one: everything is then as it was at that step boundary.

        Raises:
            UserError: it is damaged, or its steps are cut differently.
        """
        path = self.options.resume_from
        if path is None:
            return
        if self.options.checkpoints is None:
            raise ValueError("resume_from was given without checkpoints")

        self.state.load(self.options.checkpoints.load(path), path)
        self.resumed_from = self.step
        self._saved_step = self.step
        log.info("resumed from %s at step %d of %d", path, self.step, self.plan.total_steps)

    def _take_best(self) -> None:
        """Put back the weights of the best evaluation, after early stopping."""
        best_step = self.early.best_step
        if best_step is None or best_step == self.step:
            return

        store = self.options.checkpoints
        path = None if store is None else store.steps().get(best_step)
        if path is None:
            log.warning("there is no checkpoint of the best step %d: the last weights stay", best_step)
            return
        self.state.load_weights(store.load(path))
        log.info("weights of step %d, the best evaluation, put back", best_step)

    def close(self) -> None:
        """Let go of everything, so that the accelerator can serve another run."""
        if self.options.logger is None:
            self.logger.close()
        if self.options.stream is not None:
            self.options.stream.close()
        self._host.close()
        self.engine.close()
        self.engine = self.scheduler = self.state = self._gradient = None


def _console_logger(total_steps: int, accelerator: Accelerator) -> StepLogger:
    """Return a logger for a run without a folder."""
    return StepLogger(None, total_steps, main_process=accelerator.is_main_process)
