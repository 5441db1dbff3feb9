"""Disk that a run will take, estimated before models are loaded."""

from operator import itemgetter
from pathlib import Path

from ..config.settings import DataConfig, LoraConfig, TrainingConfig
from ..errors import UserError
from ..files import free_disk
from .model_size import Shape, trained_parameters

WINDOW_BYTES_PER_TEXT_BYTE = 9
"""Tokenised windows of both models in the cache of `datasets`."""
BLOCKS = 3
"""Blocks of a stream whose windows lie on the disk at a time."""
FILTER_BYTES_PER_TEXT = 6
"""What a stream remembers of a document, to know it again: in every block and every checkpoint."""
CHECKPOINT_BYTES = 12
"""Bytes that a checkpoint holds of each trained parameter: the weight and two moments of AdamW, in float32."""
EXPORT_BYTES = 4
"""Bytes of an exported parameter, in float32."""


def disk(
    student: Shape,
    training: TrainingConfig,
    lora: LoraConfig,
    *,
    data: DataConfig | None = None,
    text_bytes: int = 0,
    runs: int = 1,
    in_memory: int = 0,
) -> dict[str, int]:
    """Return the bytes that a run writes, by what they are.

    Args:
        lora: with an adapter only that is saved, and exported unless it is merged.
        data: of a stream the blocks, and what it remembers, are counted, as if the text did not end in any of them.
        text_bytes: of the training text, where it is cut into windows as a whole.
        runs: how many students are trained (2 with a comparison without the teacher).
        in_memory: up to so many bytes of text, windows are not written.
    """
    # a new checkpoint is whole before the oldest goes; with patience the best one stays besides
    checkpoints = training.keep_checkpoints + 1
    if training.patience:
        checkpoints += 1

    trained = trained_parameters(student, lora)
    exported = student.parameters if lora.merge else trained
    windows = text_bytes * WINDOW_BYTES_PER_TEXT_BYTE if text_bytes > in_memory else 0

    blocks = 0
    remembered = 0
    if data is not None and data.streaming:
        windows = 0
        if data.deduplicate:
            remembered = data.remembered_documents * FILTER_BYTES_PER_TEXT
        blocks = BLOCKS * (data.block_bytes * WINDOW_BYTES_PER_TEXT_BYTE + remembered)
    return {
        "checkpoints": (trained * CHECKPOINT_BYTES + remembered) * checkpoints * runs,
        "student": exported * EXPORT_BYTES,
        "windows": windows,
        "blocks of the stream": blocks,
    }


def require_disk(folder: Path, parts: dict[str, int]) -> None:
    """Make sure, before models are loaded, that what a run will write finds room; what it wrote before counts.

    Raises:
        UserError: the estimate, and how much is free.
    """
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    needed = max(0, sum(parts.values()) - written)
    free = free_disk(folder)
    if needed > free:
        named = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in parts.items() if size)
        remedy = "lower training.keep_checkpoints"
        if parts.get("blocks of the stream"):
            remedy += " or data.block_bytes"
        raise UserError(
            f"too little disk for {folder}: this run needs about {needed / 1e6:,.1f} MB more ({named}, of which "
            f"{written / 1e6:,.1f} MB are there), and {free / 1e6:,.1f} MB are free. Free some space, choose another "
            f"--output-dir, or {remedy}."
        )


def largest(parts: dict[str, int], count: int = 3) -> str:
    """Return the total and its largest parts as a message, such as `5.2 GiB (student logits 2.1, ...)`."""
    top = sorted(parts.items(), key=itemgetter(1), reverse=True)[:count]
    named = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in top if size)
    return f"{sum(parts.values()) / 2**30:.3g} GiB ({named})"
