"""A step that is not logged never makes the host wait for the device."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import RouterConfig
from models.distillation_framework import DistillationFramework
from tests.models.text import test_encoder_decoder as encoders
from tests.models.tiny import STORIES, byte_bpe, pair_of, tiny_llama
from tests.toy import toy_config
from utils.logs.step_logger import StepLogger
from utils.parallel.accelerator import build_accelerator
from utils.training.loop import TrainingLoop, fit
from utils.training.options import LoopOptions
from utils.training.step_guard import StepGuard

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
"""Operations whose result, or its shape, the host has to know before it can go on."""
KINDS = ("head", "routed", "t5", "bart")
HEAD = {"lm": 0.3, "kd": 0.7, "span": 0.2}
ROUTED = {"lm": 0.3, "kd": 0.7} | dict.fromkeys(("feat", "rel", "attn", "layer"), 0.1)


COPIES = ("cpu", "numpy", "tolist", "to", "type")
"""Methods that copy to the host, or may: on tensors that are there already they dispatch nothing."""


class Waits(TorchDispatchMode):
    """Names what the host would wait for a GPU for: operations, those of the backward pass included, and copies.

    On a CPU `x.to(device)` means the run's own device; only a literal "cpu" is a copy to the host for certain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> "Waits":
        self._patch = pytest.MonkeyPatch()
        for name in COPIES:
            self._patch.setattr(torch.Tensor, name, self._watched(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *failure: object) -> None:
        self._patch.undo()
        super().__exit__(*failure)

    def _watched(self, name: str, method: Any) -> Any:
        def watched(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            if name != "to" or "cpu" in (*args[:1], options.get("device")):
                self.found.append(f"{name}, {sys._getframe(1).f_code.co_qualname}")
            return method(tensor, *args, **options)

        return watched

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen_by_mask = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or chosen_by_mask or unsized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def pair_for(kind: str, device: str):
    """(pair, its texts, weights of the terms)"""
    router = RouterConfig(layers=2, span=4, positions=8)
    if kind in ("t5", "bart"):
        pair, texts = encoders.pair_of(kind, router=router), encoders.TEXTS
    else:
        models = [tiny_llama(size, seed, num_hidden_layers=3) for seed, size in enumerate((300, 400))]
        options = {"student": models[0], "teacher": models[1], "router": router if kind == "routed" else None}
        pair, texts = pair_of(byte_bpe(300), byte_bpe(400), **options), STORIES
    pair.student.to(device)
    pair.teacher.to(device)
    return pair, texts, HEAD if kind == "head" else ROUTED


def steps_of(kind: str, monkeypatch, device: str = "cpu", every: int = 100) -> list[list[str]]:
    """Return what waits in each of three optimizer steps, collation excepted; on a GPU torch raises instead."""
    pair, texts, weights = pair_for(kind, device)
    windows, framework = pair.encoder.windows(texts), pair.framework(weights)
    if framework.router is not None:
        framework.calibrate([pair.collator()(windows).to(device)])
    waits, advance = [], TrainingLoop.advance

    def watched(loop, *args):
        try:
            with Waits() as seen:
                return advance(loop, *args)
        finally:
            waits.append(seen.found)

    def watched_by_torch(loop, *args):
        # the first step compiles the head's passes, and compares what they give
        torch.cuda.set_sync_debug_mode("error" if loop.step else "default")
        try:
            return advance(loop, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(TrainingLoop, "advance", watched_by_torch if device == "cuda" else watched)
    if device == "cpu" and every > 3:  # a CPU has computed everything: there the guard may look at every step
        monkeypatch.setattr(StepGuard, "read", lambda guard: None)
    fit(
        framework,
        windows,
        pair.collator(),
        toy_config(batch_size=2, gradient_accumulation_steps=2, max_steps=3, epochs=1),
        accelerator=build_accelerator("no", cpu=device == "cpu"),
        options=LoopOptions(logger=StepLogger(None, 10**6, every, main_process=False)),
    )
    return waits


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_logged_waits_for_nothing(kind, monkeypatch):
    assert steps_of(kind, monkeypatch) == [[], [], []]


def test_a_logged_step_waits_and_the_watcher_sees_it(monkeypatch):
    assert all(steps_of("head", monkeypatch, every=1))


WAYS = {
    "item": lambda x: x.item(),
    "bool": lambda x: bool(x > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x),
    "to": lambda x: x.to("cpu"),
    "to, named": lambda x: x.to(device="cpu"),
    "type": lambda x: x.type(torch.DoubleTensor),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
}


@pytest.mark.parametrize("way", WAYS)
def test_the_watcher_sees_every_way_to_wait(way, monkeypatch):
    forward = DistillationFramework.forward

    def waits(framework, batch, *args, **options):
        output = forward(framework, batch, *args, **options)
        WAYS[way](output.loss.detach()[None])
        return output

    monkeypatch.setattr(DistillationFramework, "forward", waits)
    found = steps_of("head", monkeypatch)
    assert all(found), found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's own sync debug mode watches there")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_a_step_that_is_not_logged_waits_for_nothing(kind, monkeypatch):
    steps_of(kind, monkeypatch, device="cuda")
