"""Tables of a tokenizer's tokens as byte strings, and the tokens of a text with the bytes that each covers.

Shapes: N tokens of a text.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

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

    def part(self, begin: int, end: int) -> "Reading":
        """Return the tokens from `begin` up to, and without, `end`."""
        return self.select(slice(begin, end))

    def select(self, tokens: np.ndarray | slice) -> "Reading":
        """Return the tokens of these indices, or where a mask is true."""
        return Reading(
            ids=self.ids[tokens],
            starts=self.starts[tokens],
            ends=self.ends[tokens],
            roles=self.roles[tokens],
        )

    def shifted(self, count: int) -> "Reading":
        """Return the same tokens, `count` bytes further on."""
        return self._replace(starts=self.starts + count, ends=self.ends + count)

    def with_end(self, token: int, byte: int) -> "Reading":
        """Return the same tokens and behind them an end of text or turn, which is one pseudo-byte at `byte`."""
        return Reading(
            ids=np.append(self.ids, token),
            starts=np.append(self.starts, byte),
            ends=np.append(self.ends, byte + 1),
            roles=np.append(self.roles, END),
        )

    @staticmethod
    def joined(readings: Sequence["Reading"]) -> "Reading":
        """Return the tokens of all readings, one after another."""
        return Reading(
            ids=np.concatenate([reading.ids for reading in readings]),
            starts=np.concatenate([reading.starts for reading in readings]),
            ends=np.concatenate([reading.ends for reading in readings]),
            roles=np.concatenate([reading.roles for reading in readings]),
        )


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
        self.spec = _specification(tokenizer)
        """The tokenizer as the tokenizers library serialises it."""
        self.rules = SpellingRules.of(self.spec)

        self.end_of_text: int | None = tokenizer.eos_token_id
        self.start_candidates = start_candidates(
            tokenizer,
            rows,
            chosen=text_start,
            name=name,
        )
        """Tokens that a plain text could start with, the one that it does start with first."""
        self.start_marker: int | None = next(iter(self.start_candidates), None)

        # Markers are no text, even where the tokenizer does not call them special. A start that the user chose may be
        # an ordinary token, which stays one.
        self.bytes: list[bytes | None] = token_bytes(self.spec, self.rules)
        markers = [self.end_of_text]
        if text_start is None:
            markers.append(self.start_marker)
        for token_id in markers:
            if token_id is not None and token_id < len(self.bytes):
                self.bytes[token_id] = None

        # The names by which a token of one tokenizer is found among equal ones of the other.
        self.tokens: list[str | None] = [None] * len(self.bytes)
        for token, token_id in tokenizer.get_vocab().items():
            self.tokens[token_id] = token

        self.rows = len(self.bytes) if rows is None else rows
        self.beyond_rows: list[str] = self._leave_out_beyond_rows(name)
        """Special tokens that the model has no row for."""

        roles = json.dumps([FORMAT, self.end_of_text, self.start_marker])
        described = json.dumps(self.spec, sort_keys=True) + roles
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        # Cached values are left behind; a process that receives the table makes them again.
        cached = ("_backend", "_framing", "_lengths", "_normalisers", "by_bytes")
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    def _leave_out_beyond_rows(self, name: str) -> list[str]:
        """Cut the tables to the model's rows, and return the special tokens that are cut off."""
        special = {token["id"] for token in self.spec["added_tokens"] if token["special"]}
        beyond: dict[int, str] = {}
        for token_id, token in enumerate(self.tokens):
            if token is not None and token_id >= self.rows:
                beyond[token_id] = token
        ordinary = [token for token_id, token in beyond.items() if token_id not in special]

        if ordinary:
            raise ValueError(
                f"{name} has {len(self.bytes):,} tokens but its model only {self.rows:,} rows: got a tokenizer of "
                "another model, or are student and teacher swapped? expected at most as many tokens as rows, special "
                f"ones aside; a text can yield {ordinary[0]!r}"
            )
        # An end of text is special, but every window has one.
        if self.end_of_text in beyond:
            raise ValueError(
                f"{name} ends a text with {beyond[self.end_of_text]!r}, token {self.end_of_text:,}, but its model "
                f"has only {self.rows:,} rows and can neither read nor write it: set another eos_token in "
                "tokenizer_config.json, or give the model a row for it with resize_token_embeddings"
            )

        del self.bytes[self.rows :]
        del self.tokens[self.rows :]
        return list(beyond.values())

    @functools.cached_property
    def text_fingerprint(self) -> str:
        """Hash of all that decides which ids a text has: equal ones mean equal ids for every text.

        Special tokens do not count, because in a text they are text.
        """
        # A decoder, a post-processor or a special token does not change how plain text is cut.
        decisive = {name: self.spec[name] for name in ("normalizer", "pre_tokenizer", "model")}
        decisive["added_tokens"] = [token for token in self.spec["added_tokens"] if not token["special"]]
        described = json.dumps(decisive, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()

    @functools.cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Bytes -> token. Where several tokens have the same bytes, the tokenizer's own choice."""
        table: dict[bytes, int] = {}
        for token_id, data in enumerate(self.bytes):
            if data is None:
                continue
            # a byte token such as <0x41> gives way: a tokenizer writes it only for bytes that it has no other token for
            if data not in table or self._is_byte_token(table[data]):
                table[data] = token_id
        return table

    def _is_byte_token(self, token_id: int) -> bool:
        return is_byte_token(self.tokens[token_id] or "") is not None

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        """Bytes of each token; 0 for tokens that are no text."""
        return np.array([len(data or b"") for data in self.bytes], dtype=np.int64)

    # ------------------------------------------------------------ text -> tokens

    @functools.cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        """The tokenizer of text alone: nothing is put around it, and special tokens written in it are text."""
        spec = self.spec | {"post_processor": None}
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _framing(self) -> tokenizers.Tokenizer:
        """The tokenizer with the special tokens that it puts around a text."""
        backend = tokenizers.Tokenizer.from_str(json.dumps(self.spec))
        backend.encode_special_tokens = True
        return backend

    @functools.cached_property
    def _normalisers(self) -> list[tokenizers.normalizers.Normalizer]:
        return text_normalisers(self.spec)

    def normalise(self, text: str) -> str:
        """Return the text after the tokenizer's normaliser (NFC and the like; marks for spaces are left out)."""
        for normaliser in self._normalisers:
            text = normaliser.normalize_str(text)
        return text

    def framed(self, text: str) -> np.ndarray:
        """Return the ids of a text with the special tokens that the tokenizer puts around it.

        Special tokens written in the text are text.
        """
        encoding = self._framing.encode(text)
        return np.array(encoding.ids, dtype=np.int32)

    def read(self, texts: list[str]) -> list[Reading]:
        """Tokenise texts and locate every token in the text's UTF-8 bytes.

        A space that the tokenizer puts before the text lies at byte -1.
        """
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        readings = []
        for text, encoding in zip(texts, encodings, strict=True):
            readings.append(self.place(text, encoding.ids))
        return readings

    # ------------------------------------------------------------ tokens -> bytes of the text

    def place(
        self,
        text: str,
        ids: list[int],
        offsets: list[tuple[int, int]] | None = None,
    ) -> Reading:
        """Locate the tokens of a text in its UTF-8 bytes.

        Args:
            text: the text that was tokenised.
            ids: its tokens.
            offsets: first character and end of every token, for tokens that do not spell the text; None: the text
                alone is tokenised again to know them.
        """
        data = text.encode()
        spelt = self._join(ids)
        if spelt != data and spelt != b" " + data:
            return self._locate(text, ids, offsets)

        # The usual case: the tokens' bytes, one after another, are the text, perhaps behind a space.
        tokens = np.array(ids, dtype=np.int64)
        lengths = self._lengths[tokens]
        space = len(spelt) - len(data)
        ends = np.cumsum(lengths) - space
        roles = np.where(lengths > 0, TEXT, MISMATCH).astype(np.int8)
        return Reading(
            ids=tokens,
            starts=ends - lengths,
            ends=ends,
            roles=roles,
        )

    def _join(self, ids: Sequence[int]) -> bytes:
        return b"".join([self.bytes[token_id] or b"" for token_id in ids])

    def _locate(
        self,
        text: str,
        ids: list[int],
        offsets: list[tuple[int, int]] | None,
    ) -> Reading:
        """Locate token by token, where the tokens do not spell the text; resume where the tokenizer's offsets say."""
        if offsets is None:
            offsets = self._backend.encode(text, add_special_tokens=False).offsets
        # The tokenizer's offsets count characters, a reading counts bytes.
        data = text.encode()
        sizes = [len(character.encode()) for character in text]
        byte_of = np.cumsum([0, *sizes])

        spans = []
        roles = []
        position = 0  # the byte up to which the text is read
        for number, (token_id, (first, last)) in enumerate(zip(ids, offsets, strict=True)):
            token = self.bytes[token_id]
            span = self._span_of(token, data, position, begin=int(byte_of[first]))
            role = TEXT
            if span is None and number == 0:
                span = _span_behind_space(token, data)
            if span is None:
                span = (position, max(position, int(byte_of[last])))
                role = MISMATCH

            spans.append(span)
            roles.append(role)
            position = span[1]

        return Reading(
            ids=np.array(ids, dtype=np.int64),
            starts=np.array([begin for begin, _ in spans], dtype=np.int64),
            ends=np.array([end for _, end in spans], dtype=np.int64),
            roles=np.array(roles, dtype=np.int8),
        )

    def _span_of(
        self,
        token: bytes | None,
        data: bytes,
        position: int,
        *,
        begin: int,
    ) -> tuple[int, int] | None:
        """Return first byte and end of a token in a text, or None where the text has other bytes there.

        Args:
            token: its bytes.
            data: the text.
            position: the byte up to which the text was read.
            begin: the byte where the tokenizer says that the token begins.
        """
        if not token:
            return None

        # Most tokens begin where the one before ends.
        end = self._end_of(token, data, position)
        if end is not None:
            return position, end

        # The text has bytes that no token says: go on where the tokenizer does.
        if begin < position:
            return None
        space = begin - 1
        if self.rules.drops_spaces and space >= position and data[space:begin] == b" ":
            begin = space  # the space before a word belongs to it, as in tokenizers that write spaces
        end = self._end_of(token, data, begin)
        return None if end is None else (begin, end)

    def _end_of(
        self,
        token: bytes,
        data: bytes,
        begin: int,
    ) -> int | None:
        """Return the end of a token that begins at a byte of a text; None where the text goes on otherwise.

        Where a tokenizer hides spaces, a token may have a space more or less in front than the text has.
        """
        if data.startswith(token, begin):
            return begin + len(token)
        if not self.rules.hides_spaces:
            return None

        variant = token[1:] if token[:1] == b" " else b" " + token
        if variant and data.startswith(variant, begin):
            return begin + len(variant)
        return None

    def spelt(self, reading: Reading) -> np.ndarray:
        """Return how many bytes of the text each token itself says.

        A space that was dropped without a mark, for example, lies in the token behind it, which does not say it.

        Returns:
            [N] bytes; 0 for markers, ends, and tokens with other bytes than the text.
        """
        spelt = np.minimum(reading.ends - reading.starts, self._lengths[reading.ids])
        return np.where(reading.roles == TEXT, spelt, 0)

    # ------------------------------------------------------------ bytes -> tokens

    def spell(self, pieces: list[bytes]) -> list[list[int]]:
        """Return token ids for byte strings in the middle of a text.

        By the tokenizer's own rules where these spell the bytes; by longest match over bytes elsewhere
        (not valid UTF-8, bytes it drops). Stops at a byte that no token covers.
        """
        # A piece of a character becomes U+FFFD, whose tokens do not spell it: the longest match does.
        texts = [piece.decode("utf-8", "replace") for piece in pieces]
        encodings = self._without_edges.encode_batch_fast(texts, add_special_tokens=False)

        spellings = []
        for piece, encoding in zip(pieces, encodings, strict=True):
            ids = encoding.ids
            if self._join(ids) != piece and not self._covers(ids, piece):
                ids = self._longest_match(piece)
            spellings.append(ids)
        return spellings

    def read_inside(self, text: str) -> Reading:
        """Locate the tokens of a piece in the middle of a text, by the tokenizer's own rules, also where they do not
        spell it."""
        encoding = self._without_edges.encode(text, add_special_tokens=False)
        return self.place(text, encoding.ids, encoding.offsets)

    @functools.cached_property
    def _without_edges(self) -> tokenizers.Tokenizer:
        """The tokenizer without what it does to the begin and the end of a text only."""
        spec = self.spec | {"post_processor": None, "added_tokens": []}
        inside = [part for part in normalisers(spec) if part["type"] not in ("Prepend", "Strip")]
        spec["normalizer"] = {"type": "Sequence", "normalizers": inside}

        # copies, because the parts belong to the table's own description
        pre = [dict(part) for part in pre_tokenizers(spec)]
        for part in pre:
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
            if "add_prefix_space" in part:
                part["add_prefix_space"] = False
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre} if pre else None
        return tokenizers.Tokenizer.from_str(json.dumps(spec))

    def _covers(self, ids: list[int], piece: bytes) -> bool:
        """Return whether tokens cover a piece, with the spaces that such a tokenizer hides in them."""
        if not self.rules.hides_spaces:
            return False

        position = 0
        for token_id in ids:
            token = self.bytes[token_id]
            end = self._end_of(token, piece, position) if token else None
            if end is None:
                return False
            position = end
        return position == len(piece)

    @functools.cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.by_bytes), default=0)

    def _longest_match(self, piece: bytes) -> list[int]:
        """Spell a piece from its begin on, each time with the longest token that fits."""
        ids = []
        begin = 0
        while begin < len(piece):
            ends = range(min(len(piece), begin + self._longest), begin, -1)
            end = next((end for end in ends if piece[begin:end] in self.by_bytes), None)
            if end is None:
                break
            ids.append(self.by_bytes[piece[begin:end]])
            begin = end
        return ids


def _span_behind_space(token: bytes | None, data: bytes) -> tuple[int, int] | None:
    """Return first byte and end of a text's first token that begins with a space which the tokenizer has put there.

    None: it begins otherwise, or the text has other bytes.
    """
    if not token or token[:1] != b" ":
        return None
    return (-1, len(token) - 1) if data.startswith(token[1:]) else None


def _specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a tokenizer in serialised form, without truncation, padding and chance.

    Raises:
        ValueError: a tokenizer without a fast (Rust) backend.
        TypeError: something else.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        expect("tokenizer", tokenizer, PreTrainedTokenizerBase, "what AutoTokenizer.from_pretrained returns")
        raise ValueError(
            f"got the slow tokenizer {type(tokenizer).__name__}, expected a fast one (with a tokenizer.json); "
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True) or convert it"
        )

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["truncation"] = None
    spec["padding"] = None
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None  # a text is read in the same way every time
    return spec
