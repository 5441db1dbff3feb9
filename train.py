"""Distil a large language model into a small one: parse -> build -> fit -> evaluate -> report.

    python train.py --batch-size 2 --epochs 1

The junction of `models/` (what is learned) and `utils/` (how it is run): everything here is assembly.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from models.config import CurriculumConfig, LossConfig, RouterConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import HEAD_TERMS, DistillationFramework
from models.language_model import vocabulary_size
from models.losses import head_passes
from models.losses.chunk_size import chunk_rows
from models.student_aware_router import ROUTER_TERMS
from models.teacher.cached import CachedTeacher, RememberingCollator
from models.teacher.frozen import FrozenTeacher
from models.text.chat_template import tokenizers_for_chat
from models.text.collate import PairCollator, count_channel, read_and_learned
from models.text.encoder_decoder import make_encoder
from models.text.vocabulary import VocabularyMap
from models.text.windows import SIDES, ModelFacts, PairEncoder
from utils.advice import advice
from utils.config import command_line, resume_rules
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
from utils.data import documents, loader
from utils.data import windows as windows_module
from utils.data.batch_order import permutation
from utils.errors import UserError, value_errors_are_the_users
from utils.evaluation import exported, lm_eval_tasks
from utils.evaluation.held_out import HeldOut, TextStart, metrics_of
from utils.forecast import batch_size, model_size
from utils.forecast import disk as forecast
from utils.logs.console import setup_logging
from utils.logs.lines import learned_lines
from utils.logs.progress import Progress
from utils.logs.step_logger import StepLogger
from utils.logs.streams import make_streams_safe
from utils.logs.trackers import Tracking
from utils.machine import hardware, kernels
from utils.machine.stop_signals import StopSignal
from utils.parallel.accelerator import build_accelerator
from utils.parallel.processes import main_process_first, on_main_process, rank
from utils.paths import user_path
from utils.pretrained import families
from utils.pretrained import loading as pretrained
from utils.pretrained import precision as precision_module
from utils.pretrained import student as students
from utils.pretrained import teacher as teachers
from utils.report import report
from utils.report.comparison import compare
from utils.run import export as export_module
from utils.run import folder as run_folder
from utils.run import quickstart, requirements, upload
from utils.run.exit_codes import EXIT_CODES, Interrupted, exit_code
from utils.run_layout import CHECKPOINTS, METRICS, REPORT_HTML, START, STUDENT, WITHOUT_TEACHER
from utils.seeding import deterministic_kernels
from utils.teacher_cache import conversation_date
from utils.teacher_cache.building import CacheBuilding, cache_statistics, flush_cache, open_teacher_cache
from utils.teacher_cache.store import TeacherCache
from utils.training import dry_run
from utils.training.checkpoint_files import step_of
from utils.training.checkpoints import CheckpointStore
from utils.training.loop import FitResult, fit
from utils.training.options import LoopOptions
from utils.training.plan import Plan
from utils.training.red_flags import RedFlags

log = logging.getLogger("train")

LM_ALONE = CurriculumConfig(kd=Term(0.0), lm=Term(1.0))
CHANNEL_WINDOWS = 2000
"""Windows on which the counted channel (loss.correction: channel) is counted."""


# ------------------------------------------------------------------------------------- configuration


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


configure = partial(command_line.configure, RunConfig)
"""argv -> the configuration a command line asks for, and which recipe it starts from and why."""


# ------------------------------------------------------------------------------------------ building


@dataclass(frozen=True)
class Job:
    """What training and evaluation work with."""

    config: RunConfig
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    """Of the student."""
    vocabulary: VocabularyMap
    collate: PairCollator | RememberingCollator
    windows: Dataset
    """To train on."""
    held_out: HeldOut
    fingerprint: dict[str, Any]
    """What a checkpoint must have been made from to be continued."""
    teacher_device: torch.device
    teacher_dtype: hardware.Choice[torch.dtype]
    cache: TeacherCache | None = None
    """Of what the teacher says."""
    needed: batch_size.Forecast = field(default_factory=batch_size.Forecast)


@dataclass(frozen=True)
class Pair:
    """What is known of student and teacher without their weights, by role."""

    tokenizers: dict[str, PreTrainedTokenizerBase]
    shapes: dict[str, PretrainedConfig]
    starts: tuple[int, int] | None
    """Tokens that the decoders of encoder-decoder models start with; None for causal models."""

    @property
    def rows(self) -> tuple[int, int]:
        """Return the rows of both heads."""
        return tuple(self.shapes[side].get_text_config().vocab_size for side in SIDES)


@dataclass(frozen=True)
class Material:
    """Text as both models read it."""

    corpus: documents.Corpus
    tokenizers: dict[str, PreTrainedTokenizerBase]
    """As the text needs them: for conversations with a chat template, and with the end of a turn as end of text."""
    encoder: PairEncoder
    vocabulary: VocabularyMap
    windows: Dataset
    held_out: Dataset


def prepare(config: RunConfig, accelerator: Accelerator, today: date | None = None) -> Job:
    """Tokenizers, text, windows and the vocabulary map: all that can fail cheaply, before the models.

    Args:
        today: the day for chat templates that write it; None: that of its checkpoints or cache, see
            `utils.teacher_cache.conversation_date`.
    """
    teacher_device = teachers.choose_teacher_device(config, accelerator)
    pair = load_pair(config)
    router = config.router if config.curriculum.used() & {*ROUTER_TERMS} else None
    require_widths_and_disk(config, pair, router)

    material = read_material(config, pair, today)
    encoder, vocabulary = material.encoder, material.vocabulary
    if config.loss.correction == "channel":
        chosen = permutation(len(material.windows), 0, 0)[:CHANNEL_WINDOWS].tolist()
        vocabulary = vocabulary.with_channel(count_channel([material.windows[i] for i in chosen]))

    # the windows that are measured are drawn once, so that every evaluation of every run has the same
    measured = sorted(permutation(len(material.held_out), 0, 0)[: config.evaluation.max_windows].tolist())
    held_out = material.held_out.select(measured)
    collate = PairCollator(vocabulary, encoder.end_of_text, config.loss.max_depth, router)
    identity = {
        **resume_rules.identity(to_plain(config)),
        "training_text": documents.corpus_fingerprint(material.corpus.train),
        "held_out_windows": windows_module.windows_fingerprint(held_out),
        "tokenizers_and_length": encoder.fingerprint,
        "mixed_precision": accelerator.mixed_precision,
    }
    if encoder.day is not None:
        identity[conversation_date.IDENTITY] = str(encoder.day)

    return Job(
        config=config,
        accelerator=accelerator,
        tokenizer=material.tokenizers["student"],
        vocabulary=vocabulary,
        collate=collate,
        windows=material.windows,
        held_out=HeldOut(
            config.evaluation,
            accelerator,
            held_out,
            material.corpus.eval,
            collate,
            material.tokenizers,
            config.training.batch_size,
            prompt=encoder.prompt,
            starts=text_starts(config, encoder),
            together=config.teacher.device == teachers.SHARDED,
        ),
        fingerprint=identity,
        teacher_device=teacher_device,
        teacher_dtype=precision_module.frozen_dtype(config.teacher.dtype, teacher_device, accelerator.mixed_precision),
    )


def load_pair(config: RunConfig) -> Pair:
    """Load tokenizers and configurations; a run without a teacher has the student's for both."""
    names = {"student": config.student.name, "teacher": config.teacher.name or config.student.name}
    students.check(config.student)
    tokenizers = pretrained.load_each(pretrained.load_tokenizer, names)
    shapes = pretrained.load_each(pretrained.load_config, names)
    pair = Pair(tokenizers, shapes, families.decoder_starts(config, shapes))

    for role, rows in zip(SIDES, pair.rows, strict=True):
        log.info("%s %s: vocabulary %s, tokenizer %s", role, names[role], f"{rows:,}", f"{len(tokenizers[role]):,}")
    return pair


