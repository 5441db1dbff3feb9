"""LoRA students, by peft: frozen weights, and beside them a low-rank adapter that is trained and saved alone.

The weights of a layer become W + alpha / rank * B A (Hu et al. 2021, arXiv 2106.09685); B starts at 0, so the student
starts as what its base is. The adapter is float32, whatever the base is in.
"""

import copy
import logging
import warnings
from typing import Any

import torch
from torch import nn

from ..config.settings import LoraConfig
from ..errors import UserError
from ..machine import packages
from ..parallel import deepspeed
from . import locate, precision

log = logging.getLogger(__name__)


def check(settings: LoraConfig, device: torch.device) -> None:
    """Find out, with nothing loaded, whether such a student can be made here.

    Raises:
        UserError: peft is not installed, or the base's weights cannot be what was asked for.
    """
    if settings.enabled:
        packages.require("peft", "--lora", extra="peft")
        precision.check_weights(settings.base, "student.lora.base", device)


def add_lora(base: nn.Module, name: str, settings: LoraConfig) -> nn.Module:
    """A peft model around `base`, which is frozen, with a fresh adapter; seed torch before.

    Args:
        name: hub id or local folder of the base: whoever loads the adapter loads it from there.

    Raises:
        UserError: the base has no layers of the names in `settings.targets`, or DeepSpeed cannot train these.
    """
    import peft

    targets, paths = settings.targets, [f".{path}" for path, _ in base.named_modules()]
    wanted = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    unknown = [] if targets == ["all-linear"] else [t for t in targets if not any(p.endswith(f".{t}") for p in paths)]
    try:
        if unknown:  # peft would only mind if none of them were known
            raise ValueError(f"there is no {' and no '.join(unknown)}")
        student = _wrapped(base, wanted)
    except ValueError as error:
        layers = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, nn.Linear)}
        raise UserError(
            f"student.lora.targets: got {', '.join(targets)}, expected all-linear alone, or layers of {name}, such as "
            f"{', '.join(sorted(layers))}.\n  {error}"
        ) from error
    if deepspeed.is_requested() and hasattr(base.get_output_embeddings(), "base_layer"):
        raise UserError(
            f"student.lora.targets: got {', '.join(targets)}, the head among them, which under DeepSpeed all processes "
            "would have to call equally often; expected other layers, or FSDP2"
        )
    wanted.base_model_name_or_path = locate.where_from(name)
    trained, all_of_it = student.get_nb_trainable_parameters()
    log.info("LoRA of rank %d: %s of %s parameters are trained", settings.rank, f"{trained:,}", f"{all_of_it:,}")
    return student


def merged(student: nn.Module, base: nn.Module) -> nn.Module:
    """A plain model, without peft: `base`, anew and in float32, with the adapter of `student` added to its weights."""
    adapter = {name: p for name, p in student.get_base_model().named_parameters() if p.requires_grad}
    settings = copy.deepcopy(student.peft_config["default"])
    settings.base_model_name_or_path = None  # of the student's own settings: peft writes the new base's name there
    whole = _wrapped(base, settings)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head.weight is embedding.weight and (hasattr(head, "base_layer") or hasattr(embedding, "base_layer")):
        # one of the two changes: from now on they are two
        (head.base_layer if hasattr(head, "base_layer") else head).weight = nn.Parameter(head.weight.detach().clone())
        base.config.get_text_config().tie_word_embeddings = False
    base.load_state_dict(adapter, strict=False)
    return whole.merge_and_unload(safe_merge=True)


def _wrapped(base: nn.Module, settings: Any) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        # of a renamed call, of tied weights, which `merged` unties, and of what peft sets right itself
        warnings.filterwarnings("ignore", ".*(is_gradient_checkpointing|tie_word_embeddings|fan_in_fan_out)")
        return peft.get_peft_model(base, settings)
