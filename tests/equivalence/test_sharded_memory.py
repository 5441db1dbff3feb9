"""Memory that a process holds of a sharded student between two steps, against the forecast."""

from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from torch import Tensor
from torch.utils._pytree import tree_iter

from tests.equivalence.test_processes import whole_framework
from tests.gloo import launch, launched
from tests.models.tiny import tiny_llama
from tests.toy import toy_config
from utils.forecast.step_memory import Demand
from utils.logs.step_logger import StepLogger
from utils.training.loop import TrainingLoop, fit
from utils.training.options import LoopOptions

DTYPES = (torch.float32, torch.float32)
KINDS = ("fsdp2", *(("zero2", "zero3") if is_deepspeed_available() else ()))


def bytes_of(*values) -> int:
    """Return the bytes of the tensors in nested containers, each memory counted once."""
    sizes = {}
    for leaf in tree_iter(values):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            storage = (leaf.to_local() if hasattr(leaf, "to_local") else leaf).untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def held(folder: Path, how: str) -> dict[str, float]:
    """Bytes of weights, gradients and moments in this process, and what is expected of a student alone."""
    found = {}
    update = TrainingLoop.update

    def measured(loop, norm):
        update(loop, norm)
        engine = loop.engine
        inner = vars(engine.model.optimizer) if how != "fsdp2" else {}
        twin = [[parameter, vars(parameter)] for parameter in engine.twin.parameters()]
        found["held"] = bytes_of(inner, twin, list(engine.optimizer.state.values()))

    with launched(how) as accelerator, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "update", measured)
        framework, windows, collate = whole_framework(torch.float32)
        options = LoopOptions(logger=StepLogger(None, 10**6, 1, main_process=False))
        fit(framework, windows, collate, toy_config(batch_size=2), accelerator=accelerator, options=options)
        student = framework.student.config
        demand = Demand(student, None, 64, "no", *DTYPES, lambda *_, **__: 16, 8, False, sharded=how, processes=2)
        learned = sum(p.numel() for p in framework.parameters() if p.requires_grad)
        kept = demand.student_weights(4 * learned, learned).always
        gradients = 4 * learned / 2 if how == "zero3" else 0  # it keeps the room for them
        return found | {"expected": kept + gradients + 8 * learned / 2}


def of_two(folder: Path) -> dict:
    return {how: held(folder, how) for how in KINDS}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return launch(2, of_two, tmp_path_factory.mktemp("held"))


@pytest.mark.parametrize("how", KINDS)
def test_a_process_holds_what_the_forecast_says(two, how):
    for result in two:
        assert result[how]["held"] == pytest.approx(result[how]["expected"], rel=0.01)


def test_in_parts_a_run_takes_less():
    """8 processes, a student whose weights and moments are most of what a run takes."""
    config = tiny_llama(20_000, width=256, num_hidden_layers=8, tie_word_embeddings=True).config
    sizes = {}
    for how in ("", "zero2", "zero3", "fsdp2"):
        demand = Demand(config, None, 64, "no", *DTYPES, lambda *_, **__: 16, 8, False, sharded=how, processes=8)
        parts = demand.memory(1)
        sizes[how] = sum(size for name, size in parts.items() if name not in ("exchange", "runtime"))
    assert max(sizes["fsdp2"], sizes["zero2"], sizes["zero3"]) < 0.8 * sizes[""], sizes