def require_widths_and_disk(config: RunConfig, pair: Pair, router: RouterConfig | None) -> None:
    """Refuse heads of the router that do not divide the models' widths, and a disk that is too full."""
    widths = {role: shape.get_text_config().hidden_size for role, shape in pair.shapes.items()}
    if router is not None:
        with value_errors_are_the_users():
            router.check_widths(**widths)

    with advice("forecast of disk"):
        runs = 1 + config.evaluation.without_teacher
        student = model_size.Shape.of(pair.shapes["student"])
        disk = forecast.disk(student, config.training, config.student.lora, runs=runs)
        forecast.require_disk(Path(config.output_dir), disk)


def read_material(config: RunConfig, pair: Pair, today: date | None) -> Material:
    """Read the text and cut it into windows; what of it is left out, or looks wrong, is logged."""
    length = pretrained.window_length(config.data.max_length, pair.shapes.values())
    with value_errors_are_the_users(), documents.errors_name_their_document(config.data):
        corpus = documents.load_documents(config.data)
        tokenizers = pair.tokenizers
        if corpus.conversations and pair.starts is None:
            tokenizers, lacking = tokenizers_for_chat(tokenizers)
            for what in lacking:
                log.warning("%s", what)

        both = tuple(tokenizers[side] for side in SIDES)
        encoder = make_encoder(
            both,
            length,
            conversations=corpus.conversations,
            learn_from=config.data.learn_from,
            starts=pair.starts,
            today=today or conversation_date.choose(config).day,
            facts=ModelFacts(pair.rows, (config.student.text_start, config.teacher.text_start)),
        )
        for note in encoder.notes(corpus.train):
            log.warning("%s", note)
        vocabulary = VocabularyMap.build(*both, *pair.rows, cache_dir=quickstart.cache_dir() / "vocabularies")

        room = windows_module.Room(length, encoder.least_length)
        workers = config.data.num_workers or None
        packing = {"encode": encoder.windows, "fingerprint": encoder.fingerprint, "num_proc": workers, "room": room}
        windows = windows_module.make_windows(corpus.train, kind="training", **packing)
        held_out = windows_module.make_windows(corpus.eval, kind="held-out", **packing)

    for side, table in zip(SIDES, encoder.tables, strict=True):
        if table.beyond_rows:
            left_out = ", ".join(table.beyond_rows)
            log.info("%s: no row of its head for %s, which no text yields: left out", side, left_out)
    log.info("documents: %s", ", ".join(f"{name} {count:,}" for name, count in corpus.report.items()))
    for kind, texts, cut in (("training", corpus.train, windows), ("held-out", corpus.eval, held_out)):
        windows_module.warn_of_left_out(cut, kind)
        windows_module.warn_of_missing(config.data, kind, texts, cut, room)
    documents.warn_of_long_documents(corpus, windows, held_out)
    return Material(corpus, tokenizers, encoder, vocabulary, windows, held_out)


