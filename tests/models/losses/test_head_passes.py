"""The compiled passes of the student's head: same losses and gradients as the plain ones.

Most tests run the passes uncompiled: it is their mathematics that differs from the reference. One compiles them.
"""

import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.losses import head_passes
from models.losses.losses import kd_loss
from tests.models.losses.test_fused_head import KD, LM, OPTIONS, TAILS, assert_same, case, fused, gradients, reference
from tests.models.tiny import KINDS

CPU = torch.device("cpu")


def as_it_is(function, for_any_shape=False):
    return function


@pytest.fixture
def uncompiled(monkeypatch):
    """The passes as PyTorch runs them."""
    monkeypatch.setattr(head_passes, "compiled", as_it_is)


def compare(problem, rel=2e-6, **options):
    """Losses and gradients of the passes, beside those of the plain losses."""
    states, head, *rest = problem
    chunk = options.pop("chunk", 4)
    expected = reference(states, head, *rest, **options)
    found = fused(states, head, *rest, chunk=chunk, compiled=True, **options)

    for one, other in zip(found[:3], expected, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-5)
    assert_same(gradients(found.loss, states, head), gradients(expected[0], states, head), rel)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_plain_losses(kind, tail, softcap, uncompiled):
    for temperature, scale, bias in ((1.0, 1.0, False), (2.0, 0.5, True)):
        options = {"kind": kind, "tail": tail, "temperature": temperature, "softcap": softcap, "scale": scale}
        compare(case(bias=bias), **options)


@pytest.mark.parametrize("interpolation", [0.0, 0.4, 1.0])
def test_a_target_on_the_way_to_the_teacher_is_that_of_the_plain_losses(interpolation, uncompiled):
    options = {"interpolation": interpolation, "temperature": 2.0, "kind": "generalised_jsd", "skew": 0.3}
    compare(case(), **options)

    # Step by step too.
    states, head, *rest = case()
    expected = reference(states, head, *rest, **options)
    found = fused(states, head, *rest, chunk=4, **options)
    assert_same(gradients(found.loss, states, head), gradients(expected[0], states, head))


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_of_a_row_multiplies_its_divergence_alone(kind, uncompiled):
    """Beside the sum of the rows' own divergences, one by one in float64."""
    states, head, labels, target, rows = case(dtype=torch.float64)
    weight = torch.rand(len(rows), dtype=torch.float64) * 4
    logits = head(states)[rows]
    expected = LM * torch.nn.functional.cross_entropy(head(states), labels, reduction="sum")
    for row in range(len(rows)):
        part = slice(row, row + 1)
        one = kd_loss(logits[part], target.rows(part), **{**OPTIONS, "kind": kind})
        expected = expected + KD * weight[row] * one

    weighted = replace(target, weight=weight)
    for compiled in (False, True):
        found = fused(states, head, labels, weighted, rows, chunk=4, compiled=compiled, kind=kind)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)
        differentiated = gradients(found.loss, states, head)
        assert_same(differentiated, gradients_of(expected, states, head), rel=1e-9)


def gradients_of(loss, states, head) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, (states, *head.parameters()), retain_graph=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tail", TAILS)
def test_gradient_is_that_of_finite_differences(tail, softcap, uncompiled):
    states, linear, *rest = case(3, 2, 5, 2, 2, bias=True, dtype=torch.float64)
    weight, bias = (p.detach().clone().requires_grad_() for p in linear.parameters())
    del linear.weight, linear.bias  # gradcheck hands over plain tensors, not Parameters

    def loss(x, weight, bias):
        linear.weight, linear.bias = weight, bias
        options = {"tail": tail, "softcap": softcap, "scale": 0.7, "chunk": 2, "compiled": True}
        return fused(x, linear, *rest, **options).loss

    assert torch.autograd.gradcheck(loss, (states, weight, bias))


@given(
    seed=st.integers(0, 10**6),
    vocabulary=st.integers(5, 40),
    spread=st.sampled_from([0.1, 1.0, 10.0, 40.0]),
    softcap=st.sampled_from([None, 30.0]),
)
def test_any_logits_agree_with_float64(seed, vocabulary, spread, softcap):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_passes, "compiled", as_it_is)
        problem = case(vocabulary=vocabulary, kept=4, seed=seed, spread=spread, dtype=torch.float64)
        compare(problem, rel=1e-9, softcap=softcap)


def test_a_target_that_names_every_token_leaves_no_rest(uncompiled):
    states, head, labels, target, rows = case(vocabulary=4, kept=4, rows=9)
    target.ids[:] = torch.arange(4)
    target.probs[:] = torch.rand(9, 4).softmax(1)
    target.tail[:] = 0
    target.valid[:] = True
    compare((states, head, labels, target, rows), tail="renormalise")

    found = fused(states, head, labels, target, rows, compiled=True)
    assert all(gradient.isfinite().all() for gradient in gradients(found.loss, states, head))


