"""The checks of `verify_fixes.py`: one row for each, and the groups in which they are printed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from models import self_check
from models.config import CurriculumConfig, Ramp
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.losses.chunk_size import chunk_rows
from models.student_aware_router import ROUTER_TERMS
from models.teacher.frozen import FrozenTeacher
from utils.checks import checklist, evaluation, loop, machine, miniature
from utils.checks import setup as run_setup
from utils.checks.bench import Bench
from utils.checks.checklist import BriefGroup, Check, Measured, Row, above, at_least, below, equal_to, near, within
from utils.checks.setup import SetUp
from utils.commands.run import method_of
from utils.commands.settings import RunConfig, configure
from utils.config import quickstart_names
from utils.config.settings import DataConfig, EvaluationConfig, ModelConfig, StudentConfig, TrainingConfig
from utils.data.documents import DOCUMENTS_REMEDY
from utils.errors import UserError
from utils.machine import hardware
from utils.parallel.accelerator import build_accelerator
from utils.paths import user_path
from utils.pretrained import export, generation, locate
from utils.pretrained.families import keep_weights
from utils.pretrained.layers import LayerChoice
from utils.pretrained.named import load_shapes
from utils.pretrained.student import make as make_student
from utils.pretrained.teacher import on_one_process
from utils.run import quickstart, several_teachers, stages, student_layers
from utils.run.prepare import Job, prepare
from utils.run.requirements import check as check_requirements
from utils.training import dry_run

MOST_DOCUMENTS = 20_000
"""Documents read of the user's own text."""

TOO_LARGE = "not measured: the student is too large to be built for a check"

ChooseLayers = Callable[[], LayerChoice]
"""Chooses the layers that the student takes from a bigger model."""


# ---------------------------------------------------------- measurements that need models/ and utils/


def curriculum_table() -> Measured:
    """Compare the curriculum of the recipe `reference_curriculum` with the weights of the reference run."""
    config, _ = configure(["--config", "reference_curriculum"])
    differing = [
        f"{weight.term} {weight.weight:.4f} instead of {weight.expected} at {weight.percent} %"
        for weight in self_check.other_weights(config.curriculum, config.loss)
    ]
    value = "; ".join(differing) or "21 of 21 weights at 0.4, 50.2 and 100 %"
    return Measured(value, "the reference run's, to 3 decimals", passed=not differing)


def hidden_states(bench: Bench) -> self_check.HiddenStates:
    """Count the models that keep hidden states along a ramp from 0 to 0.1."""
    ramp = Ramp(((0.0, 0.0), (1.0, 0.1)))
    routed = bench.distillation(weights=dict.fromkeys(ROUTER_TERMS, ramp))
    batch: Any = bench.job.collate(bench.windows)  # a PairedBatch
    return self_check.hidden_states(routed, bench.distillation(), batch)


def label_shift_of_architecture(setup: SetUp) -> Measured:
    """Compare losses of the user's architecture with random weights; a fresh model knows nothing of random tokens."""
    # Random logits cost a little more than ln V, and hardly ever less.
    start = None
    ratios = within(0.95, 1.25, "ln V")
    if setup.student.is_encoder_decoder:
        start = setup.student.decoder_start_token_id
        ratios = at_least(0.95, "ln V")  # T5 1.1 begins with large logits

    allowed = f"{ratios.text}, equal to 1e-3"
    models = run_setup.build_shallow(setup, setup.loaded)
    if "student" not in models:
        return Measured(TOO_LARGE, allowed, passed=True)

    losses = self_check.architecture_losses(models, start)
    return Measured(
        f"{losses.ratio:.3f} ln V on random tokens, ln V is {losses.log_size:.2f}; "
        f"transformers' own shift {losses.difference:+.0e}",
        allowed,
        passed=ratios.admits(losses.ratio) and losses.is_close,
    )


