"""The compiled passes of the student's head on a real GPU, beside float64; no pretended one runs Triton."""

import copy
import os

import pytest
import torch

from models.losses import head_passes
from models.types import SparseTarget
from tests.models.losses.test_fused_head import case, fused, gradients, reference
from tests.models.tiny import KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("GPU_TESTS") != "1", reason="Triton needs a real GPU: GPU_TESTS=1"),
]

PRECISIONS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Dtype of the products -> relative error of a gradient that its rounding explains."""


@pytest.fixture
def gpu():
    device = torch.device("cuda", 0)
    compiles, reason = head_passes.can_compile(device)
    if not compiles:
        pytest.skip(reason)
    torch.set_float32_matmul_precision("highest")
    return device


def on(device, target: SparseTarget) -> SparseTarget:
    return SparseTarget(
        ids=target.ids.to(device),
        probs=target.probs.to(device).float(),
        tail=target.tail.to(device).float(),
        valid=target.valid.to(device),
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_passes_agree_with_float64(kind, dtype, softcap, gpu):
    """The vocabulary is no multiple of what tensor cores take, and the last chunk is shorter."""
    options = {"kind": kind, "softcap": softcap, "temperature": 2.0}
    states, head, labels, target, rows = case(n=300, width=64, vocabulary=1003, kept=16, rows=270, dtype=torch.float64)
    with torch.no_grad():
        head.weight *= 0.3
    expected_loss = reference(states, head, labels, target, rows, **options)[0]
    expected = gradients(expected_loss, states, head)

    states_there = states.detach().float().to(gpu).requires_grad_()
    head_there = copy.deepcopy(head).float().to(gpu)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        losses = fused(
            states_there,
            head_there,
            labels.to(gpu),
            on(gpu, target),
            rows.to(gpu),
            chunk=128,
            compiled=True,
            **options,
        )
    measured = gradients(losses.loss, states_there, head_there)

    tolerance = PRECISIONS[dtype]
    assert losses.loss.item() == pytest.approx(expected_loss.item(), rel=tolerance)
    for one, other in zip(measured, expected, strict=True):
        assert (one.double().cpu() - other).norm() <= tolerance * other.norm()
