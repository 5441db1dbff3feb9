"""Weights over the run."""

import math
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from models.config import HEAD_TERMS, ROUTER_TERMS, TERMS, TEXT_TERMS, CurriculumConfig, LossConfig, Ramp, Term
from models.curriculum import CurriculumScheduler, balanced, value_at

REFERENCE = Path(__file__).parents[2] / "configs" / "reference_curriculum.yaml"


def reference_scheduler(total_steps: int) -> CurriculumScheduler:
    """The shipped file, read by hand."""
    terms = {}
    for name, term in yaml.safe_load(REFERENCE.read_text())["curriculum"].items():
        weight = term["weight"]
        if isinstance(weight, dict):
            points = tuple((float(p), float(v)) for p, v in weight["points"])
            weight = Ramp(points, weight.get("shape", "linear"))
        terms[name] = Term(weight)
    return CurriculumScheduler(CurriculumConfig(**terms), LossConfig(), total_steps)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (4, {"kd": 0.7, "lm": 0.3, "feat": 0.0, "rel": 0.0, "attn": 0.0, "layer": 0.0, "contr": 0.0}),
        (502, {"kd": 0.7, "lm": 0.3, "feat": 0.1, "rel": 0.0, "attn": 0.1, "layer": 0.017, "contr": 0.0}),
        (1000, {"kd": 0.7, "lm": 0.3, "layer": 0.1}),
    ],
)
def test_reference_curriculum_gives_the_reference_weights_to_three_decimals(step, expected):
    weights = reference_scheduler(1000).weights(step)
    assert {name: round(weights[name], 3) for name in expected} == expected


@pytest.mark.parametrize("step", [400, 500, 600, 873])
def test_reference_layer_weight_rises_linearly_from_40_percent(step):
    assert reference_scheduler(1000).weights(step)["layer"] == pytest.approx(0.1 * (step - 400) / 600)


def test_a_number_is_constant():
    assert {value_at(0.25, p / 10) for p in range(11)} == {0.25}


def test_linear_ramp_is_linear_and_constant_outside():
    ramp = Ramp(((0.2, 1.0), (0.6, 3.0), (0.8, 0.0)))
    found = [value_at(ramp, p) for p in (0.0, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 1.5, 2.0, 3.0, 1.5, 0.0, 0.0])


def test_cosine_ramp_follows_half_a_cosine():
    ramp = Ramp(((0.0, 1.0), (1.0, 5.0)), "cosine")
    for p in (0.0, 0.1, 0.25, 0.5, 0.9, 1.0):
        assert value_at(ramp, p) == pytest.approx(1 + 4 * (1 - math.cos(math.pi * p)) / 2)


@given(
    values=st.lists(st.floats(0, 10), min_size=2, max_size=5),
    shape=st.sampled_from(["linear", "cosine"]),
    where=st.lists(st.floats(0, 1), min_size=2, max_size=20),
)
def test_ramp_through_rising_values_rises_and_stays_between_them(values, shape, where):
    values.sort()
    ramp = Ramp(tuple((n / len(values), v) for n, v in enumerate(values)), shape)
    found = [value_at(ramp, p) for p in sorted(where)]
    assert all(a <= b + 1e-9 for a, b in pairwise(found))
    assert values[0] <= min(found) and max(found) <= values[-1] + 1e-9


def test_ramp_with_points_out_of_order_is_refused():
    for points in ((), ((0.5, 1.0), (0.5, 2.0)), ((0.6, 1.0), (0.2, 2.0))):
        with pytest.raises(ValueError, match="rising progress"):
            Ramp(points)


def test_temperatures_can_follow_a_ramp():
    loss = LossConfig(temperature=Ramp(((0.0, 4.0), (1.0, 1.0))), span_temperature=2.0)
    scheduler = CurriculumScheduler(CurriculumConfig(), loss, 100)
    assert scheduler.scalars(0) == {"temperature": 4.0, "span_temperature": 2.0}
    assert scheduler.scalars(50)["temperature"] == pytest.approx(2.5)


def test_weights_are_a_pure_function_of_the_step_and_none_is_the_end():
    scheduler = reference_scheduler(250)
    forward = [scheduler.weights(s) for s in range(251)]
    assert [scheduler.weights(s) for s in reversed(range(251))] == forward[::-1]
    with pytest.warns(UserWarning, match="behind the 250"):
        assert scheduler.weights(None) == scheduler.weights(250) == scheduler.weights(999)


def test_a_term_is_used_exactly_if_some_weight_is_not_zero():
    flat = Ramp(((0.0, 0.0), (1.0, 0.0)))
    late = Ramp(((0.4, 0.0), (1.0, 0.1)))
    assert CurriculumConfig(kd=Term(0.0), feat=Term(late), rel=Term(flat)).used() == {"lm", "feat"}


