"""The student before and after its training: made, the same one every time, and exported."""

import logging

import torch
from accelerate import Accelerator
from torch import nn

from ..config.settings import StudentConfig, TrainingConfig
from ..errors import UserError
from ..seeding import seed_everything
from . import families, lora, precision
from . import loading as pretrained

log = logging.getLogger(__name__)

RANDOM_HINT = (
    "a student that starts from random weights learns more from the teacher's hidden states besides "
    "(docs/experiments.md): --set curriculum.feat.weight=1 curriculum.attn.weight=1"
)


def check(config: StudentConfig) -> None:
    """Find out, with nothing loaded, whether what will be exported can be loaded.

    Raises:
        UserError: an adapter of an adapter, which other programs cannot load.
    """
    is_exported_alone = config.lora.enabled and not config.lora.merge and config.init == "pretrained"
    base = pretrained.adapted_base(config.name, "student") if is_exported_alone else None
    if base is not None:
        raise UserError(
            f"--lora: {config.name} is itself an adapter of {base}, and the new adapter would belong to both. Expected "
            "a whole model below an adapter. Merge them at the end: --set student.lora.merge=true; or leave out --lora."
        )


def make(config: StudentConfig, training: TrainingConfig, accelerator: Accelerator) -> nn.Module:
    """The student before training, on the training device, float32 where it is trained."""
    seed_everything(training.seed)
    device, loading = accelerator.device, {"allow_pickle": config.allow_pickle}
    if config.init == "random":
        student = pretrained.random_model(pretrained.load_config(config.name, "student")).to(device)
    elif not config.lora.enabled:
        student = pretrained.load_model(config.name, "student", torch.float32, device, **loading)
    else:
        dtype = precision.frozen_dtype(config.lora.base, device, accelerator.mixed_precision)
        log.info("below the adapter, the student in %s: %s", str(dtype.value).removeprefix("torch."), dtype.reason)
        loading["weights"] = config.lora.base
        base = pretrained.load_model(config.name, "student", dtype.value, device, **loading)
        student = lora.add_lora(base, config.name, config.lora)
    families.keep_weights(student.config)
    if training.gradient_checkpointing:
        pretrained.recompute_layers(student)
    return student
