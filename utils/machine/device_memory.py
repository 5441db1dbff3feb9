"""Memory of a device: how much is taken at a time, and how what does not fit is recognised and cut into parts."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

Item = TypeVar("Item")
Result = TypeVar("Result")

MESSAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""Parts of the plain RuntimeErrors that CUDA's libraries raise where they find no memory beside torch's allocator."""

MARGIN = 1.25
"""A run whose forecast is so many times what is free is refused: more than the forecast can be wrong."""

SCORED_LOGITS = 2**24
"""Logits that an evaluation looks at in one go, at most: 64 MiB in float32."""
GPU_SCORED_LOGITS = 2**27
"""The same on a GPU, which one window of 512 tokens does not keep busy: 512 MiB."""
GPU_SCORED_WINDOWS = 16
"""Windows of a batch to score on a GPU, at least; as many of them pass at once as their logits allow."""


def scored_logits(device: torch.device) -> int:
    """Return how many logits an evaluation looks at in one go on a device, at most."""
    return GPU_SCORED_LOGITS if device.type == "cuda" else SCORED_LOGITS


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def release() -> None:
    """Give back the memory of a failed attempt."""
    clear_device_cache(garbage_collection=True)


@dataclass
class FittingParts:
    """Work on sequences part by part; a part that does not fit into memory is done again in halves."""

    size: int = sys.maxsize
    """Most items of a part. It is halved where that many do not fit, and stays so for the sequences that follow."""

    survives: bool = True
    """False: what does not fit raises, because other processes already wait for this one."""

    def of(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Result], at_most: int = sys.maxsize
    ) -> Iterator[Result]:
        """Yield what `work` returns of each part of `items`, in order.

        Args:
            at_most: items of a part of this sequence, if less than `size`.

        Raises:
            RuntimeError: of `work`, if it is another one than that memory ran out, or a single item does not fit.
        """
        first = 0
        while first < len(items):
            count = min(self.size, at_most)
            part = items[first : first + count]
            result = self._attempt(part, work)

            if result is None:
                # Not in the handler of the exception: its traceback keeps alive what was computed.
                release()
                self.size = (len(part) + 1) // 2
                continue

            yield result[0]
            first += len(part)

    def _attempt(self, part: Sequence[Item], work: Callable[[Sequence[Item]], Any]) -> tuple[Any] | None:
        """Return what `work` returns, alone in a tuple; None if it ran out of memory and halves may be tried."""
        try:
            return (work(part),)
        except RuntimeError as error:
            can_be_halved = len(part) > 1 and self.survives
            if not can_be_halved or not is_out_of_memory(error):
                raise
        return None
