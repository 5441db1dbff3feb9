"""Map from a teacher's vocabulary to a student's: every teacher token spelt in student tokens.

Two tokenizers have nothing in common but the bytes that their tokens stand for (`TokenTable`). A spelling is a
sequence of student tokens with the bytes of a teacher token.

Shapes: V_T teacher vocabulary, V_S student vocabulary, L longest spelling kept, E edges of the tree of spellings.
"""

import functools
import hashlib
import os
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..validation import expect_count
from .tokens import FORMAT, TokenTable

LONGEST_SPELLING = 32
"""Student tokens kept of one teacher token; later ones have no target (runs of 100 spaces and the like)."""


_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
)
"""Errors that a damaged file, or one of another program, can raise in NumPy's loader."""


@dataclass(frozen=True)
class VocabularyMap:
    """Every teacher token spelt in student tokens, and those spellings in lexicographic order.

    In that order the teacher tokens that begin with a given sequence of student tokens are neighbours: a
    restriction to "what the student has read so far" is a range of ranks. The sequences form a tree whose edges
    (node, student token) are stored as sorted keys; edge i leads to node i + 1, node 0 is the empty sequence.
    """

    segments: np.ndarray
    """[V_T, L] int32 student tokens, padded with -1."""
    order: np.ndarray
    """[V_T] int32 teacher tokens in lexicographic order of their segments."""
    edges: np.ndarray
    """[E] int64 node * student_vocab_size + student token, sorted."""
    node_lo: np.ndarray
    """[E + 1] int32 first rank below the node."""
    node_hi: np.ndarray
    """[E + 1] int32 last rank below the node, plus 1."""
    student_vocab_size: int
    equal_tokenizers: bool = False
    """True if every text has the same ids on both sides."""
    channel_ids: np.ndarray | None = None
    """[V_T, 4] int32 next student token given the teacher's, or -1."""
    channel_probs: np.ndarray | None = None
    """[V_T, 4] float32."""

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

        # Spelling a large vocabulary takes a while, so the next run reads the result.
        file = None
        if cache_dir:
            file = Path(cache_dir) / _cache_name(student, teacher)
            stored = cls._load(file)
            if stored is not None:
                return stored

        built = cls.from_segments(_spell_vocabulary(student, teacher), student.rows)
        built = replace(built, equal_tokenizers=_are_equal(student, teacher))
        if file is not None:
            try:
                built._save(file)
            except OSError as error:
                warnings.warn(f"the vocabulary map is not kept for the next run: {error}", stacklevel=2)
        return built

    @classmethod
    def from_segments(cls, segments: np.ndarray, student_vocab_size: int) -> "VocabularyMap":
        """Return the map for given spellings ([V_T, L], padded with -1)."""
        # lexsort takes the most significant column last; -1 sorts a spelling before those that it begins
        order = np.lexsort(segments.T[::-1])
        tree = _spelling_tree(segments[order].astype(np.int64), student_vocab_size)
        return cls(
            segments=segments.astype(np.int32),
            order=order.astype(np.int32),
            edges=tree.edges,
            node_lo=tree.lo.astype(np.int32),
            node_hi=tree.hi.astype(np.int32),
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
        digest = hashlib.sha256(np.ascontiguousarray(self.segments).tobytes())
        digest.update(f"{self.segments.shape} {self.student_vocab_size} {self.equal_tokenizers}".encode())
        return digest.hexdigest()

    def descend(self, node: np.ndarray, token: np.ndarray) -> np.ndarray:
        """Return the nodes one student token further; -1 where no teacher token continues so (or the node is -1)."""
        parent = node.astype(np.int64)
        key = parent * self.student_vocab_size + token
        edge = np.searchsorted(self.edges, key)

        exists = (node >= 0) & (edge < len(self.edges))
        # indexed by the mask, since a key behind all edges has no entry to compare with
        exists[exists] = self.edges[edge[exists]] == key[exists]
        return np.where(exists, edge + 1, -1)

    def with_channel(
        self,
        pairs: tuple[np.ndarray, np.ndarray],
        width: int = 4,
    ) -> "VocabularyMap":
        """Add P(next student token | teacher token), counted at common boundaries of tokenised text.

        Args:
            pairs: (teacher tokens, student tokens) that begin at the same byte, as in `alignment.paired_tokens`.
            width: entries kept per teacher token; one pseudo-count lies on the first token of its spelling.
        """
        teacher = np.asarray(pairs[0], dtype=np.int64)
        student = np.asarray(pairs[1], dtype=np.int64)

        # Count every pair, and once more the spelling's first token, as one number each.
        spelt = np.flatnonzero(self.segments[:, 0] >= 0)
        teacher = np.concatenate([teacher, spelt])
        student = np.concatenate([student, self.segments[spelt, 0]])
        keys = teacher * self.student_vocab_size + student
        key, count = np.unique(keys, return_counts=True)
        teacher = key // self.student_vocab_size
        student = key % self.student_vocab_size

        # The most frequent student tokens of each teacher token, commonest first.
        best_first = np.lexsort((-count, teacher))
        teacher = teacher[best_first]
        first = np.searchsorted(teacher, teacher)  # entry of the same teacher token
        place = np.arange(len(teacher)) - first
        is_kept = place < width
        entries = (teacher[is_kept], place[is_kept])

        shape = (len(self.segments), width)
        ids = np.full(shape, -1, dtype=np.int32)
        probs = np.zeros(shape, dtype=np.float32)
        ids[entries] = student[best_first][is_kept]
        probs[entries] = count[best_first][is_kept]
        probs /= np.maximum(probs.sum(1, keepdims=True), 1)
        return replace(self, channel_ids=ids, channel_probs=probs)

    def _save(self, file: Path) -> None:
        """Write the map; another process that reads the file meanwhile sees the old one or none."""
        # A map without a channel is stored without its columns.
        file.parent.mkdir(parents=True, exist_ok=True)
        arrays = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                arrays[field.name] = value

        handle, staged = tempfile.mkstemp(dir=file.parent, suffix=".npz")
        with os.fdopen(handle, "wb") as out:
            np.savez(out, **arrays)
        os.replace(staged, file)

    @classmethod
    def _load(cls, file: Path) -> "VocabularyMap | None":
        """Return the stored map, or None where there is none or it cannot be read (it is then built again)."""
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            scalars = {
                "student_vocab_size": int(arrays["student_vocab_size"]),
                "equal_tokenizers": bool(arrays["equal_tokenizers"]),
            }
            return cls(**arrays | scalars)
        except _UNREADABLE:
            return None


def _cache_name(student: TokenTable, teacher: TokenTable) -> str:
    """Return a file name that depends on all that decides the spellings."""
    sizes = [student.rows, teacher.rows]
    key = f"{FORMAT} {student.fingerprint} {teacher.fingerprint} {sizes}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f"vocabulary-{digest[:32]}.npz"


def _are_equal(student: TokenTable, teacher: TokenTable) -> bool:
    return student.text_fingerprint == teacher.text_fingerprint


# ---------------------------------------------------------------- the tree of spellings


class _SpellingTree(NamedTuple):
    """Beginnings of spellings as nodes; edge i leads to node i + 1, node 0 is the empty beginning."""

    edges: np.ndarray
    """[E] keys, sorted."""
    lo: np.ndarray
    """[E + 1] first rank below each node."""
    hi: np.ndarray
    """[E + 1] last rank below each node, plus 1."""


def _spelling_tree(ranked: np.ndarray, student_vocab_size: int) -> _SpellingTree:
    """Build the tree, one level for each student token.

    Args:
        ranked: [V_T, L] int64 spellings in lexicographic order, padded with -1.
        student_vocab_size: V_S.
    """
    edges = []
    lo = [np.array([0])]
    hi = [np.array([len(ranked)])]
    count = 1

    node = np.zeros(len(ranked), dtype=np.int64)  # of each spelling, as far as it is read
    for column in ranked.T:
        rows = np.flatnonzero(column >= 0)
        if not len(rows):
            continue

        # Spellings with the same beginning are neighbours, and share one edge.
        key = node[rows] * student_vocab_size + column[rows]
        first = np.flatnonzero(np.diff(key, prepend=-1))
        last = np.append(first[1:], len(rows))
        edges.append(key[first])
        lo.append(rows[first])
        hi.append(rows[last - 1] + 1)

        edge = np.repeat(np.arange(len(first)), last - first)
        node[rows] = count + edge
        count += len(first)

    no_edges = np.zeros(0, dtype=np.int64)  # NumPy cannot join an empty list
    all_edges = np.concatenate([no_edges, *edges])
    return _SpellingTree(
        edges=all_edges,
        lo=np.concatenate(lo),
        hi=np.concatenate(hi),
    )


# ---------------------------------------------------------------- spellings


def _spell_vocabulary(student: TokenTable, teacher: TokenTable) -> np.ndarray:
    """Spell each teacher token in student tokens.

    A student token with exactly the teacher token's bytes is its spelling (so that equal vocabularies, permuted or
    not, map one to one; among several with the same bytes the one of the same name). Others are spelt by the
    student's own rules. Special tokens have no spelling, but for end of text, unless the tokenizers are equal.

    Returns:
        [V_T, L] padded with -1.
    """
    if _are_equal(student, teacher):
        return _same_ids(student, teacher)

    # Tokens that the student has, too, by their bytes.
    spellings: list[list[int]] = [[] for _ in range(teacher.rows)]
    student_ids = {}
    for token_id, name in enumerate(student.tokens):
        if name is not None:
            student_ids[name] = token_id

    to_spell = []
    for token, data in enumerate(teacher.bytes):
        if data is None:
            continue
        exact = student.by_bytes.get(data)
        namesake = student_ids.get(teacher.tokens[token])
        if namesake is not None and student.bytes[namesake] == data:
            exact = namesake

        if exact is None:
            to_spell.append(token)
        else:
            spellings[token] = [exact]

    # All others, and the end of a text, which is the other's whatever it is called.
    spelt = student.spell([teacher.bytes[token] for token in to_spell])
    for token, ids in zip(to_spell, spelt, strict=True):
        spellings[token] = ids[:LONGEST_SPELLING]
    if teacher.end_of_text is not None and student.end_of_text is not None:
        spellings[teacher.end_of_text] = [student.end_of_text]

    longest = max(map(len, spellings))
    shape = (teacher.rows, max(1, longest))
    segments = np.full(shape, -1, dtype=np.int32)
    for token, ids in enumerate(spellings):
        segments[token, : len(ids)] = ids
    return segments


def _same_ids(student: TokenTable, teacher: TokenTable) -> np.ndarray:
    """Spell every token as itself, unknown and special ones included; an end of text as the student's.

    Returns:
        [V_T, 1] -1 for tokens of another name.
    """
    segments = np.full((teacher.rows, 1), -1, dtype=np.int32)
    # a head with more rows than the other, or a tokenizer with more special tokens, has a rest without a like
    pairs = zip(student.tokens, teacher.tokens, strict=False)
    for token_id, (name, teacher_name) in enumerate(pairs):
        if name is not None and name == teacher_name:
            segments[token_id] = token_id

    if teacher.end_of_text is not None and student.end_of_text is not None:
        segments[teacher.end_of_text] = student.end_of_text
    return segments
