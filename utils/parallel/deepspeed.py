"""What takes the steps of a module under DeepSpeed: ZeRO-2 (gradients and moments sharded) and ZeRO-3 (weights too).

accelerate makes DeepSpeed's engine. Beyond sharding nothing of it is used: optimizer, schedule, clipping, guard,
accumulation, precision and checkpoints are those of any run. Written against DeepSpeed 0.19.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from ..errors import UserError
from ..machine import packages
from .engine import FullySharded
from .sharding import whole
from .wrapper import Shell

STAGES = (2, 3)

OVERRULED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 1,  # nothing but its throughput, which nobody reads, depends on it
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "steps_per_print": float("inf"),
    "zero_allow_untested_optimizer": True,
}
"""What the loop does itself, in DeepSpeed's settings."""

PRECISIONS = ("fp16", "bf16")

OFFLOADS = ("offload_optimizer", "offload_param")

SHARDING = {
    "stage",
    "allgather_partitions",
    "allgather_bucket_size",
    "contiguous_gradients",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    *OFFLOADS,
}
"""Settings below `zero_optimization` that change memory and time, and nothing else."""

BUCKET = 50_000_000
"""Numbers exchanged at once, 200 MB; DeepSpeed's own 500 million take 2 GB of each GPU, and again 2 GB with overlap."""

LINEAR = F.linear

MOMENTS = ("exp_avg", "exp_avg_sq")


