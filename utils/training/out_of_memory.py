"""Running out of memory in training: recognised, survived where that is possible, explained where it is not."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import RunError
from ..forecast.batch_size import REMEDY
from ..machine.device_memory import is_out_of_memory
from .plan import Plan

log = logging.getLogger(__name__)


class OutOfMemory(RunError):
    """Training does not fit into memory, and why nothing can be done about it here."""


class Attempt:
    """Does the parts of an optimizer step one after the other until one does not fit into memory.

    Args:
        survive: False: what does not fit raises, because other processes already wait for this one.
    """

    def __init__(self, survive: bool) -> None:
        self.survive = survive
        self.failed = False

    def __call__(self, action: Callable[..., Any], *arguments: Any) -> Any:
        """What `action` returns; None where it, or an earlier one, does not fit."""
        if self.failed:
            return None
        try:
            return action(*arguments)
        except RuntimeError as error:
            if not (self.survive and is_out_of_memory(error)):
                raise
            log.debug("out of memory: %s", error)
        self.failed = True  # here, where the traceback no longer holds what was computed
        return None


def halved(plan: Plan, step: int, contrastive: bool) -> Plan:
    """The same optimizer steps in smaller micro-batches, and says so.

    Args:
        step: optimizer steps done.
        contrastive: whether there is a term that compares the texts of a micro-batch.
    """
    smaller = plan.halved()
    log.warning(
        "out of memory in optimizer step %d with micro-batches of %d windows: the step is done again, and the run goes "
        "on, in micro-batches of %d (accumulation %d); the effective batch stays %d windows%s",
        step + 1, plan.micro_batch, smaller.micro_batch, smaller.accumulation, smaller.global_batch,
        "; a contrastive term has fewer texts to choose from in them" if contrastive else "",
    )  # fmt: skip
    return smaller


@contextmanager
def explained(forecast: str) -> Iterator[None]:
    """Turns an error of torch about memory into one that says what was expected and what to do.

    Args:
        forecast: what the run was expected to take; may be empty.

    Raises:
        OutOfMemory: with the forecast and the remedies.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
            raise
        told = str(error).partition("\n")[0].rstrip(". ")
        expected = f" Forecast before the start: {forecast}." if forecast else ""
        raise OutOfMemory(f"{told}.{expected} {REMEDY}. The checkpoints of this run stay.") from error
