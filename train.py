"""Distil a large causal language model into a small one: parse -> build -> fit -> evaluate -> report.

    python train.py --batch-size 2 --epochs 1

The junction of `models/` (what is learned) and `utils/` (how it is run): everything here is assembly.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from pydantic import AfterValidator
from torch import nn
from transformers import PreTrainedTokenizerBase

from models.config import CurriculumConfig, LossConfig, Ramp, Schedule, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import HEAD_TERMS, DistillationFramework
from models.outputs import PairedBatch
from models.pairing import PairCollator, PairEncoder, count_channel
from models.teacher import FrozenTeacher
from models.vocabulary import VocabularyMap
from utils import command_line, data, evaluation, hardware, pretrained, quickstart, report, run_folder
from utils.atomic import write_json
from utils.checkpoints import CheckpointStore
from utils.config import (
    DataConfig,
    EvaluationConfig,
    LoggingConfig,
    ModelConfig,
    StudentConfig,
    TrainingConfig,
    build,
    find_config,
    load_yaml,
    to_plain,
)
from utils.errors import UserError
from utils.guards import RedFlags
from utils.logs import StepLogger, read_metrics, setup_logging
from utils.seeding import permutation, seed_everything
from utils.stopping import StopSignal
from utils.training import FitResult, Plan, build_accelerator, fit

log = logging.getLogger("train")

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130}
"""Of runs that a signal ended; every other ending that is no error is 0."""

QUICKSTART, QUICKSTART_TEACHER = "quickstart", "quickstart-teacher"
"""Names, in place of a hub id or path, of what `utils.quickstart` builds."""

CHANNEL_WINDOWS = 2000
"""Windows on which the counted channel (loss.correction: channel) is counted."""


class Interrupted(Exception):
    """A signal, or the clock, ended the run before there was something to evaluate; the checkpoint is saved."""


# ------------------------------------------------------------------------------------- configuration


def _values(schedule: Schedule) -> list[float]:
    return [value for _, value in schedule.points] if isinstance(schedule, Ramp) else [schedule]


def _checked_curriculum(curriculum: CurriculumConfig) -> CurriculumConfig:
    weights = {name: _values(term.weight) for name, term in vars(curriculum).items()}
    wrong = {f"{name}.weight": v for name, v in weights.items() if not all(w >= 0 and math.isfinite(w) for w in v)}
    if wrong:
        raise ValueError(f"weights must be 0 or more, got {wrong}")
    if not any(any(weights[name]) for name in HEAD_TERMS):
        raise ValueError(f"nothing to learn from: every weight of {', '.join(HEAD_TERMS)} is 0; raise one of them")
    return curriculum


def _checked_loss(loss: LossConfig) -> LossConfig:
    scalars = {name: _values(getattr(loss, name)) for name in ("temperature", "span_temperature")}
    wrong = {name: v for name, v in scalars.items() if not all(t > 0 and math.isfinite(t) for t in v)}
    if wrong:
        raise ValueError(f"temperatures must be greater than 0, got {wrong}; 1 is a good start")
    return loss


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    teacher: ModelConfig = field(default_factory=ModelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: Annotated[LossConfig, AfterValidator(_checked_loss)] = field(default_factory=LossConfig)
    curriculum: Annotated[CurriculumConfig, AfterValidator(_checked_curriculum)] = field(
        default_factory=CurriculumConfig
    )
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    output_dir: str = "runs/train"
    """Folder of the run; by default runs/ and the name of the recipe."""
    resume: str = "auto"
    """auto: continue from the newest whole checkpoint in output_dir, if any; never; or a checkpoint's path."""

    def __post_init__(self) -> None:
        wrong = []
        if self.student.name is None:
            wrong.append("no student: give --student ID or DIR")
        if not self.data.train:
            wrong.append("no training data: give --train-data")
        signals = [name for name in ("kd", "span") if any(_values(getattr(self.curriculum, name).weight))]
        if self.teacher.name is None and signals:
            wrong.append(f"no teacher, but {' and '.join(signals)} weigh more than 0: give --teacher or set them to 0")
        if self.teacher.name is None and self.evaluation.without_teacher:
            wrong.append("evaluation.without_teacher compares with a run that has a teacher: give --teacher")
        if self.training.patience and not self.evaluation.every:
            wrong.append("training.patience counts evaluations, and evaluation.every is 0: give --eval-every")
        if wrong:
            raise ValueError("; ".join(wrong))