def test_a_curriculum_in_words_names_what_weighs_anything_and_every_schedule():
    assert CurriculumConfig().in_words() == "kd 0.7, lm 0.3"
    late = Ramp(((0.1, 0.0), (0.4, 0.5)))
    curriculum = CurriculumConfig(kd=Term(0.0), layer=Term(late), on_policy=late, select=0.2, balance="loss")
    ramp = "0 at 10 % to 0.5 at 40 %"
    assert curriculum.in_words() == f"lm 0.3, layer {ramp}, on_policy {ramp}, select 0.2, balance loss"
    assert curriculum.weights_in_words(["kd", "layer"]) == f"layer {ramp}"


def test_a_loss_in_words_names_what_is_not_the_usual_way():
    assert LossConfig().in_words() == LossConfig(skew=0.5, top_k=8).in_words() == ""
    rising = Ramp(((0.2, 0.0), (1.0, 1.0)))
    loss = LossConfig(divergence="generalised_jsd", skew=rising, temperature=2, interpolation=0.5)
    skew = "skew 0 at 20 % to 1 at 100 %"
    assert loss.in_words() == f"divergence generalised_jsd, {skew}, temperature 2, interpolation 0.5"
    assert LossConfig(divergence="skew_kl").in_words() == "divergence skew_kl, skew 0.1"


def test_negative_weights_and_temperatures_of_zero_are_refused():
    for wrong in (-0.1, Ramp(((0.0, 0.5), (1.0, -0.5)))):
        with pytest.raises(ValueError, match="0 or more"):
            CurriculumConfig(kd=Term(wrong))
    for wrong in (0.0, -1.0, Ramp(((0.0, 4.0), (1.0, 0.0)))):
        with pytest.raises(ValueError, match="greater than 0"):
            LossConfig(temperature=wrong)


@pytest.mark.parametrize("wrong", [math.inf, math.nan])
def test_weights_and_temperatures_that_are_not_finite_are_refused(wrong):
    with pytest.raises(ValueError, match=r"weight: got .*, expected a finite number"):
        CurriculumConfig(kd=Term(wrong))
    with pytest.raises(ValueError, match=r"temperature: got .*, expected a finite number"):
        LossConfig(temperature=wrong)
    with pytest.raises(ValueError, match="expected a finite number"):
        Ramp(((0.0, 1.0), (1.0, wrong)))


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        CurriculumScheduler(CurriculumConfig(), LossConfig(), 0)


def test_the_table_of_terms_is_the_curriculum_and_every_term_comes_from_one_place():
    assert [*TERMS, "on_policy", "select", "open_text", "sample_weights", "balance"] == [
        field.name for field in fields(CurriculumConfig)
    ]
    assert sorted([*HEAD_TERMS, *ROUTER_TERMS]) == sorted(TERMS)
    assert HEAD_TERMS == ("lm", "kd", "span") and {"lm"} == TEXT_TERMS
    assert len({term.label for term in TERMS.values()}) == len(TERMS)


# --- balance of terms


@given(
    weights=st.lists(st.floats(0.01, 2), min_size=2, max_size=5),
    data=st.data(),
)
def test_balanced_terms_contribute_in_proportion_to_their_weights(weights, data):
    """Within the bounds; the total stays what it was."""
    sizes = data.draw(st.lists(st.floats(0.5, 4), min_size=len(weights), max_size=len(weights)))
    names = [f"term{number}" for number in range(len(weights))]
    result = balanced(dict(zip(names, weights, strict=True)), dict(zip(names, sizes, strict=True)))
    contributed = [result[name] * size for name, size in zip(names, sizes, strict=True)]
    total = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    for weight, part in zip(weights, contributed, strict=True):
        assert part == pytest.approx(total * weight / sum(weights), rel=1e-9)


def test_a_balance_is_bounded_and_leaves_what_it_does_not_know():
    weights = {"kd": 0.5, "lm": 0.5, "feat": 1.0, "rel": 0.0}
    # Equal models: KD has nothing to teach.
    result = balanced(weights, {"kd": 0.0, "lm": 2.0, "rel": 5.0})
    assert result == {"kd": 5.0, "lm": 0.25, "feat": 1.0, "rel": 0.0}
    assert balanced(weights, {"kd": 0.0, "lm": 0.0}) == weights
    assert balanced(weights, {"lm": 3.0}) == weights
    assert balanced(weights, {}) == weights


def test_a_scheduler_without_a_balance_takes_no_notice_of_sizes():
    sizes = {"kd": 1.0, "lm": 3.0}
    plain = CurriculumScheduler(CurriculumConfig(), LossConfig(), 10)
    by_loss = CurriculumScheduler(CurriculumConfig(balance="loss"), LossConfig(), 10)
    assert plain.weights(5, sizes) == plain.weights(5) == by_loss.weights(5) and not plain.uses_statistics
    assert by_loss.weights(5, sizes)["lm"] == pytest.approx(0.3 * 1.6 / 3) and by_loss.uses_statistics
