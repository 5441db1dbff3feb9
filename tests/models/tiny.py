"""Tiny tokenizers, models and pairs of them, built in memory, and the bytes of a token by the plainest rules."""

import functools
import itertools
import json
import re
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as token_models
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from models.config import CurriculumConfig, LossConfig, RouterConfig, Schedule, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.divergences import DIVERGENCES
from models.teacher.frozen import FrozenTeacher
from models.text import anchors, collate
from models.text.collate import PairCollator
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import PairedBatch

STORIES = [
    "Once upon a time there was a little girl named Lily. She loved to play outside in the park.",
    'One day, her mother said: "Don\'t go there alone!" But the girl went anyway, and there they were.',
    "def there(x):\n    return x + 1\n\nThe function returns another number; the numbers are 10, 20 and 300.",
    "Ein kleines Mädchen ging über die Straße. Дети играли в парке. 子供たちは公園で遊んだ。",
]
END = "<|endoftext|>"
KINDS = tuple(DIVERGENCES)


def _wrap(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@functools.cache
def byte_bpe(size: int, seed_text: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, that knows every byte."""
    backend = Tokenizer(token_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(STORIES[seed_text:], trainer)
    return _wrap(backend, eos_token=END, bos_token=END)


@functools.cache
def metaspace(kind: str = "BPE", size: int = 120) -> PreTrainedTokenizerFast:
    """SentencePiece-like: a mark for spaces, one in front of the text; no token for most characters."""
    special = ["<unk>", "<s>", "</s>"]
    options = {"vocab_size": size, "special_tokens": special, "show_progress": False}
    if kind == "BPE":
        backend, trainer = Tokenizer(token_models.BPE(unk_token="<unk>")), trainers.BpeTrainer(**options)
    else:
        backend, trainer = (
            Tokenizer(token_models.Unigram()),
            trainers.UnigramTrainer(**options, unk_token="<unk>"),
        )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(STORIES[:3], trainer)
    return _wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@functools.cache
def wordpiece(size: int = 150) -> PreTrainedTokenizerFast:
    """BERT-like: lower case, no spaces, `##` inside of words."""
    backend = Tokenizer(token_models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    backend.train_from_iterator(STORIES, trainer)
    return _wrap(backend, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]")


@functools.cache
def characters(alphabet: str = "abcdefghijklmnopqrstuvwxyzODELBST .,:\n") -> PreTrainedTokenizerFast:
    """One token for each character of an alphabet, one for all others."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(token_models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return _wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@functools.cache
def t5_like(size: int = 120, seed_text: int = 0) -> PreTrainedTokenizerFast:
    """Unigram with a mark for spaces; puts an end of text behind a text, and nothing in front."""
    special = ["<pad>", "</s>", "<unk>"]
    backend = Tokenizer(token_models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"vocab_size": size, "special_tokens": special, "unk_token": "<unk>", "show_progress": False}
    backend.train_from_iterator(STORIES[seed_text:3], trainers.UnigramTrainer(**options))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return _wrap(backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def bart_like(size: int = 320, seed_text: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE; puts a start of text in front and an end of text behind."""
    special = ["<s>", "<pad>", "</s>"]
    backend = Tokenizer(token_models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": size, "special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(STORIES[seed_text:], trainers.BpeTrainer(**options))
    frame = {"single": "<s> $A </s>", "special_tokens": [("<s>", 0), ("</s>", 2)]}
    backend.post_processor = processors.TemplateProcessing(**frame)
    return _wrap(backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def from_merges(pieces: list[str]) -> PreTrainedTokenizerFast:
    """BPE over single letters with one merge for each longer piece, in that order; no byte is lost."""
    letters = sorted({c for piece in pieces for c in piece})
    longer = [piece for piece in pieces if len(piece) > 1]
    vocab = {token: i for i, token in enumerate([END, *letters, *longer])}
    merges = [next((p[:i], p[i:]) for i in range(len(p) - 1, 0, -1) if {p[:i], p[i:]} <= vocab.keys()) for p in longer]
    backend = Tokenizer(token_models.BPE(vocab=vocab, merges=merges))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END])
    return _wrap(backend, eos_token=END, bos_token=END)


def permuted(tokenizer: PreTrainedTokenizerFast, permutation: list[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with token i renumbered to permutation[i]."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["model"]["vocab"] = {token: permutation[i] for token, i in spec["model"]["vocab"].items()}
    for token in spec["added_tokens"]:
        token["id"] = permutation[token["id"]]
    spec["added_tokens"].sort(key=lambda token: token["id"])
    spec["post_processor"] = None
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    backend = Tokenizer.from_str(json.dumps(spec))
    return _wrap(backend, **{name: token for name, token in names.items() if token is not None})


@functools.cache
def plain_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[int, bytes]:
    """Bytes of every token that is not special, independent of the project's own table."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([spec["decoder"], spec["pre_tokenizer"]])

    # Byte-level tokenizers write a byte that cannot be seen as another character.
    shown = [c for c in range(256) if chr(c).isprintable() and c not in (0x20, 0xA0, 0xAD)]
    hidden = [c for c in range(256) if c not in shown]
    alphabet = {chr(c): c for c in shown} | {chr(256 + n): c for n, c in enumerate(hidden)}

    added = {token["id"]: token for token in spec["added_tokens"]}
    found = {}

    for token, i in tokenizer.get_vocab().items():
        if i in added:
            if not added[i]["special"]:
                found[i] = token.encode()
        elif byte_level:
            found[i] = bytes(alphabet[c] for c in token)
        elif spec["model"]["type"] == "WordPiece":  # a word begins with the space before it
            found[i] = (token[2:] if token[:2] == "##" != token else " " * token[0].isalnum() + token).encode()
        elif '"ByteFallback"' in json.dumps(spec["decoder"]) and re.fullmatch("<0x..>", token):
            found[i] = bytes.fromhex(token[3:5])
        else:
            found[i] = token.replace("\u2581", " ").encode()

    return found


def tiny_llama(vocabulary: int, seed: int = 0, *, width: int = 16, spread: float = 0.4, **config) -> LlamaForCausalLM:
    """One layer, random weights; `spread` makes the distributions peaked."""
    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"max_position_embeddings": 512, "tie_word_embeddings": False, "initializer_range": spread}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **(shape | options | config))).eval()


def tiny_t5(vocabulary: int, seed: int = 0, **config) -> T5ForConditionalGeneration:
    """Two layers each, random weights, no dropout; its logits are scaled, as those of the T5 of 2019."""
    torch.manual_seed(seed)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    options = {"initializer_factor": 1.0, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, **(shape | options | config))).eval()


