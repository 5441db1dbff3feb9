"""Each loss against the plainest float64 arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.losses.losses import kd_loss, next_token_loss, span_loss, span_sums
from models.types import SparseTarget
from tests.models.test_divergences import reference_divergence, tempered
from tests.models.tiny import KINDS

TAILS = ("bucket", "renormalise")
TEMPERATURES = (1.0, 2.0, 4.0)


def reference_kd(logits, target: dict[int, float], tail: str, temperature: float, kind: str, skew: float) -> float:
    """KD of one row from a list of logits and a dictionary of target masses."""
    total = sum(math.exp(x) for x in logits)
    q = {token: math.exp(x) / total for token, x in enumerate(logits)}
    p, mine = list(target.values()), [q[token] for token in target]
    if tail == "bucket":
        p, mine = [*p, 1 - sum(p)], [*mine, sum(v for token, v in q.items() if token not in target)]
    else:
        p, mine = [x / sum(p) for x in p], [x / sum(mine) for x in mine]
    return temperature**2 * reference_divergence(tempered(p, temperature), tempered(mine, temperature), kind, skew)


def random_target(rows: int, vocabulary: int, kept: int, seed: int, dtype=torch.float32) -> SparseTarget:
    """Masses on distinct tokens; later rows keep fewer tokens and the rest is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:kept].sort().values for _ in range(rows)])
    probs = torch.rand(rows, kept + 1, generator=generator, dtype=torch.float64).softmax(1)
    fewer = torch.arange(kept) >= kept - torch.arange(rows)[:, None] % kept
    ids, kept_probs = ids.masked_fill(fewer, -1), probs[:, :-1].masked_fill(fewer, 0)
    valid = torch.ones(rows, dtype=torch.bool)
    return SparseTarget(ids, kept_probs.to(dtype), (1 - kept_probs.sum(1)).to(dtype), valid)


def as_dictionaries(target: SparseTarget) -> list[dict[int, float]]:
    return [
        {int(i): float(p) for i, p in zip(*row, strict=True) if i >= 0}
        for row in zip(target.ids, target.probs.double(), strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kd_equals_its_definition_in_float64(kind, tail, temperature):
    logits = torch.randn(6, 11, generator=torch.Generator().manual_seed(0)) * 3
    target = random_target(6, 11, 4, seed=1)
    expected = sum(
        reference_kd(row.tolist(), masses, tail, temperature, kind, 0.1)
        for row, masses in zip(logits.double(), as_dictionaries(target), strict=True)
    )
    loss = kd_loss(logits, target, temperature=temperature, kind=kind, tail=tail, skew=0.1)
    assert loss.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_of_kd_is_that_of_finite_differences(kind, tail, temperature):
    logits = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    target = random_target(4, 7, 3, seed=2, dtype=torch.float64)

    def loss(x):
        return kd_loss(x, target, temperature=temperature, kind=kind, tail=tail, skew=0.2)

    assert torch.autograd.gradcheck(loss, (logits,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kept", [1, 3, 11])
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_equal_distributions_have_kd_zero_and_no_gradient(kind, tail, temperature, kept, spread):
    """With the whole vocabulary kept as well, and with rests from large to far below what float32 adds to 1."""
    logits = (torch.randn(8, 11, generator=torch.Generator().manual_seed(4)) * spread).requires_grad_()
    log_probs = logits.detach().double().log_softmax(1)
    top, ids = log_probs.topk(kept)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(1)
    ids, order = ids.sort(1)
    target = SparseTarget(ids, top.gather(1, order).exp().float(), rest.exp().float(), torch.ones(8, dtype=torch.bool))
    loss = kd_loss(logits, target, temperature=temperature, kind=kind, tail=tail, skew=0.1)
    loss.backward()
    assert abs(loss.item()) / 8 <= 1e-6
    assert logits.grad.abs().max() <= 2e-6


def on_the_way(p: list[float], q: list[float], share: float) -> list[float]:
    """Normalised p ** share q ** (1 - share)."""
    products = [x**share * y ** (1 - share) for x, y in zip(p, q, strict=True)]
    return [x / sum(products) for x in products]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interpolated_target_is_its_definition_in_float64(kind, share):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 5, dtype=torch.float64, generator=generator) * 3).requires_grad_()
    target = random_target(6, 5, 3, seed=1, dtype=torch.float64)
    options = {"temperature": 2.0, "kind": kind, "tail": "bucket", "skew": 0.1}
    loss = kd_loss(logits, target, **options, interpolation=share)

    expected = 0.0
    targets = []
    for row, masses in zip(logits.detach(), as_dictionaries(target), strict=True):
        q = row.softmax(0).tolist()
        p = tempered([*masses.values(), 1 - sum(masses.values())], 2.0)
        mine = tempered([*(q[token] for token in masses), 1 - sum(q[token] for token in masses)], 2.0)
        targets.append(on_the_way(p, mine, share))
        expected += 4 * reference_divergence(targets[-1], mine, kind, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)

    # The target is a constant: its gradient is that of a teacher who says just this.
    [gradient] = torch.autograd.grad(loss, logits)
    padded = target.probs.clone()
    for row, masses in enumerate(targets):
        # Tempered back, as kd_loss tempers what a teacher says.
        said = tempered(masses, 0.5)
        padded[row, target.ids[row] >= 0] = torch.tensor(said[:-1], dtype=torch.float64)
    fixed = SparseTarget(target.ids, padded, 1 - padded.sum(1), target.valid)
    [reference] = torch.autograd.grad(kd_loss(logits, fixed, **options), logits)
    assert torch.allclose(gradient, reference, atol=1e-10)
    if share == 0:
        assert abs(loss.item()) < 1e-12 and gradient.abs().max() < 1e-12


def test_temperature_squared_is_in_the_gradient():
    """At a high temperature T, T^2 KL tends to a finite limit: without the square the gradient would fall by 1/T^2."""
    target = random_target(5, 9, 4, seed=5, dtype=torch.float64)
    norms = []
    for temperature in (50.0, 100.0):
        logits = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).requires_grad_()
        kd_loss(logits, target, temperature=temperature, kind="forward_kl", tail="bucket", skew=0.1).backward()
        norms.append(logits.grad.norm().item())
    assert norms[1] / norms[0] == pytest.approx(1, abs=0.05)


def test_invalid_rows_add_nothing_to_loss_and_gradient():
    target = random_target(4, 7, 3, seed=8)
    target.valid[1] = False
    target.ids[1], target.probs[1], target.tail[1] = -1, 0, 1
    logits = torch.randn(4, 7, requires_grad=True)
    options = {"temperature": 2.0, "kind": "reverse_kl", "tail": "bucket", "skew": 0.1}
    loss = kd_loss(logits, target, **options)
    loss.backward()
    rest = [0, 2, 3]
    kept = SparseTarget(target.ids[rest], target.probs[rest], target.tail[rest], target.valid[rest])
    assert loss.item() == pytest.approx(kd_loss(logits[rest], kept, **options).item(), rel=1e-6)
    assert logits.grad[1].abs().max() == 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
@given(
    scale=st.sampled_from([0.0, 1.0, 30.0, 300.0, 1e4]), kept=st.integers(1, 9), temperature=st.sampled_from([0.5, 8])
)
def test_loss_and_gradient_are_finite_for_any_logits(kind, tail, scale, kept, temperature):
    logits = (torch.randn(6, 9, generator=torch.Generator().manual_seed(9)) * scale).requires_grad_()
    target = random_target(6, 9, kept, seed=10)
    loss = kd_loss(logits, target, temperature=temperature, kind=kind, tail=tail, skew=0.1)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_a_student_certain_of_too_little_is_still_pulled_back():
    """All of the student's mass on the kept token, half of the teacher's beyond it: KL's gradient there is q - p."""
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]], requires_grad=True)
    target = SparseTarget(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]), torch.tensor([True]))
    kd_loss(logits, target, temperature=1.0, kind="forward_kl", tail="bucket", skew=0.1).backward()
    assert logits.grad[0, 0].item() == pytest.approx(0.5, abs=1e-3)


