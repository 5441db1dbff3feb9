"""Codec of the teacher's signal on one window, in few bytes: NumPy arrays -> bytes -> NumPy arrays.

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

ADAPTIVE_SHARE = 0.999
"""`adaptive` keeps the fewest outcomes that hold this share of the mass."""
ADAPTIVE_MOST = 256
"""`adaptive` keeps at most so many outcomes."""

FIRST = 2
"""Log-probabilities of a row that are stored by themselves; often far apart."""
STEP_BITS = 6
"""Bits of a step."""
_GROWTH = 0.07
_SCALE = 0.2286
_GROWN = (1 + _GROWTH) ** np.arange(2**STEP_BITS)
STEPS = (_SCALE * (_GROWN - 1)).astype(np.float32)
"""Nats from one log-probability to the next: 0, 0.016, ... 16.0, each spacing 7 % wider than the one before."""
_BETWEEN = (STEPS[1:] + STEPS[:-1]) / 2
"""Half-way from one step to the next: where rounding goes over to it."""
LARGEST_SHIFT = 0.05
"""Nats by which a row is shifted at most, so that its masses add to 1."""
_HEADER = struct.Struct("<II")
"""N and M."""


class Said(NamedTuple):
    """The arrays of a `TeacherSignal`, in its order."""

    ids: np.ndarray  # [N, K] int64, -1 where fewer than K are kept
    log_probs: np.ndarray  # [N, K] float32, falling; -inf where ids is -1
    log_tail: np.ndarray  # [N] float32
    log_mass: np.ndarray  # [N] float32
    realised: np.ndarray  # [M] float32


@dataclass(frozen=True)
class Codec:
    """The form in which windows are stored."""

    vocabulary: int
    """Rows of the teacher's head."""
    top_k: int | Literal["adaptive"] = 64
    """Outcomes kept per row."""
    storage: Literal["compact", "float32"] = "compact"
    """Numbers as they are, or in few bits: see the module's text."""

    @property
    def most(self) -> int:
        """Outcomes kept per row, at most: so many the teacher is to be asked for."""
        outcomes = ADAPTIVE_MOST if self.top_k == "adaptive" else self.top_k
        return min(outcomes, self.vocabulary)

    def encode(self, signal: Said) -> bytes:
        """Return the bytes of one window.

        Raises:
            ValueError: rows wider than `most`.
        """
        if signal.ids.shape[1] > self.most:
            raise ValueError(f"got {signal.ids.shape[1]} outcomes per row, expected at most {self.most}")
        if self.top_k == "adaptive":
            signal = self._trimmed(signal)

        is_outcome = signal.ids >= 0  # [N, K]
        is_deep = signal.log_mass != 0  # [N]
        counts = is_outcome.sum(1)

        # 1. How many rows, positions and outcomes there are.
        parts = [
            _HEADER.pack(len(counts), len(signal.realised)),
            pack_bits(counts, self.most.bit_length()),
            np.packbits(is_deep).tobytes(),
        ]

        # 2. Numbers.
        if self.storage == "float32":
            columns = [
                signal.log_probs[is_outcome],
                signal.log_tail,
                signal.log_mass[is_deep],
                signal.realised,
            ]
            parts += [np.ascontiguousarray(column, "<f4").tobytes() for column in columns]
        else:
            first, steps = _as_steps(signal.log_probs, is_outcome)
            columns = [
                first[is_outcome[:, :FIRST]],
                signal.log_tail,
                signal.log_mass[is_deep],
                signal.realised,
            ]
            parts += [_half(column).tobytes() for column in columns]
            parts.append(pack_bits(steps[is_outcome[:, FIRST:]], STEP_BITS))

        # 3. Ids.
        parts.append(pack_bits(signal.ids[is_outcome], self._id_bits))
        return b"".join(parts)

    def decode(self, data: bytes | np.ndarray) -> Said:
        """Return the window that was encoded.

        Raises:
            ValueError: the bytes are not those of one window.
        """
        # 1. How many rows, positions and outcomes there are.
        reader = _Reader(data)
        rows, positions = _HEADER.unpack(reader.take(_HEADER.size).tobytes())
        counts = reader.bits(rows, self.most.bit_length()).astype(np.int64)
        is_deep = np.unpackbits(reader.take(_bytes_for(rows)), count=rows).astype(bool)
        is_outcome = np.arange(self.most) < counts[:, None]

        # 2. Numbers, in the order in which they were written.
        is_compact = self.storage == "compact"
        dtype = "<f2" if is_compact else "<f4"
        is_number = is_outcome[:, :FIRST] if is_compact else is_outcome
        numbers = reader.numbers(int(is_number.sum()), dtype)
        log_probs = np.full(is_outcome.shape, -np.inf, dtype=np.float32)
        log_probs[:, : is_number.shape[1]][is_number] = numbers
        log_tail = reader.numbers(rows, dtype)
        log_mass = np.zeros(rows, dtype=np.float32)
        log_mass[is_deep] = reader.numbers(int(is_deep.sum()), dtype)
        realised = reader.numbers(positions, dtype)

        # 3. Steps from one log-probability down to the next.
        if is_compact:
            is_step = is_outcome[:, FIRST:]
            steps = reader.bits(int(is_step.sum()), STEP_BITS)
            _add_steps(log_probs, is_step, steps)
            _shift_to_one(log_probs, log_tail)

        # 4. Ids.
        ids = np.full(is_outcome.shape, -1, dtype=np.int64)
        ids[is_outcome] = reader.bits(int(is_outcome.sum()), self._id_bits)
        reader.end()
        return Said(ids, log_probs=log_probs, log_tail=log_tail, log_mass=log_mass, realised=realised)

    @property
    def _id_bits(self) -> int:
        """Bits of an id."""
        return max(1, (self.vocabulary - 1).bit_length())

    def _trimmed(self, signal: Said) -> Said:
        """Return the fewest outcomes that hold `ADAPTIVE_SHARE` of the mass; that of the others goes to the tail."""
        is_outcome = signal.ids >= 0
        probs = np.exp(signal.log_probs.astype(np.float64))

        # an outcome stays while those before it hold too little; the first one always
        mass_before = np.cumsum(probs, axis=1) - probs
        stays = (mass_before < ADAPTIVE_SHARE) & is_outcome
        stays[:, :1] = is_outcome[:, :1]

        # a row that loses nothing has its tail bit for bit
        tail = np.exp(signal.log_tail.astype(np.float64))
        tail = tail + np.where(stays, 0, probs).sum(1)
        is_whole = (stays == is_outcome).all(1)
        with np.errstate(divide="ignore"):
            log_tail = np.where(is_whole, signal.log_tail, np.log(tail))

        return signal._replace(
            ids=np.where(stays, signal.ids, -1),
            log_probs=np.where(stays, signal.log_probs, -np.inf),
            log_tail=log_tail.astype(np.float32),
        )


