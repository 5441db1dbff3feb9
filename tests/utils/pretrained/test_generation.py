"""A student can be saved with whatever generation settings its base ships, and they keep their meaning."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.models.tiny import byte_bpe, tiny_llama
from utils.errors import UserError
from utils.pretrained import export, loading
from utils.pretrained.generation import put_right

TOKENIZER = byte_bpe(290)


def settings(**values) -> GenerationConfig:
    config = GenerationConfig(eos_token_id=0)
    for name, value in values.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.9, "top_p": 0.6},
        {"top_k": 20},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 1e-3},
        {"eta_cutoff": 1e-3},
    ],
)
def test_sampling_settings_are_kept_and_switch_sampling_on(values, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = settings(**values)
    put_right(config)
    config.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.do_sample is True and {name: getattr(saved, name) for name in values} == values
    assert caplog.text.count("do_sample is true now") == 1


@pytest.mark.parametrize("values", [{"early_stopping": True}, {"length_penalty": 2.0, "early_stopping": True}])
def test_beam_settings_without_beams_are_taken_out(values, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = settings(**values)
    put_right(config)
    config.save_pretrained(tmp_path)
    assert not config.do_sample and all(name in caplog.text for name in values)


def test_beams_keep_their_settings_and_what_is_right_stays_as_it_is():
    config = settings(num_beams=4, early_stopping=True, length_penalty=2.0)
    before = config.to_dict()
    put_right(config)
    assert config.to_dict() == before


@pytest.mark.parametrize("values", [{"max_new_tokens": -3}, {"num_return_sequences": 3}])
def test_what_cannot_be_put_right_leaves_the_ids_of_tokens(values, tmp_path, caplog):
    config = settings(**values)
    put_right(config)
    config.save_pretrained(tmp_path)
    assert config.eos_token_id == 0 and "only its tokens' ids are kept" in caplog.text


@pytest.mark.parametrize("values", [{"forced_eos_token_id": 99_999}, {"temperature": "hot"}])
def test_settings_with_which_nothing_can_be_written_are_found_before_training(values, caplog):
    model = tiny_llama(len(TOKENIZER))
    model.generation_config = settings(**values)
    state = torch.get_rng_state()
    export.rehearse_export(model, TOKENIZER)
    assert torch.equal(torch.get_rng_state(), state) and model.training is False
    assert "with the others it writes nothing" in caplog.text
    assert model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=2).shape[1] >= 2


@pytest.mark.parametrize(
    "ids",
    [
        {"eos_token_id": "<|endoftext|>"},
        {"eos_token_id": -1, "pad_token_id": -1},
        {"eos_token_id": [99_999, "</s>", 5], "bos_token_id": 1.5},
        {"eos_token_id": True, "pad_token_id": 290},
        {"eos_token_id": []},
        {"eos_token_id": "0", "temperature": "hot"},
    ],
)
def test_what_is_no_id_of_a_token_does_not_reach_the_exported_student(ids, tmp_path):
    model = tiny_llama(len(TOKENIZER))
    model.generation_config = settings(**ids)
    export.rehearse_export(model, TOKENIZER)
    export.export(model, TOKENIZER, tmp_path / "student", card=None)

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ends = exported.generation_config.eos_token_id
    assert ends in (TOKENIZER.eos_token_id, [TOKENIZER.eos_token_id], [TOKENIZER.eos_token_id, 5])
    assert 0 <= exported.generation_config.pad_token_id < len(TOKENIZER)
    assert exported.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=2).shape[1] >= 2


def test_a_student_that_cannot_write_at_all_is_told_so(monkeypatch, caplog):
    model = tiny_llama(len(TOKENIZER))
    monkeypatch.setattr(type(model), "generate", lambda *args, **options: 1 / 0)
    export.rehearse_export(model, TOKENIZER)
    assert "writes nothing with its tokens' ids alone either (ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"num_return_sequences": 3, "eos_token_id": 7},
        {"max_new_tokens": -3, "eos_token_id": 7},
        {"watermarking_config": 5, "eos_token_id": 7},
        [1, 2],
        "text",
        5,
        None,
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_broken_file_of_generation_settings_does_not_keep_a_model_from_being_loaded(content, role, tmp_path, caplog):
    tiny_llama(len(TOKENIZER)).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    model = loading.load_model(str(tmp_path), role, torch.float32)
    if isinstance(content, dict):
        assert model.generation_config.eos_token_id == 7
    assert "generation_config.json cannot be loaded" in caplog.text or content is None
    assert model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=2).shape[1] >= 2


def test_a_config_that_cannot_be_written_is_found_before_training(monkeypatch):
    model = tiny_llama(len(TOKENIZER))
    monkeypatch.setattr(type(model.config), "save_pretrained", lambda *args, **options: 1 / 0)
    with pytest.raises(
        UserError, match=r"(?s)LlamaForCausalLM, transformers .*could not be exported.*ZeroDivisionError"
    ):
        export.rehearse_export(model, TOKENIZER)


def test_a_tokenizer_that_cannot_be_loaded_again_is_found_before_training(monkeypatch):
    def empty(self, folder, **options):
        return ()

    monkeypatch.setattr(type(TOKENIZER), "save_pretrained", empty)
    with pytest.raises(UserError, match="could not be exported"):
        export.rehearse_export(tiny_llama(len(TOKENIZER)), TOKENIZER)