def configure(argv: Sequence[str]) -> tuple[RunConfig, str]:
    """The configuration a command line asks for, and which recipe it starts from and why.

    Raises:
        UserError: every mistake in recipe and flags.
    """
    arguments = command_line.parse(argv)
    name, why = (arguments.config, "asked for") if arguments.config else _default_recipe()
    path = find_config(name)
    values = load_yaml(path)
    values.setdefault("output_dir", f"runs/{path.stem}")
    arguments.apply(values)
    return build(RunConfig, values, source=f"{path.name} and the command line"), f"recipe {path.name}: {why}"


def _default_recipe() -> tuple[str, str]:
    device = hardware.choose_device()
    if device.value.type == "cuda":
        return "kaggle_p100", f"no --config was given and there is a GPU ({device.reason})"
    return "quickstart", f"no --config was given and there is no GPU ({device.reason})"


# ------------------------------------------------------------------------------------------ building


@dataclass(frozen=True)
class Job:
    """What training and evaluation work with."""

    config: RunConfig
    accelerator: Accelerator
    tokenizers: dict[str, PreTrainedTokenizerBase]
    """For `student` and `teacher` (without a teacher: the student's)."""
    vocabulary: VocabularyMap
    collate: PairCollator
    train: Dataset
    eval: Dataset
    held_out: list[str]
    fingerprint: dict[str, str]
    """What a checkpoint must have been made from to be continued."""

    def eval_batches(self) -> Iterator[PairedBatch]:
        """This process's share of the evaluation windows."""
        mine = range(self.accelerator.process_index, len(self.eval), self.accelerator.num_processes)
        size = self.config.training.batch_size
        for start in range(0, len(mine), size):
            yield self.collate([self.eval[i] for i in mine[start : start + size]])


