"""An optimizer step is the same however it is cut into micro-batches and processes."""

from pathlib import Path

import pytest
import torch

from tests.gloo import launch
from tests.toy import ToyModule, toy_collate, toy_config, toy_windows, train
from utils.logs.records import read_metrics
from utils.machine.launcher import rank
from utils.training.loop import TrainingLoop
from utils.training.plan import Plan

CUTS = [(8, 1), (4, 2), (2, 4), (1, 8), (3, 3)]
"""(windows per forward, forwards per step)."""


def _weights(batch_size: int, accumulation: int, count: int = 19, epochs: int = 3) -> dict[str, torch.Tensor]:
    module = ToyModule(dtype=torch.float64)
    config = toy_config(batch_size=batch_size, gradient_accumulation_steps=accumulation, epochs=epochs)
    train(module, config, windows=toy_windows(count))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("cut", CUTS[1:4])
def test_accumulation_does_not_change_the_weights(cut):
    """19 windows in steps of 8: the last step of an epoch is short, and windows differ in supervised tokens."""
    whole, parts = _weights(*CUTS[0]), _weights(*cut)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-10, atol=1e-12)


def _reference_gradient(windows: list[dict]) -> dict[str, torch.Tensor]:
    """One forward over all windows of the step."""
    module = ToyModule(dtype=torch.float64)
    batch = toy_collate(windows)
    module(batch, 0, counts=batch.counts).loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("count", [8, 5, 1])
@pytest.mark.parametrize("cut", CUTS[:4])
def test_gradient_of_a_step_is_that_of_one_forward_over_its_windows(monkeypatch, cut, count):
    windows, seen = toy_windows(count), {}
    module = ToyModule(dtype=torch.float64)

    def spy(loop, norm):
        seen.update({name: parameter.grad.clone() for name, parameter in module.named_parameters()})
        seen["norm"] = norm.clone()

    monkeypatch.setattr(TrainingLoop, "update", spy)
    config = toy_config(batch_size=cut[0], gradient_accumulation_steps=cut[1], max_steps=1, max_grad_norm=1e9)
    train(module, config, windows=windows)
    expected = _reference_gradient(windows)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-10, atol=1e-12)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    torch.testing.assert_close(seen["norm"], norm, rtol=1e-10, atol=0)


def test_plan_counts_the_short_last_step_and_max_steps_replaces_epochs():
    config = toy_config(batch_size=2, gradient_accumulation_steps=2, epochs=3)
    assert Plan.of(config, 9).total_steps == 9  # 3 steps an epoch: 4 + 4 + 1 windows
    assert Plan.of(config, 9, processes=2).total_steps == 6
    assert Plan.of(toy_config(max_steps=100), 9).total_steps == 100


def _in_process(folder: Path) -> list[tuple[dict, int]]:
    """Weights and steps of a run without and with a look at the gradient of each term."""
    # 9 windows in steps of 8: the last step has one window, so one process has nothing to do in it
    config = toy_config(batch_size=2, gradient_accumulation_steps=2, epochs=2)
    found = []
    for asked in (False, True):
        module = ToyModule(dtype=torch.float64)
        options = {"folder": folder if asked and rank() == 0 else None, "term_gradients": asked}
        result = train(module, config, windows=toy_windows(9), **options)
        found.append(({name: value.numpy() for name, value in module.state_dict().items()}, result.steps))
    return found


def _term_gradients(folder: Path) -> list[dict[str, float]]:
    records = read_metrics(folder / "metrics.jsonl")
    return [{n: t["grad_norm"] for n, t in record["terms"].items() if "grad_norm" in t} for record in records]


def test_two_processes_compute_what_one_does(tmp_path):
    """Weights, and the gradient of each term, whose measurement changes nothing here either."""
    (first, steps), *others = (found for both in launch(2, _in_process, tmp_path / "two") for found in both)
    alone = ToyModule(dtype=torch.float64)
    config = toy_config(batch_size=4, gradient_accumulation_steps=2, epochs=2)
    train(alone, config, tmp_path / "one", windows=toy_windows(9), term_gradients=True)
    assert steps == 4
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(first[name]), value, rtol=1e-10, atol=1e-12)
        assert all((first[name] == other[name]).all() for other, _ in others)
    two, one = _term_gradients(tmp_path / "two"), _term_gradients(tmp_path / "one")
    assert [set(norms) for norms in one] == [{"lm"}] + 3 * [{"lm", "kd"}]
    assert two == [pytest.approx(norms, rel=1e-10) for norms in one]
