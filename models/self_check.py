"""Measurements that losses, labels, router and teacher must pass on random models: numbers in, numbers out.

They need no file and no network, so that tests and scripts can use them too. Each function names the number that sound
code gives; `verify_fixes.py` has the allowed ranges.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .config import CurriculumConfig, LossConfig, RouterConfig, Schedule
from .curriculum import CurriculumScheduler
from .distillation_framework import DistillationFramework
from .divergences import DIVERGENCES
from .language_model import check_head, vocabulary_size
from .student_aware_router import ROUTER_TERMS, StudentAwareRouter
from .teacher.frozen import FrozenTeacher
from .text.collate import PairCollator
from .text.tokens import MARKER, TEXT
from .text.vocabulary import VocabularyMap
from .text.windows import SIDES, PairEncoder
from .types import IGNORE, PairedBatch

SCHEDULED_STEPS = 6
"""Steps of the curricula made here."""

SAME_TEXT_WINDOWS = 6
"""Windows of a batch that both twins read."""

# -------------------------------------------------------------------------------- models and batches


@dataclass(frozen=True)
class Twins:
    """A student and a teacher of one architecture and one tokenizer, so that whatever differs is a fault."""

    make: Callable[[int], nn.Module]
    """Returns a fresh model; the same seed gives the same weights."""
    length: int
    """Tokens that the model reads at once."""
    vocabulary: VocabularyMap
    windows: Sequence[dict[str, Any]]
    collate: PairCollator

    @classmethod
    def of(
        cls, make: Callable[[int], nn.Module], tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
    ) -> "Twins":
        """Join a tokenizer with itself, and cut some text into windows."""
        encoder = PairEncoder(tokenizer, tokenizer, length)
        vocabulary = VocabularyMap.build(tokenizer, tokenizer)
        return cls(
            make=make,
            length=length,
            vocabulary=vocabulary,
            windows=encoder.windows(list(texts))[:SAME_TEXT_WINDOWS],
            collate=PairCollator(vocabulary, encoder.end_of_text, 0),
        )

    @property
    def size(self) -> int:
        """Tokens of the vocabulary."""
        return len(self.vocabulary.order)

    @property
    def batch(self) -> PairedBatch:
        """The text, collated anew."""
        return self.collate(self.windows)


def assemble(
    student: nn.Module,
    teacher: FrozenTeacher | None,
    vocabulary: VocabularyMap | None,
    loss: LossConfig | None = None,
    **weights: Schedule,
) -> DistillationFramework:
    """Join models for a few steps; weights that are not given are those of `CurriculumConfig`."""
    loss = loss or LossConfig()
    curriculum = CurriculumConfig.of_weights(weights)
    scheduler = CurriculumScheduler(curriculum, loss, SCHEDULED_STEPS)
    return DistillationFramework(student, teacher, vocabulary, loss, scheduler)


def random_batches(
    vocabulary: int, lengths: Sequence[int], seed: int, router: RouterConfig | None = None, start: int | None = None
) -> Iterator[PairedBatch]:
    """Yield windows of uniformly random tokens, of which nothing can be learnt, through the real collator; without end.

    Args:
        lengths: tokens of each window.
        router: of batches with anchors; every token is one byte for both sides.
        start: what the decoder of an encoder-decoder model begins with; its encoder then reads random tokens, too.
    """
    # The identity map: on the other side every token is spelt by itself.
    generator = np.random.default_rng(seed)
    segments = np.arange(vocabulary)[:, None]
    collate = PairCollator(VocabularyMap.from_segments(segments, vocabulary), (None, None), 0, router)
    while True:
        yield collate([_random_window(generator, vocabulary, length, start) for length in lengths])


def _random_window(generator: np.random.Generator, vocabulary: int, length: int, start: int | None) -> dict[str, Any]:
    """Return one window of random tokens, the same for both sides."""
    places = np.arange(length)
    reading = {
        "ids": generator.integers(0, vocabulary, length),
        "starts": places,
        "ends": places + 1,
        "roles": np.where(places == 0, MARKER, TEXT),
    }
    # The decoder of an encoder-decoder model reads its own start first; the prompt is as random.
    if start is not None:
        reading["ids"][:1] = start
        reading["source"] = generator.integers(0, vocabulary, length)

    window: dict[str, Any] = {"bytes": length, "left_out": 0, "documents": ""}
    for side in SIDES:
        window |= {f"{side}_{name}": value for name, value in reading.items()}
    return window


# ------------------------------------------------------------------------------------------- labels


class LanguageLosses(NamedTuple):
    """Nats per token of one model on one batch, computed twice."""

    ours: float
    """Loss of the framework's LM term, whose labels are shifted by the collator."""
    transformers: float
    """Loss of transformers, which shifts the labels itself."""
    difference: float
    """Absolute difference; about 0."""


