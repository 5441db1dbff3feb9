"""Tokens as byte strings, and the map from a teacher's vocabulary to a student's.

Two tokenizers have nothing in common but the bytes they stand for. `TokenTable` knows the bytes of every
token of one tokenizer and where the tokens of a text lie in it; `VocabularyMap` holds, for every teacher
token, the student tokens that spell it.

Shapes: V_T teacher vocabulary, V_S student vocabulary, L longest spelling kept.
"""

import functools
import hashlib
import json
import os
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from ..validation import expect, expect_count
from .text_start import start_candidates
from .token_bytes import (
    SpellingRules,
    byte_alphabet,
    is_byte_token,
    normalisers,
    pre_tokenizers,
    text_normalisers,
    token_bytes,
)

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

FORMAT = 2
"""Version of the tables on disk and of the windows: a part of every fingerprint."""
LONGEST_SPELLING = 32
"""Student tokens kept of one teacher token; later ones have no target (runs of 100 spaces and the like)."""
MARKER, TEXT, MISMATCH, END, WRITTEN = 0, 1, 2, 3, 4
"""Roles of a token in a window: not supervised (start marker, context); text; text whose bytes are not the
token's (normaliser, unknown token); end of text; markup of a chat template that the model has to write itself, which
is learned but is no text that the other model reads."""


