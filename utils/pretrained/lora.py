"""LoRA students, by peft: frozen weights, and beside them a low-rank adapter that is trained and saved alone.

The weights of a layer become W + alpha / rank * B A (Hu et al. 2021, arXiv 2106.09685); B starts at 0, so the student
starts as what its base is. The adapter is float32, whatever the base is in.
"""

import copy
import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..config.settings import LoraConfig
from ..errors import UserError
from ..machine.packages import require
from ..parallel import deepspeed
from .locate import where_from
from .precision import check_weights

if TYPE_CHECKING:
    import peft

log = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"
"""Every linear layer but the head, in the words of peft."""


def check(settings: LoraConfig, device: torch.device) -> None:
    """Check, with nothing loaded, that such a student can be made on this machine.

    Raises:
        UserError: peft is not installed, or the base's weights cannot be what was asked for.
    """
    if settings.enabled:
        require("peft", "--lora", extra="peft")
        check_weights(settings.base, "student.lora.base", device)


def add_lora(base: nn.Module, name: str, settings: LoraConfig) -> nn.Module:
    """Return a peft model around `base`, which is frozen, with a fresh adapter; seed torch before.

    Args:
        name: hub id or local folder of the base: whoever loads the adapter loads it from there.

    Raises:
        UserError: the base has no layers of the names in `settings.targets`, or DeepSpeed cannot train these.
    """
    import peft

    is_all_linear = settings.targets == [ALL_LINEAR]
    lora_config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=ALL_LINEAR if is_all_linear else settings.targets,
    )

    # Wrong names fail in peft or before it; the message lists the right ones.
    try:
        if not is_all_linear:
            _require_layers(base, settings.targets)
        student = _add_adapter(base, lora_config)
    except ValueError as error:
        layers = {path.rpartition(".")[2] for path, module in base.named_modules() if isinstance(module, nn.Linear)}
        raise UserError(
            f"student.lora.targets: got {', '.join(settings.targets)}, expected all-linear alone, or layers of {name}, "
            f"such as {', '.join(sorted(layers))}.\n  {error}"
        ) from error

    # The head is called once a chunk, as often as a process needs, and ZeRO waits for all processes in each call.
    head_has_adapter = hasattr(base.get_output_embeddings(), "base_layer")
    if head_has_adapter and deepspeed.is_requested():
        raise UserError(
            f"student.lora.targets: got {', '.join(settings.targets)}, the head among them, which under DeepSpeed all "
            "processes would have to call equally often; expected other layers, or FSDP2"
        )

    # peft took the name from the model: perhaps a relative folder, which would be wrong elsewhere.
    lora_config.base_model_name_or_path = where_from(name)
    trained, total = student.get_nb_trainable_parameters()
    log.info("LoRA of rank %d: %s of %s parameters are trained", settings.rank, f"{trained:,}", f"{total:,}")
    return student


def _require_layers(model: nn.Module, targets: Sequence[str]) -> None:
    """Check that a model has layers of all these names; peft itself minds only if it has none of them.

    Raises:
        ValueError: it lacks some.
    """
    paths = [f".{path}" for path, _ in model.named_modules()]
    unknown = [target for target in targets if not any(path.endswith(f".{target}") for path in paths)]
    if unknown:
        raise ValueError(f"there is no {' and no '.join(unknown)}")


def merged(student: nn.Module, base: nn.Module) -> nn.Module:
    """Return a plain model, without peft: `base` with the adapter of `student` added to its weights.

    Args:
        base: the student's base, loaded anew and in float32; changed in place.
    """
    adapter = {name: value for name, value in student.get_base_model().named_parameters() if value.requires_grad}

    # A copy: peft writes the new base's name into the settings, and the student's own must keep theirs.
    settings = copy.deepcopy(student.peft_config["default"])
    settings.base_model_name_or_path = None
    whole = _add_adapter(base, settings)
    _untie(base)

    base.load_state_dict(adapter, strict=False)
    return whole.merge_and_unload(safe_merge=True)


def _untie(model: nn.Module) -> None:
    """Give a head its own weights where it shares them with the embedding and one of the two has an adapter.

    The adapter is added to one of them, so that from then on they differ.
    """
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    has_adapter = hasattr(head, "base_layer") or hasattr(embedding, "base_layer")
    if head.weight is not embedding.weight or not has_adapter:
        return

    # Inside of peft's layer, where there is one around the head.
    layer = head.base_layer if hasattr(head, "base_layer") else head
    layer.weight = nn.Parameter(head.weight.detach().clone())
    model.config.get_text_config().tie_word_embeddings = False


def _add_adapter(base: nn.Module, settings: "peft.LoraConfig") -> nn.Module:
    """Return a peft model around `base`, with a fresh adapter of these settings."""
    import peft

    with warnings.catch_warnings():
        # of a renamed call, of tied weights, which `merged` unties, and of what peft sets right itself
        warnings.filterwarnings("ignore", ".*(is_gradient_checkpointing|tie_word_embeddings|fan_in_fan_out)")
        return peft.get_peft_model(base, settings)
