"""Weights of few bits: refused where they cannot be used, and otherwise what transformers is asked for."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.models.tiny import byte_bpe, tiny_bart, tiny_llama, tiny_t5
from utils.errors import UserError
from utils.pretrained import export, loading
from utils.pretrained import precision as precision_module

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """Sets the compute capability of a GPU that is not there, and installs bitsandbytes or removes it."""

    def pretend(capability, installed=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)

    return pretend


@pytest.mark.parametrize("weights", ["8bit", "4bit"])
def test_few_bits_need_a_gpu(weights, gpu):
    gpu(None)
    with pytest.raises(UserError, match=rf"teacher\.dtype: got {weights}.*NVIDIA GPU.*on the cpu\. Expected auto"):
        precision_module.check_weights(weights, "teacher.dtype", CPU)


def test_few_bits_need_a_gpu_that_is_new_enough(gpu):
    gpu((6, 0))  # a P100
    precision_module.check_weights("4bit", "teacher.dtype", GPU)
    with pytest.raises(UserError, match=r"7\.5 or more, and this GPU has 6\.0.*or 4bit\."):
        precision_module.check_weights("8bit", "teacher.dtype", GPU)
    gpu((7, 5))  # a T4
    precision_module.check_weights("8bit", "teacher.dtype", GPU)


def test_few_bits_need_the_package(gpu):
    gpu((8, 0), installed=False)
    with pytest.raises(UserError, match=r"teacher\.dtype=4bit needs bitsandbytes.*pip install '\.\[quant\]'"):
        precision_module.check_weights("4bit", "teacher.dtype", GPU)


def test_other_weights_need_nothing(gpu):
    gpu(None, installed=False)
    for weights in ("auto", "float32", "float16", "bfloat16"):
        precision_module.check_weights(weights, "teacher.dtype", CPU)


@pytest.mark.parametrize(
    ("requested", "device", "precision", "dtype"),
    [
        ("auto", CPU, "no", torch.float32),
        ("auto", CPU, "fp16", torch.float32),
        ("auto", CPU, "bf16", torch.float32),
        ("auto", GPU, "no", torch.float32),
        ("auto", GPU, "fp16", torch.float16),
        ("auto", GPU, "bf16", torch.bfloat16),
        ("bfloat16", CPU, "no", torch.bfloat16),
        ("4bit", GPU, "fp16", torch.float16),
        ("4bit", GPU, "bf16", torch.bfloat16),
        ("8bit", GPU, "bf16", torch.float16),
    ],
)
def test_what_frozen_weights_are_computed_in(requested, device, precision, dtype):
    assert precision_module.frozen_dtype(requested, device, precision).value == dtype


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("no", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.bfloat16),
    ],
)
def test_a_teacher_on_a_cpu_with_instructions_for_bf16_computes_in_bf16(cpu, precision, dtype):
    cpu(amx_bf16=True)
    assert precision_module.frozen_dtype("auto", CPU, precision).value == dtype


@pytest.fixture
def folder(tmp_path):
    shape = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, initializer_range=0.2)).save_pretrained(tmp_path)
    return str(tmp_path)


class _Unmoved:
    """A quantised model, as transformers makes it: `.to` raises."""

    def to(self, *_):
        raise ValueError("`.to` is not supported for `4-bit` or `8-bit` bitsandbytes models")


@pytest.mark.parametrize("weights", ["8bit", "4bit"])
def test_few_bits_are_asked_of_transformers_on_the_device_itself(folder, monkeypatch, weights):
    asked = {}

    def load(source, **options):
        asked.update(options)
        return _Unmoved(), {"missing_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    assert isinstance(loading.load_model(folder, "teacher", torch.float16, GPU, weights), _Unmoved)
    assert asked["device_map"] == {"": GPU} and asked["dtype"] == torch.float16
    config = asked["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (weights == "8bit", weights == "4bit")
    if weights == "4bit":
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_compute_dtype == torch.float16


def test_whole_weights_are_asked_for_without_quantisation(folder, monkeypatch):
    sound, asked = AutoModelForCausalLM.from_pretrained, {}

    def load(source, **options):
        asked.update(options)
        return sound(source, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    model = loading.load_model(folder, "teacher", torch.bfloat16, CPU, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not {"quantization_config", "device_map"} & asked.keys()


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart])
def test_a_model_with_an_encoder_is_loaded_whole(tmp_path, build):
    """The class for causal models would load the decoder of some of them alone."""
    model = build(40)
    model.save_pretrained(tmp_path)
    found = loading.load_model(str(tmp_path), "student", torch.float32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    random = loading.random_model(loading.load_config(str(tmp_path), "student"))
    assert type(random) is type(model)


@pytest.mark.parametrize(("before", "after"), [(None, [0]), (2, [0, 2]), ([2, 0], [2, 0]), (0, 0)])
def test_an_exported_model_stops_where_its_tokenizer_ends_a_turn(tmp_path, before, after):
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=280, **shape))
    model.generation_config.eos_token_id = before
    export.export(model, byte_bpe(280), tmp_path / "student", "card")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").generation_config.eos_token_id == after


def test_an_exported_model_pads_with_a_token_that_exists(tmp_path):
    tokenizer, model = byte_bpe(280), tiny_llama(280)
    export.export(model, tokenizer, tmp_path / "by the end of text", "card")
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id
    model.generation_config.pad_token_id, tokenizer.pad_token = None, tokenizer.convert_ids_to_tokens(7)
    export.export(model, tokenizer, tmp_path / "by its own", "card")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "by its own").generation_config.pad_token_id == 7