def step_and_export(setup: SetUp, job: Job) -> Measured:
    """Train, evaluate and save a student of the user's architecture on trial, with few layers and random weights."""
    allowed = "no error"
    student = run_setup.build_shallow(setup, {"student": setup.student}).get("student")
    if student is None:
        return Measured(TOO_LARGE, allowed, passed=True)

    # The generation settings in the student's folder are exported too, and not all of them can be saved.
    keep_weights(student.config)
    folder = Path(locate.locate(setup.config.student.name, "student"))
    if folder.is_dir():
        settings = generation.load(folder, f"student {setup.config.student.name}")
        student.generation_config = settings or student.generation_config

    module = self_check.assemble(student, None, job.vocabulary, kd=0.0, lm=1.0)
    batch = job.collate([job.windows[0]])
    dry_run.try_modes(module, student, batch, job.accelerator, compares=False)
    export.rehearse_export(student, job.tokenizer)
    return Measured(
        f"trained, evaluated and saved on trial: {type(student).__name__} of few layers", allowed, passed=True
    )


def layers_of_student(setup: SetUp, choose_layers: ChooseLayers) -> Measured:
    """Choose layers for a student that is made of some layers of a bigger model, as a run does."""
    allowed = "a model can be made of them"
    if run_setup.too_large(setup.whole_student):
        return Measured("not measured: the whole model is too large to be loaded for a check", allowed, passed=True)
    return Measured(str(choose_layers()), allowed, passed=True)


def router_at_start(setup: SetUp, job: Job, choose_layers: ChooseLayers) -> Measured:
    """Measure the hidden-state terms of the user's pair behind a calibrated router: 1 would be unrelated states."""
    limit = checklist.at_most(2)
    if obstacle := run_setup.router_obstacle(setup):
        return Measured(f"not measured: {obstacle}", limit.text, passed=True)

    # Real weights on both sides: the terms depend on how much the two models have in common.
    config: Any = job.config  # a RunConfig
    layers = None if config.student.layers is None else choose_layers()
    student = make_student(config.student, config.training, job.accelerator, layers).eval()
    teacher: Any = stages.load_teacher(job)  # a FrozenTeacher or CachedTeacher
    scheduler = CurriculumScheduler(config.curriculum, config.loss, 1)
    module = DistillationFramework(student, teacher, job.vocabulary, config.loss, scheduler, config.router)

    # Calibrated on some windows, measured on others: on its own windows a fit looks better than it is.
    drawn = run_setup.router_batches(job)
    module.calibrate(drawn.calibration)
    used = config.curriculum.used()
    every_value = self_check.router_values(module, drawn.measured)
    values = {name: value for name, value in every_value.items() if name in used}

    named = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return Measured(
        f"{named}, calibrated on {drawn.windows} windows",
        limit.text,
        passed=limit.admits([*values.values()]),
    )


# ------------------------------------------------------------------------------- the table of checks

# The machine comes first: where it cannot compute, or has other packages, nothing below is worth a look.
MACHINE = (
    Row(
        "Python and packages",
        machine.versions,
        hint="install the project's requirements: pip install -c constraints.txt -e .",
    ),
    Row(
        "package conflicts",
        machine.conflicts,
        hint="install the versions that are wanted, or use a fresh virtual environment",
    ),
    Row(
        "device and kernels",
        machine.kernels,
        hint="hide the GPU with CUDA_VISIBLE_DEVICES= to run on the CPU",
    ),
    Row(
        "precision",
        machine.precision,
        on=("config",),
        shows="{choice.value} ({choice.reason}); a product is off by {error:.1e}",
        allowed={"error": below(1e-2)},
        hint="set --mixed-precision no and report the device",
    ),
)

ONE_STEP = Row(
    "one step on this device",
    loop.one_step,
    on=("bench", "config"),
    hint="set --mixed-precision no; or train on the CPU: CUDA_VISIBLE_DEVICES=",
)


def normalisation_row(label: str, term: str) -> Row:
    """Return the check of one hidden-state term's scale."""
    narrow = "{narrow[0]:.3g}, {narrow[1]:.3g}, {narrow[2]:.3g} at width 32"
    wide = "{wide[0]:.3g}, {wide[1]:.3g}, {wide[2]:.3g} at width 256"
    return Row(
        f"normalisation: {label}",
        partial(self_check.normalisation, term),
        shows=f"{narrow}; {wide} (32, 128, 512 tokens)",
        allowed={"narrow": within(0.05, 2), "wide": within(0.05, 2)},
        wording="0.05 to 2 for unrelated states",
        hint=f"{term} depends on length or width: its weight would mean nothing; report it",
    )


