"""CachedTeacher: a teacher whose signals are stored; the framework takes it like any other teacher.

The store is handed in; nothing here knows whether it is a folder, or where. See `SignalStore`.

Shapes: B windows, N KD rows, M unpadded teacher positions.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ..text.collate import PairCollator
from ..types import PairedBatch, TeacherSignal
from .frozen import FrozenTeacher
from .kept_rows import RowsByEntropy

NUMBERS = ("ids", "log_probs", "log_tail", "log_mass", "realised")
"""Fields of a `TeacherSignal` that are stored, in this order; hidden states are not."""

Arrays = Sequence[np.ndarray]
"""One array for each of `NUMBERS`."""


class SignalStore(Protocol):
    """Memory of the teacher's signals, window by window."""

    top_k: int
    """Outcomes of each row."""

    def keys(self, windows: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Return one key for each window."""

    def read(self, keys: Sequence[bytes]) -> Arrays | None:
        """Return the arrays of a batch of these windows; None if one of the windows is missing."""

    def keep(
        self,
        keys: Sequence[bytes],
        windows: Sequence[Arrays],
        tokens: int,
        seconds: float,
    ) -> Arrays:
        """Store the arrays of each window, and return those of the batch as `read` will return them.

        Args:
            tokens: supervised student tokens of the batch.
            seconds: time that the teacher took for it.
        """


@dataclass(frozen=True)
class RememberingCollator:
    """Collates batches with the keys of their windows, and with the stored signal if there is one.

    Args:
        ahead: read the signal now: in a DataLoader's workers, while the device computes. Else `CachedTeacher` reads it
            when it is called.
        is_learned: KD is learned from these batches, so that the memory needs only rows that it is learned at.
    """

    collate: PairCollator
    memory: SignalStore
    ahead: bool = True
    is_learned: bool = False

    def __call__(self, windows: Sequence[dict[str, Any]]) -> PairedBatch:
        batch = self.collate(windows)
        batch.keys = self.memory.keys(windows)
        batch.stores_chosen = self.is_learned
        if self.ahead:
            batch.signal = _read_signal(self.memory, batch.keys)
        return batch


class CachedTeacher:
    """Answers from a store where it can, else asks the teacher and stores its answer.

    A signal is always what was stored, also the first time: a loss does not depend on whether the store had the batch
    already.

    Args:
        teacher: None if every window is stored and no hidden states are needed.
        memory: signals of windows.
        rows: takes out of a signal what need not be stored of batches that are learned from; None: all is stored.

    Raises:
        TypeError: an argument of another kind.
    """

    def __init__(self, teacher: FrozenTeacher | None, memory: SignalStore, rows: RowsByEntropy | None = None) -> None:
        if teacher is not None:
            expect_teacher(teacher)
        members = ("top_k", "keys", "read", "keep")
        lacking = [name for name in members if not hasattr(memory, name)]
        if lacking:
            raise TypeError(f"memory: got a {type(memory).__name__}, expected one that has {', '.join(lacking)} too")

        self.teacher = teacher
        self.memory = memory
        self.rows = rows

    def __deepcopy__(self, memo: dict) -> "CachedTeacher":
        # Copies of a framework share it, as they do a teacher: there is one store.
        return self

    @property
    def model(self) -> nn.Module | None:
        """The running teacher's network; None for a teacher that is elsewhere."""
        return self._running.model

    def identity(self) -> dict[str, Any]:
        """Return what makes a teacher elsewhere the one it is."""
        return self._running.identity()

    @property
    def _running(self) -> Any:
        assert self.teacher is not None, "the teacher is not loaded, and something is not in its memory"
        return self.teacher

    def begin(self, batch: PairedBatch, top_k: int | None = None) -> bool:
        """Let a teacher elsewhere begin its answer to a batch that is not stored; returns at once.

        Returns:
            False where there is nothing to begin: the answer is stored, or the teacher computes in this process.
        """
        begin = getattr(self.teacher, "begin", None)
        if begin is None:
            return False

        if batch.signal is None:
            batch.signal = _read_signal(self.memory, batch.keys)
        return batch.signal is None and begin(batch, self.memory.top_k)

    @torch.no_grad()
    def signal(
        self,
        batch: PairedBatch,
        top_k: int | None = None,
        layers: Sequence[int] = (),
    ) -> TeacherSignal:
        """Return what `FrozenTeacher.signal` returns, for a batch from a `RememberingCollator`.

        Args:
            top_k: not used: the store decides on it.
            layers: teacher layers, counted from 1, whose states are computed by the teacher in any case.
        """
        # The collator may have read it already.
        stored = batch.signal
        if stored is None:
            stored = _read_signal(self.memory, batch.keys)

        hidden = None
        if stored is None:
            stored, hidden = self._compute_and_store(batch, layers)
        elif layers:
            hidden = self._states(batch, layers)

        # Numbers are on the host, whatever device the teacher is on; hidden states are never stored.
        device = batch.student_ids.device
        return replace(stored.to(device), hidden=hidden)

    def _compute_and_store(
        self, batch: PairedBatch, layers: Sequence[int]
    ) -> tuple[TeacherSignal, tuple[Tensor, ...] | None]:
        """Return the signal as it was stored, and the hidden states of the same forward."""
        start = time.monotonic()
        exact = self._running.signal(batch, self.memory.top_k, layers)
        if self.rows is not None and batch.stores_chosen:
            exact = self.rows(batch, exact)
        # Copied to the host first, so that the time includes the GPU's.
        windows = _split_by_window(batch, exact)
        seconds = time.monotonic() - start
        tokens = batch.counts["lm"] + batch.counts.get("own", 0)
        arrays = self.memory.keep(batch.keys, windows, tokens, seconds)
        return _as_signal(arrays), exact.hidden

    def _states(self, batch: PairedBatch, layers: Sequence[int]) -> tuple[Tensor, ...]:
        """Return [B, T, H_T] the teacher's states after some layers, on the batch's device."""
        _, states = self._running.states(batch.teacher_ids, layers, batch.teacher_source, batch.teacher_positions)
        return tuple(state.to(batch.student_ids.device) for state in states)


def _read_signal(memory: SignalStore, keys: Sequence[bytes]) -> TeacherSignal | None:
    """Return the stored signal of a batch; None if a window of it is missing."""
    arrays = memory.read(keys)
    return None if arrays is None else _as_signal(arrays)


def expect_teacher(teacher: Any) -> None:
    """Check that something answers as a teacher does; the likely mistake is a bare model."""
    if not hasattr(teacher, "signal") or isinstance(teacher, nn.Module):
        raise TypeError(f"teacher: got a {type(teacher).__name__}, expected FrozenTeacher(model, vocabulary), or None")


def _as_signal(arrays: Arrays) -> TeacherSignal:
    """Return a signal on the host that shares the arrays' memory."""
    tensors = [torch.from_numpy(array) for array in arrays]
    return TeacherSignal(**dict(zip(NUMBERS, tensors, strict=True)))


def _split_by_window(batch: PairedBatch, signal: TeacherSignal) -> list[Arrays]:
    """Return the arrays of a signal, window by window."""
    numbers = [getattr(signal, name) for name in NUMBERS]
    on_host = _to_host([batch.row_student, batch.teacher_mask, *numbers])
    row_student, teacher_mask, *arrays = (tensor.numpy() for tensor in on_host)

    # Rows and positions are in the order of the windows: cut where the next window begins.
    windows, width = batch.student_ids.shape
    rows = np.bincount(row_student // width, minlength=windows)
    row_cuts = rows.cumsum()[:-1]
    positions = teacher_mask.sum(1)
    position_cuts = positions.cumsum()[:-1]

    columns = []
    for name, array in zip(NUMBERS, arrays, strict=True):
        cuts = position_cuts if name == "realised" else row_cuts
        columns.append(np.split(array, cuts))
    return list(zip(*columns, strict=True))


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies in the host's memory; for all of them together the host waits once for a GPU."""
    copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return copies
