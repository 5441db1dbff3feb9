"""From sources to windows: documents, train/eval split, windows.

    sources --load_documents--> Corpus of documents --make_windows--> windows

Everything that decides what is trained on is a pure function of the texts, so that a resumed run sees what an
uninterrupted one would have seen. In which order is told in `loading`.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import chain, islice
from typing import Literal

import datasets
import numpy as np

from ..config.settings import DataConfig
from ..errors import UserError
from . import sources
from .columns import Columns, Conversation, as_text, said

log = logging.getLogger(__name__)

MOST_OF_TEXT = 0.5
"""Share of a text above which one document is most of it."""
LONG_DOCUMENT = 50
"""Windows beyond which a document is a long one."""
MOST_IN_LONG_DOCUMENTS = 0.01
"""Share of a text that may be in long documents without a warning: articles of an encyclopedia are as long, a few."""
MOST_MEASURED = 1000
"""So many documents that are in no window are measured, to name the shortest."""
SHORT_DOCUMENT = 4
"""Up to so many windows a document may be most of a text (of three notes, say) without a word."""


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to evaluate on; no text is in both."""

    train: list[str]
    eval: list[str]
    conversations: bool
    """Whether every document is a conversation, as `Conversation.text` writes it; else every one is plain text."""
    report: dict[str, int]
    """Documents read, empty, duplicate, in_eval (dropped from training because evaluation has them), train, eval;
    train_bytes and eval_bytes, UTF-8, of conversations what their messages say."""


# ---------------------------------------------------------------- documents


def load_documents(config: DataConfig) -> Corpus:
    """Read every source, drop what is empty or repeated, and split by document.

    What a source can be is told in `sources`.

    Without an evaluation source, a document goes to evaluation if a hash of its text says so: it stays on its
    side whatever documents come or go beside it. Texts that differ only in whitespace share a side.

    Raises `UserError` for what cannot be found, read or split.
    """
    report = dict.fromkeys(("read", "empty", "duplicate", "in_eval"), 0)
    kinds: dict[bool, str] = {}
    documents = _kept(
        _read(config, config.train, config.split, kinds), report, config.deduplicate, config.max_documents
    )
    _require(documents, config.train, report, True in kinds)
    if config.eval is None:
        train, held_out = _split(documents, config.eval_fraction)
    else:
        counts = dict.fromkeys(report, 0)
        held_out = _kept(_read_eval(config, kinds), counts, config.deduplicate, None)
        _require(held_out, [config.eval], counts, True in kinds)
        keys = {_key(text) for text in held_out}
        train = [text for text in documents if _key(text) not in keys]
        report["in_eval"] = len(documents) - len(train)
        if not train:
            raise UserError(
                f"Every one of the {len(documents)} training documents is also in the evaluation data {config.eval}. "
                "Give other evaluation data, or none: then a part of the training documents is held out."
            )
    for name, side in (("train", train), ("eval", held_out)):
        report |= {name: len(side), f"{name}_bytes": _bytes(map(said, side) if True in kinds else side)}
    return Corpus(train, held_out, True in kinds, report)


def _read(config: DataConfig, names: Sequence[str], split: str, kinds: dict[bool, str]) -> Iterator[tuple[str, str]]:
    """Documents as texts. `kinds`: where the first conversation (True) or plain text (False) was met."""
    columns = Columns(config.text_column, config.messages_column, config.prompt_column, config.completion_column)
    try:
        yield from _documents(config, names, split, kinds, columns)
    finally:  # also where no more of them are wanted
        if unread := str(columns.unread):
            log.info("%s: %s", ", ".join(names), unread)


def _read_eval(config: DataConfig, kinds: dict[bool, str]) -> Iterator[tuple[str, str]]:
    """Documents of the evaluation text, read without what describes the training text alone."""
    defaults = DataConfig()
    settings = {name: getattr(defaults, name) for name in config.train_only}
    return _read(replace(config, **settings), [config.eval], "validation", kinds)


def _documents(
    config: DataConfig, names: Sequence[str], split: str, kinds: dict[bool, str], columns: Columns
) -> Iterator[tuple[str, str]]:
    found = sources.read(names, split=split, columns=columns, separator=config.document_separator)
    for place, value in found if config.document_start is None else _joined(found, config.document_start):
        chat = isinstance(value, Conversation)
        if value is not None and kinds.setdefault(chat, place) and len(kinds) > 1:
            raise UserError(
                f"Conversations and plain text cannot be mixed: {kinds[True]} is a conversation (columns "
                f"{config.messages_column!r}, or {config.prompt_column!r} and {config.completion_column!r}), "
                f"{kinds[False]} is plain text. Give one kind, for training and for evaluation; to read a column as "
                "plain text, name it: --set data.text_column=NAME."
            )
        yield place, value.text(place, config.learn_from, columns.unread) if chat else as_text(place, value)


