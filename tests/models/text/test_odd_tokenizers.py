"""Tokenizers of every odd kind: equal ones are aligned id by id, different ones by the bytes of the words they know."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from models.text.chat import ChatEncoder
from models.text.chat_template import ConversationError
from models.text.chat_turns import chat_tokenizer
from models.text.collate import PairCollator
from models.text.text_start import start_candidates
from models.text.tokens import MARKER, MISMATCH, TokenTable
from models.text.vocabulary import VocabularyMap
from models.text.windows import ModelFacts, PairEncoder
from tests.models.text.odd_tokenizers import MAKERS, TEXTS, WORDS, odd
from tests.models.tiny import byte_bpe, gradients, metaspace, pair_of, t5_like, tiny_llama

KINDS = list(MAKERS)
PIECES = st.one_of(
    st.sampled_from([*WORDS.split(), " ", "  ", "\n", ". ", "(", "Dog", "é", "\u2581"]), st.text(max_size=5)
)
ANY_TEXT = st.lists(PIECES, min_size=1, max_size=12).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=3), temperature=st.sampled_from([1.0, 3.0]))
def test_a_student_that_is_its_teacher_has_no_kd_and_no_gradient_and_full_coverage(kind, texts, temperature):
    tokenizer = odd(kind)
    model = tiny_llama(len(tokenizer), seed=1)
    pair = pair_of(tokenizer, copy.deepcopy(tokenizer), student=model, teacher=copy.deepcopy(model))
    windows = pair.encoder.windows([*texts, TEXTS[0]])
    batch = pair.collator()(windows)

    assert batch.counts["kd"] == batch.counts["depth0"] == batch.counts["lm"] > 0
    assert torch.equal(batch.row_student, batch.row_teacher)

    module = pair.framework({"kd": 1.0}, top_k=8, temperature=temperature, correction="span")
    model.zero_grad()
    output = module(batch, 0)
    output.loss.backward()
    assert abs(output.terms["kd"].sum.item()) < 1e-4 * batch.counts["kd"]
    assert output.terms["kd"].skipped is None or not output.terms["kd"].skipped
    assert max((gradient.abs().max().item() for gradient in gradients(model)), default=0.0) < 1e-5


@pytest.mark.parametrize("kind", ["WordLevel", "end-of-word", "no-unk", "T5"])
def test_equal_tokenizers_with_other_ends_of_text_are_aligned_one_by_one(kind):
    """A base model and its chat model can differ like this: by one more special token, which is the end of text."""
    base = odd(kind)
    other = copy.deepcopy(base)
    other.add_special_tokens({"eos_token": "<|im_end|>"})
    encoder = PairEncoder(base, other, 48)
    vocabulary = VocabularyMap.build(base, other)
    batch = PairCollator(vocabulary, encoder.end_of_text, 16)(encoder.windows(TEXTS))
    assert vocabulary.equal_tokenizers
    assert batch.counts["kd"] == batch.counts["depth0"] == batch.counts["lm"]
    assert vocabulary.segments[other.eos_token_id, 0] == base.eos_token_id


@pytest.mark.parametrize("kind", ["WordLevel", "end-of-word", "characters", "T5"])
def test_conversations_that_both_read_alike_are_aligned_one_by_one(kind):
    tokenizer = chat_tokenizer(odd(kind))
    encoder = ChatEncoder(tokenizer, tokenizer, 200)
    talk = '[{"role": "user", "content": "zebra?"}, {"role": "assistant", "content": "the zebra  runs\\n\\nQuagga!"}]'
    windows = encoder.windows([talk])
    batch = PairCollator(VocabularyMap.build(tokenizer, tokenizer), encoder.end_of_text, 16)(windows)
    assert batch.counts["kd"] == batch.counts["depth0"] == batch.counts["lm"] > 3


def test_tokenizers_that_differ_in_one_merge_or_added_word_are_not_equal():
    base = odd("byte-level")
    other = copy.deepcopy(base)
    other.add_tokens([AddedToken("girl sees", special=False)])
    assert not VocabularyMap.build(base, other).equal_tokenizers
    assert not VocabularyMap.build(odd("byte-level"), odd("byte-level-prefix")).equal_tokenizers
    assert VocabularyMap.build(base, copy.deepcopy(base)).equal_tokenizers


def test_a_stored_map_of_equal_tokenizers_still_says_so(tmp_path):
    pair = (odd("WordLevel"), odd("WordLevel"))
    built = VocabularyMap.build(*pair, cache_dir=tmp_path)
    stored = VocabularyMap.build(*pair, cache_dir=tmp_path)
    assert built.equal_tokenizers is stored.equal_tokenizers is True
    assert built.fingerprint == stored.fingerprint
    without = VocabularyMap.from_segments(built.segments, built.student_vocab_size)
    assert without.fingerprint != built.fingerprint


def coverage(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, texts: list[str]) -> float:
    batch = pair_of(student, teacher).batch(texts)
    return batch.counts["kd"] / batch.counts["lm"]


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", ["byte-level", "Llama"])
def test_most_positions_of_words_that_both_know_have_an_anchor(student, teacher):
    if student in ("no-unk", "WordLevel"):
        pytest.skip("knows a few words only")
    assert coverage(odd(student), odd(teacher), [WORDS, WORDS + "."]) > 0.9


@pytest.mark.parametrize("kind", ["end-of-word", "CLIP"])
def test_a_word_is_mapped_to_its_token_with_the_mark_at_its_end(kind):
    student, teacher = odd(kind), odd("byte-level")
    segments = VocabularyMap.build(student, teacher).segments
    for word in ("girl", "house"):
        (spaced,) = teacher(f" {word}", add_special_tokens=False)["input_ids"]
        assert student.convert_ids_to_tokens(segments[spaced].tolist()[:1]) == [f"{word}</w>"]
        assert (segments[spaced, 1:] == -1).all()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(text=ANY_TEXT)
def test_what_tokens_say_is_the_text_but_for_what_is_counted_as_left_out(kind, text):
    """The bytes of tokens said to be text add up to the text's bytes less those counted, and lie where they should."""
    table = TokenTable(odd(kind))
    text = table.normalise(text.encode("utf-8", "replace").decode())
    (reading,) = table.read([text])
    data = text.encode()
    inside = reading.roles != MISMATCH
    assert (reading.starts[1:] >= reading.ends[:-1]).all()
    for i, start, end in zip(reading.ids[inside], reading.starts[inside], reading.ends[inside], strict=True):
        assert table.bytes[i].strip(b" ") in data[max(start, 0) : end]
    said = int(table.spelt(reading).sum()) - int((reading.starts < 0).sum())
    assert 0 <= said <= len(data)


