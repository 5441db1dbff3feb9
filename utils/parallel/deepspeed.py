"""DeepSpeed: the settings it is given, and the engine that takes its steps.

ZeRO-2 shards gradients and moments, ZeRO-3 the weights too. accelerate makes DeepSpeed's engine. Beyond sharding
nothing of it is used: optimizer, schedule, clipping, guard, accumulation, precision and checkpoints are those of any
run. Written against DeepSpeed 0.19.
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
from ..machine.packages import require
from .engine import FullySharded
from .sharding import gather_nested
from .wrapper import Shell

STAGES = (2, 3)
"""ZeRO stages that are supported."""

OVERRULED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 1,  # nothing but its throughput, which nobody reads, depends on it
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "steps_per_print": float("inf"),
    "zero_allow_untested_optimizer": True,
}
"""Settings of DeepSpeed for what the loop does itself."""

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
"""torch's own function, which ZeRO-3 replaces for all models."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names of the first and the second moment."""


# --------------------------------------------------------------------------------------------------- settings


def is_requested() -> bool:
    """Return whether a launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


class Plugin(DeepSpeedPlugin):
    """DeepSpeed's settings, which accelerate takes from the launcher's variables and keeps to itself."""

    def set_deepspeed_weakref(self) -> None:
        """Do nothing: told of ZeRO-3, transformers shards every model it makes, also those of one process alone."""


def plugin(mixed_precision: str, device: str) -> Plugin | None:
    """Return the settings to give to accelerate; None: no launcher asks for DeepSpeed.

    Args:
        mixed_precision: see `build_accelerator`.
        device: `cpu` or another.

    Raises:
        UserError: DeepSpeed is not installed, or is asked for what this program cannot do right with it.
    """
    if not is_requested():
        return None

    require("deepspeed", "DeepSpeed, which accelerate was told to use,", extra="deepspeed")
    _check_run(mixed_precision, device)

    # accelerate fills the plugin from the variables of its launcher, or a file that these name
    result = Plugin()
    settings = result.deepspeed_config
    _check_settings(settings)

    settings.update(OVERRULED)
    for precision in PRECISIONS:
        settings[precision] = {"enabled": precision == mixed_precision}

    # accelerate replaces "auto" by sizes from the model's configuration, and what it wraps here has none
    sharding = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    for name, value in settings["zero_optimization"].items():
        if value != "auto":
            sharding[name] = value
    settings["zero_optimization"] = sharding
    return result


def _check_run(mixed_precision: str, device: str) -> None:
    """Refuse a run that DeepSpeed cannot serve.

    Raises:
        UserError: it is on a CPU or a single GPU, or in fp16.
    """
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


def _check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that would change what is learned, or that nothing here reads.

    Raises:
        UserError: names them.
    """
    sharding = settings["zero_optimization"]
    if sharding.get("stage") not in STAGES:
        raise UserError(f"DeepSpeed: got ZeRO stage {sharding.get('stage')}, expected 2 or 3 (--zero_stage).")

    offloaded = [name for name in OFFLOADS if _is_offloaded(sharding.get(name))]
    if offloaded:
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


def _is_offloaded(setting: dict[str, Any] | None) -> bool:
    """Return whether a setting moves something off the GPU; launchers also write it out with the device `none`."""
    if not setting:
        return False
    return setting.get("device", "none") not in ("none", None)


# ----------------------------------------------------------------------------------------------------- engine


