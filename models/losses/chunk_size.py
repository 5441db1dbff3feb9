"""The number of logit rows that are held at once."""

import torch

CPU_ROWS, CPU_BYTES = 224, 160 * 2**20


PASCAL_ROWS, GPU_ROWS = 512, 2_048


LEAST_ROWS = 16


def chunk_rows(vocabulary: int, device: torch.device, bytes_per_logit: int = 4) -> tuple[int, str]:
    """How many rows of logits to hold at once, and why.

    Each chunk reads and writes the whole weight gradient, so few rows waste time; many rows waste memory. Where more
    rows gain no more: 192 to 224 on a CPU (measured: one AVX-512 core, 576 wide, 49,152 tokens: products at 64, 128,
    192, 224, 256 rows take 1.13, 1.03, 1.01, 0.99, 0.98 of those of all rows at once), 256 to 512 on Pascal, 1,024
    and more on newer GPUs (as published for such losses; not measured here). A GPU gives at most a sixteenth of its
    memory: not of what is free, which would make sums depend on what ran before.

    Args:
        vocabulary: V.
        bytes_per_logit: 4 for one float32 buffer; more for float64, soft-capping (+ 4) or a half-precision head that is
            called as a module (+ 2).
    """
    if device.type == "cuda":
        pascal = torch.cuda.get_device_capability(device)[0] < 7
        most = PASCAL_ROWS if pascal else GPU_ROWS
        budget = torch.cuda.get_device_properties(device).total_memory // 16
        where = f"a sixteenth of the GPU's memory is {budget / 1e6:,.0f} MB"
    else:
        most, budget = CPU_ROWS, CPU_BYTES
        where = f"the budget on {device.type} is {budget / 1e6:,.0f} MB"
    fitting = budget // (vocabulary * bytes_per_logit)
    rows = most if fitting >= most else max(LEAST_ROWS, fitting // 16 * 16)
    size = rows * vocabulary * bytes_per_logit / 1e6
    why = f"more rows are not faster on this {device.type} device" if rows == most else "as many as fit"
    return rows, f"{rows} rows of {vocabulary:,} logits at once, {size:,.0f} MB: {why}; {where}"
