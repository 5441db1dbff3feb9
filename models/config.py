"""Settings of what is learned, as frozen dataclasses: `CurriculumConfig`, `LossConfig`, `RouterConfig`.

Every default has its one place here. The fields of `CurriculumConfig` are also the table of the loss terms (`TERMS`):
their names, their labels for people, and where each comes from.

An instance is checked when it is made (`Validated`): the constraints (`Gt`, `Ge`, `Literal`, ...) hold for whoever
makes one, in a program or from a file.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from .divergences import MIXED, DivergenceName
from .validation import Validated, as_plain

Progress = Annotated[float, Ge(0), Le(1)]
"""Share of the optimizer steps of a run."""


@dataclass(frozen=True)
class Ramp(Validated):
    """A scalar that follows training progress (step / total optimizer steps, in [0, 1]).

    `points` are (progress, value) pairs in increasing order of progress. Between two points the
    value is interpolated, linearly or along half a cosine; before the first and after the last
    point it is constant.
    """

    points: tuple[tuple[Progress, float], ...]
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        # Lists are welcome, since YAML has nothing else, but only tuples are hashable and cannot be changed.
        if isinstance(self.points, list | tuple):
            points = tuple(_as_point(point) for point in self.points)
            object.__setattr__(self, "points", points)
        super().__post_init__()

        progress = [share for share, _ in self.points]
        is_rising = all(earlier < later for earlier, later in pairwise(progress))
        if not progress or not is_rising:
            raise ValueError(
                f"a ramp needs points [[progress, value], ...] with rising progress, got {list(self.points)}"
            )


def _as_point(point: Any) -> Any:
    """Return a point as a tuple of plain numbers; anything else as it is, for the check of the fields to refuse."""
    if isinstance(point, list | tuple):
        return tuple(as_plain(number) for number in point)
    return point


Schedule = float | Ramp
"""A constant, or a ramp over training progress."""


def values_of(schedule: Schedule) -> list[float]:
    """Return the values at a schedule's points; those between two points lie between their values."""
    if isinstance(schedule, Ramp):
        return [value for _, value in schedule.points]
    return [schedule]


@dataclass(frozen=True)
class Term(Validated):
    """One term of the loss."""

    weight: Schedule = 0.0
    """Weight in the total. A term whose weight is 0 is not computed."""


TermSource = Literal["head", "hidden states"]
"""Part of the student that a term is computed from."""


class TermInfo(NamedTuple):
    """Facts about a loss term that every part of the program needs to know."""

    name: str
    """Key of the term in curricula, counts, logs and reports."""
    label: str
    """Name of the term for people, in charts and checks."""
    source: TermSource
    needs_teacher: bool


def _facts(
    label: str,
    source: TermSource,
    *,
    needs_teacher: bool = True,
) -> dict[str, Any]:
    """Return what a field of `CurriculumConfig` says about its term; `TERMS` is made of it."""
    return {"label": label, "source": source, "needs_teacher": needs_teacher}


