"""Checks to run before a long training, printed as a checklist; under a minute on two CPU cores.

    python verify_fixes.py                                                 this machine and this code
    python verify_fixes.py --teacher DIR --student DIR --train-data FILE   and your own set-up (flags of train.py)

The first group of checks trains tiny models with the real loop, loss, loader and evaluation, on text that ships
with Python: no network, nothing left behind. Exit code 0: all is well; 1: a check failed; 2: a mistake in what
was asked for.
"""

import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import train
from models.config import CurriculumConfig, LossConfig, Ramp, RouterConfig, Schedule, Term
from models.curriculum import CurriculumScheduler
from models.distillation import LM_ONLY
from models.distillation_framework import DistillationFramework
from models.language_model import check_head, vocabulary_size
from models.losses.chunk_size import chunk_rows
from models.student_aware_router import ROUTER_TERMS, StudentAwareRouter
from models.teacher.frozen import FrozenTeacher
from models.text.collate import PairCollator
from models.text.tokens import MARKER, TEXT
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import IGNORE, PairedBatch
from utils.checks import checklist, evaluation, loop, machine, miniature
from utils.checks import setup as preflight
from utils.checks.checklist import Check, check
from utils.config import command_line, quickstart_names
from utils.config.settings import DataConfig, EvaluationConfig, ModelConfig, StudentConfig, TrainingConfig
from utils.data.batch_order import permutation
from utils.errors import UserError
from utils.forecast import model_size
from utils.logs.step_logger import StepLogger
from utils.logs.streams import make_streams_safe
from utils.machine import hardware
from utils.parallel.accelerator import build_accelerator
from utils.paths import user_path
from utils.pretrained import export, generation, loading, locate, precision
from utils.pretrained.families import keep_weights
from utils.pretrained.student import make as make_student
from utils.pretrained.teacher import on_one_process
from utils.run import quickstart, stages
from utils.run.exit_codes import EXIT_CODES
from utils.run.prepare import Job, prepare
from utils.run.requirements import check as check_requirements
from utils.seeding import seed_everything
from utils.training import dry_run
from utils.training.checkpoints import CheckpointStore
from utils.training.loop import FitResult, fit
from utils.training.options import LoopOptions

LENGTH = miniature.CONTEXT
"""Tokens per window of the tiny models."""
MOST_DOCUMENTS = 20_000
"""So many of the user's own documents are read."""
ROUTED_WINDOWS = 8
"""So many of the user's windows calibrate a router, and as many are compared."""


# ----------------------------------------------------------------------------------- the tiny models


class Bench:
    """A tiny teacher and student with different tokenizers, prepared as a run of train.py would be."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tiny = folder, miniature.build(folder)
        config = train.RunConfig(
            teacher=ModelConfig(str(self.tiny.teacher)),
            student=StudentConfig(str(self.tiny.student), "random"),
            data=DataConfig(train=[str(self.tiny.text)], eval_fraction=0.1, max_length=LENGTH, num_workers=1),
            training=TrainingConfig(batch_size=2, gradient_accumulation_steps=2, epochs=2, learning_rate=1e-2),
            evaluation=EvaluationConfig(max_windows=24),
            curriculum=CurriculumConfig(**dict.fromkeys(ROUTER_TERMS, Term(0.1))),  # batches with anchors
        )
        self.accelerator = build_accelerator("no", cpu=True)
        with miniature.cache_in(folder):
            self.job = prepare(config, config.method, self.accelerator)
        self.windows = [self.job.windows[i] for i in range(11)]
        tokenizer = self.job.tokenizer
        self.size = len(tokenizer)
        self.same_map = VocabularyMap.build(tokenizer, tokenizer)
        encoder = PairEncoder(tokenizer, tokenizer, LENGTH)
        self._same_windows = encoder.windows(self.tiny.texts[:3])[:6]
        self._same_collate = PairCollator(self.same_map, encoder.end_of_text, 0)

    @property
    def same_batch(self) -> PairedBatch:
        """Text as the student and a teacher of the same tokenizer read it."""
        return self._same_collate(self._same_windows)

    def student(self, seed: int = 0) -> nn.Module:
        seed_everything(seed)
        return loading.random_model(loading.load_config(str(self.tiny.student), "student"))

    def framework(
        self, student: nn.Module, teacher: FrozenTeacher | None, loss: LossConfig | None = None, **weights: Schedule
    ) -> DistillationFramework:
        """Weights that are not given are those of CurriculumConfig; a teacher of the student's size is its equal."""
        vocabulary = self.same_map if teacher and len(teacher.order) == self.size else self.job.vocabulary
        return assemble(student, teacher, vocabulary, loss or LossConfig(), **weights)

    def distillation(self, seed: int = 0, weights: dict[str, Schedule] | None = None, **teacher: Any):
        """A fresh student under a fixed teacher of the other tokenizer; `teacher`: its device and dtype."""
        seed_everything(1)
        model = loading.random_model(loading.load_config(str(self.tiny.teacher), "teacher")).to(**teacher)
        module = self.framework(self.student(seed), FrozenTeacher(model, self.job.vocabulary), **(weights or {}))
        if module.router is not None:
            module.calibrate([self.job.collate(self.windows)])
        return module

    def fit(self, module: nn.Module, windows: Sequence[dict], options: dict[str, Any] | None = None, **training: Any):
        """The real loop; `training` are settings, `options` LoopOptions, or an accelerator. Returns its FitResult."""
        config, logger = replace(self.job.config.training, **training), StepLogger(None, 10**6, main_process=False)
        options = {"logger": logger, **(options or {})}
        accelerator = options.pop("accelerator", self.accelerator)
        loop_options = LoopOptions(**options)
        return fit(module, windows, self.job.collate, config, accelerator=accelerator, options=loop_options)

    @cached_property
    def whole_run(self) -> tuple[DistillationFramework, FitResult, dict[str, Any]]:
        """Eleven windows in steps of four, twice: 3 + 3 optimizer steps; what it saved at its end."""
        module, store = self.distillation(), CheckpointStore(self.folder / "whole")
        result = self.fit(module, self.windows, {"checkpoints": store})
        return module, result, store.load(store.newest_whole()).objects