def text_starts(config: RunConfig, encoder: PairEncoder) -> dict[str, TextStart]:
    """What each model reads before a text, and behind which tokens it is worth measuring a plain one."""
    starts = {}
    for side, table, ids in zip(SIDES, encoder.tables, encoder.starts, strict=True):
        is_untrained = side == "student" and config.student.init == "random"
        is_plain = encoder.prompt is None
        candidates = table.start_candidates if is_plain and not is_untrained else ()
        starts[side] = TextStart(ids, candidates)
    return starts


def learned_from(job: Job) -> list[str]:
    """One example of what is learned from, decoded."""
    return learned_lines(*read_and_learned(job.windows[0]), job.tokenizer.decode)


def cached_teacher(job: Job, stop: StopSignal) -> CachedTeacher:
    """The teacher behind its cache; loaded for what the cache lacks and for hidden states, else not at all."""
    building, whole = CacheBuilding.of(job), job.config.cache.build_only
    if not building.needs_teacher(set() if whole else job.config.curriculum.used() & {*ROUTER_TERMS}):
        return CachedTeacher(None, job.cache)
    teacher = CachedTeacher(load_teacher(job), job.cache)
    if reason := building.build(teacher, job.collate, whole, stop):
        raise Interrupted(reason)
    return teacher