def is_requested() -> bool:
    """Whether a launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


class Plugin(DeepSpeedPlugin):
    """DeepSpeed's settings, which accelerate takes from the launcher's variables and keeps to itself."""

    def set_deepspeed_weakref(self) -> None:
        """Nothing: told of ZeRO-3, transformers shards every model it makes, also those of one process alone."""


def plugin(mixed_precision: str, device: str) -> Plugin | None:
    """What to give to accelerate; None: no launcher asks for DeepSpeed.

    Args:
        mixed_precision: see `build_accelerator`.
        device: `cpu` or another.

    Raises:
        UserError: DeepSpeed is not installed, or is asked for what this program cannot do right with it.
    """
    if not is_requested():
        return None
    packages.require("deepspeed", "DeepSpeed, which accelerate was told to use,", extra="deepspeed")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cpu" or processes < 2:
        where = "a CPU" if device == "cpu" else f"{processes} process"
        raise UserError(
            f"accelerate was told to use DeepSpeed on {where}; expected two GPUs or more, to spread a student over. "
            "Leave it out: python train.py ..."
        )
    if mixed_precision == "fp16":
        raise UserError(
            "DeepSpeed: got --mixed-precision fp16, whose scale of the loss it would choose itself and leave steps out "
            "for; expected bf16 or no. With fp16, shard with FSDP2: --config_file configs/accelerate/fsdp2.yaml"
        )
    made = Plugin()
    settings = made.deepspeed_config
    _check(settings)
    settings |= OVERRULED | {name: {"enabled": name == mixed_precision} for name in PRECISIONS}
    sizes = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    settings["zero_optimization"] = sizes | {k: v for k, v in settings["zero_optimization"].items() if v != "auto"}
    return made


def _check(settings: dict[str, Any]) -> None:
    sharding = settings["zero_optimization"]
    if sharding.get("stage") not in STAGES:
        raise UserError(f"DeepSpeed: got ZeRO stage {sharding.get('stage')}, expected 2 or 3 (--zero_stage).")
    if offloaded := [k for k in OFFLOADS if (sharding.get(k) or {}).get("device", "none") not in ("none", None)]:
        raise UserError(
            f"DeepSpeed: got {' and '.join(offloaded)}, with which DeepSpeed brings an optimizer of its own; expected "
            "none. More processes, or --lora, leave more room on each GPU."
        )
    unknown = settings.keys() - OVERRULED.keys() - {*PRECISIONS, "zero_optimization"}
    unknown |= {f"zero_optimization.{name}" for name in sharding.keys() - SHARDING}
    if unknown:
        raise UserError(
            f"DeepSpeed: got settings that this program does not use or sets itself: {', '.join(sorted(unknown))}. "
            "Leave them out (optimizer and schedule are those of --learning-rate and training.scheduler); configs/"
            "accelerate/deepspeed_zero2.yaml is enough."
        )


class Zero(FullySharded):
    """ZeRO-2 or 3, of weights in float32, which compute in the precision asked for."""

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        bf16 = self.accelerator.deepspeed_plugin.deepspeed_config["bf16"]
        asked, bf16["enabled"] = bf16["enabled"], False  # it means weights in bfloat16; `_shell` computes in it
        self._half = asked
        try:
            super().wrap(optimizer)
        finally:
            bf16["enabled"] = asked

    def close(self) -> None:
        self._release()
        super().close()
        F.linear = LINEAR  # ZeRO-3 puts one of its own there, for all models, which lets go of weights sooner

    def no_sync(self) -> AbstractContextManager:
        return nullcontext()  # the gradients of every micro-batch are exchanged: a process keeps but its part of them

    def backward(self, loss: Tensor, is_last: bool) -> None:
        # not accelerate's, which would take the step here
        self.model.set_gradient_accumulation_boundary(is_last)
        self.model.backward(loss)

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        parts = self._gradient()
        square = torch.stack([torch.linalg.vector_norm(part) for part in parts]).square().sum()
        norm = self.accelerator.reduce(square, reduction="sum").sqrt()
        shorter = (largest / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
        for part in parts:
            part.mul_(shorter)
        return norm

    def update(self, is_bad: Tensor) -> bool:
        self.optimizer.found_inf = is_bad.float()
        old = self._gradient() if self._stage == 3 else []
        self.model.step()  # leaves out by itself, and forgets, a gradient that is not finite
        for part in old:
            part.zero_()  # ZeRO-3 would take it again for a weight that is without a gradient in the next step
        return True

    def forget(self) -> None:
        pass  # `update` does; and a step is never taken back, as running out of memory ends the run

    @torch.no_grad()
    def gather(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        own = dict(self.module.named_parameters())
        for name, parameter in self.twin.named_parameters():
            if parameter.requires_grad:
                own[name].copy_(safe_get_full_fp32_param(parameter))

    def scatter(self) -> None:
        """DeepSpeed keeps weights in several places: begin anew from the module, with the same optimizer."""
        names = {parameter: name for name, parameter in self.twin.named_parameters()}
        self._release()
        self.accelerator.free_memory()
        self.twin = self._make_twin()
        new = dict(self.twin.named_parameters())
        self.optimizer.state.clear()
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [new[names[parameter]] for parameter in parameters]
        self.wrap(self.optimizer)

    def moments(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        groups, state, count = [], {}, 0
        self._link()
        steps = [held["step"] for held in self.optimizer.state.values()]  # equal: all parts take every step
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            groups.append({**group, "params": list(range(count, count + len(parameters)))})
            for parameter in parameters:
                if steps:
                    held = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                    state[count] = whole({"step": steps[0].clone(), **held}, self.accelerator.is_main_process)
                count += 1
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_moments(self, state: dict[str, Any]) -> None:
        for group, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        if not state["state"]:
            return
        step = max(saved["step"] for saved in state["state"].values())
        for flat in self._flat_parts():
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": step.to(flat.device, copy=True), **zeros}
        self._link()
        for index, parameter in enumerate(p for group in self._groups for p in group):
            for key in MOMENTS if index in state["state"] else ():
                self._set_moment(parameter, state["state"][index][key].to(self.accelerator.device), key)

    def _release(self) -> None:
        """Free the twin, moments and gradients. An engine of ZeRO-3 does not die with its last user."""
        held = [vars(self.model.optimizer), list(self.optimizer.state.values())]
        held += [[parameter, vars(parameter)] for parameter in self.twin.parameters()]
        for leaf in tree_iter(held):
            if isinstance(leaf, Tensor):
                leaf.untyped_storage().resize_(0)
        self.model = None

    def _gradient(self) -> list[Tensor]:
        """This process's part of the gradient, after the last micro-batch."""
        return [part for group in self.model.optimizer.averaged_gradients.values() for part in group]

    def _link(self) -> None:
        """Tell ZeRO-2 where a weight's moments are; by itself it looks once, when only the first group has any."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._stage == 2 and self.optimizer.state:
            for parameters, flat in zip(self._groups, self._flat_parts(), strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 2:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        size, rank = parameter.ds_tensor.numel(), self.accelerator.process_index
        padded = F.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)

    def _flat_parts(self) -> list[Tensor]:
        """This process's part of the weights, as the optimizer sees them."""
        inner = self.model.optimizer
        return inner.single_partition_of_fp32_groups if self._stage == 2 else inner.fp32_partitioned_groups_flat

    @property
    def _stage(self) -> int:
        return self.model.zero_optimization_stage()

    def _shell(self) -> Shell:
        half = partial(torch.autocast, self.accelerator.device.type, torch.bfloat16)
        return Shell(self.twin, half if self._half else nullcontext)