def test_left_out_text_is_counted_and_nothing_else():
    assert unspelt("byte-level", "the dog\n\nruns  é") == 0
    assert unspelt("Llama", "the dog\n\nruns  é") == 0
    assert unspelt("WordLevel", "the the") == 1  # the space
    assert unspelt("characters", "the X\u00e9 dog") == 3
    assert unspelt("end-of-word", "girl sees\n\nthe dog") == 2  # the line breaks


def unspelt(kind: str, text: str) -> int:
    (window,) = PairEncoder(odd(kind), byte_bpe(400), 64).windows([text])
    assert window["teacher_unspelt"] == 0
    return window["student_unspelt"]


def test_unspelt_bytes_of_a_long_document_are_those_of_its_parts():
    encoder = PairEncoder(odd("WordLevel"), byte_bpe(400), 24)
    text = " ".join(TEXTS * 3)
    windows = encoder.windows([text])
    whole = PairEncoder(odd("WordLevel"), byte_bpe(400), 2000).windows([text])
    assert len(windows) > 3
    assert sum(w["student_unspelt"] for w in windows) == whole[0]["student_unspelt"] > 0
    assert sum(w["bytes"] for w in windows) == whole[0]["bytes"]


# --- tokens that the model has no row for ----------------------------------------------------------------------------


def with_special(content: str) -> tuple[PreTrainedTokenizerFast, int]:
    """A tokenizer with one special token more than its model has rows, and these rows."""
    tokenizer = copy.deepcopy(byte_bpe(300))
    rows = len(tokenizer)
    tokenizer.add_tokens([AddedToken(content, special=True, normalized=False)], special_tokens=True)
    return tokenizer, rows


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_special_tokens_beyond_the_head_are_left_out_and_their_names_in_a_text_are_text(role):
    tokenizer, rows = with_special("<image_soft_token>")
    pair, sizes = [byte_bpe(400), byte_bpe(400)], [400, 400]
    at = ("student", "teacher").index(role)
    pair[at], sizes[at] = tokenizer, rows
    vocabulary = VocabularyMap.build(*pair, *sizes)
    encoder = PairEncoder(*pair, 64, ModelFacts(tuple(sizes)))
    assert encoder.tables[at].beyond_rows == ["<image_soft_token>"]
    assert vocabulary.segments.shape[0] == sizes[1] and vocabulary.student_vocab_size == sizes[0]
    assert vocabulary.segments.max() < sizes[0]
    for window in encoder.windows(["a <image_soft_token> in a text", "<image_soft_token>"]):
        assert max(window[f"{role}_ids"]) < rows
        assert window[f"{role}_unspelt"] == 0


