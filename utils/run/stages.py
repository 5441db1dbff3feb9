"""The stages of a run after its preparation: the teacher, training, export, comparison, tasks."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..advice import advice
from ..captures.source import connect_captures
from ..config.plain import to_plain
from ..config.protocols import RunConfig, are_chosen_before, learns_at_some_positions, values_of
from ..data import loader
from ..data.stream.batches import Stream
from ..errors import value_errors_are_the_users
from ..evaluation import exported, lm_eval_tasks
from ..evaluation.held_out import metrics_of
from ..forecast.batch_size import Forecast
from ..interfaces import Method, Teacher, TeacherElsewhere
from ..logs.lines import learned_lines
from ..logs.step_logger import StepLogger
from ..logs.trackers import Tracking
from ..machine import hardware
from ..machine.stop_signals import Interrupted
from ..on_policy.round_files import RoundFiles
from ..on_policy.rounds import RoundMaterial, Rounds
from ..on_policy.sampling import GenerateEngine
from ..pretrained import student as students
from ..pretrained import teacher as teachers
from ..pretrained.loading import fingerprint
from ..report import report, token_views
from ..report.results import has_passed_teacher, is_better_without_teacher, worse_than_before
from ..run_layout import BLOCKS, CHECKPOINTS, METRICS, REPORT_HTML, ROUNDS, START, STUDENT, WITHOUT_TEACHER
from ..served.checks import Demand
from ..served.teacher import ListServer, connect, listed_tokens
from ..teacher_cache import conversation_date
from ..teacher_cache.building import CacheBuilding, cache_statistics, flush_cache, open_teacher_cache
from ..training import dry_run
from ..training.checkpoint_files import step_of
from ..training.checkpoints import CheckpointStore
from ..training.loop import FitResult, fit
from ..training.options import LoopOptions, do_nothing
from ..training.plan import Plan
from ..training.red_flags import RedFlags, ignore_message
from . import chosen_positions, export, several_teachers, student_layers, upload
from . import folder as run_folder
from .exit_codes import EXIT_CODES
from .expected_work import expect_training
from .prepare import Job, prepare
from .session import Session
from .shown_window import shown_window

log = logging.getLogger("train")

LIKELY_CAUSE = (
    "Likely cause: a learning rate that is too high for weights that were trained before, or a text unlike the one "
    "that is measured on. What to do: a lower --learning-rate, in another --output-dir."
)
"""Advice beside the warning of a student that got worse."""

Results = dict[str, Any]
"""The report's content; see `utils.report.results`."""


@dataclass(frozen=True)
class Trained:
    """A student after training."""

    module: Any
    """The framework that was trained."""
    result: FitResult
    start: dict[str, Any]
    """Teacher and untrained student on the held-out text."""
    rounds: Rounds | None = None
    """Texts that it wrote itself, and learned from."""
    stream: Stream | None = None
    """Where its text came from, if that was not known as a whole."""

    @property
    def student(self) -> nn.Module:
        """The trained student."""
        return self.module.student


def prepare_run(config: RunConfig, method: Method, session: Session, needed: Forecast) -> Job:
    """Prepare a run in all its processes, and log what is easily overlooked: idle GPUs, coverage, an example.

    Args:
        needed: the forecast of memory that the batch size was chosen by.
    """
    today = session.on_main(lambda: conversation_date.choose(config))
    job = session.main_first(lambda: prepare(config, method, session.accelerator, today.day))
    job = replace(job, needed=needed, held_out=replace(job.held_out, progress=session.progress))
    job = several_teachers.with_parts(job)
    if conversation_date.IDENTITY in job.fingerprint:
        session.notes["conversation date"] = f"{today.day}: {today.reason}"
        log.info("a chat template writes the date: for this run it is always %s, %s", today.day, today.reason)

    # A GPU that nobody uses is the commonest oversight on a machine with two.
    of_teachers = {part.teacher_device for part in job.parts or [job]}
    used_here = teachers.gpus_used(job.config, job.accelerator.device, of_teachers)
    if unused := hardware.unused_gpus(job.accelerator.num_processes, used_here):
        log.warning(unused)

    if job.config.student.layers is not None and not job.config.cache.build_only:
        layers = session.on_main(lambda: student_layers.choose(job, session.output))
        session.notes["student layers"] = str(layers)
        job = replace(job, layers=layers)

    if are_chosen_before(job.config):
        job = chosen_positions.choose(job, session)

    has_teacher = job.config.teacher.name is not None
    if has_teacher:
        with advice("figure of the coverage"):
            job.held_out.log_coverage()
    job.held_out.log_unspelt(("student", "teacher") if has_teacher else ("student",))
    for part in job.parts[1:]:
        part.held_out.log_unspelt(("teacher",))

    with advice("example of what is learned from"):
        for line in example_of_learning(job):
            log.info("%s", line)
    return job


