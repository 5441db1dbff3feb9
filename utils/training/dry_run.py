"""Trial of what a run does late or often, done once in small before anything is measured; nothing is left of it.

A mode that an architecture does not have in the installed transformers is found within seconds, instead of after the
evaluation of a large teacher, in the first step or in the last minute.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from ..advice import reason
from ..errors import RunError, UserError
from ..evaluation import scores
from ..machine import device_memory
from ..pretrained import loading
from ..seeding import preserve_rng_and_mode

log = logging.getLogger(__name__)

REMEDY = "Choose another student, or install another version of transformers (the newest, as a rule)."


def try_modes(module: Any, student: nn.Module, batch: Any, accelerator: Accelerator, *, compares: bool) -> None:
    """Compute a loss and its gradient in training mode, then what is compared in evaluation mode.

    What does not fit into memory is no failure here: training halves its micro-batches.

    Args:
        module: with the step protocol of `utils.training`, and with `compare(batch)`.
        student: the model in it, whose class is named where something fails.
        batch: a real one, small.
        compares: there is a teacher to compare with.

    Raises:
        UserError: a mode fails, or the student changes its own weights in evaluation mode.
    """
    batch = batch.to(accelerator.device)
    with _without_trace(module):
        _try(
            "trained: its forward or backward fails in training mode",
            student,
            lambda: _learn(module, batch, accelerator),
        )
        before = loading.fingerprint(student)
        _try(
            "evaluated: its forward fails in evaluation mode and float32",
            student,
            lambda: _evaluate(module, student, batch, compares),
        )
        if loading.fingerprint(student) != before:
            raise UserError(
                f"the student (a {type(student).__name__}, transformers {transformers.__version__}) changes its own "
                f"weights in evaluation mode: what is exported would not be what was measured. {REMEDY}"
            )


def _learn(module: nn.Module, batch: Any, accelerator: Accelerator) -> None:
    module.train()
    with accelerator.autocast():
        loss = module(batch, 0, counts=batch.counts, measure=True).loss
    if loss.requires_grad:  # else nothing is trained, which the optimizer says better
        loss.backward()


def _evaluate(module: Any, student: nn.Module, batch: Any, compares: bool) -> None:
    inputs, labels = batch.scored("student")
    device = next(student.parameters()).device
    with scores.float32_evaluation(student):
        scores.token_nll(student, [(inputs, labels)], device)
        if compares:
            module.compare(batch)


def _try(what: str, student: nn.Module, mode: Callable[[], None]) -> None:
    try:
        mode()
    except (UserError, RunError):
        raise
    except Exception as error:  # each architecture fails in its own way
        if device_memory.is_out_of_memory(error):
            log.info("for lack of memory not tried beforehand whether the student can be %s", what.partition(":")[0])
            device_memory.release()
            return
        raise UserError(
            f"the student (a {type(student).__name__}, transformers {transformers.__version__}) cannot be {what}. "
            f"{REMEDY}\n  {reason(error)}"
        ) from error


@contextmanager
def _without_trace(module: nn.Module) -> Iterator[None]:
    """Afterwards gradients, buffers, modes and random generators are what they were."""
    parameters = list(module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = [(part._buffers, name, value) for part, name, value in _buffers_of(module)]
    contents = [value.detach().clone() for _, _, value in buffers]
    for parameter in parameters:
        parameter.grad = None
    try:
        with preserve_rng_and_mode(module):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for (table, name, value), content in zip(buffers, contents, strict=True):
                value.copy_(content)
                table[name] = value


def _buffers_of(module: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """(submodule, name, buffer), also of those that no checkpoint has."""
    return [
        (part, name, value) for part in module.modules() for name, value in part._buffers.items() if value is not None
    ]
