"""Memory that runs out: how it is recognised, how what it held is given back, and work in parts that fit."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

Item = TypeVar("Item")
Result = TypeVar("Result")

MESSAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
"""What CUDA's libraries say, as plain RuntimeErrors, where they find no room beside torch's allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a GPU or of the host."""
    if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)


def release() -> None:
    """Give back what a failed attempt held."""
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
        """
        first = 0
        while first < len(items):
            part = items[first : first + min(self.size, at_most)]
            result = self._attempt(part, work)
            if result is None:
                release()  # here, where no traceback holds what was computed any more
                self.size = (len(part) + 1) // 2
                continue
            yield result[0]
            first += len(part)

    def _attempt(self, part: Sequence[Item], work: Callable[[Sequence[Item]], Any]) -> tuple[Any] | None:
        try:
            return (work(part),)
        except RuntimeError as error:
            if len(part) == 1 or not self.survives or not is_out_of_memory(error):
                raise
        return None


MARGIN = 1.25
"""A run whose forecast is so many times what is free is refused: more than the forecast can be wrong."""
