"""A run does not depend on how many processes share it; one launch of two and one of four serve all tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoModelForCausalLM

from models.config import RouterConfig
from models.distillation_framework import DistillationFramework
from models.losses import fused_head
from models.student_aware_router import ROUTER_TERMS
from models.text.collate import PairCollator
from tests.gloo import launch, launched
from tests.models.tiny import STORIES, byte_bpe, pair_of, tiny_llama
from tests.toy import StopAfter, ToyModule, toy_config, toy_windows, train
from utils.errors import UserError
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.parallel.accelerator import build_accelerator
from utils.parallel.processes import main_process_first, on_main_process
from utils.training.checkpoints import CheckpointStore
from utils.training.loop import TrainingLoop, fit
from utils.training.options import LoopOptions

WINDOWS, GLOBAL_BATCH = 7, 4
"""Steps of 4 and 3 windows: of four processes one has nothing to do in the second step of an epoch."""


def distil(folder: Path, dtype: torch.dtype, how: str = "whole", stop_after: int | None = None, **changed) -> dict:
    """Losses, gradients of every step and final weights of a whole framework with every term.

    Args:
        how: see `launched`.
        changed: see `whole_framework`; or `accumulation`; or `rows`, of logits at once, for each process.
    """
    with launched(how) as accelerator:
        return _distil(accelerator, folder, dtype, stop_after, **changed)


def whole_framework(
    dtype: torch.dtype,
    tied: bool = True,
    change: Callable[[nn.Module], None] = lambda student: None,
    frozen: torch.dtype | None = None,
) -> tuple[DistillationFramework, list[dict], PairCollator]:
    """A framework with every term, its windows, and what makes batches of them.

    Args:
        tied: the head to the embedding.
        change: done to the student first.
        frozen: of the student's weights that are not trained, if not `dtype`.
    """
    models = [
        tiny_llama(size, seed, num_hidden_layers=3, tie_word_embeddings=tied).to(dtype)
        for seed, size in enumerate((300, 400))
    ]
    change(models[0])
    options = {"student": models[0], "teacher": models[1], "router": RouterConfig(layers=2, span=4, positions=8)}
    pair = pair_of(byte_bpe(300), byte_bpe(400), **options)
    torch.manual_seed(0)
    framework = pair.framework(dict.fromkeys(("lm", "kd", "span", *ROUTER_TERMS), 1.0)).to(dtype)
    for parameter in framework.student.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(frozen or dtype)
    windows = pair.encoder.windows([*STORIES, *(story[::-1] for story in STORIES)])[:WINDOWS]
    framework.calibrate([pair.collator()(windows)])
    return framework, windows, pair.collator()


def _distil(accelerator: Accelerator, folder: Path, dtype: torch.dtype, stop_after: int | None, **changed) -> dict:
    accumulation, rows = changed.pop("accumulation", 1), changed.pop("rows", None)
    framework, windows, collate = whole_framework(dtype, **changed)
    config = toy_config(
        batch_size=GLOBAL_BATCH // accelerator.num_processes // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
    )
    seen: list[dict] = []
    update = TrainingLoop.update

    def spy(loop, norm):
        seen.append({name: p.grad.numpy().copy() for name, p in framework.named_parameters() if p.grad is not None})
        update(loop, norm)

    logger = StepLogger(folder, 10**6, 1, main_process=accelerator.is_main_process)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "update", spy)
        if rows is not None:
            patch.setattr(fused_head, "chunk_rows", lambda *_, **__: (rows[accelerator.process_index], ""))
        store = CheckpointStore(folder / "checkpoints")
        state = {"checkpoints": store, "resume_from": on_main_process(accelerator, store.resume_point)}
        state |= {"stop": None if stop_after is None else StopAfter(stop_after)}
        options = LoopOptions(logger=logger, **state)
        result = fit(framework, windows, collate, config, accelerator=accelerator, options=options)
    logger.close()
    accelerator.wait_for_everyone()
    terms = [{n: t["raw"] for n, t in record["terms"].items()} for record in read_metrics(folder / "metrics.jsonl")]
    kept = framework.state_dict().items()
    weights = {name: (value.float() if value.dtype == torch.bfloat16 else value).numpy() for name, value in kept}
    if accelerator.is_main_process:
        framework.student.save_pretrained(folder / "student")
    return {"terms": terms, "gradients": seen, "weights": weights, "steps": result.steps}


def session(folder: Path, stop_after: int | None = None) -> dict[str, np.ndarray]:
    """Weights after one session of a toy run, which goes on with what the folder holds."""
    accelerator = build_accelerator("no", cpu=True)
    module = ToyModule(dtype=torch.float64)
    store = CheckpointStore(folder / "checkpoints")
    config = toy_config(batch_size=GLOBAL_BATCH // accelerator.num_processes, gradient_accumulation_steps=1)
    resume_from = on_main_process(accelerator, store.resume_point)
    stop = None if stop_after is None else StopAfter(stop_after)
    windows = toy_windows(WINDOWS)
    train(module, config, windows=windows, checkpoints=store, resume_from=resume_from, stop=stop)
    return {name: value.numpy() for name, value in module.state_dict().items()}


def failures(folder: Path) -> list[str]:
    """Return what this process hears of a mistake that only the main one makes, and whether it ran first."""
    accelerator = build_accelerator("no", cpu=True)
    heard = []

    def fail():
        raise UserError("only here")

    for run in (on_main_process, main_process_first):
        try:
            run(accelerator, fail)
        except UserError as error:
            heard.append(str(error))

    def in_turn() -> str:
        was_there = (folder / "made").exists()
        (folder / "made").touch()
        return f"{accelerator.process_index} {'found' if was_there else 'made'} it"

    return [*heard, main_process_first(accelerator, in_turn)]


def of_two(folder: Path) -> dict:
    """All that two processes do."""
    return {
        torch.float64: distil(folder / "two64", torch.float64),
        torch.float32: distil(folder / "two32", torch.float32),
        "goes on alone": session(folder / "goes on alone", 1),
        "began alone": session(folder / "began alone"),
        "heard": failures(folder),
        "sharded": distil(folder / "sharded", torch.float64, "fsdp2"),
        "first half": distil(folder / "half sharded", torch.float64, how="fsdp2", stop_after=2),
        "second half": distil(folder / "half sharded", torch.float64, "fsdp2"),
        "began whole": distil(folder / "began whole", torch.float64, stop_after=1),
        "goes on sharded": distil(folder / "began whole", torch.float64, "fsdp2"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder) -> list[dict]:
    session(folder / "began alone", 2)
    return launch(2, of_two, folder)


@pytest.fixture(scope="module")
def four(folder) -> list[dict]:
    return launch(4, distil, folder / "four64", torch.float64)


@pytest.fixture(scope="module")
def one(folder) -> dict:
    return {dtype: distil(folder / f"one{dtype}", dtype) for dtype in (torch.float64, torch.float32)}


def assert_close(found: dict, expected: dict, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **tolerance)


@pytest.mark.parametrize("processes", [2, 4])
def test_losses_and_gradients_are_those_of_one_process(one, two, four, processes):
    """Every term, the contrastive one with its negatives from all processes included; the last step is short."""
    expected = one[torch.float64]
    of_all = four if processes == 4 else [result[torch.float64] for result in two]
    assert expected["steps"] == 4 and [len(terms) for terms in expected["terms"]] == 4 * [3 + len(ROUTER_TERMS)]
    for found in of_all:
        for terms, wanted in zip(found["terms"], expected["terms"], strict=True):
            assert_close(terms, wanted, rtol=1e-12)
        for gradients, wanted in zip(found["gradients"], expected["gradients"], strict=True):
            assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)
        assert_close(found["weights"], of_all[0]["weights"], rtol=0)


def test_final_students_are_equal_within_the_rounding_of_float32(one, two):
    expected = one[torch.float32]["weights"]
    for result in two:
        assert_close(result[torch.float32]["weights"], expected, rtol=1e-4, atol=1e-5)


def test_a_run_goes_on_with_another_number_of_processes(two, folder):
    """Without dropout, whose masks a process draws for itself, the weights are those of one process."""
    alone = session(folder / "alone")
    assert_close(two[0]["began alone"], alone, rtol=1e-10, atol=1e-12)
    assert_close(session(folder / "goes on alone"), alone, rtol=1e-10, atol=1e-12)


def test_sharded_weights_learn_what_whole_ones_do_and_are_exported_whole(one, two, folder):
    """FSDP2, the head tied to the embedding; each process holds half of every matrix while it trains."""
    expected = one[torch.float64]
    student = AutoModelForCausalLM.from_pretrained(folder / "sharded" / "student")
    for result in two:
        for terms, wanted in zip(result["sharded"]["terms"], expected["terms"], strict=True):
            assert_close(terms, wanted, rtol=1e-12)
        assert not any(result["sharded"]["gradients"])  # none on the module: a twin was trained
        assert_close(result["sharded"]["weights"], expected["weights"], rtol=1e-9, atol=1e-12)
        for name, value in student.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), result["sharded"]["weights"][f"student.{name}"])


@pytest.mark.parametrize("continued", ["second half", "goes on sharded"])
def test_a_sharded_run_continues_its_own_checkpoint_bit_for_bit_and_that_of_a_whole_one(one, two, continued):
    exact = {"rtol": 0} if continued == "second half" else {"rtol": 1e-9, "atol": 1e-12}
    for result in two:
        assert result["first half"]["steps"] == 2 and result[continued]["steps"] == 4
        assert_close(result[continued]["weights"], result["sharded"]["weights"], **exact)


def test_a_mistake_in_the_main_process_is_told_in_all_and_it_goes_first(two):
    assert [result["heard"] for result in two] == [
        ["only here", "only here", "0 made it"],
        ["only here", "only here", "1 found it"],
    ]


def test_gradients_are_ready_in_one_order_whatever_a_batch_holds():
    """DeepSpeed exchanges them in the order in which each process has them, and does not look whose they are."""
    framework, windows, collate = whole_framework(torch.float32)
    ready: list[str] = []
    for name, parameter in framework.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))
    orders = []
    for batch in (collate(windows[:2]), collate(windows[2:3]), collate(windows[:1]).without_anchors()):
        framework(batch, 0, counts=batch.counts).loss.backward()
        orders.append([*ready])
        ready.clear()
    assert orders[0] == orders[1] == orders[2] and {*orders[0]} == {name for name, _ in framework.named_parameters()}
