"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes learn what one process learns, in float32, which is all it takes."""

import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from tests.equivalence.test_processes import assert_close, distil
from tests.gloo import launch, launched
from tests.toy import StopAfter, ToyModule, digest, toy_collate, toy_config, toy_windows
from utils.errors import UserError
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.parallel.accelerator import build_accelerator
from utils.parallel.processes import on_main_process
from utils.pretrained.loading import recompute_layers
from utils.training.checkpoints import CheckpointStore
from utils.training.loop import fit
from utils.training.options import LoopOptions

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install '.[deepspeed]'")

STAGES = ("zero2", "zero3")


def lora_of(student: nn.Module) -> None:
    """Add an adapter, and freeze all else."""
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules="all-linear"), student)


SMALL = {"tied": False, "accumulation": 2, "rows": (7, 1000)}
"""Micro-batches of one window: of the last step's, one process has none. Each has chunks of logits of its own."""

LORA = {"change": lora_of}
HALF = LORA | {"frozen": torch.bfloat16}

NO_GRADIENT, NO_LOSS = 1, 3
"""Optimizer steps, counted from 0, in which one process meets something that is not finite."""


class Unlucky(ToyModule):
    """Two steps are not to be taken; and weights have no gradient, or no longer: as a router's without its terms."""

    def __init__(self) -> None:
        super().__init__()
        self.never, self.once = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, batch, step, **options):
        output = super().forward(batch, step, **options)
        unlucky = torch.distributed.get_rank() == 1
        output.loss = output.loss + (self.once.weight.square().sum() if step == 0 else 0)
        loss = output.loss * (float("nan") if unlucky and step == NO_GRADIENT else 1)
        loss = loss + (float("inf") if unlucky and step == NO_LOSS else 0)  # with a finite gradient
        return SimpleNamespace(**vars(output) | {"loss": loss})


def unlucky(folder: Path, how: str, mixed_precision: str = "no") -> dict:
    """Every state of a run on toy windows in which two steps have to be left out; gradients are long and clipped."""
    states, weights, linear = [], [], F.linear
    with launched(how, mixed_precision) as accelerator:
        module, store = Unlucky(), CheckpointStore(folder / "checkpoints", keep=100)

        def evaluate(step: int) -> None:
            states.append(digest(module))
            weights.append({name: value.numpy().copy() for name, value in module.state_dict().items()})

        logger = StepLogger(folder, 10**6, 1, main_process=accelerator.is_main_process)
        config = toy_config(gradient_accumulation_steps=2, epochs=3, max_grad_norm=0.3, save_every=1)
        if how != "whole":
            with pytest.raises(UserError, match="needs whole weights"):
                options = LoopOptions(logger=logger, term_gradients=True)
                fit(module, [], toy_collate, config, accelerator=accelerator, options=options)
        options = LoopOptions(logger=logger, evaluate=evaluate, evaluate_every=1, checkpoints=store)
        result = fit(module, toy_windows(7), toy_collate, config, accelerator=accelerator, options=options)
        logger.close()
        accelerator.wait_for_everyone()
        told = accelerator.mixed_precision
    records = [{key: r[key] for key in ("loss", "lr", "grad_norm")} for r in read_metrics(folder / "metrics.jsonl")]
    moments = [store.load(store.steps()[step]).objects["optimizer"]["state"] for step in sorted(store.steps())]
    moments = [{i: {k: v.numpy() for k, v in held.items()} for i, held in state.items()} for state in moments]
    assert F.linear is linear  # ZeRO-3 replaces it while it trains
    dtypes = {str(value.dtype) for value in module.parameters()}
    return {
        "states": states,
        "weights": weights,
        "records": records,
        "moments": moments,
        "skipped": result.skipped_steps,
        "precision": (told, dtypes),
    }


def again(folder: Path, how: str) -> dict:
    """Return the bytes left after a run and its continuations, and whether a run inside another shares its plugin."""
    with launched(how) as accelerator:
        store, module, left = CheckpointStore(folder), ToyModule(), []
        for stop in (StopAfter(1), StopAfter(2), None):
            resume_from = on_main_process(accelerator, store.resume_point)
            logger = StepLogger(None, 10**6, 1, main_process=False)
            options = LoopOptions(logger=logger, checkpoints=store, resume_from=resume_from, stop=stop)
            fit(module, toy_windows(7), toy_collate, toy_config(), accelerator=accelerator, options=options)
            storages = (o.untyped_storage() for o in gc.get_objects() if isinstance(o, torch.Tensor))
            left.append(sum({storage._cdata: storage.nbytes() for storage in storages}.values()))
        inner = build_accelerator("no")
        same = inner.deepspeed_plugin is accelerator.deepspeed_plugin
    return {"left": left, "same plugin": same}


