"""Checks to run before a long training, printed as a checklist; under a minute on two CPU cores.

    python verify_fixes.py                                                 this machine and this code
    python verify_fixes.py --teacher DIR --student DIR --train-data FILE   and your own set-up (flags of train.py)

The first group of checks trains tiny models with the real loop, loss, loader and evaluation, on text that ships
with Python: no network, nothing left behind. Exit code 0: all is well; 1: a check failed; 2: a mistake in what
was asked for.
"""

import copy
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
from models.causal_lm import check_head, vocabulary_size
from models.config import CurriculumConfig, LossConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.outputs import IGNORE, PairedBatch
from models.pairing import PairCollator, PairEncoder
from models.teacher import LOGITS_AT_ONCE, FrozenTeacher
from models.vocabulary import MARKER, TEXT, VocabularyMap
from utils import checklist, command_line, hardware, miniature, preflight, pretrained, quickstart
from utils.checklist import Check, check
from utils.checkpoints import CheckpointStore
from utils.config import DataConfig, EvaluationConfig, ModelConfig, StudentConfig, TrainingConfig
from utils.errors import UserError
from utils.logs import StepLogger
from utils.plan import another_accelerator, build_accelerator
from utils.seeding import seed_everything
from utils.training import FitResult, fit

LENGTH = miniature.CONTEXT
"""Tokens per window of the tiny models."""
MOST_DOCUMENTS = 20_000
"""So many of the user's own documents are read."""
LEAST_COVERAGE = 0.5
"""Share of student positions with an anchor, below which KD teaches little."""
FEW_STEPS = 4
"""On the device; with fp16 the first may be left out while the scale of the loss is found."""


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
        )
        self.accelerator = build_accelerator("no", cpu=True)
        with miniature.cache_in(folder):
            self.job = train.prepare(config, self.accelerator)
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
        return pretrained.random_model(pretrained.load_config(str(self.tiny.student), "student"))

    def framework(
        self, student: nn.Module, teacher: FrozenTeacher | None, loss: LossConfig | None = None, **weights: float
    ) -> DistillationFramework:
        """Weights that are not given are those of CurriculumConfig; a teacher of the student's size is its equal."""
        vocabulary = self.same_map if teacher and len(teacher.rank) == self.size else self.job.vocabulary
        return assemble(student, teacher, vocabulary, loss or LossConfig(), **weights)

    def distillation(self, seed: int = 0, **teacher: Any) -> DistillationFramework:
        """A fresh student under a fixed teacher of the other tokenizer; `teacher`: its device and dtype."""
        seed_everything(1)
        model = pretrained.random_model(pretrained.load_config(str(self.tiny.teacher), "teacher")).to(**teacher)
        return self.framework(self.student(seed), FrozenTeacher(model, self.job.vocabulary))

    def fit(self, module: nn.Module, windows: Sequence[dict], options: dict[str, Any] | None = None, **training: Any):
        """The real loop; `training` are settings, `options` are arguments of `fit`. Returns its FitResult."""
        config, logger = replace(self.job.config.training, **training), StepLogger(None, 10**6, main_process=False)
        options = {"accelerator": self.accelerator, "logger": logger, **(options or {})}
        return fit(module, windows, self.job.collate, config, **options)

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
    **weights: float,
) -> DistillationFramework:
    """A framework for six steps."""
    curriculum = CurriculumConfig(**{name: Term(weight) for name, weight in weights.items()})
    return DistillationFramework(student, teacher, vocabulary, loss, CurriculumScheduler(curriculum, loss, 6))


def random_batches(vocabulary: int, windows: int, seed: int) -> Iterator[PairedBatch]:
    """Windows of uniformly random tokens, of which nothing can be learnt, through the real collator; without end."""
    generator, place = np.random.default_rng(seed), np.arange(LENGTH)
    fixed = {"starts": place, "ends": place + 1, "roles": np.where(place == 0, MARKER, TEXT)}
    collate = PairCollator(VocabularyMap.from_segments(np.arange(vocabulary)[:, None], vocabulary), (None, None), 0)
    while True:
        columns = [{"ids": generator.integers(0, vocabulary, LENGTH), **fixed} for _ in range(windows)]
        rows = [{f"{side}_{k}": v for side in ("student", "teacher") for k, v in row.items()} for row in columns]
        yield collate([{**row, "bytes": LENGTH, "left_out": 0, "documents": ""} for row in rows])


# --------------------------------------------------------------------------------------- the device


