"""A teacher that is asked one step ahead says the same: it is only asked earlier."""

import copy
from types import SimpleNamespace

import pytest
import torch

from models.config import RouterConfig
from models.student_aware_router import ROUTER_TERMS
from tests.models.tiny import STORIES, byte_bpe, pair_of, tiny_llama
from tests.toy import ToyModule, toy_config, toy_windows, train
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.parallel.accelerator import build_accelerator
from utils.training.loop import fit
from utils.training.options import LoopOptions

CHANGING = {"tokens_per_second", "peak_memory_mb"}


def distil(folder, ahead: bool) -> tuple[list[dict], dict]:
    models = [tiny_llama(size, seed, num_hidden_layers=3) for seed, size in enumerate((300, 400))]
    options = {"student": models[0], "teacher": models[1], "router": RouterConfig(layers=2, span=4, positions=8)}
    pair = pair_of(byte_bpe(300), byte_bpe(400), **options)
    torch.manual_seed(0)
    framework = pair.framework({"lm": 1.0, "kd": 1.0, "span": 0.0, **dict.fromkeys(ROUTER_TERMS[:3], 1.0)})
    windows = pair.encoder.windows([*STORIES, *(story[::-1] for story in STORIES)])[:7]
    framework.calibrate([pair.collator()(windows)])
    logger = StepLogger(folder, 10**6, 2)  # every other step also measures the terms without a weight
    options = LoopOptions(logger=logger, prefetch_teacher=framework.ask if ahead else None)
    config = toy_config(batch_size=1, gradient_accumulation_steps=2, epochs=2)
    accelerator = build_accelerator("no", cpu=True)
    fit(framework, windows, pair.collator(), config, accelerator=accelerator, options=options)
    logger.close()
    records = [{k: v for k, v in record.items() if k not in CHANGING} for record in read_metrics(folder / logger.path)]
    return records, copy.deepcopy(framework.state_dict())


def test_losses_and_weights_are_the_same_bit_for_bit(tmp_path):
    (plain, weights), (ahead, same) = distil(tmp_path / "plain", False), distil(tmp_path / "ahead", True)
    assert len(plain) == 4 and plain == ahead
    assert weights.keys() == same.keys() and all(torch.equal(weights[name], same[name]) for name in weights)


class Told(ToyModule):
    """Notes what it works on, and with which signal."""

    def __init__(self, events: list) -> None:
        super().__init__()
        self.events = events

    def forward(self, batch, step, *, signal=None, **options):
        self.events.append(("work", step, tuple(batch.documents), signal))
        return super().forward(batch, step, **options)


def test_the_next_step_is_asked_for_before_this_one_is_worked_on():
    """Also over the end of an epoch; nothing is asked for beyond the last step, or for what is not learned from."""
    events: list = []

    def ask(batch, step, measured):
        events.append(("ask", step, tuple(batch.documents)))
        return SimpleNamespace(of=tuple(batch.documents), measured=measured)

    config = toy_config(batch_size=1, gradient_accumulation_steps=2, epochs=2)
    train(Told(events), config, windows=toy_windows(3), prefetch_teacher=ask, every=3)
    assert [event[:2] for event in events] == [
        *2 * [("ask", 0)], ("ask", 1), *2 * [("work", 0)], *2 * [("ask", 2)], ("work", 1),
        ("ask", 3), *2 * [("work", 2)], ("work", 3),
    ]  # fmt: skip
    for name, step, documents, *signal in events:
        if name == "work":
            assert signal[0].of == documents and signal[0].measured == (step == 2)


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_resumed_run_asks_about_the_steps_that_are_left(tmp_path, stop_at):
    from tests.toy import StopAfter
    from utils.training.checkpoints import CheckpointStore

    asked: list[int] = []
    config = toy_config(batch_size=1, gradient_accumulation_steps=2, epochs=2)
    options = {"windows": toy_windows(3), "prefetch_teacher": lambda batch, step, measured: asked.append(step)}
    store = CheckpointStore(tmp_path / "checkpoints")
    train(ToyModule(), config, checkpoints=store, stop=StopAfter(stop_at), **options)
    asked.clear()
    train(ToyModule(), config, checkpoints=store, resume_from=store.resume_point(), **options)
    assert asked == [step for step in [0, 0, 1, 2, 2, 3] if step >= stop_at]