# This code, without models: numbers that are known beforehand.
CODE = (
    Row(
        "curriculum table",
        curriculum_table,
        hint="configs/reference_curriculum.yaml or the ramps of models/curriculum.py were changed",
    ),
    Row(
        "perplexity by tokens",
        evaluation.weighted_perplexity,
        shows="{perplexity:.3f}, bits per byte {bits_per_byte:.3f}, of 3 and 9 tokens",
        allowed={"perplexity": near(2**2.5, 1e-3), "bits_per_byte": near(30 / 9, 1e-3)},
        wording="5.657 (mean of means: 4) and 3.333",
        hint="perplexity is a mean of batch means: it depends on how text is cut into batches",
    ),
    Row(
        "contrastive: a row of padding",
        self_check.padding_row,
        shows="{value:.5f}, without it {value_without:.5f}; its gradient {gradient_norm:.0e}, "
        "that of the others off by {others_change:.0e}",
        allowed={"difference": below(1e-5), "gradient_norm": equal_to(0), "others_change": below(1e-5)},
        wording="equal to 1e-5, its gradient 0",
        hint="a window without anchors teaches, or is a negative of the others; report it",
    ),
    # A weight means the same in every run only if unrelated states give about 1 at any width and length.
    normalisation_row("feature", "feat"),
    normalisation_row("attention relations", "rel"),
    normalisation_row("attention alignment", "attn"),
    normalisation_row("layer", "layer"),
    normalisation_row("contrastive", "contr"),
)

