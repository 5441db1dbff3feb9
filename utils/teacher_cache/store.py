"""The teacher's signals on disk: paid for once, read by every later epoch and run.

    DIR/manifest.json                what the cache was built from
    DIR/shards/SHA256.safetensors    windows (see `codec`), each under the hash of its content
    DIR/evaluations/KEY.json         the teacher on held-out text, by fingerprint of that text

A shard is never changed, and its name is the hash of its bytes: it is whole if the two agree. A window is found by its
content, never by step or index, so the order of the text, the batch size and the number of processes may change.
Several processes and runs may write at once, each its own shards. After a kill the shards that were written are there.

The signal of a window does not depend on when it is read: the step that computes it uses what was stored, not what the
teacher said, so that a run which was interrupted ends as one that was not.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from ..data.windows import window_key
from ..errors import RunError
from ..files import free_disk, write_bytes, write_json
from .codec import Codec, Said, join

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARDS = "shards"
EVALUATIONS = "evaluations"
SHARD_BYTES = 64 * 2**20
"""A shard is written when so much is waiting; a kill loses at most this."""
MASS_BINS = 10_000
"""Bins of the histogram of rows by the mass that is kept of them: a quantile is right to 0.01 %."""


# ------------------------------------------------------------------------------------------------ statistics


@dataclass
class Written:
    """Statistics of what this process has added in this session, or several that worked side by side."""

    windows: int = 0
    tokens: float = 0.0
    """Supervised student tokens; those of a batch are shared out evenly among its windows."""
    bytes: int = 0
    seconds: float = 0.0
    """Time of the teacher and of packing."""
    mass: np.ndarray = field(default_factory=lambda: np.zeros(MASS_BINS, dtype=np.int64))
    """Rows, by the mass that is kept of them."""

    def add(self, signal: Said, size: int, tokens: float, seconds: float) -> None:
        """Count a window.

        Args:
            size: its bytes.
            tokens: its supervised student tokens.
            seconds: time that it took.
        """
        self.windows += 1
        self.bytes += size
        self.tokens += tokens
        self.seconds += seconds

        # Rows that were left out on purpose have lost nothing.
        is_stored = (signal.ids >= 0).any(1)
        log_tail = signal.log_tail[is_stored].astype(np.float64)
        row_mass = np.clip(-np.expm1(log_tail), 0, 1)
        counts, _ = np.histogram(row_mass, MASS_BINS, (0, 1))
        self.mass += counts

    def __or__(self, other: "Written") -> "Written":
        return Written(
            windows=self.windows + other.windows,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
            seconds=max(self.seconds, other.seconds),  # side by side
            mass=self.mass + other.mass,
        )

    def __str__(self) -> str:
        if not self.windows:
            return "nothing was missing"

        rows = max(int(self.mass.sum()), 1)
        middles = (np.arange(MASS_BINS) + 0.5) / MASS_BINS
        mean_mass = self.mass @ middles / rows

        # the mass that 99 % of the rows exceed
        bin_of_worst = int(np.searchsorted(np.cumsum(self.mass), 0.01 * rows))
        worst_mass = middles[min(bin_of_worst, MASS_BINS - 1)]
        return (
            f"{self.windows:,} windows and {round(self.tokens):,} student tokens written, "
            f"{self.bytes / max(self.tokens, 1):.1f} bytes per token; mass kept {mean_mass:.2%} "
            f"(worst 1 % of rows: below {worst_mass:.2%}); {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        )


# ------------------------------------------------------------------------------------------------- the cache


class _Place(NamedTuple):
    """Bytes of one window in a shard."""

    shard: Path
    start: int
    end: int


class TeacherCache:
    """Signals of windows, found by the windows' content.

    Args:
        folder: of a cache that `open_cache` has checked.
        codec: the form in which windows are stored.
        identity: everything that the signals depend on.
    """

    def __init__(self, folder: Path, codec: Codec, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.codec = codec
        self.identity = dict(identity)
        self.written = Written()

        # on disk: where each window is, and the shards that have been looked into
        self._places: dict[bytes, _Place] = {}
        self._shards: set[Path] = set()
        self._shards_changed = 0
        self._readers: dict[Path, Any] = {}

        # in memory: windows that wait to become a shard
        self._waiting: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._lock = Lock()  # a thread reads for the next step while what waits becomes a shard
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        # a worker of a DataLoader maps the shards anew
        return {**vars(self), "_readers": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = Lock()

    @property
    def top_k(self) -> int:
        """Outcomes per row that the teacher is to be asked for."""
        return self.codec.most

    @property
    def writable(self) -> bool:
        """Windows can be added."""
        return os.access(self.folder, os.W_OK)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a student's training depends on besides the teacher."""
        return {"top_k": self.codec.top_k, "storage": self.codec.storage}

    @staticmethod
    def keys(windows: Iterable[dict[str, Any]]) -> list[bytes]:
        """Return the hashes of the content of windows."""
        return [window_key(window) for window in windows]

    def holds(self, keys: Sequence[bytes]) -> bool:
        """Return whether all of these windows are there."""
        return all(key in self._places or key in self._waiting for key in keys)

    def size(self, keys: Sequence[bytes]) -> int:
        """Return the bytes of these windows, which are there."""
        size = 0
        for key in keys:
            if key in self._places:
                place = self._places[key]
                size += place.end - place.start
            size += len(self._waiting.get(key, b""))
        return size

    def read(self, keys: Sequence[bytes]) -> Said | None:
        """Return the signal of a batch of windows; None unless all are there."""
        with self._lock:
            # another process may have written them meanwhile
            if not self.holds(keys):
                self.refresh()
            if not self.holds(keys):
                return None
            stored = [self._bytes(key) for key in keys]
        return join([self.codec.decode(data) for data in stored])

    def keep(
        self,
        keys: Sequence[bytes],
        windows: Sequence[Sequence[np.ndarray]],
        tokens: int,
        seconds: float,
    ) -> Said:
        """Store the teacher's signal on a batch of windows.

        Args:
            windows: the arrays of a `Said` each.
            tokens: supervised student tokens of the batch.
            seconds: time that the teacher took.

        Returns:
            the signal as it will be read: of windows that are there already, that which was stored before.

        Raises:
            RunError: the disk is full, or the cache may not be written to.
        """
        began = time.monotonic()

        # 1. Pack the windows that are not there yet.
        new = {}
        for key, window in zip(keys, windows, strict=True):
            if not self.holds([key]):
                new[key] = self.codec.encode(Said(*window))
        self._waiting |= new
        self._waiting_bytes += sum(map(len, new.values()))

        # 2. Read all of them: what was stored counts, not what the teacher said.
        stored = {key: self.codec.decode(self._bytes(key)) for key in keys}

        # 3. Count the new ones.
        seconds += time.monotonic() - began
        for key, data in new.items():
            self.written.add(
                stored[key],
                size=len(data),
                tokens=tokens / len(keys),
                seconds=seconds / len(keys),
            )

        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()
        return join([stored[key] for key in keys])

    def flush(self) -> None:
        """Write the windows that wait in memory as a shard.

        Raises:
            RunError: the disk is full, or the cache may not be written to.
        """
        if not self._waiting:
            return

        # 1. The bytes of the shard: keys [windows, bytes of a hash], where each window starts and ends, their data.
        sizes = [len(data) for data in self._waiting.values()]
        keys = np.frombuffer(b"".join(self._waiting), dtype=np.uint8)
        data = np.frombuffer(b"".join(self._waiting.values()), dtype=np.uint8)
        content = save(
            {
                "keys": keys.reshape(len(sizes), -1),
                "offsets": np.cumsum([0, *sizes], dtype=np.int64),
                "data": data,
            }
        )

        # 2. Its name is the hash of its bytes.
        name = f"{hashlib.sha256(content).hexdigest()}.safetensors"
        shards = self.folder / SHARDS
        with explained_write_errors(self.folder, len(content)):
            shards.mkdir(exist_ok=True)
            write_bytes(shards / name, content)

        # 3. From here on the windows are found on disk; no reader may look between the two.
        with self._lock:
            self._waiting = {}
            self._waiting_bytes = 0
            self.refresh()

    def refresh(self) -> None:
        """Take note of shards that have appeared."""
        # a folder's time changes with every file in it: one look costs less than listing them
        shards = self.folder / SHARDS
        changed = shards.stat().st_mtime_ns if shards.is_dir() else 0
        if changed == self._shards_changed:
            return

        for path in sorted(set(shards.glob("*.safetensors")) - self._shards):
            with safe_open(path, framework="np") as reader:
                keys = reader.get_tensor("keys")
                offsets = reader.get_tensor("offsets").tolist()

            # a window that two processes have written is read from the shard that was seen first
            for key, (start, end) in zip(keys, pairwise(offsets), strict=True):
                self._places.setdefault(key.tobytes(), _Place(path, start, end))
            self._shards.add(path)
        self._shards_changed = changed

    def bytes_on_disk(self) -> int:
        """Return the bytes of all shards."""
        return sum(file.stat().st_size for file in self._shards)

    def _bytes(self, key: bytes) -> bytes | np.ndarray:
        """Return the bytes of a window that is there."""
        if key in self._waiting:
            return self._waiting[key]

        # a shard is mapped once, and pages are read when they are looked at
        place = self._places[key]
        if place.shard not in self._readers:
            self._readers[place.shard] = safe_open(place.shard, framework="np").get_slice("data")
        return self._readers[place.shard][place.start : place.end]

    def evaluation(
        self,
        fingerprint: Mapping[str, Any],
        measure: Callable[[], dict] | None = None,
    ) -> dict | None:
        """Return the teacher's evaluation on a held-out text: read, or measured and stored.

        Args:
            fingerprint: of the text and of the settings.
            measure: None: only look whether it is there.
        """
        file = self.folder / EVALUATIONS / f"{_digest(fingerprint)[:32]}.json"
        stored = _read_evaluation(file)
        if stored is not None:
            return stored
        if measure is None:
            return None

        measured = measure()
        with explained_write_errors(self.folder, len(json.dumps(measured))):
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"measured": measured, "sha256": _digest(measured)})
        return measured


# -------------------------------------------------------------------------------------------------- helpers


def _read_evaluation(file: Path) -> dict | None:
    """Load an evaluation; None where there is none, or none that is whole, which is logged."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["sha256"] == _digest(stored["measured"]):
            return stored["measured"]
        log.warning("%s does not match its sha256: measuring again", file)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): measuring again", file, type(error).__name__)
    return None


@contextmanager
def explained_write_errors(folder: Path, size: int) -> Iterator[None]:
    """Turn a failure to write `size` bytes into an error that a user can act on.

    Raises:
        RunError: the disk is full, or the cache may not be written to.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"teacher cache {folder} cannot be written: {error.strerror or error}; needs {size / 1e6:,.1f} MB, "
            f"{free_disk(folder) / 1e6:,.1f} MB are free. What was written before is whole. Put that right, and the "
            "same command continues; or give another --cache-teacher DIR."
        ) from error


def _digest(values: Any) -> str:
    """Return the hash of a value that JSON can write."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
