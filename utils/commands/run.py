"""One run, top to bottom: what `train.py` does once its command line is right; and a chat with what a run has made.

What is learned is in models/, how it is run in utils/; this module is where the two meet.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from models.distillation import Method, TeacherShare
from models.losses.chunk_size import chunk_rows
from utils.commands.settings import RunConfig, configure
from utils.config.plain import to_plain
from utils.forecast.batch_size import choose_batch_size
from utils.logs.console import setup_logging
from utils.machine.launcher import rank
from utils.machine.stop_signals import StopSignal
from utils.on_policy.sampling import Engine
from utils.pretrained.teacher import with_spare_gpu
from utils.run import chat as chat_command
from utils.run import folder as run_folder
from utils.run import quickstart, text_order
from utils.run.exit_codes import EXIT_CODES, Interrupted
from utils.run.session import Session
from utils.run.stages import (
    compare_without_teacher,
    export_student,
    finish,
    get_teacher,
    judged_by,
    log_cache,
    measure_tasks,
    prepare_run,
    train_student,
    with_teacher_cache,
)
from utils.seeding import deterministic_kernels

log = logging.getLogger("train")


def chat(words: Sequence[str]) -> None:
    """Let student and teacher of a run answer side by side; `words` are those behind `chat`."""
    chat_command.main(words, Method.chat_tokenizers)


def start(config: RunConfig, recipe: str, started: float, engine: Engine | None = None) -> None:
    """Do one run in its folder, which no other run may use meanwhile, until it is done, stopped or out of time.

    Args:
        recipe: the sentence of `configure` on where the settings come from.
        started: seconds of the monotonic clock when the command began; `training.max_hours` counts from there.
        engine: writes the student's own text; None: transformers does.
    """
    is_main = rank() == 0
    setup_logging(None, main_process=is_main)  # once more: the libraries that are loaded by now log here too

    run_folder.refuse_sources(Path(config.output_dir), to_plain(config))  # before the folder gets its lock
    folder = run_folder.locked_run_folder(config.output_dir) if is_main else nullcontext()
    deterministic = deterministic_kernels(config.training.deterministic)
    with StopSignal(config.training.max_hours, started) as stop, stop.raising(), folder, deterministic:
        run(config, recipe, stop, engine)


def run(config: RunConfig, recipe: str, stop: StopSignal, engine: Engine | None = None) -> str:
    """Do one run, from its settings to its report; return what ended it (`stop_signals.STOP_REASONS`).

    Raises:
        UserError: a mistake in what was asked for, found as early as it can be.
        Interrupted: a signal ended the run; a checkpoint is saved.
    """
    # 1. Whatever can fail cheaply fails here: machine, folder, memory, tokenizers, text.
    session = replace(Session.start(config, recipe, stop), engine=engine)
    if quickstart.is_named(config):
        config = quickstart.resolve(config, session, *quickstart_teacher(config, stop))
    config = with_teacher_device(config, session)
    config, needed = choose_batch_size(config, session.accelerator, chunk_rows)
    job = prepare_run(config, method_of(config), session, needed)
    session.write_config()
    session.raise_if_interrupted()

    # 2. The teacher: in this process, or what a cache remembers of one.
    job_without_cache, job = job, with_teacher_cache(job)
    teacher = get_teacher(job, session)
    if config.cache.build_only:
        log_cache(job, f"teacher cache {config.cache.folder} is complete")
        return "finished"
    job, job_without_cache = text_order.with_order([job, job_without_cache], teacher, session)
    job, job_without_cache = judged_by(teacher, job), judged_by(teacher, job_without_cache)

    # 3. Train, and write everything down before anything optional is done.
    trained = train_student(job, teacher, session.output, session, config.resume)
    log_cache(job, "teacher cache")
    # what had to be halved in training is no larger in the evaluation after it
    job = replace(job, held_out=replace(job.held_out, batch_size=trained.result.micro_batch))
    results = export_student(job, trained, session)

    # 4. Optional measurements, which a run that was asked to end leaves to the same command.
    reason = session.reason_to_stop()
    is_cut_short = reason is not None and bool(config.compares_without_teacher or config.evaluation.tasks)
    if is_cut_short:
        log.warning(
            "the run was asked to end: the comparison without the teacher, and tasks, are left to the same command"
        )
    if config.compares_without_teacher and reason is None:
        results = compare_without_teacher(job_without_cache, trained, results, session)
    if config.evaluation.tasks and reason is None and session.is_main:
        # last: no other process waits for this one
        results = measure_tasks(job, trained, teacher, results, session)
    finish(results, session)

    if is_cut_short and reason in EXIT_CODES:
        raise Interrupted(reason)
    return trained.result.stopped_by


def with_teacher_device(config: RunConfig, session: Session) -> RunConfig:
    """Return the settings with the GPU that the teacher gets by itself, if there is one; noted and logged."""
    accelerator = session.accelerator
    config, reason = with_spare_gpu(config, accelerator.device, accelerator.num_processes)
    if reason is not None:
        session.notes["teacher device"] = reason
        log.info("teacher on %s", reason)
    return config


def method_of(config: RunConfig) -> Method:
    """Return the settings of what is learned, in one value."""
    shares = []
    if config.mixes_teachers:
        shares = [TeacherShare(teacher.weight, tuple(teacher.routes)) for teacher in config.used_teachers]
    return Method(config.loss, config.curriculum, config.router, tuple(shares), config.mix)


def quickstart_teacher(config: RunConfig, stop: StopSignal) -> tuple:
    """Return the settings of the run that trains the quickstart's teacher, and what does that run."""
    precision = ["--mixed-precision", config.training.mixed_precision]
    settings, recipe = configure(["--config", "quickstart_teacher", *precision, "--resume", "auto"])
    return settings, partial(run, recipe=recipe, stop=stop)
