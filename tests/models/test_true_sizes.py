"""Qwen2.5 teaches SmolLM: the real tokenizers and vocabulary sizes, bodies of almost no weight."""

import time

import pytest

from models.teacher.projection import Projection
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from tests.models.tiny import Pair, gradients, tiny_llama

QWEN, SMOLLM = 151_936, 49_152


@pytest.fixture(scope="module")
def built(real_tokenizer) -> tuple[VocabularyMap, float]:
    """The map and the seconds of processor time it took."""
    start = time.process_time()
    vocabulary = VocabularyMap.build(real_tokenizer("smollm"), real_tokenizer("qwen2.5"), SMOLLM, QWEN)
    return vocabulary, time.process_time() - start


@pytest.fixture(scope="module")
def pair(real_tokenizer, built) -> Pair:
    return Pair(
        student=tiny_llama(SMOLLM, seed=1, tie_word_embeddings=True),
        teacher=tiny_llama(QWEN, seed=2, tie_word_embeddings=True),
        encoder=PairEncoder(real_tokenizer("smollm"), real_tokenizer("qwen2.5"), 128),
        vocabulary=built[0],
    )


def test_vocabulary_map_is_built_in_under_a_minute(built):
    vocabulary, seconds = built
    assert seconds < 60
    assert vocabulary.segments.shape[0] == QWEN
    assert (vocabulary.segments[151_665:] == -1).all()
    assert vocabulary.segments.max() < SMOLLM


def test_forward_and_backward_work_and_english_prose_is_covered(pair, real_models_dir):
    prose = (real_models_dir / "corpora" / "bronte.txt").read_text(encoding="utf-8")[50_000:60_000]
    windows = pair.encoder.windows([prose])
    assert sum(w["bytes"] for w in windows) == len(pair.encoder.canonical(prose).encode())
    counts = pair.collator()(windows).counts
    assert counts["kd"] / counts["lm"] > 0.97
    assert counts["depth0"] / counts["lm"] > 0.9
    output = pair.framework({"kd": 0.7, "span": 0.1, "lm": 0.3}, top_k=64)(pair.collator()(windows[:2]))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(pair.student))


def test_rows_without_a_token_are_never_targets(pair):
    batch = pair.batch(["The girl went to the park. 子供たち"])
    target = Projection(pair.vocabulary, "span", 1e-3)(pair.frozen().signal(batch, 512), batch)
    assert target.ids.max() < len(pair.encoder.tables[0].bytes)
    assert ((target.probs.sum(1) + target.tail - 1).abs() < 1e-5).all()