class Zero(FullySharded):
    """ZeRO-2 or 3, of weights in float32, which compute in the precision asked for.

    The inner names of DeepSpeed's optimizers (`averaged_gradients`, `single_partition_of_fp32_groups`, ...) are used
    where it has no function for what is needed.
    """

    def wrap(self, optimizer: torch.optim.Optimizer) -> None:
        self._groups = [list(group["params"]) for group in optimizer.param_groups]

        # To DeepSpeed, bf16 means weights in bfloat16. These stay in float32, and `_shell` computes in bfloat16.
        settings = self.accelerator.deepspeed_plugin.deepspeed_config["bf16"]
        self._computes_in_bf16 = settings["enabled"]
        settings["enabled"] = False
        try:
            super().wrap(optimizer)
        finally:
            settings["enabled"] = self._computes_in_bf16

    def close(self) -> None:
        self._release()
        super().close()
        F.linear = LINEAR  # ZeRO-3 puts one of its own there, for all models, which lets go of weights sooner

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def no_sync(self) -> AbstractContextManager:
        # the gradients of every micro-batch are exchanged: a process keeps but its part of them
        return nullcontext()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        # not accelerate's, which would take the step here
        self.model.set_gradient_accumulation_boundary(is_last)
        self.model.backward(loss)

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        parts = self._gradient()

        # squares are summed over the weights of this process, and then over the processes
        norms = [torch.linalg.vector_norm(part) for part in parts]
        square = torch.stack(norms).square().sum()
        norm = self.accelerator.reduce(square, reduction="sum").sqrt()

        factor = (largest / (norm + 1e-6)).clamp(max=1)  # as torch.nn.utils.clip_grad_norm_
        for part in parts:
            part.mul_(factor)
        return norm

    def update(self, is_bad: Tensor) -> bool:
        self.optimizer.found_inf = is_bad.float()

        # ZeRO-3 would take a gradient again for a weight that is without one in the next step
        stale = self._gradient() if self._stage == 3 else []
        self.model.step()  # leaves out by itself, and forgets, a gradient that is not finite
        for part in stale:
            part.zero_()
        return True

    def forget(self) -> None:
        pass  # `update` does; and a step is never taken back, as running out of memory ends the run

    # --- the whole module -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gather(self) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        module_parameters = dict(self.module.named_parameters())
        for name, parameter in self.twin.named_parameters():
            if parameter.requires_grad:
                module_parameters[name].copy_(safe_get_full_fp32_param(parameter))

    def scatter(self) -> None:
        """Continue from the module's weights with the same optimizer.

        DeepSpeed has copies of the weights in several places, so its engine is made anew.
        """
        names = {parameter: name for name, parameter in self.twin.named_parameters()}
        self._release()
        self.accelerator.free_memory()

        self.twin = self._make_twin()
        new_parameters = dict(self.twin.named_parameters())
        self.optimizer.state.clear()
        for group, old_parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            group["params"] = [new_parameters[names[parameter]] for parameter in old_parameters]
        self.wrap(self.optimizer)

    def moments(self) -> dict[str, Any]:
        """Return what `torch.optim.Optimizer.state_dict` would, of an optimizer of whole parameters."""
        self._link()
        # equal in all: every part takes every step
        step_counts = [moments["step"] for moments in self.optimizer.state.values()]

        groups = []
        state = {}
        count = 0
        for group, parameters in zip(self.optimizer.param_groups, self._groups, strict=True):
            numbers = list(range(count, count + len(parameters)))
            groups.append({**group, "params": numbers})
            count += len(parameters)

            if step_counts:
                for number, parameter in zip(numbers, parameters, strict=True):
                    state[number] = self._moments_of(parameter, step_counts[0])
        return {"state": state, "param_groups": groups}

    def _moments_of(self, parameter: nn.Parameter, step: Tensor) -> dict[str, Any]:
        """Return the whole moments of one parameter, in the main process. Call it in every process."""
        from deepspeed.utils import safe_get_full_optimizer_state

        moments = {"step": step.clone()}
        for key in MOMENTS:
            moments[key] = safe_get_full_optimizer_state(parameter, key)
        return gather_nested(moments, self.accelerator.is_main_process)

    @torch.no_grad()
    def load_moments(self, state: dict[str, Any]) -> None:
        # everything but the parameters, which are those of this run
        for group, saved_group in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        if not state["state"]:  # no step was taken yet
            return

        # DeepSpeed's optimizer has a state for each flat part, not for each weight: first zeros of its size ...
        step = max(moments["step"] for moments in state["state"].values())
        for flat in self._flat_parts():
            moments = {"step": step.to(flat.device, copy=True)}
            for key in MOMENTS:
                moments[key] = torch.zeros_like(flat)
            self.optimizer.state[flat] = moments
        self._link()

        # ... into which the moments of the weights are then written. Weights that never had a gradient have none.
        parameters = [parameter for group in self._groups for parameter in group]
        for number, parameter in enumerate(parameters):
            if number not in state["state"]:
                continue
            for key in MOMENTS:
                value = state["state"][number][key].to(self.accelerator.device)
                self._set_moment(parameter, value, key)

    def _set_moment(self, parameter: nn.Parameter, value: Tensor, key: str) -> None:
        """Write a whole moment of one weight into this process's part of it."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 2:
            safe_set_full_optimizer_state(parameter, value, key)
            return

        # ZeRO-3 cuts the flat weight into parts of equal size, the last of which is padded with zeros
        size = parameter.ds_tensor.numel()
        rank = self.accelerator.process_index
        padding = size * self.accelerator.num_processes - value.numel()
        padded = F.pad(value.flatten(), (0, padding))
        safe_set_local_optimizer_state(parameter, padded[rank * size : (rank + 1) * size], key)

    # --- DeepSpeed's inner parts ------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Free the twin, moments and gradients. An engine of ZeRO-3 does not die with its last user."""
        owners = [vars(self.model.optimizer), list(self.optimizer.state.values())]
        owners += [[parameter, vars(parameter)] for parameter in self.twin.parameters()]

        for leaf in tree_iter(owners):
            if isinstance(leaf, Tensor):
                leaf.untyped_storage().resize_(0)
        self.model = None

    def _gradient(self) -> list[Tensor]:
        """Return this process's part of the gradient, after the last micro-batch."""
        return [part for group in self.model.optimizer.averaged_gradients.values() for part in group]

    def _link(self) -> None:
        """Tell ZeRO-2 where a weight's moments are; by itself it looks once, when only the first group has any."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self._stage == 2 and self.optimizer.state:
            for parameters, flat in zip(self._groups, self._flat_parts(), strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self.optimizer.state)

    def _flat_parts(self) -> list[Tensor]:
        """Return this process's part of the weights, as the optimizer sees them."""
        inner = self.model.optimizer
        if self._stage == 2:
            return inner.single_partition_of_fp32_groups
        return inner.fp32_partitioned_groups_flat

    @property
    def _stage(self) -> int:
        return self.model.zero_optimization_stage()

    def _shell(self) -> Shell:
        if not self._computes_in_bf16:
            return Shell(self.twin)
        return Shell(self.twin, autocast=partial(torch.autocast, self.accelerator.device.type, torch.bfloat16))