# This code, on tiny models that are trained by the real loop.
TINY = (
    # Labels: without a shift the student learns to copy its input, with two it learns to skip a token.
    Row(
        "label shift: fresh student",
        self_check.fresh_loss,
        on=("twins",),
        shows="{loss:.3f} nats on random tokens, ln V is {log_size:.3f}",
        allowed={"ratio": near(1, 0.05)},
        wording="within 5 %",
        hint="labels or initialisation are wrong: training would teach nonsense",
    ),
    Row(
        "label shift: exactly once",
        self_check.shifted_once,
        on=("twins",),
        shows="{ours:.5f}, transformers' own shift {transformers:.5f}",
        allowed={"difference": below(1e-4)},
        wording="equal to 1e-4",
        hint="labels are shifted twice, or not at all, on their way to the loss",
    ),
    Row(
        "label shift: copying",
        self_check.copying,
        on=("twins",),
        shows="{sound:.2f} ln V after 40 steps on random tokens; without the shift, on purpose, {unshifted:.2f}",
        allowed={"sound": at_least(0.95), "unshifted": below(0.5)},
        wording="0.95 or more; on purpose below 0.5",
        hint="labels are not shifted: the student would learn to copy its input",
    ),
    # KD: under a copy of itself a student has nothing to learn.
    Row(
        "KD of equal models",
        self_check.equal_models,
        on=("twins",),
        shows="at most {loss:.1e} nats, gradient {norm:.1e}, in {variants} variants",
        allowed={"worst": below(1e-5)},
        wording="0 (below 1e-5)",
        hint="teacher and student are compared on different outcomes: KD has a floor above 0",
    ),
    Row(
        "T squared in the gradient",
        self_check.temperature_squared,
        on=("twins",),
        shows="gradient at T = 4 is {ratio:.2f} of that at T = 1 (without T squared 0.06)",
        allowed={"ratio": within(0.8, 1.25)},
        hint="KD is not multiplied by the square of its temperature: it fades as T grows",
    ),
    # What costs memory, and what half precision loses.
    Row(
        "hidden states at weight 0",
        hidden_states,
        on=("bench",),
        shows="kept by {at_zero} of {models} models at weight 0, by {at_weight} at 0.1; loss {loss_change:+.0e}",
        allowed={"models": equal_to(2), "at_zero": equal_to(0), "at_weight": equal_to(2), "loss_change": equal_to(0)},
        wording="0, 2, and the loss without a router",
        hint="models are asked for hidden states that no term needs: slower, and more memory",
    ),
    Row(
        "fp16 teacher, fp32 student",
        loop.half_teacher,
        on=("bench",),
        shows="{terms} terms off by {value_error:.0e}; student's gradient {least_gradient:.1e} or more for each, "
        "off by {gradient_error:.0e}",
        allowed={"value_error": below(1e-2), "least_gradient": above(0), "gradient_error": below(1e-2)},
        hint="set teacher.dtype=float32, or the weights of the hidden-state terms to 0",
    ),
    # The evaluation: a model that knows nothing has a perplexity of V, and is the same model afterwards.
    Row(
        "perplexity of a random model",
        evaluation.random_perplexity,
        on=("bench",),
        shows="{perplexity:.1f} with a vocabulary of {vocabulary}",
        allowed={"ratio": near(1, 0.05)},
        wording="V within 5 %",
        hint="the evaluation leaks what it should predict, or scores the wrong tokens",
    ),
    Row(
        "evaluation leaves fp16 as it was",
        evaluation.dtype_round_trip,
        on=("bench",),
        hint="the evaluation in float32 changes the student: the final report would crash",
    ),
    # The loop: the same result however a run is cut into micro-batches and sessions.
    Row(
        "gradient accumulation",
        loop.accumulation,
        on=("bench",),
        shows="7 windows as 8x1, 4x2, 1x8: off by {worst:.1e}",
        allowed={"worst": below(1e-4)},
        hint="the gradient depends on how a step is cut into micro-batches",
    ),
    Row(
        "resume",
        loop.resume,
        on=("bench",),
        hint="a resumed run computes something else: do not trust checkpoints",
    ),
    Row(
        "optimizer steps and schedule",
        loop.optimizer_steps,
        on=("bench",),
        shows="{planned} planned, {taken} taken, schedule at {scheduled}, learning rate {rate:.0e} at the end",
        allowed={"planned": equal_to(6), "taken": equal_to(6), "scheduled": equal_to(6), "rate": equal_to(0)},
        wording="6, 6, 6, 0 (11 windows in steps of 4, twice)",
        hint="steps or learning rate do not fit the data: part of the schedule is lost",
    ),
    Row(
        "early stopping",
        loop.early_stopping,
        on=("bench",),
        hint="patience is not honoured, or the best weights are lost",
    ),
)

# Three checks of text, carried out on the tiny models' and on the user's.
DUPLICATES = Row(
    "duplicates",
    run_setup.duplicates,
    on=("job",),
    hint="the loader repeats or drops windows; or texts repeat: set data.deduplicate=true",
)
LEAKAGE = Row(
    "leakage",
    run_setup.leakage,
    on=("job",),
    hint="text of the evaluation is trained on: its figures would be too good. Give other --eval-data",
)
COVERAGE = Row(
    "alignment coverage",
    run_setup.coverage,
    on=("job",),
    hint="the tokenizers share few boundaries, so KD reaches little text; choose a closer pair",
)

# The run to come: its models, its text, and what it needs of the machine.
MODELS = (
    Row(
        "models",
        run_setup.models,
        on=("setup",),
        hint="give folders or hub ids that hold weights; --student-init random needs none",
    ),
    Row(
        "label shift: your architecture",
        label_shift_of_architecture,
        on=("setup",),
        hint="choose an architecture whose logits are head(body(x)), or check config.json",
    ),
    Row(
        "one step and the export: your student",
        step_and_export,
        on=("setup", "job"),
        hint=dry_run.REMEDY,
    ),
    Row(
        "window length",
        run_setup.window_length,
        on=("setup",),
        hint="raise --max-length, or choose models that read more at once",
    ),
)

