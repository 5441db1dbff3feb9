"""Signs that a student loses itself in its own text: compared over rounds, each told once, with the likely cause.

A student that learns from its own text can run away: what it writes too often is what it learns next. Lengths, ends
and the teacher's opinion show it rounds before the evaluation does.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

FEWEST_TEXTS = 16
"""Texts below which figures say nothing: smaller rounds are taken together until they have so many."""
KEPT_LOOKS = 12
"""Looks, of a round or of several small ones, that are kept beside the first ones of the run."""
COMPARED = 3
"""First and last looks whose means are compared: their figures are of few texts, and go up and down."""
LENGTH_GROWTH = 1.5
BITS_GROWTH = 1.2
"""Growth within the kept looks that is a sign, of the mean length and of the teacher's bits per byte."""
WHOLE_LENGTH_GROWTH = 2.0
WHOLE_BITS_GROWTH = 1.5
"""Growth since the run began that is a sign: the text that is gone on from may differ somewhat by then."""
BITS_LEAP = 2.0
"""Growth of the teacher's bits per byte from the first look to any other that is a sign by itself."""
LEAST_LEAP = 0.5
"""Bits per byte that such a leap is, at least."""
LEAST_GIVEN_ENDS = 0.2
"""Share of the given texts that must end within the limit before a student that never ends is a sign."""
FEWEST_WITHOUT_END = 96
"""Texts none of which ends before that is a sign: of so many, a student that ends one in ten ends at least one."""
FEWER_ENDS = 0.25
"""Share of the first looks' ends that must be left."""


class Limit(NamedTuple):
    """A share that a figure of the newest texts may have, and what is said of more behind it."""

    figure: str
    most: float
    message: str


LIMITS = {
    "one_token": Limit(
        "commonest_token",
        0.5,
        "of the tokens that the student wrote are one and the same. Likely cause: a learning rate that is too high for "
        "text of its own, or a student that has learned too little yet: let curriculum.on_policy begin later",
    ),
    "repeats": Limit(
        "repeated_4grams",
        0.7,
        "of the student's 4-grams were in the same text before. Likely cause: a learning rate that is too high for "
        "text of its own, sampling that is too cold (on_policy.temperature), or a student that has learned too little "
        "yet: let curriculum.on_policy begin later",
    ),
    "empty": Limit(
        "empty",
        0.5,
        "of the places for the student's text have none. Likely cause: it ends at once, as students do whose learning "
        "rate is too high; or windows without a place to go on from: a lower on_policy.prompt_tokens, or a higher "
        "data.max_length",
    ),
    "broken": Limit(
        "broken",
        0.5,
        "of the student's texts break off at a special token in their middle, or at bytes that are no UTF-8; nothing "
        "is learned from there on. Likely cause: the end of a base model where the template has another, or a learning "
        "rate that is too high for text of its own",
    ),
}
"""Signs that one look shows by itself, by name."""

FIGURES = (
    "ended",
    "given_ended",
    "tokens",
    "commonest_token",
    "repeated_4grams",
    "empty",
    "broken",
    "teacher_bits_per_byte",
)
"""Figures of a round that looks have the means of."""

Look = dict[str, Any]
"""Those means over the texts of a round, or of several small ones, and how many `texts` these are."""


