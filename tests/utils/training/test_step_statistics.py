"""Statistics of the steps before: whole-step sums, in checkpoints, the same however a step is cut or logged."""

from types import SimpleNamespace

import pytest
import torch

from models.curriculum import balanced
from tests.gloo import launch
from tests.toy import StopAfter, ToyModule, digest, toy_config, toy_windows, train
from utils.errors import UserError
from utils.logs.records import read_metrics
from utils.machine.launcher import rank
from utils.training import loop
from utils.training.checkpoints import CheckpointStore
from utils.training.step_statistics import StepStatistics


class WeighingToy(ToyModule):
    """A toy whose terms are balanced and whose KD follows a score of its windows."""

    def __init__(self, balance: str, weighs_windows: bool = True, **options) -> None:
        super().__init__(**options)
        self.curriculum = SimpleNamespace(balance=balance, uses_statistics=balance != "none" or weighs_windows)
        self.weighs_windows = weighs_windows
        self.seen: list[dict[str, float]] = []

    def forward(self, batch, step, *, counts, measure=False, term_graphs=False, statistics=None):
        self.seen.append(dict(statistics or {}))
        output = super().forward(batch, step, counts=counts, measure=measure, term_graphs=term_graphs)
        output.weights["kd"] = 0.3
        if self.curriculum.balance != "none":
            output.weights = balanced(output.weights, statistics)

        kd = output.terms["kd"]
        if self.weighs_windows:
            score = kd.sum.detach() * 0.01
            weight = 1 / (1 + statistics.get("samples", 0.0))
            output.samples = torch.stack([score, weight * kd.count * torch.ones_like(score), score * 0.5])
            kd.sum = kd.sum * weight
        shares = {name: output.weights[name] / max(counts[name], 1) for name in ("lm", "kd")}
        output.loss = sum(shares[name] * output.terms[name].sum for name in shares)
        return output


def weights_of(balance: str, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    module = WeighingToy(balance, dtype=torch.float64)
    config = toy_config(batch_size=batch_size, gradient_accumulation_steps=accumulation)
    train(module, config, windows=toy_windows(19))
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("balance", ["none", "loss", "gradient"])
def test_micro_batches_do_not_change_the_weights(balance):
    """19 windows in steps of 8: the last step of an epoch is short."""
    whole = weights_of(balance, 8, 1)
    for cut in [(2, 4), (1, 8)]:
        for name, value in weights_of(balance, *cut).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("balance", ["none", "loss", "gradient"])
def test_logging_and_interruptions_change_no_bit(tmp_path, balance):
    whole = WeighingToy(balance, dropout=0.3)
    train(whole, toy_config(), every=1)
    seldom = WeighingToy(balance, dropout=0.3)
    train(seldom, toy_config(), every=10**6)
    assert digest(seldom) == digest(whole)

    for attempt in range(3):
        store = CheckpointStore(tmp_path / "checkpoints", keep=2)
        module = WeighingToy(balance, dropout=0.3, seed=attempt)
        stop = StopAfter(2) if attempt < 2 else None
        train(module, toy_config(), tmp_path, checkpoints=store, resume_from=store.resume_point("auto"), stop=stop)
        # Known from the checkpoint before the session's first step.
        assert attempt == 0 or "samples" in module.seen[0]
    assert digest(module) == digest(whole)


def in_process(folder) -> dict:
    """Weights of a run in whose last step one process has nothing to do."""
    weights = {}
    for balance in ("loss", "gradient"):
        module = WeighingToy(balance, dtype=torch.float64)
        config = toy_config(batch_size=2, gradient_accumulation_steps=2)
        train(module, config, folder if rank() == 0 else None, windows=toy_windows(9))
        weights[balance] = {name: value.numpy() for name, value in module.state_dict().items()}
    return weights


def test_two_processes_compute_what_one_does(tmp_path):
    first, second = launch(2, in_process, tmp_path)
    for balance, weights in first.items():
        alone = WeighingToy(balance, dtype=torch.float64)
        train(alone, toy_config(batch_size=4, gradient_accumulation_steps=2), windows=toy_windows(9))
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(torch.from_numpy(weights[name]), value, rtol=1e-9, atol=1e-11)
            assert (weights[name] == second[balance][name]).all()


def test_sizes_are_those_of_the_step_before_and_scores_a_running_mean(tmp_path):
    module = WeighingToy("loss", dtype=torch.float64)
    config = toy_config(batch_size=8, gradient_accumulation_steps=1, epochs=14)
    train(module, config, tmp_path, windows=toy_windows(8))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert module.seen[0] == {}

    mean = 0.0
    for number, (before, seen) in enumerate(zip(records, module.seen[1:], strict=False), start=1):
        assert seen["lm"] == pytest.approx(before["terms"]["lm"]["raw"], rel=1e-6)
        # As if its windows had weighed 1.
        weight = 1 / (1 + mean)
        assert seen["kd"] == pytest.approx(before["terms"]["kd"]["raw"] / weight, rel=1e-6)
        # The plain mean of the first ten, and from then on a tenth of the newest.
        score = 0.01 * before["terms"]["kd"]["raw"] / weight
        mean += max(0.1, 1 / number) * (score - mean)
        assert seen["samples"] == pytest.approx(mean, rel=1e-6)
        assert before["sample_spread"] == pytest.approx((0.5 * score) ** 0.5, rel=1e-6)
    assert number == 13

    # Logged are the weights in effect.
    assert records[1]["terms"]["kd"]["weight"] != records[0]["terms"]["kd"]["weight"] == 0.3


def test_sizes_of_another_balance_are_forgotten():
    """A run that is continued with `resume_changed` has losses for norms of gradients else."""
    of_losses = StepStatistics(WeighingToy("loss"))
    of_losses.values = {"kd": 3.0, "samples": 0.2}
    of_losses.scored_steps = 4
    of_gradients, again = StepStatistics(WeighingToy("gradient")), StepStatistics(WeighingToy("loss"))
    for statistics in (of_gradients, again):
        statistics.load_state_dict(of_losses.state_dict())
    assert of_gradients.values == {"samples": 0.2} and of_gradients.scored_steps == 4
    assert again.values == of_losses.values


def test_a_module_without_statistics_is_given_none_and_stores_none(tmp_path):
    module = WeighingToy("none", weighs_windows=False)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    train(module, toy_config(), tmp_path, checkpoints=store)
    assert module.seen == [{}] * len(module.seen)
    assert "statistics" not in store.load(store.newest_whole()).state
    assert all("sample_spread" not in record for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_gradients_of_a_sharded_student_are_refused(monkeypatch):
    monkeypatch.setattr(loop, "engine_kind", lambda accelerator: SimpleNamespace(sharded=True))
    with pytest.raises(UserError, match="balance: gradient needs whole weights"):
        train(WeighingToy("gradient"), toy_config())
