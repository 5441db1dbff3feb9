"""The head's losses in chunks against `models.losses` on all logits at once."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import language_model
from models.losses.chunk_size import chunk_rows
from models.losses.fused_head import HeadComputation, HeadTarget, head_losses
from models.losses.losses import kd_loss, next_token_loss
from models.types import SparseTarget
from tests.models.tiny import KINDS

TAILS = ("bucket", "renormalise")
OPTIONS = {"temperature": 2.0, "kind": "forward_kl", "tail": "bucket", "skew": 0.1}
LM, KD = 0.3 / 9, 0.7 / 7


def case(n=9, width=6, vocabulary=13, kept=4, rows=7, *, bias=False, seed=0, dtype=torch.float32, spread=1.0):
    """(states, head, labels, target, rows): KD rows are some of the positions; one is invalid, later ones padded."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(n, width, generator=g, dtype=dtype).requires_grad_()
    head = nn.Linear(width, vocabulary, bias=bias, dtype=dtype)
    for p in head.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype) * spread
    labels = torch.randint(vocabulary, (n,), generator=g)
    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:kept] for _ in range(rows)])
    probs = torch.rand(rows, kept + 1, generator=g, dtype=torch.float64).softmax(1)[:, :kept]
    padded = torch.arange(kept) >= kept - torch.arange(rows)[:, None] % kept
    ids, probs = ids.masked_fill(padded, -1), probs.masked_fill(padded, 0)
    target = SparseTarget(ids, probs.to(dtype), (1 - probs.sum(1)).to(dtype), torch.ones(rows, dtype=torch.bool))
    if rows > 2:
        target.valid[1], target.ids[1], target.probs[1], target.tail[1] = False, -1, 0, 1
    return states, head, labels, target, torch.randperm(n, generator=g)[:rows].sort().values


def all_logits(states, head, scale=1.0, softcap=None):
    logits = head(states) * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def reference(states, head, labels, target, rows, *, lm=LM, kd=KD, scale=1.0, softcap=None, **options):
    """(loss, LM sum, KD sum) of the plain losses."""
    logits = all_logits(states, head, scale, softcap)
    sums = next_token_loss(logits, labels), kd_loss(logits[rows], target, **(OPTIONS | options))
    return lm * sums[0] + kd * sums[1], *sums


def fused(states, head, labels, target, rows, *, lm=LM, kd=KD, scale=1.0, softcap=None, **options):
    """`head_losses`; besides `chunk` and `compiled`, the options are those of KD."""
    choices = {name: options.pop(name) for name in ("chunk", "compiled") if name in options}
    return head_losses(
        states,
        head,
        labels,
        lm_weight=lm,
        kd_weight=kd,
        target=None if target is None else HeadTarget(target, rows, **(OPTIONS | options)),
        computation=HeadComputation(scale=scale, softcap=softcap, **choices),
    )


def gradients(loss, states, head):
    for t in (states, *head.parameters()):
        t.grad = None
    loss.backward()
    return [t.grad.clone() for t in (states, *head.parameters()) if t.grad is not None]


def assert_same(found, expected, rel=2e-6):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= rel * other.norm() + 1e-9


