"""Several processes of one run on the CPU: what tests of more than one device share."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs

from utils.parallel.accelerator import build_accelerator

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported, which otherwise looks for a GPU

PATIENCE = 300
"""Seconds after which processes are taken to wait for each other for ever."""


def launch(processes: int, function: Callable, *args: Any) -> list[Any]:
    """Run a module's top-level `function(*args)` in each process; return its results, plain values and NumPy arrays."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    # importing takes each process far longer than what it is to do: they fork from one that has imported everything
    multiprocessing.set_forkserver_preload(["train"])
    arguments = {"nprocs": processes, "start_method": "forkserver", "join": False}

    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        started = torch.multiprocessing.start_processes(
            _process, (processes, port, function, args, results), **arguments
        )

        end = time.monotonic() + PATIENCE
        while not started.join(timeout=max(0.0, end - time.monotonic())):
            if time.monotonic() > end:
                for process in started.processes:
                    process.kill()
                raise TimeoutError(f"{processes} processes have not ended in {PATIENCE} seconds")

        return [results[rank] for rank in range(processes)]


@contextmanager
def launched(how: str, mixed_precision: str = "no") -> Iterator[Accelerator]:
    """The accelerator that a run gets from `accelerate launch`, on a CPU.

    Args:
        how: whole, or sharded: `fsdp2`, `zero2` or `zero3`, as in configs/accelerate/.
    """
    with ExitStack() as until_the_end:
        if how.startswith("zero"):
            until_the_end.enter_context(_deepspeed_on_cpus(how[-1]))
        accelerator = build_accelerator(mixed_precision, cpu=not how.startswith("zero"))
        if how == "fsdp2":
            options = {"auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
            accelerator.state.distributed_type = DistributedType.FSDP
        try:
            yield accelerator
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def _deepspeed_on_cpus(stage: str) -> Iterator[None]:
    """Set what a launcher of DeepSpeed sets, where there is no GPU that would say how processes talk."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that it would compile for CPUs
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    if stage == "3":  # cut the smallest weights, too
        sharding = {"stage": 3, "stage3_param_persistence_threshold": 0}
        asked["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = json.dumps({"zero_optimization": sharding})
    group = partial(InitProcessGroupKwargs, backend="gloo")
    with patch.dict(os.environ, asked), patch("utils.parallel.accelerator.InitProcessGroupKwargs", group):
        yield


def _process(rank: int, processes: int, port: int, function: Callable, args: tuple, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    results[rank] = function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
