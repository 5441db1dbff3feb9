"""Checks that train tiny models with the real loop: device, accumulation, resume, schedule, early stopping."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.protocols import RunConfig
from ..logs.lines import ROUTER_TERMS
from ..machine import hardware
from ..machine.stop_signals import StopSignal
from ..parallel.accelerator import temporary_accelerator
from ..pretrained import precision
from ..training.checkpoints import CheckpointStore
from .bench import Bench
from .checklist import Measured

FEW_STEPS = 4
"""Steps on the device; with fp16 the first may be left out while the scale of the loss is searched for."""

STOPPED_AFTER = 4
"""Step after which the run that is resumed was stopped: in the middle of the second epoch."""

EVALUATIONS = (3.0, 2.5, 2.6, 2.7, 2.4, 2.3)
"""Bits per byte that the evaluations of the check of early stopping pretend to measure, one after each step."""


# --------------------------------------------------------------------------------------- the device


def one_step(bench: Bench, config: RunConfig) -> Measured:
    """Train a few steps on this device, in the precision and with the hidden-state terms of the run to come."""
    device = hardware.choose_device().value
    mixed = hardware.choose_precision(config.training.mixed_precision, device).value
    dtype = precision.frozen_dtype(config.teacher.dtype, device, mixed).value

    # Only terms that the run uses: others may fail on this device without doing harm.
    used = config.curriculum.used()
    weights = {name: 0.1 for name in ROUTER_TERMS if name in used}
    module = bench.distillation(weights=weights, device=device, dtype=dtype)

    # The accelerator's precision is a global state, so the one of the run is put back afterwards.
    before = [parameter.detach().clone() for parameter in module.parameters()]
    with temporary_accelerator(mixed, cpu=device.type == "cpu") as accelerator:
        result = bench.fit(module, bench.windows, accelerator=accelerator, max_steps=FEW_STEPS)
    after = [parameter.detach().cpu() for parameter in module.parameters()]

    is_finite = all(parameter.isfinite().all() for parameter in after)
    has_changed = any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    taken = result.steps - result.skipped_steps

    place = "cpu, as there is no GPU" if device.type == "cpu" else str(device)
    finite = "finite" if is_finite else "not finite"
    changed = "changed" if has_changed else "unchanged"
    value = (
        f"{taken} of {result.steps} taken on {place}; mixed precision {mixed}, teacher in {dtype}; "
        f"weights {finite} and {changed}"
    )
    return Measured(value.replace("torch.", ""), "1 or more, finite", passed=taken > 0 and is_finite and has_changed)


# ------------------------------------------------------------------------------------ the gradient


class GradientDifference(NamedTuple):
    worst: float
    """Norm of the difference to the gradient of the whole step, over that gradient's norm."""


def accumulation(bench: Bench) -> GradientDifference:
    """Compare the gradient of seven windows at once with that of micro-batches of 8, 4 and 1."""
    windows = bench.windows[:7]

    reference = bench.distillation()
    reference(bench.job.collate(windows), 0).loss.backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])

    differences = []
    for batch_size in (8, 4, 1):
        gradient = _accumulated_gradient(bench, windows, batch_size)
        differences.append(_relative_error(gradient, whole))
    return GradientDifference(max(differences))