@contextmanager
def errors_name_their_document(config: DataConfig) -> Iterator[None]:
    """An error about one document (a ValueError that has its name as `document`) is told with the document's place.

    The place is found by reading the sources once more, so that no run has to keep those of all its documents.

    Raises `UserError` in that error's place.
    """
    try:
        yield
    except ValueError as error:
        if not (name := getattr(error, "document", None)):
            raise
        raise UserError(f"{_place_of(config, name)}: {error}") from error


def _place_of(config: DataConfig, name: str) -> str:
    """Return where the document of this name is, by reading the sources once more."""
    rows = _read(config, config.train, config.split, {})
    if config.eval is not None:
        rows = chain(rows, _read_eval(config, {}))
    return next(place for place, text in rows if document_name(text) == name)


def _joined(parts: Iterator[sources.Located], start: str) -> Iterator[sources.Located]:
    """Parts up to the next one that matches `start`, as one document. Lines keep the line breaks they come with."""
    try:
        begins = re.compile(start)
    except re.error as error:
        raise UserError(f"data.document_start: got {start!r}, expected a regular expression ({error})") from error
    place, held = "", []
    for where, value in parts:
        if isinstance(value, Conversation):
            raise UserError(f"{where}: a conversation, but data.document_start is for texts that come line by line.")
        text = as_text(where, value)
        if begins.search(text) and held:
            yield place, "".join(held)
            held = []
        place = place if held else where
        held.append(text if text.endswith("\n") else text + "\n")
    if held:
        yield place, "".join(held)


def _kept(
    documents: Iterable[tuple[str, str]], report: dict[str, int], deduplicate: bool, limit: int | None
) -> list[str]:
    documents = iter(documents)
    kept: list[str] = []
    seen: set[bytes] = set()
    for _, text in documents:
        report["read"] += 1
        if not text.strip():
            report["empty"] += 1
            continue
        if deduplicate:
            digest = _digest(text)
            if digest in seen:
                report["duplicate"] += 1
                continue
            seen.add(digest)

        kept.append(text)
        if limit is not None and len(kept) >= limit:
            _log_unread(documents, limit)
            break
    return kept


def _log_unread(rest: Iterator[tuple[str, str]], limit: int) -> None:
    """Log how many documents `max_documents` leaves out; counted up to the limit once more, so that it costs little."""
    unread = 0
    # what is wrong in documents that nobody asked for is nobody's mistake
    with suppress(UserError):
        unread = sum(1 for _, text in islice(rest, limit) if text.strip())
    if unread:
        at_least = "at least " if unread >= limit else ""
        log.info("data.max_documents=%s: %s%s further documents are not read", f"{limit:,}", at_least, f"{unread:,}")


def _require(documents: list[str], names: Sequence[str], report: dict[str, int], conversations: bool) -> None:
    if not names:
        raise UserError("No training data: expected at least one file, folder or hub id. Give it with --train-data.")
    if not documents and conversations:
        raise UserError(
            f"Nothing to learn from in {', '.join(names)}: in none of {report['read']} conversations is there text of "
            "the role 'assistant'. Rename the role that answers (gpt, bot, model), or learn from all messages: "
            "--set data.learn_from=all."
        )
    if not documents:
        raise UserError(
            f"No text in {', '.join(names)}: {report['read']} documents read, {report['empty']} of them empty. "
            "Expected at least one document with text; check the paths, the text column and the separator."
        )


def _split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    place = [int.from_bytes(_key(text)[:8], "big") / 2**64 for text in documents]
    low, high = min(place), max(place)
    if low == high:
        raise UserError(
            "Got a single document, which cannot be split into training and evaluation. Name what separates documents "
            "in a .txt file (--document-separator, the setting document_separator), or how one starts where texts come "
            "line by line (--set data.document_start=REGEX; without it every row is one); or give more documents, or "
            f"evaluation data of its own (--eval-data).{uncut_marker(documents)}"
        )
    # Tiny data: the lowest document is always held out, the highest never; still chosen by the texts alone.
    held_out = [p == low or p < min(fraction, high) for p in place]
    train = [text for text, out in zip(documents, held_out, strict=True) if not out]
    return train, [text for text, out in zip(documents, held_out, strict=True) if out]


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _key(text: str) -> bytes:
    """Hash of a text up to whitespace."""
    return _digest(" ".join(text.split()))


