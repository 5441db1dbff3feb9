"""The router's terms do not depend on how windows are padded, batched and spread over processes.

contr compares the spans of a forward with one another: its value depends on what stands in a forward, over all
processes, and not on the process that computes it.
"""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist

from models.config import RouterConfig
from models.student_aware_router import ROUTER_TERMS
from models.text.windows import SIDES
from tests.gloo import launch
from tests.models.tiny import STORIES, Pair, byte_bpe, pad_further, pair_of, tiny_llama

SPLITTABLE = ("feat", "rel", "attn", "layer")
CUTS = {
    "4x2": [slice(0, 4), slice(4, 8)],
    "1x8": [slice(n, n + 1) for n in range(8)],
    "uneven": [slice(5), slice(5, 8)],
}


def double_pair() -> Pair:
    models = [tiny_llama(size, seed, num_hidden_layers=3).double() for seed, size in enumerate((300, 400))]
    options = {"student": models[0], "teacher": models[1], "router": RouterConfig(layers=2, span=4, positions=8)}
    return pair_of(byte_bpe(300), byte_bpe(400), **options)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return double_pair()


@pytest.fixture(scope="module")
def windows(pair) -> list[dict]:
    return pair.encoder.windows([*STORIES, *(story[::-1] for story in STORIES)])[:8]


def framework_of(pair: Pair, windows: list[dict], terms=ROUTER_TERMS):
    torch.manual_seed(0)
    framework = pair.framework(dict.fromkeys(terms, 1.0)).double()
    framework.calibrate([pair.collator()(windows)])
    torch.nn.init.normal_(framework.router.gate, std=0.1)
    return framework


def step(framework, pair: Pair, parts: list[list[dict]], counts: dict[str, int]) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step cut into forwards, and the sum of their losses."""
    framework.zero_grad()
    loss = 0.0
    for part in parts:
        value = framework(pair.collator()(part), counts=counts).loss
        value.backward()
        loss += value.detach()
    return {name: p.grad for name, p in framework.named_parameters() if p.grad is not None} | {"loss": loss}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("term", SPLITTABLE)
@pytest.mark.parametrize("cut", CUTS)
def test_a_step_cut_into_forwards_is_the_step_in_one(pair, windows, term, cut):
    assert len(windows) == 8
    framework, counts = framework_of(pair, windows, (term,)), pair.collator()(windows).counts
    whole = copy.deepcopy(step(framework, pair, [windows], counts))
    assert_equal(step(framework, pair, [windows[part] for part in CUTS[cut]], counts), whole)


@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_padding_changes_nothing(pair, windows, monkeypatch, term):
    framework, counts = framework_of(pair, windows, (term,)), pair.collator()(windows).counts
    plain = copy.deepcopy(step(framework, pair, [windows], counts))
    pad_further(monkeypatch)
    assert_equal(step(framework, pair, [windows], counts), plain)


def test_order_of_windows_changes_nothing(pair, windows):
    framework, counts = framework_of(pair, windows), pair.collator()(windows).counts
    plain = copy.deepcopy(step(framework, pair, [windows], counts))
    assert_equal(step(framework, pair, [windows[::-1]], counts), plain)


def _in_process(windows: list[dict]) -> dict[str, dict]:
    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    pair = double_pair()
    framework, counts = framework_of(pair, windows), pair.collator()(windows).counts
    for name, mine in (("uneven", windows[:5] if rank == 0 else windows[5:]), ("idle", windows if rank == 0 else [])):
        found = step(framework, pair, [mine or [_without_anchors(windows[0])]], counts)
        for value in found.values():
            dist.all_reduce(value)
        results[name] = {key: value.numpy() for key, value in found.items()}
    return results


def _without_anchors(window: dict) -> dict:
    return window | {f"{side}_roles": np.zeros_like(window[f"{side}_roles"]) for side in SIDES}


def test_two_processes_compute_what_one_does_with_the_same_negatives(pair, windows):
    """Also where one of them has nothing to compare."""
    found = [gradients for results in launch(2, _in_process, windows) for gradients in results.values()]
    framework, counts = framework_of(pair, windows), pair.collator()(windows).counts
    alone = step(framework, pair, [windows], counts)
    apart = framework_of(pair, windows, ("contr",))
    assert step(apart, pair, [windows[:5], windows[5:]], counts)["loss"] != step(apart, pair, [windows], counts)["loss"]
    for gradients in found:
        assert_equal({name: torch.from_numpy(value) for name, value in gradients.items()}, alone)
