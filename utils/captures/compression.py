"""DistillKit's compression of a position's most probable tokens, read back; written after its documented format.

A row holds, for each position, k token ids as packed bits and k log-probabilities in falling order. The first
`exact_k` are floating-point numbers. The others are a curve over their rank, of a few coefficients, to which bins of
quantised residuals may be added. There are two generations:

- `logprob_compressor`: columns `compressed_logprobs` and `bytepacked_indices`, bytes; settings d, k, exact_k, ...
- `legacy_logit_compression`: columns `packed_indices`, `exact_values` and `coeffs`; settings vocab_size, k, ...

Shapes: N positions, K listed tokens, C coefficients.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError

NUMBERS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Formats of stored numbers -> their bytes."""
SINGULAR = 1e-5
"""Singular values below which DistillKit's encoder takes a curve's direction for none."""
MOST_NOISE = 1.0
"""Rounding of float32, amplified by an encoder's fit, above which a curve may not be that of the teacher."""
LARGEST_STEP = 3.0
"""Step from the last exact value to the curve, over that between the last two exact ones, of a good fit: it is 1.1 in
float64, and 7 where float32 corrupts it."""
WORD = 64
"""Bits of a word of packed ids in the older generation."""


@dataclass(frozen=True)
class Bin:
    """Quantised residuals of some ranks, behind those of the bin before."""

    dtype: str
    """Format of the scale."""
    bits: int
    """Of each element."""
    count: int
    """Elements."""


