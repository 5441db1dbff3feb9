"""Choice of the attention kernel on a GPU for models whose queries share keys and values (grouped heads).

transformers hands grouped heads to `scaled_dot_product_attention` as they are wherever there is no mask. Only the flash
and cuDNN kernels can read them so: in half precision, from compute capability 8.0 on. Everywhere else torch then takes
its plain kernel, which writes the scores [heads, S, S] to memory and keeps them for the backward pass. With keys and
values repeated for every query head, which costs S x width instead, torch has its memory-efficient kernel.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations import sdpa_attention

GROUPED_CAPABILITY = (8, 0)
"""First NVIDIA compute capability whose kernels read grouped heads."""
GROUPED_TEST = "use_gqa_in_sdpa"
"""Private function of transformers that decides whether grouped heads are handed on as they are: (mask, key, ...) ->
bool."""


def reads_grouped_heads(key: Tensor) -> bool:
    """Return whether the device of `key` has a kernel that reads grouped heads without writing scores to memory."""
    if key.device.type != "cuda":
        return True

    # Float32 keys under autocast reach the kernel in half precision.
    is_half = key.dtype != torch.float32 or torch.is_autocast_enabled("cuda")
    return is_half and torch.cuda.get_device_capability(key.device) >= GROUPED_CAPABILITY


def repeat_grouped_heads_where_needed() -> None:
    """Make transformers repeat keys and values where no fast kernel reads grouped heads; the results are the same.

    For the whole process, not for a call of ours: layers that are computed a second time in the backward pass, and
    evaluations by other code, must take the same kernel. Doing it twice changes nothing.
    """
    original = getattr(sdpa_attention, GROUPED_TEST)
    if getattr(original, "repeats_where_needed", False):
        return

    # The function is private: further arguments of any version are passed on.
    def hands_grouped_heads_on(mask: Tensor | None, key: Tensor, *arguments: Any) -> bool:
        return original(mask, key, *arguments) and reads_grouped_heads(key)

    # The mark by which a second call knows the replacement.
    setattr(hands_grouped_heads_on, "repeats_where_needed", True)  # noqa: B010 - a function has no such attribute
    setattr(sdpa_attention, GROUPED_TEST, hands_grouped_heads_on)
