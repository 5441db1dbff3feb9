"""Running out of memory in training: recognised, survived where that is possible, explained where it is not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import RunError, TeacherGone
from ..forecast.batch_size import REMEDY
from ..machine.device_memory import is_out_of_memory
from .plan import Plan

log = logging.getLogger(__name__)


class OutOfMemory(RunError):
    """Training does not fit into memory; says why nothing can be done about it in the run."""


class Attempt:
    """Does the parts of an optimizer step one after the other until one does not fit into memory, or has no teacher.

    Args:
        survive: False: such a part raises, because other processes already wait for this one.

    Attributes:
        failed: a part could not be done; those after it are not done.
        gone: the error, where the teacher's server is lost.
    """

    def __init__(self, survive: bool) -> None:
        self.survive = survive
        self.failed = False
        self.gone: TeacherGone | None = None

    def __call__(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `action` returns; None where it, or an earlier one, could not be done."""
        if self.failed:
            return None

        try:
            return action(*arguments)
        except TeacherGone as error:
            if not self.survive:
                raise
            self.gone = error
        except RuntimeError as error:
            if not self.survive or not is_out_of_memory(error):
                raise
            log.debug("out of memory: %s", error)

        # Not in the handler, where the traceback still holds what was computed.
        self.failed = True
        return None


def halve_micro_batches(plan: Plan, step: int, *, couples_windows: bool) -> Plan:
    """Return a plan with the same optimizer steps in smaller micro-batches, and say so in the log.

    Args:
        step: optimizer steps done.
        couples_windows: a term compares the texts of a micro-batch.
    """
    smaller = plan.halved()

    # The one case in which the smaller micro-batches change what is learned.
    consequence = "; a contrastive term has fewer texts to choose from in them" if couples_windows else ""
    log.warning(
        "out of memory in optimizer step %d with micro-batches of %d windows: the step is done again, and the run goes "
        "on, in micro-batches of %d (accumulation %d); the effective batch stays %d windows%s",
        step + 1,
        plan.micro_batch,
        smaller.micro_batch,
        smaller.accumulation,
        smaller.global_batch,
        consequence,
    )
    return smaller


@contextmanager
def explain_out_of_memory(forecast: str) -> Iterator[None]:
    """Turn an error of torch about memory into one that says what was expected and what to do.

    Args:
        forecast: what the run was expected to take; may be empty.

    Raises:
        OutOfMemory: with the forecast and the remedies.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, OutOfMemory) and not is_out_of_memory(error):
            raise

        # torch's first line says how much was missing; those after it are about its allocator.
        message = str(error).partition("\n")[0].rstrip(". ")
        expected = f" Forecast before the start: {forecast}." if forecast else ""
        raise OutOfMemory(f"{message}.{expected} {REMEDY}. The checkpoints of this run stay.") from error