def of_two(folder: Path) -> dict:
    """All that two processes do."""
    f32 = torch.float32
    whole = {
        "through": distil(folder / "whole", f32),
        "small": distil(folder / "small", f32, **SMALL),
        "lora": distil(folder / "lora", f32, **LORA),
        "lora in half": distil(folder / "lora in half", f32, **HALF),
        "unlucky": unlucky(folder / "unlucky", "whole"),
        "half": unlucky(folder / "half", "whole", "bf16"),
    }

    return {"whole": whole} | {
        stage: {
            "through": distil(folder / stage / "through", f32, how=stage),
            "small": distil(folder / stage / "small", f32, how=stage, change=recompute_layers, **SMALL),
            "lora": distil(folder / stage / "lora", f32, how=stage, **LORA),
            "lora in half": distil(folder / stage / "lora in half", f32, how=stage, **HALF),
            "first half": distil(folder / stage / "halves", f32, how=stage, stop_after=2),
            "second half": distil(folder / stage / "halves", f32, how=stage),
            "first step": distil(folder / stage / "began sharded", f32, how=stage, stop_after=1),
            "goes on whole": distil(folder / stage / "began sharded", f32),
            "first step whole": distil(folder / stage / "began whole", f32, stop_after=1),
            "goes on sharded": distil(folder / stage / "began whole", f32, how=stage),
            "unlucky": unlucky(folder / stage / "unlucky", stage),
            "half": unlucky(folder / stage / "half", stage, "bf16"),
            "again": again(folder / stage / "again", stage),
        }
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("deepspeed")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    return launch(2, of_two, folder)


@pytest.fixture(scope="module")
def one(folder) -> dict:
    return distil(folder / "one", torch.float32)


pytestmark = pytest.mark.parametrize("stage", STAGES)


def test_sharded_weights_learn_what_whole_ones_do(one, two, stage):
    """Every term; the head, which the fused one reads outside of its module, tied to the embedding and not."""
    for result in two:
        whole = result["whole"]
        for run, expected in (("through", one), ("small", whole["small"]), ("lora", whole["lora"])):
            found = result[stage][run]
            assert found["steps"] == 4
            for terms, wanted in zip(found["terms"], expected["terms"], strict=True):
                assert_close(terms, wanted, rtol=1e-5)
            assert_close(found["weights"], expected["weights"], rtol=1e-4, atol=1e-5)
            assert_close(found["weights"], two[0][stage][run]["weights"], rtol=0)


def test_an_adapter_of_weights_in_half_precision_learns(two, stage):
    """Within the rounding of products, which ZeRO-3 computes by a function of its own."""
    for result in two:
        found, expected = (result[how]["lora in half"] for how in (stage, "whole"))
        for terms, wanted in zip(found["terms"], expected["terms"], strict=True):
            assert_close(terms, wanted, rtol=5e-3)
        for name, value in expected["weights"].items():
            if name.startswith("student.") and "lora" not in name:
                np.testing.assert_array_equal(found["weights"][name], value)


def test_nothing_of_a_run_is_left_when_it_is_continued_or_over(two, stage):
    """Weights and moments of an engine that is done would leave the next one too little room."""
    for result in two:
        first, *later = result[stage]["again"]["left"]
        assert max(later) - first < 100, result[stage]["again"]["left"]  # bytes
        assert result[stage]["again"]["same plugin"]


def test_a_run_continues_its_own_checkpoint_bit_for_bit(two, stage):
    for result in two:
        found = result[stage]
        assert (found["first half"]["steps"], found["second half"]["steps"]) == (2, 4)
        assert_close(found["second half"]["weights"], found["through"]["weights"], rtol=0)


@pytest.mark.parametrize("continued", ["goes on whole", "goes on sharded"])
def test_a_checkpoint_does_not_tell_who_wrote_it(two, stage, continued):
    for result in two:
        assert result[stage][continued]["steps"] == 4
        assert_close(result[stage][continued]["weights"], result["whole"]["through"]["weights"], rtol=1e-4, atol=1e-5)


def test_the_student_is_exported_whole(two, folder, stage):
    student = AutoModelForCausalLM.from_pretrained(folder / stage / "through" / "student")
    for name, value in student.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), two[0][stage]["through"]["weights"][f"student.{name}"])


@pytest.mark.parametrize(("run", "precision"), [("unlucky", "no"), ("half", "bf16")])
def test_norm_clipping_schedule_and_what_is_left_out_are_those_of_any_run(two, stage, run, precision):
    """ZeRO-3 adds a bias after the product is rounded: half precision shows that, and then Adam's first steps do."""
    expected, zero2 = two[0]["whole"][run], two[0]["zero2"][run]
    rounded = (stage, precision) == ("zero3", "bf16")

    for result in two:
        found = result[stage][run]
        assert found["precision"] == expected["precision"] == (precision, {"torch.float32"})
        assert found["skipped"] == expected["skipped"] == 2

        for record, wanted in zip(found["records"], expected["records"], strict=True):
            none = [key for key in wanted if wanted[key] is None]
            assert [key for key in record if record[key] is None] == none
            assert_close(
                *({k: v for k, v in r.items() if k not in none} for r in (record, wanted)),
                rtol=0.01 if rounded else 1e-5,
            )

        assert min(r["grad_norm"] for r in found["records"] if r["grad_norm"] is not None) > 0.3

        # A skipped step changes neither weights nor moments.
        for step in (NO_GRADIENT, NO_LOSS):
            assert found["states"][step] == found["states"][step - 1] != found["states"][step + 1]
            for index, before in found["moments"][step - 1].items():
                assert_close(found["moments"][step][index], before, rtol=0)

        if rounded:
            continue

        for weights, wanted, other in zip(*(run["weights"] for run in (found, expected, zero2)), strict=True):
            # DeepSpeed takes a gradient that is not there to be 0
            assert np.all(np.abs(weights["never.weight"]) <= np.abs(wanted["never.weight"]))
            differ = {name: other[name] for name in ("never.weight", "once.weight")}
            assert_close(weights, wanted | differ, rtol=1e-4, atol=1e-5)

        moments = zip(*(run["moments"] for run in (found, expected, zero2)), strict=True)
        for state, wanted, other in moments:
            for index, held in wanted.items():
                ages = other if held["step"] != other[index]["step"] else wanted  # `once`: it has no gradient later
                assert_close(state[index], ages[index], rtol=1e-3, atol=1e-6)
