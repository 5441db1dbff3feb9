"""The benchmarks measure what they say they measure."""

import numpy as np
import pytest
import torch

from benchmarks import measure, peers, step_time
from models.config import LossConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["plain", "fused", "plain-full"])
def test_the_gradient_of_a_variant_is_that_of_its_loss_in_float64(name, tmp_path):
    args = peers.parser("").parse_args(["--tokens", "150", "--width", "8", "--vocabulary", "300", "--top-k", "16"])
    work = peers._Work(peers.VARIANTS[name], peers.Problem(args), tmp_path)
    work()
    errors = work.answer("error")
    assert 0 < max(errors.values()) < 1e-5


def test_peak_memory_sees_what_is_freed_before_the_end():
    size = 64 * 2**20

    def work():
        torch.ones(size // 4).sum()

    measure.measure(work, CPU)
    run = measure.measure(work, CPU)
    if measure._reset_peak() != "VmHWM":
        pytest.skip("the high-water mark cannot be set back here")
    assert 0.98 * size < run.peak < 1.1 * size


def test_random_windows_are_read_by_both_models_and_anchored_nearly_everywhere():
    vocabulary = step_time.vocabulary_map(3000, 1000)
    batch = step_time.random_batch(vocabulary, 2, 64)
    assert batch.student_ids.shape[1] <= 64
    assert batch.counts["lm"] > 100
    assert batch.counts["kd"] >= 0.95 * batch.counts["lm"]
    assert 0 < int((batch.depth > 0).sum()) < batch.counts["kd"] / 2
    assert int(batch.depth.max()) <= LossConfig().max_depth


def test_the_forecast_counts_operations_and_bytes_once():
    a, b = torch.empty(3, 5), torch.empty(5, 7)
    costs = step_time._counted(lambda: (a @ b).view(-1).exp_())
    assert costs.flop == 2 * 3 * 5 * 7
    assert costs.bytes == 4 * (15 + 35 + 21) + 4 * 21
    card = step_time.CARDS["T4"]
    assert np.isclose(costs.seconds(card), costs.bytes / (card.bytes * card.bytes_share))