@dataclass(frozen=True)
class CurriculumConfig(Validated):
    """Weight of every loss term over the run, and whose text is learned from. Weights that a run is not given suit what
    its student starts from (`curriculum: auto`): those of `feat` and `attn` are 1 for random weights, and where others
    read each text once, that of `kd` is 0.3 and that of `lm` 0.7. The defaults below are for text that is read again.

    To add a term on hidden states: a field here, and its row in `models/losses/hidden_state_terms.py`.
    """

    kd: Term = field(default_factory=lambda: Term(0.7), metadata=_facts("KD", "head"))
    """Knowledge distillation: the teacher's next-token distribution, projected on the student's vocabulary."""
    span: Term = field(default_factory=Term, metadata=_facts("span", "head"))
    """Span likelihood: the probability of the text between common token boundaries."""
    lm: Term = field(default_factory=lambda: Term(0.3), metadata=_facts("LM", "head", needs_teacher=False))
    """Next-token cross-entropy on the text."""
    feat: Term = field(default_factory=Term, metadata=_facts("feature", "hidden states"))
    """Router: distance of the student's states from the teacher's, at the same relative depth."""
    rel: Term = field(default_factory=Term, metadata=_facts("relations", "hidden states"))
    """Router: attention relations, how the states of a text resemble one another."""
    attn: Term = field(default_factory=Term, metadata=_facts("alignment", "hidden states"))
    """Router: attention alignment, which teacher state a student's state points at."""
    layer: Term = field(default_factory=Term, metadata=_facts("layer", "hidden states"))
    """Router: distance from the mixture of teacher layers that the gate chooses."""
    contr: Term = field(default_factory=Term, metadata=_facts("contrastive", "hidden states"))
    """Router: contrastive, which teacher state of a span of text belongs to the student's."""

    on_policy: Schedule = 0.0
    """Share of a step's windows that the student writes itself, between 0 and 1; no term of the loss."""
    select: Schedule = 1.0
    """Share of each window's positions that KD is learned at, above 0 and at most 1: those that `loss.select_by` puts
    first."""
    open_text: Schedule = 1.0
    """Share of the training windows that is open, from the easiest by `data.order`, above 0 and at most 1: a ramp from
    0.2 to 1 begins with the easiest fifth. Windows are drawn at random from the open ones, each once before any
    twice."""
    sample_weights: Schedule = 0.0
    """Degree, from 0 to 1, to which KD weighs windows by p(1 - p) of the student's success p in them, which is e to the
    minus its excess loss over the teacher's in nats per token; 0: all alike. Takes one more pass of the student's
    head."""
    balance: Literal["none", "loss", "gradient"] = "none"
    """Balance of the terms: their weights are divided by the size that each had in the step before, so that they
    contribute in proportion to their weights. The size is the loss, or the norm of its gradient, which takes one more
    backward pass of each term. At most 10 times up or down."""

    def __post_init__(self) -> None:
        super().__post_init__()

        wrong = []
        for name, term in self.terms().items():
            outside = [weight for weight in values_of(term.weight) if not 0 <= weight < math.inf]
            wrong += [f"{name}.weight {weight:g}" for weight in outside]
        if wrong:
            raise ValueError(f"weights must be 0 or more, got {', '.join(wrong)}")

        shares = [f"{share:g}" for share in values_of(self.on_policy) if not 0 <= share <= 1]
        if shares:
            raise ValueError(f"on_policy is a share of windows, from 0 to 1, got {', '.join(shares)}")

        shares = [f"{share:g}" for share in values_of(self.select) if not 0 < share <= 1]
        if shares:
            raise ValueError(
                f"select is a share of positions, above 0 and at most 1, got {', '.join(shares)}; to learn nothing by "
                "KD give it the weight 0"
            )

        shares = [f"{share:g}" for share in values_of(self.open_text) if not 0 < share <= 1]
        if shares:
            raise ValueError(
                f"open_text is a share of the training text, above 0 and at most 1, got {', '.join(shares)}; 1 opens "
                "all of it"
            )

        degrees = [f"{degree:g}" for degree in values_of(self.sample_weights) if not 0 <= degree <= 1]
        if degrees:
            raise ValueError(f"sample_weights is a degree from 0 (all windows alike) to 1, got {', '.join(degrees)}")

    @classmethod
    def of_weights(cls, weights: Mapping[str, Schedule]) -> "CurriculumConfig":
        """Make a curriculum of the weights of some terms; those of the others are the defaults."""
        terms: dict[str, Any] = {name: Term(weight) for name, weight in weights.items()}
        return cls(**terms)

    def terms(self) -> dict[str, Term]:
        """Return every term by name."""
        return {name: getattr(self, name) for name in TERMS}

    def used(self) -> set[str]:
        """Return the names of the terms whose weight leaves 0 anywhere in the run."""
        # Between two points a ramp lies between their values: it leaves 0 only if one of them does.
        return {name for name, term in self.terms().items() if any(values_of(term.weight))}

    def weights_in_words(self, names: Iterable[str]) -> str:
        """Return those of some terms that weigh anything, each with its weight: "kd 0.7, lm 0 at 10 % to 1 at 40 %"."""
        used = self.used()
        return ", ".join(f"{name} {_in_words(getattr(self, name).weight)}" for name in names if name in used)

    def in_words(self) -> str:
        """Return all terms that weigh anything, and every other schedule or choice that is not the usual one."""
        parts = [self.weights_in_words(TERMS)]
        for column in fields(self):
            value = getattr(self, column.name)
            if column.name not in TERMS and value != column.default:
                parts.append(f"{column.name} {_in_words(value)}")
        return ", ".join(parts)

    @property
    def uses_own_text(self) -> bool:
        """True if the student learns from text that it writes itself, anywhere in the run."""
        return any(values_of(self.on_policy))

    @property
    def opens_text(self) -> bool:
        """True if not all of the training text is open, anywhere in the run."""
        return any(share != 1 for share in values_of(self.open_text))

    @property
    def uses_statistics(self) -> bool:
        """True if a step depends on statistics of the steps before, which a training loop has to give it."""
        return self.balance != "none" or any(values_of(self.sample_weights))