class Adapted(nn.Module):
    """A head with a low-rank addition, as LoRA wraps it: `weight` is only a part of what it computes."""

    def __init__(self, base: nn.Linear, freeze: bool = True) -> None:
        super().__init__()
        self.base = base.requires_grad_(not freeze)
        self.a, self.b = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + nn.functional.linear(nn.functional.linear(x, self.a), self.b)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_that_of_finite_differences(kind, tail, temperature, softcap):
    states, linear, *args = case(3, 2, 5, 2, 2, bias=True, dtype=torch.float64)
    weight, bias = (p.detach().clone().requires_grad_() for p in linear.parameters())
    del linear.weight, linear.bias  # gradcheck hands over plain tensors, not Parameters
    options = {"kind": kind, "tail": tail, "temperature": temperature, "softcap": softcap, "scale": 0.7}

    def loss(x, weight, bias):
        linear.weight, linear.bias = weight, bias
        return fused(x, linear, *args, chunk=2, **options).loss

    assert torch.autograd.gradcheck(loss, (states, weight, bias))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_plain_losses(kind, tail, temperature):
    for chunk, softcap, scale in ((1, None, 1.0), (4, 5.0, 0.5), (9, None, 1.3), (100, 5.0, 1.0)):
        states, head, labels, target, rows = case(bias=chunk > 4)
        options = {"kind": kind, "tail": tail, "temperature": temperature, "softcap": softcap, "scale": scale}
        expected = reference(states, head, labels, target, rows, **options)
        found = fused(states, head, labels, target, rows, chunk=chunk, **options)
        for one, other in zip(found[:3], expected, strict=True):
            assert one.dtype == torch.float32
            # logarithms of order 1 are subtracted in float32, and what is left is multiplied by T squared
            assert one.item() == pytest.approx(other.item(), rel=5e-6, abs=1e-6 * temperature**2)
        logits = all_logits(states, head, scale, softcap)
        assert torch.allclose(found.log_probs, logits.log_softmax(1).gather(1, labels[:, None])[:, 0], atol=2e-6)
        assert_same(gradients(found.loss, states, head), gradients(expected[0], states, head))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("lm", "kd"), [(LM, 0.0), (0.0, KD), (torch.tensor(LM), torch.tensor(0.0)), (0.0, 0.0)])
def test_a_weight_of_zero_leaves_the_other_term(lm, kd, adapted):
    states, head, labels, target, rows = case()
    head = Adapted(head, freeze=False) if adapted else head
    expected = reference(states, head, labels, target, rows, lm=lm, kd=kd)
    found = fused(states, head, labels, target, rows, lm=lm, kd=kd, chunk=4)
    assert found.kd_sum.item() == pytest.approx(expected[2].item(), rel=2e-6)  # a value is asked for all the same
    assert found.lm_sum.item() == pytest.approx(expected[1].item(), rel=2e-6)
    assert_same(gradients(found.loss, states, head), gradients(expected[0], states, head))


def test_a_kd_weight_of_zero_asks_for_no_gradient_of_kd(monkeypatch):
    asked = []

    def spy(logits, target, **options):
        asked.append(logits.requires_grad)
        return kd_loss(logits, target, **options)

    monkeypatch.setattr("models.losses.fused_head.kd_loss", spy)
    states, head, labels, target, rows = case()
    fused(states, head, labels, target, rows, kd=0.0, chunk=9)
    fused(states, head, labels, target, rows, chunk=9)
    head_losses(states, head, labels, lm_weight=LM)
    assert asked == [False, True]


def test_without_a_target_there_is_only_lm_and_rows_default_to_the_positions():
    states, head, labels, target, _ = case(7)
    found = head_losses(states, head, labels, lm_weight=LM, computation=HeadComputation(chunk=4))
    assert found.kd_sum is None
    assert_same(
        gradients(found.loss, states, head), gradients(LM * next_token_loss(head(states), labels), states, head)
    )
    args = states, head, labels, target
    assert_same(
        gradients(fused(*args, None, chunk=4).loss, states, head),
        gradients(reference(*args, torch.arange(7))[0], states, head),
    )


def test_a_target_without_rows_and_no_positions_at_all_are_differentiable_zeros():
    for n in (0, 5):
        states, head, labels, target, _ = case(n, rows=1, seed=1)
        none = SparseTarget(target.ids[:0], target.probs[:0], target.tail[:0], target.valid[:0])
        found = fused(states, head, labels, none, torch.zeros(0, dtype=torch.long))
        assert found.kd_sum.item() == 0
        expected = LM * next_token_loss(head(states), labels)
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert_same(gradients(found.loss, states, head), gradients(expected, states, head))


def test_each_position_may_have_its_own_weight():
    states, head, labels, _, _ = case()
    weights = torch.linspace(-1, 2, 9)
    found = head_losses(states, head, labels, lm_weight=weights, computation=HeadComputation(chunk=4))
    expected = (nn.functional.cross_entropy(head(states), labels, reduction="none") * weights).sum()
    assert found.loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert_same(gradients(found.loss, states, head), gradients(expected, states, head))


