"""The report shows a sentence as both models read it, and where they differ most."""

from types import SimpleNamespace

import pytest

from models.config import CurriculumConfig, LossConfig
from models.distillation import Distillation, Method
from tests.models.tiny import byte_bpe, characters, tiny_llama
from utils.report import token_views

TEXT = "Once upon a time there was a little boat. It sailed to the old town, and back again. " * 3


def distillation(student_tokenizer, teacher_tokenizer) -> Distillation:
    tokenizers = {"student": student_tokenizer, "teacher": teacher_tokenizer}
    student, teacher = tiny_llama(len(student_tokenizer)), tiny_llama(len(teacher_tokenizer), seed=1)
    return Distillation.from_models(student, teacher, tokenizers, 128, method=Method(LossConfig(), CurriculumConfig()))


@pytest.mark.parametrize("sizes", [(280, 400), (400, 280), (300, 300)])
def test_both_rows_say_the_same_text_block_by_block(sizes):
    pair = distillation(*map(byte_bpe, sizes))
    view = token_views.alignment(pair, pair.windows([TEXT]))
    for span in view["spans"]:
        assert "".join(span["student"]) == "".join(span["teacher"])
    shown = "".join("".join(span["student"]) for span in view["spans"])
    assert (TEXT.startswith(shown.strip()) and shown.endswith((".", ","))) or len(shown) >= token_views.MOST_TOKENS
    assert 0 < view["at_boundary"] <= view["anchored"] <= view["tokens"] <= token_views.MOST_TOKENS + 16
    if sizes[0] == sizes[1]:
        assert view["at_boundary"] == view["tokens"]


def test_tokens_of_characters_stand_below_those_of_words():
    pair = distillation(characters(), byte_bpe(400))
    view = token_views.alignment(pair, pair.windows([TEXT]))
    assert any(len(span["student"]) > len(span["teacher"]) for span in view["spans"])


def held_out(pair, texts):
    windows = pair.windows(texts)
    cpu = SimpleNamespace(device="cpu", num_processes=1)
    return SimpleNamespace(windows=windows, collate=pair.collate, accelerator=cpu, batch_size=2)


def test_the_places_of_the_largest_difference_come_first_with_what_both_would_have_said():
    pair = distillation(byte_bpe(280), byte_bpe(400))
    text = held_out(pair, [TEXT, TEXT.upper(), "another one, quite short"])
    framework = pair.framework(10)
    places = token_views.differences(text, pair, pair.student, framework.differences)
    assert 0 < len(places) <= token_views.MOST_DIFFERENCES
    assert [place["kl"] for place in places] == sorted((place["kl"] for place in places), reverse=True)
    for place in places:
        whole = place["context"] + place["next"]
        assert any(whole in other for other in (TEXT, TEXT.upper(), "another one, quite short"))
        assert len(place["student"]) == 3 and 0 < place["teacher"][0]["probability"] <= 1


def test_places_are_the_same_for_any_size_of_batch():
    pair = distillation(byte_bpe(280), byte_bpe(400))
    framework = pair.framework(10)
    text = held_out(pair, [TEXT + str(number) for number in range(5)])
    alone = SimpleNamespace(**{**vars(text), "batch_size": 1})
    one = token_views.differences(text, pair, pair.student, framework.differences)
    other = token_views.differences(alone, pair, pair.student, framework.differences)
    assert [place["context"] for place in one] == [place["context"] for place in other]


@pytest.mark.parametrize("text", [TEXT, "Ein Mädchen ging über die Straße. Дети играли. 子供たちは公園で遊んだ。"])
def test_the_text_is_whole_and_the_chosen_positions_are_marked(text):
    pair = distillation(byte_bpe(280), byte_bpe(400))
    framework = pair.framework(10)
    window = pair.windows([text])[0]
    batch = pair.collate([window])

    positions = framework.chosen(batch, 0.25).tolist()
    assert len(positions) == round(0.25 * len(batch.row_student))
    view = token_views.chosen(pair, window, positions)
    shown = "".join(piece for piece, _ in view)
    assert text.startswith(shown) and len(shown) > 0.3 * len(text)
    marked = sum(is_marked for _, is_marked in view)
    assert 0 < marked <= len(positions)
    assert framework.chosen(batch, 1.0).tolist() == batch.row_student.tolist()

    everything = token_views.chosen(pair, window, range(len(window["student_ids"])))
    assert all(is_marked for _, is_marked in everything)
