"""Corpora of several kinds, as documents: those to learn from, each read once, and those nobody is trained on."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HELD_OUT = 12
"""Every n-th document of a corpus is unseen."""

PIECE = 8000
"""Characters of a document, at least, where a file does not say where one begins: it ends with a paragraph."""


def _paragraphs(text: str) -> list[str]:
    """Cut a text without documents behind paragraphs."""
    pieces = [""]
    for paragraph in text.split("\n\n"):
        if len(pieces[-1]) >= PIECE:
            pieces.append("")
        pieces[-1] += paragraph + "\n\n"
    return pieces


def _separated(text: str) -> list[str]:
    """Cut a text at its end-of-text marks; a document that occurs twice is taken once."""
    return list(dict.fromkeys(part.strip() for part in text.split("<|endoftext|>")))


def _begun_by(pattern: str) -> Callable[[str], list[str]]:
    """Return a function that cuts a text before each line that matches."""
    return lambda text: re.split(rf"(?m)^(?={pattern})", text)


CORPORA: dict[str, tuple[list[str], Callable[[str], list[str]]]] = {
    "novels": (["bronte.txt"], _begun_by("CHAPTER ")),
    "plays": (["tinyshakespeare.txt"], _paragraphs),
    "stories": (["tinystories-v1.txt", "tinystories-v2.txt"], _separated),
    "Wikitext": (["wikitext2-valid.txt"], _begun_by(" = [^=]")),
    "code": (["code-python-stdlib.txt"], _paragraphs),
    "chat": (["soda-chat.txt"], _separated),
}
"""Kind of text -> its files, and how a file is cut into documents."""


LEAST_UNSEEN = 600
"""Characters of an unseen document, where it has as many: a beginning to write on from, and a text behind it."""


@dataclass(frozen=True)
class Text:
    """Documents of all corpora."""

    training: list[str]
    unseen: dict[str, list[str]]
    """Of each corpus, documents that nobody is trained on."""


def read_text(folder: Path, unseen_bytes: int) -> Text:
    """Read the corpora in a folder; one whose files are not there is left out.

    Args:
        unseen_bytes: bytes of unseen documents of each corpus, about.

    Raises:
        SystemExit: there is none.
    """
    training: list[str] = []
    unseen: dict[str, list[str]] = {}
    for name, (files, cut) in CORPORA.items():
        contents = [(folder / file).read_text(encoding="utf-8") for file in files if (folder / file).exists()]
        documents = [part.strip() for part in cut("<|endoftext|>".join(contents)) if part.strip()]
        if not documents:
            continue

        # Spread over the corpus, and the first document of each is learned.
        held_out = documents[HELD_OUT - 1 :: HELD_OUT] or documents[-1:]
        training += [document for document in documents if document not in set(held_out)]
        unseen[name] = _cut_to(held_out, unseen_bytes)

    if not training:
        raise SystemExit(f"{folder}: none of the files {', '.join(_files())}; set REAL_MODELS_DIR, or give --data")
    return Text(training, unseen)


def _files() -> list[str]:
    """Return the names of the files of all corpora."""
    return [file for files, _ in CORPORA.values() for file in files]


def _cut_to(documents: list[str], num_bytes: int) -> list[str]:
    """Return the beginnings of documents, equally long, that have so many bytes together, about."""
    share = max(LEAST_UNSEEN, num_bytes // len(documents))
    # Many documents have no room each: some of them, spread evenly.
    stride = math.ceil(len(documents) * share / num_bytes)
    return [document[:share] for document in documents[::stride]]