TERMS = {
    column.name: TermInfo(column.name, **column.metadata) for column in fields(CurriculumConfig) if column.metadata
}
"""Every loss term by name, in the order of the curriculum's fields."""

_on_head = [term for term in TERMS.values() if term.source == "head"]
# The sort is stable and False comes first: a message that lists head terms begins with LM, which any run can use.
_on_head.sort(key=attrgetter("needs_teacher"))
HEAD_TERMS = tuple(term.name for term in _on_head)
"""Names of the terms that come from the student's head; first those that need no teacher."""

ROUTER_TERMS = tuple(term.name for term in TERMS.values() if term.source == "hidden states")
"""Names of the terms that come from hidden states, which `StudentAwareRouter` computes."""

TEXT_TERMS = frozenset(term.name for term in TERMS.values() if not term.needs_teacher)
"""Names of the terms that are learned from the text alone, without a teacher."""

Beginning = Literal["trained", "cut", "random"]
"""Kind of the weights that a student starts from: a trained model's, those of some of its layers, or random ones."""


def automatic_curriculum(beginning: Beginning, *, reads_once: bool) -> CurriculumConfig:
    """Return the weights that suit a student, as measured (docs/experiments.md, docs/choosing.md).

    Args:
        reads_once: no text is learned from twice.
    """
    if beginning == "random":
        return CurriculumConfig.of_weights({"feat": 1.0, "attn": 1.0})
    # What is read again and again is learned by heart, unless a teacher says what else could stand there. What is read
    # once the text itself teaches better than a teacher that does not know it.
    return CurriculumConfig.of_weights({"kd": 0.3, "lm": 0.7}) if reads_once else CurriculumConfig()


def _in_words(value: Schedule | str) -> str:
    """Return a value, or the points of a ramp, in words."""
    if isinstance(value, Ramp):
        return " to ".join(f"{height:g} at {100 * progress:g} %" for progress, height in value.points)
    return value if isinstance(value, str) else f"{value:g}"


@dataclass(frozen=True)
class LossConfig(Validated):
    """Settings of the terms that compare next-token distributions."""

    divergence: DivergenceName = "forward_kl"
    """Divergence between teacher and student."""
    tail: Literal["bucket", "renormalise"] = "bucket"
    """Outcomes beyond the top k: one explicit bucket on both sides, or both sides renormalised without them, which
    needs a top_k of 2 or more."""
    top_k: Annotated[int, Gt(0)] = 256
    """Teacher tokens kept per position (capped at the teacher's vocabulary)."""
    temperature: Schedule = 1.0
    """Temperature of KD; teacher and student are tempered alike, and the term is multiplied by its square."""
    skew: Schedule = 0.1
    """Share of the teacher in a mixture with the student. skew_kl: the mixture stands in for the student (DistiLLM,
    eq. 3). generalised_jsd: both are compared with it; 0 is forward KL, 1 reverse KL, so that a ramp goes from one to
    the other."""
    interpolation: Schedule = 1.0
    """Share of the teacher in what KD learns from. 1: the teacher's distributions; below it they are mixed with the
    student's own, in logits, so that a ramp to 1 leads the student to the teacher by targets near to it (TAID). The
    nearer to 0, the less KD teaches, whatever its weight, and at 0 nothing: not a way to fade KD out, which
    `curriculum.kd` is."""
    select_by: Literal["student_entropy", "first_student", "teacher_entropy", "divergence", "excess_loss"] = (
        "student_entropy"
    )
    """Score by which `curriculum.select` puts positions in order: the entropy of the student as it is or was before
    training (first_student), that of the teacher, the KL divergence between them, or the student's loss over the
    teacher's. first_student reads the training text once before the first step; from then on the teacher's head and a
    cache only see the largest share of the run. By teacher_entropy a cache keeps no more of the training text
    either, unless several teachers are mixed. All others take one more pass of the student's head in every step."""
    max_depth: Annotated[int, Ge(0)] = 16
    """How many student tokens into a teacher token KD still applies; 0: common boundaries only."""
    correction: Literal["span", "channel", "none"] = "span"
    """Remedy where a teacher token is a proper prefix of the student's real token."""
    min_prefix_mass: Annotated[float, Ge(0), Lt(1)] = 1e-3
    """Inside a teacher token: least teacher probability of what was read so far; below it, no KD there."""
    span_temperature: Schedule = 1.0
    """Temperature of the two-outcome distributions of the span term."""
    head_passes: Literal["auto", "compiled", "eager"] = "auto"
    """Elementwise work of the student's head: compiled into two passes by torch.compile, or eager, step by step; auto:
    compiled on GPUs of compute capability 7.0 or newer where a compiler works."""

    def __post_init__(self) -> None:
        super().__post_init__()

        # Logits are divided by a temperature.
        wrong = []
        for name in ("temperature", "span_temperature"):
            outside = [value for value in values_of(getattr(self, name)) if not 0 < value < math.inf]
            wrong += [f"{name} {value:g}" for value in outside]
        if wrong:
            raise ValueError(f"temperatures must be greater than 0, got {', '.join(wrong)}; 1 is a good start")

        for name in ("skew", "interpolation"):
            shares = values_of(getattr(self, name))
            if not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"{name} is a share, from 0 to 1, got {', '.join(f'{share:g}' for share in shares)}")
        if not any(values_of(self.interpolation)):
            raise ValueError(
                "got interpolation 0 throughout, under which KD compares the student with itself, and teaches nothing; "
                "expected a ramp to 1, or leave it out"
            )
        if self.divergence == "skew_kl" and 1 in values_of(self.skew):
            raise ValueError(
                "got skew 1 with divergence skew_kl, which compares the teacher with itself then, and teaches nothing; "
                "expected less than 1 (0 is forward KL)"
            )

        if self.top_k == 1 and self.needs_several_tokens:
            raise ValueError(
                "got top_k 1 with tail renormalise, which leaves a position one outcome, of probability 1 on both "
                "sides, and KD teaches nothing; expected top_k 2 or more, or tail bucket"
            )

    @property
    def needs_several_tokens(self) -> bool:
        """True if KD needs more than one of the teacher's tokens at a position: no rest stands beside a single one.

        The counted channel makes several of one. (The span correction does so in few places, or none.)
        """
        return self.tail == "renormalise" and self.correction != "channel"

    def in_words(self) -> str:
        """Return how KD compares distributions, where it is not the usual way; empty where it is."""
        names = ["divergence", "temperature", "interpolation"]
        usual = {column.name: column.default for column in fields(self)}
        unusual = [name for name in names if getattr(self, name) != usual[name]]
        if self.reads_skew:
            # A mixture is named with its share, also the usual one.
            unusual.insert(1, "skew")
        return ", ".join(f"{name} {_in_words(getattr(self, name))}" for name in unusual)

    @property
    def reads_skew(self) -> bool:
        """True if the divergence has a mixture, whose share of the teacher is `skew`."""
        return self.divergence in MIXED


