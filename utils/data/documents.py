"""Documents of a run: read from every source, cleaned of repeats, and divided into training and evaluation text.

    sources --load_documents--> Corpus --make_windows--> windows (see `windows`)

Everything that decides what is trained on is a pure function of the texts, so that a resumed run sees what an
uninterrupted one would have seen. `batch_order` has the order in which windows are seen.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import chain, islice
from typing import Any, Literal, cast

import datasets
import numpy as np

from ..config.settings import DataConfig
from ..errors import UserError
from . import sources
from .columns import OUTPUT, SHAREGPT, Columns, Routed
from .conversations import INSTRUCTION, Conversation, Reading, text_of_messages
from .kinds import as_text
from .routes import NO_ROUTE, Routes
from .texts import Texts

log = logging.getLogger(__name__)

MOST_OF_TEXT = 0.5
"""Share of a text above which one document is most of it."""
LONG_DOCUMENT = 50
"""Windows beyond which a document is a long one."""
MOST_IN_LONG_DOCUMENTS = 0.01
"""Share of a text that may be in long documents without a warning: articles of an encyclopedia are as long, a few."""
SHORT_DOCUMENT = 4
"""Windows up to which a document may be most of a text (of three notes, say) without a warning."""

REPEATED_WORDS = 6
"""Length of the sequences of words whose repeats are counted."""
MOST_SEQUENCES = 200_000
"""Sequences that are looked at."""
MOST_REPEATS = 0.3
"""Share of them that occur before in a text that does not repeat itself."""


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to evaluate on; no text is in both."""

    train: Sequence[str]
    eval: Sequence[str]
    conversations: bool
    """Every document is a conversation, as `Conversation.text` writes it; else every one is plain text."""
    report: dict[str, int]
    """Documents read, empty, duplicate, in_eval (dropped from training because evaluation has them), train, eval;
    train_bytes and eval_bytes, UTF-8, of conversations what their messages say."""
    routes: Routes | None = None
    """Routes of the documents, where teachers are for some of the text alone."""


@dataclass
class FirstPlaces:
    """Places of the first conversation and of the first plain text; a run learns from one kind only."""

    conversation: str | None = None
    plain_text: str | None = None


# ---------------------------------------------------------------- reading


def load_documents(config: DataConfig, routes: Routes | None = None) -> Corpus:
    """Read every source, drop what is empty or repeated, and split by document.

    Without an evaluation source, a document goes to evaluation if a hash of its text says so: it stays on its
    side whatever documents come or go beside it. Texts that differ only in whitespace share a side.

    Args:
        routes: takes note of the route of every document, where teachers are for some of the text alone.

    Raises:
        UserError: something cannot be found, read or split, or no document is for a teacher that `routes` names.
    """
    report = dict.fromkeys(("read", "empty", "duplicate", "in_eval"), 0)
    places = FirstPlaces()

    # A variable would keep the generator open: it logs the columns that were not read when it is closed.
    documents = _cleaned(
        _noted(config.train, partial(_read, config, split=config.split, places=places, routes=routes), routes),
        report,
        deduplicate=config.deduplicate,
        limit=config.max_documents,
    )
    conversations = places.conversation is not None
    require_text(documents, config.train, report, conversations=conversations)

    # A text that is evaluated on is never trained on, wherever it comes from.
    if config.eval is None:
        train, held_out = split_documents(documents, config.eval_fraction, report["duplicate"])
    else:
        held_out = load_held_out(config, places, routes)
        train = _without(documents, held_out, evaluation_data=config.eval)
        report["in_eval"] = len(documents) - len(train)
    if routes is not None:
        routes.require_documents(document_name(text) for text in chain(train, held_out))

    # Of conversations only what is said counts, not the JSON around it.
    for name, texts in (("train", train), ("eval", held_out)):
        report[name] = len(texts)
        report[f"{name}_bytes"] = byte_count(map(text_of_messages, texts) if conversations else texts)
    return Corpus(train=train, eval=held_out, conversations=conversations, report=report, routes=routes)


def _noted(
    names: Sequence[str],
    read: Callable[[Sequence[str]], Iterator[tuple[str, str]]],
    routes: Routes | None,
) -> Iterator[tuple[str, str]]:
    """Yield the documents of every source; where sources are routes, source by source, and noted there."""
    if routes is None or routes.column is not None:
        yield from read(names)
        return

    for name in names:
        for place, text in read([name]):
            routes.of_document.setdefault(document_name(text), name)
            yield place, text