def join(windows: Sequence[Said]) -> Said:
    """Return the windows of a batch, in order."""
    return Said(*(np.concatenate(column) for column in zip(*windows, strict=True)))


# ------------------------------------------------------------------------------------------ compact numbers


def _as_steps(log_probs: np.ndarray, is_outcome: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (first log-probabilities, numbers of the steps to the others) of rows that fall."""
    first = log_probs[:, :FIRST]
    further = log_probs.shape[1] - first.shape[1]
    steps = np.zeros((len(log_probs), further), dtype=np.int64)
    if not further:
        return first, steps

    # the value that the reader will have, so that the next step makes up for the error of this one
    current = _half(first[:, -1]).astype(np.float32)
    for rank in range(further):
        column = log_probs[:, FIRST + rank]
        with np.errstate(invalid="ignore"):  # rows that have ended
            falls = np.where(is_outcome[:, FIRST + rank], current - column, 0)
        steps[:, rank] = np.searchsorted(_BETWEEN, falls)
        current = current - STEPS[steps[:, rank]]
    return first, steps


def _add_steps(log_probs: np.ndarray, is_step: np.ndarray, numbers: np.ndarray) -> None:
    """Fill in the log-probabilities behind the first ones of each row, in place.

    Args:
        log_probs: [N, K].
        is_step: [N, K - FIRST]; True where a log-probability is stored as a step.
        numbers: of the steps, row by row.
    """
    falls = np.zeros(is_step.shape, dtype=np.float32)
    falls[is_step] = STEPS[numbers]
    if not is_step.shape[1]:
        return

    below = log_probs[:, FIRST - 1 : FIRST] - np.cumsum(falls, axis=1)
    log_probs[:, FIRST:] = np.where(is_step, below, -np.inf)


def _shift_to_one(log_probs: np.ndarray, log_tail: np.ndarray) -> None:
    """Multiply the masses of every row by what makes them add to 1 with the tail, in place."""
    mass = np.exp(log_probs).sum(1)
    expected = -np.expm1(log_tail)

    # a row without outcomes, or whose tail is all, stays as it is
    is_shifted = (mass > 0) & (expected > 0)
    shift = np.zeros_like(mass)
    shift[is_shifted] = np.log(expected[is_shifted] / mass[is_shifted])
    log_probs += np.clip(shift, -LARGEST_SHIFT, LARGEST_SHIFT)[:, None]


def _half(numbers: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float16, in which finite ones stay finite."""
    lowest = np.float32(np.finfo(np.float16).min)
    finite = np.maximum(numbers, lowest)
    return np.where(np.isneginf(numbers), -np.inf, finite).astype("<f2")


# ---------------------------------------------------------------------------------------------------- bits


def pack_bits(numbers: np.ndarray, bits: int) -> bytes:
    """Pack numbers below 2**bits, `bits` bits each, the highest first; the last byte is filled up with zeros."""
    columns = np.ascontiguousarray(numbers, dtype=">u4")
    columns = columns.view(np.uint8).reshape(-1, 4)
    lowest_bits = np.unpackbits(columns, axis=1)[:, 32 - bits :]
    return np.packbits(lowest_bits).tobytes()


def unpack_bits(data: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Return the first `count` numbers that `pack_bits` packed, uint32."""
    columns = np.zeros((count, 32), dtype=np.uint8)
    lowest_bits = np.unpackbits(data, count=count * bits)
    columns[:, 32 - bits :] = lowest_bits.reshape(count, bits)

    # four bytes each, the highest first
    numbers = np.packbits(columns, axis=1).view(">u4")
    return numbers[:, 0].astype(np.uint32)


def _bytes_for(bits: int) -> int:
    """Return the whole bytes that hold so many bits."""
    return -(-bits // 8)


class _Reader:
    """Reader of a window's bytes, from the front."""

    def __init__(self, data: bytes | np.ndarray) -> None:
        if isinstance(data, bytes):
            data = np.frombuffer(data, dtype=np.uint8)
        self.data = data
        self.position = 0

    def take(self, size: int) -> np.ndarray:
        """Return the next bytes.

        Raises:
            ValueError: there are fewer.
        """
        start = self.position
        self.position += size
        if self.position > len(self.data):
            raise ValueError(f"the bytes of a window end early: {len(self.data)}, at least {self.position} expected")
        return self.data[start : self.position]

    def bits(self, count: int, bits: int) -> np.ndarray:
        """Return the next numbers that were packed to `bits` bits each."""
        return unpack_bits(self.take(_bytes_for(count * bits)), count, bits)

    def numbers(self, count: int, dtype: str) -> np.ndarray:
        """Return the next floating-point numbers, in float32."""
        # a copy: the bytes of a mapped shard need not be aligned
        data = self.take(count * np.dtype(dtype).itemsize).tobytes()
        return np.frombuffer(data, dtype).astype(np.float32)

    def end(self) -> None:
        """Check that nothing is left.

        Raises:
            ValueError: there are more bytes.
        """
        if self.position != len(self.data):
            raise ValueError(f"{len(self.data) - self.position} bytes too many for a window")
