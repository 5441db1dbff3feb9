"""Positions that KD is learned at: chosen as the plainest arithmetic chooses them, whatever batch they lie in."""

import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.config import CurriculumConfig, LossConfig, Ramp, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.losses import selection
from models.losses.selection import SCORES, Evidence, choose, positions_of_share
from models.types import SparseTarget
from tests.models.losses.test_losses import as_dictionaries, random_target
from tests.models.tiny import STORIES, byte_bpe, gradients, pair_of

NAMES = sorted(SCORES)


def entropy(probabilities: list[float]) -> float:
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def reference_score(name: str, masses: dict[int, float], tail: float, logits: list[float], label: int) -> float:
    total = sum(math.exp(x) for x in logits)
    q = [math.exp(x) / total for x in logits]
    outcomes = [*masses.values(), tail]
    if name == "student_entropy":
        return entropy(q)
    if name == "teacher_entropy":
        return entropy(outcomes)
    if name == "divergence":
        mine = [*(q[token] for token in masses), sum(x for token, x in enumerate(q) if token not in masses)]
        return sum(p * math.log(p / x) for p, x in zip(outcomes, mine, strict=True) if p > 0)
    return math.log(masses.get(label, tail)) - math.log(q[label])


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_their_definitions_in_float64(name):
    logits = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    target = random_target(6, 11, 4, seed=1, dtype=torch.float64)
    # Named by the teacher, padding aside, and not.
    labels = torch.where(torch.arange(6) % 2 == 0, target.ids[:, 0], (target.ids.amax(1) + 1) % 11)
    scores = SCORES[name](Evidence(target, logits, labels)).tolist()
    for score, masses, tail, row, label in zip(
        scores, as_dictionaries(target), target.tail.tolist(), logits.tolist(), labels.tolist(), strict=True
    ):
        assert score == pytest.approx(reference_score(name, masses, tail, row, label), rel=1e-9)


def test_the_setting_names_every_score():
    assert set(get_args(get_type_hints(LossConfig)["select_by"])) == {*SCORES, selection.STORED}
    assert selection.WITHOUT_STUDENT.issubset(SCORES)


@given(
    windows=st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=1, max_size=5),
    share=st.floats(0.01, 1.0),
)
def test_the_highest_of_each_window_are_chosen_and_of_equals_the_first(windows, share):
    expected = []
    first = 0
    for scores in windows:
        count = min(len(scores), max(1, round(share * len(scores))))
        ranked = sorted(range(len(scores)), key=lambda place, scores=scores: (-scores[place], place))
        expected += sorted(first + place for place in ranked[:count])
        first += len(scores)

    sizes = np.array([len(scores) for scores in windows])
    window = torch.from_numpy(np.repeat(np.arange(len(windows)), sizes))
    scores = torch.tensor([float(score) for scores in windows for score in scores])
    assert choose(scores, window, sizes, share).tolist() == expected
    assert positions_of_share(sizes, share).sum() == len(expected)


# ------------------------------------------------------------------------------------------ in a framework


@pytest.fixture(scope="module")
def pair():
    return pair_of(byte_bpe(300), byte_bpe(400), max_length=24)


def framework_of(
    pair,
    select,
    name: str = "student_entropy",
    least_mass: float = 0.001,
    **weights,
) -> DistillationFramework:
    terms = {"kd": Term(0.7), "lm": Term(0.3)} | {key: Term(value) for key, value in weights.items()}
    config = LossConfig(select_by=name, top_k=32, min_prefix_mass=least_mass)
    scheduler = CurriculumScheduler(CurriculumConfig(select=select, **terms), config, 10)
    return DistillationFramework(pair.student, pair.frozen(), pair.vocabulary, config, scheduler)


def learn(framework, batch, **options) -> tuple[float, list[torch.Tensor]]:
    framework.zero_grad()
    output = framework(batch, **options)
    output.loss.backward()
    return output.terms["kd"].sum.item(), [gradient.clone() for gradient in gradients(framework)]


