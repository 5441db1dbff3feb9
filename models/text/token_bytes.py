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

_TEXT_NORMALISERS = (
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "StripAccents",
    "BertNormalizer",
    "Precompiled",
    "Strip",
    "Nmt",
)
"""Normalisers that change the text itself, unlike those that only mark spaces. `Replace` can be either."""

_SENTENCEPIECE_SPACE = "\u2581"

_EMPTY = {
    "version": "1.0",
    "model": {"type": "BPE", "vocab": {}, "merges": []},
    "added_tokens": [],
}
"""A tokenizer without tokens: the library's own loader for a serialised normaliser or pre-tokenizer."""


def byte_alphabet() -> dict[str, int]:
    """Return character -> byte of byte-level BPE (GPT-2).

    Printable bytes stand for themselves, the others have the characters from U+0100 on.
    """
    printable = [
        *range(0x21, 0x7F),
        *range(0xA1, 0xAD),
        *range(0xAE, 0x100),
    ]
    alphabet = {chr(byte): byte for byte in printable}

    others = [byte for byte in range(256) if byte not in printable]
    for number, byte in enumerate(others):
        alphabet[chr(256 + number)] = byte
    return alphabet


def components(part: dict | None, key: str) -> list[dict]:
    """Return a tokenizer component as a flat list: a `Sequence` is opened, None is empty.

    Args:
        part: as the tokenizers library serialises it.
        key: under which a `Sequence` has its parts.
    """
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]

    leaves = []
    for item in part[key]:
        leaves += components(item, key)
    return leaves


def normalisers(spec: dict) -> list[dict]:
    """Return the normalisers of a serialised tokenizer, in their order."""
    return components(spec["normalizer"], "normalizers")


def pre_tokenizers(spec: dict) -> list[dict]:
    """Return the pre-tokenizers of a serialised tokenizer, in their order."""
    return components(spec["pre_tokenizer"], "pretokenizers")


def decoders(spec: dict) -> list[dict]:
    """Return the decoders of a serialised tokenizer, in their order."""
    return components(spec["decoder"], "decoders")


def is_byte_token(token: str) -> re.Match | None:
    """Match tokens such as `<0x41>`; the first group is the byte in hexadecimal."""
    return re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)


def vocabulary_of(model: dict) -> dict[str, int]:
    """Return token -> id of a tokenizer's model, without added tokens."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        return {piece: token_id for token_id, (piece, _) in enumerate(vocab)}
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
        """Return whether a token is the same with a space in front and without it.

        So it is where spaces are dropped and no mark at the begin of a word tells that there was one.
        """
        return self.drops_spaces and not self.inside_prefix

    @classmethod
    def of(cls, spec: dict) -> "SpellingRules":
        """Return the rules of a serialised tokenizer (`backend_tokenizer.to_str()`, parsed)."""
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
        """Return the bytes of an ordinary token, with the space before a word where the token marks that word."""
        if self.byte_fallback and not self.byte_level:
            byte = is_byte_token(token)
            if byte is not None:
                return bytes([int(byte[1], 16)])

        # The marks of word-piece tokenizers are no text. A token that is nothing but a mark is.
        stem = token
        is_inside = bool(self.inside_prefix) and stem.startswith(self.inside_prefix) and stem != self.inside_prefix
        if is_inside:
            stem = stem.removeprefix(self.inside_prefix)
        is_last = bool(self.end_suffix) and stem.endswith(self.end_suffix) and stem != self.end_suffix
        if is_last:
            stem = stem.removesuffix(self.end_suffix)

        letters = self._letters(stem)
        is_marked_word = is_last if self.end_suffix else bool(self.inside_prefix)
        is_word = is_marked_word and not is_inside
        # no space before punctuation: most of it follows a word directly
        if is_word and self.drops_spaces and _begins_with_letter(letters):
            return b" " + letters
        return letters

    def _letters(self, stem: str) -> bytes:
        """Return the bytes of a token without its marks for words."""
        if not self.byte_level:
            return stem.replace(self.space_mark, " ").encode("utf-8", "replace")
        # a character outside the alphabet can only come from an added token
        if all(character in _BYTES for character in stem):
            return bytes(_BYTES[character] for character in stem)
        return stem.encode("utf-8", "replace")


_BYTES = byte_alphabet()


def _begins_with_letter(data: bytes) -> bool:
    return data.decode("utf-8", "replace")[:1].isalnum()


def token_bytes(spec: dict, rules: SpellingRules) -> list[bytes | None]:
    """Return the bytes by token id; None for special tokens, the unknown token and ids without a token."""
    model = spec["model"]
    vocab = vocabulary_of(model)
    added = {token["id"]: token for token in spec["added_tokens"]}

    size = 1 + max([*vocab.values(), *added], default=-1)
    table: list[bytes | None] = [None] * size
    for token, token_id in vocab.items():
        table[token_id] = rules.bytes_of(token)

    # The unknown token stands for any text. Most models give its name, Unigram its number.
    named_unknown = vocab.get(model.get("unk_token"))
    numbered_unknown = model.get("unk_id")
    for unknown in (named_unknown, numbered_unknown):
        if unknown is not None:
            table[unknown] = None

    # Added tokens go last: they are found in a text before the model reads it, and their content is plain text.
    for token_id, token in added.items():
        content = token["content"].encode("utf-8", "replace")
        table[token_id] = None if token["special"] else content
    return [data or None for data in table]


def text_normalisers(spec: dict) -> list[tokenizers.normalizers.Normalizer]:
    """Return the normalisers that change a text, ready to be called; marks for spaces are left out."""
    mark = _space_mark(spec)
    parts = []
    for part in normalisers(spec):
        if part["type"] in _TEXT_NORMALISERS:
            parts.append(part)
        elif part["type"] == "Replace":
            content = part["content"].replace(mark, " ")
            only_marks = part["pattern"] == {"String": content}
            # a rule that deletes text is left out, too: it must not delete it for the other model
            if content and not only_marks:
                parts.append(part | {"content": content})
    return [_loaded({"normalizer": part}).normalizer for part in parts]


def _space_mark(spec: dict) -> str:
    """Return the character that the tokenizer writes for a space; SentencePiece's where it has none of its own."""
    for part in [*decoders(spec), *pre_tokenizers(spec)]:
        if part["type"] == "Metaspace":
            return part["replacement"]

    for part in normalisers(spec):
        replaces_space = part["type"] == "Replace" and part["pattern"] == {"String": " "}
        if replaces_space and len(part["content"]) == 1:
            mark = part["content"]
            return _SENTENCEPIECE_SPACE if mark == " " else mark
    return _SENTENCEPIECE_SPACE


def _drops_spaces(spec: dict) -> bool:
    """Return, by a trial, whether nothing stands between two words once the tokenizer has cut a text into words."""
    # Where spaces are dropped, "a a" is cut into "a" and "a"; elsewhere a word or a piece of its own holds the space.
    tool = _loaded({"normalizer": spec["normalizer"], "pre_tokenizer": spec["pre_tokenizer"]})
    text = "a a"
    if tool.normalizer is not None:
        text = tool.normalizer.normalize_str(text)
    words = [text]
    if tool.pre_tokenizer is not None:
        words = [word for word, _ in tool.pre_tokenizer.pre_tokenize_str(text)]

    # any character between the two counts, such as a mark; a normaliser may have changed the case
    between = re.search("a.+a", "".join(words), re.DOTALL | re.IGNORECASE)
    return between is None


def _loaded(parts: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return a tokenizer without tokens that has these parts, ready to be called."""
    return tokenizers.Tokenizer.from_str(json.dumps(_EMPTY | parts))
