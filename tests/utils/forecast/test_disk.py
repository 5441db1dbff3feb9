"""The forecast of memory and disk against figures that are known."""

from types import SimpleNamespace

import pytest
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    RecurrentGemmaConfig,
)

from utils.config.settings import DataConfig, LoraConfig, TrainingConfig
from utils.data.stream.recent import RecentTexts
from utils.errors import UserError
from utils.files import free_disk
from utils.forecast.disk import disk, largest, require_disk
from utils.forecast.model_size import Shape, shallow

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


def test_parameters_are_counted_as_published_and_tied_ones_once(shapes):
    assert [shape.parameters for shape in shapes] == [361_821_120, 1_543_714_304]


def test_a_model_that_names_its_sizes_otherwise_is_understood():
    shape = Shape.of(GPT2Config(n_embd=64, n_layer=3, n_head=2, vocab_size=100))
    assert (shape.hidden, shape.intermediate, shape.layers, shape.vocabulary) == (64, 256, 3, 100)


def test_a_checkpoint_is_12_bytes_a_parameter_and_small_text_is_not_written(shapes):
    student = shapes[0]
    training = TrainingConfig(keep_checkpoints=2)
    parts = disk(student, training, LoraConfig(), text_bytes=1000, in_memory=1000)
    assert parts["checkpoints"] == 36 * student.parameters
    assert parts["student"] == 4 * student.parameters
    assert parts["windows"] == parts["blocks of the stream"] == 0
    twice = disk(student, training, LoraConfig(), text_bytes=1001, runs=2, in_memory=1000)
    assert twice["checkpoints"] == 2 * parts["checkpoints"] and twice["windows"] > 1000


def test_a_stream_writes_its_blocks_and_no_other_windows(shapes, tmp_path, monkeypatch):
    data = DataConfig(streaming=True, block_bytes=10**8, deduplicate=False)
    parts = disk(shapes[0], TrainingConfig(), LoraConfig(), data=data)
    assert parts["windows"] == 0
    assert parts["blocks of the stream"] == 27 * 10**8

    remembers = DataConfig(streaming=True, block_bytes=10**8, remembered_documents=1000)
    more = disk(shapes[0], TrainingConfig(keep_checkpoints=1), LoraConfig(), data=remembers)
    plain = disk(shapes[0], TrainingConfig(keep_checkpoints=1), LoraConfig())
    size = RecentTexts(1000).size
    assert more["blocks of the stream"] - parts["blocks of the stream"] == 3 * size
    assert more["checkpoints"] - plain["checkpoints"] == 2 * size

    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    needed = {"checkpoints": 0, "student": 10**8, "blocks of the stream": parts["blocks of the stream"]}
    with pytest.raises(UserError, match=r"blocks of the stream 2,700\.0 MB.* or data\.block_bytes"):
        require_disk(tmp_path, needed)


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
    with pytest.raises(UserError, match=r"about 1,500\.0 MB more \(checkpoints 1,400\.0 MB, student 100\.0 MB, "):
        require_disk(tmp_path, needed)
    (tmp_path / "step-00000001").mkdir()
    with (tmp_path / "step-00000001" / "module.safetensors").open("wb") as file:
        file.truncate(5 * 10**8)
    require_disk(tmp_path, needed)


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(free_disk(tmp_path), rel=0.05)


def test_the_largest_parts_are_named_and_empty_ones_are_not():
    assert largest({"a": 2**30, "b": 3 * 2**30, "c": 0}) == "4 GiB (b 3, a 1)"


def test_a_width_for_each_layer_counts_as_the_widest():
    config = Gemma3nTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=[64, 48],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size_per_layer_input=100,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )

    assert Shape.of(config).intermediate == 64
    assert disk(Shape.of(config), TrainingConfig(), LoraConfig())["student"] == 4 * Shape.of(config).parameters


@pytest.mark.parametrize("kind", [MambaConfig, RecurrentGemmaConfig])
def test_layers_that_a_config_computes_from_their_number_are_left_to_it(kind):
    config = shallow(kind(num_hidden_layers=9), 3)
    assert config.num_hidden_layers == 3


def test_whatever_has_an_entry_for_each_layer_is_cut():
    config = Qwen2Config(num_hidden_layers=4)
    config.factor_of_layer = [1.0, 2.0, 3.0, 4.0]
    cut = shallow(config, 2)
    assert cut.factor_of_layer == [1.0, 2.0] and len(cut.layer_types) == 2 and len(config.factor_of_layer) == 4