@pytest.mark.parametrize("adapted", [False, True])
def test_backward_may_be_repeated_and_scaled(adapted):
    states, head, labels, target, rows = case(bias=True)
    head = Adapted(head, freeze=False) if adapted else head
    once = gradients(reference(states, head, labels, target, rows)[0], states, head)
    loss = fused(states, head, labels, target, rows, chunk=4).loss
    tensors = (states, *head.parameters())
    # zero first: what it scaled must not be what the next one scales
    for scale in (0.0, 65536.0, -3.0):
        found = torch.autograd.grad(loss * scale, tensors, retain_graph=True)
        assert_same(found, [g * scale for g in once])
    first = gradients(loss, states, head)
    assert_same(first, once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_accumulate_over_losses_without_sharing_memory():
    states, head, labels, target, rows = case()
    once = gradients(reference(states, head, labels, target, rows)[0], states, head)
    loss = fused(states, head, labels, target, rows).loss
    gradients(loss * 1, states, head)  # sets .grad
    for t in (states, head.weight):
        t.grad = None
    loss = fused(states, head, labels, target, rows).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert_same([states.grad, head.weight.grad], [2 * g for g in once])


def test_the_embedding_of_a_tied_head_gets_both_gradients():
    _, head, labels, target, rows = case()
    ids = torch.arange(9)
    found = []
    for compute in (fused, reference):
        embedding = nn.Embedding.from_pretrained(head.weight.detach().clone(), freeze=False)
        tied = nn.Linear(6, 13, bias=False)
        tied.weight = embedding.weight
        compute(embedding(ids).tanh(), tied, labels, target, rows)[0].backward()
        found.append(embedding.weight.grad)
    assert_same(found[:1], found[1:])


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_frozen_gets_no_gradient(adapted):
    states, head, labels, target, rows = case(bias=True)
    head.requires_grad_(False)
    head = Adapted(head) if adapted else head
    found = gradients(fused(states, head, labels, target, rows, chunk=4).loss, states, head)
    assert len(found) == (3 if adapted else 1)
    assert_same(found, gradients(reference(states, head, labels, target, rows)[0], states, head))


def test_states_without_gradient_leave_the_heads():
    states, head, labels, target, rows = case(bias=True)
    states = states.detach()
    for one in (head, Adapted(copy.deepcopy(head), freeze=False)):
        found = gradients(fused(states, one, labels, target, rows, chunk=4).loss, states, one)
        assert_same(found, gradients(reference(states, one, labels, target, rows)[0], states, one))


def test_a_hooked_head_is_called():
    states, head, labels, target, rows = case()
    expected = reference(states, head, labels, target, rows, scale=2.0)[0].item()
    head.register_forward_hook(lambda module, args, out: out * 2)
    assert fused(states, head, labels, target, rows).loss.item() == pytest.approx(expected, rel=2e-6)


def test_without_grad_only_values_are_computed():
    states, head, labels, target, rows = case()
    expected = reference(states, head, labels, target, rows)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Largest(head.weight.shape) as seen:
            found = fused(states, head, labels, target, rows, chunk=4)
        assert not found.loss.requires_grad
        assert not seen.of_shape
        for one, other in zip(found[:3], expected, strict=True):
            assert one.item() == pytest.approx(other.item(), rel=2e-6)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is allocated, but those of one shape, which are counted."""

    def __init__(self, shape) -> None:
        super().__init__()
        self.shape, self.most, self.of_shape = shape, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in old:
                self.of_shape += t.shape == self.shape
                self.most = max(self.most, 0 if t.shape == self.shape else t.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_chunk_and_not_with_the_positions(dtype):
    states, head, labels, target, rows = case(64, 6, 101, rows=50)
    with Largest(head.weight.shape) as seen, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        fused(states, head, labels, target, rows, chunk=5).loss.backward()
    assert seen.most == 5 * 101
    with Largest(head.weight.shape) as plain:
        reference(states, head, labels, target, rows)[0].backward()
    assert plain.most == 64 * 101  # the instrument sees what it is for


def test_the_weights_gradient_is_handed_over_and_not_copied():
    """A second [V, H] would be more than all the chunks."""
    states, head, labels, target, rows = case()
    loss = fused(states, head, labels, target, rows).loss
    held = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert head.weight.grad.data_ptr() == held


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_gradients_under_autocast_and_a_loss_scale_are_those_of_float32(dtype, tolerance, adapted):
    """Counts of a whole optimizer step: gradient / count itself is far below float16's smallest number."""
    counts = {"lm": 0.3 / 1e6, "kd": 0.7 / 1e6}
    states, head, labels, target, rows = case(96, 32, 500, 16, 80, bias=True, spread=0.2)
    head = Adapted(head, freeze=False) if adapted else head
    if adapted:
        for p in (head.a, head.b):
            p.data *= 0.2
    expected = gradients(reference(states, head, labels, target, rows, **counts)[0], states, head)
    with torch.autocast("cpu", dtype):
        found = fused(states, head, labels, target, rows, chunk=40, **counts)
    assert found.lm_sum.dtype == found.kd_sum.dtype == found.loss.dtype == torch.float32
    scaled = gradients(found.loss * 65536, states, head)
    assert_same([g / 65536 for g in scaled], expected, rel=tolerance)


def test_a_half_precision_head_keeps_its_dtype():
    states, head, labels, target, rows = case(spread=0.5)
    expected = gradients(reference(states, head, labels, target, rows)[0], states, head)
    states = states.detach().bfloat16().requires_grad_()
    found = gradients(fused(states, head.bfloat16(), labels, target, rows).loss, states, head)
    assert {g.dtype for g in found} == {torch.bfloat16}
    assert_same([g.float() for g in found], expected, rel=0.02)


def test_151936_equal_logits_in_float16():
    """Their log-sum-exp overflows in float16, and their probability is hardly a normal number of it."""
    vocabulary = 151_936
    head = nn.Linear(2, vocabulary, bias=False)
    head.weight.data.fill_(0.5)
    states = torch.full((2, 2), 8.0, requires_grad=True)
    ids = torch.arange(3).repeat(2, 1)
    even = SparseTarget(ids, torch.full((2, 3), 1 / 3), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    with torch.autocast("cpu", torch.float16):
        found = fused(states, head, torch.tensor([7, 8]), even, None, lm=1.0, kd=0.0)
    assert found.log_probs.tolist() == pytest.approx([-torch.tensor(vocabulary).log().item()] * 2, rel=1e-6)
    _, weight = gradients(found.loss * 65536, states, head)
    assert weight[100:].mean().item() == pytest.approx(65536 * 16 / vocabulary, rel=1e-3)
    assert weight[7].tolist() == pytest.approx([65536 * (-8 + 16 / vocabulary)] * 2, rel=1e-3)


@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_equal_to_the_teacher_has_kd_zero_and_no_gradient(kind, tail, spread):
    states, head, labels, _, _ = case(spread=spread)
    log_probs = head(states).detach().double().log_softmax(1)
    for kept, temperature in itertools.product((1, 4, 13), (1.0, 4.0)):
        top, ids = log_probs.topk(kept)
        rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(1).exp()
        target = SparseTarget(ids, top.exp().float(), rest.float(), torch.ones(9, dtype=torch.bool))
        options = {"kind": kind, "tail": tail, "temperature": temperature, "chunk": 4}
        found = fused(states, head, labels, target, None, lm=0.0, kd=1.0, **options)
        assert abs(found.kd_sum.item()) / 9 <= 2e-6
        grads = gradients(found.loss, states, head)
        assert max(g.abs().max() for g in grads) <= 2e-5 * spread


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_give_the_plain_value_and_finite_gradients(kind, tail, softcap):
    """From a rest of the vocabulary that is tiny to one that float32 does not know."""
    for spread in (0.0, 10.0, 30.0, 100.0, 1e4):
        states, head, labels, target, rows = case(40, rows=37, spread=spread)
        options = {"kind": kind, "tail": tail, "temperature": 4.0, "softcap": softcap}
        expected = reference(states, head, labels, target, rows, **options)
        found = fused(states, head, labels, target, rows, chunk=16, **options)
        assert found.loss.item() == pytest.approx(expected[0].item(), rel=2e-5)
        assert all(g.isfinite().all() for g in gradients(found.loss, states, head))


def test_a_student_certain_of_too_little_is_still_pulled_back():
    """All of the student's mass on the kept token, half of the teacher's beyond it: KL's gradient there is q - p."""
    states, head = torch.ones(1, 1), nn.Linear(1, 4, bias=False)
    head.weight.data = torch.tensor([[80.0], [0.0], [0.0], [0.0]])
    target = SparseTarget(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]), torch.tensor([True]))
    found = fused(states, head, torch.tensor([0]), target, None, lm=0.0, kd=1.0, temperature=1.0)
    _, weight = [states, *gradients(found.loss, states, head)]
    assert weight[:, 0].tolist() == pytest.approx([0.5, -0.5 / 3, -0.5 / 3, -0.5 / 3], rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    width=st.integers(1, 5),
    vocabulary=st.integers(2, 20),
    data=st.data(),
    chunk=st.integers(1, 13),
    tail=st.sampled_from(TAILS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 99),
)
def test_any_shape_gives_the_plain_losses(n, width, vocabulary, data, chunk, tail, kind, seed):
    kept, rows = data.draw(st.integers(1, vocabulary)), data.draw(st.integers(1, n))
    args = case(n, width, vocabulary, kept, rows, seed=seed, dtype=torch.float64)
    found = fused(*args, chunk=chunk, tail=tail, kind=kind)
    expected = reference(*args, tail=tail, kind=kind)
    for one, other in zip(found[:3], expected, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-9, abs=1e-12)
    for one, other in zip(gradients(found.loss, *args[:2]), gradients(expected[0], *args[:2]), strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_is_read_back_from_the_device(adapted):
    """A tensor without data raises where its value, or a shape that depends on it, is asked for."""
    states, _, labels, target, rows = case()
    with FakeTensorMode() as mode:
        head = nn.Linear(6, 13)
        head = Adapted(head) if adapted else head
        fake = mode.from_tensor
        target = SparseTarget(fake(target.ids), fake(target.probs), fake(target.tail), fake(target.valid))
        found = fused(fake(states), head, fake(labels), target, fake(rows), chunk=4, softcap=3.0)
        (found.loss * fake(torch.tensor(65536.0))).backward()
        assert {p.grad.shape for p in head.parameters() if p.requires_grad}
        with pytest.raises(DataDependentOutputException):
            found.loss.item()


@pytest.mark.parametrize("bias", [False, True])
def test_tokens_computed_at_once_change_nothing(monkeypatch, bias):
    monkeypatch.setattr(language_model, "CPU_BLOCK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    states, head, labels, target, rows = case(vocabulary=50, bias=bias)
    expected = reference(states, head, labels, target, rows)
    found = fused(states, head, labels, target, rows, chunk=4)
    assert found.loss.item() == pytest.approx(expected[0].item(), rel=1e-6)
    assert_same(gradients(found.loss, states, head), gradients(expected[0], states, head))


def test_rows_of_a_chunk_follow_the_budget_and_are_explained():
    cpu = torch.device("cpu")
    small, why = chunk_rows(1_000, cpu)
    large, _ = chunk_rows(1_000_000, cpu)
    assert large < small
    assert chunk_rows(151_936, cpu, 12)[0] <= chunk_rows(151_936, cpu, 4)[0]
    assert chunk_rows(10**12, cpu)[0] >= 1
    assert small < chunk_rows(1_000, cpu, is_half=True)[0]
    assert chunk_rows(1_000_000, cpu, is_half=True)[0] == large
    assert f"{small} rows" in why
    assert "MB" in why


def test_shapes_that_do_not_fit_are_refused():
    states, head, labels, target, rows = case()
    with pytest.raises(ValueError, match="labels"):
        fused(states, head, labels[1:], target, rows)
    with pytest.raises(ValueError, match="pass rows"):
        fused(states, head, labels, target, None)
    with pytest.raises(ValueError, match="chunk 0"):
        fused(states, head, labels, target, rows, chunk=0)


def test_a_head_with_a_forward_of_its_own_is_called():
    torch.manual_seed(0)
    head, states, labels = torch.nn.Linear(8, 20), torch.randn(5, 8), torch.arange(5)
    plain = head.forward
    head.forward = lambda x: 2 * plain(x)
    expected = torch.nn.functional.cross_entropy(head(states), labels, reduction="sum")
    torch.testing.assert_close(head_losses(states, head, labels, lm_weight=1.0).lm_sum, expected.detach())
