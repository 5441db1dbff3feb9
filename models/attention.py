"""Remedies for attention of transformers on a GPU: kernels for grouped heads, and masks without empty rows.

Grouped heads are queries that share keys and values. transformers hands them to `scaled_dot_product_attention` as they
are wherever there is no mask. Only the flash and cuDNN kernels can read them so: in half precision, from compute
capability 8.0 on. Everywhere else torch then takes its plain kernel, which writes the scores [heads, S, S] to memory
and keeps them for the backward pass. With keys and values repeated for every query head, which costs S x width instead,
torch has its memory-efficient kernel.

An empty row of a mask is that of a token which attends to nothing: padding on the left, before the text. PyTorch
promises zeros for it, and some kernels give NaN (cuDNN on an H100 or B200, among others): the next layer multiplies it
by a weight of 0, which is NaN for every token of that text.

Shapes: B texts, S query positions, T key positions.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

GROUPED_CAPABILITY = (8, 0)
"""First NVIDIA compute capability whose kernels read grouped heads."""
GROUPED_TEST = "use_gqa_in_sdpa"
"""Private function of transformers that decides whether grouped heads are handed on as they are: (mask, key, ...) ->
bool."""
SDPA = "sdpa"
"""Name under which transformers keeps its mask for `scaled_dot_product_attention`."""


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


def without_empty_rows(mask: Tensor | None) -> Tensor | None:
    """Return a mask [B, 1, S, T] in which tokens that attended to nothing attend to everything.

    They are padding, to which nothing attends: no other token's states change.
    """
    if mask is None or mask.dtype != torch.bool:
        return mask

    is_empty = ~mask.any(-1, keepdim=True)
    return mask | is_empty


def fill_empty_rows_of_masks() -> None:
    """Make transformers build masks without empty rows for `scaled_dot_product_attention`.

    For the whole process, since texts are padded on the left by its generation. Doing it twice changes nothing.
    """
    original = ALL_MASK_ATTENTION_FUNCTIONS[SDPA]
    if getattr(original, "fills_empty_rows", False):
        return

    # Its arguments are those of whichever version is installed.
    def build_mask(*arguments: Any, **options: Any) -> Tensor | None:
        return without_empty_rows(original(*arguments, **options))

    # The mark by which a second call knows the replacement.
    setattr(build_mask, "fills_empty_rows", True)  # noqa: B010 - a function has no such attribute
    AttentionMaskInterface.register(SDPA, build_mask)
