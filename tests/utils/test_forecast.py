"""The forecast of memory and disk against figures that are known."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from utils.config import LoraConfig, TrainingConfig
from utils.errors import UserError
from utils.forecast import Shape, disk, free_disk, largest, require_disk, training_memory

QWEN = Qwen2Config(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SMOLLM = LlamaConfig(
    vocab_size=49_152,
    hidden_size=960,
    intermediate_size=2560,
    num_hidden_layers=32,
    num_attention_heads=15,
    num_key_value_heads=5,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def shapes():
    return Shape.of(SMOLLM), Shape.of(QWEN)


def forecast(shapes, tokens=1024, precision="fp16", **options) -> dict[str, int]:
    options |= {"precision": precision, "teacher_dtype": torch.float16, "logit_rows": 2048}
    return training_memory(*shapes, tokens=tokens, **options)


def test_parameters_are_counted_as_published_and_tied_ones_once(shapes):
    assert [shape.parameters for shape in shapes] == [361_821_120, 1_543_714_304]


def test_a_model_that_names_its_sizes_otherwise_is_understood():
    shape = Shape.of(GPT2Config(n_embd=64, n_layer=3, n_head=2, vocab_size=100))
    assert (shape.hidden, shape.intermediate, shape.layers, shape.vocabulary) == (64, 256, 3, 100)


def test_the_recipe_for_16_gb_fits_and_four_times_its_tokens_do_not(shapes):
    assert 9 < sum(forecast(shapes).values()) / 2**30 < 15.5
    assert sum(forecast(shapes, tokens=8192).values()) / 2**30 > 16


def test_float32_training_of_the_weights_costs_16_bytes_a_parameter(shapes):
    parts = forecast(shapes, precision="no")
    fixed = sum(parts[name] for name in ("student weights", "gradients", "optimizer"))
    assert fixed == 16 * shapes[0].parameters


def test_without_a_teacher_nothing_is_counted_for_it(shapes):
    assert not [name for name in forecast((shapes[0], None)) if name.startswith("teacher")]


def test_a_router_costs_its_parameters_and_states_per_token_and_nothing_else_changes(shapes):
    plain, routed = forecast(shapes), forecast(shapes, routed_layers=4, routed_teacher_layers=8)
    assert {name: size for name, size in routed.items() if name != "router"} == plain
    none, more = (forecast(shapes, tokens=n, routed_layers=4, routed_teacher_layers=8)["router"] for n in (0, 2048))
    assert none == 16 * 4 * 960 * (1536 + 8)  # four projections and gates; weight, gradient, two moments
    assert more - none == 2 * (routed["router"] - none) > 2 * 1024 * 4 * (8 * 1536 + 4 * 960)
    assert "router" not in forecast((shapes[0], None), routed_layers=4, routed_teacher_layers=8)


def test_no_more_layers_are_counted_than_the_models_have(shapes):
    everything = forecast(shapes, routed_layers=32, routed_teacher_layers=28)
    assert forecast(shapes, routed_layers=99, routed_teacher_layers=99) == everything


def test_a_checkpoint_is_12_bytes_a_parameter_and_small_text_is_not_written(shapes):
    student = shapes[0]
    training = TrainingConfig(keep_checkpoints=2)
    parts = disk(student, training, LoraConfig(), text_bytes=1000, in_memory=1000)
    assert parts == {"checkpoints": 36 * student.parameters, "student": 4 * student.parameters, "windows": 0}
    twice = disk(student, training, LoraConfig(), text_bytes=1001, runs=2, in_memory=1000)
    assert twice["checkpoints"] == 2 * parts["checkpoints"] and twice["windows"] > 1000


def test_with_patience_the_best_checkpoint_stays_besides(shapes):
    more, usual = (disk(shapes[0], TrainingConfig(patience=wait), LoraConfig())["checkpoints"] for wait in (1, 0))
    assert more == 4 / 3 * usual


def test_an_adapter_takes_the_disk_of_its_factors():
    peft = pytest.importorskip("peft")
    config = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    base = AutoModelForCausalLM.from_config(config)
    adapter = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    for merge in (False, True):
        parts = disk(
            Shape.of(config), TrainingConfig(keep_checkpoints=1), LoraConfig(enabled=True, rank=8, merge=merge)
        )
        assert parts["checkpoints"] == 24 * trained
        assert parts["student"] == 4 * (Shape.of(config).parameters if merge else trained)


def test_too_little_disk_is_refused_with_the_estimate_and_what_is_there_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    require_disk(tmp_path, {"checkpoints": 9 * 10**8, "student": 10**8})
    needed = {"checkpoints": 14 * 10**8, "student": 10**8}
    with pytest.raises(UserError, match=r"about 1,500\.0 MB more \(checkpoints 1,400\.0 and student 100\.0, "):
        require_disk(tmp_path, needed)
    (tmp_path / "step-00000001").mkdir()
    with (tmp_path / "step-00000001" / "module.safetensors").open("wb") as file:
        file.truncate(5 * 10**8)
    require_disk(tmp_path, needed)


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(free_disk(tmp_path), rel=0.05)


def test_the_largest_parts_are_named_and_empty_ones_are_not():
    assert largest({"a": 2**30, "b": 3 * 2**30, "c": 0}) == "4 GiB (b 3, a 1)"
