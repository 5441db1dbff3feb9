"""Requests of a launcher, taken or refused. What sharded runs compute: tests/equivalence/test_processes.py."""

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from utils.config.yaml_files import CONFIG_FOLDER
from utils.errors import UserError
from utils.parallel.accelerator import build_accelerator, engine_kind
from utils.parallel.sharding import full, gather_nested


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "version 1, expected 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "version 1, expected 2"),
    ],
)
def test_what_cannot_be_done_right_is_refused_before_anything_is_built(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        build_accelerator("no", cpu=True)


def test_without_sharding_nothing_is_copied():
    accelerator, module = build_accelerator("no", cpu=True), torch.nn.Linear(2, 2)
    engine = engine_kind(accelerator)(module, accelerator)
    assert not engine.sharded and engine.twin is module
    assert full(module.weight) is module.weight
    assert gather_nested({"a": [module.weight, 3]}, True) == {"a": [module.weight, 3]}


@pytest.mark.parametrize(("name", "kind"), [("two_gpus", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_accelerate_reads_its_settings(name, kind):
    settings = load_config_from_file(str(CONFIG_FOLDER / "accelerate" / f"{name}.yaml"))
    assert settings.distributed_type == kind and settings.num_processes == 2
    assert settings.fsdp_config.get("fsdp_version", 2) == 2
