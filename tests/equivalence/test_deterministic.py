"""`training.deterministic`: no operation that torch refuses then, and what happens where there is one."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.teacher.projection import running_sums
from tests.equivalence.test_no_waiting import KINDS, pair_for
from utils.config import resume_rules
from utils.errors import UserError
from utils.seeding import DETERMINISTIC_WORKSPACES, WORKSPACE, deterministic_kernels

REFUSED = {"put_", "histc", "kthvalue", "nll_loss2d", "grid_sampler_2d_backward", "cumsum", "cumprod", "_ctc_loss"}
"""Operations without a deterministic kernel on CUDA, by the documentation of `torch.use_deterministic_algorithms`."""
ALL = ("lm", "kd", "span", "feat", "rel", "attn", "layer", "contr")


class Refusals(TorchDispatchMode):
    """Names operations that torch would refuse on a GPU, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
        if (name in REFUSED and is_float) or (name in ("median", "bincount") and len(args) > 1):
            self.names.append(name)
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_needs_an_operation_without_a_deterministic_kernel(kind):
    pair, texts, weights = pair_for(kind, "cpu")
    weights = weights if kind == "head" else {**weights, **dict.fromkeys(ALL, 0.1)}
    framework, batch = pair.framework(weights), pair.collator()(pair.encoder.windows(texts))
    if framework.router is not None:
        framework.calibrate([batch])
    with Refusals() as refusals:
        framework(batch, 0).loss.backward()
    assert refusals.names == []


def test_running_sums_are_those_of_float64_and_no_matter_how_small_a_probability_is():
    log_probs = torch.tensor([-0.1, -3.25, -20.0, -1e30, -2.0])
    sums = running_sums(log_probs).double() / 2**32
    expected = torch.cat([torch.zeros(1).double(), log_probs.double().clamp_min(-1e4).cumsum(0)])
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-8)
    assert sums[5] - sums[4] == pytest.approx(-2.0, abs=1e-9)


def test_torch_is_deterministic_within_and_as_before_afterwards(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[WORKSPACE] in DETERMINISTIC_WORKSPACES
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_such_a_kernel_is_named_and_the_remedy_with_it():
    with (
        pytest.raises(UserError, match=r"cumsum_cuda_kernel has no deterministic.*training\.deterministic out"),
        deterministic_kernels(True),
    ):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")
    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"), deterministic_kernels(True):
        raise RuntimeError("shapes do not fit")


def test_a_run_is_continued_with_the_value_it_had_and_older_runs_are_taken_for_what_they_were():
    def identity(**training) -> dict:
        return resume_rules.identity({"training": {"seed": 1, **training}})

    assert identity(deterministic=True) != identity(deterministic=False)
    assert identity(deterministic=False) == identity()
