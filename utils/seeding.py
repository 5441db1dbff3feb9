"""Repeatable runs: seeds, the states of all random generators, deterministic kernels."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import nn

from .errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable that cuBLAS reads when it starts."""

DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
"""Values of the variable with which cuBLAS is deterministic."""

REFUSED = "does not have a deterministic implementation"
"""Part of torch's message about an operation that it refuses."""


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device) alike in each process; 0 <= seed < 2**32, as NumPy demands."""
    set_seed(seed)


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Let torch run no kernel whose result depends on the order of its threads. Enter it before anything is on a GPU.

    Raises:
        UserError: something, in most cases the model's own code, needs an operation that has no other kernel.
    """
    if not enabled:
        yield
        return

    if os.environ.get(WORKSPACE) not in DETERMINISTIC_WORKSPACES:
        os.environ[WORKSPACE] = DETERMINISTIC_WORKSPACES[0]

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise

        # torch names the operation before these words
        operation = str(error).partition(REFUSED)[0].strip()
        raise UserError(
            f"training.deterministic: {operation} has no deterministic kernel on this device, and these models or this "
            "loss need it. Expected models without it: leave training.deterministic out, or train on the CPU "
            "(CUDA_VISIBLE_DEVICES=)."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


def rng_state() -> dict[str, Any]:
    """Return the states of all global generators, as what `torch.load(weights_only=True)` reads back."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached_gauss = np.random.get_state(legacy=True)
    numpy_state = [
        str(name),
        torch.from_numpy(np.asarray(keys).astype(np.int64)),
        int(position),
        int(has_gauss),
        float(cached_gauss),
    ]

    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    return {
        "python": [version, list(internal), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in cuda_states],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned; a run continued on fewer GPUs leaves out the states of the others."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))

    name, keys, position, has_gauss, cached_gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached_gauss))

    # saved on a CPU, but a checkpoint may have been loaded onto a GPU
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(saved.cpu(), device)


def seed_forward(device: torch.device, seed: int, step: int, micro_batch: int, rank: int) -> None:
    """Seed torch for one forward: what is drawn in it depends on nothing that happened before."""
    entropy = np.random.SeedSequence([seed, step, micro_batch, rank])
    number = int(entropy.generate_state(1, np.uint64)[0] >> 1)  # 63 bits, a signed integer

    # torch.manual_seed would also ask every absent kind of device: 1 ms a call
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


@contextmanager
def preserve_rng_and_mode(module: nn.Module) -> Iterator[None]:
    """Restore the random generators and the training mode of every submodule when the context ends."""
    generators = rng_state()
    # part by part: `train()` would give all the same mode
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        set_rng_state(generators)
