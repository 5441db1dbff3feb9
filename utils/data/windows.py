"""Windows of documents: made once per corpus, kept on disk, and recognised by a hash of all that they depend on."""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ..config.settings import DataConfig
from ..errors import UserError
from .conversations import text_of_messages
from .documents import Corpus, byte_count, corpus_fingerprint, document_name, place_of_document
from .routes import Routes

log = logging.getLogger(__name__)

Window = dict[str, Any]
"""Columns of one window: NumPy arrays, numbers and strings."""
Encode = Callable[[list[str], list[str]], list[Window]]
"""(texts, document names) -> windows."""

DOCUMENTS_PER_PACK = 1000
"""Documents are packed into windows in groups of this many, so that windows do not depend on the number of workers."""

MOST_CHARACTERS_PER_PACK = 16_000_000
"""A group of long documents ends behind the one that reaches this many: what a tokenizer returns takes many times the
memory of the text."""

GROUPS = pa.schema([("group", pa.list_(pa.large_string()))])
"""Documents that are packed together, a row each. The offsets of plain strings have 32 bits, so that one document of
2 GiB would not fit."""

IN_MEMORY_BYTES = 8_000_000
"""Up to this much text, windows are built in memory; beyond it they are kept in the cache folder of `datasets`."""

MOST_LEFT_OUT = 0.01
"""Share of the training text that may be left out of the windows without a warning."""

MOST_MEASURED = 1000
"""Documents in no window that are measured at most, to name the shortest."""


class TooLong(ValueError):
    """No document leaves something to learn in a window.

    `document` names the shortest one, for `documents.errors_name_their_document`.
    """

    def __init__(self, message: str, document: str) -> None:
        super().__init__(message)
        self.document = document


@dataclass(frozen=True)
class Room:
    """Length of a window, and the length that a document needs."""

    window: int
    """Tokens that a window holds."""
    least_length: Callable[[str], int | None]
    """Document -> tokens that a window must hold before anything of it can be learned; None: nothing ever can be."""

    def shortest(self, texts: Sequence[str]) -> tuple[int, str] | None:
        """Return the least tokens that one of these documents needs, and that document; None if no window is of use.

        Of many documents those of the fewest characters are measured.
        """
        # Characters tell which texts may be the shortest, and cost nothing; tokens have to be counted.
        needs: list[tuple[int, str]] = []
        for text in sorted(texts, key=len)[:MOST_MEASURED]:
            length = self.least_length(text)
            if length is not None:
                needs.append((length, text))
        return min(needs, default=None)

    def remedy(self, length: int) -> str:
        """Return advice about documents of which the shortest needs so many tokens."""
        return (
            f"{length:,} tokens are needed before anything of it can be learned, and a window holds {self.window:,}. "
            f"Raise --max-length to {length:,} or more, as far as both models read that much at once, or shorten what "
            "stands before the text to learn (system message, prompt)"
        )


# ---------------------------------------------------------------- making windows


def make_windows(
    texts: Sequence[str],
    encode: Encode,
    fingerprint: str,
    num_proc: int | None = None,
    *,
    kind: str = "",
    room: Room | None = None,
) -> datasets.Dataset:
    """Pack documents into windows: `encode(texts, document names)` on groups of 1,000 documents.

    Args:
        encode: picklable; returns windows, dicts of NumPy arrays, numbers and strings with the same keys.
        fingerprint: of `encode`. With the hash of the texts it names the cached windows, so that the cache does
            not depend on how objects are pickled.
        num_proc: processes for large corpora. The windows do not depend on it.
        kind: of text (training, held-out), for messages.
        room: of the windows, for messages.

    Raises:
        TooLong: every document is longer than a window before anything of it is learned.
        UserError: no document yields a window for another reason.
    """
    features = _features(texts, encode, kind=kind, room=room)
    content = corpus_fingerprint(texts)
    facts = f"{fingerprint} {content} {features} {MOST_CHARACTERS_PER_PACK}"
    key = blake2b(facts.encode(), digest_size=16).hexdigest()

    # One row is a whole group of documents, so a batch of one row is what `encode` gets at once.
    options = {
        "function": _Pack(encode, list(features)),
        "batched": True,
        "batch_size": 1,
        "remove_columns": ["group"],
        "features": features,
        "new_fingerprint": key,
    }

    # A small corpus is packed so quickly that no file needs to be kept for the next run.
    with _no_progress_bars():
        if byte_count(texts) <= IN_MEMORY_BYTES:
            table = datasets.Dataset(pa.Table.from_batches(_groups(texts), GROUPS))
            windows = table.map(keep_in_memory=True, load_from_cache_file=False, writer_batch_size=1, **options)
        else:
            windows = _map_on_disk(texts, key, processes=num_proc or 1, options=options)
    return windows.with_format("numpy")


def make_windows_by_route(texts: Sequence[str], routes: Routes, **options: Any) -> datasets.Dataset:
    """Pack the documents of each route by themselves; a column `route` of their windows has its name.

    Args:
        options: of `make_windows`.

    Raises:
        TooLong, UserError: see `make_windows`; of a route, too.
    """
    of_routes: dict[str, list[str]] = {}
    for text in texts:
        of_routes.setdefault(routes.route_of(document_name(text)), []).append(text)

    parts = []
    for route, of_this in of_routes.items():
        windows = make_windows(of_this, **options)
        parts.append(windows.add_column("route", [route] * len(windows)))
    return datasets.concatenate_datasets(parts).with_format("numpy")


