"""Heads in half precision: float32 sums where the device has such products, and no tensor of all logits besides."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from models import language_model
from models.language_model import HALF_BLOCK, head_logits, linear_into
from models.losses import head_products
from models.losses.fused_head import HeadComputation, head_losses
from tests.models.tiny import byte_bpe, pair_of, tiny_llama

HALF = (torch.float16, torch.bfloat16)
FLOAT_PRODUCTS = torch.mm


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Products of half-precision matrices into float32, as torch has them on CUDA."""

    def product(a, b, *, out_dtype=None, out=None):
        if out_dtype is None:
            return FLOAT_PRODUCTS(a, b) if out is None else FLOAT_PRODUCTS(a, b, out=out)
        assert a.dtype in HALF and out_dtype == torch.float32
        result = FLOAT_PRODUCTS(a.float(), b.float())
        return result if out is None else out.copy_(result)

    def added_product(total, a, b, *, out_dtype, out):
        return out.copy_(total + product(a, b, out_dtype=out_dtype))

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(torch, "addmm", added_product)
    for module in (language_model, head_products):
        monkeypatch.setattr(module, "has_float32_products", lambda x: True)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made meanwhile, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements[result.dtype] = max(self.elements.get(result.dtype, 0), result.numel())
        return result


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("biased", [False, True])
def test_the_logits_of_a_half_precision_head_are_those_of_float32_products(as_on_cuda, dtype, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(300, 64).to(dtype)
    bias = torch.randn(300).to(dtype) if biased else None
    exact = x.double() @ weight.double().t() + (bias.double() if biased else 0)
    logits = linear_into(torch.empty(5, 300), x, weight, bias)
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_elsewhere_they_are_rounded_a_block_at_a_time(monkeypatch, dtype):
    """Without a copy of all logits in half precision."""
    torch.manual_seed(0)
    monkeypatch.setattr(language_model, "HALF_BLOCK", 100)
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(310, 64).to(dtype)
    out = torch.empty(5, 310)
    with Largest() as largest:
        linear_into(out, x, weight, None)
    assert largest.elements[dtype] <= max(weight[:100].numel(), x.numel())
    torch.testing.assert_close(out, (x @ weight.t()).float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [{}, {"logit_scale": 0.5}, {"final_logit_softcapping": 2.0}])
def test_logits_written_into_memory_that_is_there_are_scaled_and_capped_alike(options):
    model = tiny_llama(300)
    for name, value in options.items():
        setattr(model.config, name, value)
    states = torch.randn(4, model.config.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(head_logits(model, states, out=torch.empty(4, 300)), head_logits(model, states))


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_precision_teacher_says_what_its_weights_say_in_float32(as_on_cuda, dtype):
    """But for what its body rounds: here none, as it hands its embedding on."""
    pair = pair_of(byte_bpe(300), byte_bpe(400), teacher=tiny_llama(400, 2, num_hidden_layers=1).to(dtype))
    teacher, batch = pair.frozen(), pair.batch()
    states = teacher.states(batch.teacher_ids, ())[0]
    signal = teacher.signal(batch, 8)

    head = pair.teacher.get_output_embeddings().weight
    exact = (states.flatten(0, 1).double() @ head.double().t()).log_softmax(1)
    following = batch.teacher_ids.flatten().roll(-1)
    expected = exact.gather(1, following[:, None])[:, 0][batch.teacher_held[batch.asked]]
    torch.testing.assert_close(signal.realised[batch.asked].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_no_half_precision_copy_of_a_chunks_logits_is_made(as_on_cuda, dtype):
    """Neither of the logits nor of their gradient: a block of tokens at a time."""
    torch.manual_seed(0)
    rows, vocabulary = 64, 3 * HALF_BLOCK
    head = nn.Linear(8, vocabulary, bias=False).to(dtype)
    states = torch.randn(rows, 8, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    with Largest() as largest:
        computation = HeadComputation(chunk=rows)
        head_losses(states, head, labels, lm_weight=1.0 / rows, computation=computation).loss.backward()
    assert largest.elements[torch.float32] >= rows * vocabulary
    assert largest.elements[dtype] <= max(rows * HALF_BLOCK, head.weight.numel())
    assert states.grad.isfinite().all() and head.weight.grad.isfinite().all()
