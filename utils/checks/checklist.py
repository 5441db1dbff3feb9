"""The checklist: rows of what is checked, the ranges that are allowed, and how the results are printed.

A `Row` names a check, the function that measures, what it is measured on, what is allowed and what to do when it
fails. A measuring function returns numbers (a NamedTuple), which the row's ranges judge and its template shows; or it
returns `Measured`, judged already, where what is allowed is known only after the measurement.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from ..logs.terminal import printable

# ------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    name: str
    value: str
    """What was measured."""
    allowed: str
    passed: bool
    hint: str
    """What to do when it fails, or what to look at."""
    doubtful: bool = False
    """It passed, and somebody should look at it: it may be meant so."""


@dataclass(frozen=True)
class Measured:
    """A measurement and its verdict."""

    value: str
    """The measured value, for people."""
    allowed: str
    """The allowed range, for people."""
    passed: bool
    doubtful: bool = False
    """It passed, and may be meant so or be a mistake: the hint is shown."""
    hint: str | None = None
    """Shown instead of the row's, where the measurement knows better what to do."""


# -------------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Range:
    """An allowed range of numbers. NaN lies in none."""

    text: str
    """The range, for people."""
    low: float = -math.inf
    high: float = math.inf
    low_is_in: bool = True
    high_is_in: bool = True

    def admits(self, measured: float | Sequence[float]) -> bool:
        """Return True if a number lies in the range; of several, if all do."""
        if isinstance(measured, Sequence):
            return all(self.admits(number) for number in measured)

        # Comparisons, not their negation: NaN must fail.
        above_low = measured >= self.low if self.low_is_in else measured > self.low
        below_high = measured <= self.high if self.high_is_in else measured < self.high
        return bool(above_low and below_high)


def within(low: float, high: float, unit: str = "") -> Range:
    """Return the range from `low` to `high`, both included."""
    return Range(f"{_short(low)} to {_short(high)} {unit}".rstrip(), low, high)


def near(expected: float, tolerance: float) -> Range:
    """Return the range of numbers closer to `expected` than `tolerance`."""
    text = f"within {_short(tolerance)} of {_short(expected)}"
    return Range(text, expected - tolerance, expected + tolerance, low_is_in=False, high_is_in=False)


def below(limit: float) -> Range:
    """Return the range below `limit`, which is not in it."""
    return Range(f"below {_short(limit)}", high=limit, high_is_in=False)


def above(limit: float) -> Range:
    """Return the range above `limit`, which is not in it."""
    return Range(f"above {_short(limit)}", low=limit, low_is_in=False)


def at_least(limit: float, unit: str = "") -> Range:
    """Return the range from `limit` upwards."""
    return Range(f"{_short(limit)} {unit}".rstrip() + " or more", low=limit)


def at_most(limit: float) -> Range:
    """Return the range up to `limit`."""
    return Range(f"{_short(limit)} or less", high=limit)


def equal_to(expected: float) -> Range:
    """Return the range that holds one number."""
    return Range(_short(expected), expected, expected)


def _short(number: float) -> str:
    """Return a limit as people write it: 0.95 and 2, but 1e-4."""
    if number == 0 or abs(number) > 0.01:
        return f"{number:g}"
    return f"{number:.0e}".replace("e-0", "e-")


