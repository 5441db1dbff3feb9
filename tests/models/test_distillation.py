"""The pair in one object: the same parts as put together by hand, from names, from models, or from parts alone."""

import pytest
import torch

from models.config import CurriculumConfig, LossConfig, Term
from models.curriculum import CurriculumScheduler
from models.distillation import Distillation, Method
from models.distillation_framework import DistillationFramework
from models.teacher.frozen import FrozenTeacher
from tests.models.tiny import STORIES, byte_bpe, pretend_hub, tiny_llama, tiny_t5

TOKENIZERS = {"student": byte_bpe(280), "teacher": byte_bpe(330)}
LOSS = LossConfig(temperature=2.0, top_k=32)


def joined(curriculum: CurriculumConfig | None = None, **options) -> Distillation:
    student, teacher = tiny_llama(280, seed=1), tiny_llama(330, seed=2)
    method = Method(loss=LOSS, curriculum=curriculum or CurriculumConfig())
    return Distillation.from_models(student, teacher, TOKENIZERS, 48, method=method, **options)


def test_it_computes_what_its_parts_compute():
    pair = joined()
    batch = pair.batch(STORIES)
    by_hand = DistillationFramework(
        pair.student,
        FrozenTeacher(tiny_llama(330, seed=2), pair.vocabulary),
        pair.vocabulary,
        LOSS,
        CurriculumScheduler(CurriculumConfig(), LOSS, 10),
    )

    loss = pair.framework(total_steps=10)(batch, 3).loss
    torch.testing.assert_close(loss, by_hand(batch, 3).loss, rtol=0, atol=0)


def test_names_and_loaded_models_make_the_same_pair(monkeypatch):
    pretend_hub(monkeypatch, {"a/student": TOKENIZERS["student"], "a/teacher": TOKENIZERS["teacher"]})
    by_name = Distillation.from_pretrained("a/student", "a/teacher", 48, method=Method(loss=LOSS))
    assert by_name.encoder.fingerprint == joined().encoder.fingerprint
    assert len(by_name.windows(STORIES)) == len(joined().windows(STORIES))


def test_terms_on_hidden_states_get_their_anchors_and_their_router():
    pair = joined(curriculum=CurriculumConfig(feat=Term(1.0)))
    framework = pair.framework(total_steps=10)
    framework.calibrate([pair.batch(STORIES)])
    assert framework(pair.batch(STORIES), 0).terms["feat"].count > 0
    assert joined().framework(total_steps=10).router is None


def test_conversations_are_lists_of_messages():
    pair = joined(conversations=True)
    conversation = [{"role": "user", "content": "Who sang?"}, {"role": "assistant", "content": "A small green bird."}]
    learned = pair.collate(pair.windows([conversation])).counts["lm"]
    assert 0 < learned < len(pair.windows([conversation])[0]["student_ids"])


def test_a_pair_without_models_is_given_them_later():
    whole = joined()
    parts = Distillation(encoder=whole.encoder, vocabulary=whole.vocabulary, method=whole.method)
    with pytest.raises(ValueError, match="got no student"):
        parts.framework(total_steps=10)

    framework = parts.framework(total_steps=10, student=whole.student, teacher=whole.teacher)
    batch = parts.batch(STORIES)
    torch.testing.assert_close(framework(batch, 0).loss, whole.framework(10)(batch, 0).loss, rtol=0, atol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"got keys \['a', 'b'\], expected student and teacher"):
        Distillation.from_models(tiny_llama(280), tiny_llama(330), {"a": None, "b": None})
    with pytest.raises(ValueError, match="encoder-decoder model beside a causal one"):
        Distillation.from_models(tiny_t5(280), tiny_llama(330), TOKENIZERS, 48)
    with pytest.raises(TypeError, match="expected a language model of transformers"):
        Distillation.from_models("a name", tiny_llama(330), TOKENIZERS)
    with pytest.raises(TypeError, match="tokenizers: got a tuple"):
        Distillation.from_models(tiny_llama(280), tiny_llama(330), tuple(TOKENIZERS.values()))
    with pytest.raises(TypeError, match="method: got a LossConfig"):
        Distillation.from_models(tiny_llama(280), tiny_llama(330), TOKENIZERS, method=LOSS)
    with pytest.raises(ValueError, match="Method: loss"):
        Method(CurriculumConfig())


CONVERSATION = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A bird."}]


@pytest.mark.parametrize(
    "texts", ["one text", {"text": STORIES}, set(STORIES), [CONVERSATION], [["two", "texts"]], None, 5]
)
def test_what_is_no_list_of_texts_is_refused(texts):
    """A conversation too, which would be learned as the JSON around it."""
    with pytest.raises(TypeError):
        joined().windows(texts)


@pytest.mark.parametrize(
    "document",
    [[], ["hello"], {"messages": CONVERSATION}, [{"content": "no role"}], [{"role": "user", "content": None}]],
)
def test_what_is_no_conversation_is_refused_with_its_place(document):
    pair = joined(conversations=True)
    assert pair.windows([CONVERSATION, tuple(CONVERSATION)])
    with pytest.raises(TypeError, match=r"texts\[1\]: got .*, expected a list of messages"):
        pair.windows([CONVERSATION, document])


def test_windows_are_no_longer_than_either_model_reads():
    student, teacher = tiny_llama(280, seed=1), tiny_llama(330, seed=2, max_position_embeddings=24)
    pair = Distillation.from_models(student, teacher, TOKENIZERS, 48, method=Method(loss=LOSS))
    pair.framework(total_steps=10)(pair.batch(STORIES), 0)
    assert max(len(window["teacher_ids"]) for window in pair.windows(STORIES)) <= 24


def test_a_batch_shows_itself_in_three_lines():
    pair = joined()
    lines = repr(pair.batch(STORIES)).splitlines()
    assert len(lines) == 3
    assert f"lm {pair.batch(STORIES).counts['lm']:,}" in lines[2]
