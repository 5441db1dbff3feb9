"""A folder of captures: its manifest, its rows, its identity, its documents. Nothing is ever written into it.

The rows are those of DistillKit's data sets: `input_ids`, the columns of a codec, and in packed ones
`attention_mask`, which numbers the documents of a row from 1. A row has a list behind each of its tokens; behind the
last there may be none.

Shapes: N tokens of all rows, n tokens of one.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import yaml
from transformers import PreTrainedTokenizerBase

from ..config.settings import CAPTURES
from ..errors import UserError
from ..paths import cache_dir, user_path
from ..pretrained.loading import load_tokenizer
from .compression import Codec, cleaned, noise_of_curve, published_loss, read_settings, trusted_ranks

log = logging.getLogger(__name__)

MANIFEST = "compression_config.yaml"
"""File with the settings of the compression, which DistillKit writes beside its captures."""

SAMPLE = 16
"""Rows that the tokenizer is checked on."""
LEAST_SAME = 0.9
"""Share of the tokens of a decoded text that are to be the captured ones when it is tokenised again."""
LEAST_LISTED = 0.5
"""Share of the real tokens that are to be among the listed ones."""
MOST_BY_CHANCE = 0.01
"""Share of the vocabulary that is listed up to which that tells anything."""
MOST_LOGITS = 1.5
"""Sum of a position's probabilities above which the values are no log-probabilities but logits."""
MOST_MASS = 1.02
"""Sum of the probabilities of a position's exact ranks, which half precision may have rounded up."""
ROUNDING = 1e-3
"""Nats by which a value may be larger than the one before it."""
LARGEST = 2**31 - 1
"""Beyond it nothing is the number of a token."""
END_BYTES = 2**20
"""Bytes at either end of a file that its identity is made of, besides its size."""


class Document(NamedTuple):
    """Tokens of one captured text."""

    row: int
    begin: int
    """First token of it in its row."""
    end: int
    """The token behind its last."""


