"""Memory that runs out: how it is recognised and given back, and how work is cut into parts that fit."""

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