def load_teacher(job: Job) -> FrozenTeacher | None:
    """The frozen teacher where it computes, or None if the run has none."""
    config = job.config.teacher
    if config.name is None:
        return None
    if job.config.student.init == "random" and not job.config.curriculum.used() & {*ROUTER_TERMS}:
        log.info(students.RANDOM_HINT)
    model = teachers.load(job)
    with value_errors_are_the_users():
        return FrozenTeacher(model, job.vocabulary)


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Trained:
    """A student after training."""

    framework: DistillationFramework
    result: FitResult
    start: dict[str, Any]
    """Teacher and untrained student on the held-out text."""


def train_student(
    job: Job,
    teacher: FrozenTeacher | CachedTeacher | None,
    curriculum: CurriculumConfig,
    output: Path,
    stop: StopSignal,
    resume: str = "auto",
) -> Trained:
    """Train a fresh student under a curriculum in the folder `output`, or continue there.

    Raises:
        Interrupted: by a signal; a checkpoint is saved.
    """
    config, accelerator = job.config, job.accelerator
    plan = Plan.of(config.training, len(job.windows), accelerator.num_processes)
    student = students.make(config.student, config.training, accelerator)
    made_from = {"student": pretrained.fingerprint(student, values=config.student.init == "pretrained")}
    measure_teacher = None
    if teacher is not None and job.cache is None:
        made_from["teacher"] = pretrained.fingerprint(teacher.model)
        measure_teacher = partial(job.held_out.measure, teacher.model, "teacher")
    elif teacher is not None:
        made_from["teacher"] = {**job.cache.identity, **job.cache.settings}
        measure_teacher = partial(job.cache.evaluation, job.held_out.fingerprint())
    made_from = {**job.fingerprint, **made_from}
    store = CheckpointStore(output / CHECKPOINTS, config.training.keep_checkpoints, made_from, config.resume_changed)
    resume_from = on_main_process(accelerator, lambda: store.resume_point(resume))
    done = 0 if resume_from is None else step_of(resume_from)
    every, main = config.logging.every, accelerator.is_main_process
    tracker = Tracking(accelerator, output, to_plain(config), done) if main and config.logging.track else None
    progress = Progress(plan.total_steps, done, deadline=stop.deadline)
    logger = StepLogger(output, plan.total_steps, every, main_process=main, tracker=tracker, progress=progress)
    if resume_from is None and main:
        logger.truncate_after(-1)
        (output / START).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    log.info("student's head: %s", chunk_rows(vocabulary_size(student), accelerator.device)[1])
    with value_errors_are_the_users():
        log.info("its elementwise work: %s", head_passes.choose(config.loss.head_passes, accelerator.device)[1])
    with value_errors_are_the_users():
        scheduler = CurriculumScheduler(curriculum, config.loss, plan.total_steps)
        framework = DistillationFramework(student, teacher, job.vocabulary, config.loss, scheduler, config.router)
        if resume_from is None and framework.router is not None:
            shape = (config.router.calibration_windows, config.training.batch_size, config.training.seed)
            batches = loader.some_batches(job.windows, job.collate, *shape)
            framework.calibrate([batch.to(accelerator.device) for batch in batches])
    if resume_from is None:  # else all of this was done before, and cannot be seen in the weights
        [batch] = loader.some_batches(job.windows, job.collate, 1, 1, config.training.seed)
        dry_run.try_modes(framework, student, batch, accelerator, compares=teacher is not None)
        on_main_process(accelerator, store.rehearse)
    forced_bos = job.held_out.starts["student"].forced_bos
    export_module.rehearse_export(student, config.student, job.tokenizer, forced_bos)
    start = job.held_out.measure_start(student, measure_teacher, output)

    def evaluate(step: int) -> dict[str, Any]:
        scores = job.held_out.score(student, "student")
        return {"step": step, "split": "eval", **scores, **job.held_out.routing(student, framework.routing)}

    if resume_from is None:
        logger.evaluation({"step": 0, "split": "eval", **metrics_of(start["initial_student"])})
    result = fit(
        framework,
        job.windows,
        job.collate,
        config.training,
        accelerator=accelerator,
        options=LoopOptions(
            logger=logger,
            evaluate=evaluate,
            evaluate_every=config.evaluation.every,
            checkpoints=store,
            resume_from=resume_from,
            flags=RedFlags.of_run(plan.total_steps, config.training.warmup_ratio, student, start, main=main),
            stop=stop,
            num_workers=config.data.num_workers,
            term_gradients=config.logging.term_gradients,
            forecast=job.needed.told,
            before_checkpoint=partial(flush_cache, job),
            prefetch_teacher=framework.ask if teacher is not None and teachers.is_asked_ahead(config) else None,
            forward_communicates=teacher is not None and config.teacher.device == teachers.SHARDED,
        ),
    )
    if result.resumed_from == result.steps and result.stopped_by in ("finished", "early_stopping"):
        of = f"{result.steps} of {plan.total_steps} steps"
        log.info("this run is already finished (%s); another --output-dir starts a new one", of)
    was_evaluated = on_main_process(accelerator, lambda: logger.has_evaluation(result.steps))
    if result.stopped_by not in EXIT_CODES and not was_evaluated:
        logger.evaluation(evaluate(result.steps))
    logger.close()
    if result.stopped_by in EXIT_CODES:
        raise Interrupted(result.stopped_by)
    return Trained(framework, result, start)