LAYERS = Row(
    "layers of the student",
    layers_of_student,
    on=("setup", "choose_layers"),
    hint="give another number of layers, or --student-init pretrained",
)
SETTINGS = Row(
    "settings",
    run_setup.settings_read,
    on=("setup",),
    hint="leave them out, or change what keeps them from having an effect",
)
DOCUMENTS = Row("documents", run_setup.documents, on=("job",), hint=DOCUMENTS_REMEDY)
SPELT_TEXT = Row(
    "text in tokens",
    run_setup.spelt_text,
    on=("job", "sides"),
    hint="the tokens leave text out, so bits per byte do not compare; choose a byte-level tokenizer",
)
ROUTER = Row(
    "router at the start",
    router_at_start,
    on=("setup", "job", "choose_layers"),
    hint="set the weights of the hidden-state terms to 0, or choose a closer pair",
)

RESOURCES = (
    Row(
        "memory",
        run_setup.memory,
        on=("setup",),
        hint="lower --batch-size (and raise --gradient-accumulation-steps), lower --max-length, or smaller models",
    ),
    Row(
        "disk",
        run_setup.disk,
        on=("setup",),
        hint="free some space, choose another --output-dir, or lower training.keep_checkpoints",
    ),
    Row(
        "output directory",
        run_setup.output_directory,
        on=("setup",),
        hint="choose another --output-dir",
    ),
)


# ------------------------------------------------------------------------------ what is measured on


def tiny_subjects(folder: Path) -> dict[str, Any]:
    """Build the tiny models as a run of train.py would be: the subjects `bench`, `job` and `twins`."""
    tiny = miniature.build(folder)
    config = RunConfig(
        teacher=ModelConfig(str(tiny.teacher)),
        student=StudentConfig(str(tiny.student), "random"),
        data=DataConfig(train=[str(tiny.text)], eval_fraction=0.1, max_length=miniature.CONTEXT, num_workers=1),
        training=TrainingConfig(batch_size=2, gradient_accumulation_steps=2, epochs=2, learning_rate=1e-2),
        evaluation=EvaluationConfig(max_windows=24),
        # With hidden-state terms, so that the batches have anchors.
        curriculum=CurriculumConfig.of_weights(dict.fromkeys(ROUTER_TERMS, 0.1)),
    )
    with miniature.cache_in(folder):
        job = prepare(config, method_of(config), build_accelerator("no", cpu=True))

    # A run calibrates its router before the first step, too.
    def join(student: nn.Module, teacher: nn.Module, weights: Mapping[str, Any]) -> DistillationFramework:
        frozen = FrozenTeacher(teacher, job.vocabulary)
        module = self_check.assemble(student, frozen, job.vocabulary, **weights)
        if module.router is not None:
            module.calibrate([job.collate(bench.windows)])
        return module

    bench = Bench(folder, tiny, job, join)
    twins = self_check.Twins.of(bench.student, job.tokenizer, tiny.texts[:3], miniature.CONTEXT)
    return {"bench": bench, "job": job, "twins": twins}


def default_setup(config: RunConfig) -> SetUp:
    """Return the start of the embedded default, by the sizes of its models alone."""
    return SetUp(
        config,
        student=quickstart.student_config(quickstart.STUDENT_VOCABULARY),
        teachers={"teacher": quickstart.teacher_config(quickstart.TEACHER_VOCABULARY)},
        text_bytes=1_500_000,
        chunk_rows=chunk_rows,
        built_later=quickstart_names.NAMES,
    )