@dataclass(frozen=True, eq=False)
class Captures:
    """An open folder of captures."""

    folder: Path
    codec: Codec
    ranks: int
    """Tokens of each list that are read: the most probable ones."""
    are_logits: bool
    """The stored values lack their normaliser."""
    rows: datasets.Dataset
    """Each is a table of Arrow."""
    digest: str
    """Identity of the folder's content."""
    ids: np.ndarray
    """[N] int32 tokens of all rows, one row after the other."""
    begins: np.ndarray
    """[rows + 1] place in `ids` at which each row begins; at last N."""
    segments: np.ndarray
    """[N] int32 number of the document that a token belongs to, over all rows; -1: padding."""
    listed_to: np.ndarray
    """[rows] lists of each row."""

    def documents(self) -> Iterator[Document]:
        """Yield the captured texts, in their order."""
        changes = np.flatnonzero(np.diff(self.segments, prepend=-2, append=-2))
        for begin, end in zip(changes[:-1].tolist(), changes[1:].tolist(), strict=True):
            if self.segments[begin] < 0:
                continue
            row = int(np.searchsorted(self.begins, begin, side="right")) - 1
            start = int(self.begins[row])
            yield Document(row, begin - start, end - start)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
        """Yield (place, text) of every document, without the special tokens at its ends."""
        special = set(tokenizer.all_special_ids)
        for document in self.documents():
            yield f"{self.folder.name}:{document.row + 1}", decoded(tokenizer, self.ids_of(document), special)

    def ids_of(self, document: Document) -> list[int]:
        """Return the tokens of a document."""
        start = self.begins[document.row]
        return self.ids[start + document.begin : start + document.end].tolist()

    def lists(self, row: int, begin: int = 0, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [n, ranks] and log-probabilities of the lists of a row, or of some of them.

        Raises:
            UserError: the row is not what the manifest says.
        """
        ids, values = self.stored_lists(row, begin, end)
        if self.are_logits:
            largest = values.max(1, keepdims=True)
            values = values - largest - np.log(np.exp(values - largest).sum(1, keepdims=True))
        return cleaned(ids, values, exact=self.codec.exact, ranks=self.ranks)

    def stored_lists(self, row: int, begin: int = 0, end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and values as they are stored; see `lists`."""
        stored = self.rows[row]
        columns = {}
        for name, width in zip(self.codec.columns, self.codec.widths(), strict=True):
            positions = stored[name].combine_chunks().flatten()[begin:end]
            columns[name] = _matrix(positions, width=width, place=f"{self.folder}, row {row + 1}, {name}")

        return self.codec.decode(columns)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], special: set[int]) -> str:
    """Return the text of tokens, without special ones at its ends, and without a character that was cut off."""
    while ids and ids[-1] in special:
        ids = ids[:-1]
    begin = next((number for number, token in enumerate(ids) if token not in special), len(ids))
    text = tokenizer.decode(ids[begin:], clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")


def _matrix(positions: pyarrow.Array, *, width: int, place: str) -> np.ndarray:
    """Return [n, width] numbers of a row's positions.

    Raises:
        UserError: positions of another width.
    """
    numbers = positions.flatten()
    if positions.null_count or numbers.null_count:
        raise UserError(f"{place}: got a position or a number that is null, expected {width} numbers a position")

    widths = pyarrow.compute.list_value_length(positions).to_numpy(zero_copy_only=False)
    if (widths != width).any():
        got = " and ".join(str(int(other)) for other in np.unique(widths)[:3])
        raise UserError(
            f"{place}: got {got} numbers a position, expected {width} by {MANIFEST}: the settings of other captures, "
            "or a file that was cut off"
        )
    return numbers.to_numpy(zero_copy_only=False).reshape(-1, width)


# ---------------------------------------------------------------------------------- opening


def is_captures(name: str | None) -> bool:
    """Tell whether the name of a teacher, or of a text, stands for a folder of captures."""
    return name is not None and name.startswith(CAPTURES)


def captured_texts(name: str, tokenizer: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of the documents of a folder of captures.

    Args:
        name: `captures:DIR`.
        tokenizer: name of the teacher's.
    """
    captures = open_captures(name, tokenizer)
    yield from captures.texts(load_tokenizer(tokenizer, "teacher"))


@lru_cache(maxsize=2)
def open_captures(name: str, tokenizer: str) -> Captures:
    """Open a folder of captures, and check it.

    Args:
        name: `captures:DIR`.
        tokenizer: name of the tokenizer that the teacher read with.

    Raises:
        UserError: there is no such folder, it is none of captures, or it belongs to another tokenizer.
    """
    folder = user_path(name.removeprefix(CAPTURES))
    codec = read_settings(_manifest(folder), str(folder / MANIFEST))
    rows = _open_rows(folder, codec)
    captures = _with_layout(folder, codec, rows)
    reader = load_tokenizer(tokenizer, "teacher")
    captures = _checked(captures, reader, tokenizer)
    _log_losses(captures, reader)
    return captures


def digest_of(name: str) -> str:
    """Return the identity of a folder of captures: of the manifest, and of size, begin and end of each file.

    Raises:
        UserError: there is no such folder.
    """
    folder = user_path(name.removeprefix(CAPTURES))
    manifest = folder / MANIFEST
    _manifest(folder)
    digest = hashlib.sha256(manifest.read_bytes())
    # Whole files may be terabytes. A Parquet file's end has the sizes and statistics of all that is in it.
    for file in _data_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(END_BYTES))
            stream.seek(max(0, size - END_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


def _manifest(folder: Path) -> Any:
    """Return the content of a folder's manifest.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(
            f"{CAPTURES}{folder}: got no folder of this name, expected one of DistillKit's captures. "
            "Put the path right, as it is seen from here."
        )

    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{CAPTURES}{folder}: there is no {MANIFEST}, without which its bytes cannot be read. DistillKit's "
            "sampler writes it beside the captures. For a data set of the hub put the settings of its "
            "`logprob_compressor` or `legacy_logit_compression` into such a file (docs/captures.md)."
        )
    try:
        return yaml.safe_load(manifest.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{manifest}: got something that is no YAML ({' '.join(str(error).split())}), expected DistillKit's "
            "settings. Take the file from beside the captures once more."
        ) from None


