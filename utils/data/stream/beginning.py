"""The beginning of a stream: documents to measure on, and an example of those to learn from."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ...config.settings import DataConfig
from ..conversations import text_of_messages
from ..documents import (
    Corpus,
    byte_count,
    corpus_fingerprint,
    load_documents,
    load_held_out,
    require_text,
    split_documents,
    text_key,
)
from ..texts import Texts
from .text import COUNTED, TextSources, TextStream

log = logging.getLogger(__name__)

READ_BYTES = 16_000_000
"""Text at the beginning of a stream of which a share is held out."""
EXAMPLE_BYTES = 1_000_000
"""Text of it that is cut into windows before training: to measure statistics on, and for the log."""


@dataclass(frozen=True)
class Beginning:
    """Documents that are in memory before a stream begins."""

    text: TextSources
    corpus: Corpus
    """Of its documents to learn from those that are an example; its report counts all that were read."""
    held_out: Collection[bytes]
    """`documents.text_key` of documents that are never learned from."""
    fingerprint: str
    """Hash of what a stream is recognised by: sizes and edges of its files, its first documents, its mixture."""


def read_beginning(config: DataConfig, seed: int) -> Beginning:
    """Read the beginning of a stream.

    Without an evaluation source, a share of it is held out, by the rule of `documents.split_documents`.

    Raises:
        UserError: something cannot be found, read or split.
    """
    text = TextSources.of(config, seed)
    # Copies of a small source would only make it larger.
    stream = TextStream(text, once=True)
    documents = Texts.of(stream.block(READ_BYTES))
    is_conversation = text.places.conversation is not None
    require_text(documents, config.train, stream.counts, conversations=is_conversation)
    for reader in stream.readers:
        if unread := str(reader.columns.unread):
            log.warning("%s: %s", reader.name, unread)

    if config.eval is None:
        train, held_out = split_documents(documents, config.eval_fraction, stream.counts["duplicate"])
        keys = {text_key(document) for document in held_out}
    else:
        held_out = load_held_out(config, text.places, None)
        keys = {text_key(document) for document in held_out}
        train = documents.select(np.array([text_key(document) not in keys for document in documents]))

    corpus = _corpus(train, held_out, conversations=is_conversation, counts=stream.counts)
    corpus.report["in_eval"] = len(documents) - len(train) if config.eval is not None else 0
    require_text(corpus.train, config.train, corpus.report, conversations=is_conversation)
    return Beginning(text, corpus, keys, _fingerprint(text, documents))


def load_corpus(config: DataConfig, seed: int) -> Corpus:
    """Return the documents of a run; of a stream, those at its beginning.

    Raises:
        UserError: something cannot be found, read or split.
    """
    return read_beginning(config, seed).corpus if config.streaming else load_documents(config)


def _corpus(train: Texts, held_out: Texts, *, conversations: bool, counts: dict[str, int]) -> Corpus:
    """Return the held-out documents and the first of the others, with a report on all of them."""
    report = {name: counts[name] for name in COUNTED}
    for name, texts in (("train", train), ("eval", held_out)):
        report[name] = len(texts)
        report[f"{name}_bytes"] = byte_count(map(text_of_messages, texts) if conversations else texts)

    example = []
    size = 0
    for text in train:
        if size >= EXAMPLE_BYTES:
            break
        example.append(text)
        size += len(text.encode())
    return Corpus(train=example, eval=held_out, conversations=conversations, report=report)


def _fingerprint(text: TextSources, documents: Texts) -> str:
    """Return a hash that changes with the text of a stream, as far as that shows without reading it all."""
    digest = blake2b(digest_size=16)
    for source in text.sources:
        digest.update(source.fingerprint().encode())
    digest.update(f"{text.weights} {corpus_fingerprint(documents)}".encode())
    return digest.hexdigest()
