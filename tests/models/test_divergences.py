"""The table of divergences: each entry against the plainest float64 arithmetic, and the names that a setting admits."""

import math
from typing import get_args

import pytest
import torch

from models.config import LossConfig, Ramp
from models.divergences import DIVERGENCES, ENDS, MIXED, DivergenceName, divergence, temper


def kl(p: list[float], q: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def mixture(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(p, q, strict=True)]


def jensen_shannon(p: list[float], q: list[float], skew: float) -> float:
    middle = mixture(p, q, 0.5)
    return (kl(p, middle) + kl(q, middle)) / 2


def generalised_jensen_shannon(p: list[float], q: list[float], share: float) -> float:
    middle = mixture(p, q, share)
    return kl(p, middle) / (1 - share) + kl(q, middle) / share


REFERENCES = {
    "forward_kl": lambda p, q, skew: kl(p, q),
    "reverse_kl": lambda p, q, skew: kl(q, p),
    "jsd": jensen_shannon,
    "skew_kl": lambda p, q, skew: kl(p, mixture(p, q, skew)),
    "generalised_jsd": generalised_jensen_shannon,
}
"""Divergence of two lists of probabilities, one outcome after another; a new divergence needs one."""


def reference_divergence(p: list[float], q: list[float], kind: str, skew: float) -> float:
    return REFERENCES[kind](p, q, skew)


def tempered(p: list[float], temperature: float) -> list[float]:
    powers = [x ** (1 / temperature) for x in p]
    return [x / sum(powers) for x in powers]


def random_pair(spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(log_p, log_q) [50, 8] in float64."""
    generator = torch.Generator().manual_seed(7)
    log_p, log_q = torch.randn(2, 50, 8, dtype=torch.float64, generator=generator) * spread
    return log_p.log_softmax(-1), log_q.log_softmax(-1)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_each_divergence_is_its_definition(kind):
    log_p, log_q = random_pair()
    values = divergence(log_p, log_q, kind, 0.1)
    for value, p, q in zip(values.tolist(), log_p.exp().tolist(), log_q.exp().tolist(), strict=True):
        assert value == pytest.approx(reference_divergence(p, q, kind, 0.1), rel=1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_are_never_negative_and_zero_only_for_equals(kind):
    log_p, log_q = random_pair()
    assert (divergence(log_p, log_q, kind, 0.1) > 0).all()
    assert divergence(log_p, log_p, kind, 0.1).abs().max() < 1e-12


def test_jsd_is_symmetric_and_bounded_by_ln_2():
    log_p, log_q = random_pair(spread=30.0)
    values = divergence(log_p, log_q, "jsd", 0.1)
    assert torch.allclose(values, divergence(log_q, log_p, "jsd", 0.1))
    assert values.max() <= math.log(2) + 1e-12


@pytest.mark.parametrize(("kind", "skew", "end"), [(kind, skew, end) for (kind, skew), end in ENDS.items()])
def test_at_an_end_of_its_mixture_a_divergence_is_another(kind, skew, end):
    log_p, log_q = random_pair()
    assert torch.equal(divergence(log_p, log_q, kind, skew), divergence(log_p, log_q, end, 0.1))

    # and comes near to it without a leap, in single precision too
    log_p, log_q = random_pair(spread=1.0)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.float32, 2e-4)):
        near = divergence(log_p.to(dtype), log_q.to(dtype), kind, abs(skew - 1e-6))
        limit = divergence(log_p, log_q, end, 0.1)
        assert torch.allclose(near.double(), limit, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", sorted(MIXED))
@pytest.mark.parametrize("skew", [1e-300, 1e-46, 1e-38, 2e-6, 1 - 2e-6, 1 - 1e-8, 1 - 1e-16])
def test_no_share_of_the_teacher_between_the_ends_is_too_near_to_one(kind, skew):
    log_p, log_q = (side.float() for side in random_pair(spread=4.0))
    log_q.requires_grad_()
    value = divergence(log_p, log_q, kind, skew).sum()
    value.backward()
    assert value.isfinite() and log_q.grad.isfinite().all()


def test_the_generalised_divergence_is_the_mirror_image_of_its_opposite():
    log_p, log_q = random_pair()
    there = divergence(log_p, log_q, "generalised_jsd", 0.3)
    back = divergence(log_q, log_p, "generalised_jsd", 0.7)
    assert torch.allclose(there, back)
    half = divergence(log_p, log_q, "generalised_jsd", 0.5)
    assert torch.allclose(half, 4 * divergence(log_p, log_q, "jsd", 0.5))


@pytest.mark.parametrize("kind", sorted(MIXED))
@pytest.mark.parametrize("skew", [1e-4, 0.5, 1 - 1e-4])
def test_outcomes_without_probability_leave_gradients_finite(kind, skew):
    log_p = torch.tensor([[-1e30, -1e30, 0.0, -40.0]])
    log_q = torch.tensor([[-1e30, 0.0, -1e30, -40.0]]).requires_grad_()
    value = divergence(log_p, log_q, kind, skew).sum()
    value.backward()
    assert value.isfinite() and log_q.grad.isfinite().all()


def test_a_skew_is_a_share_and_that_of_skew_kl_leaves_something_to_learn():
    ramp = Ramp(((0.0, 0.0), (1.0, 1.0)))
    assert LossConfig(divergence="generalised_jsd", skew=ramp).skew == ramp
    for divergence_name, skew, words in (
        ("generalised_jsd", Ramp(((0.0, 0.0), (1.0, 1.5))), "from 0 to 1, got 0, 1.5"),
        ("skew_kl", ramp, "teaches nothing"),
    ):
        with pytest.raises(ValueError, match=words):
            LossConfig(divergence=divergence_name, skew=skew)


def test_a_target_that_is_the_student_itself_throughout_is_refused():
    with pytest.raises(ValueError, match=r"got interpolation 0 throughout, .* teaches nothing; expected a ramp to 1"):
        LossConfig(interpolation=0.0)
    assert LossConfig(interpolation=Ramp(((0.0, 0.0), (1.0, 1.0))))


def test_one_token_without_a_rest_beside_it_is_refused():
    with pytest.raises(ValueError, match=r"got top_k 1 with tail renormalise, .* teaches nothing; expected top_k 2"):
        LossConfig(top_k=1, tail="renormalise")
    assert LossConfig(top_k=1) and LossConfig(top_k=1, tail="renormalise", correction="channel")


def test_unknown_divergence_is_refused_by_name():
    with pytest.raises(ValueError) as refusal:
        divergence(torch.zeros(1, 2), torch.zeros(1, 2), "kl", 0.1)
    assert str(refusal.value) == "got divergence 'kl', expected forward_kl, reverse_kl, jsd, skew_kl or generalised_jsd"


def test_a_setting_admits_the_names_of_the_table_and_no_other():
    assert get_args(DivergenceName) == tuple(DIVERGENCES)
    for kind in DIVERGENCES:
        assert LossConfig(divergence=kind).divergence == kind

    with pytest.raises(ValueError) as refusal:
        LossConfig(divergence="kl")
    names = "'forward_kl', 'reverse_kl', 'jsd', 'skew_kl' or 'generalised_jsd'"
    assert str(refusal.value) == f"LossConfig: divergence: got 'kl', expected {names}"


def test_tempering_is_the_power_of_the_probabilities():
    p = [0.7, 0.2, 0.1]
    probabilities = temper(torch.tensor(p, dtype=torch.float64).log(), 3.0).exp().tolist()
    assert probabilities == pytest.approx(tempered(p, 3.0))
