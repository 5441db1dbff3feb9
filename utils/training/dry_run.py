"""Dry run: training and evaluation of a student, tried once in small before anything is measured.

A mode that an architecture does not have in the installed transformers is found within seconds, instead of after the
evaluation of a large teacher, in the first step or in the last minute. Nothing is left of the trial.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

from ..advice import reason
from ..errors import RunError, UserError
from ..evaluation import scores
from ..machine import device_memory
from ..pretrained.loading import fingerprint
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
        _try_mode(
            "trained: its forward or backward fails in training mode",
            student,
            partial(_learn, module, batch, accelerator),
        )

        # Some models count or average in their buffers, also where nothing is to be learned.
        before = fingerprint(student)
        _try_mode(
            "evaluated: its forward fails in evaluation mode and float32",
            student,
            partial(_evaluate, module, student, batch, compares),
        )
        if fingerprint(student) != before:
            raise UserError(
                f"the student (a {type(student).__name__}, transformers {transformers.__version__}) changes its own "
                f"weights in evaluation mode: what is exported would not be what was measured. {REMEDY}"
            )


def _learn(module: nn.Module, batch: Any, accelerator: Accelerator) -> None:
    """Compute loss and gradient of a batch as a training step does."""
    module.train()
    with accelerator.autocast():
        loss = module(batch, 0, counts=batch.counts, measure=True).loss
    if loss.requires_grad:  # else nothing is trained, which the optimizer says better
        loss.backward()


def _evaluate(module: Any, student: nn.Module, batch: Any, compares: bool) -> None:
    """Score a batch, and compare student and teacher on it, as an evaluation does."""
    inputs, labels = batch.scored("student")
    device = next(student.parameters()).device

    # As an evaluation does: in float32, whatever the run trains in.
    with scores.float32_evaluation(student):
        scores.token_nll(student, [(inputs, labels)], device)
        if compares:
            module.compare(batch)


def _try_mode(failure: str, student: nn.Module, mode: Callable[[], None]) -> None:
    """Run `mode`.

    Args:
        failure: what the student cannot be where that fails, up to a colon, and which part of it fails.

    Raises:
        UserError: it fails, for another reason than too little memory.
    """
    try:
        mode()
    # These say themselves what is wrong.
    except (UserError, RunError):
        raise
    except Exception as error:  # each architecture fails in its own way
        if device_memory.is_out_of_memory(error):
            participle = failure.partition(":")[0]
            log.info("for lack of memory not tried beforehand whether the student can be %s", participle)
            device_memory.release()
            return

        raise UserError(
            f"the student (a {type(student).__name__}, transformers {transformers.__version__}) cannot be {failure}. "
            f"{REMEDY}\n  {reason(error)}"
        ) from error


class _Buffer(NamedTuple):
    """A buffer of a submodule, and what it held."""

    table: dict[str, Tensor | None]
    """`_buffers` of the submodule: a forward may put another tensor there."""
    name: str
    tensor: Tensor
    content: Tensor


@contextmanager
def _without_trace(module: nn.Module) -> Iterator[None]:
    """Put gradients, buffers, modes and random generators back to what they were."""
    parameters = list(module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = _buffers_of(module)

    # A gradient that is there already would be added to.
    for parameter in parameters:
        parameter.grad = None

    try:
        with preserve_rng_and_mode(module):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

        # Both ways: a forward may change a buffer in place, or put another one there.
        with torch.no_grad():
            for buffer in buffers:
                buffer.tensor.copy_(buffer.content)
                buffer.table[buffer.name] = buffer.tensor


def _buffers_of(module: nn.Module) -> list[_Buffer]:
    """Return all buffers with copies of their contents, also those that no checkpoint has."""
    buffers = []
    for part in module.modules():
        for name, tensor in part._buffers.items():
            if tensor is not None:
                buffers.append(_Buffer(part._buffers, name, tensor, content=tensor.detach().clone()))
    return buffers