def export(job: Job, asked: RunConfig, trained: Trained, output: Path) -> dict[str, Any]:
    """Export the student and write the report; returns its results. `asked`: with the names that the user gave."""
    student, result, held_out = trained.framework.student, trained.result, job.held_out
    ended = {"steps": result.steps, "seconds": round(result.seconds, 1), "stopped_by": result.stopped_by}
    folder, settings, config = output / STUDENT, to_plain(asked), job.config.student
    forced_bos = held_out.starts["student"].forced_bos
    scores = held_out.scores(student, trained.start)

    # before everything that could still fail: what was trained for hours is on the disk then
    def write_student() -> exported.LoadedAnew:
        results = {**scores, "run": ended}
        export_module.export(student, config, job.tokenizer, folder, settings, results, forced_bos)
        return exported.load_anew(student, held_out, folder, config)

    loaded = on_main_process(job.accelerator, write_student)
    results = held_out.results(student, trained.start, scores, trained.framework.compare)
    results["run"] = {**ended, "loss_difference_loaded_anew": loaded.difference}

    def write_report() -> None:
        export_module.describe(folder, settings, results)
        report.write_report(output, results)
        loaded.require()  # once the report has its warning

    on_main_process(job.accelerator, write_report)
    return results


def compare_without_teacher(
    job: Job, trained: Trained, results: dict[str, Any], output: Path, stop: StopSignal
) -> dict[str, Any]:
    """Train the same student without the teacher, and add it to the report if it was trained for as many steps."""
    log.info("for comparison: the same student, batches and steps with the LM term alone, without the teacher")
    folder, steps = output / WITHOUT_TEACHER, trained.result.steps
    folder.mkdir(exist_ok=True)
    without = train_student(job, None, LM_ALONE, folder, stop)
    if without.result.steps != steps:
        told = f"{without.result.stopped_by} after {without.result.steps} steps, and with the teacher after {steps}"
        log.warning("no comparison: without the teacher training ended by %s", told)
        return results
    results = job.held_out.with_baseline(results, without.framework.student)
    if job.accelerator.is_main_process:
        report.write_report(output, results, baseline_metrics=folder / METRICS)
    return results


