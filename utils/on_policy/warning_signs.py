"""Signs that a student loses itself in its own text: compared over rounds, each told once, with the likely cause.

A student that learns from its own text can run away: what it writes too often is what it learns next. Lengths, ends
and the teacher's opinion show it rounds before the evaluation does.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

log = logging.getLogger(__name__)

FEWEST_TEXTS = 16
"""Texts of a round below which its figures say nothing."""
KEPT_ROUNDS = 12
"""Rounds that are looked at."""
COMPARED_ROUNDS = 3
"""First and last ones of them whose means are compared: a round's figures are of few texts, and go up and down."""
LENGTH_GROWTH = 1.5
BITS_GROWTH = 1.2
"""Growth from the first to the last of them that is a sign, of the mean length and of the teacher's bits per byte."""
MOST_OF_ONE_TOKEN = 0.5
"""Share of the tokens that one of them may have."""
MOST_EMPTY = 0.5
"""Share of the texts that may be empty."""
LEAST_GIVEN_ENDS = 0.2
"""Share of the given texts that must end within the limit before a student that never ends is a sign."""


class WarningSigns:
    """Looks at the figures of each round beside those of the rounds before.

    Args:
        warn: where a warning goes; None: the log.

    Attributes:
        warned: names of the signs that a warning was given of, in order.
    """

    def __init__(self, warn: Callable[[str], None] | None = None) -> None:
        self.warned: list[str] = []
        self._warn = warn or log.warning
        self._rounds: list[dict[str, Any]] = []

    def check(self, figures: Mapping[str, Any]) -> list[str]:
        """Take the figures of a round, warn of signs that are new, and return the names of all that it shows."""
        if figures["texts"] < FEWEST_TEXTS:
            return []

        # A run that goes on where a round begins has seen its figures before.
        earlier = [r for r in self._rounds if r["step"] < figures["step"]]
        self._rounds = [*earlier, dict(figures)][-KEPT_ROUNDS:]

        signs = {
            "no_ends": self._never_ends(),
            "longer": self._grows_longer(),
            "one_token": self._repeats_one_token(),
            "empty": self._is_empty(),
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
        return {"warned": list(self.warned), "rounds": list(self._rounds)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.warned = list(state["warned"])
        self._rounds = list(state["rounds"])

    def _never_ends(self) -> str | None:
        """Look for a student that does not end its texts, two rounds in a row."""
        last_two = self._rounds[-2:]
        if len(last_two) < 2 or any(r["ended"] or r["given_ended"] < LEAST_GIVEN_ENDS for r in last_two):
            return None
        return (
            f"none of the student's {last_two[-1]['texts']} texts of this round ended by itself, nor of the round "
            f"before, and {last_two[-1]['given_ended']:.0%} of the given texts end within on_policy.new_tokens. Likely "
            "cause: an end of turn that the student does not know, such as that of an instruct teacher's template for "
            "a base student; or a student that has learned too little yet: let curriculum.on_policy begin later"
        )

    def _grows_longer(self) -> str | None:
        """Look for texts that grow round by round."""
        lengths = self._series("tokens")
        if not _grows(lengths, LENGTH_GROWTH):
            return None
        return (
            f"the student's texts grow round by round: {_listed(lengths, '.0f')} tokens. Likely cause: a divergence "
            "that rewards going on, or a learning rate that is too high for text of its own (a tenth of that for given "
            "text is a good start); a larger share of given text holds it"
        )

    def _repeats_one_token(self) -> str | None:
        """Look for texts of one token."""
        share = self._rounds[-1]["commonest_token"]
        if share <= MOST_OF_ONE_TOKEN:
            return None
        return (
            f"{share:.0%} of the tokens that the student wrote are one and the same. Likely cause: a learning rate "
            "that is too high for text of its own, or a student that has learned too little yet: let "
            "curriculum.on_policy begin later"
        )

    def _is_empty(self) -> str | None:
        """Look for texts without content."""
        share = self._rounds[-1]["empty"]
        if share <= MOST_EMPTY:
            return None
        return (
            f"{share:.0%} of the places for the student's text have nothing to learn from. Likely cause: it ends at "
            "once, as students do whose learning rate is too high; or windows without a place to go on from: a lower "
            "on_policy.prompt_tokens, or a higher data.max_length"
        )

    def _is_ever_less_likely(self) -> str | None:
        """Look for texts that the teacher finds ever less likely."""
        bits = self._series("teacher_bits_per_byte")
        if not _grows(bits, BITS_GROWTH):
            return None
        return (
            "the teacher finds the student's text ever less likely, round by round: "
            f"{_listed(bits, '.3f')} bits per byte. Likely cause: a learning rate that is too high for text of its "
            "own, or too small a share of given text"
        )

    def _series(self, name: str) -> list[float]:
        """Return a figure of the last rounds; those without it are left out."""
        return [r[name] for r in self._rounds if r.get(name) is not None]


def _grows(values: Sequence[float], factor: float) -> bool:
    """Return True if the last of enough rounds have more than the first, by more than a factor."""
    if len(values) < 2 * COMPARED_ROUNDS:
        return False
    return fmean(values[-COMPARED_ROUNDS:]) > factor * fmean(values[:COMPARED_ROUNDS])


def _listed(values: Sequence[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)