def example_of_learning(job: Job) -> list[str]:
    """Return one example of what is learned from, decoded, in lines for the log."""
    read, learned = job.pair.read_and_learned(job.windows[0])
    return learned_lines(read, learned, job.tokenizer.decode)


# --------------------------------------------------------------------------------------- the teacher


def with_teacher_cache(job: Job) -> Job:
    """Return the job whose batches come with what its cache knows of them; as it is, where no cache is asked for."""
    if job.parts:
        job = several_teachers.joined(job, [with_teacher_cache(part) for part in job.parts])
    else:
        job = open_teacher_cache(job, job.pair.remember)
    # a cache decides how many outcomes of the teacher there are
    method = replace(job.method, loss=job.config.loss)
    return replace(job, method=method, pair=replace(job.pair, method=method))


def get_teacher(job: Job, session: Session) -> Teacher | None:
    """Return the teacher of a run, which may be behind a cache; None if it has none.

    A cache has no hidden states: terms that compare them need the teacher itself.

    Raises:
        Interrupted: a signal came while the cache was built.
    """
    if job.parts:
        return several_teachers.mixture(job, [get_teacher(part, session) for part in job.parts])
    if job.cache is None:
        return load_teacher(job, session.stop.check)

    # The windows of the whole run are known, and so is what the cache lacks of them.
    building = CacheBuilding.of(job)
    builds_whole_cache = job.config.cache.build_only
    states_for = set() if builds_whole_cache else job.method.state_terms
    answers_student = job.config.curriculum.uses_own_text and not builds_whole_cache
    if not building.needs_teacher(states_for, answers_student=answers_student):
        return job.pair.cached(None, job.cache)

    teacher = job.pair.cached(load_teacher(job, session.stop.check), job.cache, job.stored_share)
    with session.stop.deferring():
        reason = building.build(teacher, job.collate, builds_whole_cache, session.stop)
    if reason:
        raise Interrupted(reason)
    return teacher


def load_teacher(job: Job, check: Callable[[], None] = do_nothing) -> Teacher | None:
    """Load the frozen teacher where it computes; None if the run has none.

    Args:
        check: called while a served teacher is waited for; it raises where the run is to end.
    """
    if job.config.teacher.name is None:
        return None

    if job.config.teacher.is_served:
        return job.pair.listed(_connect(job, check))
    if job.config.teacher.is_captured:
        rows = len(job.vocabulary.segments)
        return job.pair.listed(connect_captures(job.config, rows=rows, top_k=_most_outcomes(job)))

    model = teachers.load(job)
    with value_errors_are_the_users():
        return job.pair.frozen(model)


def _connect(job: Job, check: Callable[[], None]) -> ListServer:
    """Return the lists of a served teacher, once its server was checked against what the run will ask of it."""
    config = job.config
    rows = len(job.vocabulary.segments)
    demand = Demand(
        tokenizer=job.pair.tokenizers["teacher"],
        length=job.pair.encoder.max_length,
        top_k=listed_tokens(config.served, _most_outcomes(job), rows),
    )
    return connect(config, demand, rows, check)


def _most_outcomes(job: Job) -> int:
    """Return the outcomes that are kept of a position, by the loss or by the cache."""
    return cast(int, job.config.loss.top_k if job.cache is None else job.cache.top_k)


def judged_by(teacher: Teacher | None, job: Job) -> Job:
    """Return the job with a teacher that judges what models write, where its model computes in this run."""
    running = getattr(teacher, "teacher", teacher)  # a cache may stand for one that was not loaded
    model = None if running is None else running.model
    return replace(job, held_out=replace(job.held_out, judge=model))