def _data_files(folder: Path) -> list[Path]:
    """Return the files with rows; of a data set as `datasets` saves it to disk, its .arrow files."""
    suffix = ".arrow" if (folder / "state.json").is_file() else ".parquet"
    return sorted(file for file in folder.rglob(f"*{suffix}") if file.is_file())


def _open_rows(folder: Path, codec: Codec) -> datasets.Dataset:
    """Return the rows of a folder, mapped from disk.

    Raises:
        UserError: there are none, a file cannot be read, or they lack a column.
    """
    files = _data_files(folder)
    if not files:
        raise UserError(f"{CAPTURES}{folder}: got no .parquet file in it, expected the captures' rows")

    names = [str(file) for file in files]
    try:
        if files[0].suffix == ".arrow":
            rows = datasets.load_from_disk(str(folder))
        else:
            for file in files:
                with _errors_name(file):
                    pyarrow.parquet.ParquetFile(file).close()
            # Rows of a Parquet file cannot be read one at a time; a copy that can is made once, in the cache.
            rows = datasets.Dataset.from_parquet(names, cache_dir=str(cache_dir() / "captures"))
    except (pyarrow.ArrowInvalid, OSError, datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise UserError(
            f"{CAPTURES}{folder}: a file cannot be read, got: {error}. Expected whole files; was a copy cut off?"
        ) from error

    missing = {"input_ids", *codec.columns} - {*rows.column_names}
    if missing:
        raise UserError(
            f"{CAPTURES}{folder}: got rows with the columns {', '.join(rows.column_names)}, expected "
            f"{', '.join(sorted(missing))} too, of which {MANIFEST} tells: captures of another version, or no captures"
        )
    return rows


@contextmanager
def _errors_name(file: Path) -> Iterator[None]:
    """Name the file in errors about it."""
    try:
        yield
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.name}: {error}") from error


def _with_layout(folder: Path, codec: Codec, rows: datasets.Dataset) -> Captures:
    """Return the captures of a folder with the place of every token.

    Raises:
        UserError: there is no token, or rows have fewer lists than tokens.
    """
    ids, sizes = _flat(rows, "input_ids")
    if not len(ids):
        raise UserError(f"{CAPTURES}{folder}: got no token, expected texts")

    begins = np.concatenate([[0], np.cumsum(sizes)])
    listed_to = _sizes(rows, codec.columns[0])
    for column in codec.columns:
        lists = _sizes(rows, column)
        # A row of lists without tokens would be text that vanishes.
        wrong = np.flatnonzero((lists < sizes - 1) | (lists != listed_to) | ((sizes == 0) & (lists > 0)))
        if len(wrong):
            row = wrong[0]
            raise UserError(
                f"{CAPTURES}{folder}: got {lists[row]:,} lists for {sizes[row]:,} tokens in row {row + 1:,}, {column}, "
                "expected one behind each token but the last, in all columns: was a file cut off?"
            )

    numbers = np.repeat(np.arange(len(sizes)), sizes)
    if "attention_mask" in rows.column_names:
        mask, mask_sizes = _flat(rows, "attention_mask")
        if not np.array_equal(mask_sizes, sizes):
            raise UserError(f"{CAPTURES}{folder}: got an attention_mask of another length than input_ids")
        is_new = (np.diff(numbers, prepend=-1) != 0) | (np.diff(mask, prepend=-1) != 0)
        segments = np.where(mask > 0, np.cumsum(is_new) - 1, -1)
    else:
        segments = numbers

    return Captures(
        folder=folder,
        codec=codec,
        ranks=codec.listed,
        are_logits=False,
        rows=rows.with_format("arrow"),
        digest=digest_of(str(folder)),
        ids=ids.astype(np.int32),
        begins=begins,
        segments=segments.astype(np.int32),
        listed_to=listed_to,
    )