def test_next_token_loss_is_the_sum_of_negative_log_likelihoods():
    logits, labels = torch.randn(5, 7), torch.tensor([0, 3, 6, 2, 2])
    rows = zip(logits.double().tolist(), labels.tolist(), strict=True)
    expected = sum(math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in rows)
    assert next_token_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)


def reference_span(student: float, teacher: float, temperature: float, kind: str) -> float:
    """Divergence of (this text, any other text), with the opposite by expm1 in float64."""
    p, q = ([math.exp(x), -math.expm1(x)] for x in (teacher, student))
    return temperature**2 * reference_divergence(tempered(p, temperature), tempered(q, temperature), kind, 0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("student", [-1e-4, -0.01, -0.5, -math.log(2), -3.0, -30.0, -80.0])
@pytest.mark.parametrize("teacher", [-1e-4, -0.6, -0.7, -12.0])
def test_span_loss_equals_its_definition_also_near_0_and_1(kind, temperature, student, teacher):
    sums = torch.tensor([[student], [teacher]])
    found = span_loss(sums[0], sums[1], temperature=temperature, kind=kind, skew=0.1).item()
    expected = reference_span(float(sums[0]), float(sums[1]), temperature, kind)
    assert found == pytest.approx(expected, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_span_loss_of_equal_likelihoods_is_zero_without_gradient(kind, temperature):
    teacher = torch.tensor([0.0, -1e-9, -1e-6, -1e-3, -0.6931, -0.6932, -5.0, -60.0, -500.0])
    student = teacher.clone().requires_grad_()
    loss = span_loss(student, teacher, temperature=temperature, kind=kind, skew=0.1)
    loss.backward()
    assert abs(loss.item()) / len(teacher) <= 1e-6
    # as it reaches a logit: d log p / d logit is 1 - p
    assert (student.grad * -torch.expm1(teacher)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@given(
    student=st.lists(st.floats(-2000, 0, width=32), min_size=5, max_size=5),
    teacher=st.lists(st.floats(-2000, 0, width=32), min_size=5, max_size=5),
    temperature=st.sampled_from([1.0, 3.0, 100.0]),
)
def test_span_loss_and_gradient_are_finite_for_any_likelihood(kind, student, teacher, temperature):
    values = torch.tensor(student, requires_grad=True)
    loss = span_loss(values, torch.tensor(teacher), temperature=temperature, kind=kind, skew=0.1)
    loss.backward()
    assert loss.isfinite()
    assert values.grad.isfinite().all()


def test_gradient_of_the_span_loss_is_that_of_finite_differences():
    student = torch.tensor([-1e-2, -0.5, -0.9, -4.0, -20.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.3, -1e-3, -2.0, -0.1, -3.0], dtype=torch.float64)
    for kind in KINDS:

        def loss(x, kind=kind):
            return span_loss(x, teacher, temperature=2.0, kind=kind, skew=0.1)

        assert torch.autograd.gradcheck(loss, (student,))


def test_sums_over_spans_leave_out_tokens_of_no_span():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert span_sums(values, torch.tensor([0, 0, -1, 2, 2]), 3).tolist() == [3.0, 0.0, 24.0]
