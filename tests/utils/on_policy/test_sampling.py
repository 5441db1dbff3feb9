"""Sampled text: a function of weights and random numbers alone, drawn from the model's distribution."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from utils.errors import UserError
from utils.on_policy import sampling as sampling_module
from utils.on_policy.sampling import GenerateEngine, Prompt, SamplingRule, checked_rows, uniforms

VOCABULARY = 23
RULE = SamplingRule(stop_ids=[5, 7])


@pytest.fixture(scope="module")
def student() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def prompts(count: int, new_tokens: int = 9) -> list[Prompt]:
    draw = random.Random(0)
    return [
        Prompt(draw.choices(range(8, VOCABULARY), k=draw.randint(1, 6)), uniforms(3, 0, slot, new_tokens))
        for slot in range(count)
    ]


def write(student: nn.Module, asked: list[Prompt], together: int = 64, rule: SamplingRule = RULE) -> list[list[int]]:
    return GenerateEngine(lambda tokens: together)(student, asked, rule, lambda count: None)


def test_a_text_does_not_depend_on_the_batch_it_is_written_in(student):
    asked = prompts(12)
    texts = write(student, asked)
    assert write(student, asked, together=5) == texts
    assert [write(student, [prompt])[0] for prompt in asked] == texts
    assert write(student, asked[::-1]) == texts[::-1]
    assert len({tuple(text) for text in texts}) > 6


def test_global_generators_and_the_mode_of_the_student_stay_as_they_were(student):
    student.train()
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    write(student, prompts(3))
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numbers)
    assert student.training


def test_a_text_ends_with_the_first_stop_token_or_at_its_limit(student):
    asked = [Prompt([9, 10], uniforms(1, 0, slot, 1 + slot % 4)) for slot in range(40)]
    ends = 0
    for text, prompt in zip(write(student, asked), asked, strict=True):
        assert 1 <= len(text) <= len(prompt.uniforms)
        assert not set(text[:-1]) & set(RULE.stop_ids)
        ends += text[-1] in RULE.stop_ids
        assert text[-1] in RULE.stop_ids or len(text) == len(prompt.uniforms)
    assert 0 < ends < 40


def test_prompts_without_room_get_no_token_and_long_ones_fit_into_the_context(student):
    full = Prompt(list(range(8, 20)) * 2, np.empty(0))
    nearly_full = Prompt([9] * 30, uniforms(0, 0, 0, 2))
    short = Prompt([9], uniforms(0, 0, 1, 31))
    texts = write(student, [full, nearly_full, short])
    assert texts[0] == [] and len(texts[1]) <= 2
    assert texts == [write(student, [prompt])[0] for prompt in (full, nearly_full, short)]


def test_tokens_are_drawn_from_the_tempered_and_cut_distribution(student):
    """First tokens behind one prompt, for evenly spread numbers: their shares are the probabilities."""
    numbers = (np.arange(2000) + 0.5) / 2000
    with torch.no_grad():
        logits = student.eval()(torch.tensor([[9, 10, 11]])).logits[0, -1].double()

    for rule, probabilities in (
        (SamplingRule([]), logits.softmax(0)),
        (SamplingRule([], temperature=0.5), (2 * logits).softmax(0)),
    ):
        texts = write(student, [Prompt([9, 10, 11], numbers[i : i + 1]) for i in range(2000)], 2000, rule)
        shares = np.bincount([text[0] for text in texts], minlength=VOCABULARY) / 2000
        assert np.abs(shares - probabilities.numpy()).max() < 1e-3

    texts = write(
        student, [Prompt([9, 10, 11], numbers[i : i + 1]) for i in range(2000)], 2000, SamplingRule([], 1, 0.4)
    )
    likeliest = logits.softmax(0).sort(descending=True)
    kept = int((likeliest.values.cumsum(0) < 0.4).sum()) + 1
    assert {text[0] for text in texts} == set(likeliest.indices[:kept].tolist())


def test_a_token_without_probability_is_never_drawn():
    draw = sampling_module._Draw(torch.tensor([[0.0], [0.5], [1 - 2**-53]]), width=2)
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(3, 1)
    chosen = draw(torch.zeros(3, 2), logits).argmax(1).tolist()
    assert chosen == [1, 3, 3]


def test_a_token_is_drawn_where_logits_have_overflowed():
    """Logits can overflow in float16; the loss is not finite either then, and the training skips such a step."""
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan] * 4, [-inf] * 4, [0.0, inf, 0.0, 0.0], [nan, nan, 3.0, nan]])
    draw = sampling_module._Draw(torch.full((4, 1), 0.6, dtype=torch.float64), width=1)
    assert draw(torch.zeros(4, 1, dtype=torch.long), logits).argmax(-1).tolist() == [2, 2, 1, 2]


def test_random_numbers_are_those_of_a_slot():
    assert np.array_equal(uniforms(1, 2, 3, 5), uniforms(1, 2, 3, 9)[:5])
    different = {uniforms(*key, 1)[0] for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]}
    assert len(different) == 4
    numbers = uniforms(0, 0, 0, 10_000)
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(numbers.mean() - 0.5) < 0.02
    assert uniforms(0, 0, 0, 1)[0] == FIRST


FIRST = 0.8540608618344168
"""Of seed, step and slot 0: the stream must be the same in every version of NumPy."""


def test_a_batch_that_does_not_fit_is_written_in_smaller_ones(student, monkeypatch, caplog):
    sound = sampling_module._write_batch
    sizes = []

    def small_memory(model, batch, rule):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sound(model, batch, rule)

    expected = write(student, prompts(8))
    monkeypatch.setattr(sampling_module, "_write_batch", small_memory)
    assert write(student, prompts(8), together=8) == expected
    assert sizes == [8, 4, 2, 2, 2, 2]
    assert "writes 4 texts at a time" in caplog.text


def test_batches_hold_fewer_texts_where_prompts_are_longer(student):
    asked = [Prompt([3] * length, np.full(4, 0.5)) for length in (2, 20, 2, 20, 2, 6)]
    batches = []
    # so many tokens in all, with what is written behind each prompt
    GenerateEngine(lambda tokens: 30 // tokens)(student, asked, RULE, batches.append)
    assert batches == [3, 1, 1, 1]


def test_writing_can_be_ended_between_two_batches(student):
    written = []

    def note(count):
        written.append(count)
        if len(written) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GenerateEngine(lambda tokens: 2)(student, prompts(9), RULE, note)
    assert written == [2, 2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (None, "got NoneType None"),
        ([[1.5], []], "expected lists of whole numbers"),
        (["ab", "c"], "expected lists of whole numbers"),
        ([[1]], "got 1 rows, expected 2"),
        ([[1], [1, 2, 3, 4]], "got 4 tokens in row 1, expected at most 3"),
        ([[1, 9], []], "got token 9 in row 0, expected 0 to 8"),
        ([[-1], []], "got token -1 in row 0"),
    ],
)
def test_what_another_engine_writes_is_checked(rows, words):
    prompts = [Prompt([1], np.zeros(2)), Prompt([1], np.zeros(3))]
    with pytest.raises(UserError, match=words):
        checked_rows(rows, prompts, 9)


def test_another_engine_may_write_in_any_whole_numbers():
    prompts = [Prompt([1], np.zeros(2))] * 2
    for rows in ([[1, 2], [3]], [np.array([1, 2], dtype=np.uint8), np.array([3])], (torch.tensor([1, 2]), (3,))):
        texts = checked_rows(rows, prompts, 9)
        assert texts == [[1, 2], [3]] and {type(token) for text in texts for token in text} == {int}
