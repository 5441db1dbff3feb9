"""The student before its training: checked with nothing loaded, then made, the same one every time."""

import logging

import torch
from accelerate import Accelerator
from torch import nn

from ..config.settings import StudentConfig, TrainingConfig
from ..errors import UserError
from ..seeding import seed_everything
from . import loading
from .families import keep_weights
from .layers import LayerChoice, keep_layers
from .locate import gguf_file
from .lora import add_lora
from .precision import frozen_dtype

log = logging.getLogger(__name__)


def check(config: StudentConfig) -> None:
    """Check, with nothing loaded, that the exported student can be loaded by other programs.

    Raises:
        UserError: an adapter of an adapter, or of a GGUF file, which other programs cannot load.
    """
    is_exported_as_adapter = config.lora.enabled and not config.lora.merge and config.init == "pretrained"
    if not is_exported_as_adapter:
        return

    if gguf_file(config.name, "student") is not None:
        why = "is a GGUF file, over which no other program can load an adapter"
    elif (base := loading.adapted_base(config.name, "student")) is not None:
        why = f"is itself an adapter of {base}, and the new adapter would belong to both"
    else:
        return

    raise UserError(
        f"--lora: {config.name} {why}. Expected a whole model's folder or hub id below an adapter. "
        "Merge them at the end: --set student.lora.merge=true; or leave out --lora."
    )


def make(
    config: StudentConfig,
    training: TrainingConfig,
    accelerator: Accelerator,
    layers: LayerChoice | None = None,
) -> nn.Module:
    """Make the student as it is before training, on the training device, float32 where it is trained.

    Args:
        layers: those that it takes from its model; None: all.

    Raises:
        UserError: its model cannot be loaded, or cannot be trained as the settings say.
    """
    # Random weights and a fresh adapter are drawn from torch's global generator.
    seed_everything(training.seed)

    if config.init == "random":
        # Of its namesake only the config is read: no weights need to be there.
        student = loading.random_model(loading.load_config(config.name, "student")).to(accelerator.device)
    elif config.lora.enabled:
        student = _with_adapter(config, accelerator)
    else:
        # Of a model that is cut only what is kept needs the training device's memory.
        device = accelerator.device if layers is None else torch.device("cpu")
        student = loading.load_model(config.name, "student", torch.float32, device, allow_pickle=config.allow_pickle)
    if layers is not None:
        student = keep_layers(student, layers.indices).to(accelerator.device)

    # Before the first evaluation, which would change the weights of some architectures.
    keep_weights(student.config)
    if training.gradient_checkpointing:
        loading.recompute_layers(student)
    return student


def _with_adapter(config: StudentConfig, accelerator: Accelerator) -> nn.Module:
    """Load frozen weights, which need not be float32, and add a fresh adapter to them."""
    dtype = frozen_dtype(config.lora.base, accelerator.device, accelerator.mixed_precision)
    log.info("below the adapter, the student in %s: %s", str(dtype.value).removeprefix("torch."), dtype.reason)

    base = loading.load_model(
        config.name,
        "student",
        dtype.value,
        accelerator.device,
        weights=config.lora.base,
        allow_pickle=config.allow_pickle,
    )
    return add_lora(base, config.name, config.lora)
