"""A trained adapter that is given as a model is its base with the adapter in its weights."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig

from tests.models.tiny import byte_bpe, tiny_llama
from utils.config.build import build
from utils.config.settings import StudentConfig
from utils.errors import UserError
from utils.pretrained import loading, student

peft = pytest.importorskip("peft", reason="peft is not installed: pip install -e .[peft]")
TOKENIZER = byte_bpe(290)
IDS = torch.arange(1, 13).reshape(2, 6)


@pytest.fixture
def adapter(tmp_path):
    """Folder of an adapter that does something, beside its base."""
    base = tiny_llama(len(TOKENIZER))
    base.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        model.eval().expected = model(input_ids=IDS).logits
    return tmp_path / "adapter", model.expected


def rewrite(folder, **values):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_computes_what_it_computed_when_it_was_trained(adapter, with_config, caplog):
    folder, expected = adapter
    if with_config:  # as some trainers leave it
        shutil.copy(folder.parent / "base" / "config.json", folder)
    with caplog.at_level("INFO"):
        model = loading.load_model(str(folder), "teacher", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert f"is an adapter of {folder.parent / 'base'}" in caplog.text
    assert not hasattr(model, "peft_config") and all(p.requires_grad for p in model.parameters())


def test_config_and_tokenizer_are_those_of_the_base_where_the_adapter_has_none(adapter):
    folder, _ = adapter
    assert loading.load_config(str(folder), "student").model_type == "llama"
    assert len(loading.load_tokenizer(str(folder), "student")) == len(TOKENIZER)


def test_a_fingerprint_tells_adapters_of_one_base_apart(adapter):
    folder, _ = adapter
    before = loading.weights_fingerprint(str(folder), "teacher")
    rewrite(folder, lora_alpha=99)
    assert loading.weights_fingerprint(str(folder), "teacher") != before


def test_a_base_that_is_not_there_is_one_error_that_names_both(adapter):
    folder, _ = adapter
    shutil.rmtree(folder.parent / "base")
    with pytest.raises(UserError, match=r"(?s)an adapter of .*base, and a model needs both.*no such folder"):
        loading.load_config(str(folder), "teacher")


@pytest.mark.parametrize(("base", "says"), [(None, "does not name the model"), ("itself", "names its own folder")])
def test_an_adapter_that_does_not_tell_its_base_is_refused(adapter, base, says):
    folder, _ = adapter
    rewrite(folder, base_model_name_or_path=str(folder) if base else None)
    with pytest.raises(UserError, match=says):
        loading.load_config(str(folder), "teacher")


def test_an_adapter_of_another_model_is_refused(adapter):
    folder, _ = adapter
    tiny_llama(len(TOKENIZER), width=32).save_pretrained(folder.parent / "base")
    with pytest.raises(UserError, match="does not fit"):
        loading.load_model(str(folder), "teacher", torch.float32)


def test_weights_that_belong_to_other_layers_are_refused(adapter):
    folder, _ = adapter
    rewrite(folder, target_modules=["o_proj"])
    with pytest.raises(UserError, match="does not fit"):
        loading.load_model(str(folder), "teacher", torch.float32)


def test_weights_of_few_bits_below_an_adapter_are_refused(adapter):
    with pytest.raises(UserError, match="4bit ones were asked for"):
        loading.load_model(str(adapter[0]), "teacher", torch.float32, weights="4bit")


def test_an_adapter_below_an_adapter_is_refused_unless_they_are_merged(adapter):
    for merge in (False, True):
        config = build(
            StudentConfig,
            {"name": str(adapter[0]), "init": "pretrained", "lora": {"enabled": True, "merge": merge}},
            source="test",
        )
        if merge:
            student.check(config)
        else:
            with pytest.raises(UserError, match=r"--lora: .* is itself an adapter.*student\.lora\.merge=true"):
                student.check(config)


def test_an_adapter_of_a_gguf_file_is_refused_unless_they_are_merged(tmp_path):
    """Its base would be called FILE.gguf, which peft cannot load."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for merge in (False, True):
        settings = {"name": str(file), "init": "pretrained", "lora": {"enabled": True, "merge": merge}}
        config = build(StudentConfig, settings, source="test")
        if merge:
            student.check(config)
        else:
            with pytest.raises(UserError, match=r"--lora: .* is a GGUF file.*student\.lora\.merge=true"):
                student.check(config)


def test_a_quantised_student_is_refused_and_a_random_one_is_not(tmp_path):
    config = tiny_llama(len(TOKENIZER)).config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"quantised \(gptq\) and cannot be trained"):
        loading.load_model(str(tmp_path), "student", torch.float32)
    model = loading.random_model(AutoConfig.from_pretrained(tmp_path))
    assert getattr(model.config, "quantization_config", None) is None