# ---------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One check of the checklist, as data."""

    name: str
    measure: Callable[..., Any]
    """Returns a NamedTuple of numbers, or `Measured`."""
    on: tuple[str, ...] = ()
    """Names of the subjects that are the arguments of `measure`."""
    shows: str = ""
    """Template of the value, with the fields of the NamedTuple."""
    allowed: Mapping[str, Range] = field(default_factory=dict)
    """Field of the NamedTuple -> its allowed range; the check passes if every one is kept."""
    wording: str = ""
    """The allowed ranges, for people; by default their own texts."""
    hint: str = ""
    """What to do when the check fails."""

    def check(self, subjects: Mapping[str, Any] | None = None) -> Check:
        """Measure and judge. An exception is a failed check with its message.

        Args:
            subjects: what there is to be measured, by the names in `on`.
        """
        try:
            arguments = [(subjects or {})[name] for name in self.on]
            measured = self._judge(self.measure(*arguments))
        except Exception as error:
            # A user's mistake says itself what it is; of any other error the class is half of the message.
            prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            measured = Measured(prefix + _one_line(error), "no error", passed=False)

        return Check(
            self.name,
            measured.value,
            measured.allowed,
            passed=bool(measured.passed),
            hint=self.hint if measured.hint is None else measured.hint,
            doubtful=measured.doubtful,
        )

    def _judge(self, result: Any) -> Measured:
        """Return a verdict on the numbers of a measurement; one that is judged already as it is."""
        if isinstance(result, Measured):
            return result

        numbers = result._asdict()
        verdicts = [limits.admits(numbers[name]) for name, limits in self.allowed.items()]
        texts = [limits.text for limits in self.allowed.values()]
        return Measured(
            value=self.shows.format(**numbers),
            allowed=self.wording or ", ".join(texts),
            passed=all(verdicts),
        )


# ------------------------------------------------------------------------------------------ printing


@dataclass(frozen=True)
class BriefGroup:
    """The title of checks of which only those are printed that fail, and how many passed, unless all are asked for."""

    title: str


def run(items: Iterable[str | BriefGroup | Check], *, shows_all: bool = True) -> int:
    """Print titles and checks as they come, then a summary.

    An error between two checks becomes a failed check, the last one.

    Args:
        shows_all: print every check of brief groups as well.

    Returns:
        the exit code: 1 if a check failed, else 0.

    Raises:
        UserError: as `items` does.
    """
    # Printed as they come: the last line on the screen names what takes so long, or what crashed.
    start = time.monotonic()
    checks: list[Check] = []
    group: list[Check] | None = None
    try:
        for item in items:
            if isinstance(item, Check):
                checks.append(item)
                if group is not None:
                    group.append(item)
                if group is None or item.doubtful or not item.passed:
                    _show(item)
                continue

            # The title of what follows ends the group before it.
            _show_passed(group)
            group = None
            if isinstance(item, BriefGroup) and not shows_all:
                group = []
            print(item.title if isinstance(item, BriefGroup) else item, flush=True)
        _show_passed(group)

    except UserError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {_one_line(error)}"
        hint = "this is a fault of the program: report it"
        checks.append(Check("all further checks", message, "no error", passed=False, hint=hint))
        _show(checks[-1])

    return _summarise(checks, time.monotonic() - start)


def _summarise(checks: Sequence[Check], seconds: float) -> int:
    """Print how many checks passed and whether a run can start; returns the exit code."""
    failed = [check.name for check in checks if not check.passed]
    doubtful = [check.name for check in checks if check.doubtful]

    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed in {seconds:.0f} s.")
    if failed:
        print(f"Not ready: {'; '.join(failed)}.")
    elif doubtful:
        print(f"Ready to train, if this is meant so: {'; '.join(doubtful)}.")
    else:
        print("Ready to train!")
    return 1 if failed else 0


def _show_passed(group: Sequence[Check] | None) -> None:
    """Print how many checks of a brief group passed, if there is one."""
    if not group:
        return
    passed = sum(check.passed for check in group)
    mark, failed, _ = _marks()
    print(f"  {mark if passed == len(group) else failed} {passed} of {len(group)} (-v shows each)", flush=True)


def _marks() -> tuple[str, str, str]:
    """Return the signs for passed, failed and what to do, as far as the terminal's encoding has them."""
    if _can_print("✓✗→"):
        return "✓", "✗", "→"
    return "ok", "FAILED", "->"


def _show(check: Check) -> None:
    """Print one line, and a second one where there is something to do."""
    passed, failed, arrow = _marks()

    mark = passed if check.passed else failed
    if check.doubtful:
        mark = "?"
    print(printable(f"  {mark} {check.name}: {check.value}  [{check.allowed}]"), flush=True)
    if check.doubtful or not check.passed:
        print(printable(f"      {arrow} {check.hint}"), flush=True)


def _can_print(text: str) -> bool:
    """Return True if the terminal's encoding has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _one_line(error: Exception) -> str:
    """Return the message of an error with all white space as single spaces."""
    return " ".join(str(error).split())