def _bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def document_name(text: str) -> str:
    """Short name of a document: a pure function of its text."""
    return _digest(text).hex()[:10]


def corpus_fingerprint(texts: Iterable[str]) -> str:
    """Hash of documents and their order, 32 hexadecimal digits."""
    total = blake2b(digest_size=16)
    for text in texts:
        total.update(_digest(text))
    return total.hexdigest()


def leakage(train: Iterable[str], held_out: Sequence[str]) -> float:
    """Share of evaluation documents whose text, up to whitespace, is also a training document: 0 is right."""
    keys = {_key(text) for text in train}
    return sum(_key(text) in keys for text in held_out) / max(len(held_out), 1)


# ---------------------------------------------------------------- windows


def uncut_marker(texts: Iterable[str]) -> str:
    """Say that what ends documents elsewhere stands inside of these, and how they are cut there; empty if it does not.

    A .txt file is cut at lines that are the marker. Beside other words of a line it stays in the text.
    """
    if not any(sources.END_OF_TEXT in text for text in texts):
        return ""
    return (
        f" Inside of documents stands {sources.END_OF_TEXT}, not alone on a line: if it ends them, give "
        f"--document-separator '{sources.END_OF_TEXT}', which cuts a .txt file wherever it is."
    )


@dataclass(frozen=True)
class DocumentSizes:
    """How long the documents of a plain text are."""

    documents: int
    longest_share: float
    """Of the bytes of the text."""
    longest_windows: float
    """Windows that the longest document fills."""
    long: int
    """Documents that fill more than `LONG_DOCUMENT` windows."""
    long_share: float
    """Their share of the bytes of the text."""

    @classmethod
    def of(cls, texts: Sequence[str], windows: datasets.Dataset) -> "DocumentSizes":
        """Measure documents in the windows that they were packed into."""
        sizes = np.array([len(text.encode()) for text in texts])
        window = max(int(np.max(windows["bytes"][:])), 1)
        is_long = sizes > LONG_DOCUMENT * window
        return cls(
            documents=len(texts),
            longest_share=float(sizes.max() / sizes.sum()),
            longest_windows=float(sizes.max() / window),
            long=int(is_long.sum()),
            long_share=float(sizes[is_long].sum() / sizes.sum()),
        )

    @property
    def is_doubtful(self) -> bool:
        """Whether the text looks as if it was not cut into documents (a book looks like that too)."""
        is_one_document = self.longest_share > MOST_OF_TEXT and self.longest_windows > SHORT_DOCUMENT
        return is_one_document or self.long_share > MOST_IN_LONG_DOCUMENTS

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents; the longest holds {self.longest_share:.0%} of the text and fills about "
            f"{self.longest_windows:,.0f} windows; {self.long_share:.0%} of the text is in documents of more than "
            f"{LONG_DOCUMENT} windows"
        )


DOCUMENTS_EXPECTED = (
    f"no document with more than {MOST_OF_TEXT:.0%} of the text, at most {MOST_IN_LONG_DOCUMENTS:.0%} of it in "
    f"documents of more than {LONG_DOCUMENT} windows"
)
DOCUMENTS_REMEDY = (
    "Right for books; else the text is not cut where its documents end. Name what stands between them in a .txt file "
    "(--document-separator), give tables one document a row, and check data.document_start, which joins rows"
)


def document_sizes(
    corpus: Corpus, windows: datasets.Dataset, held_out: datasets.Dataset
) -> dict[Literal["training", "held-out"], DocumentSizes]:
    """Measure the documents of both sides; none of conversations: `warn_of_left_out` tells where those are long."""
    if corpus.conversations:
        return {}
    return {
        "training": DocumentSizes.of(corpus.train, windows),
        "held-out": DocumentSizes.of(corpus.eval, held_out),
    }


def warn_of_long_documents(corpus: Corpus, windows: datasets.Dataset, held_out: datasets.Dataset) -> None:
    """Raise a red flag where a text looks as if it was not cut into documents: it would be split and packed badly."""
    texts = {"training": corpus.train, "held-out": corpus.eval}
    for kind, sizes in document_sizes(corpus, windows, held_out).items():
        if sizes.is_doubtful:
            log.warning(
                "[RED FLAG] %s text: %s. Expected %s. %s.%s",
                kind,
                sizes,
                DOCUMENTS_EXPECTED,
                DOCUMENTS_REMEDY,
                uncut_marker(texts[kind]),
            )