def language_losses(student: nn.Module, batch: PairedBatch) -> LanguageLosses:
    """Compute the language-model loss of a batch, by the framework and by transformers."""
    module = assemble(student, None, None, kd=0.0, lm=1.0)

    # Undo the collator's shift: position j is supervised if position j - 1 predicts it.
    unshifted = torch.where(batch.labels.roll(1, 1) == IGNORE, IGNORE, batch.student_ids)
    unshifted[:, 0] = IGNORE

    with torch.no_grad():
        ours = module(batch, 0).terms["lm"].sum.item() / batch.counts["lm"]

        # An encoder-decoder model makes what its decoder reads of the labels, and does not shift them again.
        inputs, labels = batch.scored("student")
        has_decoder_inputs = inputs.pop("decoder_input_ids", None) is not None
        theirs = student(**inputs, labels=labels if has_decoder_inputs else unshifted).loss.item()
    return LanguageLosses(ours, theirs, abs(ours - theirs))


class FreshLoss(NamedTuple):
    loss: float
    """Nats per token."""
    log_size: float
    """Log of the vocabulary's size."""
    ratio: float
    """Loss over `log_size`; about 1, since a fresh model knows nothing."""


def fresh_loss(twins: Twins) -> FreshLoss:
    """Measure the loss of a fresh student on random tokens."""
    batch = next(random_batches(twins.size, [twins.length] * 16, seed=1))
    loss = language_losses(twins.make(0), batch).ours
    log_size = math.log(twins.size)
    return FreshLoss(loss, log_size, loss / log_size)


def shifted_once(twins: Twins) -> LanguageLosses:
    """Compare our loss with that of transformers on real text."""
    return language_losses(twins.make(3), twins.batch)


class Copying(NamedTuple):
    """Loss after some steps on random tokens, in units of the log of the vocabulary's size."""

    sound: float
    """About 1: of random tokens nothing can be learnt."""
    unshifted: float
    """Near 0: with labels that are the input, on purpose, copying is learnt."""


def copying(twins: Twins) -> Copying:
    """Train on random tokens, with the labels as they are and with labels that are not shifted."""

    def forget_shift(batch: PairedBatch) -> PairedBatch:
        return replace(batch, labels=torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids))

    sound = _learn_random(twins)
    return Copying(sound, _learn_random(twins, forget_shift))


def _learn_random(twins: Twins, change: Callable[[PairedBatch], PairedBatch] | None = None, steps: int = 40) -> float:
    """Return the LM loss, in units of ln V, after some steps on random tokens, each seen once."""
    module = assemble(twins.make(0), None, None, kd=0.0, lm=1.0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)

    losses = []
    batches = random_batches(twins.size, [twins.length] * 8, seed=0)
    for batch in islice(batches, steps):
        loss = module(change(batch) if change else batch, 0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(twins.size))

    # The mean of the last five: a single batch of random tokens varies by some per cent.
    return sum(losses[-5:]) / 5


class ArchitectureLosses(NamedTuple):
    """Losses of an architecture with random weights, on random tokens."""

    ratio: float
    """Loss over the log of the vocabulary's size; about 1."""
    log_size: float
    difference: float
    """Loss of transformers minus ours, in nats."""
    is_close: bool
    """The two losses are equal to 1e-3, relative to losses above 10."""


def architecture_losses(models: Mapping[str, nn.Module], start: int | None) -> ArchitectureLosses:
    """Check the heads of fresh models, and compare the student's loss with that of transformers.

    Args:
        models: `student` and, if there is one, `teacher`.
        start: what the decoder of an encoder-decoder model begins with.

    Raises:
        ValueError: a model whose logits are not head(body(x)).
    """
    for role, model in models.items():
        check_head(model, role)

    # In evaluation mode: dropout would make the two losses differ.
    student = models["student"].eval()
    size = vocabulary_size(student)
    losses = language_losses(student, next(random_batches(size, [64] * 4, 0, start=start)))
    return ArchitectureLosses(
        ratio=losses.ours / math.log(size),
        log_size=math.log(size),
        difference=losses.transformers - losses.ours,
        is_close=losses.difference < 1e-3 * max(1, losses.transformers / 10),
    )


# ---------------------------------------------------------------------------------- KD and curriculum

OUTCOMES: tuple[dict[str, Any], ...] = (
    {"tail": "bucket", "top_k": 8, "temperature": 1.0},
    {"tail": "bucket", "top_k": 512, "temperature": 4.0},
    {"tail": "bucket", "top_k": 8, "temperature": 4.0},
    {"tail": "renormalise", "top_k": 8, "temperature": 2.0},
)
"""Choices of what teacher and student are compared on; a top_k of 512 takes in the whole vocabulary."""