class Reading(NamedTuple):
    """One tokenizer's reading of a text: token i is `ids[i]` and covers bytes [starts[i], ends[i])."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    roles: np.ndarray

    def part(self, lo: int, hi: int) -> "Reading":
        return Reading(*(column[lo:hi] for column in self))


class TokenTable:
    """The bytes of every token of a fast tokenizer, and text -> `Reading`.

    Works on a private copy of the tokenizer: no truncation, no padding, no template, and special tokens
    written in a text are text.

    Args:
        tokenizer: of a model.
        rows: of the model's head. Special tokens beyond them are left out: no text yields them, and the model cannot
            read or write them. None: every token has a row.
        text_start: the token that a plain text starts with; None: see `models.text_start`.
        name: what errors call the tokenizer.

    Raises:
        ValueError: for a tokenizer without a fast (Rust) backend; for a token beyond the rows that a text can yield or
            that ends one; for a `text_start` that does not exist.
        TypeError: for something else.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: int | None = None,
        text_start: str | None = None,
        *,
        name: str = "the tokenizer",
    ) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            expect("tokenizer", tokenizer, PreTrainedTokenizerBase, "what AutoTokenizer.from_pretrained returns")
            raise ValueError(
                f"got the slow tokenizer {type(tokenizer).__name__}, expected a fast one (with a tokenizer.json); "
                "load it with AutoTokenizer.from_pretrained(..., use_fast=True) or convert it"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["truncation"] = spec["padding"] = None
        if "dropout" in spec["model"]:
            spec["model"]["dropout"] = None  # a text is read in the same way every time

        self.spec = spec
        self.rules = SpellingRules.of(spec)
        self.end_of_text: int | None = tokenizer.eos_token_id
        self.start_candidates = start_candidates(tokenizer, rows, chosen=text_start, name=name)
        """Tokens that a plain text could start with, the one that it does start with first."""
        self.start_marker: int | None = next(iter(self.start_candidates), None)

        self.bytes: list[bytes | None] = token_bytes(spec, self.rules)
        markers = [self.end_of_text] if text_start is not None else [self.end_of_text, self.start_marker]
        for i in markers:
            if i is not None and i < len(self.bytes):
                self.bytes[i] = None
        self.tokens: list[str | None] = [None] * len(self.bytes)
        for token, i in tokenizer.get_vocab().items():
            self.tokens[i] = token

        self.rows = len(self.bytes) if rows is None else rows
        self.beyond_rows: list[str] = self._leave_out_beyond_rows(name)
        """Special tokens that the model has no row for."""

        roles = json.dumps([FORMAT, self.end_of_text, self.start_marker])
        self.fingerprint = hashlib.sha256((json.dumps(spec, sort_keys=True) + roles).encode()).hexdigest()

    def __getstate__(self) -> dict:
        cached = ("_backend", "_framing", "_lengths", "_normalisers", "by_bytes")
        return {k: v for k, v in self.__dict__.items() if k not in cached}

    def _leave_out_beyond_rows(self, name: str) -> list[str]:
        """Cut the tables to the model's rows, and return the special tokens that are cut off."""
        beyond = {i: token for i, token in enumerate(self.tokens) if token is not None and i >= self.rows}
        special = {token["id"] for token in self.spec["added_tokens"] if token["special"]}
        ordinary = [token for i, token in beyond.items() if i not in special]
        if ordinary:
            raise ValueError(
                f"{name} has {len(self.bytes):,} tokens but its model only {self.rows:,} rows: got a tokenizer of "
                "another model, or are student and teacher swapped? expected at most as many tokens as rows, special "
                f"ones aside; a text can yield {ordinary[0]!r}"
            )
        if self.end_of_text in beyond:
            raise ValueError(
                f"{name} ends a text with {beyond[self.end_of_text]!r}, token {self.end_of_text:,}, but its model "
                f"has only {self.rows:,} rows and can neither read nor write it: set another eos_token in "
                "tokenizer_config.json, or give the model a row for it with resize_token_embeddings"
            )
        del self.bytes[self.rows :], self.tokens[self.rows :]
        return list(beyond.values())

    @functools.cached_property
    def text_fingerprint(self) -> str:
        """Hash of all that decides which ids a text has: equal ones mean equal ids for every text.

        Special tokens do not count, because in a text they are text.
        """
        ordinary = [token for token in self.spec["added_tokens"] if not token["special"]]
        decisive = {name: self.spec[name] for name in ("normalizer", "pre_tokenizer", "model")}
        described = json.dumps(decisive | {"added_tokens": ordinary}, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(json.dumps(self.spec | {"post_processor": None}))
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return np.array([len(b or b"") for b in self.bytes], dtype=np.int64)

    @functools.cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> token. Where several tokens have the same bytes, the tokenizer's own choice."""
        table: dict[bytes, int] = {}
        for i, b in enumerate(self.bytes):
            if b is not None and (b not in table or self._is_byte_token(table[b])):
                table[b] = i
        return table

    def _is_byte_token(self, i: int) -> bool:
        return is_byte_token(self.tokens[i] or "") is not None

    @functools.cached_property
    def _normalisers(self) -> list:
        return text_normalisers(self.spec)

    def normalise(self, text: str) -> str:
        """The text after the tokenizer's normaliser (NFC and the like; marks for spaces are left out)."""
        for normaliser in self._normalisers:
            text = normaliser.normalize_str(text)
        return text

    def read(self, texts: list[str]) -> list[Reading]:
        """Tokenise texts and locate every token in the text's UTF-8 bytes.

        A space that the tokenizer puts before the text lies at byte -1.
        """
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self.place(text, encoding.ids) for text, encoding in zip(texts, encodings, strict=True)]

    @functools.cached_property
    def _framing(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
        backend.encode_special_tokens = True
        return backend

    def framed(self, text: str) -> np.ndarray:
        """Ids of a text with the special tokens that the tokenizer puts around it; those written in it are text."""
        return np.array(self._framing.encode(text).ids, dtype=np.int32)

    def place(self, text: str, ids: list[int], offsets: list[tuple[int, int]] | None = None) -> Reading:
        """Locate the tokens of a text in its UTF-8 bytes.

        Args:
            offsets: first character and end of every token, for tokens that do not spell the text; None: the text
                alone is tokenised again to know them.
        """
        tokens, data = np.array(ids, dtype=np.int64), text.encode()
        spelt = b"".join([self.bytes[i] or b"" for i in ids])
        if spelt != data and spelt != b" " + data:
            return self._locate(text, data, ids, offsets)
        lengths = self._lengths[tokens]
        ends = np.cumsum(lengths) - (len(spelt) - len(data))
        return Reading(tokens, ends - lengths, ends, np.where(lengths > 0, TEXT, MISMATCH).astype(np.int8))

    def _locate(self, text: str, data: bytes, ids: list[int], offsets: list[tuple[int, int]] | None) -> Reading:
        """Token by token, where the tokens do not spell the text; resumes where the tokenizer's offsets say."""
        if offsets is None:
            offsets = self._backend.encode(text, add_special_tokens=False).offsets
        at_byte = np.cumsum([0, *(len(c.encode()) for c in text)])

        starts, ends, roles = [], [], []
        here = 0
        for n, (i, (lo, hi)) in enumerate(zip(ids, offsets, strict=True)):
            token = self.bytes[i]
            place = self._place_of(token, data, here, int(at_byte[lo]))
            if place is None and n == 0 and token and token[:1] == b" " and data.startswith(token[1:]):
                place = (-1, len(token) - 1)

            role = TEXT
            if place is None:
                place, role = (here, max(here, int(at_byte[hi]))), MISMATCH
            starts.append(place[0])
            ends.append(place[1])
            roles.append(role)
            here = place[1]

        columns = (np.array(c, dtype=np.int64) for c in (ids, starts, ends))
        return Reading(*columns, np.array(roles, dtype=np.int8))

    def _place_of(self, token: bytes | None, data: bytes, here: int, begin: int) -> tuple[int, int] | None:
        """First byte and end of a token in a text that was read up to `here`, or None where it has other bytes.

        Args:
            begin: the byte where the tokenizer says that the token begins.
        """
        if not token:
            return None
        if (end := self._end_of(token, data, here)) is not None:
            return here, end
        if begin < here:
            return None
        before = begin - 1
        if self.rules.drops_spaces and before >= here and data[before : before + 1] == b" ":
            begin = before  # the space before a word belongs to it, as in tokenizers that write spaces
        if (end := self._end_of(token, data, begin)) is not None:
            return begin, end
        return None

    def _end_of(self, token: bytes, data: bytes, begin: int) -> int | None:
        """Where a token ends that begins at a byte of a text; None where the text goes on otherwise.

        Where a tokenizer hides spaces, a token may have a space more or less in front than the text has.
        """
        if data.startswith(token, begin):
            return begin + len(token)
        if not self.rules.hides_spaces:
            return None
        if token[:1] == b" ":
            bare = token[1:]
            return begin + len(bare) if bare and data.startswith(bare, begin) else None
        spaced = b" " + token
        return begin + len(spaced) if data.startswith(spaced, begin) else None

    def spelt(self, reading: Reading) -> np.ndarray:
        """[N] bytes of the text that each token itself says: 0 for markers, ends, and tokens with other bytes.

        A space that was dropped without a mark, for example, lies in the token behind it, which does not say it.
        """
        said = np.minimum(reading.ends - reading.starts, self._lengths[reading.ids])
        return np.where(reading.roles == TEXT, said, 0)

    def spell(self, pieces: list[bytes]) -> list[list[int]]:
        """Token ids for byte strings in the middle of a text.

        By the tokenizer's own rules where these spell the bytes; by longest match over bytes elsewhere
        (not valid UTF-8, bytes it drops). Stops at a byte that no token covers.
        """
        texts = [piece.decode("utf-8", "replace") for piece in pieces]
        encodings = self._without_edges().encode_batch_fast(texts, add_special_tokens=False)
        spellings = []
        for piece, encoding in zip(pieces, encodings, strict=True):
            ids = encoding.ids
            if b"".join([self.bytes[i] or b"" for i in ids]) != piece and not self._covers(ids, piece):
                ids = self._longest_match(piece)
            spellings.append(ids)
        return spellings

    def _without_edges(self) -> tokenizers.Tokenizer:
        """The tokenizer without what it does to the begin and the end of a text only."""
        spec = self.spec | {"post_processor": None, "added_tokens": []}
        inside = [part for part in normalisers(spec) if part["type"] not in ("Prepend", "Strip")]
        spec["normalizer"] = {"type": "Sequence", "normalizers": inside}

        pre = [dict(part) for part in pre_tokenizers(spec)]
        for part in pre:
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
            if "add_prefix_space" in part:
                part["add_prefix_space"] = False
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre} if pre else None
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    def _covers(self, ids: list[int], piece: bytes) -> bool:
        """Whether tokens cover a piece, spaces included that such a tokenizer hides in them."""
        if not self.rules.hides_spaces:
            return False
        here = 0
        for i in ids:
            end = self._end_of(self.bytes[i], piece, here) if self.bytes[i] else None
            if end is None:
                return False
            here = end
        return here == len(piece)

    @functools.cached_property
    def _longest(self) -> int:
        return max(map(len, self.by_bytes), default=0)

    def _longest_match(self, piece: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(piece):
            ends = range(min(len(piece), at + self._longest), at, -1)
            end = next((e for e in ends if piece[at:e] in self.by_bytes), None)
            if end is None:
                break
            ids.append(self.by_bytes[piece[at:end]])
            at = end
        return ids


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
