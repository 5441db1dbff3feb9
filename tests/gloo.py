"""Several processes of one run on the CPU: what tests of more than one device share."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

PATIENCE = 300
"""Seconds after which processes are taken to wait for each other for ever."""


def launch(processes: int, function: Callable, *args: Any) -> list[Any]:
    """What `function(*args)`, of a module's top level, returns in each process, as plain values and NumPy arrays."""
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


def shard(accelerator: Accelerator) -> Accelerator:
    """The accelerator as `accelerate launch --use_fsdp --fsdp_version 2` makes one, also on a CPU."""
    options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
    accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def _process(rank: int, processes: int, port: int, function: Callable, args: tuple, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    results[rank] = function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