def load_held_out(config: DataConfig, places: FirstPlaces, routes: Routes | None) -> Texts:
    """Return the documents of the evaluation source, without repeats.

    Raises:
        UserError: it cannot be read, holds no text, or not the kind of text that is trained on.
    """
    counts = dict.fromkeys(("read", "empty", "duplicate"), 0)
    read = _noted([cast(str, config.eval)], lambda _: _read_eval(config, places, routes), routes)
    documents = _cleaned(read, counts, deduplicate=config.deduplicate, limit=None)
    require_text(documents, [config.eval], counts, conversations=places.conversation is not None)
    return documents


def _without(documents: Texts, held_out: Texts, evaluation_data: str) -> Texts:
    """Return the training documents that evaluation does not have.

    Raises:
        UserError: evaluation has all of them.
    """
    # Up to whitespace: copies of a text differ in their line breaks.
    keys = {text_key(text) for text in held_out}
    train = documents.select(np.array([text_key(text) not in keys for text in documents]))
    if not train:
        raise UserError(
            f"Every one of the {len(documents)} training documents is also in the evaluation data {evaluation_data}. "
            "Give other evaluation data, or none: then a part of the training documents is held out."
        )
    return train


def _read(
    config: DataConfig,
    names: Sequence[str],
    *,
    split: str,
    places: FirstPlaces,
    routes: Routes | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every document, and warn at the end of columns and keys not read.

    Args:
        places: of the first document of each kind, which are noted there.
        routes: that a column says, which are noted there.
    """
    columns = columns_of(config)
    if routes is not None:
        columns = replace(columns, route=routes.column)
    try:
        yield from _documents(config, names, split=split, places=places, columns=columns, routes=routes)
    finally:  # also where `max_documents` ends the reading
        if routes is not None:
            routes.other_columns |= columns.unread.columns
        unread = str(columns.unread)
        if unread:
            log.warning("%s: %s", ", ".join(names), unread)


def columns_of(config: DataConfig) -> Columns:
    """Return the columns of tables that hold documents."""
    return Columns(
        text=config.text_column,
        messages=config.messages_column,
        prompt=config.prompt_column,
        completion=config.completion_column,
        tokenizer=config.tokenizer,
    )


def _read_eval(config: DataConfig, places: FirstPlaces, routes: Routes | None = None) -> Iterator[tuple[str, str]]:
    """Return documents of the evaluation text, read without what describes the training text alone."""
    defaults = DataConfig()
    settings = {name: getattr(defaults, name) for name in config.train_only}
    return _read(replace(config, **settings), [config.eval], split="validation", places=places, routes=routes)


def _documents(
    config: DataConfig,
    names: Sequence[str],
    *,
    split: str,
    places: FirstPlaces,
    columns: Columns,
    routes: Routes | None,
) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of every document.

    Raises:
        UserError: something cannot be read, or conversations and plain text are mixed.
    """
    located = sources.read(names, split=split, columns=columns, separator=config.document_separator)
    if config.document_start is not None:
        located = join_lines(located, config.document_start)

    for place, value in located:
        # Text files and captures have no columns, and so no route.
        document, route = value if isinstance(value, Routed) else (value, NO_ROUTE)
        text = document_text(config, place, document, places=places, columns=columns)
        if routes is not None and routes.column is not None:
            routes.of_document.setdefault(document_name(text), route)
        yield place, text


def document_text(config: DataConfig, place: str, value: Any, *, places: FirstPlaces, columns: Columns) -> str:
    """Return the text of a document; of a conversation, the JSON that stands for it.

    Raises:
        UserError: it is none, or conversations and plain text are mixed.
    """
    # An empty document (None) is of no kind.
    is_conversation = isinstance(value, Conversation)
    if value is not None:
        _require_one_kind(config, place, places, is_conversation=is_conversation)

    if is_conversation:
        return value.text(place, Reading(config.learn_from, config.reasoning), columns.unread)
    return as_text(place, value)


def _require_one_kind(config: DataConfig, place: str, places: FirstPlaces, *, is_conversation: bool) -> None:
    """Note the first document of each kind.

    Raises:
        UserError: both kinds were met.
    """
    conversation = place if is_conversation else places.conversation
    plain_text = places.plain_text if is_conversation else place
    # refused before it is noted: documents that are only counted, behind `max_documents`, decide on nothing
    if conversation is not None and plain_text is not None:
        raise UserError(
            f"Conversations and plain text cannot be mixed: {conversation} is a conversation "
            f"(columns {config.messages_column!r} or {SHAREGPT!r}, {config.prompt_column!r} and "
            f"{config.completion_column!r}, or {INSTRUCTION!r} and {OUTPUT!r}), "
            f"{plain_text} is plain text. Give one kind, for training and for evaluation; to read a column as "
            "plain text, name it: --set data.text_column=NAME."
        )

    places.conversation = places.conversation or conversation
    places.plain_text = places.plain_text or plain_text


@contextmanager
def errors_name_their_document(config: DataConfig) -> Iterator[None]:
    """Put the place of a document in front of an error about it: a ValueError that has its name as `document`.

    The place is looked up by reading the sources once more, so that no run has to keep those of all its documents.

    Raises:
        UserError: in that error's place.
    """
    try:
        yield
    except ValueError as error:
        name = getattr(error, "document", None)
        if not name:
            raise
        raise UserError(f"{place_of_document(config, name)}: {error}") from error


def place_of_document(config: DataConfig, name: str) -> str:
    """Return the place of the document with this name, by reading the sources once more."""
    # Lazily, so that reading ends at the document.
    rows = _read(config, config.train, split=config.split, places=FirstPlaces())
    if config.eval is not None:
        rows = chain(rows, _read_eval(config, FirstPlaces()))
    return next(place for place, text in rows if document_name(text) == name)


def join_lines(parts: Iterator[sources.Located], start: str) -> Iterator[sources.Located]:
    """Join parts up to the next one that matches `start` to one document. Lines keep the line breaks they come with.

    Raises:
        UserError: `start` is no regular expression, or a part is a conversation.
    """
    try:
        begins_document = re.compile(start)
    except re.error as error:
        raise UserError(f"data.document_start: got {start!r}, expected a regular expression ({error})") from error

    place = ""
    lines: list[str] = []
    for part_place, value in parts:
        if isinstance(value, Conversation):
            raise UserError(
                f"{part_place}: a conversation, but data.document_start is for texts that come line by line."
            )

        text = as_text(part_place, value)
        if lines and begins_document.search(text):
            yield place, "".join(lines)
            lines = []

        # A document is where its first line is.
        if not lines:
            place = part_place
        lines.append(text if text.endswith("\n") else text + "\n")

    if lines:
        yield place, "".join(lines)


# ---------------------------------------------------------------- cleaning and splitting


def _cleaned(
    documents: Iterable[tuple[str, str]], counts: dict[str, int], *, deduplicate: bool, limit: int | None
) -> Texts:
    """Return documents that have text; see `_clean`."""
    return Texts.of(_clean(documents, counts, deduplicate=deduplicate, limit=limit))


def _clean(
    documents: Iterable[tuple[str, str]], counts: dict[str, int], *, deduplicate: bool, limit: int | None
) -> Iterator[str]:
    """Yield documents that have text, each once if `deduplicate`, and not more than `limit`.

    Args:
        counts: of documents that were read, empty and duplicate, which are added there.
    """
    documents = iter(documents)
    accepted = 0
    seen: set[bytes] = set()
    for _, text in documents:
        counts["read"] += 1
        if not text.strip():
            counts["empty"] += 1
            continue

        # Exact copies only: a text with other whitespace is a document of its own, on the same side of the split.
        if deduplicate:
            digest = text_digest(text)
            if digest in seen:
                counts["duplicate"] += 1
                continue
            seen.add(digest)

        yield text
        accepted += 1
        if limit is not None and accepted >= limit:
            _log_unread(documents, limit)
            break


def _log_unread(rest: Iterator[tuple[str, str]], limit: int) -> None:
    """Log how many documents `max_documents` leaves out; counted up to the limit once more, so that it costs little."""
    unread = 0
    # An error in documents that the run does not use must not end it.
    with suppress(UserError):
        unread = sum(1 for _, text in islice(rest, limit) if text.strip())

    if unread:
        at_least = "at least " if unread >= limit else ""
        log.info("data.max_documents=%s: %s%s further documents are not read", f"{limit:,}", at_least, f"{unread:,}")


def require_text(
    documents: Sequence[str], names: Sequence[str], counts: dict[str, int], *, conversations: bool
) -> None:
    """Check that there are sources, and text in them.

    Raises:
        UserError: there is none.
    """
    if not names:
        raise UserError("No training data: expected at least one file, folder or hub id. Give it with --train-data.")
    if documents:
        return

    if conversations:
        raise UserError(
            f"Nothing to learn from in {', '.join(names)}: in none of {counts['read']} conversations is there text of "
            "the role 'assistant' that is learned. Expected answers that are not empty, whose weight is not 0; a role "
            "that answers under another name has to be renamed, or learn from all messages: --set data.learn_from=all."
        )
    raise UserError(
        f"No text in {', '.join(names)}: {counts['read']} documents read, {counts['empty']} of them empty. "
        "Expected at least one document with text; check the paths, the text column and the separator."
    )


def split_documents(documents: Texts, fraction: float, copies: int = 0) -> tuple[Texts, Texts]:
    """Divide documents into training and evaluation, by a hash of each text that is uniform in [0, 1).

    Args:
        copies: of documents, which were left out; for the message.

    Raises:
        UserError: there is only one text.
    """
    # 64 bits of a hash that is the same on every machine, as a share that Python's division rounds.
    positions = np.fromiter((int.from_bytes(text_key(text)[:8], "big") / 2**64 for text in documents), np.float64)
    lowest = positions.min()
    highest = positions.max()
    if lowest == highest:
        left_out = f" ({copies:,} copies were left out: see data.deduplicate)" if copies else ""
        raise UserError(
            f"Got a single document, which cannot be split into training and evaluation{left_out}. Name what separates "
            "documents in a .txt file (--document-separator, the setting document_separator), or how one starts where "
            "texts come line by line (--set data.document_start=REGEX; without it every row is one); or give more "
            f"documents, or evaluation data of its own (--eval-data).{uncut_marker(documents)}"
        )

    # Tiny data: the lowest document is always held out, the highest never; still chosen by the texts alone.
    limit = min(fraction, highest)
    is_held_out = (positions == lowest) | (positions < limit)
    return documents.select(~is_held_out), documents.select(is_held_out)


# ---------------------------------------------------------------- names and hashes


def text_digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def text_key(text: str) -> bytes:
    """Hash of a text up to whitespace."""
    return text_digest(" ".join(text.split()))


def byte_count(texts: Iterable[str]) -> int:
    """Return the length of texts in UTF-8, in bytes."""
    if isinstance(texts, Texts):
        return int(texts.sizes.sum())
    return sum(len(text.encode()) for text in texts)


def document_name(text: str) -> str:
    """Short name of a document: a pure function of its text."""
    return text_digest(text).hex()[:10]


def corpus_fingerprint(texts: Iterable[str]) -> str:
    """Hash of documents and their order, 32 hexadecimal digits."""
    total = blake2b(digest_size=16)
    for text in texts:
        total.update(text_digest(text))
    return total.hexdigest()


def leakage(train: Iterable[str], held_out: Sequence[str]) -> float:
    """Share of evaluation documents whose text, up to whitespace, is also a training document: 0 is right."""
    keys = {text_key(text) for text in train}
    leaked = sum(text_key(text) in keys for text in held_out)
    return leaked / max(len(held_out), 1)


# ---------------------------------------------------------------- sizes and repeats


def repeats_itself(texts: Iterable[str]) -> bool:
    """Return whether a text was put together from a stock of sentences, as templates, forms and logs are.

    In English prose at most 5 % of the sequences of six words occur before in the text, in reference manuals 12 %, in
    the stories of the first run 60 %.
    """
    seen: set[int] = set()
    sequences = 0
    repeats = 0
    for text in texts:
        words = text.split()
        for start in range(len(words) - REPEATED_WORDS + 1):
            sequence = hash(tuple(words[start : start + REPEATED_WORDS]))
            sequences += 1
            repeats += sequence in seen
            seen.add(sequence)

        # The beginning of a long text tells enough.
        if sequences > MOST_SEQUENCES:
            break
    return repeats > MOST_REPEATS * max(sequences, 1)


def uncut_marker(texts: Iterable[str]) -> str:
    """Return a hint about an end-of-text marker inside of documents, and how to cut at it; empty if there is none.

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
    """Lengths of the documents of a plain text."""

    documents: int
    longest_share: float
    """Share of the bytes of the text that the longest document holds."""
    longest_windows: float
    """Windows that the longest document fills."""
    long: int
    """Documents that fill more than `LONG_DOCUMENT` windows."""
    long_share: float
    """Share of the bytes of the text that those hold."""

    @classmethod
    def of(cls, texts: Sequence[str], windows: datasets.Dataset) -> "DocumentSizes":
        """Measure documents in the windows that they were packed into."""
        sizes = texts.sizes if isinstance(texts, Texts) else np.array([len(text.encode()) for text in texts])

        # Bytes of the fullest window: a window that holds little would make every document look long.
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
        """Sign of a text that was not cut into documents (a book looks like that too)."""
        # Of a text of three short notes one may well be most of it.
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
    """Measure the documents of both sides; none of conversations, of which `warn_of_left_out` warns."""
    if corpus.conversations:
        return {}
    return {
        "training": DocumentSizes.of(corpus.train, windows),
        "held-out": DocumentSizes.of(corpus.eval, held_out),
    }


def warn_of_long_documents(corpus: Corpus, windows: datasets.Dataset, held_out: datasets.Dataset) -> None:
    """Warn where a text looks as if it was not cut into documents: it would be split and packed badly."""
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