@pytest.mark.parametrize("share", [0.3, 0.02, 1e-40])
@pytest.mark.parametrize("name", NAMES)
def test_kd_is_the_mean_over_the_chosen_positions_of_each_window(pair, name, share):
    """Each position's divergence and score, from a batch's whole logits; the chosen ones are found by sorting."""
    batch = pair.batch()
    framework = framework_of(pair, share, name)
    signal = framework.ask(batch)
    target: SparseTarget = framework._target(batch, signal)
    with torch.no_grad():
        logits = pair.student(input_ids=batch.student_ids, attention_mask=batch.student_mask).logits.flatten(0, 1)
    rows = logits[batch.row_student].double()
    labels = batch.labels.flatten()[batch.row_student]
    scores = SCORES[name](Evidence(target, rows, labels)).masked_fill(~target.valid, -math.inf)
    divergences = SCORES["divergence"](Evidence(target, rows, labels)) * target.valid

    expected = 0.0
    width = batch.student_ids.shape[1]
    for window in range(len(batch.student_ids)):
        mine = (batch.row_student // width == window).nonzero()[:, 0].tolist()
        mine.sort(key=lambda row: -scores[row].item())
        most = max(1, round(share * len(mine)))
        judged = int(target.valid[mine].sum())
        # The window weighs as much as it does when all of it is chosen: what nobody judges teaches nothing then.
        expected += judged * sum(divergences[row].item() for row in mine[:most]) / min(most, judged)
    assert learn(framework, batch)[0] == pytest.approx(expected, rel=1e-4)


@given(positions=st.integers(1, 600), judged=st.floats(0, 1), share=st.floats(1e-6, 1))
def test_the_chosen_ones_stand_for_all_that_the_teacher_can_judge(positions, judged, share):
    judged = round(judged * positions)
    chosen = int(positions_of_share(np.array([positions]), share)[0])
    counts = torch.tensor([positions, judged], dtype=torch.float64)
    weight = selection.positions_of_a_chosen_one(counts[0], share, counts[1]).item()
    assert weight * min(chosen, judged) == pytest.approx(judged)


def test_kd_does_not_leap_where_a_share_comes_to_all_positions(pair):
    """Positions that the teacher cannot judge teach nothing, so a share below 1 can choose all that do teach."""
    batch = pair.batch()
    everywhere = framework_of(pair, 1.0, least_mass=0.2)
    valid = everywhere._target(batch, everywhere.ask(batch)).valid
    windows = (batch.row_student // batch.student_ids.shape[1]).tolist()
    judged = [valid[[other == window for other in windows]].double().mean().item() for window in set(windows)]
    assert max(judged) < 0.9

    almost = framework_of(pair, 0.95, least_mass=0.2)
    assert learn(almost, batch)[0] == pytest.approx(learn(everywhere, batch)[0], rel=1e-5)


def test_a_share_of_one_is_the_loss_without_it_bit_for_bit(pair):
    batch = pair.batch()
    ramp = framework_of(pair, Ramp(((0.0, 0.2), (1.0, 1.0))))
    plain = framework_of(pair, 1.0)
    assert [ramp(batch, step).scalars["select"] for step in (0, 10)] == [0.2, 1.0]
    assert "select" not in plain(batch).scalars

    whole, reference = learn(ramp, batch, step=10), learn(plain, batch, step=10)
    assert whole[0] == reference[0]
    assert all(torch.equal(one, other) for one, other in zip(whole[1], reference[1], strict=True))
    assert learn(ramp, batch, step=0)[0] != reference[0]


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_and_padding_change_nothing(pair, name):
    windows = pair.encoder.windows(STORIES)
    collate = pair.collator()
    framework = framework_of(pair, 0.4, name)
    batch = collate(windows)
    whole, gradient = learn(framework, batch)

    framework.zero_grad()
    added = 0.0
    for window in windows:
        part = collate([window])
        output = framework(part, counts=batch.counts)
        output.loss.backward()
        added += output.terms["kd"].sum.item()
    assert added == pytest.approx(whole, rel=1e-5)
    for one, other in zip(gradients(framework), gradient, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-7


def test_measuring_chooses_too_and_a_batch_without_positions_is_a_zero(pair):
    batch = pair.batch()
    framework = framework_of(pair, 0.3)
    measured = framework_of(pair, 0.3, kd=0.0)(batch, measure=True).terms["kd"].sum.item()
    assert measured == pytest.approx(framework(batch).terms["kd"].sum.item(), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.2])
def test_a_share_outside_is_refused(share):
    with pytest.raises(ValueError, match="select is a share of positions, above 0"):
        CurriculumConfig(select=share)