def _accumulated_gradient(bench: Bench, windows: Sequence[dict[str, Any]], batch_size: int) -> Tensor:
    """Return the gradient that one step of the loop sums up over its micro-batches, flattened."""
    module = bench.distillation()
    sums: dict[str, Tensor] = {}

    # The loop clears the gradients when it has used them, so they are added up as they come.
    def add(gradient: Tensor, name: str) -> None:
        sums[name] = sums.get(name, 0) + gradient

    for name, parameter in module.named_parameters():
        parameter.register_hook(lambda gradient, name=name: add(gradient, name))

    bench.fit(module, windows, max_steps=1, batch_size=batch_size, gradient_accumulation_steps=8 // batch_size)
    return torch.cat([sums[name].flatten() for name, _ in module.named_parameters()])


class HalfPrecision(NamedTuple):
    """A teacher in float16 beside the same one in float32."""

    terms: int
    value_error: float
    """Largest relative difference of a term."""
    least_gradient: float
    """Smallest norm of a term's gradient in the student."""
    gradient_error: float
    """Largest relative difference of such a gradient."""


def half_teacher(bench: Bench) -> HalfPrecision:
    """Compare all terms, and the gradient of each hidden-state term, under a teacher in float16 and in float32."""
    half_values, half_gradients = _terms_and_gradients(bench, torch.float16)
    values, gradients = _terms_and_gradients(bench, torch.float32)

    value_errors = (half_values - values).abs() / values.abs()
    gradient_errors = [_relative_error(half, full) for half, full in zip(half_gradients, gradients, strict=True)]
    return HalfPrecision(
        terms=len(half_values),
        value_error=value_errors.max().item(),
        least_gradient=min(gradient.norm().item() for gradient in half_gradients),
        gradient_error=max(gradient_errors),
    )


def _terms_and_gradients(bench: Bench, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return every term per item, and the student's gradient of each hidden-state term."""
    weights = {"kd": 0.0, "lm": 0.0, **dict.fromkeys(ROUTER_TERMS, 1.0)}
    module = bench.distillation(weights=weights, dtype=dtype)
    terms = module(bench.job.collate(bench.windows), 0, measure=True).terms

    parameters = list(module.student.parameters())
    gradients = []
    for name in ROUTER_TERMS:
        parts = torch.autograd.grad(terms[name].sum, parameters, retain_graph=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))

    values = [term.sum.detach() / max(term.count, 1) for term in terms.values()]
    return torch.stack(values), gradients


def _relative_error(measured: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of what is exact."""
    difference = measured - exact
    return (difference.norm() / exact.norm()).item()


# --------------------------------------------------------------------------------- the whole run


class _StopAfter(StopSignal):
    """A stop signal that ends the loop at a step boundary, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps_to_go = steps

    def requested(self) -> str | None:
        self.steps_to_go -= 1
        return "SIGINT" if self.steps_to_go < 0 else None


def resume(bench: Bench) -> Measured:
    """Stop a run, continue it with a student of other weights, and compare it with the run in one go."""
    store = CheckpointStore(bench.folder / "resumed")
    stop = _StopAfter(STOPPED_AFTER)
    bench.fit(bench.distillation(), bench.windows, {"checkpoints": store, "stop": stop})

    # Another seed: whatever the checkpoint does not put back is seen in the weights.
    module = bench.distillation(seed=5)
    options = {"checkpoints": store, "resume_from": store.newest_whole()}
    result = bench.fit(module, bench.windows, options)

    is_same = _same_weights(module, bench.whole_run.module.state_dict())
    weights = "same" if is_same else "other"
    return Measured(
        f"stopped after step {result.resumed_from} of {result.steps}: {weights} weights",
        "bit for bit the weights of a run in one go",
        passed=is_same and result.resumed_from == STOPPED_AFTER and result.steps == 6,
    )


class OptimizerSteps(NamedTuple):
    """Steps of a run, as the loop, the optimizer and the schedule count them."""

    planned: int
    taken: int
    scheduled: int
    rate: float
    """Learning rate at the end."""


def optimizer_steps(bench: Bench) -> OptimizerSteps:
    """Count the steps of the run in one go."""
    run = bench.whole_run
    schedule = run.saved["scheduler"]
    return OptimizerSteps(
        planned=run.result.steps,
        taken=int(run.saved["optimizer"]["state"][0]["step"]),
        scheduled=schedule["last_epoch"],
        rate=schedule["_last_lr"][0],
    )


def early_stopping(bench: Bench) -> Measured:
    """Train with evaluations that get worse after the second, with a patience of two."""

    def evaluate(step: int) -> dict[str, Any]:
        bits = EVALUATIONS[step - 1]
        return {"step": step, "split": "eval", "loss": bits, "bits_per_byte": bits}

    module = bench.distillation()
    store = CheckpointStore(bench.folder / "early")
    options = {"evaluate": evaluate, "evaluate_every": 1, "checkpoints": store}
    result = bench.fit(module, bench.windows, options, patience=2)

    # The best weights are those of step 2, and the module must end with them.
    is_back = False
    checkpoints = store.steps()
    if 2 in checkpoints:
        best = store.load(checkpoints[2]).tensors["module"]
        is_back = _same_weights(module, best)

    put_back = "put back" if is_back else "lost"
    outcome = (result.stopped_by, result.steps, result.best_step)
    return Measured(
        f"{result.stopped_by} after {result.steps}, weights of {result.best_step} {put_back}",
        "after 4, of 2 (patience 2; evaluations 3, 2.5, 2.6, 2.7, ...)",
        passed=is_back and outcome == ("early_stopping", 4, 2),
    )


def _same_weights(module: nn.Module, expected: dict[str, Tensor]) -> bool:
    """Return True if a module has all these weights, bit for bit."""
    weights = module.state_dict()
    return all(torch.equal(weights[name], value) for name, value in expected.items())
