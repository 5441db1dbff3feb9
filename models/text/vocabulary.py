"""Tokens as byte strings, and the map from a teacher's vocabulary to a student's.

Two tokenizers have nothing in common but the bytes they stand for. `TokenTable` knows the bytes of every
token of one tokenizer and where the tokens of a text lie in it; `VocabularyMap` holds, for every teacher
token, the student tokens that spell it.

Shapes: V_T teacher vocabulary, V_S student vocabulary, L longest spelling kept.
"""

import functools
import hashlib
import os
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..validation import expect_count
from .token_bytes import (
    byte_alphabet,
)
from .tokens import END, FORMAT, MARKER, MISMATCH, TEXT, WRITTEN, Reading, TokenTable

__all__ = [
    "END",
    "FORMAT",
    "MARKER",
    "MISMATCH",
    "TEXT",
    "WRITTEN",
    "Reading",
    "TokenTable",
    "VocabularyMap",
    "byte_alphabet",
]

LONGEST_SPELLING = 32
"""Student tokens kept of one teacher token; later ones have no target (runs of 100 spaces and the like)."""


@dataclass(frozen=True)
class VocabularyMap:
    """Every teacher token spelt in student tokens, and those spellings in lexicographic order.

    In that order the teacher tokens that begin with a given sequence of student tokens are neighbours: a
    restriction to "what the student has read so far" is a range of ranks. The sequences form a tree whose edges
    (node, student token) are stored as sorted keys; edge i leads to node i + 1, node 0 is the empty sequence.
    """

    segments: np.ndarray  # [V_T, L] int32 student tokens, padded with -1
    order: np.ndarray  # [V_T] int32 teacher tokens in lexicographic order of their segments
    edges: np.ndarray  # [E] int64 node * student_vocab_size + student token, sorted
    node_lo: np.ndarray  # [E + 1] int32 first rank below the node
    node_hi: np.ndarray  # [E + 1] int32 last rank below the node, plus 1
    student_vocab_size: int
    equal_tokenizers: bool = False  # every text has the same ids on both sides
    channel_ids: np.ndarray | None = None  # [V_T, 4] int32 next student token given the teacher's, or -1
    channel_probs: np.ndarray | None = None  # [V_T, 4] float32

    @classmethod
    def build(
        cls,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_vocab_size: int | None = None,
        teacher_vocab_size: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> "VocabularyMap":
        """Spell the teacher's vocabulary, or read the result from `cache_dir`.

        The vocabulary sizes are those of the models' heads, which may be larger than the tokenizers (Qwen2.5:
        151,936 rows, 151,665 tokens); rows without a token have no spelling. Sizes default to the tokenizers'.

        Raises:
            ValueError: if a tokenizer is not fast, or has tokens that its model has no rows for and a text can yield.
        """
        if student_vocab_size is not None:
            student_vocab_size = expect_count("student_vocab_size", student_vocab_size, 1)
        if teacher_vocab_size is not None:
            teacher_vocab_size = expect_count("teacher_vocab_size", teacher_vocab_size, 1)
        student = TokenTable(student_tokenizer, student_vocab_size, name="the student's tokenizer")
        teacher = TokenTable(teacher_tokenizer, teacher_vocab_size, name="the teacher's tokenizer")
        sizes = [student.rows, teacher.rows]
        key = hashlib.sha256(f"{FORMAT} {student.fingerprint} {teacher.fingerprint} {sizes}".encode()).hexdigest()
        file = Path(cache_dir) / f"vocabulary-{key[:32]}.npz" if cache_dir else None
        if file and (stored := cls._load(file)):
            return stored
        are_equal = student.text_fingerprint == teacher.text_fingerprint
        built = cls.from_segments(_spell_vocabulary(student, teacher), student.rows)
        built = replace(built, equal_tokenizers=are_equal)
        if file:
            try:
                built._save(file)
            except OSError as error:
                warnings.warn(f"the vocabulary map is not kept for the next run: {error}", stacklevel=2)
        return built

    @classmethod
    def from_segments(cls, segments: np.ndarray, student_vocab_size: int) -> "VocabularyMap":
        """The map for given spellings ([V_T, L], padded with -1)."""
        order = np.lexsort(segments.T[::-1])
        ranked = segments[order].astype(np.int64)
        node = np.zeros(len(order), dtype=np.int64)
        edges, lo, hi, nodes = [], [np.array([0])], [np.array([len(order)])], 1
        for column in ranked.T:
            rows = np.flatnonzero(column >= 0)
            key = node[rows] * student_vocab_size + column[rows]
            first = np.flatnonzero(np.diff(key, prepend=-1))
            last = np.append(first[1:], len(rows))
            edges.append(key[first])
            lo.append(rows[first])
            hi.append(rows[last - 1] + 1 if len(rows) else rows)
            node[rows] = nodes + np.repeat(np.arange(len(first)), last - first)
            nodes += len(first)
        return cls(
            segments=segments.astype(np.int32),
            order=order.astype(np.int32),
            edges=np.concatenate(edges) if edges else np.zeros(0, dtype=np.int64),
            node_lo=np.concatenate(lo).astype(np.int32),
            node_hi=np.concatenate(hi).astype(np.int32),
            student_vocab_size=student_vocab_size,
        )

    @functools.cached_property
    def rank(self) -> np.ndarray:
        """[V_T] teacher token -> its place in `order`."""
        rank = np.empty(len(self.order), dtype=np.int64)
        rank[self.order] = np.arange(len(self.order))
        return rank

    @property
    def fingerprint(self) -> str:
        """Hash of all spellings, of both sizes, and of how texts are aligned."""
        spelt = hashlib.sha256(np.ascontiguousarray(self.segments).tobytes())
        spelt.update(f"{self.segments.shape} {self.student_vocab_size} {self.equal_tokenizers}".encode())
        return spelt.hexdigest()

    def descend(self, node: np.ndarray, token: np.ndarray) -> np.ndarray:
        """The nodes one student token further; -1 where no teacher token continues so (or the node is -1)."""
        key = node.astype(np.int64) * self.student_vocab_size + token
        at = np.searchsorted(self.edges, key)
        found = (node >= 0) & (at < len(self.edges))
        found[found] = self.edges[at[found]] == key[found]
        return np.where(found, at + 1, -1)

    def with_channel(self, pairs: tuple[np.ndarray, np.ndarray], width: int = 4) -> "VocabularyMap":
        """Add P(next student token | teacher token), counted at common boundaries of tokenised text.

        Args:
            pairs: (teacher tokens, student tokens) that begin at the same byte, as in `alignment.paired_tokens`.
            width: entries kept per teacher token; one pseudo-count lies on the first token of its spelling.
        """
        teacher, student = (np.asarray(p, dtype=np.int64) for p in pairs)
        spelt = np.flatnonzero(self.segments[:, 0] >= 0)
        keys = np.concatenate([teacher, spelt]) * self.student_vocab_size
        keys += np.concatenate([student, self.segments[spelt, 0]])
        key, count = np.unique(keys, return_counts=True)
        t, s = key // self.student_vocab_size, key % self.student_vocab_size
        best = np.lexsort((-count, t))
        t, s, count = t[best], s[best], count[best]
        place = np.arange(len(t)) - np.searchsorted(t, t)
        t, s, count, place = (a[place < width] for a in (t, s, count, place))
        ids = np.full((len(self.segments), width), -1, dtype=np.int32)
        probs = np.zeros((len(self.segments), width), dtype=np.float32)
        ids[t, place], probs[t, place] = s, count
        probs /= np.maximum(probs.sum(1, keepdims=True), 1)
        return replace(self, channel_ids=ids, channel_probs=probs)

    def _save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        handle, staged = tempfile.mkstemp(dir=file.parent, suffix=".npz")
        with os.fdopen(handle, "wb") as out:
            np.savez(out, **arrays)
        os.replace(staged, file)

    @classmethod
    def _load(cls, file: Path) -> "VocabularyMap | None":
        """The stored map, or None where there is none or it cannot be read (it is then built again)."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            scalars = {
                "student_vocab_size": int(arrays["student_vocab_size"]),
                "equal_tokenizers": bool(arrays["equal_tokenizers"]),
            }
            return cls(**arrays | scalars)
        except (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, MemoryError, zipfile.BadZipFile):
            return None


def _spell_vocabulary(student: TokenTable, teacher: TokenTable) -> np.ndarray:
    """[V_T, L] student tokens of each teacher token.

    A student token with exactly the teacher token's bytes is its spelling (so that equal vocabularies, permuted or
    not, map one to one; among several with the same bytes the one of the same name). Others are spelt by the
    student's own rules. Special tokens have no spelling, but for end of text, unless the tokenizers are equal.
    """
    if student.text_fingerprint == teacher.text_fingerprint:
        return _same_ids(student, teacher)

    spelling: list[list[int]] = [[] for _ in range(teacher.rows)]
    same_name = {name: i for i, name in enumerate(student.tokens) if name is not None}
    to_spell = []
    for t, b in enumerate(teacher.bytes):
        if b is None:
            continue
        twin = same_name.get(teacher.tokens[t])
        exact = twin if twin is not None and student.bytes[twin] == b else student.by_bytes.get(b)
        if exact is not None:
            spelling[t] = [exact]
        else:
            to_spell.append(t)

    for t, ids in zip(to_spell, student.spell([teacher.bytes[t] for t in to_spell]), strict=True):
        spelling[t] = ids[:LONGEST_SPELLING]
    if teacher.end_of_text is not None and student.end_of_text is not None:
        spelling[teacher.end_of_text] = [student.end_of_text]

    segments = np.full((teacher.rows, max(1, max(map(len, spelling)))), -1, dtype=np.int32)
    for t, ids in enumerate(spelling):
        segments[t, : len(ids)] = ids
    return segments


def _same_ids(student: TokenTable, teacher: TokenTable) -> np.ndarray:
    """[V_T, 1] every token as itself, unknown and special ones included; an end of text as the student's."""
    segments = np.full((teacher.rows, 1), -1, dtype=np.int32)
    for i, (own, other) in enumerate(zip(student.tokens, teacher.tokens, strict=False)):
        if own is not None and own == other:
            segments[i] = i
    if teacher.end_of_text is not None and student.end_of_text is not None:
        segments[teacher.end_of_text] = student.end_of_text
    return segments