@contextmanager
def _as_user_error() -> Iterator[None]:
    """The library below tells what does not fit together by ValueError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error


def prepare(config: RunConfig, accelerator: Accelerator) -> Job:
    """Tokenizers, text, windows and the vocabulary map: all that can fail cheaply, before the models."""
    names = {"student": config.student.name, "teacher": config.teacher.name or config.student.name}
    tokenizers = {role: pretrained.load_tokenizer(name, role) for role, name in names.items()}
    shapes = {role: pretrained.load_config(name, role) for role, name in names.items()}
    length = int(min(config.data.max_length, *(pretrained.context_length(shape) for shape in shapes.values())))
    if length < config.data.max_length:
        log.info("windows of %d tokens instead of %d: a model reads no more at once", length, config.data.max_length)
    sizes = {role: shape.get_text_config().vocab_size for role, shape in shapes.items()}
    for role, name in names.items():
        log.info("%s %s: vocabulary %s, tokenizer %s", role, name, f"{sizes[role]:,}", f"{len(tokenizers[role]):,}")
    with _as_user_error(), accelerator.main_process_first():
        encoder = PairEncoder(tokenizers["student"], tokenizers["teacher"], length)
        vocabulary = VocabularyMap.build(
            tokenizers["student"],
            tokenizers["teacher"],
            sizes["student"],
            sizes["teacher"],
            cache_dir=quickstart.cache_dir() / "vocabularies",
        )
        corpus = data.load_documents(config.data)
        workers = config.data.num_workers or None
        windows = data.make_windows(corpus.train, encoder.windows, encoder.fingerprint, workers)
        held_out = data.make_windows(corpus.eval, encoder.windows, encoder.fingerprint, workers)
    log.info("documents: %s", ", ".join(f"{name} {count:,}" for name, count in corpus.report.items()))
    if config.loss.correction == "channel":
        vocabulary = vocabulary.with_channel(count_channel([windows[i] for i in range(len(windows))][:CHANNEL_WINDOWS]))
    limit = min(config.evaluation.max_windows or len(held_out), len(held_out))
    return Job(
        config=config,
        accelerator=accelerator,
        tokenizers=tokenizers,
        vocabulary=vocabulary,
        collate=PairCollator(vocabulary, encoder.end_of_text, config.loss.max_depth),
        train=windows,
        eval=held_out.select(sorted(permutation(len(held_out), 0, 0)[:limit].tolist())),
        held_out=corpus.eval,
        fingerprint={
            "training_text": data.corpus_fingerprint(corpus.train),
            "tokenizers_and_length": encoder.fingerprint,
            "mixed_precision": accelerator.mixed_precision,
        },
    )


def load_teacher(job: Job) -> FrozenTeacher | None:
    """The frozen teacher on the training device, or None if the run has none."""
    config = job.config.teacher
    if config.name is None:
        return None
    device = job.accelerator.device
    dtype = pretrained.teacher_dtype(config.dtype, device, job.accelerator.mixed_precision)
    log.info("teacher in %s: %s", str(dtype.value).removeprefix("torch."), dtype.reason)
    model = pretrained.load_model(config.name, "teacher", dtype.value)
    with _as_user_error():
        return FrozenTeacher(model.to(device), job.vocabulary)


def make_student(job: Job) -> nn.Module:
    """The student before training, in float32; the same one every time."""
    config = job.config.student
    seed_everything(job.config.training.seed)
    if config.init == "random":
        return pretrained.random_model(pretrained.load_config(config.name, "student"))
    return pretrained.load_model(config.name, "student", torch.float32)


# ---------------------------------------------------------------------------------------- evaluation


def score(job: Job, model: nn.Module, side: str) -> dict[str, Any]:
    """Metrics of a model on the held-out text; student and teacher score the same bytes."""
    batches = ((*batch.scored(side), int(batch.bytes.sum())) for batch in job.eval_batches())
    return evaluation.evaluate(
        model, batches, job.accelerator.device, job.accelerator, float32=side == "student"
    )  # a float32 copy of a large teacher may not fit; its loss is float32 all the same


def continuations(job: Job, model: nn.Module, side: str) -> list[str]:
    """How a model goes on from the beginnings of held-out documents."""
    tokenizer, settings = job.tokenizers[side], job.config.evaluation
    start = evaluation.start_token(tokenizer)
    prompts = [
        [*([] if start is None else [start]), *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in beginnings(job)
    ]
    return evaluation.generate_samples(model, tokenizer, prompts, settings.new_tokens, float32=side == "student")


def beginnings(job: Job) -> list[str]:
    """Beginnings of held-out documents, spread over the text."""
    tokenizer, settings = job.tokenizers["student"], job.config.evaluation
    count = min(settings.samples, len(job.held_out))
    chosen = [job.held_out[i * len(job.held_out) // count] for i in range(count)]
    ids = [tokenizer(text[:2000], add_special_tokens=False)["input_ids"][: settings.prompt_tokens] for text in chosen]
    return [tokenizer.decode(row) for row in ids]


def measure_start(job: Job, student: nn.Module, teacher: FrozenTeacher | None, output: Path) -> dict[str, Any]:
    """Teacher and untrained student on the held-out text; measured once a run and kept in baseline_evaluation.json."""
    file = output / "baseline_evaluation.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    models = {} if teacher is None else {"teacher": (teacher.model, "teacher")}
    measured: dict[str, Any] = {"samples": {"prompt": beginnings(job)}}
    for key, (model, side) in (models | {"initial_student": (student, "student")}).items():
        measured[key] = score(job, model, side) | evaluation.describe_model(model)
        measured["samples"][key] = continuations(job, model, side)
        log.info("%s: %.4f bits per byte on held-out text", key.replace("_", " "), measured[key]["bits_per_byte"])
    if job.accelerator.is_main_process:
        write_json(file, measured)
    return measured


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Trained:
    """A student after training."""

    framework: DistillationFramework
    result: FitResult
    metrics: dict[str, Any]
    start: dict[str, Any]
    """What `measure_start` returned."""


def train_student(
    job: Job, teacher: FrozenTeacher | None, curriculum: CurriculumConfig, output: Path, stop: StopSignal, resume: str
) -> Trained:
    """Train a fresh student under a curriculum, or continue, in the folder `output`; evaluate it afterwards.

    Raises:
        Interrupted: by a signal; a checkpoint is saved.
    """
    config, accelerator = job.config, job.accelerator
    plan = Plan.of(config.training, len(job.train), accelerator.num_processes)
    store = CheckpointStore(output / "checkpoints", config.training.keep_checkpoints, job.fingerprint)
    resume_from = _on_main_process(accelerator, lambda: store.resume_point(resume))
    done = 0 if resume_from is None else int(resume_from.name.rpartition("-")[2])
    logger = StepLogger(
        output, plan.total_steps, config.logging.every, start_step=done, main_process=accelerator.is_main_process
    )
    student = make_student(job).to(accelerator.device)
    if resume_from is None:
        logger.truncate_after(-1)
        (output / "baseline_evaluation.json").unlink(missing_ok=True)
    start = measure_start(job, student, teacher, output)
    with _as_user_error():
        scheduler = CurriculumScheduler(curriculum, config.loss, plan.total_steps)
        framework = DistillationFramework(student, teacher, job.vocabulary, config.loss, scheduler)
    flags = RedFlags(
        plan.total_steps,
        student.get_output_embeddings().weight.shape[0],
        warmup_steps=math.ceil(config.training.warmup_ratio * plan.total_steps),
        initial_loss=start["initial_student"]["loss"],
    )
    if teacher is not None:
        flags.teacher(start["teacher"]["bits_per_byte"], start["initial_student"]["bits_per_byte"])

    def evaluate(step: int) -> dict[str, Any]:
        return {"step": step, "split": "eval", **score(job, student, "student")}

    if resume_from is None:
        logger.evaluation({"step": 0, "split": "eval", **_metrics_of(start["initial_student"])})
    result = fit(
        framework,
        job.train,
        job.collate,
        config.training,
        accelerator=accelerator,
        logger=logger,
        evaluate=evaluate,
        evaluate_every=config.evaluation.every,
        checkpoints=store,
        resume_from=resume_from,
        flags=flags,
        stop=stop,
        num_workers=config.data.num_workers,
    )
    if result.stopped_by in EXIT_CODES:
        logger.close()
        raise Interrupted(result.stopped_by)
    return Trained(framework, result, _final_evaluation(job, result, logger, evaluate), start)


def _final_evaluation(job: Job, result: FitResult, logger: StepLogger, evaluate: Any) -> dict[str, Any]:
    """Metrics of the trained student, logged unless metrics.jsonl has them already."""
    record = evaluate(result.steps)
    known = job.accelerator.is_main_process and any(
        "terms" not in old and old.get("step") == result.steps for old in read_metrics(logger.path)
    )
    if not known:
        logger.evaluation(record)
    logger.close()
    return _metrics_of(record)


def _metrics_of(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")}


def _on_main_process(accelerator: Accelerator, action: Any) -> Any:
    """What `action` returns when the main process alone runs it."""
    found = [action() if accelerator.is_main_process else None]
    return broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]


# ---------------------------------------------------------------------------------------- the report


def results_of(job: Job, trained: Trained, without: Trained | None) -> dict[str, Any]:
    """evaluation_report.json of a run."""
    student, start = trained.framework.student, trained.start
    results = {key: start[key] for key in ("teacher", "initial_student") if key in start}
    results["student"] = trained.metrics | evaluation.describe_model(student)
    samples = {**start["samples"], "student": continuations(job, student, "student")}
    if without is not None:
        results["baseline"] = without.metrics | evaluation.describe_model(without.framework.student)
        samples["baseline"] = continuations(job, without.framework.student, "student")
    if "teacher" in start:
        device = job.accelerator.device
        with evaluation.float32_evaluation(trained.framework):
            agreement = evaluation.compare(
                lambda batch: trained.framework.compare(batch.to(device)), job.eval_batches(), job.accelerator
            )
        results["retention"] = evaluation.retention(
            results["student"], start["teacher"], start["initial_student"], agreement
        )
    results["samples"] = [dict(zip(samples, row, strict=True)) for row in zip(*samples.values(), strict=True)]
    result = trained.result
    results["run"] = {"steps": result.steps, "seconds": round(result.seconds, 1), "stopped_by": result.stopped_by}
    return results


def finish(job: Job, trained: Trained, without: Trained | None, output: Path) -> None:
    """Export the student, write the report, say what came out."""
    results = results_of(job, trained, without)
    if not job.accelerator.is_main_process:
        return
    config = job.config
    card = pretrained.model_card(
        config.student.name, config.student.init, config.teacher.name, config.data.train, results
    )
    pretrained.export(trained.framework.student, job.tokenizers["student"], output / "student", card)
    baseline_metrics = output / "without_teacher" / "metrics.jsonl" if without is not None else None
    report.print_summary(report.write_report(output, results, baseline_metrics=baseline_metrics))
    log.info("student: %s; report: %s", output / "student", output / report.REPORT_MD)


# ------------------------------------------------------------------------------------------- the run


def run(config: RunConfig, recipe: str, stop: StopSignal) -> str:
    """One run from its configuration to its report; returns what ended it (see `utils.stopping.STOP_REASONS`).

    Raises:
        UserError: a mistake in what was asked for, found as early as it can be.
        Interrupted: by a signal.
    """
    output, asked = Path(config.output_dir), config
    run_folder.check(output, to_plain(config), config.resume)
    setup_logging(output)
    log.info("%s", recipe)
    device = hardware.choose_device()
    if remedy := hardware.check_kernels():
        raise UserError(remedy)
    precision = hardware.choose_precision(config.training.mixed_precision, device.value)
    accelerator = build_accelerator(precision.value, cpu=device.value.type == "cpu")
    setup_logging(output, main_process=accelerator.is_main_process)
    notes = {"recipe": recipe, "device": f"{device.value}: {device.reason}", "mixed precision": precision.reason}
    notes |= {"backend": "; ".join(hardware.configure_backends(device.value)) or "defaults"}
    log.info("device %s: %s; mixed precision %s: %s", device.value, device.reason, precision.value, precision.reason)
    config = _with_quickstart(config, stop)
    setup_logging(output, main_process=accelerator.is_main_process)  # a quickstart teacher had the log meanwhile
    job = prepare(config, accelerator)
    _log_coverage(job)
    if accelerator.is_main_process:
        run_folder.write_config(output, to_plain(asked), notes)
    teacher = load_teacher(job)
    trained = train_student(job, teacher, config.curriculum, output, stop, config.resume)
    without = None
    if config.evaluation.without_teacher and trained.result.stopped_by != "max_hours":
        without = _train_without_teacher(job, output / "without_teacher", stop)
    finish(job, trained, without, output)
    return trained.result.stopped_by


def _train_without_teacher(job: Job, output: Path, stop: StopSignal) -> Trained:
    """The same student on the same batches for the same steps, with the LM term alone."""
    log.info("for comparison: the same student, batches and steps without the teacher")
    if job.accelerator.is_main_process:
        output.mkdir(exist_ok=True)
    return train_student(job, None, CurriculumConfig(kd=Term(0.0), lm=Term(1.0)), output, stop, "auto")


def _log_coverage(job: Job) -> None:
    """How much of the text KD reaches, on the evaluation windows."""
    if job.config.teacher.name is None:
        return
    totals = dict.fromkeys(("lm", "kd", "depth0"), 0)
    for batch in job.eval_batches():
        totals = {name: totals[name] + batch.counts[name] for name in totals}
    shares = [totals[name] / max(totals["lm"], 1) for name in ("kd", "depth0")]
    log.info("coverage: %.1f %% of student positions have an anchor, %.1f %% at depth 0", *(100 * s for s in shares))
    routed = {name for name, term in vars(job.config.curriculum).items() if any(_values(term.weight))} - {*HEAD_TERMS}
    if routed:
        log.warning("without effect in this version, which has no router: weights of %s", ", ".join(sorted(routed)))


def _with_quickstart(config: RunConfig, stop: StopSignal) -> RunConfig:
    """The configuration with paths in place of the names that stand for the embedded material."""
    names = {config.teacher.name, config.student.name, config.data.eval, *config.data.train}
    if not names & {QUICKSTART, QUICKSTART_TEACHER}:
        return config
    material = quickstart.material()
    student = {QUICKSTART: material.student, QUICKSTART_TEACHER: material.teacher}.get(config.student.name)
    if student is not None:
        config = replace(config, student=StudentConfig(str(student), "random"))
    if config.teacher.name == QUICKSTART:
        config = replace(config, teacher=replace(config.teacher, name=str(_quickstart_teacher(config, material, stop))))
    train = [str(material.file) if name == QUICKSTART else name for name in config.data.train]
    return replace(config, data=replace(config.data, train=train))


def _quickstart_teacher(config: RunConfig, material: quickstart.Material, stop: StopSignal) -> Path:
    """The trained quickstart teacher, from the cache or trained now with the same loop."""
    own, recipe = configure(
        ["--config", "quickstart_teacher", "--mixed-precision", config.training.mixed_precision, "--resume", "auto"]
    )
    key = hashlib.sha256(json.dumps(run_folder.identity(to_plain(own))).encode()).hexdigest()[:8]
    folder = material.trained_teacher.with_name(f"{material.trained_teacher.name}-{key}")
    if not folder.is_dir():
        log.info("no trained teacher in the cache: training one now, about a minute")
        scratch = folder.with_name(f"{folder.name}.run")
        reason = run(replace(own, output_dir=str(scratch)), recipe, stop)
        if reason == "max_hours":
            raise Interrupted(reason)
        os.replace(scratch / "student", folder)
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    started = time.monotonic()
    setup_logging(None)
    try:
        config, recipe = configure(sys.argv[1:] if argv is None else argv)
        with StopSignal(config.training.max_hours, started) as stop:
            run(config, recipe, stop)
            return 0
    except Interrupted as interrupted:
        log.warning("stopped by %s; the same command continues from the checkpoint", interrupted)
        return EXIT_CODES.get(str(interrupted), 0)
    except UserError as error:
        log.error("%s", error, exc_info=error)
        return 2
    except KeyboardInterrupt:
        return EXIT_CODES["SIGINT"]
    except Exception as error:
        log.critical("%s: %s", type(error).__name__, error, exc_info=error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