class WarningSigns:
    """Looks at the figures of the newest rounds beside those of the rounds before.

    Args:
        warn: where a warning goes; None: the log.

    Attributes:
        warned: names of the signs that a warning was given of, in order.
    """

    def __init__(self, warn: Callable[[str], None] | None = None) -> None:
        self.warned: list[str] = []
        self._warn = warn or log.warning
        self._first: list[Look] = []
        self._looks: list[Look] = []
        self._pending: list[dict[str, Any]] = []
        self._newest = -1

    def check(self, figures: Mapping[str, Any]) -> list[str]:
        """Take the figures of a round, warn of signs that are new, and return the names of all that it shows."""
        # A run that goes on where a round begins has seen its figures before.
        if figures["step"] > self._newest:
            self._newest = figures["step"]
            self._pending.append(dict(figures))
            if sum(each["texts"] for each in self._pending) >= FEWEST_TEXTS:
                self._take(_together(self._pending))
                self._pending.clear()
        if not self._looks or self._pending:
            return []

        signs = {
            "no_ends": self._never_ends() or self._ends_less(),
            "longer": self._grows_longer(),
            **{name: self._exceeded(limit) for name, limit in LIMITS.items()},
            "unlikely": self._is_ever_less_likely(),
        }
        shown = [name for name, message in signs.items() if message]
        for name in shown:
            if name not in self.warned:
                self.warned.append(name)
                self._warn(f"[RED FLAG] {signs[name]}.")
        return shown

    def state_dict(self) -> dict[str, Any]:
        """Return plain containers, for a checkpoint."""
        return {
            "warned": list(self.warned),
            "first": list(self._first),
            "looks": list(self._looks),
            "pending": list(self._pending),
            "newest": self._newest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; what older versions saved of their rounds is left aside."""
        self.warned = list(state["warned"])
        self._first = list(state.get("first", []))
        self._looks = list(state.get("looks", []))
        self._pending = list(state.get("pending", []))
        self._newest = state.get("newest", -1)

    def _take(self, look: Look) -> None:
        """Keep a look, the first ones for good."""
        if len(self._first) < COMPARED:
            self._first.append(look)
        self._looks = [*self._looks, look][-KEPT_LOOKS:]

    def _never_ends(self) -> str | None:
        """Look for a student that does not end its texts, in two looks or more."""
        newest: list[Look] = []
        for look in reversed(self._looks):
            newest.append(look)
            if len(newest) > 1 and sum(each["texts"] for each in newest) >= FEWEST_WITHOUT_END:
                break
        else:
            return None

        recent = _together(newest)
        if recent["ended"] or recent["given_ended"] < LEAST_GIVEN_ENDS:
            return None
        return (
            f"none of the student's last {recent['texts']:,} texts ended by itself, and {recent['given_ended']:.0%} of "
            "the given texts end within on_policy.new_tokens. Likely cause: an end of turn that the student does not "
            "know, such as that of an instruct teacher's template for a base student; or a student that has learned "
            "too little yet: let curriculum.on_policy begin later"
        )

    def _ends_less(self) -> str | None:
        """Look for a student that forgets to end its texts, though it could when the run began."""
        if len(self._looks) < 2 * COMPARED:
            return None
        first, recent = _together(self._first), _together(self._looks[-COMPARED:])
        knew = min(first["ended"], recent["given_ended"])
        if knew < LEAST_GIVEN_ENDS or recent["ended"] >= FEWER_ENDS * first["ended"]:
            return None
        return (
            f"the student ends ever fewer of its texts by itself: {first['ended']:.0%} when the run began, "
            f"{recent['ended']:.1%} now, and {recent['given_ended']:.0%} of the given texts end within "
            "on_policy.new_tokens. Likely cause: a learning rate that is too high for text of its own, or too small a "
            "share of given text"
        )

    def _grows_longer(self) -> str | None:
        """Look for texts that grow."""
        grown = self._growth("tokens", LENGTH_GROWTH, WHOLE_LENGTH_GROWTH)
        if not grown:
            return None
        return (
            f"the student's texts grow: {_listed(grown, '.0f')} tokens. Likely cause: a divergence "
            "that rewards going on, or a learning rate that is too high for text of its own (a tenth of that for given "
            "text is a good start); a larger share of given text holds it"
        )

    def _exceeded(self, limit: Limit) -> str | None:
        """Look for a share of the newest look that is above its limit."""
        share = self._looks[-1][limit.figure]
        if share is None or share <= limit.most:
            return None
        return f"{share:.0%} {limit.message}"

    def _is_ever_less_likely(self) -> str | None:
        """Look for texts that the teacher finds ever less likely, or all at once."""
        name = "teacher_bits_per_byte"
        grown = self._growth(name, BITS_GROWTH, WHOLE_BITS_GROWTH) or self._leap(name)
        if not grown:
            return None
        return (
            "the teacher finds the student's text ever less likely: "
            f"{_listed(grown, '.3f')} bits per byte. Likely cause: a learning rate that is too high for text of its "
            "own, or too small a share of given text"
        )

    def _growth(self, name: str, factor: float, factor_of_run: float) -> list[float]:
        """Return the values of a figure that has grown by more than a factor, within the kept looks or since the run
        began; empty: it has not.
        """
        kept = _values(self._looks, name)
        if len(kept) < 2 * COMPARED:
            return []
        if fmean(kept[-COMPARED:]) > factor * fmean(kept[:COMPARED]):
            return kept

        first = _values(self._first, name)
        if len(first) == COMPARED and fmean(kept[-COMPARED:]) > factor_of_run * fmean(first):
            return [*first, *kept[-COMPARED:]]
        return []

    def _leap(self, name: str) -> list[float]:
        """Return the first and the newest value of a figure that is a multiple of the first; empty: it is not."""
        values = _values([*self._first[:1], self._looks[-1]], name)
        if len(values) < 2 or values[1] < max(BITS_LEAP * values[0], values[0] + LEAST_LEAP):
            return []
        return values


def _together(rounds: Sequence[Mapping[str, Any]]) -> Look:
    """Return the means over all texts of some rounds or looks; of a figure that none of them has, None."""
    look: Look = {"texts": sum(each["texts"] for each in rounds)}
    for name in FIGURES:
        measured = [each for each in rounds if each.get(name) is not None]
        texts = sum(each["texts"] for each in measured)
        look[name] = sum(each[name] * each["texts"] for each in measured) / texts if texts else None
    return look


def _values(looks: Sequence[Look], name: str) -> list[float]:
    """Return a figure of some looks; those without it are left out."""
    return [look[name] for look in looks if look[name] is not None]


def _listed(values: Sequence[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)
