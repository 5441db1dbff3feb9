"""A stand-in for NCCL: carries tensors on a pretended GPU through gloo, and refuses any other.

Like NCCL it knows no tensors of the host; what is exchanged between processes must be on their GPUs.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

CALLS: Counter[str] = Counter()
"""Collectives of this process, by name."""


def _done(value: Any = None) -> Any:
    future = torch.futures.Future()
    future.set_result(value)
    return torch._C._distributed_c10d._create_work_from_future(future)


class CarriedGroup(dist.ProcessGroup):
    """The collectives that DDP and accelerate ask of NCCL."""

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)

    group_name = pg_name = property(lambda self: "carried")

    def getBackendName(self) -> str:
        return "carried"

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        carried = self._on_host("allreduce", tensors)
        self.gloo.allreduce(carried, opts or c10d.AllreduceOptions()).wait()
        return self._back(tensors, carried)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:
        # objects travel as whole numbers, weights and buffers as floats
        is_object = not any(tensor.is_floating_point() for tensor in tensors)
        carried = self._on_host("broadcast of an object" if is_object else "broadcast", tensors)
        self.gloo.broadcast(carried, opts or c10d.BroadcastOptions()).wait()
        return self._back(tensors, carried)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any = None) -> Any:
        carried = self._on_host("allgather", inputs)
        gathered = [[torch.empty_like(tensor, device="cpu") for tensor in part] for part in outputs]
        self.gloo.allgather(gathered, carried, opts or c10d.AllgatherOptions()).wait()
        for part, host in zip(outputs, gathered, strict=True):
            self._back(part, host)
        return _done(outputs)

    def barrier(self, opts: Any = None) -> Any:
        self.gloo.barrier(opts or c10d.BarrierOptions()).wait()
        return _done()

    def _on_host(self, name: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        CALLS[name] += 1
        for tensor in tensors:
            assert tensor.is_cuda, f"No backend type associated with device type cpu ({name})"
        return [tensor.detach().cpu().contiguous() for tensor in tensors]

    def _back(self, tensors: list[torch.Tensor], carried: list[torch.Tensor]) -> Any:
        for tensor, host in zip(tensors, carried, strict=True):
            tensor.copy_(host)
        return _done(tensors)


def replace_nccl() -> None:
    """Take this group wherever NCCL is asked for."""
    start = dist.init_process_group

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        start("carried" if backend == "nccl" else backend, **options)

    def device_of_objects(group: Any = None) -> str:
        is_carried = isinstance(group or dist.group.WORLD, CarriedGroup)
        return f"cuda:{torch.cuda.current_device()}" if is_carried else "cpu"

    dist.Backend.register_backend("carried", CarriedGroup, devices=["cuda"])
    dist.init_process_group = c10d.init_process_group = init_process_group
    dist.is_nccl_available = lambda: True
    c10d._get_object_coll_device = device_of_objects