@check("one step on this device", "set --mixed-precision no; or train on the CPU: CUDA_VISIBLE_DEVICES=")
def one_step(bench: Bench, config: train.RunConfig) -> tuple:
    device = hardware.choose_device().value
    mixed = hardware.choose_precision(config.training.mixed_precision, device).value
    dtype = pretrained.teacher_dtype(config.teacher.dtype, device, mixed).value
    module = bench.distillation(device=device, dtype=dtype)
    before = [p.detach().clone() for p in module.parameters()]
    with another_accelerator(mixed, cpu=device.type == "cpu") as accelerator:
        result = bench.fit(module, bench.windows, {"accelerator": accelerator}, max_steps=FEW_STEPS)
    after = [p.detach().cpu() for p in module.parameters()]
    finite = all(p.isfinite().all() for p in after)
    moved = any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    taken = result.steps - result.skipped_steps
    where = "cpu, as there is no GPU" if device.type == "cpu" else str(device)
    value = f"{taken} of {result.steps} taken on {where}; mixed precision {mixed}, teacher in {dtype}"
    weights = f"weights {'finite' if finite else 'not finite'} and {'changed' if moved else 'unchanged'}"
    return f"{value}; {weights}".replace("torch.", ""), "1 or more, finite", taken > 0 and finite and moved


# -------------------------------------------------------------------------------------- loss and KD


def lm_losses(student: nn.Module, batch: PairedBatch) -> tuple[float, float]:
    """Nats per token of the framework's LM term, and of transformers' own loss, which shifts the labels itself."""
    module = assemble(student, None, None, LossConfig(), lm=1.0)
    unshifted = torch.where(batch.labels.roll(1, 1) == IGNORE, IGNORE, batch.student_ids)
    unshifted[:, 0] = IGNORE
    with torch.no_grad():
        ours = module(batch, 0).terms["lm"].sum.item() / batch.counts["lm"]
        return ours, student(batch.student_ids, attention_mask=batch.student_mask, labels=unshifted).loss.item()


@check("label shift: fresh student", "labels or initialisation are wrong: training would teach nonsense")
def fresh_student(bench: Bench) -> tuple:
    loss, _ = lm_losses(bench.student(), next(random_batches(bench.size, 16, seed=1)))
    known = math.log(bench.size)
    return f"{loss:.3f} nats on random tokens, ln V is {known:.3f}", "within 5 %", abs(loss / known - 1) < 0.05


@check("label shift: exactly once", "labels are shifted twice, or not at all, on their way to the loss")
def shifted_once(bench: Bench) -> tuple:
    ours, theirs = lm_losses(bench.student(3), bench.same_batch)
    return f"{ours:.5f}, transformers' own shift {theirs:.5f}", "equal to 1e-4", abs(ours - theirs) < 1e-4


def learn_random(bench: Bench, change: Callable[[PairedBatch], PairedBatch], steps: int = 40) -> float:
    """LM loss in units of ln V after some steps on random tokens, each seen once."""
    module = bench.framework(bench.student(), None, lm=1.0)
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=1e-2), []
    for batch in islice(random_batches(bench.size, 8, seed=0), steps):
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


# ---------------------------------------------------------------------------------------- evaluation


@check("perplexity of a random model", "the evaluation leaks what it should predict, or scores the wrong tokens")
def random_perplexity(bench: Bench) -> tuple:
    found = bench.job.held_out.score(bench.student(), "student")["perplexity"]
    return f"{found:.1f} with a vocabulary of {bench.size}", "V within 5 %", abs(found / bench.size - 1) < 0.05


@check(
    "evaluation leaves fp16 as it was", "the evaluation in float32 changes the student: the final report would crash"
)
def dtype_round_trip(bench: Bench) -> tuple:
    student = bench.student().half()
    held = list(student.parameters())
    before = [p.detach().clone() for p in held]
    inside = bench.job.held_out.score(student, "student")["loss"]
    expected = bench.job.held_out.score(copy.deepcopy(student).float(), "student")["loss"]
    after = list(student.parameters())
    tied = student.get_input_embeddings().weight is student.get_output_embeddings().weight
    same = len(after) == len(held) and all(a is b for a, b in zip(after, held, strict=True))
    bits = same and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(after, before, strict=True))
    value = f"{'same' if bits else 'other'} bits, weights {'tied' if tied else 'untied'}, loss {inside - expected:+.0e}"
    return value, "same bits, tied, loss as in float32", same and bits and tied and inside == expected


# ------------------------------------------------------------------------------------------ the loop