@pytest.mark.parametrize(("lm", "kd"), [(LM, 0.0), (0.0, KD), (0.0, 0.0), (torch.rand(9), KD)])
def test_a_weight_of_zero_leaves_the_other_term(lm, kd, uncompiled):
    states, head, labels, target, rows = case()
    eager = fused(states, head, labels, target, rows, lm=lm, kd=kd, chunk=4)
    expected = gradients(eager.loss, states, head)
    passes = fused(states, head, labels, target, rows, lm=lm, kd=kd, chunk=4, compiled=True)

    assert_same(gradients(passes.loss, states, head), expected)
    assert torch.allclose(passes.log_probs, eager.log_probs, atol=2e-6)


def test_without_a_target_it_is_the_next_token_loss(uncompiled):
    states, head, labels, _, _ = case()
    eager = fused(states, head, labels, None, None)
    expected = gradients(eager.loss, states, head)
    passes = fused(states, head, labels, None, None, compiled=True)
    assert_same(gradients(passes.loss, states, head), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_less_exact_than_step_by_step(dtype, uncompiled):
    """A label that the student is sure of: its gradient is a small difference, which must not be rounded twice."""
    states, head, labels, target, rows = case(n=64, rows=64, vocabulary=50, kept=8, dtype=torch.float64)
    with torch.no_grad():
        states += 3 * head.weight[labels]
    exact = gradients(reference(states, head, labels, target, rows)[0], states, head)

    errors = {}
    for compiled in (False, True):
        half_states = states.detach().to(dtype).requires_grad_()
        half_head = torch.nn.Linear(*reversed(head.weight.shape), bias=False, dtype=dtype)
        half_head.weight.data = head.weight.detach().to(dtype)
        small = [target.probs.float(), target.tail.float()]
        half_target = type(target)(target.ids, *small, target.valid)
        loss = fused(half_states, half_head, labels, half_target, rows, compiled=compiled, chunk=16).loss
        found = gradients(loss, half_states, half_head)
        errors[compiled] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    for passes, step_by_step in zip(errors[True], errors[False], strict=True):
        assert passes <= 1.2 * step_by_step


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, with which torch.compile compiles on a CPU")
def test_compiled_they_give_the_same():
    assert head_passes.try_passes(CPU) == ""
    problem = case(n=21, vocabulary=37, kept=5, rows=15, bias=True)
    for options in ({}, {"softcap": 5.0, "scale": 0.5}):
        compare(problem, chunk=8, **options)  # the last chunk is shorter


def test_old_gpus_and_other_devices_go_step_by_step_with_the_reason(monkeypatch):
    assert head_passes.choose("auto", CPU) == (False, head_passes.can_compile(CPU)[1])
    assert "step by step" in head_passes.choose("eager", CPU)[1]

    pascal = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    compiles, reason = head_passes.choose("auto", pascal)
    assert not compiles and "7.0" in reason and "6.0" in reason


def test_without_triton_no_compiler_is_loaded_for_a_gpu(monkeypatch):
    def compile_anyway(function):
        raise AssertionError("loads a compiler that cannot compile")

    monkeypatch.setattr(head_passes, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "compile", compile_anyway)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    device = torch.device("cuda:7")
    assert head_passes.choose("auto", device) == (False, head_passes.can_compile(device)[1])
    assert "Triton is not installed" in head_passes.can_compile(device)[1]
    head_passes.try_passes.cache_clear()


def test_a_compiler_that_fails_is_told_and_the_reference_serves(monkeypatch):
    def broken(function):
        raise RuntimeError("no C compiler\nlong trace")

    head_passes.try_passes.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    error = head_passes.try_passes(CPU)
    head_passes.try_passes.cache_clear()
    assert error == "RuntimeError: no C compiler"

    monkeypatch.setattr(head_passes, "try_passes", lambda device: error)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    compiles, reason = head_passes.choose("auto", torch.device("cuda:0"))
    assert not compiles and error in reason
    with pytest.raises(ValueError, match="expected auto or eager"):
        head_passes.choose("compiled", torch.device("cuda:0"))


def test_a_compiler_that_fails_in_mid_run_leaves_the_function_itself(monkeypatch):
    def fail(*arguments, **options):
        raise torch._dynamo.exc.TorchDynamoException("no kernel image")

    def double(numbers):
        return 2 * numbers

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: fail)
    call = head_passes.compiled(double)
    with pytest.warns(UserWarning, match="double goes on without it.*no kernel image"):
        assert call(torch.ones(2)).tolist() == [2, 2]

    # Said once; torch.compile is not asked again.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(torch.ones(2)).tolist() == [2, 2]
