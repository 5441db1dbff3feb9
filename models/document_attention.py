"""The attention kernel with which a frozen teacher reads isolated documents, and the reason for it.

transformers builds a block mask [B, 1, S, S] from positions that start anew, for SDPA and eager attention. Flash
kernels of variable length need no mask and skip what it hides. They take rows laid end to end, and half precision only:
a teacher may have that throughout, while a student has float32 weights and is measured in float32.

Shapes: B rows, S tokens of a row, H width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import import_utils

from .language_model import body_layers, check_isolation

FLASH = {
    "flash_attention_3": ("is_flash_attn_3_available", (9, 0)),
    "flash_attention_2": ("is_flash_attn_2_available", (8, 0)),
}
"""Name in transformers -> its test for the package, first NVIDIA compute capability; the fastest first."""

STUDENT_REASON = "SDPA with a block mask: it is measured in float32, which no flash kernel has"
"""The student's attention, for the log."""


class DocumentAttention(NamedTuple):
    """A choice of attention for isolated documents."""

    name: str | None
    """Implementation of transformers that reads rows laid end to end; None: the model's own, with a block mask."""
    reason: str
    """In words, for the log."""


UNCHOSEN = DocumentAttention(None, "its own with a block mask")
"""That of a model for which nothing was chosen."""


def choose(model: nn.Module) -> DocumentAttention:
    """Return the fastest kernel that reads each document of a model by itself, which is tried.

    Args:
        model: a frozen causal model that passes `check_isolation`.
    """
    usual = f"{model.config._attn_implementation} with a block mask"
    devices = {parameter.device for parameter in model.parameters()}
    device = next(iter(devices))
    if len(devices) > 1 or device.type != "cuda":
        return DocumentAttention(
            None, f"{usual}: flash kernels need a model on one GPU, and it is on {_words(devices)}"
        )
    if model.dtype not in (torch.float16, torch.bfloat16):
        return DocumentAttention(None, f"{usual}: its weights are {model.dtype}, which no flash kernel has")

    capability = torch.cuda.get_device_capability(device)
    reasons = []
    for name, (test, needed) in FLASH.items():
        if capability < needed:
            reasons.append(f"{name} needs compute capability {needed[0]}.{needed[1]}")
        elif not _passes(test):
            reasons.append(f"{name} is not installed")
        elif failure := failure_of(model, name):
            reasons.append(f"{name} failed: {failure}")
        else:
            return DocumentAttention(name, f"{name} of variable length: installed, and this GPU has it")
    return DocumentAttention(None, f"{usual}: {', '.join(reasons)}")


def failure_of(model: nn.Module, name: str) -> str:
    """Try an implementation of attention on two documents in a row; return what is wrong with it, or nothing."""

    def states(ids: Tensor, positions: Tensor) -> Tensor:
        return end_to_end(model, name, ids=ids, positions=positions)[0]

    # Packages of kernels fail in ways of their own: none is a reason not to train.
    try:
        check_isolation(model, "teacher", states)
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


@torch.no_grad()
def end_to_end(
    model: nn.Module,
    name: str,
    *,
    ids: Tensor,
    positions: Tensor,
    layers: Sequence[int] = (),
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Do `body_layers` with another attention, on rows laid end to end; the model then has its own again.

    Without gradients only: layers that are computed again in a backward pass would find the other attention.

    Args:
        model: a causal language model.
        name: an implementation of transformers that takes the documents from their positions.
        ids: [B, S].
        positions: [B, S] from 0 on in every document.
        layers: numbers of layers, counted from 1.
    """
    with _attention(model, name):
        states, hidden = body_layers(model, ids.reshape(1, -1), layers, positions=positions.reshape(1, -1))

    rows = ids.shape
    return states.unflatten(1, rows).squeeze(0), tuple(state.unflatten(1, rows).squeeze(0) for state in hidden)


@contextmanager
def _attention(model: nn.Module, name: str) -> Iterator[None]:
    """Give a model another attention for a while.

    Raises:
        ValueError: it takes none.
    """
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        if model.config._attn_implementation != name:
            raise ValueError("the model's attention cannot be changed")
        yield
    finally:
        model.set_attn_implementation(usual)


def _passes(test: str) -> bool:
    """Return the answer of a test for a package; False where this version of transformers has no such test."""
    is_available = getattr(import_utils, test, None)
    return is_available is not None and is_available()


def _words(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))
