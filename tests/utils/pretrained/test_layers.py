"""Smaller models made from bigger ones: which layers are taken, and that the result is a model like any other."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, T5Config

from utils.errors import UserError
from utils.pretrained.families import auto_class
from utils.pretrained.layers import (
    _first_tensor,
    choose_layers,
    cut_config,
    empty_model,
    evenly_spread,
    keep_layers,
    layer_list_name,
    require_count,
    require_kept,
)

LAYERS = 6
KEPT = (0, 2, 5)
HEADS = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {**HEADS, "vocab_size": 97, "intermediate_size": 48, "head_dim": 8, "max_position_embeddings": 64}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "llama": COMMON,
    "qwen2": {**COMMON, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "gemma3_text": {**COMMON, "sliding_window": 4, "sliding_window_pattern": 3},
    "cohere2": {**COMMON, "sliding_window": 4, "sliding_window_pattern": 3},
    "smollm3": COMMON,
    "mixtral": {**COMMON, "num_local_experts": LAYERS, "num_experts_per_tok": 2},
    "gpt_neox": COMMON,
    "opt": {**HEADS, "vocab_size": 97, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "gpt2": GPT,
    "gpt_neo": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_layers": LAYERS,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 3]],
        "window_size": 4,
        "max_position_embeddings": 64,
    },
    "rwkv": {**HEADS, "vocab_size": 97, "attention_hidden_size": 32},
}
TEXT = torch.arange(3, 43).reshape(2, 20)


def model_of(family: str, **changes) -> torch.nn.Module:
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def cut_in_place(model: torch.nn.Module, indices: tuple[int, ...]) -> torch.nn.Module:
    """Return a copy whose layers are those of the original, each as it was made."""
    cut = copy.deepcopy(model)
    parent, _, name = layer_list_name(model).rpartition(".")
    layers = getattr(cut.get_submodule(parent), name)
    setattr(cut.get_submodule(parent), name, torch.nn.ModuleList([layers[index] for index in indices]))

    # the body asks its config for the masks of its layers
    config = cut.config
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in indices]
    config.num_hidden_layers = len(indices)
    return cut


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TEXT, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_computes_what_its_layers_did_and_loads_like_any_other(family, tmp_path):
    model = model_of(family)
    cut = keep_layers(model, KEPT)
    assert cut.config.num_hidden_layers == len(KEPT)
    torch.testing.assert_close(logits(cut), logits(cut_in_place(model, KEPT)), rtol=0, atol=0)

    cut.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(cut))


def test_all_layers_are_the_whole_model():
    model = model_of("gemma3_text")
    torch.testing.assert_close(logits(keep_layers(model, range(LAYERS))), logits(model), rtol=0, atol=0)


def test_kinds_of_layers_and_other_settings_by_layer_are_cut_too():
    gemma = keep_layers(model_of("gemma3_text"), KEPT).config
    assert gemma.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert keep_layers(model_of("smollm3"), (2, 3)).config.no_rope_layers == [1, 0]


def test_a_list_of_token_ids_is_no_setting_of_layers():
    model = model_of("llama", eos_token_id=[1, 2, 3, 4, 5, 6])
    assert keep_layers(model, KEPT).config.eos_token_id == [1, 2, 3, 4, 5, 6]


def test_what_was_quantised_once_is_a_plain_model_after_the_cut(tmp_path):
    model = model_of("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    keep_layers(model, KEPT).save_pretrained(tmp_path)
    assert not hasattr(AutoModelForCausalLM.from_pretrained(tmp_path).config, "quantization_config")


def test_the_layers_that_change_most_are_chosen():
    """A layer whose two outputs are 0 hands its input on, and changes nothing."""
    model = model_of("llama")
    with torch.no_grad():
        for index in (1, 2, 4):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()

    choice = choose_layers(model, 3, list(TEXT))
    assert choice.indices == (0, 3, 5)
    assert all(choice.changes[index] < 1e-3 < choice.changes[0] for index in (1, 2, 4))
    assert choice == choose_layers(model.train(), 3, list(TEXT)), "the same choice every time"
    assert model.training


def test_where_all_layers_are_kept_nothing_is_chosen():
    model = model_of("llama")
    choice = choose_layers(model, LAYERS, list(TEXT))
    assert (choice.indices, choice.changes) == (tuple(range(LAYERS)), ())
    assert str(choice).endswith("all of them, so that nothing is cut")


def test_without_text_layers_are_evenly_spread():
    choice = choose_layers(model_of("llama"), 3)
    assert (choice.indices, choice.changes) == ((0, 2, 5), ())
    for total in range(1, 40):
        for count in range(1, total + 1):
            spread = evenly_spread(total, count)
            assert len(set(spread)) == count
            assert spread[0] == 0
            assert count == 1 or spread[-1] == total - 1


@pytest.mark.parametrize("count", [0, LAYERS + 1])
def test_a_number_of_layers_that_the_model_has_not_is_refused(count):
    with pytest.raises(UserError, match=f"has {LAYERS} layers"):
        choose_layers(model_of("llama"), count)


def test_encoder_decoder_models_are_refused():
    with pytest.raises(UserError, match="encoder-decoder"):
        require_count(T5Config(), 1)


def test_layers_of_several_forms_that_no_config_describes_are_refused():
    config = CONFIG_MAPPING["qwen3_moe"](
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=2
    )
    model = auto_class(config).from_config(config)
    for refuses in (keep_layers, require_kept):
        with pytest.raises(UserError, match=r"not alike.* is \(.* in one of 3 layers"):
            refuses(model, KEPT)


def test_it_is_known_before_a_model_is_made_whether_its_layers_can_be_kept():
    model = model_of("llama")
    require_kept(model, KEPT)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_number_of_layers_that_an_architecture_cannot_compute_with_is_refused():
    model = model_of("rwkv")
    with pytest.raises(UserError, match=r"no rwkv model of so many layers.*ZeroDivisionError"):
        empty_model(cut_config(model.config, (0,)))


def test_states_that_are_no_states_of_tokens_are_refused():
    """Gemma 3n passes on several versions of its states at once."""
    with pytest.raises(UserError, match="pass on no hidden states"):
        _first_tensor((torch.zeros(4, 2, 3, 8),))