def assemble(
    student: nn.Module,
    teacher: FrozenTeacher | None,
    vocabulary: VocabularyMap | None,
    loss: LossConfig,
    **weights: Schedule,
) -> DistillationFramework:
    """A framework for six steps."""
    curriculum = CurriculumConfig(**{name: Term(weight) for name, weight in weights.items()})
    return DistillationFramework(student, teacher, vocabulary, loss, CurriculumScheduler(curriculum, loss, 6))


def random_batches(
    vocabulary: int, lengths: Sequence[int], seed: int, router: RouterConfig | None = None, start: int | None = None
) -> Iterator[PairedBatch]:
    """Windows of uniformly random tokens, of which nothing can be learnt, through the real collator; without end.

    Args:
        start: what the decoder of an encoder-decoder model begins with; its encoder then reads random tokens, too.
    """
    generator, segments = np.random.default_rng(seed), np.arange(vocabulary)[:, None]
    collate = PairCollator(VocabularyMap.from_segments(segments, vocabulary), (None, None), 0, router)
    while True:
        rows = []
        for place in map(np.arange, lengths):
            fixed = {"starts": place, "ends": place + 1, "roles": np.where(place == 0, MARKER, TEXT)}
            row = {"ids": generator.integers(0, vocabulary, len(place)), **fixed}
            if start is not None:
                row["ids"][:1], row["source"] = start, generator.integers(0, vocabulary, len(place))
            row = {f"{side}_{k}": v for side in ("student", "teacher") for k, v in row.items()}
            rows.append({**row, "bytes": len(place), "left_out": 0, "documents": ""})
        yield collate(rows)


# -------------------------------------------------------------------------------------- loss and KD


def lm_losses(student: nn.Module, batch: PairedBatch) -> tuple[float, float]:
    """Nats per token of the framework's LM term, and of transformers' own loss, which shifts the labels itself."""
    module = assemble(student, None, None, LossConfig(), kd=0.0, lm=1.0)
    unshifted = torch.where(batch.labels.roll(1, 1) == IGNORE, IGNORE, batch.student_ids)
    unshifted[:, 0] = IGNORE
    with torch.no_grad():
        ours = module(batch, 0).terms["lm"].sum.item() / batch.counts["lm"]
        inputs, labels = batch.scored("student")
        decodes = inputs.pop("decoder_input_ids", None) is not None  # and makes what it reads of its labels
        return ours, student(**inputs, labels=labels if decodes else unshifted).loss.item()