def add_tasks(
    job: Job, trained: Trained, teacher: FrozenTeacher | CachedTeacher | None, results: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Measure the tasks that were asked for, in this process, and add them to the report."""
    config = job.config
    models: dict[str, Callable[[], nn.Module]] = {"student": lambda: trained.framework.student}
    if teacher is not None and config.teacher.device != teachers.SHARDED:  # no other process computes with this one
        loaded = teacher.teacher if isinstance(teacher, CachedTeacher) else teacher
        models["teacher"] = lambda: (loaded or load_teacher(job)).model
    if config.student.init == "pretrained":
        models["initial_student"] = lambda: students.make(config.student, config.training, job.accelerator)
    if tasks := lm_eval_tasks.measure(job.held_out, models):
        results = {**results, "tasks": tasks}
        baseline = output / WITHOUT_TEACHER / METRICS if "baseline" in results else None
        report.write_report(output, results, baseline_metrics=baseline)
    return results


# ------------------------------------------------------------------------------------------- the run


def run(config: RunConfig, recipe: str, stop: StopSignal) -> str:
    """One run from its configuration to its report; returns what ended it (`stop_signals.STOP_REASONS`).

    Raises:
        UserError: a mistake in what was asked for, found as early as it can be.
        Interrupted: by a signal.
    """
    output, asked = Path(config.output_dir), config
    allocator = hardware.configure_allocator()
    device = hardware.choose_device()
    # one process starts a Python on each GPU, not each process; where it fails, its launcher ends the others
    if rank() == 0 and (remedy := kernels.check_kernels()):
        raise UserError(remedy)
    requirements.check(config, device.value)
    precision = hardware.choose_precision(config.training.mixed_precision, device.value)
    cpu, track = device.value.type == "cpu", config.logging.track
    accelerator = build_accelerator(precision.value, cpu=cpu, track=track, folder=output)
    on_main_process(accelerator, lambda: run_folder.check(output, to_plain(asked), asked.resume))
    on_main_process(accelerator, lambda: CheckpointStore(output / CHECKPOINTS).check_path(asked.resume))
    on_main_process(accelerator, lambda: upload.check(config.hub, output / STUDENT))
    setup_logging(output, main_process=accelerator.is_main_process)
    log.info("%s", recipe)
    notes = {"recipe": recipe, "device": f"{device.value}: {device.reason}", "mixed precision": precision.reason}
    backend = hardware.configure_backends(device.value)
    if allocator is not None and device.value.type == "cuda":
        backend.append(allocator)
    notes |= {"backend": "; ".join(backend) or "defaults"}
    log.info("device %s: %s; mixed precision %s: %s", device.value, device.reason, precision.value, precision.reason)
    config = _with_quickstart(config, accelerator, stop)
    setup_logging(output, main_process=accelerator.is_main_process)  # a quickstart teacher had the log meanwhile
    config, needed = batch_size.choose_batch_size(config, accelerator, chunk_rows)
    today = on_main_process(accelerator, lambda: conversation_date.choose(config))
    job = replace(main_process_first(accelerator, lambda: prepare(config, accelerator, today.day)), needed=needed)
    if conversation_date.IDENTITY in job.fingerprint:
        notes |= {"conversation date": f"{today.day}: {today.reason}"}
        log.info("a chat template writes the date: for this run it is always %s, %s", *today)
    used_here = teachers.gpus_used(config, accelerator.device, job.teacher_device)
    if unused := hardware.unused_gpus(accelerator.num_processes, used_here):
        log.warning(unused)
    if config.teacher.name is not None:
        with advice("figure of the coverage"):
            job.held_out.log_coverage()
    job.held_out.log_unspelt(SIDES if config.teacher.name is not None else ("student",))
    with advice("example of what is learned from"):
        for line in learned_from(job):
            log.info("%s", line)
    if accelerator.is_main_process:
        run_folder.write_config(output, to_plain(asked), notes)
    if (reason := on_main_process(accelerator, stop.requested)) in EXIT_CODES:
        raise Interrupted(reason)
    without_cache, job = job, open_teacher_cache(job, RememberingCollator)
    teacher = load_teacher(job) if job.cache is None else cached_teacher(job, stop)
    if config.cache.build_only:
        log.info("teacher cache %s is complete: %s", config.cache.folder, cache_statistics(job))
        return "finished"
    trained = train_student(job, teacher, config.curriculum, output, stop, config.resume)
    if job.cache is not None:
        log.info("teacher cache: %s", cache_statistics(job))
    # what had to be halved in training is no larger in the evaluation after it
    job = replace(job, held_out=replace(job.held_out, batch_size=trained.result.micro_batch))
    results = export(job, asked, trained, output)  # before the comparison, so that a kill there loses nothing

    end_asked = on_main_process(accelerator, stop.requested)
    in_time, main = end_asked is None, accelerator.is_main_process
    is_cut_short = not in_time and bool(config.evaluation.without_teacher or config.evaluation.tasks)
    if is_cut_short:
        log.warning(
            "the run was asked to end: the comparison without the teacher, and tasks, are left to the same command"
        )

    if config.evaluation.without_teacher and in_time:
        results = compare_without_teacher(without_cache, trained, results, output, stop)
    if config.evaluation.tasks and in_time and main:  # last: no other process waits for this one
        results = add_tasks(job, trained, teacher, results, output)
    if main:
        export_module.describe(output / STUDENT, to_plain(asked), results)
        upload.push(config.hub, output / STUDENT)
        report.print_summary(results)
        log.info("student: %s; report: %s", output / STUDENT, output / REPORT_HTML)

    if is_cut_short and end_asked in EXIT_CODES:
        raise Interrupted(end_asked)
    return trained.result.stopped_by


def _with_quickstart(config: RunConfig, accelerator: Accelerator, stop: StopSignal) -> RunConfig:
    """The configuration with paths in place of the names that stand for the embedded material."""
    if not quickstart.is_named(config):
        return config
    material = main_process_first(accelerator, quickstart.material)

    def train_teacher() -> Path:
        own, recipe = configure(
            ["--config", "quickstart_teacher", "--mixed-precision", config.training.mixed_precision, "--resume", "auto"]
        )
        folder = quickstart.teacher_folder(material, resume_rules.identity(to_plain(own)))
        if not on_main_process(accelerator, folder.is_dir):
            # a mistake in a text of the user's own is told before the minute that the teacher takes
            text = quickstart.with_paths(config, material, Path).data
            with value_errors_are_the_users(), documents.errors_name_their_document(text):
                main_process_first(accelerator, lambda: documents.load_documents(text))

            log.info("no trained teacher in the cache: training one now, about a minute")
            scratch = on_main_process(accelerator, lambda: quickstart.scratch_folder(folder))
            reason = run(replace(own, output_dir=str(scratch)), recipe, stop)
            if reason == "max_hours":
                raise Interrupted(reason)
            if accelerator.is_main_process:
                quickstart.put_into_place(scratch, folder)
            accelerator.wait_for_everyone()
        return folder

    return quickstart.with_paths(config, material, train_teacher)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    started = time.monotonic()
    make_streams_safe()
    main_process = rank() == 0
    setup_logging(None, main_process=main_process)

    def command() -> None:
        words = sys.argv[1:] if argv is None else argv
        if (asked := command_line.parse(words)).compare:
            return compare(asked.compare, user_path(asked.values.get("output_dir", ".")))
        config, recipe = configure(words)
        run_folder.refuse_sources(Path(config.output_dir), to_plain(config))  # before the folder gets its lock
        folder = run_folder.locked_run_folder(config.output_dir) if main_process else nullcontext()
        deterministic = deterministic_kernels(config.training.deterministic)
        with StopSignal(config.training.max_hours, started) as stop, folder, deterministic:
            run(config, recipe, stop)

    return exit_code(command)


if __name__ == "__main__":
    sys.exit(main())
