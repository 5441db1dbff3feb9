"""Ways in which the byte-level tokenizer of a GGUF file cuts a text into words, within which its merges are then made.

A file has only a name for it, `tokenizer.ggml.pre`. transformers knows some of the names, and cuts like GPT-2 under all
others without a word: SmolLM2 read "\\n\\n1." as other tokens than those it was trained on. Names and rules are those
of llama.cpp (src/llama-vocab.cpp), which writes the files.
"""

import json
import logging
from pathlib import Path

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

KEY = "tokenizer.ggml.pre"

LIKE_GPT2 = frozenset(
    {
        "a.x-4.0",
        "exaone4",
        "gigachat",
        "gpt-2",
        "granite-docling",
        "jais",
        "jina-de",
        "jina-es",
        "jina-v1-en",
        "jina-v2-code",
        "jina-v2-de",
        "jina-v2-es",
        "mellum",
        "modern-bert",
        "mpt",
        "olmo",
        "phi-2",
        "roberta-bpe",
        "trillion",
    }
)

DIGITS_ALONE = frozenset({"codeshell", "command-r", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder"})
"""Like GPT-2, after every digit has been cut out."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")

PATTERNS = {
    "chatglm-bpe": LLAMA3,
    "glm4": LLAMA3,
    "hunyuan": QWEN2,
    "solar-open": QWEN2,
    "stablelm2": QWEN2,
}
"""Patterns whose matches are the words."""

UNSAID = frozenset({"", "default"})
"""Names of files that are older than the names."""


def correct(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Let a tokenizer that transformers made of a GGUF file cut text as the file says.

    Raises:
        ValueError: nobody here knows what the file says.
    """
    if not _cuts_like_gpt2(tokenizer):
        return
    name = _name_in(file)
    if name in LIKE_GPT2:
        return
    if name in UNSAID:
        log.warning(
            "%s does not say how its tokenizer cuts text into words (no %s); GPT-2's way is taken, and may be another "
            "than that of the model. Newer conversions say it.",
            file.name,
            KEY,
        )
        return

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_way(name))


def _way(name: str) -> list[pre_tokenizers.PreTokenizer]:
    """Return the steps of a way of cutting.

    Raises:
        ValueError: nobody here knows it.
    """
    if name in DIGITS_ALONE:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return [digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]

    if name in PATTERNS:
        words = pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated")
        return [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    raise ValueError(f"its text is cut into words in the way {name!r}, which is not known here")


def _cuts_like_gpt2(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a tokenizer has GPT-2's own way, which transformers also falls back on."""
    way = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    return way is not None and way["type"] == "ByteLevel" and way["use_regex"]


def _name_in(file: Path) -> str:
    """Return the name that a GGUF file has for the way; empty: none."""
    from gguf import GGUFReader  # an extra

    field = GGUFReader(file).fields.get(KEY)
    return "" if field is None else bytes(field.parts[field.data[0]]).decode("utf-8")
