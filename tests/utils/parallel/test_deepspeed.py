"""Requests for DeepSpeed, taken or refused. What runs under it compute: tests/equivalence/test_deepspeed.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from transformers.integrations import is_deepspeed_zero3_enabled

from utils.config.yaml_files import CONFIG_FOLDER
from utils.errors import UserError
from utils.parallel.accelerator import build_accelerator
from utils.parallel.deepspeed import BUCKET, plugin
from utils.run import requirements

installed = pytest.mark.skipif(
    not is_deepspeed_available(), reason="DeepSpeed is not installed: pip install '.[deepspeed]'"
)


@pytest.fixture(autouse=True)
def on_two_gpus(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_without_a_launcher_that_asks_for_it_there_is_none(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert plugin("no", "gpu") is None


def test_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs deepspeed, which is not installed: pip install '.\[deepspeed\]'"):
        plugin("no", "gpu")


@installed
def test_a_cpu_one_process_and_fp16_are_refused(monkeypatch):
    with pytest.raises(UserError, match="DeepSpeed on a CPU; expected two GPUs"):
        build_accelerator("no", cpu=True)
    with pytest.raises(UserError, match=r"fp16.*expected bf16 or no"):
        plugin("fp16", "gpu")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="DeepSpeed on 1 process"):
        plugin("no", "gpu")


@installed
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_reads_its_settings_and_the_loop_keeps_its_own(monkeypatch, stage):
    file = CONFIG_FOLDER / "accelerate" / f"deepspeed_zero{stage}.yaml"
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.deepspeed_launcher", launched.append)
    launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))

    (asked,) = launched
    assert asked.use_deepspeed and asked.num_processes == 2
    for name, value in prepare_deepspeed_cmd_env(asked)[1].items():
        monkeypatch.setenv(name, value)

    made = plugin("bf16", "gpu")
    made.set_mixed_precision("bf16")
    made.select(_from_accelerator_state=True)
    assert not is_deepspeed_zero3_enabled()  # or transformers would shard the teacher, too

    settings = made.deepspeed_config
    assert made.zero_stage == settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_accumulation_steps"] == 1 and settings["gradient_clipping"] == 0
    assert settings["bf16"]["enabled"] and not settings["fp16"]["enabled"]
    assert settings["zero_optimization"]["reduce_bucket_size"] == BUCKET


@installed
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, "stage 1, expected 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer.*expected"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.*expected"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "optimizer.*--learning-rate"),
        ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}, "scheduler.*training.scheduler"),
    ],
)
def test_settings_that_would_change_what_is_learned_are_refused(monkeypatch, tmp_path, settings, said):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match=said):
        plugin("no", "gpu")


def test_weights_of_few_bits_are_refused(monkeypatch):
    monkeypatch.setattr("utils.pretrained.lora.check", lambda *_: None)
    lora = SimpleNamespace(enabled=True, base="4bit")
    config = SimpleNamespace(
        teacher=SimpleNamespace(name=None),
        student=SimpleNamespace(lora=lora),
        evaluation=None,
        logging=SimpleNamespace(track=[]),
    )
    with pytest.raises(UserError, match=r"DeepSpeed: got student.lora.base=4bit"):
        requirements.check(config, torch.device("cpu"))


@installed
def test_settings_of_memory_and_time_are_taken_and_auto_is_the_default(monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    sizes = {"stage": 3, "reduce_bucket_size": 1000, "overlap_comm": "auto"}
    file.write_text(json.dumps({"zero_optimization": sizes, "gradient_clipping": 5, "bf16": {"enabled": True}}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    settings = plugin("no", "gpu").deepspeed_config
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert "overlap_comm" not in settings["zero_optimization"]
    assert settings["gradient_clipping"] == 0 and not settings["bf16"]["enabled"]
