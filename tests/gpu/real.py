"""The GPUs of this machine, with the methods of `pretended.Device`: the same tests on a real card."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WAIT = "called a synchronizing CUDA operation"
"""What torch's watch says of each wait; once it also says that it is a prototype, in words much like it."""


class RealDevice:
    """The interface of `pretended.Device` for the cards that there are."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        """Stays empty: torch does not tell which kernel it takes."""

    def become(self, card: str, count: int = 1) -> None:
        """Stay what it is.

        Raises:
            NotEnough: fewer GPUs than `count`.
        """
        if torch.cuda.device_count() < count:
            raise NotEnough(f"needs {count} GPUs, there are {torch.cuda.device_count()}")

    def limit(self, size: int | None) -> None:
        """Let this process have so many bytes of the first GPU; None: all."""
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0 if size is None else min(1.0, size / total), 0)

    def held(self, index: int = 0) -> int:
        return torch.cuda.memory_allocated(index) if index < torch.cuda.device_count() else 0

    def peak(self, index: int = 0) -> int:
        return torch.cuda.max_memory_allocated(index) if index < torch.cuda.device_count() else 0

    def reset_peak(self, index: int = 0) -> None:
        # torch raises before it has used a GPU, when there is nothing to forget
        if torch.cuda.is_initialized() and index < torch.cuda.device_count():
            torch.cuda.reset_peak_memory_stats(index)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[str, str]]]:
        """A list that gets (what the host waited for, where) at the end."""
        waits: list[tuple[str, str]] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if WAIT in str(warning.message):
                waits.append((str(warning.message), f"{warning.filename}:{warning.lineno}"))


class NotEnough(Exception):
    """The machine lacks what a scenario needs."""
