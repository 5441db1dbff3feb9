"""A teacher whose signals are remembered: for the framework it is a teacher like any other.

The memory is handed in; the framework does not know what it is. It has `top_k` (outcomes per row) and

    keys(windows) -> one key per window
    read(keys) -> arrays of the batch's `TeacherSignal`, in its order and without `hidden`, or None
    keep(keys, [arrays of each window], tokens, seconds) -> as `read` will return it

Shapes: B windows, N KD rows, M unpadded teacher positions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..text.collate import PairCollator
from ..types import PairedBatch, TeacherSignal
from ..validation import expect
from .frozen import FrozenTeacher

NUMBERS = ("ids", "log_probs", "log_tail", "log_mass", "realised")


@dataclass(frozen=True)
class RememberingCollator:
    """Batches that the memory knows, with what it holds of them.

    Args:
        ahead: read it now: in a DataLoader's workers, while the device computes. Else `CachedTeacher` does when asked.
    """

    collate: PairCollator
    memory: Any
    ahead: bool = True

    def __call__(self, windows: Sequence[dict[str, Any]]) -> PairedBatch:
        batch = self.collate(windows)
        batch.keys = self.memory.keys(windows)
        found = self.memory.read(batch.keys) if self.ahead else None
        batch.signal = None if found is None else _as_signal(found)
        return batch


class CachedTeacher:
    """Answers from memory where it can, else asks the teacher and remembers.

    What is returned is always what was remembered, also the first time: a loss does not depend on whether the
    memory had the batch already.

    Args:
        teacher: None if everything is known and no hidden states are asked for.
        memory: see the module's text.
    """

    def __init__(self, teacher: FrozenTeacher | None, memory: Any) -> None:
        if teacher is not None:
            expect("teacher", teacher, FrozenTeacher, "FrozenTeacher(model, vocabulary), or None")
        lacking = [name for name in ("top_k", "keys", "read", "keep") if not hasattr(memory, name)]
        if lacking:
            raise TypeError(f"memory: got a {type(memory).__name__}, expected one that has {', '.join(lacking)} too")

        self.teacher = teacher
        self.memory = memory

    def __deepcopy__(self, memo: dict) -> "CachedTeacher":
        return self  # as the teacher, and there is one memory

    @property
    def model(self) -> nn.Module:
        return self._running.model

    @property
    def _running(self) -> FrozenTeacher:
        assert self.teacher is not None, "the teacher is not loaded, and something is not in its memory"
        return self.teacher

    @torch.no_grad()
    def signal(self, batch: PairedBatch, top_k: int | None = None, layers: Sequence[int] = ()) -> TeacherSignal:
        """As `FrozenTeacher.signal`, of a batch from a `RememberingCollator`; the memory decides on `top_k`."""
        device = batch.student_ids.device
        found, hidden = batch.signal, None
        if found is None and (read := self.memory.read(batch.keys)) is not None:
            found = _as_signal(read)
        if found is None:
            began = time.monotonic()
            exact = self._running.signal(batch, self.memory.top_k, layers)
            windows = _of_each_window(batch, exact)
            kept = self.memory.keep(batch.keys, windows, batch.counts["lm"], time.monotonic() - began)
            found, hidden = _as_signal(kept), exact.hidden
        elif layers:
            hidden = self._states(batch, layers)
        return replace(_pinned(found, device).to(device, non_blocking=True), hidden=hidden)

    def _states(self, batch: PairedBatch, layers: Sequence[int]) -> tuple[Tensor, ...]:
        states = self._running.states(batch.teacher_ids, layers, batch.teacher_source)[1]
        return tuple(state.to(batch.student_ids.device) for state in states)


def _as_signal(arrays: Sequence[np.ndarray]) -> TeacherSignal:
    return TeacherSignal(*map(torch.from_numpy, arrays))


def _of_each_window(batch: PairedBatch, signal: TeacherSignal) -> list[tuple[np.ndarray, ...]]:
    """The arrays of a batch, window by window."""
    windows, width = batch.student_ids.shape
    on_host = _to_host([batch.row_student, batch.teacher_mask, *(getattr(signal, name) for name in NUMBERS)])
    row_student, teacher_mask, *arrays = (tensor.numpy() for tensor in on_host)
    rows = np.bincount(row_student // width, minlength=windows).cumsum()[:-1]
    positions = teacher_mask.sum(1).cumsum()[:-1]

    columns = []
    for name, array in zip(NUMBERS, arrays, strict=True):
        columns.append(np.split(array, positions if name == "realised" else rows))
    return list(zip(*columns, strict=True))


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in the host's memory; for all of them together the host waits once for a GPU."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def _pinned(signal: TeacherSignal, device: torch.device) -> TeacherSignal:
    """Return a signal whose copy to a GPU the host need not wait for."""
    if device.type != "cuda":
        return signal
    arrays = {name: getattr(signal, name) for name in NUMBERS}
    return replace(signal, **{name: array if array.is_cuda else array.pin_memory() for name, array in arrays.items()})