def tiny_bart(vocabulary: int, seed: int = 0, **config) -> BartForConditionalGeneration:
    """One layer that encodes and two that decode, random weights, no dropout."""
    torch.manual_seed(seed)
    heads = {f"{stack}_attention_heads": 2 for stack in ("encoder", "decoder")}
    widths = {f"{stack}_ffn_dim": 32 for stack in ("encoder", "decoder")}
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 512, **heads, **widths}
    options = {"init_std": 0.3, "dropout": 0.0}
    return BartForConditionalGeneration(BartConfig(vocab_size=vocabulary, **(shape | options | config))).eval()


def curriculum(total_steps: int = 10, **weights) -> CurriculumScheduler:
    """Constant weights; every term that is not named has weight 0."""
    terms = {"kd": 0.0, "lm": 0.0} | weights
    return CurriculumScheduler(
        CurriculumConfig(**{name: Term(weight) for name, weight in terms.items()}), LossConfig(), total_steps
    )


@dataclass
class Pair:
    """A student and a teacher with all that lies between them."""

    student: torch.nn.Module
    teacher: torch.nn.Module
    encoder: PairEncoder
    vocabulary: VocabularyMap
    max_depth: int = 16
    router: RouterConfig | None = None

    def collator(self) -> PairCollator:
        return PairCollator(self.vocabulary, self.encoder.end_of_text, self.max_depth, self.router)

    def batch(self, texts: list[str] = STORIES) -> PairedBatch:
        return self.collator()(self.encoder.windows(texts))

    def frozen(self) -> FrozenTeacher:
        return FrozenTeacher(self.teacher, self.vocabulary)

    def framework(self, weights: dict[str, Schedule], **loss) -> DistillationFramework:
        config = LossConfig(**loss)
        scheduler = CurriculumScheduler(
            CurriculumConfig(**{name: Term(w) for name, w in ({"kd": 0.0, "lm": 0.0} | weights).items()}), config, 10
        )
        return DistillationFramework(self.student, self.frozen(), self.vocabulary, config, scheduler, self.router)


def pair_of(student_tokenizer, teacher_tokenizer, *, max_length: int = 48, student=None, teacher=None, **kind) -> Pair:
    """A pair with random tiny models, where none are given, of the tokenizers' sizes."""
    sizes = []
    for model, tokenizer in ((student, student_tokenizer), (teacher, teacher_tokenizer)):
        sizes.append(len(tokenizer) if model is None else model.get_output_embeddings().weight.shape[0])
    return Pair(
        student=tiny_llama(sizes[0], seed=1) if student is None else student,
        teacher=tiny_llama(sizes[1], seed=2) if teacher is None else teacher,
        encoder=PairEncoder(student_tokenizer, teacher_tokenizer, max_length),
        vocabulary=VocabularyMap.build(student_tokenizer, teacher_tokenizer, *sizes),
        **kind,
    )


def pad_further(monkeypatch, columns: int = 13) -> None:
    """Make every padded row of a batch longer than it need be."""
    pad_rows = collate.pad_rows

    def longer(rows, value):
        return np.pad(pad_rows(rows, value), ((0, 0), (0, columns)), constant_values=value)

    for module in (anchors, collate):
        monkeypatch.setattr(module, "pad_rows", longer)


def gradients(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def strings(alphabet: str, longest: int) -> list[str]:
    """Every string over an alphabet up to a length, the empty one first."""
    return ["".join(c) for n in range(longest + 1) for c in itertools.product(alphabet, repeat=n)]


def pretend_hub(monkeypatch, tokenizers: dict, **model) -> None:
    """Let transformers load tiny models and these tokenizers for names of the hub."""
    sizes = {name: len(tokenizer) for name, tokenizer in tokenizers.items()}
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizers.__getitem__)
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda name: tiny_llama(sizes[name], **model).config
    )
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, dtype: tiny_llama(sizes[name], **model)
    )
