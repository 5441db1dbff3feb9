"""Kernel that `scaled_dot_product_attention` takes on an NVIDIA card.

Written after aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of torch 2.13. Shapes: [B, heads, S, width].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MATH, EFFICIENT, FLASH, CUDNN_OR_FLASH = "math", "efficient", "flash", "cudnn or flash"


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of a call of `scaled_dot_product_attention` asks for."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    is_causal: bool
    is_grouped: bool

    @property
    def dtype(self) -> torch.dtype:
        """Return what is computed in: under autocast that is half precision."""
        if torch.is_autocast_enabled("cuda") and self.query.dtype == torch.float32:
            return torch.get_autocast_dtype("cuda")
        return self.query.dtype

    @property
    def learns(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, self.key, self.value))

    @property
    def has_equal_heads(self) -> bool:
        return self.query.shape[1] == self.key.shape[1]

    @property
    def width(self) -> int:
        return self.query.shape[-1]


def choose_kernel(capability: tuple[int, int], call: AttentionCall) -> str:
    """Return the name of the kernel. No release up to 2.13 has a memory-efficient one for grouped heads."""
    if not (call.has_equal_heads or call.is_grouped):
        return MATH
    if capability >= (8, 0) and call.dtype in (torch.float16, torch.bfloat16):
        if capability[0] in (9, 10) and call.width <= 128 and call.width % 8 == 0:
            return CUDNN_OR_FLASH
        if _fits_flash(capability, call):
            return FLASH
    return EFFICIENT if _fits_efficient(capability, call) else MATH


def _fits_flash(capability: tuple[int, int], call: AttentionCall) -> bool:
    if call.mask is not None or call.width > 256:
        return False
    if call.is_causal and call.query.shape[-2] != call.key.shape[-2]:
        return False
    has_little_shared_memory = (8, 6) <= capability <= (8, 9)
    is_wide = call.width > 192 and (call.width <= 224 or call.dropout)
    return not (call.learns and has_little_shared_memory and is_wide)


def _fits_efficient(capability: tuple[int, int], call: AttentionCall) -> bool:
    half = (torch.float16, torch.bfloat16) if capability >= (8, 0) else (torch.float16,)
    if not call.has_equal_heads or call.dtype not in (*half, torch.float32):
        return False
    if call.dtype in half and capability >= (7, 0):
        return call.width % 8 == 0
    return call.width % 4 == 0 or capability < (8, 0)