@check("label shift: fresh student", "labels or initialisation are wrong: training would teach nonsense")
def fresh_student(bench: Bench) -> tuple:
    loss, _ = lm_losses(bench.student(), next(random_batches(bench.size, [LENGTH] * 16, seed=1)))
    known = math.log(bench.size)
    return f"{loss:.3f} nats on random tokens, ln V is {known:.3f}", "within 5 %", abs(loss / known - 1) < 0.05


@check("label shift: exactly once", "labels are shifted twice, or not at all, on their way to the loss")
def shifted_once(bench: Bench) -> tuple:
    ours, theirs = lm_losses(bench.student(3), bench.same_batch)
    return f"{ours:.5f}, transformers' own shift {theirs:.5f}", "equal to 1e-4", abs(ours - theirs) < 1e-4


def learn_random(bench: Bench, change: Callable[[PairedBatch], PairedBatch], steps: int = 40) -> float:
    """LM loss in units of ln V after some steps on random tokens, each seen once."""
    module = bench.framework(bench.student(), None, kd=0.0, lm=1.0)
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-2), []
    for batch in islice(random_batches(bench.size, [LENGTH] * 8, seed=0), steps):
        loss = module(change(batch), 0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(bench.size))
    return sum(losses[-5:]) / 5


@check("label shift: copying", "labels are not shifted: the student would learn to copy its input")
def copying(bench: Bench) -> tuple:
    def forget_shift(batch: PairedBatch) -> PairedBatch:
        return replace(batch, labels=torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids))

    right, planted = learn_random(bench, lambda batch: batch), learn_random(bench, forget_shift)
    value = f"{right:.2f} ln V after 40 steps on random tokens; without the shift, on purpose, {planted:.2f}"
    return value, "0.95 or more; on purpose below 0.5", right >= 0.95 and planted < 0.5


def kd_gradient(bench: Bench, loss: LossConfig, teacher_seed: int) -> tuple[float, float]:
    """KD per token of a student under a teacher of its own architecture, and the norm of its gradient."""
    module = bench.framework(bench.student(0), FrozenTeacher(bench.student(teacher_seed), bench.same_map), loss, lm=0.0)
    output = module(bench.same_batch, 0)
    output.loss.backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    return output.terms["kd"].sum.item() / output.terms["kd"].count, norm.item()


@check("KD of equal models", "teacher and student are compared on different outcomes: KD has a floor above 0")
def equal_models(bench: Bench) -> tuple:
    losses = [
        LossConfig(divergence=kind, tail=tail, top_k=k, temperature=t)
        for kind in ("forward_kl", "reverse_kl", "jsd", "skew_kl")
        for tail, k, t in (("bucket", 8, 1.0), ("bucket", 512, 4.0), ("bucket", 8, 4.0), ("renormalise", 8, 2.0))
    ]
    values, norms = zip(*(kd_gradient(bench, loss, 0) for loss in losses), strict=True)
    worst = max(map(abs, values)), max(norms)
    value = f"at most {worst[0]:.1e} nats, gradient {worst[1]:.1e}, in {len(losses)} variants"
    return value, "0 (below 1e-5)", max(worst) < 1e-5


@check("T squared in the gradient", "KD is not multiplied by the square of its temperature: it fades as T grows")
def temperature_squared(bench: Bench) -> tuple:
    (_, cold), (_, warm) = (kd_gradient(bench, LossConfig(top_k=512, temperature=t), 1) for t in (1.0, 4.0))
    value = f"gradient at T = 4 is {warm / cold:.2f} of that at T = 1 (without T squared 0.06)"
    return value, "0.8 to 1.25", 0.8 < warm / cold < 1.25


@check("curriculum table", "configs/reference_curriculum.yaml or the ramps of models/curriculum.py were changed")
def curriculum_table() -> tuple:
    config = train.configure(["--config", "reference_curriculum"])[0]
    scheduler = CurriculumScheduler(config.curriculum, config.loss, 1000)
    names = ("kd", "lm", "feat", "rel", "attn", "layer", "contr")
    table = {
        4: (0.7, 0.3, 0, 0, 0, 0, 0),
        502: (0.7, 0.3, 0.1, 0, 0.1, 0.017, 0),
        1000: (0.7, 0.3, 0.1, 0, 0.1, 0.1, 0),
    }
    off = [
        f"{name} {found:.4f} instead of {wanted} at {step / 10} %"
        for step, row in table.items()
        for name, wanted in zip(names, row, strict=True)
        if abs((found := scheduler.weights(step)[name]) - wanted) > 5e-4
    ]
    return "; ".join(off) or "21 of 21 weights at 0.4, 50.2 and 100 %", "the reference run's, to 3 decimals", not off


