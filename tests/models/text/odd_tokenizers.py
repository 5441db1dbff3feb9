"""Tiny tokenizers of every odd kind: how they mark spaces and words, what they drop, which special tokens they have."""

import functools
import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the a girl boy dog cat tree house river stone runs sees finds takes loves small red old happy and then but"
TEXTS = [
    "The girl sees a small dog. The dog runs and the boy finds the old house.",
    "a cat takes the red stone, then the happy boy loves the river but sees a tree",
    "dogs runs\n\nthe  girl (the boy) don't! \t Stones",
    WORDS,
]


def _trained(backend: Tokenizer, trainer: trainers.Trainer, **special: str) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _bpe_trainer(special: list[str], size: int = 200, **options) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, **options)


def word_level() -> PreTrainedTokenizerFast:
    """Whole words; white space vanishes, unknown words become one token."""
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=20, special_tokens=["[UNK]", "[EOS]"], show_progress=False)
    return _trained(backend, trainer, unk_token="[UNK]", eos_token="[EOS]")


def _affixed(affix: dict[str, str], normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>", **affix))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    return _trained(backend, _bpe_trainer(["<unk>", "<eos>"], **affix), unk_token="<unk>", eos_token="<eos>")


def end_of_word() -> PreTrainedTokenizerFast:
    """BPE with `</w>` behind the last piece of a word, as openai-gpt."""
    return _affixed({"end_of_word_suffix": "</w>"})


def inside_of_word() -> PreTrainedTokenizerFast:
    """BPE with `##` in front of the later pieces of a word."""
    return _affixed({"continuing_subword_prefix": "##"})


def clip_like() -> PreTrainedTokenizerFast:
    """Byte-level BPE with `</w>`; lower case, white space vanishes between words."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = _bpe_trainer(["<end>"], size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    return _trained(backend, trainer, eos_token="<end>", bos_token="<end>", pad_token="<end>")


def word_piece() -> PreTrainedTokenizerFast:
    """BERT: lower case, `##` inside of words."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    return _trained(backend, trainer, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]")


def _unigram(scheme: str, *, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>"]
    if byte_fallback:
        special += [f"<0x{byte:02X}>" for byte in range(256)]

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=len(special) + 100, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)

    if byte_fallback:
        backend.model = models.Unigram(_pieces(backend), 0, byte_fallback=True)
        backend.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend = _ordinary_bytes(backend)

    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _pieces(backend: Tokenizer) -> list[tuple[str, float]]:
    return [tuple(piece) for piece in json.loads(backend.to_str())["model"]["vocab"]]


def _ordinary_bytes(backend: Tokenizer) -> Tokenizer:
    """The tokenizer with its byte tokens in the model alone, and no added ones."""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


def llama_like() -> PreTrainedTokenizerFast:
    """BPE with a mark for spaces by a normaliser and bytes for unknown characters; puts a bos in front."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")  # no token holds two words
    backend.train_from_iterator(TEXTS, _bpe_trainer([*special, *byte_tokens], size=400))
    backend = _ordinary_bytes(backend)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _byte_level(*, prefix_space: bool, special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(backend, _bpe_trainer(special, size=350, initial_alphabet=alphabet), **roles)


def characters() -> PreTrainedTokenizerFast:
    """One token for each character of a small alphabet; all others become one token."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", *"abcdefghijklmnoprstuvw .\n"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def without_unknown() -> PreTrainedTokenizerFast:
    """BPE that knows a few letters and no unknown token: other characters vanish."""
    vocab = {token: i for i, token in enumerate(["<eos>", "t", "h", "e", " ", "th", "the"])}
    backend = Tokenizer(models.BPE(vocab, [("t", "h"), ("th", "e")]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def lower_casing() -> PreTrainedTokenizerFast:
    """Normalises to lower case without accents and strips the text."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(backend, _bpe_trainer(["<eos>"], size=350, initial_alphabet=alphabet), eos_token="<eos>")


def t5_like() -> PreTrainedTokenizerFast:
    """Unigram that puts an end of text behind a text, and has no bos."""
    special = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


MAKERS = {
    "WordLevel": word_level,
    "end-of-word": end_of_word,
    "inside-of-word": inside_of_word,
    "CLIP": clip_like,
    "WordPiece": word_piece,
    "Unigram-always": lambda: _unigram("always"),
    "Unigram-first": lambda: _unigram("first"),
    "Unigram-never": lambda: _unigram("never"),
    "Unigram-bytes": lambda: _unigram("always", byte_fallback=True),
    "Llama": llama_like,
    "byte-level": lambda: _byte_level(prefix_space=False, special=["<eos>"], eos_token="<eos>"),
    "byte-level-prefix": lambda: _byte_level(prefix_space=True, special=["<eos>"], eos_token="<eos>"),
    "no-eos": lambda: _byte_level(prefix_space=False, special=["<bos>"], bos_token="<bos>"),
    "no-special": lambda: _byte_level(prefix_space=False, special=[]),
    "characters": characters,
    "no-unk": without_unknown,
    "lower-case": lower_casing,
    "T5": t5_like,
}
"""The kinds by name."""


@functools.cache
def odd(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind."""
    return MAKERS[kind]()
