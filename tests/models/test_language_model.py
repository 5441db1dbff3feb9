"""Body and head against the model's own logits, for every kind of head the library knows."""

import pytest
import torch
import transformers
from torch import nn

from models import language_model
from models.language_model import body_layers, body_states, check_head, depth_and_width, head_logits, vocabulary_size
from models.types import Source
from tests.models.tiny import tiny_bart, tiny_llama, tiny_t5

SHAPE = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SHAPE, "intermediate_size": 32, "num_key_value_heads": 2, "initializer_range": 0.4, "pad_token_id": 0}
GEMMA = {**LLAMA, "num_hidden_layers": 2, "head_dim": 8, "query_pre_attn_scalar": 8}


def build(name: str) -> nn.Module:
    configs = {
        "Llama": LLAMA,
        "tied Llama": LLAMA | {"tie_word_embeddings": True},
        "GPT2": {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.4},
        "GPTNeoX": SHAPE | {"intermediate_size": 32, "initializer_range": 0.4},
        "Gemma2": GEMMA | {"final_logit_softcapping": 2.0},
        "Mistral": LLAMA | {"sliding_window": 4},
        "Cohere": LLAMA | {"logit_scale": 0.25},
        "Granite": LLAMA | {"logits_scaling": 3.0},
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{name.split()[-1]}Config")(**configs[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["Llama", "tied Llama", "GPT2", "GPTNeoX", "Gemma2", "Cohere", "Granite"])
@torch.no_grad()
def test_head_of_body_is_the_models_own_logits(name):
    model = build(name)
    ids, mask = torch.randint(1, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0  # ours are without a mask
    own = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    assert torch.allclose(head_logits(model, body_states(model, ids))[mask.bool()], own, atol=1e-5)
    check_head(model, "student")
    assert vocabulary_size(model) == 40


@pytest.mark.parametrize("name", ["Gemma2", "Cohere", "Granite"])
@torch.no_grad()
def test_scale_and_cap_of_the_config_matter_in_these_models(name):
    """Otherwise the test above would say nothing about them."""
    model = build(name)
    ids = torch.randint(1, 40, (1, 9))
    states = body_states(model, ids)
    assert not torch.allclose(model.get_output_embeddings()(states), model(input_ids=ids).logits, atol=1e-2)


@torch.no_grad()
def test_right_padding_does_not_change_the_states_of_the_text():
    for name in ("Llama", "GPT2", "GPTNeoX"):
        model, ids = build(name), torch.randint(1, 40, (1, 6))
        padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
        assert torch.allclose(body_states(model, padded)[:, :6], body_states(model, ids), atol=1e-5)


def test_a_model_with_logits_of_its_own_is_refused():
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.flip(-1)
            return output

    with pytest.raises(ValueError, match=r"the teacher \(Shifted\).*expected head"):
        check_head(Shifted(tiny_llama(40).config), "teacher")


def test_a_model_that_reads_ahead_is_refused():
    model = tiny_llama(40)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="reads the text that follows"):
        check_head(model, "student")


NOT_CAUSAL = {
    "XLNet": transformers.XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32),
    "BERT": transformers.BertConfig(**SHAPE, intermediate_size=32, is_decoder=False),
    "RoBERTa": transformers.RobertaConfig(**SHAPE, intermediate_size=32, is_decoder=False),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_that_reads_ahead_is_refused_also_at_its_random_start(name, role):
    """It has learned nothing yet: what follows changes its logits by a thousandth."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(NOT_CAUSAL[name])
    with pytest.raises(ValueError, match=rf"the {role} \({type(model).__name__}\) reads the text that follows"):
        check_head(model, role)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.02, 0.4])
@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Qwen3Moe", "GPT2", "Mamba"])
def test_a_causal_model_is_taken_in_every_precision(family, spread, dtype):
    """Experts get other numbers of rows where later tokens change, which rounds otherwise."""
    sizes = {"GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2}, "Mamba": {"hidden_size": 16, "num_hidden_layers": 2}}
    experts = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    }
    options = sizes.get(family, LLAMA | experts.get(family, {})) | {"vocab_size": 40, "initializer_range": spread}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options))
    check_head(model.to(dtype), "teacher")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_reads_ahead_is_refused_in_half_precision(dtype):
    model = build("Llama").to(dtype)
    model.config.is_causal = False
    with pytest.raises(ValueError, match="reads the text that follows"):
        check_head(model, "teacher")


def test_a_decoder_that_reads_a_little_ahead_is_refused():
    model = tiny_t5(40)
    attention = model.decoder.block[0].layer[0].SelfAttention
    causal_forward = attention.forward

    def forward(states, *args, **options):
        return causal_forward(states + 1e-3 * states.mean(1, keepdim=True), *args, **options)

    attention.forward = forward
    with pytest.raises(ValueError, match="reads the text that follows"):
        check_head(model, "student")


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no output embeddings"):
        check_head(tiny_llama(40).model, "student")


def test_the_check_leaves_the_training_mode_alone():
    model = tiny_llama(40)
    for mode in (True, False):
        model.train(mode)
        check_head(model, "student")
        assert model.training is mode


@torch.no_grad()
def test_logits_of_a_half_head_are_float32_whatever_the_states():
    model = tiny_llama(40).to(torch.bfloat16)
    assert head_logits(model, torch.randn(3, 16)).dtype == torch.float32


PAIRS = {
    "T5": lambda: tiny_t5(40, num_decoder_layers=3),
    "T5 1.1": lambda: tiny_t5(40, num_decoder_layers=3, tie_word_embeddings=False, feed_forward_proj="gated-gelu"),
    "BART": lambda: tiny_bart(40, decoder_layers=3),
}


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_head_of_a_decoder_is_the_models_own_logits_and_its_layers_are_the_decoders(name):
    model = PAIRS[name]()
    check_head(model, "student")
    ids, source = torch.randint(1, 40, (2, 6)), Source(torch.randint(1, 40, (2, 9)), torch.ones(2, 9, dtype=torch.long))
    source.mask[1, 5:] = 0
    inputs = {"input_ids": source.ids, "attention_mask": source.mask, "decoder_input_ids": ids}
    own = model(**inputs, output_hidden_states=True)
    states, layers = body_layers(model, ids, (1, 3), source)
    assert torch.allclose(head_logits(model, states), own.logits, atol=1e-5)
    assert depth_and_width(model) == (3, 16) == (len(own.decoder_hidden_states) - 1, states.shape[-1])
    assert all(torch.equal(layer, own.decoder_hidden_states[n]) for layer, n in zip(layers, (1, 3), strict=True))
    source.ids[1, 5:] = 7  # padding
    assert torch.equal(body_states(model, ids, source), states)
    source.ids[1, 4] += 1
    assert not torch.equal(body_states(model, ids, source), states)


@torch.no_grad()
def test_the_scale_of_the_config_matters_in_a_t5():
    model, ids = PAIRS["T5"](), torch.randint(1, 40, (1, 6))
    states = body_states(model, ids, Source(ids, torch.ones_like(ids)))
    own = model(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.allclose(model.get_output_embeddings()(states), 4 * own, atol=1e-4)


def test_a_model_with_a_bias_of_its_own_on_the_logits_is_refused():
    model = tiny_bart(40)
    model.final_logits_bias[0, 3] = 0.01  # too little to be seen in the logits
    with pytest.raises(ValueError, match="adds a bias to its logits"):
        check_head(model, "teacher")


def test_a_decoder_that_reads_ahead_is_refused():
    model = tiny_t5(40)
    for layer in model.decoder.block:
        layer.layer[0].SelfAttention.forward = _sees_everything(layer.layer[0].SelfAttention.forward)
    with pytest.raises(ValueError, match="reads the text that follows"):
        check_head(model, "student")


def _sees_everything(forward):
    def call(states, mask=None, **options):
        return forward(states.mean(1, keepdim=True).expand_as(states).contiguous(), mask=mask, **options)

    return call


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_logits_are_written_into_memory_that_is_there(monkeypatch, bias):
    """Block by block, of any number of tokens; with fewer states than there is room for."""
    monkeypatch.setattr(language_model, "CPU_BLOCK", 3)
    model = tiny_llama(50)
    model.lm_head = nn.Linear(model.config.hidden_size, 50, bias=bias)
    states, room = torch.randn(4, model.config.hidden_size), torch.full((6, 50), torch.nan)
    found = head_logits(model, states, out=room)
    assert found.data_ptr() == room.data_ptr() and room[4:].isnan().all()
    assert torch.allclose(found, model.lm_head(states), atol=1e-6)
