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
import re
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Version of the tables on disk and of the windows: a part of every fingerprint."""
LONGEST_SPELLING = 32
"""Student tokens kept of one teacher token; later ones have no target (runs of 100 spaces and the like)."""
MARKER, TEXT, MISMATCH, END, WRITTEN = 0, 1, 2, 3, 4
"""Roles of a token in a window: not supervised (start marker, context); text; text whose bytes are not the
token's (normaliser, unknown token); end of text; markup of a chat template that the model has to write itself, which
is learned but is no text that the other model reads."""

# Normalisers that change the text itself, unlike those that only mark spaces.
_TEXT_NORMALISERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled")


class Reading(NamedTuple):
    """One tokenizer's reading of a text: token i is `ids[i]` and covers bytes [starts[i], ends[i])."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    roles: np.ndarray

    def part(self, lo: int, hi: int) -> "Reading":
        return Reading(*(column[lo:hi] for column in self))


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _components(part: dict | None, key: str) -> list[dict]:
    """A tokenizer component as a flat list: a `Sequence` is opened, None is empty."""
    if part is None:
        return []
    return [leaf for item in part[key] for leaf in _components(item, key)] if part["type"] == "Sequence" else [part]


class TokenTable:
    """The bytes of every token of a fast tokenizer, and text -> `Reading`.

    Works on a private copy of the tokenizer: no truncation, no padding, no template, and special tokens
    written in a text are text.

    Raises:
        ValueError: for a tokenizer without a fast (Rust) backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(
                f"got the slow tokenizer {type(tokenizer).__name__}, expected a fast one (with a tokenizer.json); "
                "load it with AutoTokenizer.from_pretrained(..., use_fast=True) or convert it"
            )
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
        spec["truncation"] = spec["padding"] = None
        self.spec = spec
        self.end_of_text: int | None = tokenizer.eos_token_id
        self.start_marker: int | None = self._find_start_marker(tokenizer)
        self.bytes: list[bytes | None] = self._token_bytes(spec)
        for i in (self.end_of_text, self.start_marker):
            if i is not None and i < len(self.bytes):
                self.bytes[i] = None
        self.tokens: list[str | None] = [None] * len(self.bytes)
        for token, i in tokenizer.get_vocab().items():
            self.tokens[i] = token
        roles = json.dumps([FORMAT, self.end_of_text, self.start_marker])
        self.fingerprint = hashlib.sha256((json.dumps(spec, sort_keys=True) + roles).encode()).hexdigest()

    def __getstate__(self) -> dict:
        cached = ("_backend", "_framing", "_lengths", "_normalisers", "by_bytes")
        return {k: v for k, v in self.__dict__.items() if k not in cached}

    @staticmethod
    def _find_start_marker(tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The token a text begins with: bos where the tokenizer adds it or has no other end of text, else the end of
        the text before."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        added = tokenizer("")["input_ids"]
        return bos if bos is not None and (added[:1] == [bos] or eos is None) else eos

    @staticmethod
    def _token_bytes(spec: dict) -> list[bytes | None]:
        model = spec["model"]
        vocab = model["vocab"]
        if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        added = {t["id"]: t for t in spec["added_tokens"]}
        table: list[bytes | None] = [None] * (1 + max([*vocab.values(), *added], default=-1))
        decoders = {d["type"]: d for d in _components(spec["decoder"], "decoders")}
        pre = {p["type"]: p for p in _components(spec["pre_tokenizer"], "pretokenizers")}
        alphabet = byte_alphabet()
        marker = (decoders.get("Metaspace") or pre.get("Metaspace") or {}).get("replacement", "\u2581")
        for token, i in vocab.items():
            if "ByteLevel" in decoders or "ByteLevel" in pre:
                # a character outside the alphabet can only come from an added token
                known = all(c in alphabet for c in token)
                table[i] = bytes(alphabet[c] for c in token) if known else token.encode("utf-8", "replace")
            elif "ByteFallback" in decoders and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
                table[i] = bytes([int(byte[1], 16)])
            elif model["type"] == "WordPiece":
                prefix = model.get("continuing_subword_prefix", "##")
                inside = token.startswith(prefix) and len(token) > len(prefix)
                word = token[len(prefix) :] if inside else (" " + token if token[:1].isalnum() else token)
                table[i] = word.encode("utf-8", "replace")
            else:
                table[i] = token.replace(marker, " ").encode("utf-8", "replace")
        for unknown in (vocab.get(model.get("unk_token")), model.get("unk_id")):  # Unigram has the number
            if unknown is not None:
                table[unknown] = None
        for i, token in added.items():
            table[i] = None if token["special"] else token["content"].encode("utf-8", "replace")
        return [b or None for b in table]

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
        return bool(re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", self.tokens[i] or ""))

    @functools.cached_property
    def _normalisers(self) -> list:
        found = [n for n in _components(self.spec["normalizer"], "normalizers") if n["type"] in _TEXT_NORMALISERS]
        # a tokenizer is the library's own loader for a serialised normaliser
        empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
        return [tokenizers.Tokenizer.from_str(json.dumps(empty | {"normalizer": n})).normalizer for n in found]

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
        starts, ends, roles, here = [], [], [], 0
        for n, (i, (lo, hi)) in enumerate(zip(ids, offsets, strict=True)):
            token, lo, hi = self.bytes[i], int(at_byte[lo]), int(at_byte[hi])
            if token and data.startswith(token, here):
                start, end, role = here, here + len(token), TEXT
            elif token and n == 0 and token[:1] == b" " and data.startswith(token[1:]):
                start, end, role = -1, len(token) - 1, TEXT
            elif token and lo >= here and data.startswith(token, lo):
                start, end, role = lo, lo + len(token), TEXT
            else:
                start, end, role = here, max(here, hi), MISMATCH
            starts.append(start), ends.append(end), roles.append(role)
            here = end
        columns = (np.array(c, dtype=np.int64) for c in (ids, starts, ends))
        return Reading(*columns, np.array(roles, dtype=np.int8))

    def spell(self, pieces: list[bytes]) -> list[list[int]]:
        """Token ids for byte strings in the middle of a text.

        By the tokenizer's own rules where these spell the bytes; by longest match over bytes elsewhere
        (not valid UTF-8, bytes it drops). Stops at a byte that no token covers.
        """
        spec = self.spec | {"post_processor": None, "added_tokens": []}
        kept = [n for n in _components(spec["normalizer"], "normalizers") if n["type"] != "Prepend"]
        spec["normalizer"] = {"type": "Sequence", "normalizers": kept}
        pre = [dict(p) for p in _components(spec["pre_tokenizer"], "pretokenizers")]
        for part in pre:
            part.update({"prepend_scheme": "never"} if part["type"] == "Metaspace" else {})
            part.update({"add_prefix_space": False} if "add_prefix_space" in part else {})
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre} if pre else None
        inside = tokenizers.Tokenizer.from_str(json.dumps(spec))
        encodings = inside.encode_batch_fast([p.decode("utf-8", "replace") for p in pieces], add_special_tokens=False)
        spelt = [e.ids for e in encodings]
        for n, (piece, ids) in enumerate(zip(pieces, spelt, strict=True)):
            if b"".join([self.bytes[i] or b"" for i in ids]) != piece:
                spelt[n] = self._longest_match(piece)
        return spelt

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
            ValueError: if a tokenizer is not fast or has more tokens than its model has rows.
        """
        student, teacher = TokenTable(student_tokenizer), TokenTable(teacher_tokenizer)
        sizes = []
        for name, table, size in (("student", student, student_vocab_size), ("teacher", teacher, teacher_vocab_size)):
            sizes.append(len(table.bytes) if size is None else size)
            if sizes[-1] < len(table.bytes):
                raise ValueError(
                    f"the {name}'s tokenizer has {len(table.bytes):,} tokens but its model only {size:,} rows: "
                    "got a tokenizer of another model? expected at most as many tokens as rows"
                )
        key = hashlib.sha256(f"{FORMAT} {student.fingerprint} {teacher.fingerprint} {sizes}".encode()).hexdigest()
        file = Path(cache_dir) / f"vocabulary-{key[:32]}.npz" if cache_dir else None
        if file and (stored := cls._load(file)):
            return stored
        built = cls.from_segments(_spell_vocabulary(student, teacher, sizes[1]), sizes[0])
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
        """Hash of all spellings and of both sizes."""
        spelt = hashlib.sha256(np.ascontiguousarray(self.segments).tobytes())
        spelt.update(f"{self.segments.shape} {self.student_vocab_size}".encode())
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
            return cls(**arrays | {"student_vocab_size": int(arrays["student_vocab_size"])})
        except (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, MemoryError, zipfile.BadZipFile):
            return None


def _spell_vocabulary(student: TokenTable, teacher: TokenTable, teacher_vocab_size: int) -> np.ndarray:
    """[V_T, L] student tokens of each teacher token.

    A student token with exactly the teacher token's bytes is its spelling (so that equal vocabularies, permuted or
    not, map one to one; among several with the same bytes the one of the same name). Others are spelt by the
    student's own rules. Special tokens have no spelling, but for end of text, unless the tokenizers are equal.
    """
    spelling: list[list[int]] = [[] for _ in range(teacher_vocab_size)]
    if student.fingerprint == teacher.fingerprint:  # special tokens included
        ids = np.arange(teacher_vocab_size, dtype=np.int32)
        return np.where(ids < len(teacher.bytes), ids, np.int32(-1))[:, None]
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
    segments = np.full((teacher_vocab_size, max(1, max(map(len, spelling)))), -1, dtype=np.int32)
    for t, ids in enumerate(spelling):
        segments[t, : len(ids)] = ids
    return segments