# --------------------------------------------------------------------------------------- the router


def unrelated(layers: int, batch: PairedBatch, width: int, seed: int) -> list[Tensor]:
    """States that have nothing to do with any others: large, and one channel of them huge, as real models have it."""
    generator = torch.Generator().manual_seed(seed)
    states = 10 * torch.randn(layers, *batch.student_ids.shape, width, generator=generator) + 3
    states[..., 0] *= 100
    return list(states)


def fresh_value(term: str, length: int, width: int) -> float:
    """A term per item as training begins, of two windows and models whose states have nothing in common."""
    seed_everything(0)
    router = StudentAwareRouter(RouterConfig(layers=2, teacher_layers=3), (4, width), (6, 3 * width // 2))
    seen, batch = islice(random_batches(2, [length] * 2, 0, router.config), 2)
    states = [(unrelated(2, b, width, i), unrelated(3, b, 3 * width // 2, 2 + i)) for i, b in enumerate((seen, batch))]
    router.calibrate([(*states[0], seen.anchors)])
    with torch.no_grad():
        return router(*states[1], batch.anchors, {term})[term].item() / batch.counts[term]


def normalisation(term: str, name: str) -> Callable[[], Check]:
    """The check of one term's scale."""

    @check(f"normalisation: {name}", f"{term} depends on length or width: its weight would mean nothing; report it")
    def measure() -> tuple:
        table = {width: [fresh_value(term, length, width) for length in (32, 128, 512)] for width in (32, 256)}
        rows = [f"{', '.join(f'{value:.3g}' for value in row)} at width {width}" for width, row in table.items()]
        right = all(0.05 <= value <= 2 for row in table.values() for value in row)
        return f"{'; '.join(rows)} (32, 128, 512 tokens)", "0.05 to 2 for unrelated states", right

    return measure


NORMALISED = (
    normalisation("feat", "feature"),
    normalisation("rel", "attention relations"),
    normalisation("attn", "attention alignment"),
    normalisation("layer", "layer"),
    normalisation("contr", "contrastive"),
)


@check("contrastive: a row of padding", "a window without anchors teaches, or is a negative of the others; report it")
def padding_row() -> tuple:
    values, gradients = [], []
    for rows in (3, 4):
        seed_everything(0)
        router = StudentAwareRouter(RouterConfig(layers=1, teacher_layers=1), (1, 32), (1, 48))
        batch = next(random_batches(2, [LENGTH, LENGTH, LENGTH, 0][:rows], 0, router.config))
        states, targets = (unrelated(1, batch, width, seed)[0] for width, seed in ((32, 0), (48, 1)))
        states[3:], targets[3:] = torch.nan, torch.nan  # attention over nothing
        value = router([states.requires_grad_()], [targets], batch.anchors, {"contr"})["contr"]
        value.backward()
        values.append(value.item() / batch.counts["contr"])
        gradients.append(states.grad)
    own, others = gradients[1][3].norm().item(), (gradients[1][:3] - gradients[0]).norm() / gradients[0].norm()
    value = (
        f"{values[1]:.5f}, without it {values[0]:.5f}; its gradient {own:.0e}, that of the others off by {others:.0e}"
    )
    right = abs(values[1] - values[0]) < 1e-5 and own == 0 and others < 1e-5
    return value, "equal to 1e-5, its gradient 0", right


@check("hidden states at weight 0", "models are asked for hidden states that no term needs: slower, and more memory")
def hidden_states(bench: Bench) -> tuple:
    ramp = Ramp(((0.0, 0.0), (1.0, 0.1)))
    module, kept = bench.distillation(weights=dict.fromkeys(ROUTER_TERMS, ramp)), []
    for model in (module.student, module.teacher.model):
        model.base_model.register_forward_hook(lambda _, __, output: kept.append(output.hidden_states is not None))
    batch = bench.job.collate(bench.windows)
    off = module(batch, 0).loss.item() - bench.distillation()(batch, 0).loss.item()
    without, asked = sum(kept), len(kept)
    module(batch, None)
    value = f"kept by {without} of {asked} models at weight 0, by {sum(kept) - without} at 0.1; loss {off:+.0e}"
    return value, "0, 2, and the loss without a router", (without, asked, sum(kept), off) == (0, 2, 2, 0)


# ------------------------------------------------------------------------------------ the user's run


@check("label shift: your architecture", "choose an architecture whose logits are head(body(x)), or check config.json")
def own_label_shift(setup: preflight.SetUp) -> tuple:
    start = setup.student.decoder_start_token_id if setup.student.is_encoder_decoder else None
    most = 1.25 if start is None else math.inf  # T5 1.1 begins with large logits
    allowed = f"{'0.95 to 1.25 ln V' if start is None else '0.95 ln V or more'}, equal to 1e-3"
    shapes = {"student": setup.student, **({"teacher": setup.teacher} if setup.teacher else {})}
    fresh = {role: model_size.shallow(shape, preflight.REPRESENTATIVE) for role, shape in shapes.items()}
    fresh = {role: config for role, config in fresh.items() if not preflight.too_large(config)}
    if "student" not in fresh:
        return "not measured: the student is too large to be built for a check", allowed, True
    seed_everything(setup.config.training.seed)
    built = {role: loading.random_model(config) for role, config in fresh.items()}
    for role, model in built.items():
        check_head(model, role)
    size = vocabulary_size(built["student"])
    ours, theirs = lm_losses(built["student"].eval(), next(random_batches(size, [LENGTH] * 4, 0, start=start)))
    ratio = ours / math.log(size)
    value = (
        f"{ratio:.3f} ln V on random tokens, ln V is {math.log(size):.2f}; transformers' own shift {theirs - ours:+.0e}"
    )
    return value, allowed, 0.95 < ratio < most and abs(ours - theirs) < 1e-3 * max(1, theirs / 10)


@check("one step and the export: your student", dry_run.REMEDY)
def own_modes(setup: preflight.SetUp, job: Job) -> tuple:
    allowed = "no error"
    config = model_size.shallow(setup.student, preflight.REPRESENTATIVE)
    if preflight.too_large(config):
        return "not measured: the student is too large to be built for a check", allowed, True

    seed_everything(setup.config.training.seed)
    student = loading.random_model(config)
    keep_weights(student.config)
    folder = Path(locate.locate(setup.config.student.name, "student"))
    if folder.is_dir():
        settings = generation.load(folder, f"student {setup.config.student.name}")
        student.generation_config = settings or student.generation_config

    scheduler = CurriculumScheduler(LM_ONLY, LossConfig(), 1)
    module = DistillationFramework(student, None, job.vocabulary, LossConfig(), scheduler)
    batch = job.collate([job.windows[0]])
    dry_run.try_modes(module, student, batch, job.accelerator, compares=False)
    export.rehearse_export(student, job.tokenizer)
    return f"trained, evaluated and saved on trial: {type(student).__name__} of few layers", allowed, True


@check("router at the start", "set the weights of the hidden-state terms to 0, or choose a closer pair")
def own_router(setup: preflight.SetUp, job: Job) -> tuple:
    allowed = "2 or less"
    if setup.config.teacher.name in setup.built_later:
        return "not measured: the teacher is built by the first run", allowed, True
    if any(map(preflight.too_large, (setup.student, setup.teacher))):
        return "not measured: a model is too large to be loaded for a check", allowed, True
    if {setup.config.teacher.dtype, setup.config.student.lora.base} & {*precision.QUANTISED}:
        return "not measured: this check computes on the CPU, quantised weights do not", allowed, True
    config, size = job.config, min(job.config.training.batch_size, ROUTED_WINDOWS)
    student, teacher = make_student(config.student, config.training, job.accelerator).eval(), stages.load_teacher(job)
    scheduler = CurriculumScheduler(config.curriculum, config.loss, 1)
    module = DistillationFramework(student, teacher, job.vocabulary, config.loss, scheduler, config.router)
    chosen = permutation(len(job.windows), config.training.seed, 0).tolist()
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    few = ROUTED_WINDOWS // size
    batches = [job.collate([job.windows[i] for i in group]) for group in groups[: 2 * few]]
    module.calibrate(batches[:few])
    with torch.no_grad():
        found = [module(batch, 0, measure=True).terms for batch in batches[-few:]]
    values = {
        name: sum(terms[name].sum.item() for terms in found) / max(sum(terms[name].count for terms in found), 1)
        for name in ROUTER_TERMS
        if name in config.curriculum.used()
    }
    named = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return f"{named}, calibrated on {few * size} windows", allowed, all(value <= 2 for value in values.values())


def default_setup(config: train.RunConfig) -> preflight.SetUp:
    """What the embedded default starts from, by sizes alone."""
    student = quickstart.student_config(quickstart.STUDENT_VOCABULARY)
    teacher = quickstart.teacher_config(quickstart.TEACHER_VOCABULARY)
    return preflight.SetUp(config, student, teacher, 2_000_000, chunk_rows, quickstart_names.NAMES)


def own_setup(asked: train.RunConfig) -> tuple[preflight.SetUp, Job]:
    """What train.py would start from; reads at most `MOST_DOCUMENTS` of the text.

    Raises:
        UserError: a mistake in models or data.
    """
    check_requirements(asked, hardware.choose_device().value)
    config = asked
    if quickstart.is_named(asked):
        material = quickstart.material()
        config = quickstart.with_paths(asked, material, lambda: material.teacher)  # need not be trained yet
    limit = min(asked.data.max_documents or MOST_DOCUMENTS, MOST_DOCUMENTS)
    config = replace(config, data=replace(config.data, max_documents=limit), teacher=on_one_process(config.teacher))
    job = prepare(config, config.method, build_accelerator("no", cpu=True))
    student = loading.load_config(config.student.name, "student")
    teacher = loading.load_config(config.teacher.name, "teacher") if config.teacher.name else None
    files = [user_path(name) for name in config.data.train]
    text_bytes = max(sum(map(int, job.windows["bytes"])), sum(f.stat().st_size for f in files if f.is_file()))
    return preflight.SetUp(asked, student, teacher, text_bytes, chunk_rows, quickstart_names.NAMES), job


# ---------------------------------------------------------------------------------------- the report

TINY: tuple[Callable[[Bench], Check], ...] = (
    *(fresh_student, shifted_once, copying, equal_models, temperature_squared, hidden_states, loop.half_teacher),
    *(evaluation.random_perplexity, evaluation.dtype_round_trip, loop.accumulation, loop.resume),
    *(loop.optimizer_steps, loop.early_stopping),
)


def all_checks(argv: Sequence[str], folder: Path) -> Iterator[str | Check]:
    """Titles and checks, one by one as they are done: this machine, then this code, then what would be trained.

    Raises:
        UserError: a mistake in what was asked for. Models or text that are missing are told after the machine.
    """
    config, recipe = train.configure(argv)
    if config.training.batch_size == "auto":  # whatever fits, the least is what must
        config = replace(config, training=replace(config.training, batch_size=1))
    yield "This machine"
    yield from (machine.versions(), machine.conflicts(), machine.kernels(), machine.precision(config))
    try:
        bench = Bench(folder)
    except UserError as error:
        raise RuntimeError(f"the tiny models cannot be prepared: {error}") from error
    yield loop.one_step(bench, config)
    is_embedded = not argv and config.student.name in quickstart_names.NAMES
    setup, own = (default_setup(config), None) if is_embedded else own_setup(config)
    yield "This code, on tiny models"
    yield from (curriculum_table(), evaluation.weighted_perplexity(), padding_row())
    yield from (measure() for measure in NORMALISED)
    yield from (measure(bench) for measure in TINY)
    yield from (preflight.duplicates(bench.job), preflight.leakage(bench.job), preflight.coverage(bench.job))
    if own is None:
        yield "The embedded default (flags of train.py check your own set-up)"
    else:
        yield "Your set-up" if argv else "The default of this machine (flags of train.py check your own set-up)"
        yield f"  {recipe}"
        yield from (preflight.models(setup), own_label_shift(setup), own_modes(setup, own))
        yield preflight.window_length(setup)
        yield from (preflight.documents(own), preflight.duplicates(own), preflight.leakage(own))
        yield from [preflight.coverage(own)] if setup.teacher else []
        yield preflight.spelt_text(own, ("student", "teacher") if setup.teacher else ("student",))
        yield "  " + "\n  ".join(stages.example_of_learning(own))
        if own.collate.router is not None:
            yield own_router(setup, own)
    yield from (preflight.memory(setup), preflight.disk(setup), preflight.output_directory(setup))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    make_streams_safe()
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        parser = command_line.parser()
        parser.prog, parser.description = "verify_fixes.py", __doc__
        parser.print_help()
        return 0
    logging.getLogger("utils").setLevel(logging.ERROR)  # what the loop says of toy runs is no news
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # tiny products gain nothing from more, and on a busy machine lose a hundredfold
    try:
        with tempfile.TemporaryDirectory() as folder:
            return checklist.run(all_checks(argv, Path(folder)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return EXIT_CODES["SIGINT"]


if __name__ == "__main__":
    sys.exit(main())
