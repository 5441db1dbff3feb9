"""The forecast of an evaluation's memory, beside what scoring windows takes as torch's allocator counts it."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.models.tiny import tiny_llama
from utils.evaluation.scores import token_nll
from utils.forecast.step_memory import Demand, StepMemory
from utils.machine import device_memory

CPU = torch.device("cpu")
LENGTH, VOCABULARY = 64, 4_000


def demand_of(scored_logits: int) -> Demand:
    """Return the demand of a small student with a large vocabulary and of a teacher of the same kind."""
    config = tiny_llama(VOCABULARY).config
    dtypes = {"student_dtype": torch.float32, "teacher_dtype": torch.float32}
    sizes = {"length": LENGTH, "top_k": 8, "rows": lambda vocabulary, each, is_half=False: 16}
    options = {"precision": "no", "on_gpu": False, "scored_logits": scored_logits}
    return Demand(student=config, teacher=config, **dtypes, **sizes, **options)


def peak_of_scoring(windows: int) -> int:
    """Return the bytes at the peak of scoring so many windows, beside the model's."""
    model = tiny_llama(VOCABULARY).eval()
    ids = torch.ones(windows, LENGTH, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        token_nll(model, [({"input_ids": ids}, ids)], CPU)

    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("at_once", [0.5, 1, 3])
def test_the_forecast_of_an_evaluation_is_that_of_the_windows_that_are_scored_at_once(monkeypatch, at_once):
    """Less than a window at once: its logits are made together, and looked at in parts."""
    scored_logits = int(at_once * LENGTH * VOCABULARY)
    monkeypatch.setattr(device_memory, "SCORED_LOGITS", scored_logits)
    forecast = StepMemory(demand_of(scored_logits), windows=4).evaluation()
    assert sum(forecast.values()) == pytest.approx(peak_of_scoring(windows=4), rel=0.05)


def test_an_evaluation_that_takes_more_than_a_step_is_what_is_forecast():
    demand = demand_of(scored_logits=0)
    evaluated = replace(demand, scored_logits=50 * LENGTH * VOCABULARY)
    assert "evaluation logits" not in demand.memory(8)
    assert "evaluation logits" in evaluated.memory(100)


def test_of_a_large_vocabulary_the_teacher_can_be_what_takes_most():
    """Its windows are scored before the optimizer has moments, which their logits do not come on top of."""
    demand = replace(demand_of(2 * LENGTH * VOCABULARY), teacher=tiny_llama(10 * VOCABULARY).config, top_k=1)
    parts = demand.memory(1)
    scored = LENGTH * 10 * VOCABULARY * 4 + 2 * LENGTH * VOCABULARY * 8
    assert parts["teacher's evaluation logits"] + parts["optimizer"] == pytest.approx(scored, rel=0.01)
