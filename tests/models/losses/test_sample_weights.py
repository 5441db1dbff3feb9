"""Weights of windows in KD: their definition, their bounds, and that no split of a step changes them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.config import CurriculumConfig, LossConfig, Ramp, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.losses.sample_weights import LEAST_WEIGHT, MOST_WEIGHT, frontier, window_weights
from tests.models.tiny import STORIES, byte_bpe, gradients, pair_of


@pytest.fixture(scope="module")
def pair():
    return pair_of(byte_bpe(300), byte_bpe(400), max_length=24)


def framework_of(pair, degree, select=1.0, **weights) -> DistillationFramework:
    terms = {"kd": Term(0.7), "lm": Term(0.3)} | {key: Term(value) for key, value in weights.items()}
    config = LossConfig(top_k=32)
    scheduler = CurriculumScheduler(CurriculumConfig(sample_weights=degree, select=select, **terms), config, 10)
    return DistillationFramework(pair.student, pair.frozen(), pair.vocabulary, config, scheduler)


def learn(framework, batch, **options):
    framework.zero_grad()
    output = framework(batch, **options)
    output.loss.backward()
    return output, [gradient.clone() for gradient in gradients(framework)]


@given(excess=st.floats(-5, 50), mean=st.floats(1e-3, 0.25), degree=st.floats(0, 1))
def test_a_weight_is_its_definition_in_float64_and_bounded(excess, mean, degree):
    score = frontier(torch.tensor([excess], dtype=torch.float64))
    success = math.exp(-max(excess, 0.0))
    assert score.item() == pytest.approx(success * (1 - success), rel=1e-9, abs=1e-12)
    bounded = min(max(success * (1 - success) / mean, LEAST_WEIGHT), MOST_WEIGHT)
    assert window_weights(score, mean, degree).item() == pytest.approx(1 - degree + degree * bounded, rel=1e-9)


def test_success_at_the_edges_teaches_least_and_at_one_half_most():
    scores = frontier(torch.tensor([-1.0, 0.0, math.log(2), 30.0], dtype=torch.float64))
    assert scores.tolist() == pytest.approx([0.0, 0.0, 0.25, 0.0], abs=1e-12)


def reference_scores(pair, batch, signal) -> list[float]:
    """p(1 - p) of each window, from the whole logits of both models, token by token."""
    width = batch.student_ids.shape[1]
    with torch.no_grad():
        logits = pair.student(input_ids=batch.student_ids, attention_mask=batch.student_mask).logits.double()
        teacher = pair.frozen().model(input_ids=batch.teacher_ids, attention_mask=batch.teacher_mask).logits.double()
    sums = {}
    for side, values in (("student", logits), ("teacher", teacher)):
        labels = batch.scored(side)[1]
        log_probs = values.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        sums[side] = (log_probs * (labels >= 0)).sum(1)
    tokens = (batch.scored("student")[1] >= 0).sum(1)
    assert width == logits.shape[1]
    success = [math.exp(-max(0.0, excess)) for excess in ((sums["teacher"] - sums["student"]) / tokens).tolist()]
    return [p * (1 - p) for p in success]


def test_kd_is_the_weighted_sum_over_windows(pair):
    batch = pair.batch()
    framework = framework_of(pair, 0.8)
    signal = framework.ask(batch)
    scores = reference_scores(pair, batch, signal)
    mean = 0.8 * max(scores)

    plain = framework_of(pair, 0.0)
    expected = 0.0
    squares = 0.0
    weights = 0.0
    for window, score in zip(pair.encoder.windows(STORIES), scores, strict=True):
        alone = pair.collator()([window])
        weight = 1 + 0.8 * (min(max(score / mean, LEAST_WEIGHT), MOST_WEIGHT) - 1)
        expected += weight * plain(alone, 0).terms["kd"].sum.item()
        weights += alone.counts["kd"] * weight
        squares += alone.counts["kd"] * (weight - 1) ** 2
    output = framework(batch, 1, statistics={"samples": mean})
    assert output.terms["kd"].sum.item() == pytest.approx(expected, rel=1e-4)

    score_sum = sum(score * rows for score, rows in zip(scores, batch.window_rows.tolist(), strict=True))
    assert output.samples.tolist() == pytest.approx([score_sum, weights, squares], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"select": 0.5}, {"span": 0.2}])
def test_micro_batches_change_nothing(pair, options):
    framework = framework_of(pair, 1.0, **options)
    batch = pair.batch()
    given = {"statistics": {"samples": 0.1}}
    whole, gradient = learn(framework, batch, step=1, **given)

    framework.zero_grad()
    samples = torch.zeros(3)
    for window in pair.encoder.windows(STORIES):
        output = framework(pair.collator()([window]), 1, counts=batch.counts, **given)
        output.loss.backward()
        samples += output.samples
    assert samples.tolist() == pytest.approx(whole.samples.tolist(), rel=1e-4, abs=1e-6)
    for one, other in zip(gradients(framework), gradient, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7


@pytest.mark.parametrize("mean", [None, 0.1])
def test_a_degree_of_zero_and_an_unknown_mean_change_no_bit(pair, mean):
    batch = pair.batch()
    reference, gradient = learn(framework_of(pair, 0.0), batch, step=1)
    assert reference.samples is None and "sample_weights" not in reference.scalars

    ramp = framework_of(pair, Ramp(((0.0, 0.0), (1.0, 1.0))))
    step = 0 if mean else 10
    output, weighted = learn(ramp, batch, step=step, statistics={} if mean is None else {"samples": mean})
    assert (output.samples is None) == (step == 0)
    assert output.loss.item() == reference.loss.item()
    assert all(torch.equal(one, other) for one, other in zip(weighted, gradient, strict=True))
    changed, _ = learn(ramp, batch, step=10, statistics={"samples": 0.1})
    assert changed.loss.item() != reference.loss.item()


def test_a_kd_that_is_only_measured_says_nothing_of_windows(pair):
    """Or how often a run measures its terms would change the mean that later steps weigh windows by."""
    framework = framework_of(pair, 1.0, kd=0.0, lm=1.0)
    output = framework(pair.batch(), 1, measure=True, statistics={})
    assert output.terms["kd"].sum > 0 and output.samples is None


def test_equal_models_have_no_kd_and_no_frontier():
    same = pair_of(byte_bpe(300), byte_bpe(300), max_length=24)
    same.student.load_state_dict(same.frozen().model.state_dict())
    output = framework_of(same, 1.0)(same.batch(), 1, statistics={"samples": 0.1})
    assert output.terms["kd"].sum.item() == pytest.approx(0.0, abs=1e-3)
    assert output.samples[0].item() == pytest.approx(0.0, abs=1e-2)
    assert math.isfinite(framework_of(same, 1.0)(same.batch(), 1, statistics={"samples": 0.0}).loss.item())


def test_a_loop_that_gives_no_statistics_is_refused(pair):
    with pytest.raises(ValueError, match="got no statistics in step 3"):
        framework_of(pair, 1.0)(pair.batch(), 3)


@pytest.mark.parametrize("degree", [-0.1, 1.5])
def test_a_degree_outside_is_refused(degree):
    with pytest.raises(ValueError, match="sample_weights is a degree"):
        CurriculumConfig(sample_weights=degree)
