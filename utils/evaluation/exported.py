"""The exported student, loaded anew as anybody would, has the loss that was measured before the export."""

import gc
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..advice import reason
from ..config.settings import StudentConfig
from ..errors import RunError
from ..machine.hardware import free_memory
from ..pretrained import loading as pretrained
from ..pretrained import precision
from . import scores

log = logging.getLogger(__name__)

WINDOWS = 8
"""Held-out windows that are scored a second time: any damage to the weights shows in one."""
FLOAT32, HALF, QUANTISED = 1e-3, 2e-2, 1e-1
"""Difference, as a share of the loss, that rounding explains: the same weights in float32; below an adapter (or on
another device) in half precision; and in 8 or 4 bits, of which the exported adapter knows nothing."""


@dataclass(frozen=True)
class LoadedAnew:
    """Losses of the student in memory and of the exported one, in nats per token of the same text."""

    trained: float
    exported: float
    tolerance: float
    """Share of the loss."""
    folder: Path

    @property
    def difference(self) -> float:
        """Loss of the exported student over that in memory; 0 as a rule."""
        return self.exported - self.trained

    @property
    def is_same(self) -> bool:
        """Tell whether rounding explains the difference."""
        return math.isfinite(self.exported) and abs(self.difference) <= self.tolerance * max(1.0, self.trained)

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


def load_anew(trained: nn.Module, held_out: Any, folder: Path, config: StudentConfig) -> LoadedAnew:
    """Score a few held-out windows by the student in memory and by the exported one; in one process.

    Args:
        held_out: with `windows`, `collate` and `batch_size` (see `utils.evaluation.held_out`).
        config: of the student that was trained.

    Raises:
        RunError: the folder cannot be loaded.
    """
    device = next(trained.parameters()).device
    ours = _loss(trained, held_out, device)
    try:
        anew, place = _load(folder, config, device, _bytes(trained))
    except Exception as error:  # whatever the libraries raise for a folder that is not right
        raise RunError(
            f"the exported student in {folder} cannot be loaded anew. The checkpoints of the run are whole; another "
            f"version of transformers may write it rightly: the same command exports it again.\n  {reason(error)}"
        ) from error
    theirs = _loss(anew, held_out, place)
    del anew
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    check = LoadedAnew(ours, theirs, _tolerance(trained, config, place == device), folder)
    if check.is_same:
        log.info("the exported student, loaded anew, has the loss that was measured (%+.1e)", check.difference)
    else:
        log.error(
            "the exported student, loaded anew, has a loss of %.4f; in memory it has %.4f: do not use %s",
            theirs,
            ours,
            folder,
        )
    return check


def _load(folder: Path, config: StudentConfig, device: torch.device, size: int) -> tuple[nn.Module, torch.device]:
    """The exported student and where it is: beside the trained one, or on the CPU where it finds no room."""
    place = device if device.type == "cpu" or free_memory(device) > 1.5 * size else torch.device("cpu")
    loading = {"allow_pickle": config.allow_pickle}
    return pretrained.load_model(str(folder), "student", torch.float32, place, **loading), place


def _bytes(model: nn.Module) -> int:
    """Bytes of a model's weights in float32."""
    return 4 * scores.describe_model(model)["parameters"]


def _loss(model: nn.Module, held_out: Any, device: torch.device) -> float:
    """Nats per token of the first windows."""
    rows = [held_out.windows[i] for i in range(min(WINDOWS, len(held_out.windows)))]
    size = held_out.batch_size
    batches = [held_out.collate(rows[first : first + size]) for first in range(0, len(rows), size)]
    with scores.float32_evaluation(model):
        nll, tokens = scores.token_nll(model, [batch.scored("student") for batch in batches], device)
    return nll / max(tokens, 1)


def _tolerance(trained: nn.Module, config: StudentConfig, same_device: bool) -> float:
    if config.lora.enabled and config.lora.base in precision.QUANTISED:
        return QUANTISED
    all_float32 = all(parameter.dtype == torch.float32 for parameter in trained.parameters())
    return FLOAT32 if all_float32 and same_device else HALF