# ------------------------------------------------------------------------------------------ training


def train_student(
    job: Job,
    teacher: Teacher | None,
    output: Path,
    session: Session,
    resume: str = "auto",
) -> Trained:
    """Train a fresh student in the folder `output`, or continue there.

    Raises:
        Interrupted: by a signal; a checkpoint is saved.
    """
    config, accelerator = job.config, job.accelerator
    plan = Plan.of(config.training, job.window_count, accelerator.num_processes)
    student = load_student(job, session)

    # Where a run goes on decides what is written anew and what is tried before.
    store = open_checkpoints(job, teacher, student, output)
    resume_from = session.on_main(lambda: store.resume_point(resume))
    logger = open_logger(job, plan, output, session, resume_from=resume_from, has_teacher=teacher is not None)

    module = make_module(job, teacher, student, plan, is_new=resume_from is None)
    rehearse(job, module, store, session, is_new=resume_from is None, compares=teacher is not None)
    start = job.held_out.measure_start(student, teacher_measurement(job, teacher), output)

    # Step 0 of the curves; a resumed run has it in its metrics already.
    evaluate = partial(evaluation_record, job, module)
    if resume_from is None:
        logger.evaluation({**metrics_of(start["initial_student"]), "step": 0, "split": "eval", **first_sample(start)})
    options = LoopOptions(
        logger=logger,
        evaluate=evaluate,
        evaluate_every=config.evaluation.every,
        checkpoints=store,
        resume_from=resume_from,
        flags=red_flags(job, plan, student, start, session),
        pacing=job.pacing,
        rounds=make_rounds(job, module, store, output, session),
        stream=open_stream(job, plan, output, session),
        stop=session.stop,
        check=session.stop.check,
        writing=session.stop.writing,
        num_workers=config.data.num_workers,
        term_gradients=config.logging.term_gradients,
        forecast=job.needed.told,
        before_checkpoint=partial(flush_caches, job),
        prefetch_teacher=module.ask if teacher is not None and teachers.is_asked_ahead(config) else None,
        forward_communicates=teacher is not None and config.teacher.device == teachers.SHARDED,
    )
    result = _fit(job, module, plan, options, session)
    # The last step is evaluated however the run ended, unless a signal wants it gone.
    was_evaluated = session.on_main(lambda: logger.has_evaluation(result.steps))
    if result.stopped_by not in EXIT_CODES and not was_evaluated:
        logger.evaluation(evaluate(result.steps))
    logger.close()
    if result.stopped_by in EXIT_CODES:
        raise Interrupted(result.stopped_by)
    return Trained(module, result, start, options.rounds, options.stream)


def load_student(job: Job, session: Session) -> nn.Module:
    """Make the student that training starts from, while the progress says so."""
    with session.progress.over("loading the student", 1, "model file", unit="model") as note:
        student = students.make(job.config.student, job.config.training, job.accelerator, job.layers)
        note(1)
    return student


def open_stream(job: Job, plan: Plan, output: Path, session: Session) -> Stream | None:
    """Return the stream that a run reads its text from; None where all of it is known."""
    if job.stream is None:
        return None
    return Stream(
        job.stream,
        output / BLOCKS,
        accelerator=job.accelerator,
        global_batch=plan.global_batch,
        seed=job.config.training.seed,
        check=session.stop.check,
    )


def make_rounds(job: Job, module: Any, store: CheckpointStore, output: Path, session: Session) -> Rounds | None:
    """Return what lets the student write text to learn from; None where it learns from given text alone."""
    # the comparison without a teacher has a curriculum of its own
    if module.teacher is None or not job.config.curriculum.uses_own_text:
        return None

    settings = job.config.on_policy
    log.info(
        "the student writes a share of the windows itself (curriculum.on_policy): every %d steps, up to %d tokens "
        "behind the beginning of a given window; the teacher corrects them, and lm does not apply to them",
        settings.every,
        settings.new_tokens,
    )
    material = RoundMaterial(
        pair=job.pair,
        windows=job.windows,
        collate=job.collate,
        module=module,
        share=module.curriculum.on_policy,
        pacing=job.pacing,
        seed=job.config.training.seed,
        accelerator=job.accelerator,
    )
    return Rounds(
        settings,
        material,
        engine=session.engine or _writer(job),
        files=RoundFiles(output / ROUNDS, settings.of_texts),
        kept_steps=store.steps,
        progress=session.progress,
        warn=None if session.is_main else ignore_message,
    )


