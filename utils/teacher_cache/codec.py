"""What a teacher said about one window, as few bytes: NumPy arrays -> bytes -> NumPy arrays.

Shapes: N KD rows, K outcomes kept per row, M teacher positions of the window.

Bytes of a window, in this order: N and M; per row how many outcomes are kept, and one bit whether its prefix mass is
not 1; then numbers and ids. Ids, counts and steps are packed to as many bits as they need. Two storages:

    float32   every number as it was: reading gives back the same bits
    compact   float16 for the first two log-probabilities of a row, its tail, its prefix mass and the realised
              log-probabilities; each further log-probability as the step down from the one before, in 6 bits

The steps of `compact` are finer where they are small, and each is taken from what the reader will have, so that errors
do not add up. The reader then shifts a row so that kept masses and tail add to 1. With 64 outcomes of a vocabulary of
151,936 a row takes 144 + 52 bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

FORMAT = 1
"""Raised whenever bytes mean something else."""

ADAPTIVE_SHARE, ADAPTIVE_MOST = 0.999, 256
"""`adaptive` keeps the fewest outcomes that hold this share of the mass, and at most so many."""

FIRST = 2
"""Log-probabilities of a row that are stored by themselves; often far apart."""
STEP_BITS = 6
_GROWTH, _SCALE = 0.07, 0.2286
STEPS = (_SCALE * ((1 + _GROWTH) ** np.arange(2**STEP_BITS) - 1)).astype(np.float32)
"""Nats from one log-probability to the next: 0, 0.016, ... 16.0, each spacing 7 % wider than the one before."""
_BETWEEN = (STEPS[1:] + STEPS[:-1]) / 2
LARGEST_SHIFT = 0.05
"""Nats by which a row is shifted at most, so that its masses add to 1."""
_HEADER = struct.Struct("<II")


class Said(NamedTuple):
    """The arrays of a `TeacherSignal`, in its order."""

    ids: np.ndarray  # [N, K] int64, -1 where fewer than K are kept
    log_probs: np.ndarray  # [N, K] float32, falling; -inf where ids is -1
    log_tail: np.ndarray  # [N] float32
    log_mass: np.ndarray  # [N] float32
    realised: np.ndarray  # [M] float32


@dataclass(frozen=True)
class Codec:
    """How windows are stored.

    Args:
        vocabulary: rows of the teacher's head.
        top_k: outcomes kept per row, or `adaptive`.
        storage: see the module's text.
    """

    vocabulary: int
    top_k: int | Literal["adaptive"] = 64
    storage: Literal["compact", "float32"] = "compact"

    @property
    def most(self) -> int:
        """Outcomes kept per row, at most: what the teacher is to be asked for."""
        return min(ADAPTIVE_MOST if self.top_k == "adaptive" else self.top_k, self.vocabulary)

    def encode(self, said: Said) -> bytes:
        """The bytes of one window.

        Raises:
            ValueError: rows wider than `most`.
        """
        if said.ids.shape[1] > self.most:
            raise ValueError(f"got {said.ids.shape[1]} outcomes per row, expected at most {self.most}")
        said = self._trimmed(said) if self.top_k == "adaptive" else said
        kept = said.ids >= 0
        counts, deep = kept.sum(1), said.log_mass != 0
        parts = [
            _HEADER.pack(len(counts), len(said.realised)),
            pack_bits(counts, self.most.bit_length()),
            np.packbits(deep).tobytes(),
        ]
        if self.storage == "float32":
            numbers = [said.log_probs[kept], said.log_tail, said.log_mass[deep], said.realised]
            parts += [np.ascontiguousarray(column, "<f4").tobytes() for column in numbers]
        else:
            first, steps = _as_steps(said.log_probs, kept)
            numbers = [first[kept[:, :FIRST]], said.log_tail, said.log_mass[deep], said.realised]
            parts += [_half(column).tobytes() for column in numbers]
            parts.append(pack_bits(steps[kept[:, FIRST:]], STEP_BITS))
        return b"".join([*parts, pack_bits(said.ids[kept], self._id_bits)])

    def decode(self, data: bytes | np.ndarray) -> Said:
        """The window that was encoded.

        Raises:
            ValueError: the bytes are not those of one window.
        """
        reader = _Reader(data)
        rows, positions = _HEADER.unpack(reader.take(_HEADER.size).tobytes())
        counts = reader.bits(rows, self.most.bit_length()).astype(np.int64)
        deep = np.unpackbits(reader.take(-(-rows // 8)), count=rows).astype(bool)
        kept = np.arange(self.most) < counts[:, None]
        kind = "<f4" if self.storage == "float32" else "<f2"
        first = kept if self.storage == "float32" else kept[:, :FIRST]
        log_probs = np.full(kept.shape, -np.inf, dtype=np.float32)
        log_probs[:, : first.shape[1]][first] = reader.numbers(int(first.sum()), kind)
        log_tail = reader.numbers(rows, kind)
        log_mass = np.zeros(rows, dtype=np.float32)
        log_mass[deep] = reader.numbers(int(deep.sum()), kind)
        realised = reader.numbers(positions, kind)
        if self.storage == "compact":
            rest = kept[:, FIRST:]
            down = np.zeros(rest.shape, dtype=np.float32)
            down[rest] = STEPS[reader.bits(int(rest.sum()), STEP_BITS)]
            if rest.shape[1]:
                below = log_probs[:, FIRST - 1 : FIRST] - np.cumsum(down, axis=1)
                log_probs[:, FIRST:] = np.where(rest, below, -np.inf)
            _shift_to_one(log_probs, log_tail)
        ids = np.full(kept.shape, -1, dtype=np.int64)
        ids[kept] = reader.bits(int(kept.sum()), self._id_bits)
        reader.end()
        return Said(ids, log_probs, log_tail, log_mass, realised)

    @property
    def _id_bits(self) -> int:
        return max(1, (self.vocabulary - 1).bit_length())

    def _trimmed(self, said: Said) -> Said:
        """The fewest outcomes that hold `ADAPTIVE_SHARE` of the mass; the mass of the others goes to the tail."""
        probs = np.exp(said.log_probs.astype(np.float64))
        before = np.cumsum(probs, axis=1) - probs
        enough = (before < ADAPTIVE_SHARE) & (said.ids >= 0)
        enough[:, :1] = said.ids[:, :1] >= 0
        tail = np.exp(said.log_tail.astype(np.float64)) + np.where(enough, 0, probs).sum(1)
        with np.errstate(divide="ignore"):
            log_tail = np.where((enough == (said.ids >= 0)).all(1), said.log_tail, np.log(tail)).astype(np.float32)
        ids, log_probs = np.where(enough, said.ids, -1), np.where(enough, said.log_probs, -np.inf)
        return said._replace(ids=ids, log_probs=log_probs, log_tail=log_tail)


def join(windows: Sequence[Said]) -> Said:
    """The windows of a batch, in order."""
    return Said(*(np.concatenate(column) for column in zip(*windows, strict=True)))


def _as_steps(log_probs: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first log-probabilities, numbers of the steps to the others) of rows that fall."""
    first = log_probs[:, :FIRST]
    rest = log_probs.shape[1] - first.shape[1]
    steps = np.zeros((len(log_probs), max(rest, 0)), dtype=np.int64)
    # what the reader will have, so that the next step makes up for the error of this one
    at = _half(first[:, -1]).astype(np.float32) if rest > 0 else None
    for rank in range(max(rest, 0)):
        with np.errstate(invalid="ignore"):  # rows that have ended
            wanted = np.where(kept[:, FIRST + rank], at - log_probs[:, FIRST + rank], 0)
        steps[:, rank] = np.searchsorted(_BETWEEN, wanted)
        at = at - STEPS[steps[:, rank]]
    return first, steps


