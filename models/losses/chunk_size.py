"""The number of logit rows that are held at once."""

import torch

CPU_ROWS = 224
"""Most rows on a CPU."""
CPU_HALF_ROWS = 512
"""Most rows on a CPU whose products are in half precision."""
CPU_BYTES = 160 * 2**20
"""Most bytes of logits on a CPU."""
PASCAL_ROWS = 512
"""Most rows on a GPU of the Pascal generation or older."""
GPU_ROWS = 2_048
"""Most rows on a newer GPU."""
GPU_SHARE = 16
"""A GPU gives at most one part in so many of its memory."""
LEAST_ROWS = 16
"""Rows that are held whatever they take; more are a multiple of it."""
VOLTA = 7
"""Major compute capability of the first GPUs after Pascal."""


def chunk_rows(
    vocabulary: int,
    device: torch.device,
    bytes_per_logit: int = 4,
    *,
    is_half: bool = False,
) -> tuple[int, str]:
    """Return the number of logit rows to hold at once, and the reason in words.

    Each chunk reads and writes the whole weight gradient, so few rows waste time; many rows waste memory. Where more
    rows gain no more: 192 to 224 on a CPU (measured: one AVX-512 core, 576 wide, 49,152 tokens: products at 64, 128,
    192, 224, 256 rows take 1.13, 1.03, 1.01, 0.99, 0.98 of those of all rows at once), 512 there where products in bf16
    are faster than memory (two cores with AVX512_BF16: the gradient's products at 224, 512, 1,024 rows take 2.34, 1.53,
    1.41 s for 4,096 tokens), 256 to 512 on Pascal, 1,024 and more on newer GPUs (as published for such losses; not
    measured here). A GPU gives at most a sixteenth of its memory: not of what is free, which would make sums depend on
    what ran before.

    Args:
        vocabulary: V.
        device: the device of the head.
        bytes_per_logit: 4 for one float32 buffer; more for float64, soft-capping (+ 4) or a half-precision head that is
            called as a module (+ 2).
        is_half: the products and the weight gradient's sums are of half-precision factors.
    """
    if device.type == "cuda":
        is_pascal = torch.cuda.get_device_capability(device)[0] < VOLTA
        most_rows = PASCAL_ROWS if is_pascal else GPU_ROWS
        budget = torch.cuda.get_device_properties(device).total_memory // GPU_SHARE
        budget_text = f"a sixteenth of the GPU's memory is {budget / 1e6:,.0f} MB"
    else:
        most_rows = CPU_HALF_ROWS if is_half else CPU_ROWS
        budget = CPU_BYTES
        budget_text = f"the budget on {device.type} is {budget / 1e6:,.0f} MB"

    # Fewer than the most are rounded down to a multiple of 16.
    fitting_rows = budget // (vocabulary * bytes_per_logit)
    rows = most_rows
    if fitting_rows < most_rows:
        rows = max(LEAST_ROWS, fitting_rows // LEAST_ROWS * LEAST_ROWS)

    reason = "as many as fit"
    if rows == most_rows:
        reason = f"more rows are not faster on this {device.type} device"
    size = rows * vocabulary * bytes_per_logit / 1e6
    return rows, f"{rows} rows of {vocabulary:,} logits at once, {size:,.0f} MB: {reason}; {budget_text}"