def _groups(texts: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield rows of which each holds the documents that are packed together, one row at a time."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if len(group) == DOCUMENTS_PER_PACK or size >= MOST_CHARACTERS_PER_PACK:
            yield pa.record_batch([[group]], schema=GROUPS)
            group = []
            size = 0

    if group:
        yield pa.record_batch([[group]], schema=GROUPS)


def _map_on_disk(texts: Sequence[str], key: str, *, processes: int, options: dict[str, Any]) -> datasets.Dataset:
    """Make windows in the cache folder of `datasets`, or take those that are there under this key.

    Raises:
        UserError: the folder cannot be written to, or is full.
    """
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "curriculum_distillation"
    options = {**options, "cache_file_name": str(cache / f"{key}.arrow"), "load_from_cache_file": True}
    try:
        cache.mkdir(parents=True, exist_ok=True)

        # From a file, which is mapped into memory: a table of all texts would hold them once more, in every worker.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            file = f"{folder}/groups.arrow"
            with pa.OSFile(file, "wb") as stream, pa.ipc.new_stream(stream, GROUPS) as writer:
                for batch in _groups(texts):
                    writer.write_batch(batch)

            table = datasets.Dataset.from_file(file)
            processes = min(processes, len(table))
            return table.map(num_proc=processes if processes > 1 else None, **options)
    except OSError as error:
        raise UserError(
            f"Cannot keep the tokenised windows in {cache}: {error}. Free some space there, or set HF_DATASETS_CACHE "
            "to a folder that can be written to."
        ) from error


def _features(texts: Sequence[str], encode: Encode, *, kind: str, room: Room | None) -> datasets.Features:
    """Return columns and types of windows, from the first document that gives one: a later group may have none.

    Raises:
        TooLong: every document is longer than a window before anything of it is learned.
        UserError: no document yields a window for another reason.
    """
    # Not left to `datasets`, which infers types from the first group: that may have no window.
    for text in texts:
        windows = encode([text], [document_name(text)])
        if windows:
            return datasets.Dataset.from_list(windows[:1]).features

    documents = f"{len(texts):,} {kind} documents".replace("  ", " ")  # `kind` may be empty
    shortest = room.shortest(texts) if room is not None else None
    if shortest is not None and shortest[0] > room.window:
        length, text = shortest
        raise TooLong(
            f"longer than a window, and it is the shortest of {documents}: {room.remedy(length)}.",
            document_name(text),
        )
    raise UserError(
        f"None of {documents} has anything to learn: they are too short, or the two tokenizers have no common boundary "
        "in them. Expected at least one of a few tokens."
    )


@dataclass(frozen=True)
class _Pack:
    """A group of documents -> columns of their windows; a class, so that it can be sent to a worker process."""

    encode: Encode
    columns: list[str]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        (texts,) = batch["group"]
        windows = self.encode(texts, [document_name(text) for text in texts])
        return {column: [window[column] for window in windows] for column in self.columns}


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switch the bars of `datasets` off: every carriage return of theirs is saved in a notebook."""
    # Where they were off already, they stay off afterwards.
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()


# ---------------------------------------------------------------- hashes


def windows_fingerprint(windows: Iterable[Window]) -> str:
    """Hash of windows and their order, 32 hexadecimal digits."""
    total = blake2b(digest_size=16)
    for window in windows:
        total.update(window_key(window))
    return total.hexdigest()


def window_key(window: Window) -> bytes:
    """Hash of a window's content, 16 bytes."""
    content = blake2b(digest_size=16)
    # Sorted: the order of its columns is not part of a window.
    for key, value in sorted(window.items()):
        value_bytes = value.encode() if isinstance(value, str) else np.asarray(value).tobytes()
        content.update(key.encode() + value_bytes)
    return content.digest()


def window_lengths(windows: datasets.Dataset, corpus: Corpus) -> np.ndarray:
    """Return [windows] the mean length of the documents that each window has a part of: bytes, of conversations of
    what their messages say."""
    lengths = {}
    for text in corpus.train:
        words = text_of_messages(text) if corpus.conversations else text
        lengths[document_name(text)] = len(words.encode())

    # A window lists the names of its documents, separated by commas.
    means = (np.mean([lengths[name] for name in names.split(",")]) for names in windows["documents"])
    return np.fromiter(means, np.float64, count=len(windows))


# ---------------------------------------------------------------- warnings


def warn_of_left_out(windows: datasets.Dataset, kind: str) -> None:
    """Log how much text of a kind (training, held-out) is in no window: column `left_out` beside `bytes`.

    Above `MOST_LEFT_OUT` it is a warning.
    """
    left_out = int(np.sum(windows["left_out"][:]))
    used = int(np.sum(windows["bytes"][:]))
    if not left_out:
        return

    share = left_out / (left_out + used)
    log.log(
        logging.WARNING if share > MOST_LEFT_OUT else logging.INFO,
        "%s bytes of the %s text (%.2f %%) are left out, because they do not fit into a window: the end of a "
        "conversation that is longer than the window, or what answers a prompt that is (a higher --max-length "
        "helps as far as both models read that much at once), or text without a common boundary of the two "
        "tokenizers",
        f"{left_out:,}",
        kind,
        100 * share,
    )


def warn_of_missing(config: DataConfig, kind: str, texts: Sequence[str], windows: datasets.Dataset, room: Room) -> None:
    """Warn of documents of which nothing is learned because they are longer than a window, and name the shortest."""
    if not np.sum(windows["left_out"][:]):
        return

    # A window lists the names of its documents, separated by commas.
    present = {name for names in windows["documents"] for name in names.split(",")}
    missing = [text for text in texts if document_name(text) not in present]
    shortest = room.shortest(missing)
    if shortest is None or shortest[0] <= room.window:
        return

    length, text = shortest
    log.warning(
        "nothing is learned of %s of %s %s documents, which are longer than a window; the shortest of them is %s: %s",
        f"{len(missing):,}",
        f"{len(texts):,}",
        kind,
        place_of_document(config, document_name(text)),
        room.remedy(length),
    )