def _shift_to_one(log_probs: np.ndarray, log_tail: np.ndarray) -> None:
    """Multiply the masses of every row by what makes them add to 1 with the tail, in place."""
    mass, wanted = np.exp(log_probs).sum(1), -np.expm1(log_tail)
    known = (mass > 0) & (wanted > 0)
    shift = np.zeros_like(mass)
    shift[known] = np.log(wanted[known] / mass[known])
    log_probs += np.clip(shift, -LARGEST_SHIFT, LARGEST_SHIFT)[:, None]


def _half(numbers: np.ndarray) -> np.ndarray:
    """Log-probabilities in float16: finite ones stay finite."""
    lowest = np.float32(np.finfo(np.float16).min)
    return np.where(np.isneginf(numbers), -np.inf, np.maximum(numbers, lowest)).astype("<f2")


def pack_bits(numbers: np.ndarray, bits: int) -> bytes:
    """Numbers below 2**bits, `bits` bits each, the highest first; the last byte is filled up with zeros."""
    columns = np.ascontiguousarray(numbers, dtype=">u4").view(np.uint8).reshape(-1, 4)
    return np.packbits(np.unpackbits(columns, axis=1)[:, 32 - bits :]).tobytes()


def unpack_bits(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The first `count` numbers that `pack_bits` packed, uint32."""
    columns = np.zeros((count, 32), dtype=np.uint8)
    columns[:, 32 - bits :] = np.unpackbits(data, count=count * bits).reshape(count, bits)
    return np.packbits(columns, axis=1).view(">u4")[:, 0].astype(np.uint32)


class _Reader:
    """Takes a window's bytes apart from the front."""

    def __init__(self, data: bytes | np.ndarray) -> None:
        self.data = np.frombuffer(data, dtype=np.uint8) if isinstance(data, bytes) else data
        self.at = 0

    def take(self, size: int) -> np.ndarray:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(f"the bytes of a window end early: {len(self.data)}, at least {self.at} expected")
        return self.data[self.at - size : self.at]

    def bits(self, count: int, bits: int) -> np.ndarray:
        return unpack_bits(self.take(-(-count * bits // 8)), count, bits)

    def numbers(self, count: int, kind: str) -> np.ndarray:
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize).tobytes(), kind).astype(np.float32)

    def end(self) -> None:
        if self.at != len(self.data):
            raise ValueError(f"{len(self.data) - self.at} bytes too many for a window")
