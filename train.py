"""Distil a large language model into a small one, also across tokenizers.

    python train.py --batch-size 2 --epochs 1

One run, top to bottom. What is learned is in models/, how it is run in utils/; this script is where the two meet.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from models.config import CurriculumConfig, LossConfig, RouterConfig
from models.distillation import Method
from models.distillation_framework import HEAD_TERMS
from models.losses.chunk_size import chunk_rows
from utils.config import command_line
from utils.config.contradictions import contradictions
from utils.config.plain import to_plain
from utils.config.settings import (
    CacheConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    LoggingConfig,
    ModelConfig,
    Name,
    StudentConfig,
    TrainingConfig,
)
from utils.forecast.batch_size import choose_batch_size
from utils.logs.console import setup_logging
from utils.logs.streams import make_streams_safe
from utils.machine.stop_signals import StopSignal
from utils.parallel.processes import rank
from utils.paths import user_path
from utils.report.comparison import compare
from utils.run import folder as run_folder
from utils.run import quickstart
from utils.run.exit_codes import EXIT_CODES, Interrupted, end_process, exit_code
from utils.run.session import Session
from utils.run.stages import (
    compare_without_teacher,
    export_student,
    finish,
    get_teacher,
    log_cache,
    measure_tasks,
    prepare_run,
    train_student,
    with_teacher_cache,
)
from utils.seeding import deterministic_kernels

log = logging.getLogger("train")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    teacher: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    output_dir: Name = "runs/train"
    """Folder of the run; by default runs/ and the name of the recipe."""
    resume: str = "auto"
    """auto: continue from the newest whole checkpoint in output_dir, if any; never; or a checkpoint's path."""
    resume_changed: bool = False
    """Continue although curriculum, loss, max_grad_norm or patience are no longer those of the checkpoint."""

    def __post_init__(self) -> None:
        if wrong := contradictions(self, HEAD_TERMS):
            raise ValueError("; ".join(wrong))

    @property
    def method(self) -> Method:
        """The settings of what is learned, in one value."""
        return Method(self.loss, self.curriculum, self.router)


configure = partial(command_line.configure, RunConfig)
"""argv -> the configuration a command line asks for, and which recipe it starts from and why."""


def run(config: RunConfig, recipe: str, stop: StopSignal) -> str:
    """Do one run, from its settings to its report; return what ended it (`stop_signals.STOP_REASONS`).

    Raises:
        UserError: a mistake in what was asked for, found as early as it can be.
        Interrupted: a signal ended the run; a checkpoint is saved.
    """
    # 1. Whatever can fail cheaply fails here: machine, folder, memory, tokenizers, text.
    session = Session.start(config, recipe, stop)
    if quickstart.is_named(config):
        config = quickstart.resolve(config, session, *quickstart_teacher(config, stop))
    config, needed = choose_batch_size(config, session.accelerator, chunk_rows)
    job = prepare_run(config, config.method, session, needed)
    session.write_config()
    session.raise_if_interrupted()

    # 2. The teacher: in this process, or what a cache remembers of one.
    job_without_cache, job = job, with_teacher_cache(job)
    teacher = get_teacher(job, session)
    if config.cache.build_only:
        log_cache(job, f"teacher cache {config.cache.folder} is complete")
        return "finished"

    # 3. Train, and write everything down before anything optional is done.
    trained = train_student(job, teacher, session.output, session, config.resume)
    log_cache(job, "teacher cache")
    # what had to be halved in training is no larger in the evaluation after it
    job = replace(job, held_out=replace(job.held_out, batch_size=trained.result.micro_batch))
    results = export_student(job, trained, session)

    # 4. Optional measurements, which a run that was asked to end leaves to the same command.
    reason = session.reason_to_stop()
    is_cut_short = reason is not None and bool(config.evaluation.without_teacher or config.evaluation.tasks)
    if is_cut_short:
        log.warning(
            "the run was asked to end: the comparison without the teacher, and tasks, are left to the same command"
        )
    if config.evaluation.without_teacher and reason is None:
        results = compare_without_teacher(job_without_cache, trained, results, session)
    if config.evaluation.tasks and reason is None and session.is_main:
        # last: no other process waits for this one
        results = measure_tasks(job, trained, teacher, results, session)
    finish(results, session)

    if is_cut_short and reason in EXIT_CODES:
        raise Interrupted(reason)
    return trained.result.stopped_by


def quickstart_teacher(config: RunConfig, stop: StopSignal) -> tuple:
    """Return the settings of the run that trains the quickstart's teacher, and what does that run."""
    precision = ["--mixed-precision", config.training.mixed_precision]
    settings, recipe = configure(["--config", "quickstart_teacher", *precision, "--resume", "auto"])
    return settings, partial(run, recipe=recipe, stop=stop)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks for; return its exit code."""
    started = time.monotonic()
    make_streams_safe()
    is_main = rank() == 0
    setup_logging(None, main_process=is_main)

    def command() -> None:
        words = sys.argv[1:] if argv is None else argv
        arguments = command_line.parse(words)
        if arguments.compare:
            return compare(arguments.compare, user_path(arguments.values.get("output_dir", ".")))

        config, recipe = configure(words)
        run_folder.refuse_sources(Path(config.output_dir), to_plain(config))  # before the folder gets its lock
        folder = run_folder.locked_run_folder(config.output_dir) if is_main else nullcontext()
        deterministic = deterministic_kernels(config.training.deterministic)
        with StopSignal(config.training.max_hours, started) as stop, stop.raising(), folder, deterministic:
            run(config, recipe, stop)

    return exit_code(command)


if __name__ == "__main__":
    end_process(main())
