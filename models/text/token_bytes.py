"""The bytes that each token of a fast tokenizer stands for, by the rules in the tokenizer's own description.

A tokenizer marks spaces in one of three ways. Byte-level and Metaspace tokenizers write them into their tokens.
Word-piece tokenizers drop them and mark where a word begins (`##` on all later pieces) or where it ends (`</w>` on the
last piece); then the space before a word is counted to the word's token. Others drop them without a mark.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import tokenizers

_TEXT_NORMALISERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled")
_TEXT_NORMALISERS += ("Strip", "Nmt")
"""Normalisers that change the text itself, unlike those that only mark spaces. `Replace` can be either."""

_EMPTY = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
"""A tokenizer without tokens: the library's own loader for a serialised normaliser or pre-tokenizer."""


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def components(part: dict | None, key: str) -> list[dict]:
    """A tokenizer component as a flat list: a `Sequence` is opened, None is empty."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [leaf for item in part[key] for leaf in components(item, key)]


def normalisers(spec: dict) -> list[dict]:
    return components(spec["normalizer"], "normalizers")


def pre_tokenizers(spec: dict) -> list[dict]:
    return components(spec["pre_tokenizer"], "pretokenizers")


def decoders(spec: dict) -> list[dict]:
    return components(spec["decoder"], "decoders")


def is_byte_token(token: str) -> re.Match | None:
    """A match whose first group is the byte in hexadecimal, for tokens such as `<0x41>`."""
    return re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)


def vocabulary_of(model: dict) -> dict[str, int]:
    """Token -> id of a tokenizer's model, without added tokens."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        return {piece: i for i, (piece, _) in enumerate(vocab)}
    return vocab


@dataclass(frozen=True)
class SpellingRules:
    """Rules by which the strings of a tokenizer's vocabulary are read as bytes."""

    byte_level: bool
    """Characters stand for bytes, by `byte_alphabet`."""
    byte_fallback: bool
    """Tokens such as `<0x41>` are bytes."""
    space_mark: str
    """Character that stands for a space."""
    inside_prefix: str
    """In front of every piece of a word but the first; empty where there is none."""
    end_suffix: str
    """Behind the last piece of a word; empty where there is none."""
    drops_spaces: bool
    """No token holds the space between two words."""

    @property
    def hides_spaces(self) -> bool:
        """Tell whether a token is the same with a space in front and without it.

        So it is where spaces are dropped and no mark at the begin of a word tells that there was one.
        """
        return self.drops_spaces and not self.inside_prefix

    @classmethod
    def of(cls, spec: dict) -> "SpellingRules":
        """The rules of a serialised tokenizer (`backend_tokenizer.to_str()`, parsed)."""
        model = spec["model"]
        parts = [*normalisers(spec), *pre_tokenizers(spec), *decoders(spec)]
        kinds = {part["type"] for part in parts}
        return cls(
            byte_level="ByteLevel" in kinds,
            byte_fallback="ByteFallback" in kinds or bool(model.get("byte_fallback")),
            space_mark=_space_mark(spec),
            inside_prefix=model.get("continuing_subword_prefix") or "",
            end_suffix=model.get("end_of_word_suffix") or "",
            drops_spaces=_drops_spaces(spec),
        )

    def bytes_of(self, token: str) -> bytes:
        """The bytes of an ordinary token, with the space before a word where the token says that one begins or ends."""
        if not self.byte_level and self.byte_fallback and (byte := is_byte_token(token)):
            return bytes([int(byte[1], 16)])

        stem = token
        is_inside = bool(self.inside_prefix) and token.startswith(self.inside_prefix) and token != self.inside_prefix
        if is_inside:
            stem = stem[len(self.inside_prefix) :]
        is_last = bool(self.end_suffix) and stem.endswith(self.end_suffix) and stem != self.end_suffix
        if is_last:
            stem = stem[: -len(self.end_suffix)]

        letters = self._letters(stem)
        is_marked_word = is_last if self.end_suffix else bool(self.inside_prefix)
        is_word = is_marked_word and not is_inside
        # no space before punctuation: most of it follows a word directly
        if is_word and self.drops_spaces and letters.decode("utf-8", "replace")[:1].isalnum():
            return b" " + letters
        return letters

    def _letters(self, stem: str) -> bytes:
        if not self.byte_level:
            return stem.replace(self.space_mark, " ").encode("utf-8", "replace")
        alphabet = _BYTES
        # a character outside the alphabet can only come from an added token
        if all(character in alphabet for character in stem):
            return bytes(alphabet[character] for character in stem)
        return stem.encode("utf-8", "replace")


_BYTES = byte_alphabet()


def token_bytes(spec: dict, rules: SpellingRules) -> list[bytes | None]:
    """Token id -> bytes; None for special tokens, the unknown token and ids without a token."""
    model = spec["model"]
    vocab = vocabulary_of(model)
    added = {token["id"]: token for token in spec["added_tokens"]}

    table: list[bytes | None] = [None] * (1 + max([*vocab.values(), *added], default=-1))
    for token, i in vocab.items():
        table[i] = rules.bytes_of(token)
    for unknown in (vocab.get(model.get("unk_token")), model.get("unk_id")):  # Unigram has the number
        if unknown is not None:
            table[unknown] = None
    for i, token in added.items():
        table[i] = None if token["special"] else token["content"].encode("utf-8", "replace")

    return [b or None for b in table]


def text_normalisers(spec: dict) -> list[tokenizers.normalizers.Normalizer]:
    """The normalisers that change a text, ready to be called; marks for spaces are left out."""
    mark = _space_mark(spec)
    ready = []
    for part in normalisers(spec):
        if part["type"] == "Replace":
            part = part | {"content": part["content"].replace(mark, " ")}
            only_marks = part["pattern"] == {"String": part["content"]}
            if only_marks or not part["content"]:  # what deletes text must not delete it for the other model
                continue
        elif part["type"] not in _TEXT_NORMALISERS:
            continue
        ready.append(_loaded({"normalizer": part}).normalizer)
    return ready


def _space_mark(spec: dict) -> str:
    """The character that the tokenizer writes for a space; SentencePiece's where it has none of its own."""
    for part in [*decoders(spec), *pre_tokenizers(spec)]:
        if part["type"] == "Metaspace":
            return part["replacement"]
    for part in normalisers(spec):
        if part["type"] == "Replace" and part["pattern"] == {"String": " "} and len(part["content"]) == 1:
            return part["content"] if part["content"] != " " else "\u2581"
    return "\u2581"


def _drops_spaces(spec: dict) -> bool:
    """Tell, by a trial, whether nothing stands between two words once the tokenizer has cut a text into words."""
    tool = _loaded({name: spec[name] for name in ("normalizer", "pre_tokenizer")})
    text = "a a"
    if tool.normalizer is not None:
        text = tool.normalizer.normalize_str(text)
    words = [text]
    if tool.pre_tokenizer is not None:
        words = [word for word, _ in tool.pre_tokenizer.pre_tokenize_str(text)]
    return re.search("a.+a", "".join(words), re.DOTALL | re.IGNORECASE) is None


def _loaded(parts: dict[str, Any]) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(_EMPTY | parts))
