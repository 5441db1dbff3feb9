"""A checklist: what was measured, what is allowed, and what to do about a difference."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from ..errors import UserError


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


DOUBTFUL = "doubtful"
"""In place of `passed`: what may be meant so, and may be a mistake."""


def check(name: str, hint: str) -> Callable:
    """Turn a function that returns (value, allowed, passed[, hint]) into one that returns a `Check`.

    `passed` can be `DOUBTFUL`. An exception in it is a failed check with its message.
    """

    def decorate(measure: Callable[..., tuple]) -> Callable[..., Check]:
        @wraps(measure)
        def run(*args: Any) -> Check:
            try:
                value, allowed, passed, *own_hint = measure(*args)
            except Exception as error:
                prefix = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                return Check(name, prefix + " ".join(str(error).split()), "no error", False, hint)
            return Check(
                name,
                value,
                allowed,
                passed=bool(passed),
                hint=own_hint[0] if own_hint else hint,
                doubtful=passed is DOUBTFUL,
            )

        return run

    return decorate


def run(items: Iterable[str | Check]) -> int:
    """Print titles and checks as they come, then a summary; returns the exit code, 1 if a check failed.

    What goes wrong between two checks is a failed one and the last.

    Raises:
        UserError: as `items` does.
    """
    began, checks = time.monotonic(), []
    try:
        for item in items:
            if isinstance(item, Check):
                checks.append(item)
                _show(item)
            else:
                print(item, flush=True)
    except UserError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        checks.append(
            Check("all further checks", message, "no error", False, "this is a fault of the program: report it")
        )
        _show(checks[-1])

    failed = [done.name for done in checks if not done.passed]
    doubtful = [done.name for done in checks if done.doubtful]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed in {time.monotonic() - began:.0f} s.")
    if failed:
        print(f"Not ready: {'; '.join(failed)}.")
    elif doubtful:
        print(f"Ready to train, if this is meant so: {'; '.join(doubtful)}.")
    else:
        print("Ready to train!")
    return 1 if failed else 0


def _show(done: Check) -> None:
    """Print one line, and a second one where there is something to do."""
    if _can_print("✓✗→"):
        passed, failed, arrow = "✓", "✗", "→"
    else:
        passed, failed, arrow = "ok", "FAILED", "->"

    mark = passed if done.passed else failed
    if done.doubtful:
        mark = "?"
    print(f"  {mark} {done.name}: {done.value}  [{done.allowed}]", flush=True)
    if done.doubtful or not done.passed:
        print(f"      {arrow} {done.hint}", flush=True)


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
