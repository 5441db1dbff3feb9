"""Bytes of tokens, spellings, prefix ranges and the cache, against brute force."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.text.token_bytes import byte_alphabet
from models.text.tokens import MISMATCH, TokenTable
from models.text.vocabulary import VocabularyMap
from tests.models.tiny import (
    END,
    STORIES,
    byte_bpe,
    characters,
    from_merges,
    metaspace,
    permuted,
    plain_bytes,
    strings,
    wordpiece,
)

REAL = ["qwen2.5-sub8k", "smollm", "gpt2", "gpt-neox", "mistral-v0.1", "minimind-6400", "llama2c-tok512"]
REAL += ["llama2c-tok4096", "babyllama-char105", "starcoder", "tinystories-bpe25k"]
ANY = [lambda: byte_bpe(300), metaspace, lambda: metaspace("Unigram"), wordpiece, characters]


def spelt(ids, table: TokenTable) -> bytes:
    return b"".join(table.bytes[i] for i in ids if i >= 0)


def test_byte_alphabet_is_a_bijection_and_gpt2s_own():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["Ġ"], alphabet["Ċ"], alphabet["A"], alphabet["é"]) == (0x20, 0x0A, 0x41, 0xE9)


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_of_a_byte_level_tokenizers_tokens_are_the_texts_bytes(text):
    table = TokenTable(byte_bpe(400))
    (reading,) = table.read([text])
    data = text.encode()
    assert spelt(reading.ids, table) == data
    assert all(table.bytes[i] == data[a:b] for i, a, b, _ in zip(*reading, strict=True))
    assert [*reading.starts, len(data)] == [0, *reading.ends]


@pytest.mark.parametrize("name", REAL)
def test_every_token_of_a_real_tokenizer_has_the_bytes_of_the_plainest_rules(name, real_tokenizer):
    table, expected = TokenTable(real_tokenizer(name)), plain_bytes(real_tokenizer(name))
    markers = {table.end_of_text, table.start_marker}
    different = [i for i, b in expected.items() if i not in markers and (table.bytes[i] or b"") != b]
    assert all(table.tokens[i] in ("<unk>", "[UNK]") for i in different)


@pytest.mark.parametrize("make", ANY)
@settings(max_examples=30)
@given(text=st.text(max_size=40))
def test_tokens_said_to_be_text_have_exactly_the_bytes_they_cover(make, text):
    table = TokenTable(make())
    text = table.normalise(text.encode("utf-8", "replace").decode())
    (reading,) = table.read([text])
    data = b" " + text.encode()  # a space in front lies at byte -1
    for i, start, end, role in zip(*reading, strict=True):
        assert role == MISMATCH or table.bytes[i] == data[start + 1 : end + 1]
    assert (np.diff(reading.starts) >= 0).all()
    assert (reading.starts[1:] >= reading.ends[:-1]).all()


def test_special_tokens_written_in_a_text_are_text(real_tokenizer):
    for name, text in (("qwen2.5-sub8k", "a<|im_end|>b<|endoftext|>"), ("mistral-v0.1", "a<s>b</s><unk>")):
        table = TokenTable(real_tokenizer(name))
        (reading,) = table.read([text])
        assert (reading.roles != MISMATCH).all()
        assert not {table.end_of_text, table.start_marker} & set(reading.ids.tolist())
        assert spelt(reading.ids, table).strip() == text.encode()


@pytest.mark.parametrize("student", ["smollm", "llama2c-tok512", "gpt-neox"])
@pytest.mark.parametrize("teacher", ["qwen2.5-sub8k", "mistral-v0.1"])
def test_segments_spell_the_teacher_tokens_bytes(student, teacher, real_tokenizer, real_map):
    s, t = TokenTable(real_tokenizer(student)), TokenTable(real_tokenizer(teacher))
    whole = 0
    for token, segment in enumerate(real_map(student, teacher).segments):
        found = t.bytes[token]
        if found is None:
            assert token == t.end_of_text or (segment == -1).all()
        else:
            assert found.startswith(spelt(segment, s))
            whole += found == spelt(segment, s)
    assert whole > 0.98 * sum(b is not None for b in t.bytes)


@pytest.mark.parametrize("student", ANY)
@pytest.mark.parametrize("teacher", ANY)
def test_toy_vocabularies_of_every_kind_are_spelt_where_the_student_knows_the_bytes(student, teacher):
    s, t = TokenTable(student()), TokenTable(teacher())
    segments = VocabularyMap.build(student(), teacher()).segments
    for token, segment in enumerate(segments):
        found = t.bytes[token]
        if found is not None:
            assert found.startswith(spelt(segment, s))
            if all(bytes([b]) in s.by_bytes for b in found):
                assert spelt(segment, s) == found
            if found in s.by_bytes:
                assert s.bytes[segment[0]] == found


def test_end_of_text_is_mapped_by_role_and_other_special_tokens_are_not():
    student, teacher = metaspace(), byte_bpe(300)
    segments = VocabularyMap.build(student, teacher).segments
    assert segments[teacher.eos_token_id, 0] == student.eos_token_id
    back = VocabularyMap.build(teacher, student).segments
    assert back[student.eos_token_id, 0] == teacher.eos_token_id
    assert (back[[student.bos_token_id, student.unk_token_id]] == -1).all()


@pytest.mark.parametrize("make", ANY)
def test_map_of_a_tokenizer_to_itself_is_the_identity(make):
    table = TokenTable(make())
    segments = VocabularyMap.build(make(), make()).segments
    ordinary = [i for i, b in enumerate(table.bytes) if b is not None]
    assert (segments[ordinary, 0] == ordinary).all()
    assert segments.shape[1] == 1


@pytest.mark.parametrize("name", ["llama2c-tok512", "mistral-v0.1", "gpt-neox", "qwen2.5-sub8k"])
def test_map_of_a_real_tokenizer_to_itself_is_the_identity_also_where_two_tokens_have_the_same_bytes(name, real_map):
    segments = real_map(name, name).segments
    found = np.flatnonzero(segments[:, 0] >= 0)
    assert (segments[found, 0] == found).all()
    assert len(found) > 0.97 * len(segments)


def test_map_to_a_permuted_vocabulary_is_the_permutation():
    tokenizer = byte_bpe(300)
    permutation = np.random.default_rng(0).permutation(300).tolist()
    segments = VocabularyMap.build(permuted(tokenizer, permutation), tokenizer).segments
    assert segments[:, 0].tolist() == permutation


def random_segments(seed: int) -> np.ndarray:
    """Sequences over 4 tokens, many of them equal or prefixes of each other, some empty."""
    random = np.random.default_rng(seed)
    segments = random.integers(0, 4, (60, 4)).astype(np.int32)
    segments[np.arange(4) >= random.integers(0, 5, 60)[:, None]] = -1
    return segments


@pytest.mark.parametrize("seed", range(3))
def test_ranges_of_the_tree_are_the_tokens_that_brute_force_finds(seed):
    segments = random_segments(seed)
    found = VocabularyMap.from_segments(segments, 4)
    sequences = [tuple(int(x) for x in row if x >= 0) for row in segments]
    assert [sequences[t] for t in found.order] == sorted(sequences)
    assert found.rank[found.order].tolist() == list(range(60))
    for word in strings("0123", 4):
        prefix, node = tuple(map(int, word)), np.array([0])
        for token in prefix:
            node = found.descend(node, np.array([token]))
        expected = {t for t, sequence in enumerate(sequences) if sequence[: len(prefix)] == prefix}
        if node[0] < 0:
            assert not expected
        else:
            assert set(found.order[found.node_lo[node[0]] : found.node_hi[node[0]]].tolist()) == expected


def test_ranges_of_a_real_pair_are_the_tokens_that_brute_force_finds(real_map):
    found = real_map("llama2c-tok512", "qwen2.5-sub8k")
    sequences = [tuple(int(x) for x in row if x >= 0) for row in found.segments]
    for token in range(100, 8000, 400):
        for depth in range(len(sequences[token]) + 1):
            prefix, node = sequences[token][:depth], np.array([0])
            for s in prefix:
                node = found.descend(node, np.array([s]))
            expected = {t for t, sequence in enumerate(sequences) if sequence[:depth] == prefix}
            assert set(found.order[found.node_lo[node[0]] : found.node_hi[node[0]]].tolist()) == expected


def test_tokens_that_continue_nothing_lead_nowhere_and_stay_there():
    found = VocabularyMap.from_segments(np.array([[0, 1], [0, 2]], dtype=np.int32), 4)
    node = found.descend(np.array([0, 0, -1]), np.array([3, 0, 0]))
    assert node[0] == -1 and node[1] > 0 and node[2] == -1
    assert found.descend(node, np.array([0, 3, 1])).tolist() == [-1, -1, -1]


def same(one: VocabularyMap, other: VocabularyMap) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("segments", "order", "edges", "node_lo", "node_hi", "student_vocab_size")
    )


def test_a_stored_map_is_read_back_and_used(tmp_path, monkeypatch):
    pair = (byte_bpe(300), byte_bpe(400))
    built = VocabularyMap.build(*pair, cache_dir=tmp_path)
    monkeypatch.setattr("models.text.vocabulary._spell_vocabulary", None)  # building again would fail
    assert same(VocabularyMap.build(*pair, cache_dir=tmp_path), built)
    assert [f.suffix for f in tmp_path.iterdir()] == [".npz"]


def test_another_tokenizer_or_size_is_another_file(tmp_path):
    for pair in ((byte_bpe(300), byte_bpe(400)), (byte_bpe(400), byte_bpe(300)), (byte_bpe(300), metaspace())):
        VocabularyMap.build(*pair, cache_dir=tmp_path)
    VocabularyMap.build(byte_bpe(300), byte_bpe(400), 320, 400, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_damaged_cache_file_is_built_again(tmp_path):
    pair = (characters("ab"), from_merges(["a", "b", "ab"]))
    built = VocabularyMap.build(*pair, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    cut = [whole[:n] for n in (0, 5, len(whole) // 2, len(whole) - 1)]
    flipped = [whole[:n] + bytes([whole[n] ^ 0x5B]) + whole[n + 1 :] for n in range(0, len(whole), 7)]
    for damaged in [b"not a map", *cut, *flipped]:
        file.write_bytes(damaged)
        assert same(VocabularyMap.build(*pair, cache_dir=tmp_path), built)


def test_rows_of_a_padded_head_have_no_spelling_and_are_no_target():
    student, teacher = byte_bpe(300), byte_bpe(400)
    found = VocabularyMap.build(student, teacher, 320, 448)
    assert found.segments.shape[0] == 448
    assert (found.segments[400:] == -1).all()
    assert found.segments.max() < 300
    assert found.student_vocab_size == 320


@pytest.mark.parametrize(("sizes", "who"), [((299, 400), "student"), ((300, 399), "teacher")])
def test_a_tokenizer_larger_than_its_models_head_is_refused(sizes, who):
    with pytest.raises(ValueError, match=rf"the {who}'s tokenizer has [34]00 tokens but its model only"):
        VocabularyMap.build(byte_bpe(300), byte_bpe(400), *sizes)


def test_a_slow_tokenizer_is_refused():
    class Slow(PreTrainedTokenizerBase):
        backend_tokenizer = None

        def __init__(self) -> None: ...

    with pytest.raises(ValueError, match="slow tokenizer Slow, expected a fast one"):
        TokenTable(Slow())


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_tokenizer_whose_unknown_token_is_no_added_token_is_read(kind):
    """Unigram names it by its number, BPE may name one that it lacks; neither stands for its own name in a text."""
    if kind == "BPE":
        model = tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[], unk_token="<unk>")
    else:
        model = tokenizers.models.Unigram([("<unk>", -9.0), ("a", -1.0), ("b", -1.0)], 0, False)
    table = TokenTable(PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model)))
    assert {b for b in table.bytes if b} == {b"a", b"b"}


def test_the_counted_channel_is_the_frequency_with_one_pseudo_count():
    base = VocabularyMap.from_segments(np.array([[3, 1], [2, -1], [-1, -1]], dtype=np.int32), 5)
    found = base.with_channel((np.array([0, 0, 0, 1]), np.array([4, 4, 3, 2])))
    rows = [
        {int(i): float(p) for i, p in zip(*row, strict=True) if i >= 0}
        for row in zip(found.channel_ids, found.channel_probs, strict=True)
    ]
    assert rows == [{4: pytest.approx(0.5), 3: pytest.approx(0.5)}, {2: pytest.approx(1.0)}, {}]


def test_stories_are_read_without_mismatch_by_a_tokenizer_that_knows_all_bytes():
    assert all((r.roles != MISMATCH).all() for r in TokenTable(byte_bpe(300)).read([*STORIES, END]))