class KdGradient(NamedTuple):
    loss: float
    """KD in nats per row."""
    norm: float
    """Norm of its gradient in the student."""


def kd_gradient(twins: Twins, loss: LossConfig, teacher_seed: int) -> KdGradient:
    """Compute KD of a student under a teacher of its own architecture; seed 0 gives the student itself."""
    # The weight of KD stays at its default, so that its gradient alone is measured.
    student = twins.make(0)
    teacher = FrozenTeacher(twins.make(teacher_seed), twins.vocabulary)
    module = assemble(student, teacher, twins.vocabulary, loss, lm=0.0)

    # One number for the whole gradient: its norm over all parameters.
    output = module(twins.batch, 0)
    output.loss.backward()
    norms = [parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.stack(norms).norm().item()
    kd = output.terms["kd"]
    return KdGradient(kd.sum.item() / kd.count, norm)


class EqualModels(NamedTuple):
    """KD of a student under its own copy; every number is 0 but for rounding."""

    loss: float
    """Largest KD of all variants, in nats."""
    norm: float
    """Largest norm of a gradient."""
    worst: float
    variants: int


def equal_models(twins: Twins) -> EqualModels:
    """Compute KD of equal models, for every divergence and every kind of outcomes."""
    results = [
        kd_gradient(twins, LossConfig(divergence=divergence, **outcomes), teacher_seed=0)
        for divergence in DIVERGENCES
        for outcomes in OUTCOMES
    ]
    loss = max(abs(result.loss) for result in results)
    norm = max(result.norm for result in results)
    return EqualModels(loss, norm, max(loss, norm), len(results))


class TemperatureSquared(NamedTuple):
    ratio: float
    """Norm of KD's gradient at T = 4 over that at T = 1; about 1, and 1 / 16 without the factor T squared."""


def temperature_squared(twins: Twins) -> TemperatureSquared:
    """Compare the gradients of KD at two temperatures (Hinton et al., arXiv 1503.02531, section 2)."""
    # The gradient of a divergence of tempered distributions shrinks with 1 / T squared, which the factor makes up for.
    cold = kd_gradient(twins, LossConfig(top_k=512, temperature=1.0), teacher_seed=1)
    warm = kd_gradient(twins, LossConfig(top_k=512, temperature=4.0), teacher_seed=1)
    return TemperatureSquared(warm.norm / cold.norm)


TABLE_TERMS = ("kd", "lm", "feat", "rel", "attn", "layer", "contr")
TABLE_STEPS = 1000
REFERENCE_WEIGHTS = {
    4: (0.7, 0.3, 0, 0, 0, 0, 0),
    502: (0.7, 0.3, 0.1, 0, 0.1, 0.017, 0),
    1000: (0.7, 0.3, 0.1, 0, 0.1, 0.1, 0),
}
"""Step of `TABLE_STEPS` -> weights of `TABLE_TERMS` in the reference run."""


class OtherWeight(NamedTuple):
    """A weight that is not the reference run's."""

    term: str
    weight: float
    expected: float
    percent: float
    """Progress of the run."""


def other_weights(curriculum: CurriculumConfig, loss: LossConfig) -> list[OtherWeight]:
    """Return the weights of a curriculum that differ from the reference run's in three decimals."""
    scheduler = CurriculumScheduler(curriculum, loss, TABLE_STEPS)
    # The reference is known to three decimals.
    differing = []
    for step, row in REFERENCE_WEIGHTS.items():
        weights = scheduler.weights(step)
        for term, expected in zip(TABLE_TERMS, row, strict=True):
            if abs(weights[term] - expected) > 5e-4:
                differing.append(OtherWeight(term, weights[term], expected, 100 * step / TABLE_STEPS))
    return differing


# ------------------------------------------------------------------------------------------- router


def unrelated_states(layers: int, batch: PairedBatch, width: int, seed: int) -> list[Tensor]:
    """Return random states of some layers: large, and one channel of them huge, as real models have it."""
    # An offset and a huge channel are what standardisation is for; plain noise would hide its absence.
    generator = torch.Generator().manual_seed(seed)
    states = 10 * torch.randn(layers, *batch.student_ids.shape, width, generator=generator) + 3
    states[..., 0] *= 100
    return list(states)


def fresh_value(term: str, length: int, width: int) -> float:
    """Return a hidden-state term per item as training begins, for states that have nothing in common; about 1.

    Args:
        term: one of `ROUTER_TERMS`.
        length: tokens of each of the two windows.
        width: of the student; the teacher's is half as large again.
    """
    teacher_width = 3 * width // 2
    torch.manual_seed(0)
    router = StudentAwareRouter(RouterConfig(layers=2, teacher_layers=3), (4, width), (6, teacher_width))

    # One batch to calibrate on and another one to measure, each with states of its own.
    calibration, batch = islice(random_batches(2, [length] * 2, 0, router.config), 2)
    calibration_states = (
        unrelated_states(2, calibration, width, 0),
        unrelated_states(3, calibration, teacher_width, 2),
    )
    router.calibrate([(*calibration_states, calibration.anchors)])

    student_states = unrelated_states(2, batch, width, 1)
    teacher_states = unrelated_states(3, batch, teacher_width, 3)
    with torch.no_grad():
        sums = router(student_states, teacher_states, batch.anchors, {term})
    return sums[term].item() / batch.counts[term]


class Normalisation(NamedTuple):
    """Values of a term for unrelated states in windows of 32, 128 and 512 tokens."""

    narrow: tuple[float, ...]
    """At a student's width of 32."""
    wide: tuple[float, ...]
    """At a student's width of 256."""


def normalisation(term: str) -> Normalisation:
    """Measure a hidden-state term at two widths and three lengths."""
    lengths = (32, 128, 512)
    narrow = tuple(fresh_value(term, length, 32) for length in lengths)
    wide = tuple(fresh_value(term, length, 256) for length in lengths)
    return Normalisation(narrow, wide)


class PaddingRow(NamedTuple):
    """The contrastive term of three windows, and of the same three beside one without a token."""

    value: float
    """Per item, with the row of padding."""
    value_without: float
    difference: float
    gradient_norm: float
    """Norm of the gradient of the padded row's states; 0."""
    others_change: float
    """Relative change of the other windows' gradient by the padded row; 0."""


def padding_row() -> PaddingRow:
    """Measure what a window of padding alone does to the contrastive term."""
    value_without, gradient_without = _contrast_of_windows(3)
    value, gradient = _contrast_of_windows(4)
    change = (gradient[:3] - gradient_without).norm() / gradient_without.norm()
    return PaddingRow(
        value=value,
        value_without=value_without,
        difference=abs(value - value_without),
        gradient_norm=gradient[3].norm().item(),
        others_change=change.item(),
    )


def _contrast_of_windows(windows: int) -> tuple[float, Tensor]:
    """Return the contrastive term per item and the gradient of its student states; the fourth window is empty."""
    torch.manual_seed(0)
    router = StudentAwareRouter(RouterConfig(layers=1, teacher_layers=1), (1, 32), (1, 48))
    lengths = [64, 64, 64, 0][:windows]
    batch = next(random_batches(2, lengths, 0, router.config))

    [states] = unrelated_states(1, batch, 32, 0)
    [targets] = unrelated_states(1, batch, 48, 1)
    # A model's attention over nothing gives NaN.
    states[3:] = torch.nan
    targets[3:] = torch.nan

    # Only what is trained needs a gradient: the teacher's states are a fixed target.
    value = router([states.requires_grad_()], [targets], batch.anchors, {"contr"})["contr"]
    value.backward()
    return value.item() / batch.counts["contr"], states.grad


class HiddenStates(NamedTuple):
    """Forwards of student and teacher, and how many of them kept their hidden states."""

    models: int
    at_zero: int
    """Where no term needs them."""
    at_weight: int
    """Where a term needs them."""
    loss_change: float
    """Loss of a framework with a router at weight 0, minus that of one without; 0."""


def hidden_states(routed: DistillationFramework, plain: DistillationFramework, batch: PairedBatch) -> HiddenStates:
    """Count the models that are asked for hidden states, at the start and at the end of a ramp.

    Args:
        routed: its hidden-state terms weigh 0 at the start, and more at the end.
        plain: the same models without a router.
    """
    is_kept: list[bool] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        is_kept.append(output.hidden_states is not None)

    # The body's output has the hidden states only if it was asked for them.
    for model in (routed.student, routed.teacher.model):
        model.base_model.register_forward_hook(record)

    routed_loss = routed(batch, 0).loss.item()
    plain_loss = plain(batch, 0).loss.item()
    at_start = list(is_kept)

    # Without a step the weights are those at the end of the curriculum.
    routed(batch, None)
    return HiddenStates(
        models=len(at_start),
        at_zero=sum(at_start),
        at_weight=sum(is_kept) - sum(at_start),
        loss_change=routed_loss - plain_loss,
    )


def router_values(module: DistillationFramework, batches: Sequence[PairedBatch]) -> dict[str, float]:
    """Return every hidden-state term per item, over some batches; about 1 for unrelated states, less for related."""
    with torch.no_grad():
        outputs = [module(batch, 0, measure=True).terms for batch in batches]

    values = {}
    for name in ROUTER_TERMS:
        total = sum(terms[name].sum.item() for terms in outputs)
        count = sum(terms[name].count for terms in outputs)
        values[name] = total / max(count, 1)
    return values
