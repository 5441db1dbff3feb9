"""A tiny teacher and a tiny student with different tokenizers, as folders that load like any model's.

They serve checks of everything that a run consists of, in seconds and without a network. The text is that of Python's
own built-ins.
"""

import builtins
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from ..run import quickstart

CONTEXT = 64
"""Tokens that either model reads at once."""
VOCABULARIES = {"student": 320, "teacher": 512}
LEAST_CHARACTERS = 150
"""Docstrings that are not longer than this are left out."""


@dataclass(frozen=True)
class Miniature:
    """Paths of the files that `build` wrote, and the texts."""

    student: Path
    """Folder with config.json and tokenizer, without weights."""
    teacher: Path
    """The same of the teacher."""
    text: Path
    """The texts as .jsonl with the column "text"."""
    texts: list[str]


def build(folder: Path) -> Miniature:
    """Train the tokenizers and write everything into `folder`; about a second."""
    texts = builtin_texts()
    for role, vocabulary in VOCABULARIES.items():
        quickstart.train_tokenizer(texts, vocabulary).save_pretrained(folder / role)
        _config(vocabulary).save_pretrained(folder / role)

    file = folder / "documents.jsonl"
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    file.write_text("".join(lines), encoding="utf-8")
    return Miniature(folder / "student", folder / "teacher", file, texts)


def _config(vocabulary: int) -> LlamaConfig:
    """Return the configuration of both models; small initial weights make the first loss close to ln V."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.01,
    )


def builtin_texts() -> list[str]:
    """Return the docstrings of Python's built-ins: about 130 documents, 45 kB of English."""
    objects = list(vars(builtins).values())
    classes = [item for item in objects if isinstance(item, type)]
    members = [member for cls in classes for member in vars(cls).values()]

    # Subclasses inherit docstrings, so every text is taken once.
    texts = dict.fromkeys(inspect.getdoc(item) for item in objects + members)
    return [text for text in texts if text and len(text) > LEAST_CHARACTERS]


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Keep tables in `folder` that otherwise go into the user's cache folder."""
    name = "CURRICULUM_DISTILLATION_CACHE"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