@dataclass(frozen=True)
class RouterConfig(Validated):
    """Settings of the terms that compare hidden states (`StudentAwareRouter`); a term with weight 0 is not computed."""

    layers: Annotated[int, Gt(0)] = 4
    """Student layers that are compared, spread evenly up to the last (capped at the student's layers)."""
    teacher_layers: Annotated[int, Gt(0)] = 8
    """Teacher layers that are kept, spread likewise."""
    positions: Annotated[int, Ge(4)] = 64
    """rel and attn: anchors of a window (of each document, where documents are isolated) that are compared with one
    another, spread evenly."""
    heads: Annotated[int, Gt(0)] = 1
    """rel and attn: equal parts of a state that are compared on their own; a divisor of both widths."""
    span: Annotated[int, Gt(0)] = 16
    """contr: anchors of a span of text, whose states are averaged."""
    contrastive_temperature: Annotated[float, Gt(0)] = 0.1
    """contr: temperature of the similarities (InfoNCE)."""
    gate: Literal["window", "position"] = "window"
    """layer: what the gate sees of the student, its mean state in a window or its state at each position."""
    prior_width: Annotated[float, Gt(0)] = 0.15
    """layer: standard deviation of the gate's prior around the same relative depth, as a share of the depth."""
    prior_weight: Annotated[float, Ge(0)] = 0.1
    """layer: weight of the divergence of the gate from its prior."""
    initial: Literal["ridge", "random"] = "ridge"
    """Projections at the start: a ridge regression on the first windows, or random."""
    calibration_windows: Annotated[int, Gt(0)] = 32
    """Windows that standardise the teacher's states and fit the first projections."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate of projections and gates; it follows the schedule of the student's."""

    def check_widths(self, student: int, teacher: int) -> None:
        """Check that states of these widths can be cut into heads.

        Raises:
            ValueError: the number of heads does not divide a width.
        """
        # A head is an equal part of a state.
        if student % self.heads or teacher % self.heads:
            raise ValueError(
                f"got router.heads {self.heads} for states of width {student} (student) and {teacher} (teacher), "
                "expected a divisor of both; 1 always is"
            )
