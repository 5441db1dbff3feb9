"""Ways to train a student, in the order of their worth: a run that ends early has the first of them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.ablation import early
from benchmarks.curricula import mean_of, reversed_of
from benchmarks.quality import kd_and_text
from benchmarks.situations import FALLING
from models.config import CurriculumConfig, LossConfig, Schedule, Term
from models.distillation import LM_ONLY, Method

from .pair import ADAPTED, ITSELF, TEACHER, TOP_K

WHOLE = 0
"""Layers of a student that was not cut."""

CUTS = (10, 20, WHOLE)

HIDDEN: dict[str, Schedule] = {"off": 0.0, "on": 1.0, "early": early(1.0)}
"""Weight of the terms feat and attn on hidden states; early: it falls to 0 at 40 % of the steps."""

RISING = reversed_of(FALLING)
"""The same in reverse."""

MEAN_OF_FALLING = round(mean_of(FALLING), 3)
"""The constant weight that FALLING is on average: .175."""

LOSS = LossConfig(top_k=TOP_K, head_passes="eager")
"""Eager, since compiling takes a good part of so short a run."""


@dataclass(frozen=True)
class Arm:
    """One way to train one student."""

    layers: int
    """Layers of the student; 0: all of them."""
    teacher: str | None
    """ITSELF, TEACHER, ADAPTED, or None: text alone."""
    name: str
    """What it learns by."""
    method: Method
    gold: bool = False
    """Learn by the loss of TRL's GOLD trainer instead."""
    seeds: int = 3
    """Seeds, at most: one for what decides no default."""
    schedule: str | None = None
    """Name of the schedule that the arm is, or that it is an opponent of."""


def text_alone(layers: int) -> Arm:
    """Return the arm without a teacher."""
    return Arm(layers, None, "text alone", Method(LOSS, LM_ONLY))


def _taught(layers: int, teacher: str, hidden: str = "off") -> Arm:
    """Return an arm of KD .7 + LM .3, with hidden-state terms or without."""
    weight = Term(HIDDEN[hidden])
    curriculum = replace(CurriculumConfig(), feat=weight, attn=weight)
    name = "KD" if hidden == "off" else f"KD, hidden states {hidden}"
    return Arm(layers, teacher, name, Method(LOSS, curriculum))


def _weighted(
    layers: int,
    teacher: str,
    name: str,
    kd: Schedule,
) -> Arm:
    """Return an arm with another weight of KD; LM has what it leaves of 1."""
    return Arm(layers, teacher, name, Method(LOSS, kd_and_text(kd)))


def _with_loss(layers: int, name: str, **changes: object) -> Arm:
    """Return an arm of KD .7 + LM .3 under another loss, taught by the teacher."""
    return Arm(layers, TEACHER, name, Method(replace(LOSS, **changes), CurriculumConfig()), seeds=1)


def _gold(layers: int) -> Arm:
    """Return the yardstick."""
    return Arm(layers, TEACHER, "GOLD of TRL", Method(LOSS, LM_ONLY), gold=True, seeds=1)


HEALED = [
    text_alone(10),
    _taught(10, TEACHER),
    _taught(10, ITSELF),
    text_alone(WHOLE),
    _taught(WHOLE, TEACHER),
    _weighted(WHOLE, TEACHER, "KD falling", FALLING),
    _weighted(WHOLE, TEACHER, "KD .3", 0.3),
    _weighted(WHOLE, TEACHER, "KD .175", MEAN_OF_FALLING),
    _taught(10, TEACHER, "early"),
    _taught(10, ITSELF, "early"),
    _taught(10, TEACHER, "on"),
    _taught(10, ITSELF, "on"),
    text_alone(20),
    _taught(20, TEACHER),
    _taught(20, ITSELF),
    _weighted(20, ITSELF, "KD falling", FALLING),
    _weighted(20, TEACHER, "KD falling", FALLING),
    _taught(20, ADAPTED),
    _weighted(20, ADAPTED, "KD falling", FALLING),
    _weighted(20, ITSELF, "KD .3", 0.3),
    _weighted(20, ITSELF, "KD .175", MEAN_OF_FALLING),
    _weighted(20, ITSELF, "KD rising", RISING),
    _weighted(10, ITSELF, "KD falling", FALLING),
    _weighted(10, TEACHER, "KD falling", FALLING),
    _weighted(10, ITSELF, "KD .3", 0.3),
    _weighted(10, TEACHER, "KD .3", 0.3),
    _taught(20, ITSELF, "early"),
    _taught(20, TEACHER, "early"),
    _taught(20, ITSELF, "on"),
    _taught(20, TEACHER, "on"),
]
"""Arms that decide defaults."""

OTHERS = [
    _gold(10),
    _with_loss(10, "KD, T 2", temperature=2.0),
    _with_loss(10, "KD, reverse KL", divergence="reverse_kl"),
    _with_loss(WHOLE, "KD, reverse KL", divergence="reverse_kl"),
    _with_loss(10, "KD, JSD", divergence="jsd"),
    _with_loss(WHOLE, "KD, T 2", temperature=2.0),
    _with_loss(WHOLE, "KD, JSD", divergence="jsd"),
    replace(_taught(WHOLE, TEACHER, "early"), seeds=1),
    _gold(WHOLE),
]
"""The yardstick; arms that judge T = 1 and forward KL, by written text besides; hidden states of a trained student."""


def jobs(seeds: int) -> Iterator[tuple[Arm, int]]:
    """Yield arms and seeds in the order of their worth: everything once, then the other seeds of what decides."""
    for arm in [*HEALED, *OTHERS]:
        yield arm, 0
    for seed in range(1, seeds):
        for arm in HEALED:
            if seed < arm.seeds:
                yield arm, seed
