"""Two processes on two GPUs, as `accelerate launch --multi_gpu` starts them."""

import socket

import pytest
import torch

from tests.gpu.conftest import result_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


def test_two_processes_train_on_a_gpu_each(start, gpu_place, gpu_kind, tmp_path):
    if gpu_kind == "real" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there is {torch.cuda.device_count()}")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = gpu_place.arguments(tmp_path / "run", "--max-steps", "4", "--save-every", "2")
    arguments += ["--set", "training.mixed_precision=fp16", "teacher.dtype=auto", "logging.every=3"]

    processes = []
    for rank in "01":
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = {"arguments": arguments, "output": str(tmp_path / "run")}
        processes.append(start("one_of_two_processes", variables, **own))
    first, second = (result_of(process) for process in processes)

    assert (first["code"], second["code"]) == (0, 0), first["errors"]
    assert first["steps"] == second["steps"] == 4
    if gpu_kind == "pretended":
        assert first["peak"][1] == 0 and second["peak"][0] == 0, "each process has its own GPU"
        # gradients are reduced; buffers are not sent around before each forward, but once with the weights
        assert first["collectives"]["allreduce"] > 0
        assert first["collectives"].get("broadcast", 0) < first["steps"]
