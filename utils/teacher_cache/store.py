"""The teacher's signals on disk: paid for once, read by every later epoch and run.

    DIR/manifest.json                what the cache was built from
    DIR/shards/SHA256.safetensors    windows (`signal_codec`), each under the hash of its content
    DIR/evaluations/KEY.json         the teacher on held-out text, by fingerprint of that text

A shard is never changed, and its name is the hash of its bytes: it is whole if the two agree. A window is found by its
content, never by step or index, so the order of the text, the batch size and the number of processes may change.
Several processes and runs may write at once, each its own shards. After a kill the shards that were written are there.

What a window's signal is does not depend on when it is read: the step that computes it uses what was stored, not what
the teacher said, so that a run which was interrupted ends as one that was not.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from ..data.windows import window_key
from ..errors import RunError
from ..files import free_disk, write_bytes, write_json
from .codec import Codec, Said, join

log = logging.getLogger(__name__)

MANIFEST, SHARDS, EVALUATIONS = "manifest.json", "shards", "evaluations"
SHARD_BYTES = 64 * 2**20
"""A shard is written when so much is waiting; a kill loses at most this."""
MASS_BINS = 10_000


@dataclass
class Written:
    """What this process has added in this session, or several that worked side by side."""

    windows: int = 0
    tokens: float = 0.0  # supervised student tokens; a batch's are shared out evenly
    bytes: int = 0
    seconds: float = 0.0  # of the teacher and of packing
    mass: np.ndarray = field(default_factory=lambda: np.zeros(MASS_BINS, dtype=np.int64))  # rows, by their kept mass

    def add(self, said: Said, size: int, tokens: float, seconds: float) -> None:
        self.windows, self.tokens = self.windows + 1, self.tokens + tokens
        self.bytes, self.seconds = self.bytes + size, self.seconds + seconds
        kept = np.clip(-np.expm1(said.log_tail.astype(np.float64)), 0, 1)
        self.mass += np.histogram(kept, MASS_BINS, (0, 1))[0]

    def __or__(self, other: "Written") -> "Written":
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("windows", "tokens", "bytes", "mass")}
        return Written(**sums, seconds=max(self.seconds, other.seconds))

    def __str__(self) -> str:
        if not self.windows:
            return "nothing was missing"
        rows = max(int(self.mass.sum()), 1)
        middles = (np.arange(MASS_BINS) + 0.5) / MASS_BINS
        worst = middles[min(int(np.searchsorted(np.cumsum(self.mass), 0.01 * rows)), MASS_BINS - 1)]
        return (
            f"{self.windows:,} windows and {round(self.tokens):,} student tokens written, "
            f"{self.bytes / max(self.tokens, 1):.1f} bytes per token; mass kept {self.mass @ middles / rows:.2%} "
            f"(worst 1 % of rows: below {worst:.2%}); {self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"
        )


class TeacherCache:
    """Windows by content.

    Args:
        folder: of a cache that `open_cache` has checked.
        codec: how windows are stored.
        identity: what the signals depend on.
    """

    def __init__(self, folder: Path, codec: Codec, identity: Mapping[str, Any]) -> None:
        self.folder, self.codec, self.identity = folder, codec, dict(identity)
        self.written = Written()
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._known: set[Path] = set()
        self._waiting: dict[bytes, bytes] = {}
        self._waiting_bytes = self._looked_at = 0
        self._readers: dict[Path, Any] = {}
        self._lock = Lock()  # a thread reads for the next step while what waits becomes a shard
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_readers": {}, "_lock": None}  # a worker maps the shards anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    @property
    def top_k(self) -> int:
        """Outcomes per row that the teacher is to be asked for."""
        return self.codec.most

    @property
    def writable(self) -> bool:
        return os.access(self.folder, os.W_OK)

    @property
    def settings(self) -> dict[str, Any]:
        """What a student's training depends on besides the teacher."""
        return {"top_k": self.codec.top_k, "storage": self.codec.storage}

    @staticmethod
    def keys(windows: Iterable[Mapping[str, Any]]) -> list[bytes]:
        """Hashes of the content of windows."""
        return [window_key(window) for window in windows]

    def holds(self, keys: Sequence[bytes]) -> bool:
        """Whether all of these windows are there."""
        return all(key in self._places or key in self._waiting for key in keys)

    def size(self, keys: Sequence[bytes]) -> int:
        """Bytes of these windows, which are there."""
        places = [self._places[key] for key in keys if key in self._places]
        return sum(end - start for _, start, end in places) + sum(len(self._waiting.get(key, b"")) for key in keys)

    def read(self, keys: Sequence[bytes]) -> Said | None:
        """The signal of a batch of windows; None unless all are there."""
        with self._lock:
            if not self.holds(keys):
                self.refresh()  # another process may have written them
            found = [self._bytes(key) for key in keys] if self.holds(keys) else None
        return None if found is None else join([self.codec.decode(data) for data in found])

    def keep(self, keys: Sequence[bytes], windows: Sequence[Sequence[np.ndarray]], tokens: int, seconds: float) -> Said:
        """Store what the teacher said about a batch of windows; returns it as it will be read: of windows that are
        there already, what was stored before.

        Args:
            windows: the arrays of a `Said` each.
            tokens: supervised student tokens of the batch.
            seconds: what the teacher took.

        Raises:
            RunError: the disk is full, or the cache may not be written to.
        """
        began = time.monotonic()
        new = {
            key: self.codec.encode(Said(*window))
            for key, window in zip(keys, windows, strict=True)
            if not self.holds([key])
        }
        self._waiting |= new
        self._waiting_bytes += sum(map(len, new.values()))
        stored = {key: self.codec.decode(self._bytes(key)) for key in keys}
        seconds += time.monotonic() - began
        for key, data in new.items():
            self.written.add(stored[key], len(data), tokens / len(keys), seconds / len(keys))
        if self._waiting_bytes >= SHARD_BYTES:
            self.flush()
        return join([stored[key] for key in keys])

    def flush(self) -> None:
        """Write what is waiting as a shard.

        Raises:
            RunError: the disk is full, or the cache may not be written to.
        """
        if not self._waiting:
            return
        sizes = [len(data) for data in self._waiting.values()]
        content = save(
            {
                "keys": np.frombuffer(b"".join(self._waiting), dtype=np.uint8).reshape(len(sizes), -1),
                "offsets": np.cumsum([0, *sizes], dtype=np.int64),
                "data": np.frombuffer(b"".join(self._waiting.values()), dtype=np.uint8),
            }
        )
        with _told(self.folder, len(content)):
            (self.folder / SHARDS).mkdir(exist_ok=True)
            write_bytes(self.folder / SHARDS / f"{hashlib.sha256(content).hexdigest()}.safetensors", content)
        with self._lock:
            self._waiting, self._waiting_bytes = {}, 0
            self.refresh()

    def refresh(self) -> None:
        """Take note of shards that have appeared."""
        shards = self.folder / SHARDS
        changed = shards.stat().st_mtime_ns if shards.is_dir() else 0
        if changed == self._looked_at:
            return
        for path in sorted(set(shards.glob("*.safetensors")) - self._known):
            with safe_open(path, framework="np") as reader:
                keys, offsets = reader.get_tensor("keys"), reader.get_tensor("offsets").tolist()
            for key, start, end in zip(keys, offsets[:-1], offsets[1:], strict=True):
                self._places.setdefault(key.tobytes(), (path, start, end))
            self._known.add(path)
        self._looked_at = changed

    def bytes_on_disk(self) -> int:
        return sum(file.stat().st_size for file in self._known)

    def _bytes(self, key: bytes) -> bytes | np.ndarray:
        if key in self._waiting:
            return self._waiting[key]
        path, start, end = self._places[key]
        if path not in self._readers:
            self._readers[path] = safe_open(path, framework="np").get_slice("data")
        return self._readers[path][start:end]

    def evaluation(self, fingerprint: Mapping[str, Any], measure: Callable[[], dict] | None = None) -> dict | None:
        """What the teacher does on some held-out text: read, or measured and kept.

        Args:
            fingerprint: of the text and of the settings.
            measure: None: only look whether it is there.
        """
        file = self.folder / EVALUATIONS / f"{_digest(fingerprint)[:32]}.json"
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            if stored["sha256"] == _digest(stored["measured"]):
                return stored["measured"]
            log.warning("%s does not match its sha256: measuring again", file)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read (%s): measuring again", file, type(error).__name__)
        if measure is None:
            return None
        measured = measure()
        with _told(self.folder, len(json.dumps(measured))):
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"measured": measured, "sha256": _digest(measured)})
        return measured


# ---------------------------------------------------------------- opening


@contextmanager
def _told(folder: Path, size: int) -> Iterator[None]:
    """Tells a failure to write `size` bytes as a user can act on it."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"teacher cache {folder} cannot be written: {error.strerror or error}; needs {size / 1e6:,.1f} MB, "
            f"{free_disk(folder) / 1e6:,.1f} MB are free. What was written before is whole. Put that right, and the "
            "same command continues; or give another --cache-teacher DIR."
        ) from error


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
