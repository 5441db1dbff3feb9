"""Memory of a text that is written: its keys and values, and the logits of its next token."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from utils.forecast.writing_memory import LOGIT, MOST_TOGETHER, WritingMemory

SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_keys_and_values_are_those_that_transformers_keeps():
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with torch.no_grad():
        cache = model(torch.zeros(1, 10, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    # and one layer twice, while it grows
    writing = WritingMemory.of(LlamaConfig(**SHAPE), budget=0)
    assert writing.batch(1, 10) == kept * 4 / 3 + 1000 * LOGIT


def test_as_many_texts_are_written_together_as_fit_and_at_least_one():
    def texts(budget: int, tokens: int) -> int:
        return WritingMemory(token=8, text=20, budget=budget).texts(tokens)

    assert [texts(budget, tokens=10) for budget in (0, 199, 200, 1000, 10**9)] == [1, 1, 2, 8, MOST_TOGETHER]
    assert [texts(1000, tokens) for tokens in (1, 10, 60, 200)] == [32, 8, 2, 1]