def test_an_ordinary_added_token_or_an_end_of_text_beyond_the_head_is_refused():
    tokenizer = copy.deepcopy(byte_bpe(300))
    tokenizer.add_tokens([AddedToken("wombat", special=False)])
    with pytest.raises(ValueError, match=r"student's tokenizer has 301 tokens but its model only 300 rows.*'wombat'"):
        VocabularyMap.build(tokenizer, byte_bpe(400), 300, 400)
    tokenizer, rows = with_special("<end>")
    tokenizer.eos_token = "<end>"
    with pytest.raises(ValueError, match="ends a text with '<end>', token 300, but its model has only 300 rows"):
        PairEncoder(byte_bpe(400), tokenizer, 64, ModelFacts((400, rows)))


def test_a_template_that_writes_a_token_beyond_the_head_is_refused():
    tokenizer, rows = with_special("<turn>")
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    encoder = ChatEncoder(tokenizer, tokenizer, 64, facts=ModelFacts((rows, rows)))
    talk = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    with pytest.raises(ConversationError, match="writes '<turn>', token 300, but its model has only 300 rows"):
        encoder.windows([talk])


# --- how a text starts ------------------------------------------------------------------------------------------------


def chat_like(special: list[str], template: str | None = None, **roles: str) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(odd("no-special"))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    tokenizer.chat_template = template
    return tokenizer


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("tokenizer", "start"),
    [
        (lambda: odd("Llama"), "<s>"),  # puts it there itself
        (metaspace, "</s>"),  # has one and does not put it there
        (t5_like, "</s>"),
        (lambda: odd("no-eos"), "<bos>"),
        (lambda: odd("no-special"), None),
        (lambda: chat_like(IM, CHATML, eos_token="<|endoftext|>"), "<|endoftext|>"),  # a base model
        (lambda: chat_like(IM, CHATML, eos_token="<|im_end|>", bos_token="<|im_start|>"), "<|endoftext|>"),
        (lambda: chat_like(IM[1:], CHATML, eos_token="<|im_end|>"), "<|im_end|>"),  # nothing else separates texts
    ],
)
def test_a_text_starts_with_what_separates_texts_and_samples_and_windows_start_alike(tokenizer, start):
    tokenizer = tokenizer()
    expected = [] if start is None else [tokenizer.convert_tokens_to_ids(start)]
    encoder = PairEncoder(tokenizer, byte_bpe(400), 48)
    assert encoder.starts[0] == start_candidates(tokenizer)[:1] == expected
    for window in encoder.windows([WORDS]):
        lead = window["student_ids"][: len(expected)].tolist()
        assert lead == expected
        assert (window["student_roles"][: len(expected)] == MARKER).all()


def test_a_token_beyond_the_head_starts_no_text_and_one_that_is_asked_for_does():
    tokenizer = chat_like(IM, CHATML, eos_token="<|im_end|>", bos_token="<|im_start|>")
    first = start_candidates(tokenizer)[0]
    assert first not in start_candidates(tokenizer, rows=first)
    wanted = PairEncoder(tokenizer, tokenizer, 48, ModelFacts(text_starts=("<|im_start|>", None)))
    plain = PairEncoder(tokenizer, tokenizer, 48)
    assert wanted.starts[0] == [tokenizer.convert_tokens_to_ids("<|im_start|>")] != plain.starts[0]
    assert wanted.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="the teacher's tokenizer has no token 'nonsense'"):
        PairEncoder(tokenizer, tokenizer, 48, ModelFacts(text_starts=(None, "nonsense")))


def test_an_ordinary_token_that_starts_a_text_stays_text_elsewhere():
    tokenizer = odd("byte-level")
    encoder = PairEncoder(tokenizer, byte_bpe(400), 48, ModelFacts(text_starts=("e", None)))
    (window,) = encoder.windows(["the tree e"])
    assert window["student_unspelt"] == 0
    assert not np.isin(window["student_roles"], [MISMATCH]).any()