@dataclass(frozen=True)
class LogprobCodec:
    """The newer generation."""

    vocabulary: int
    """Tokens that an id can be of."""
    listed: int
    """K: tokens of each position."""
    exact: int
    """How many of them, the most probable ones, have a number of their own."""
    exact_dtype: str
    terms: tuple[int | str, ...]
    """Powers of the rank, `sqrt` and `exp`; none: there is no curve."""
    term_dtype: str
    bins: tuple[Bin, ...]
    is_delta: bool
    """Each value is stored as the difference to the one before."""
    is_normalised: bool
    """The curve's variable runs from 0 to 1, not over the whole numbers."""

    columns = ("compressed_logprobs", "bytepacked_indices")

    @property
    def _id_bits(self) -> int:
        return max(1, (self.vocabulary - 1).bit_length())

    def widths(self) -> tuple[int, ...]:
        """Return the bytes of a position's values and of its ids."""
        size = self.exact * NUMBERS[self.exact_dtype] + len(self.terms) * NUMBERS[self.term_dtype]
        for part in self.bins:
            size += NUMBERS[part.dtype] + _bytes_of(part.count * part.bits)
        return size, _bytes_of(self.listed * self._id_bits)

    def design(self) -> np.ndarray:
        """Return [K - exact, C] float64, the functions of rank that the curve is made of."""
        count = self.listed - self.exact
        ranks = np.linspace(0, 1, count) if self.is_normalised else np.arange(count, dtype=np.float64)
        functions = [ranks**term if isinstance(term, int) else getattr(np, term)(ranks) for term in self.terms]
        return np.stack(functions, axis=1) if functions else np.zeros((count, 0))

    def decode(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and values [N, K], as they are stored; see `cleaned`.

        Args:
            columns: [N, width] of each of `columns`.
        """
        stored, packed = (np.ascontiguousarray(columns[name], dtype=np.uint8) for name in self.columns)
        ids = _unpack(packed, bits=self._id_bits, count=self.listed)

        # 1. Exact values, then the coefficients of the curve of the others.
        end = self.exact * NUMBERS[self.exact_dtype]
        exact = _numbers(stored[:, :end], self.exact_dtype)
        begin, end = end, end + len(self.terms) * NUMBERS[self.term_dtype]
        coefficients = _numbers(stored[:, begin:end], self.term_dtype)
        curve = coefficients @ self.design().T

        # 2. Residuals of the first ranks behind the exact ones.
        rank = 0
        for part in self.bins:
            begin, end = end, end + NUMBERS[part.dtype]
            scale = _numbers(stored[:, begin:end], part.dtype)
            begin, end = end, end + _bytes_of(part.count * part.bits)
            steps = _unpack(stored[:, begin:end], bits=part.bits, count=part.count)
            # One bit says a sign; more of them count from the most negative step.
            levels = 2 * steps - 1 if part.bits == 1 else steps - 2 ** (part.bits - 1)
            curve[:, rank : rank + part.count] += levels * scale
            rank += part.count

        values = np.concatenate([exact, curve], axis=1)
        return ids, np.cumsum(values, axis=1) if self.is_delta else values


@dataclass(frozen=True)
class LegacyCodec:
    """The older generation, in which the variable of the curve is the rank, from 1, or its inverse."""

    vocabulary: int
    """As in `LogprobCodec`, like the next two."""
    listed: int
    exact: int
    degree: int
    """Highest power of the curve."""
    is_inverted: bool
    """The powers are those of the inverse rank."""
    has_root: bool
    """The square root of the rank is one of the curve's functions."""

    columns = ("packed_indices", "exact_values", "coeffs")

    @property
    def _id_bits(self) -> int:
        return max(1, (self.vocabulary - 1).bit_length())

    def widths(self) -> tuple[int, ...]:
        """Return the words of ids, the exact values and the coefficients of a position."""
        per_word = WORD // self._id_bits
        coefficients = self.design().shape[1] if self.exact < self.listed else 0
        return -(-self.listed // per_word), self.exact, coefficients

    def design(self) -> np.ndarray:
        """Return the functions of rank; see `LogprobCodec.design`."""
        ranks = np.arange(1, self.listed - self.exact + 1, dtype=np.float64)
        sign = -1 if self.is_inverted else 1
        functions = [ranks ** (sign * power) for power in range(self.degree + 1)]
        if self.has_root:
            functions.append(np.sqrt(ranks))
        return np.stack(functions, axis=1)

    def decode(self, columns: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and values; see `LogprobCodec.decode`."""
        words, exact, coefficients = (columns[name] for name in self.columns)

        # A word holds as many ids as fit whole, the first in its lowest bits.
        bits = self._id_bits
        shifts = np.arange(WORD // bits, dtype=np.uint64) * np.uint64(bits)
        mask = np.uint64(2**bits - 1)
        ids = (words.astype(np.uint64)[:, :, None] >> shifts) & mask
        ids = ids.reshape(len(words), -1)[:, : self.listed].astype(np.int64)

        if self.exact == self.listed:
            return ids, exact.astype(np.float64)
        curve = coefficients.astype(np.float64) @ self.design().T
        return ids, np.concatenate([exact.astype(np.float64), curve], axis=1)


Codec = LogprobCodec | LegacyCodec
"""One way to store positions."""


def _bytes_of(bits: int) -> int:
    """Return how many whole bytes hold so many bits."""
    return -(-bits // 8)


def _numbers(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return the numbers [N, count] of bytes [N, width], in float64."""
    data = np.ascontiguousarray(data)
    if dtype == "bfloat16":
        # The upper half of a float32.
        halves = data.view("<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).astype(np.float64)
    return data.view(f"<f{NUMBERS[dtype]}").astype(np.float64)


def _unpack(data: np.ndarray, *, bits: int, count: int) -> np.ndarray:
    """Return [N, count] whole numbers of so many bits each, which follow each other with the highest bit first."""
    digits = np.unpackbits(np.ascontiguousarray(data), axis=1)[:, : bits * count]
    powers = 2 ** np.arange(bits - 1, -1, -1, dtype=np.int64)
    return digits.reshape(len(data), count, bits).astype(np.int64) @ powers


# ---------------------------------------------------------------------------------- what can be trusted


def noise_of_curve(codec: Codec) -> float:
    """Return the rounding of float32, amplified by the least-squares fit that made the curve.

    DistillKit's encoder fits in float32. Where the functions of rank are of very different size, as the powers up to
    the fourth of 0 to 111 are, the rounding of the largest is more than the whole of the smallest.
    """
    if codec.exact == codec.listed:
        return 0.0
    values = np.linalg.svd(codec.design(), compute_uv=False)
    # Directions below the encoder's own limit are not fitted, and add no rounding.
    used = values[values > SINGULAR]
    return float(np.finfo(np.float32).eps * used[0] / used[-1]) if len(used) else 0.0


def trusted_ranks(codec: Codec, values: np.ndarray) -> int:
    """Return how many of the listed tokens are to be read: all, or the exact ones where the curve is not the teacher's.

    What a fit that is prone to rounding made of a curve depends on the machine. One that went wrong begins apart from
    the last exact value.

    Args:
        values: [N, K] of some positions, as they are stored.
    """
    exact = codec.exact
    is_prone = noise_of_curve(codec) > MOST_NOISE and 2 <= exact < codec.listed
    if not is_prone:
        return codec.listed

    steps = np.abs(np.diff(values[:, exact - 2 : exact + 1], axis=1))
    between_exact, to_curve = np.median(steps, axis=0)
    return codec.listed if to_curve <= LARGEST_STEP * between_exact else exact


MEASURED_LOSS = (
    ("the recommended settings", LogprobCodec, (128, 16), (0, 1, 2, 3, 4, "sqrt"), False, 0.0004),
    ("the budget settings", LogprobCodec, (50, 1), (0, 1, "sqrt"), False, 0.08),
    ("the settings of Qwen3-235B's captures", LogprobCodec, (128, 32), (0, 1, 2), True, 0.0001),
    ("the settings of DeepSeek-V3's captures", LegacyCodec, (128, 32), 8, False, 0.0002),
)
"""Published settings: name, generation, k and exact_k, terms or degree, differences; and the KL divergence in nats of
what is read of a position from what was captured, where the curve's fit went well (docs/captures.md)."""


def published_loss(codec: Codec) -> tuple[str, float] | None:
    """Return the name of published settings and what they lose, in nats; None where nothing was measured."""
    for name, kind, sizes, terms, is_delta, nats in MEASURED_LOSS:
        if not isinstance(codec, kind) or sizes != (codec.listed, codec.exact):
            continue
        if isinstance(codec, LegacyCodec) and codec.degree == terms:
            return name, nats
        if isinstance(codec, LogprobCodec) and (codec.terms, codec.is_delta) == (terms, is_delta):
            return None if codec.is_normalised or codec.bins else (name, nats)
    return None


def cleaned(ids: np.ndarray, values: np.ndarray, *, exact: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first `ranks` of ids and values as a distribution can have them.

    A curve may rise above the last exact value, which no later rank can, and all together above 1. What is no number
    is no token.
    """
    ids, values = ids[:, :ranks].copy(), np.minimum(values[:, :ranks], 0.0)
    if 0 < exact < ranks:
        values[:, exact:] = np.minimum(values[:, exact:], values[:, exact - 1 : exact])

    is_token = np.isfinite(values)
    ids[~is_token] = -1
    values[~is_token] = -np.inf

    # Less than 1 is what the tokens that are not listed have; more is none that a distribution can have.
    mass = np.exp(values).sum(1, keepdims=True)
    return ids, values - np.log(np.maximum(mass, 1.0))


# ---------------------------------------------------------------------------------- settings


def read_settings(settings: Any, place: str) -> Codec:
    """Return the codec that a manifest describes.

    Args:
        settings: content of the manifest: the settings of one generation, or a mapping from its name to them.
        place: the manifest, for messages.

    Raises:
        UserError: it is no manifest, or one of a version that is not known.
    """
    if isinstance(settings, Mapping) and isinstance(settings.get("teacher"), Mapping):
        settings = settings["teacher"]
    if isinstance(settings, Mapping):
        for name in ("logprob_compressor", "legacy_logit_compression"):
            settings = settings.get(name) or settings
    if not isinstance(settings, Mapping):
        raise UserError(f"{place}: got {type(settings).__name__}, expected the settings of DistillKit's compression")

    is_legacy = "vocab_size" in settings
    known = LEGACY_SETTINGS if is_legacy else SETTINGS
    missing = {"vocab_size", "polynomial_degree"} if is_legacy else {"d", "residual_bins"}
    missing = (missing | {"k", "exact_k"}) - settings.keys()
    unknown = settings.keys() - known
    if missing or unknown:
        problems = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        problems += [f"has {', '.join(sorted(map(str, unknown)))}, which this version does not know"] if unknown else []
        raise UserError(
            f"{place}: {' and '.join(problems)}. Expected DistillKit's `logprob_compressor` (d, k, exact_k, "
            "residual_bins, ...) or `legacy_logit_compression` (vocab_size, k, exact_k, polynomial_degree, ...)."
        )

    try:
        codec = _legacy_codec(settings) if is_legacy else _logprob_codec(settings)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{place}: {error}. Expected the settings that DistillKit wrote beside its captures.") from None
    _require_possible(codec, place)
    return codec


SETTINGS = frozenset(
    {
        *("d", "k", "exact_k", "exact_dtype", "polynomial_terms", "term_dtype", "residual_bins"),
        *("delta_encoding", "error_diffusion", "normalize_t"),
    }
)
LEGACY_SETTINGS = frozenset(
    {"vocab_size", "k", "exact_k", "polynomial_degree", "with_sqrt_term", "invert_polynomial", "term_dtype"}
)


def _logprob_codec(settings: Mapping[str, Any]) -> LogprobCodec:
    # The defaults are DistillKit's.
    terms = tuple(term if term in ("sqrt", "exp") else int(term) for term in settings.get("polynomial_terms") or ())
    bins = [
        Bin(_dtype(part["scale_dtype"]), int(part["element_bits"]), int(part["num_elements"]))
        for part in settings["residual_bins"]
    ]

    return LogprobCodec(
        vocabulary=int(settings["d"]),
        listed=int(settings["k"]),
        exact=int(settings["exact_k"]),
        exact_dtype=_dtype(settings.get("exact_dtype", "float32")),
        terms=terms,
        term_dtype=_dtype(settings.get("term_dtype", "float32")),
        bins=tuple(bins),
        is_delta=bool(settings.get("delta_encoding", True)),
        is_normalised=bool(settings.get("normalize_t", False)),
    )


def _legacy_codec(settings: Mapping[str, Any]) -> LegacyCodec:
    return LegacyCodec(
        vocabulary=int(settings["vocab_size"]),
        listed=int(settings["k"]),
        exact=int(settings["exact_k"]),
        degree=int(settings["polynomial_degree"]),
        is_inverted=bool(settings.get("invert_polynomial", True)),
        has_root=bool(settings.get("with_sqrt_term", False)),
    )


def _dtype(name: Any) -> str:
    if name not in NUMBERS:
        raise ValueError(f"got numbers in {name}, expected {', '.join(NUMBERS)}")
    return str(name)


def _require_possible(codec: Codec, place: str) -> None:
    """Refuse sizes that no captures can have."""
    is_possible = 0 < codec.listed <= codec.vocabulary and 0 <= codec.exact <= codec.listed
    if isinstance(codec, LogprobCodec):
        residuals = sum(part.count for part in codec.bins)
        is_possible = is_possible and residuals <= codec.listed - codec.exact
        is_possible = is_possible and all(1 <= part.bits <= 32 and part.count > 0 for part in codec.bins)
    if not is_possible:
        raise UserError(
            f"{place}: got {codec.listed} tokens of {codec.vocabulary:,}, {codec.exact} of them exact; expected "
            "exact_k <= k <= vocabulary, and residuals of 1 to 32 bits for at most the others"
        )
