"""Trained adapters that are given as a model: recognised, their base named, and the two merged to a whole model."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants, file_exists, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from ..errors import UserError
from .model_folders import ADAPTER_CONFIG, is_adapter, read_json

if TYPE_CHECKING:
    import peft

WHOLE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files of a whole model: a repository of the hub that has one beside an adapter's config is no adapter."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED_WEIGHTS = "adapter_model.bin"


def adapter_folder(source: str, offline: bool) -> Path | None:
    """Return the folder of an adapter's files; None: the source is a whole model.

    Args:
        source: a local folder, or a hub id.
        offline: read from the hub's cache alone.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder if is_adapter(folder) else None

    try:
        config = Path(hf_hub_download(source, ADAPTER_CONFIG, local_files_only=offline))
    except (HfHubHTTPError, HFValidationError, OSError):  # no such file or repository, or no network
        return None

    is_whole = any(_hub_has(source, name, offline) for name in WHOLE_WEIGHTS)
    return None if is_whole else config.parent


def _hub_has(repository: str, name: str, offline: bool) -> bool:
    """Tell whether a repository has a file; offline, whether the cache has it."""
    if offline or constants.HF_HUB_OFFLINE:
        return isinstance(try_to_load_from_cache(repository, name), str)
    return file_exists(repository, name)


def base_name(folder: Path, label: str) -> str:
    """Return the hub id or the folder of the model that an adapter belongs to.

    Args:
        label: role and name of the adapter, for messages.

    Raises:
        UserError: its adapter_config.json does not say.
    """
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if isinstance(base, str) and base:
        return base
    raise UserError(
        f"{label}: this is an adapter, and its {ADAPTER_CONFIG} does not name the model that it belongs to. Expected "
        "base_model_name_or_path with a hub id or a folder: write it there."
    )


def merge_into(base: nn.Module, source: str, *, label: str, allow_pickle: bool, offline: bool) -> nn.Module:
    """Return a plain model, without peft: `base` with the adapter added to its weights.

    Args:
        source: a local folder, or a hub id.
        label: role and name of the adapter, for messages.
        allow_pickle: take the adapter's weights from a pickle file where there are no safetensors.
        offline: read from the hub's cache alone.

    Raises:
        UserError: the adapter's weights are not there, belong to another model, or cannot be added to weights.
    """
    if not allow_pickle:
        _refuse_pickle_only(Path(source), label)

    adapted = _load_adapter(base, source, label, offline=offline)
    if adapted.active_peft_config.is_prompt_learning:
        raise UserError(
            f"{label}: this is an adapter of the kind {adapted.active_peft_config.peft_type.value}, which is not added "
            "to weights. Expected LoRA or its kin; give the base model instead."
        )

    merged = adapted.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)  # peft had frozen it


def _refuse_pickle_only(folder: Path, label: str) -> None:
    """Refuse a local folder whose adapter is a pickle file only, which can carry code.

    Raises:
        UserError: it is such a folder.
    """
    has_safetensors = (folder / ADAPTER_WEIGHTS).is_file()
    has_pickle = (folder / PICKLED_WEIGHTS).is_file()
    if has_pickle and not has_safetensors:
        raise UserError(
            f"{label}: the adapter's weights are a pickle file only ({PICKLED_WEIGHTS}), which can carry code. "
            f"Expected {ADAPTER_WEIGHTS}. If you trust its author: --set {label.partition(' ')[0]}.allow_pickle=true."
        )


def _load_adapter(base: nn.Module, source: str, label: str, *, offline: bool) -> "peft.PeftModel":
    """Load an adapter around its base.

    Raises:
        UserError: it is damaged, or does not fit the base.
    """
    import peft

    try:
        with warnings.catch_warnings():
            # peft would leave these at their start, which is the base as it was
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return peft.PeftModel.from_pretrained(base, source, local_files_only=offline)
    except Exception as error:  # whatever peft, torch and safetensors raise for what is damaged or does not fit
        words = " ".join(str(error).split())
        raise UserError(
            f"{label}: its adapter does not fit a {type(base).__name__} of these sizes, or is damaged. Expected the "
            f"adapter of the model that its {ADAPTER_CONFIG} names.\n  {type(error).__name__}: {words}"
        ) from error
