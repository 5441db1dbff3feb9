"""Check of an export: loaded anew as anybody would, the student has the loss that was measured before."""

import gc
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..advice import reason
from ..config.settings import StudentConfig
from ..errors import RunError
from ..machine.hardware import free_memory
from ..pretrained.loading import load_model
from ..pretrained.precision import QUANTISED as QUANTISED_WEIGHTS
from .held_out import HeldOut
from .scores import describe_model, float32_evaluation, token_nll

log = logging.getLogger(__name__)

WINDOWS = 8
"""Held-out windows that are scored a second time: any damage to the weights shows in one."""
FLOAT32, HALF, QUANTISED = 1e-3, 2e-2, 1e-1
"""Difference, as a share of the loss, that rounding explains: the same weights in float32; below an adapter (or on
another device) in half precision; and in 8 or 4 bits, of which the exported adapter knows nothing."""
SPARE = 1.5
"""Free memory, as a multiple of the student's weights, with which it is loaded a second time on the same device."""


@dataclass(frozen=True)
class LoadedAnew:
    """Losses of the student in memory and of the exported one, in nats per token of the same text."""

    trained: float
    """Of the student in memory."""
    exported: float
    """Of the student that was loaded from the folder."""
    tolerance: float
    """Share of the loss that rounding explains."""
    folder: Path
    """Where the student was exported to."""

    @property
    def difference(self) -> float:
        """Loss of the exported student over that in memory; 0 as a rule."""
        return self.exported - self.trained

    @property
    def is_same(self) -> bool:
        """Return whether rounding explains the difference."""
        if not math.isfinite(self.exported):
            return False
        return abs(self.difference) <= self.tolerance * max(1.0, self.trained)

    def require(self) -> None:
        """Make sure that what was exported is what was measured.

        Raises:
            RunError: it is not.
        """
        if not self.is_same:
            raise RunError(
                f"the exported student is not the one that was measured: loaded anew from {self.folder} it has a loss "
                f"of {self.exported:.4f} nats per token on {WINDOWS} held-out windows or fewer, and in memory "
                f"{self.trained:.4f}. Do not use that folder. The checkpoints of the run are whole; another version of "
                "transformers may write it rightly: the same command exports it again."
            )


def load_anew(trained: nn.Module, held_out: HeldOut, folder: Path, config: StudentConfig) -> LoadedAnew:
    """Score a few held-out windows by the student in memory and by the exported one; in one process.

    Args:
        trained: the student in memory.
        held_out: only its windows, collator and batch size are used.
        folder: where the student was exported to.
        config: of the student that was trained.

    Raises:
        RunError: the folder cannot be loaded.
    """
    device = next(trained.parameters()).device
    trained_loss = _loss(trained, held_out, device)

    try:
        place = _place(device, _bytes(trained))
        exported = load_model(str(folder), "student", torch.float32, place, allow_pickle=config.allow_pickle)
    except Exception as error:  # whatever the libraries raise for a folder that is not right
        raise RunError(
            f"the exported student in {folder} cannot be loaded anew. The checkpoints of the run are whole; another "
            f"version of transformers may write it rightly: the same command exports it again.\n  {reason(error)}"
        ) from error
    exported_loss = _loss(exported, held_out, place)

    # let go of the second student before what follows needs memory
    del exported
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    tolerance = _tolerance(trained, config, same_device=place == device)
    check = LoadedAnew(trained_loss, exported_loss, tolerance=tolerance, folder=folder)
    if check.is_same:
        log.info("the exported student, loaded anew, has the loss that was measured")
    else:
        log.error(
            "the exported student, loaded anew, has a loss of %.4f; in memory it has %.4f: do not use %s",
            exported_loss,
            trained_loss,
            folder,
        )
    return check


def _place(device: torch.device, size: int) -> torch.device:
    """Return where to load the exported student: beside the trained one, or on the CPU where `size` bytes do not
    fit."""
    if device.type == "cpu" or free_memory(device) > SPARE * size:
        return device
    return torch.device("cpu")


def _bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights in float32."""
    return 4 * describe_model(model)["parameters"]


def _loss(model: nn.Module, held_out: HeldOut, device: torch.device) -> float:
    """Compute the nats per token of the first windows."""
    count = min(WINDOWS, len(held_out.windows))
    windows = [held_out.windows[i] for i in range(count)]

    size = held_out.batch_size
    scored = []
    for first in range(0, count, size):
        batch = held_out.collate(windows[first : first + size])
        scored.append(batch.scored("student"))

    with float32_evaluation(model):
        nll, tokens = token_nll(model, scored, device)
    return nll / max(tokens, 1)


def _tolerance(trained: nn.Module, config: StudentConfig, same_device: bool) -> float:
    """Return the difference that rounding explains, as a share of the loss."""
    if config.lora.enabled and config.lora.base in QUANTISED_WEIGHTS:
        return QUANTISED

    # the same products in the same precision: what remains comes from another order of sums
    all_float32 = all(parameter.dtype == torch.float32 for parameter in trained.parameters())
    if all_float32 and same_device:
        return FLOAT32
    return HALF
