"""Checks of device, evaluation and training loop that rehearse a run on tiny models.

`bench` below has what is rehearsed with (see `Bench` in verify_fixes.py): models, windows, and the real loop as `fit`.
"""

from typing import Any

import torch
from torch import Tensor

from ..logs.lines import ROUTER_TERMS
from ..machine import hardware
from ..parallel.accelerator import temporary_accelerator
from ..pretrained import precision
from ..training.checkpoints import CheckpointStore
from .checklist import check

FEW_STEPS = 4
"""On the device; with fp16 the first may be left out while the scale of the loss is found."""

# --------------------------------------------------------------------------------------- the device


@check("one step on this device", "set --mixed-precision no; or train on the CPU: CUDA_VISIBLE_DEVICES=")
def one_step(bench: Any, config: Any) -> tuple:
    device = hardware.choose_device().value
    mixed = hardware.choose_precision(config.training.mixed_precision, device).value
    dtype = precision.frozen_dtype(config.teacher.dtype, device, mixed).value
    weights = {name: 0.1 for name in ROUTER_TERMS if name in config.curriculum.used()}
    module = bench.distillation(weights=weights, device=device, dtype=dtype)
    before = [p.detach().clone() for p in module.parameters()]
    with temporary_accelerator(mixed, cpu=device.type == "cpu") as accelerator:
        result = bench.fit(module, bench.windows, {"accelerator": accelerator}, max_steps=FEW_STEPS)
    after = [p.detach().cpu() for p in module.parameters()]
    finite = all(p.isfinite().all() for p in after)
    moved = any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    taken = result.steps - result.skipped_steps
    where = "cpu, as there is no GPU" if device.type == "cpu" else str(device)
    value = f"{taken} of {result.steps} taken on {where}; mixed precision {mixed}, teacher in {dtype}"
    weights = f"weights {'finite' if finite else 'not finite'} and {'changed' if moved else 'unchanged'}"
    return f"{value}; {weights}".replace("torch.", ""), "1 or more, finite", taken > 0 and finite and moved


# ---------------------------------------------------------------------------------------- evaluation


# ------------------------------------------------------------------------------------------ the loop


@check("gradient accumulation", "the gradient depends on how a step is cut into micro-batches")
def accumulation(bench: Any) -> tuple:
    def gradient(batch_size: int) -> Tensor:
        module, seen = bench.distillation(), {}
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda g, name=name: seen.update({name: seen.get(name, 0) + g}))
        bench.fit(module, windows, max_steps=1, batch_size=batch_size, gradient_accumulation_steps=8 // batch_size)
        return torch.cat([seen[name].flatten() for name, _ in module.named_parameters()])

    windows, reference = bench.windows[:7], bench.distillation()
    reference(bench.job.collate(windows), 0).loss.backward()
    whole = torch.cat([p.grad.flatten() for p in reference.parameters()])
    worst = max(((gradient(size) - whole).norm() / whole.norm()).item() for size in (8, 4, 1))
    return f"7 windows as 8x1, 4x2, 1x8: off by {worst:.1e}", "below 1e-4", worst < 1e-4


@check("fp16 teacher, fp32 student", "set teacher.dtype=float32, or the weights of the hidden-state terms to 0")
def half_teacher(bench: Any) -> tuple:
    def measure(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        module = bench.distillation(weights={"kd": 0.0, "lm": 0.0, **dict.fromkeys(ROUTER_TERMS, 1.0)}, dtype=dtype)
        terms = module(bench.job.collate(bench.windows), 0, measure=True).terms
        gradients = []
        for name in ROUTER_TERMS:
            taught = list(module.student.parameters())
            found = torch.autograd.grad(terms[name].sum, taught, retain_graph=True, materialize_grads=True)
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        return torch.stack([term.sum.detach() / max(term.count, 1) for term in terms.values()]), gradients

    (half, taught), (full, reference) = measure(torch.float16), measure(torch.float32)
    off, least = ((half - full).abs() / full.abs()).max().item(), min(g.norm().item() for g in taught)
    away = max(((a - b).norm() / b.norm()).item() for a, b in zip(taught, reference, strict=True))
    value = f"{len(half)} terms off by {off:.0e}; student's gradient {least:.1e} or more for each, off by {away:.0e}"
    return value, "below 1e-2, above 0, below 1e-2", off < 1e-2 and least > 0 and away < 1e-2


class _StopAfter:
    """Asks the loop to stop at a step boundary, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def requested(self) -> str | None:
        self.left -= 1
        return "SIGINT" if self.left < 0 else None


@check("resume", "a resumed run computes something else: do not trust checkpoints")
def resume(bench: Any) -> tuple:
    store = CheckpointStore(bench.folder / "resumed")
    bench.fit(bench.distillation(), bench.windows, {"checkpoints": store, "stop": _StopAfter(4)})
    module = bench.distillation(seed=5)
    result = bench.fit(module, bench.windows, {"checkpoints": store, "resume_from": store.newest_whole()})
    pairs = zip(module.state_dict().values(), bench.whole_run[0].state_dict().values(), strict=True)
    same = all(torch.equal(a, b) for a, b in pairs)
    value = f"stopped after step {result.resumed_from} of {result.steps}: {'same' if same else 'other'} weights"
    return value, "bit for bit the weights of a run in one go", same and result.resumed_from == 4 and result.steps == 6


@check("optimizer steps and schedule", "steps or learning rate do not fit the data: part of the schedule is lost")
def optimizer_steps(bench: Any) -> tuple:
    _, result, saved = bench.whole_run
    taken = int(saved["optimizer"]["state"][0]["step"])
    scheduled, rate = saved["scheduler"]["last_epoch"], saved["scheduler"]["_last_lr"][0]
    value = f"{result.steps} planned, {taken} taken, schedule at {scheduled}, learning rate {rate:.0e} at the end"
    return value, "6, 6, 6, 0 (11 windows in steps of 4, twice)", (result.steps, taken, scheduled, rate) == (6, 6, 6, 0)


@check("early stopping", "patience is not honoured, or the best weights are lost")
def early_stopping(bench: Any) -> tuple:
    def evaluate(step: int) -> dict[str, Any]:
        bits = (3.0, 2.5, 2.6, 2.7, 2.4, 2.3)[step - 1]
        return {"step": step, "split": "eval", "loss": bits, "bits_per_byte": bits}

    module, store = bench.distillation(), CheckpointStore(bench.folder / "early")
    options = {"evaluate": evaluate, "evaluate_every": 1, "checkpoints": store}
    result = bench.fit(module, bench.windows, options, patience=2)
    best = store.load(store.steps()[2]).tensors["module"] if 2 in store.steps() else {}
    back = bool(best) and all(torch.equal(value, module.state_dict()[name]) for name, value in best.items())
    value = f"{result.stopped_by} after {result.steps}, weights of {result.best_step} {'put back' if back else 'lost'}"
    right = back and (result.stopped_by, result.steps, result.best_step) == ("early_stopping", 4, 2)
    return value, "after 4, of 2 (patience 2; evaluations 3, 2.5, 2.6, 2.7, ...)", right