def _writer(job: Job) -> GenerateEngine:
    """Return what writes the student's text, in batches that fit where a forecast was possible."""
    writing = job.needed.writing
    return GenerateEngine(None if writing is None else writing.texts, job.accelerator.autocast)


def first_sample(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the untrained student made of the first prompt, as evaluations in training record it."""
    samples = start["samples"]
    for prompt, text in zip(samples["prompt"][:1], samples["initial_student"][:1], strict=True):
        if text is not None:
            return {"sample": {"prompt": prompt, "text": text}}
    return {}


def _fit(job: Job, module: Any, plan: Plan, options: LoopOptions, session: Session) -> FitResult:
    """Train, while signals wait for a step boundary and the time that is left is known."""
    time_left = session.progress.time_left
    done = 0 if options.resume_from is None else step_of(options.resume_from)
    rounds = options.rounds
    own_texts = 0 if rounds is None else rounds.texts_left(plan, done)
    expect_training(time_left, job, plan, done, has_teacher=module.teacher is not None, own_texts=own_texts)

    training, accelerator = job.config.training, job.accelerator
    with session.stop.deferring():
        result = fit(module, job.windows, job.collate, training, accelerator=accelerator, options=options)

    # A run that a signal has ended is continued, where its blocks are of use.
    if options.stream is not None and result.stopped_by not in EXIT_CODES:
        options.stream.remove()

    # Early stopping and a limit leave steps out.
    time_left.training.clear()
    _say_if_nothing_was_left(result, plan, session)

    # Ctrl-C may have come after the last step.
    if (reason := session.stop.pending()) is not None:
        return replace(result, stopped_by=reason)
    return result


def red_flags(job: Job, plan: Plan, student: nn.Module, start: Mapping[str, Any], session: Session) -> RedFlags:
    """Return the watch over a run that starts from these measurements."""
    return RedFlags.of_run(
        plan.total_steps,
        job.config.training.warmup_ratio,
        student,
        start,
        main=session.is_main,
        text_repeats=job.text_repeats,
    )


def rehearse(job: Job, module: Any, store: CheckpointStore, session: Session, *, is_new: bool, compares: bool) -> None:
    """Try once, before hours are spent, everything that a run does later: its modes, a checkpoint, the export.

    Args:
        is_new: of a resumed run its modes and checkpoints were tried before.
        compares: a teacher is there to be compared with.
    """
    if is_new:
        [batch] = loader.some_batches(job.windows, job.collate, 1, 1, job.config.training.seed)
        dry_run.try_modes(module, module.student, batch, job.accelerator, compares=compares)
        session.on_main(store.rehearse)

    forced_bos = job.held_out.starts["student"].forced_bos
    export.rehearse_export(module.student, job.config.student, job.tokenizer, forced_bos)


def evaluation_record(job: Job, module: Any, step: int) -> dict[str, Any]:
    """Measure the student on the held-out text; `step` steps are done."""
    scores = job.held_out.score(module.student, "student")
    routing = job.held_out.routing(module.student, module.routing)
    record = {"step": step, "split": "eval", **scores, **routing}
    if (sample := job.held_out.sample(module.student)) is not None:
        record["sample"] = sample
    return record


def _say_if_nothing_was_left(result: FitResult, plan: Plan, session: Session) -> None:
    """Log that a run was finished before it was started."""
    if result.resumed_from == result.steps and result.stopped_by in ("finished", "early_stopping"):
        progress = f"{result.steps} of {plan.total_steps} steps"
        follow_up = run_folder.follow_up(session.output, session.asked.student.init)
        log.info("this run is already finished (%s); %s", progress, follow_up)


def open_checkpoints(job: Job, teacher: Teacher | None, student: nn.Module, output: Path) -> CheckpointStore:
    """Open the checkpoints in `output`, which belong to these models, this text and these settings alone."""
    made_from: dict[str, Any] = {
        **job.fingerprint,
        "student": fingerprint(student, values=job.config.student.init != "random"),
    }
    if job.parts and teacher is not None:
        each = zip(job.parts, teacher.members, strict=True)  # type: ignore[attr-defined]
        made_from["teacher"] = [teacher_identity(part, member.teacher) for part, member in each]
    elif teacher is not None:
        made_from["teacher"] = teacher_identity(job, teacher)

    keep, may_change = job.config.training.keep_checkpoints, job.config.resume_changed
    return CheckpointStore(output / CHECKPOINTS, keep, made_from, may_change)


def teacher_identity(job: Job, teacher: Teacher) -> str | dict[str, Any]:
    """Return what makes a teacher the one it is: a fingerprint of its weights, or its own word if it is elsewhere."""
    # A cache stands for its teacher: another teacher's cache is another run.
    if job.cache is not None:
        return {**job.cache.identity, **job.cache.settings}
    if teacher.model is not None:
        return fingerprint(teacher.model)
    return cast(TeacherElsewhere, teacher).identity()


def teacher_measurement(job: Job, teacher: Teacher | None) -> Callable[[], dict[str, Any]] | None:
    """Return what measures the teacher on the held-out text: itself, or what its cache has of that."""
    if teacher is None:
        return None
    if job.parts:
        return partial(_measure_several, job, teacher)
    if job.cache is not None:
        return partial(job.cache.evaluation, job.held_out.fingerprint())
    return partial(job.held_out.measure_teacher, teacher)


def _measure_several(job: Job, teacher: Any) -> dict[str, Any]:
    """Measure each of several teachers, or read it from its cache; see `several_teachers.measure`."""
    measured = []
    for part, member in zip(job.parts, teacher.members, strict=True):
        measure = teacher_measurement(part, member.teacher)
        measured.append(measure())
    return several_teachers.measure(job.parts, measured)


def flush_caches(job: Job) -> None:
    """Write what waits for the caches of all teachers to disk, in all processes."""
    for part in job.parts or [job]:
        flush_cache(part)


def open_logger(
    job: Job, plan: Plan, output: Path, session: Session, *, resume_from: Path | None, has_teacher: bool
) -> StepLogger:
    """Open metrics.jsonl, empty for a new run, and the trackers."""
    done = 0 if resume_from is None else step_of(resume_from)
    tracker = None
    if session.is_main and job.config.logging.track:
        tracker = Tracking(job.accelerator, output, to_plain(job.config), done)

    logger = StepLogger(
        output,
        plan.total_steps,
        job.config.logging.every,
        main_process=session.is_main,
        tracker=tracker,
        progress=session.progress,
        kind="step" if has_teacher else "step alone",
    )
    # A fresh start in a folder with an old log would draw two curves as one.
    if resume_from is None and session.is_main:
        logger.truncate_after(-1)
        (output / START).unlink(missing_ok=True)
    job.accelerator.wait_for_everyone()
    return logger


def make_module(job: Job, teacher: Teacher | None, student: nn.Module, plan: Plan, *, is_new: bool) -> Any:
    """Make the framework of student and teacher; the router of a new run is calibrated."""
    config = job.config
    with value_errors_are_the_users():
        is_half = job.accelerator.mixed_precision != "no"
        for line in job.method.describe_head(student, job.accelerator.device, is_half=is_half):
            log.debug("%s", line)

        module = job.pair.framework(plan.total_steps, student=student, teacher=teacher)
        for line in job.pair.describe_documents(teacher):
            log.info("%s", line)

        # A few huge channels of the teacher's states would outweigh all others; checkpoints hold the statistics.
        if is_new and module.router is not None:
            batches = loader.some_batches(
                job.windows,
                job.collate,
                config.router.calibration_windows,
                cast(int, config.training.batch_size),
                config.training.seed,
            )
            module.calibrate([batch.to(job.accelerator.device) for batch in batches])
    return module


# --------------------------------------------------------------------------------- what a run leaves


def export_student(job: Job, trained: Trained, session: Session) -> Results:
    """Export the student and write the report; return its results."""
    student, result, held_out = trained.student, trained.result, job.held_out
    folder, settings = session.output / STUDENT, to_plain(session.asked)
    ended: Results = {
        "learned_by": _learned_by(job.config),
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "stopped_by": result.stopped_by,
    }
    if trained.stream is not None:
        ended |= _documents_of(trained.stream)
    scores = {
        **held_out.scores(student, trained.start),
        "student_init": job.config.student.init,
        "text_starts": {side: list(start.ids) for side, start in held_out.starts.items()},
    }

    # Before everything that could still fail: what was trained for hours is on the disk then.
    def write_student() -> exported.LoadedAnew:
        with session.progress.over("export", 2, "model file", unit="step") as note:
            export.export(
                student,
                job.config.student,
                job.tokenizer,
                folder,
                settings,
                {**scores, "run": ended},
                held_out.starts["student"].forced_bos,
            )
            note(1)
            loaded = exported.load_anew(student, held_out, folder, job.config.student)
            note(1)
        return loaded

    # All processes compute the comparison of student and teacher; only the main one wrote the student.
    loaded = session.on_main(write_student)
    results = held_out.results(student, trained.start, scores, trained.module.compare)
    results["run"] = {**ended, "loss_difference_loaded_anew": loaded.difference}
    if "teacher" in results:
        results |= _token_views(job, trained)
    if trained.rounds is not None:
        results |= _own_texts(job, trained)

    def write_report() -> None:
        export.describe(folder, settings, results)
        # before the report, which shows the warnings of the log
        if sentence := worse_than_before(results):
            log.warning("%s %s", sentence, LIKELY_CAUSE)
        _warn_of_passed_teacher(job.config, results)
        report.write_report(session.output, results)
        loaded.require()  # once the report has its warning

    session.on_main(write_report)
    return results


def _learned_by(config: RunConfig) -> str:
    """Return the terms and schedules of a run, and how its KD compares where that is not the usual way."""
    of_kd = config.loss.in_words() if "kd" in config.curriculum.used() else ""
    return ", ".join(filter(None, [config.curriculum.in_words(), of_kd]))


def _warn_of_passed_teacher(config: RunConfig, results: Results) -> None:
    """Say so where the student has passed a teacher whose weight does not fall to 0.

    A comparison that is to come says it for certain.
    """
    # behind its last point a ramp stays as it is
    last_weight = values_of(config.curriculum.kd.weight)[-1]
    if last_weight and not config.compares_without_teacher and has_passed_teacher(results):
        log.warning(
            "the student (%.4f bits per byte of unseen text) has passed its teacher (%.4f), which may hold it back by "
            "a weight of kd of %g up to the end; --without-teacher tells whether it does, and "
            "docs/choosing.md#a-teacher-that-does-not-help what to try",
            results["student"]["bits_per_byte"],
            results["teacher"]["bits_per_byte"],
            last_weight,
        )


def _documents_of(stream: Stream) -> Results:
    """Return how many documents a stream had up to the end of its last block, and how many of them were left out."""
    reasons = {"read": "read", "duplicate": "seen before", "in_eval": "held out", "empty": "empty"}
    return {f"documents {words}": stream.counts[name] for name, words in reasons.items() if stream.counts.get(name)}


def _token_views(job: Job, trained: Trained) -> Results:
    """Return views of single tokens for the report; all processes compute them, as they do the comparison."""
    views: Results = {}
    with advice("picture of the alignment"):
        views["alignment"] = token_views.alignment(job.pair, job.held_out.windows)
    if learns_at_some_positions(job.config):
        with advice("positions that are learned at"):
            views["chosen_positions"] = _chosen_positions(job, trained)
    with advice("places where student and teacher differ"):
        views["differences"] = token_views.differences(
            job.held_out, job.pair, trained.student, trained.module.differences
        )
    return views


def _chosen_positions(job: Job, trained: Trained) -> Results:
    """Return a text that was learned from, with the positions marked that KD is learned at under the smallest share.

    At the largest share nothing would be left to see in a run that ends at all positions.
    """
    shown = shown_window(job, trained.rounds, trained.result.steps)
    window = job.windows[shown.index]
    shares = values_of(job.config.curriculum.select)
    batch = job.collate([window]).to(job.accelerator.device)
    positions = trained.module.chosen(batch, min(shares)).tolist()

    tokens = token_views.chosen(job.pair, window, positions)
    if not tokens:
        return {}
    is_of_stream = job.stream is not None
    return {
        "window": None if is_of_stream else shown.index + 1,
        "windows": None if is_of_stream else len(job.windows),
        "step": shown.step,
        "share": min(shares),
        "largest_share": max(shares),
        "select_by": job.config.loss.select_by,
        "tokens": tokens,
    }


def _own_texts(job: Job, trained: Trained) -> Results:
    """Return texts of the last round for the report, beside the teacher's where its model is in this process."""
    texts: Results = {}
    if trained.rounds is not None and job.accelerator.is_main_process:
        with advice("texts of the last round"):
            texts["own_text"] = trained.rounds.examples(job.held_out.judge)
    return texts


def compare_without_teacher(job: Job, trained: Trained, results: Results, session: Session) -> Results:
    """Train the same student without the teacher, and add it to the report if it was trained for as many steps."""
    writes = job.config.curriculum.uses_own_text
    batches = "steps on given text alone," if writes else "batches and steps"
    log.info("for comparison: the same student, %s without the teacher (lm alone)", batches)
    folder, steps = session.output / WITHOUT_TEACHER, trained.result.steps
    folder.mkdir(exist_ok=True)

    alone = train_student(replace(job, pair=job.pair.without_teacher()), None, folder, session)
    # After another number of steps the two are not comparable, and a figure would say they are.
    if alone.result.steps != steps:
        ends = f"{alone.result.stopped_by} after {alone.result.steps} steps, and with the teacher after {steps}"
        log.warning("no comparison: without the teacher training ended by %s", ends)
        return results

    results = job.held_out.with_baseline(results, alone.student)
    if is_better_without_teacher(results):
        remedy = "less of its own text (curriculum.on_policy)" if writes else "a weight of kd that falls to 0"
        log.warning(
            "the same student learned more without the teacher; try %s, or a teacher that has learned from this text "
            "first (docs/choosing.md#a-teacher-that-does-not-help)",
            remedy,
        )
    if session.is_main:
        report.write_report(session.output, results, baseline_metrics=folder / METRICS)
    return results


def measure_tasks(job: Job, trained: Trained, teacher: Teacher | None, results: Results, session: Session) -> Results:
    """Measure the tasks that were asked for, in this process, and add them to the report."""
    config = job.config
    models: dict[str, Callable[[], nn.Module]] = {"student": lambda: trained.student}
    is_here = config.teacher.device != teachers.SHARDED and not config.teacher.is_elsewhere
    if teacher is not None and is_here:  # no other process computes with this one
        running = getattr(teacher, "teacher", teacher) or load_teacher(job)
        if running.model is not None:
            models["teacher"] = lambda: running.model
    # A student that began with random weights scores what guessing scores.
    if config.student.init != "random":
        models["initial_student"] = partial(students.make, config.student, config.training, job.accelerator, job.layers)

    if tasks := lm_eval_tasks.measure(job.held_out, models):
        results = {**results, "tasks": tasks}
        baseline = session.output / WITHOUT_TEACHER / METRICS if "baseline" in results else None
        report.write_report(session.output, results, baseline_metrics=baseline)
    return results


def finish(results: Results, session: Session) -> None:
    """Write the last state of the model card, upload the student, and print the results."""
    if not session.is_main:
        return

    student = session.output / STUDENT
    export.describe(student, to_plain(session.asked), results)
    upload.push(session.asked.hub, student)
    report.print_summary(results)
    log.info("student: %s; report: %s", student, session.output / REPORT_HTML)


def log_cache(job: Job, what: str) -> None:
    """Log what a run has added to its teacher cache; every process calls this."""
    for part in job.parts or [job]:
        if part.cache is not None:
            name = f"{what} of {part.config.teacher.name}" if job.parts else what
            log.info("%s: %s", name, cache_statistics(part))
