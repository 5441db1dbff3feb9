"""Precision of a model's weights: what they are stored in, what a device can compute with, what frozen ones get."""

import torch
from transformers import BitsAndBytesConfig, PretrainedConfig

from ..errors import UserError
from ..machine.hardware import Choice, bf16_instructions
from ..machine.packages import require

QUANTISED = {"8bit": (7, 5), "4bit": (6, 0)}
"""Weights by bitsandbytes, and the compute capability that each needs (installation guide of bitsandbytes 0.50)."""


def quantisation_method(config: PretrainedConfig) -> str | None:
    """Return the method by which a model's weights are stored in a few bits; None: they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None

    # A dict as config.json has it, or an object of transformers whose method is an enum.
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def bitsandbytes_config(weights: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return settings for int8 with outliers apart (arXiv 2208.07339), or NF4 with quantised scales (2305.14314).

    Args:
        weights: `8bit` or `4bit`.
        dtype: of products with 4-bit weights.
    """
    if weights == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_weights(requested: str, setting: str, device: torch.device) -> None:
    """Check, with nothing loaded, that a device can compute with such weights.

    Args:
        requested: a precision; only `8bit` and `4bit` ask something of the device.
        setting: that it comes from, for messages.

    Raises:
        UserError: 8bit or 4bit without a GPU that can, or without bitsandbytes.
    """
    if requested not in QUANTISED:
        return
    needed = QUANTISED[requested]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None

    if capability is None or capability < needed:
        alternative = ""
        if capability is None:
            got = f"this run is on the {device.type}"
        else:
            got = f"this GPU has {capability[0]}.{capability[1]}"
            if capability >= QUANTISED["4bit"]:
                alternative = ", or 4bit"
        raise UserError(
            f"{setting}: got {requested}, which needs an NVIDIA GPU of compute capability {needed[0]}.{needed[1]} or "
            f"more, and {got}. Expected auto, float32, float16 or bfloat16{alternative}."
        )

    require("bitsandbytes", f"{setting}={requested}", extra="quant")


def frozen_dtype(requested: str, device: torch.device, precision: str) -> Choice[torch.dtype]:
    """Choose what frozen weights, a teacher's or those below an adapter, are computed in.

    Args:
        requested: a precision, or `auto`.
        device: that they are on.
        precision: what the student computes in (no, fp16, bf16).
    """
    # The half precision that was chosen for the student on this device.
    half = torch.bfloat16 if precision == "bf16" else torch.float16

    if requested in QUANTISED:
        # products of 8-bit weights take float16 and nothing else
        dtype = torch.float16 if requested == "8bit" else half
        return Choice(dtype, f"what {requested} weights are computed in")
    if requested != "auto":
        return Choice(getattr(torch, requested), "asked for")
    if precision == "no":
        return Choice(torch.float32, "as the student")

    # A CPU, also one beside a GPU, has its own half precision or none.
    if device.type == "cpu" and (instructions := bf16_instructions()):
        return Choice(torch.bfloat16, f"half the memory, and this CPU has {instructions}")
    if device.type != "cuda":
        return Choice(torch.float32, f"what this {device.type} is fast at")
    return Choice(half, "half the memory; frozen, so nothing is lost in updates")
