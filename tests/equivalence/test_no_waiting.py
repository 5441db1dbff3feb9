"""A step that is not logged never makes the host wait for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import RouterConfig
from tests.models.tiny import STORIES, byte_bpe, pair_of, tiny_llama
from tests.toy import toy_config
from utils.guards import StepGuard
from utils.logs import StepLogger
from utils.plan import build_accelerator
from utils.training import TrainingLoop, fit

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim"}
"""Operations whose result, or its shape, the host has to know before it can go on."""
HEAD = {"lm": 0.3, "kd": 0.7, "span": 0.2}
ROUTED = {"lm": 0.3, "kd": 0.7} | dict.fromkeys(("feat", "rel", "attn", "layer"), 0.1)


class Waits(TorchDispatchMode):
    """Names the operations, those of the backward pass included, for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen_by_mask = name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or chosen_by_mask or unsized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def steps_of(weights: dict[str, float], monkeypatch, device: str = "cpu", every: int = 100) -> list[list[str]]:
    """What waits in each of three optimizer steps, collation excepted."""
    models = [tiny_llama(size, seed, num_hidden_layers=3).to(device) for seed, size in enumerate((300, 400))]
    router = RouterConfig(layers=2, span=4, positions=8) if weights is ROUTED else None
    pair = pair_of(byte_bpe(300), byte_bpe(400), student=models[0], teacher=models[1], router=router)
    windows, framework = pair.encoder.windows(STORIES), pair.framework(weights)
    if framework.router is not None:
        framework.calibrate([pair.collator()(windows).to(device)])
    waits, advance = [], TrainingLoop._advance

    def watched(loop, *args):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with Waits() as seen:
                return advance(loop, *args)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            waits.append(seen.found)

    monkeypatch.setattr(TrainingLoop, "_advance", watched)
    # transformers asks, once a forward of either body, whether its own positions 0, 1, 2, ... mean packed texts
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    if device == "cpu" and every > 3:  # a CPU has computed everything: there the guard may look at every step
        monkeypatch.setattr(StepGuard, "read", lambda guard: None)
    fit(
        framework,
        windows,
        pair.collator(),
        toy_config(batch_size=2, gradient_accumulation_steps=2, max_steps=3, epochs=1),
        accelerator=build_accelerator("no", cpu=device == "cpu"),
        logger=StepLogger(None, 10**6, every, main_process=False),
    )
    return waits


@pytest.mark.parametrize("weights", [HEAD, ROUTED], ids=["head", "routed"])
def test_a_step_that_is_not_logged_waits_for_nothing(weights, monkeypatch):
    assert steps_of(weights, monkeypatch) == [[], [], []]


def test_a_logged_step_waits_and_the_watcher_sees_it(monkeypatch):
    assert all("_local_scalar_dense" in found for found in steps_of(HEAD, monkeypatch, every=1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's own sync debug mode watches there")
@pytest.mark.parametrize("weights", [HEAD, ROUTED], ids=["head", "routed"])
def test_on_a_gpu_a_step_that_is_not_logged_waits_for_nothing(weights, monkeypatch):
    steps_of(weights, monkeypatch, device="cuda")
