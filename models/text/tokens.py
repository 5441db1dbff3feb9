"""The bytes of every token of a tokenizer."""

import functools
import hashlib
import json
from typing import NamedTuple

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from ..validation import expect
from .text_start import start_candidates
from .token_bytes import SpellingRules, is_byte_token, normalisers, pre_tokenizers, text_normalisers, token_bytes

FORMAT = 2
"""Version of the tables on disk and of the windows: a part of every fingerprint."""


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
        text_start: the token that a plain text starts with; None: see `models.text.text_start`.
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
