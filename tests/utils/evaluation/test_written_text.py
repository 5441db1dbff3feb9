"""Figures of the text that a model writes."""

import math

import pytest
import torch

from tests.models.tiny import STORIES, byte_bpe, tiny_bart, tiny_llama
from utils.evaluation.written_text import Judge, Sample, Sampling, describe, repeated_share, sample_texts


@pytest.fixture
def model():
    return tiny_llama(300)


def test_samples_are_the_same_for_a_seed_and_leave_the_random_numbers_alone(model):
    prompts = [[5, 6, 7], [8, 9]]
    state = torch.random.get_rng_state()
    first = sample_texts(model, prompts, Sampling(new_tokens=12, end=None, seed=3))
    assert (torch.random.get_rng_state() == state).all()
    assert first == sample_texts(model, prompts, Sampling(new_tokens=12, end=None, seed=3))
    assert first != sample_texts(model, prompts, Sampling(new_tokens=12, end=None, seed=4))
    assert [text.prompt for text in first] == prompts and all(len(text.ids) == 12 for text in first)


def test_a_prompt_beside_a_longer_one_is_continued_as_if_it_were_alone():
    # All but certain of each token, so that what is sampled is what is likeliest.
    peaked = tiny_llama(300)
    peaked.lm_head.weight.data *= 500
    short, long = [8, 9], [5, 6, 7, 5, 6, 7]
    beside = sample_texts(peaked, [short, long], Sampling(new_tokens=4, end=None))[0]
    ids = list(short)
    for _ in range(4):
        ids.append(int(peaked(torch.tensor([ids])).logits[0, -1].argmax()))
    assert beside.ids == ids[2:]


def test_an_encoder_reads_a_prompt_beside_a_longer_one_as_if_it_were_alone():
    model = tiny_bart(300)
    model.lm_head.weight.data *= 500
    short, long = [8, 9], [5, 6, 7, 5, 6, 7]
    sampling = Sampling(new_tokens=4, end=None)
    assert sample_texts(model, [short, long], sampling)[0] == sample_texts(model, [short], sampling)[0]


def test_no_copy_of_a_frozen_head_is_made_for_each_prompt(model):
    """PyTorch makes one for states that are a view, such as the last of each row."""
    seen = []
    head = model.requires_grad_(False).get_output_embeddings()
    head.register_forward_hook(lambda head, inputs, logits: seen.append(inputs[0]))
    sample_texts(model, [[5, 6, 7], [8, 9]], Sampling(new_tokens=2, end=None), float32=False)
    assert len(seen) == 2 and all(states.is_contiguous() for states in seen)

    # Nothing stays behind: whoever else calls the head has what it gave.
    model(torch.tensor([[5, 6, 7], [8, 9, 5]]), logits_to_keep=1)
    assert not seen[-1].is_contiguous()


def test_a_sample_stops_at_the_end_of_text_or_at_the_context(model):
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[17] = 1e4 * torch.sign(model.model.norm.weight.data)
    states = model.model(input_ids=torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    model.lm_head.weight.data[17] = 1e4 * states.detach()
    [text] = sample_texts(model, [[5, 6]], Sampling(new_tokens=5, end=17))
    assert text.has_ended and text.ids == []

    model.config.max_position_embeddings = 4
    [text] = sample_texts(model, [[5, 6]], Sampling(new_tokens=50, end=None))
    assert not text.has_ended and len(text.ids) == 2
    [text] = sample_texts(model, [[5, 6, 7, 8]], Sampling(new_tokens=50, end=None))
    assert text.ids == [] and not text.has_ended


def test_repeated_ngrams_are_counted_within_each_text():
    assert repeated_share([[1, 2, 3, 4, 5, 6]]) == 0
    assert repeated_share([[1, 1, 1, 1, 1, 1]]) == pytest.approx(2 / 3)
    assert repeated_share([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0, "the same text twice repeats nothing within itself"
    assert repeated_share([[1, 2, 3], []]) is None


@pytest.mark.parametrize("before", [[0], []], ids=["behind a start", "behind its prompt alone"])
def test_a_judges_bits_are_those_of_each_text_alone_behind_its_prompt(model, before):
    tokenizer = byte_bpe(300)
    prompts, texts = [STORIES[0][:20], STORIES[1][:31]], [STORIES[0][20:], STORIES[1][31:50]]
    judge = Judge(model, tokenizer, [(before, prompt) for prompt in prompts])

    nats = num_bytes = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        encoded = tokenizer(prompt + text, return_offsets_mapping=True, add_special_tokens=False)
        ids = [*before, *encoded["input_ids"]]
        log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(1)
        begins = [begin for begin, _ in encoded["offset_mapping"]]
        scored = [number for number, begin in enumerate(begins) if begin >= len(prompt)]
        for number in scored:
            position = len(before) + number
            nats -= float(log_probs[position - 1, ids[position]])
        num_bytes += len((prompt + text)[begins[scored[0]] :].encode())
    assert judge.bits_per_byte(texts) == pytest.approx(nats / num_bytes / math.log(2), rel=1e-5)


def test_nothing_written_has_no_bits(model):
    judge = Judge(model, byte_bpe(300), [([0], "Once")])
    assert judge.bits_per_byte([""]) is None
    metrics = describe([Sample([0], [], has_ended=True)], byte_bpe(300), {"teacher": judge})
    expected = {"samples": 1, "tokens": 0, "ended": 1, "repeated_4grams": None, "teacher_bits_per_byte": None}
    assert metrics == expected


def test_a_text_that_its_judge_wrote_is_likelier_than_another():
    writer, other = tiny_llama(300, seed=1), tiny_llama(300, seed=2)
    tokenizer = byte_bpe(300)
    judge = Judge(writer, tokenizer, [([0], "")] * 8)
    bits = []
    for model in (writer, other):
        samples = sample_texts(model, [[0]] * 8, Sampling(new_tokens=24, end=None))
        bits.append(describe(samples, tokenizer, {"teacher": judge})["teacher_bits_per_byte"])
    assert bits[0] < bits[1]