def _flat(rows: datasets.Dataset, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of a column of lists, one after the other, and the length of each list.

    Raises:
        UserError: there is none where one should be, or one that is no token of any vocabulary.
    """
    for chunk in _chunks(rows, column):
        numbers = chunk.flatten()
        least, most = pyarrow.compute.min_max(numbers).as_py().values()
        if chunk.null_count or numbers.null_count or (least or 0) < 0 or (most or 0) > LARGEST:
            raise UserError(
                f"{CAPTURES}: got {column} with nulls, or with numbers from {least} to {most}, expected a list of "
                "tokens in each row: was a file damaged?"
            )
    values = [chunk.flatten().to_numpy(zero_copy_only=False).astype(np.int64) for chunk in _chunks(rows, column)]
    return np.concatenate([np.zeros(0, np.int64), *values]), _sizes(rows, column)


def _sizes(rows: datasets.Dataset, column: str) -> np.ndarray:
    """Return the length of each list of a column."""
    # A null has no lists.
    sizes = [pyarrow.compute.fill_null(pyarrow.compute.list_value_length(chunk), 0) for chunk in _chunks(rows, column)]
    arrays = [size.to_numpy(zero_copy_only=False).astype(np.int64) for size in sizes]
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _chunks(rows: datasets.Dataset, column: str) -> list[pyarrow.Array]:
    return rows.data.column(column).chunks


# ---------------------------------------------------------------------------------- checks


def _checked(captures: Captures, tokenizer: PreTrainedTokenizerBase, name: str) -> Captures:
    """Return captures that the tokenizer reads, and whose lists predict their text.

    Args:
        name: of the tokenizer, for messages.

    Raises:
        UserError: they are of another tokenizer, or stored in another way than the manifest says.
    """
    place = f"{CAPTURES}{captures.folder}"
    remedy = "Expected --teacher-tokenizer to be that of the captured teacher."
    tokens = len(tokenizer)
    largest = int(captures.ids.max())
    # DistillKit counts one more than the tokens, or the rows of the model's head.
    if largest >= tokens or captures.codec.vocabulary < tokens - 1:
        raise UserError(
            f"{place}: got tokens up to {largest:,} of a vocabulary of {captures.codec.vocabulary:,}, and the "
            f"tokenizer {name} has {tokens:,}. {remedy}"
        )

    same = _share_tokenised_alike(captures, tokenizer)
    if same < LEAST_SAME:
        raise UserError(
            f"{place}: the tokenizer {name} cuts the captured texts into other tokens, {same:.0%} are the same. "
            f"{remedy}"
        )

    # What the settings make of other bytes may be any number.
    with np.errstate(all="ignore"):
        sample = [captures.stored_lists(row) for row in range(min(SAMPLE, len(captures.rows)))]
        ids, values = (np.concatenate(column) for column in zip(*sample, strict=True))
        # DistillKit's first captures may be logits.
        are_logits = bool(np.median(np.exp(values).sum(1)) > MOST_LOGITS)
        _require_sound_lists(captures, ids, values[:, : captures.codec.exact], are_logits=are_logits)
    captures = replace(captures, are_logits=are_logits, ranks=trusted_ranks(captures.codec, values))
    # Among many tokens a list has the real one by chance too.
    listed = _share_listed(captures)
    if listed < LEAST_LISTED and captures.ranks < MOST_BY_CHANCE * tokens:
        raise UserError(
            f"{place}: got lists that have {listed:.0%} of the texts' tokens among them, expected more than half: are "
            f"the settings in {MANIFEST} those of these captures?"
        )
    return captures


def _require_sound_lists(
    captures: Captures,
    ids: np.ndarray,
    exact: np.ndarray,
    *,
    are_logits: bool,
) -> None:
    """Check that some lists are such of distinct tokens, the most probable one first.

    Args:
        ids: [n, K] tokens.
        exact: [n, E] values of the first ranks, which are stored as they were.
        are_logits: they have no sum.

    Raises:
        UserError: they are others.
    """
    in_order = np.sort(ids, axis=1)
    faults = {
        "tokens beyond the vocabulary": (ids >= captures.codec.vocabulary).any(),
        "a token twice": (in_order[:, 1:] == in_order[:, :-1]).any(),
        "values that are no numbers": not np.isfinite(exact).all(),
        "a less probable token before a more probable one": (np.diff(exact, axis=1) > ROUNDING).any(),
        "probabilities that add to more than 1": not are_logits and (np.exp(exact).sum(1) > MOST_MASS).any(),
    }
    got = [fault for fault, is_there in faults.items() if is_there]
    if got:
        raise UserError(
            f"{CAPTURES}{captures.folder}: got lists with {', and '.join(got)}: are the settings in {MANIFEST} those "
            "of these captures, and are the files whole?"
        )


def _share_tokenised_alike(captures: Captures, tokenizer: PreTrainedTokenizerBase) -> float:
    """Return the share of pairs of neighbouring tokens that come back when the text of the captures is tokenised."""
    # Special tokens may be written by a template, which the text alone does not bring back.
    special = set(tokenizer.all_special_ids)
    pairs = 0
    alike = 0
    for document in islice(captures.documents(), SAMPLE):
        ids = captures.ids_of(document)
        text = decoded(tokenizer, ids, special)
        again = tokenizer(text, add_special_tokens=False).input_ids
        expected, actual = (Counter(pairwise(token for token in side if token not in special)) for side in (ids, again))
        pairs += expected.total()
        alike += (expected & actual).total()
    return alike / pairs if pairs else 1.0


def _share_listed(captures: Captures) -> float:
    """Return the share of the tokens that are among those listed for them."""
    hits = 0
    tokens = 0
    for row in range(min(SAMPLE, len(captures.rows))):
        ids, _ = captures.lists(row)
        real = captures.ids[captures.begins[row] : captures.begins[row + 1]][1:]
        is_listed = (ids[: len(real)] == real[:, None]).any(1)
        hits += int(is_listed.sum())
        tokens += len(real)
    return hits / max(tokens, 1)


def _has_markup(captures: Captures, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether there are special tokens inside of the texts, beside those that begin and end them."""
    special = set(tokenizer.all_special_ids)
    texts = [
        decoded(tokenizer, captures.ids_of(document), special) for document in islice(captures.documents(), SAMPLE)
    ]
    return any(token in text for text in texts for token in tokenizer.all_special_tokens)


def _log_losses(captures: Captures, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log what the captures are, what their compression loses, and what is read otherwise than it was captured."""
    codec = captures.codec

    log.info(
        "%s%s: %s rows, %s tokens, %d listed at each, %d of them exact",
        CAPTURES,
        captures.folder,
        f"{len(captures.rows):,}",
        f"{len(captures.ids):,}",
        codec.listed,
        codec.exact,
    )

    if codec.exact < codec.listed:
        log.warning("%s", _loss_in_words(captures))
    if _has_markup(captures, tokenizer):
        log.warning("the captured texts have special tokens in them, of a chat template: their names are read as text")
    if captures.are_logits:
        log.warning("the captures hold logits without their normaliser: what is not listed is taken to have no mass")


def _loss_in_words(captures: Captures) -> str:
    """Return what is lost of the ranks that are stored as a curve."""
    codec = captures.codec
    measured = published_loss(codec)
    loss = "what that loses was not measured"
    if measured is not None:
        loss = (
            f"{measured[0]}, which lose {measured[1]:g} nats a position of what the teacher said where its fit is good"
        )
    curve = f"the tokens of the ranks {codec.exact + 1} to {codec.listed} are stored as a curve: {loss}"
    if captures.ranks == codec.listed:
        return f"{curve} (docs/captures.md)"
    return (
        f"{curve}. Its fit in float32, whose rounding may be {noise_of_curve(codec):.0f} times the curve, went wrong: "
        "it does not begin where the exact values end, and would cost 0.03 to 0.05 nats. These ranks are left out, and "
        f"{captures.ranks} tokens of each list are read (docs/captures.md)"
    )