def own_setup(config: RunConfig) -> tuple[SetUp, Job]:
    """Return what train.py would start from; reads at most `MOST_DOCUMENTS` of the text.

    Raises:
        UserError: a mistake in models or data.
    """
    check_requirements(config, hardware.choose_device().value)
    resolved = config
    if quickstart.is_named(config):
        # The teacher need not be trained yet: its folder holds a configuration and a tokenizer.
        material = quickstart.material()
        resolved = quickstart.with_paths(config, material, lambda: material.teacher)

    # Of a stream the beginning is read anyway, and no more.
    limit = min(config.data.max_documents or MOST_DOCUMENTS, MOST_DOCUMENTS)
    resolved = replace(
        resolved,
        data=replace(resolved.data, max_documents=None if resolved.data.streaming else limit),
        teacher=on_one_process(resolved.teacher),
    )
    job = prepare(resolved, method_of(resolved), build_accelerator("no", cpu=True))
    job = several_teachers.with_parts(job)

    shapes = load_shapes(resolved)
    student = shapes.pop("student")
    # A run without a teacher has the student's in its place.
    teachers = {} if resolved.teacher.name is None else shapes

    # Only the beginning of a large text is read here, so its files say more about its size.
    files = [user_path(name) for name in resolved.data.train]
    size_on_disk = sum(file.stat().st_size for file in files if file.is_file())
    size_as_read = sum(int(size) for size in job.windows["bytes"])
    text_bytes = max(size_as_read, size_on_disk)
    return SetUp(config, student, teachers, text_bytes, chunk_rows, quickstart_names.NAMES), job


# --------------------------------------------------------------------------------------- the report


def all_checks(config: RunConfig, recipe: str, *, is_default: bool, folder: Path) -> Iterator[str | BriefGroup | Check]:
    """Yield titles and checks, one by one as they are done: this machine, then this code, then what would be trained.

    Args:
        recipe: the sentence of `configure` on where the settings come from.
        is_default: nothing was asked for on the command line.
        folder: for the tiny models.

    Raises:
        UserError: models or text that are missing; reported after the machine.
    """
    if config.training.batch_size == "auto":
        # Whatever fits will be chosen; the least there can be must fit.
        config = replace(config, training=replace(config.training, batch_size=1))

    yield "This machine"
    for row in MACHINE:
        yield row.check({"config": config})
    try:
        tiny = tiny_subjects(folder)
    except UserError as error:
        raise RuntimeError(f"the tiny models cannot be prepared: {error}") from error
    yield ONE_STEP.check({**tiny, "config": config})

    # A mistake in models or text ends the checklist here, before the minute that the code takes.
    is_embedded = is_default and config.student.name in quickstart_names.NAMES
    setup, job = (default_setup(config), None) if is_embedded else own_setup(config)

    yield BriefGroup("This code, on tiny models")
    for row in (*CODE, *TINY, DUPLICATES, LEAKAGE, COVERAGE):
        yield row.check(tiny)

    if job is None:
        yield "The embedded default (flags of train.py check your own set-up)"
    else:
        default = "The default of this machine (flags of train.py check your own set-up)"
        yield default if is_default else "Your set-up"
        yield from (f"  {line}" for line in recipe.splitlines())
        yield from run_checks(setup, job)

    for row in RESOURCES:
        yield row.check({"setup": setup})


def run_checks(setup: SetUp, job: Job) -> Iterator[str | Check]:
    """Yield the checks of the user's models and text, and an example of what is learned from."""
    # Two checks need the layers, which take a whole model to choose.
    choose_layers = cache(partial(student_layers.measure, job))
    subjects = {"setup": setup, "job": job, "choose_layers": choose_layers}
    cut = () if setup.config.student.layers is None else (LAYERS,)
    for row in (SETTINGS, *MODELS, *cut, DOCUMENTS, DUPLICATES, LEAKAGE):
        yield row.check(subjects)

    # Without a teacher there are no anchors to count, and only the student's tokens matter.
    if not setup.teachers:
        yield SPELT_TEXT.check({"job": job, "sides": ("student",)})
    parts = job.parts or (job,)
    sides: tuple[str, ...] = ("student", "teacher")
    for role, part in zip(setup.teachers, parts, strict=False):
        for row in (COVERAGE, SPELT_TEXT):
            of_teacher = replace(row, name=f"{row.name}: {role}") if job.parts else row
            yield of_teacher.check({"job": part, "sides": sides})
        sides = ("teacher",)

    # No check, but something that only a person can judge: a decoded window.
    yield "  " + "\n  ".join(stages.example_of_learning(job))
    # Of several teachers the states of the first one are compared with.
    collate: Any = parts[0].collate  # a PairCollator, or one that remembers
    if collate.router is not None:
        yield ROUTER.check({**subjects, "job": parts[0]})
