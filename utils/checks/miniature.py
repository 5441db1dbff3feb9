"""A tiny teacher and a tiny student with different tokenizers, as folders that load like any model's.

For checks of everything that a run consists of, in seconds and without a network. The text is that of Python's
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


@dataclass(frozen=True)
class Miniature:
    """Paths of what `build` wrote, and the texts."""

    student: Path
    teacher: Path
    """Each with config.json and tokenizer, without weights."""
    text: Path
    """The texts as .jsonl with the column "text"."""
    texts: list[str]


def build(folder: Path) -> Miniature:
    """Train the tokenizers and write everything into `folder`; about a second."""
    texts = builtin_texts()
    for role, vocabulary in VOCABULARIES.items():
        quickstart.train_tokenizer(texts, vocabulary).save_pretrained(folder / role)
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.01,
        ).save_pretrained(folder / role)
    text = folder / "documents.jsonl"
    text.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Miniature(folder / "student", folder / "teacher", text, texts)


def builtin_texts() -> list[str]:
    """Docstrings of Python's built-ins: about 130 documents, 45 kB of English."""
    objects = list(vars(builtins).values())
    members = [member for cls in objects if isinstance(cls, type) for member in vars(cls).values()]
    found = dict.fromkeys(inspect.getdoc(item) for item in objects + members)
    return [text for text in found if text and len(text) > 150]


@contextmanager
def cache_in(folder: Path) -> Iterator[None]:
    """Tables that are otherwise kept in the user's cache folder go to `folder`."""
    name = "CURRICULUM_DISTILLATION_CACHE"
    before, os.environ[name] = os.environ.get(name), str(folder)
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({} if before is None else {name: before})
