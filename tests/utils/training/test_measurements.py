"""Measurements of the loop: the gradient of each term, taken without a trace in the run, and the loop's time."""

import math
import time

import pytest
import torch
from accelerate.state import AcceleratorState

from tests.toy import ToyModule, digest, toy_collate, toy_config, toy_windows, train
from tests.utils.training.test_plan import Routed
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.parallel.accelerator import build_accelerator
from utils.training.loop import fit
from utils.training.measurements import Clock
from utils.training.options import LoopOptions

STEP = 2
"""Of a module that weighs `kd` 0.05 * step; the record is one further."""


def plain_norms(module: ToyModule, parameters, step: int) -> dict[str, float]:
    """Reference: all windows of the step in one batch, one backward pass for each term."""
    batch = toy_collate(toy_windows(8))
    norms = {}
    for name in ("lm", "kd"):
        module.zero_grad()
        output = module(batch, step, counts=batch.counts)
        (output.weights[name] * output.terms[name].sum / batch.counts[name]).backward()
        norms[name] = math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))
    return norms


class Late(ToyModule):
    """Is at `STEP` from its first step on."""

    def forward(self, batch, step, **options):
        return super().forward(batch, STEP, **options)


class InFloat32(Late):
    def forward(self, batch, step, **options):
        with torch.autocast("cpu", enabled=False):
            return super().forward(batch, step, **options)


class LateRouted(Routed):
    def forward(self, batch, step, **options):
        return super().forward(batch, STEP, **options)


def logged(folder, module, cut=(2, 4), **options) -> dict:
    """The first record of training on 8 windows."""
    config = toy_config(batch_size=cut[0], gradient_accumulation_steps=cut[1], max_steps=1, max_grad_norm=1e-3)
    train(module, config, folder, windows=toy_windows(8), **options)
    return read_metrics(folder / "metrics.jsonl")[0]


@pytest.mark.parametrize("cut", [(8, 1), (2, 4), (3, 3)])
def test_the_norm_is_that_of_the_sum_over_micro_batches(tmp_path, cut):
    module = Late(dtype=torch.float64)
    expected = plain_norms(module, list(module.parameters()), STEP)
    terms = logged(tmp_path, module, cut, term_gradients=True)["terms"]
    assert {name: term["grad_norm"] for name, term in terms.items() if "grad_norm" in term} == pytest.approx(
        expected, rel=1e-10
    )
    assert "grad_norm" not in terms["span"]  # weighs nothing


def test_only_the_students_parameters_count(tmp_path):
    module = LateRouted(dtype=torch.float64).double()
    beside = {id(p) for p in module.router.parameters()}
    expected = plain_norms(module, [p for p in module.parameters() if id(p) not in beside], STEP)
    terms = logged(tmp_path, module, term_gradients=True)["terms"]
    assert [terms[name]["grad_norm"] for name in ("lm", "kd")] == pytest.approx([expected["lm"], expected["kd"]])
    with_router = plain_norms(module, list(module.parameters()), STEP)
    assert with_router["kd"] > 1.001 * expected["kd"]


class Alone(ToyModule):
    """LM is all there is, and the sum of `kd`, whose weight is above 0, has no graph."""

    def forward(self, batch, step, **options):
        output = super().forward(batch, 0, **options)
        output.terms["kd"].sum = output.terms["kd"].sum.detach()
        output.weights["kd"] = 0.5
        return output


def test_one_term_alone_has_the_gradient_of_the_step_and_one_without_a_graph_has_none(tmp_path):
    record = logged(tmp_path, Alone(), term_gradients=True)
    assert record["terms"]["lm"]["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-5)
    assert "grad_norm" not in record["terms"]["kd"]


@pytest.mark.parametrize("kind", [ToyModule, Routed])
def test_asking_for_gradients_does_not_change_the_weights(tmp_path, kind):
    plain, asked = kind(dropout=0.3), kind(dropout=0.3)
    train(plain, toy_config())
    train(asked, toy_config(), tmp_path, every=2, term_gradients=True)
    assert digest(plain) == digest(asked)
    assert all(record["terms"]["lm"]["grad_norm"] > 0 for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_not_asking_for_them_logs_none(tmp_path):
    assert not any("grad_norm" in term for term in logged(tmp_path, Late())["terms"].values())


def test_the_scale_of_fp16_is_divided_out(tmp_path):
    """accelerate refuses fp16 on a CPU, but torch's scaler works there; in float32, so that nothing overflows."""
    plain = logged(tmp_path / "plain", Late(), term_gradients=True)["terms"]

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = build_accelerator("no", cpu=True)
        accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
        accelerator.state._mixed_precision = "fp16"

        logger = StepLogger(tmp_path / "scaled", 1, 1)
        config = toy_config(batch_size=2, gradient_accumulation_steps=4, max_steps=1)
        module, options = InFloat32(), LoopOptions(logger=logger, term_gradients=True)

        scales = []
        hook = module.embed.weight.register_hook(lambda gradient: scales.append(gradient.abs().max().item()))
        fit(module, toy_windows(8), toy_collate, config, accelerator=accelerator, options=options)
        hook.remove()
        logger.close()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)

    scaled = read_metrics(tmp_path / "scaled" / "metrics.jsonl")[0]["terms"]
    assert len(scales) == 12 and min(scales) > 100  # 4 micro-batches: two terms and the loss, all of them scaled
    for name in ("lm", "kd"):
        assert scaled[name]["grad_norm"] == pytest.approx(plain[name]["grad_norm"], rel=1e-6)


def test_the_clock_knows_how_long_it_waited_for_batches():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    clock, batches = Clock(), slow()
    assert [clock.delivered(batches) for _ in range(3)] == [0, 1, 2]
    assert 0.06 <= clock.waited <= clock.total()