@check("gradient accumulation", "the gradient depends on how a step is cut into micro-batches")
def accumulation(bench: Bench) -> tuple:
    def gradient(batch_size: int) -> Tensor:
        module, seen = bench.distillation(), {}
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda g, name=name: seen.update({name: seen.get(name, 0) + g}))
        bench.fit(module, windows, max_steps=1, batch_size=batch_size, gradient_accumulation_steps=8 // batch_size)
        return torch.cat([seen[name].flatten() for name, _ in module.named_parameters()])

    windows, reference = bench.windows[:7], bench.distillation()
    reference(bench.job.collate(windows), 0).loss.backward()
    whole = torch.cat([p.grad.flatten() for p in reference.parameters()])
    worst = max(((gradient(size) - whole).norm() / whole.norm()).item() for size in (8, 4, 1))
    return f"7 windows as 8x1, 4x2, 1x8: off by {worst:.1e}", "below 1e-4", worst < 1e-4


class _StopAfter:
    """Asks the loop to stop at a step boundary, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def requested(self) -> str | None:
        self.left -= 1
        return "SIGINT" if self.left < 0 else None


@check("resume", "a resumed run computes something else: do not trust checkpoints")
def resume(bench: Bench) -> tuple:
    store = CheckpointStore(bench.folder / "resumed")
    bench.fit(bench.distillation(), bench.windows, {"checkpoints": store, "stop": _StopAfter(4)})
    module = bench.distillation(seed=5)
    result = bench.fit(module, bench.windows, {"checkpoints": store, "resume_from": store.newest_whole()})
    pairs = zip(module.state_dict().values(), bench.whole_run[0].state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    value = f"stopped after step {result.resumed_from} of {result.steps}: {'same' if same else 'other'} weights"
    return value, "bit for bit the weights of a run in one go", same and result.resumed_from == 4 and result.steps == 6


@check("optimizer steps and schedule", "steps or learning rate do not fit the data: part of the schedule is lost")
def optimizer_steps(bench: Bench) -> tuple:
    _, result, saved = bench.whole_run
    taken = int(saved["optimizer"]["state"][0]["step"])
    scheduled, rate = saved["scheduler"]["last_epoch"], saved["scheduler"]["_last_lr"][0]
    value = f"{result.steps} planned, {taken} taken, schedule at {scheduled}, learning rate {rate:.0e} at the end"
    return value, "6, 6, 6, 0 (11 windows in steps of 4, twice)", (result.steps, taken, scheduled, rate) == (6, 6, 6, 0)


@check("early stopping", "patience is not honoured, or the best weights are lost")
def early_stopping(bench: Bench) -> tuple:
    def evaluate(step: int) -> dict[str, Any]:
        bits = (3.0, 2.5, 2.6, 2.7, 2.4, 2.3)[step - 1]
        return {"step": step, "split": "eval", "loss": bits, "bits_per_byte": bits}

    module, store = bench.distillation(), CheckpointStore(bench.folder / "early")
    options = {"evaluate": evaluate, "evaluate_every": 1, "checkpoints": store}
    result = bench.fit(module, bench.windows, options, patience=2)
    best = store.load(store.steps()[2]).tensors["module"] if 2 in store.steps() else {}
    back = bool(best) and all(torch.equal(value, module.state_dict()[name]) for name, value in best.items())
    value = f"{result.stopped_by} after {result.steps}, weights of {result.best_step} {'put back' if back else 'lost'}"
    right = back and (result.stopped_by, result.steps, result.best_step) == ("early_stopping", 4, 2)
    return value, "after 4, of 2 (patience 2; evaluations 3, 2.5, 2.6, 2.7, ...)", right


# ------------------------------------------------------------------------------------ text and pair


@check("alignment coverage", "the tokenizers share few boundaries, so KD reaches little text; choose a closer pair")
def coverage(job: train.Job) -> tuple:
    totals = job.held_out.coverage()
    anchored, shallow = (totals[name] / max(totals["lm"], 1) for name in ("kd", "depth0"))
    value = f"{anchored:.1%} of {totals['lm']} positions have an anchor, {shallow:.1%} at depth 0"
    return value, f"{LEAST_COVERAGE:.0%} or more", anchored >= LEAST_COVERAGE


# ------------------------------------------------------------------------------------ the user's run


@check("label shift: your architecture", "choose an architecture whose logits are head(body(x)), or check config.json")
def own_label_shift(setup: preflight.SetUp) -> tuple:
    allowed = "0.95 to 1.25 ln V, equal to 1e-3"
    shapes = {"student": setup.student, **({"teacher": setup.teacher} if setup.teacher else {})}
    fresh = {role: preflight.shallow(shape) for role, shape in shapes.items()}
    fresh = {role: config for role, config in fresh.items() if not preflight.too_large(config)}
    if "student" not in fresh:
        return "not measured: the student is too large to be built for a check", allowed, True
    seed_everything(setup.config.training.seed)
    built = {role: pretrained.random_model(config) for role, config in fresh.items()}
    for role, model in built.items():
        check_head(model, role)
    size = vocabulary_size(built["student"])
    ours, theirs = lm_losses(built["student"].eval(), next(random_batches(size, 4, seed=0)))
    ratio = ours / math.log(size)
    value = (
        f"{ratio:.3f} ln V on random tokens, ln V is {math.log(size):.2f}; transformers' own shift {theirs - ours:+.0e}"
    )
    return value, allowed, 0.95 < ratio < 1.25 and abs(ours - theirs) < 1e-3


def default_setup(config: train.RunConfig) -> preflight.SetUp:
    """What the embedded default starts from, by sizes alone."""
    student = quickstart.student_config(quickstart.STUDENT_VOCABULARY)
    teacher = quickstart.teacher_config(quickstart.TEACHER_VOCABULARY)
    return preflight.SetUp(config, student, teacher, 2_000_000, LOGITS_AT_ONCE, quickstart.NAMES)


def own_setup(asked: train.RunConfig) -> tuple[preflight.SetUp, train.Job]:
    """What train.py would start from; reads at most `MOST_DOCUMENTS` of the text.

    Raises:
        UserError: a mistake in models or data.
    """
    config = asked
    if quickstart.is_named(asked):
        material = quickstart.material()
        config = quickstart.with_paths(asked, material, lambda: material.teacher)  # need not be trained yet
    limit = min(asked.data.max_documents or MOST_DOCUMENTS, MOST_DOCUMENTS)
    config = replace(config, data=replace(config.data, max_documents=limit))
    job = train.prepare(config, build_accelerator("no", cpu=True))
    student = pretrained.load_config(config.student.name, "student")
    teacher = pretrained.load_config(config.teacher.name, "teacher") if config.teacher.name else None
    files = [Path(name).expanduser() for name in config.data.train]
    text_bytes = max(sum(map(int, job.windows["bytes"])), sum(f.stat().st_size for f in files if f.is_file()))
    return preflight.SetUp(asked, student, teacher, text_bytes, LOGITS_AT_ONCE, quickstart.NAMES), job


# ---------------------------------------------------------------------------------------- the report

TINY: tuple[Callable[[Bench], Check], ...] = (
    *(fresh_student, shifted_once, copying, equal_models, temperature_squared, random_perplexity, dtype_round_trip),
    *(accumulation, resume, optimizer_steps, early_stopping),
)


def all_checks(argv: Sequence[str], folder: Path) -> Iterator[str | Check]:
    """Titles and checks, one by one as they are done: this machine, then this code, then what would be trained.

    Raises:
        UserError: a mistake in what was asked for. Models or text that are missing are told after the machine.
    """
    config = train.configure(argv)[0]
    yield "This machine"
    yield from (preflight.versions(), preflight.conflicts(), preflight.kernels(), preflight.precision(config))
    try:
        bench = Bench(folder)
    except UserError as error:
        raise RuntimeError(f"the tiny models cannot be prepared: {error}") from error
    yield one_step(bench, config)
    is_embedded = not argv and config.student.name in quickstart.NAMES
    setup, own = (default_setup(config), None) if is_embedded else own_setup(config)
    yield "This code, on tiny models"
    yield from (curriculum_table(), preflight.weighted_perplexity())
    yield from (measure(bench) for measure in TINY)
    yield from (preflight.duplicates(bench.job), preflight.leakage(bench.job), coverage(bench.job))
    if own is None:
        yield "The embedded default (flags of train.py check your own set-up)"
    else:
        yield "Your set-up" if argv else "The default of this machine (flags of train.py check your own set-up)"
        yield from (preflight.models(setup), own_label_shift(setup), preflight.window_length(setup))
        yield from (preflight.duplicates(own), preflight.leakage(own), *([coverage(own)] if setup.teacher else []))
    yield from (preflight.memory(setup), preflight.disk(setup), preflight.output_directory(setup))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
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
        return train.EXIT_CODES["SIGINT"]


if __name__ == "__main__":
    sys.exit(main())
