"""Measurements on held-out text besides its loss."""

import copy
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.models.tiny import byte_bpe, tiny_llama
from utils.config.settings import EvaluationConfig
from utils.evaluation import scores as scoring
from utils.evaluation.held_out import ROUTING_BATCHES, HeldOut, TextStart
from utils.logs.progress import Progress
from utils.machine.stop_signals import Interrupted


class Batch:
    """Knows its windows and where it was sent."""

    def __init__(self, windows: list[int]) -> None:
        self.windows, self.device = windows, None

    def to(self, device):
        self.device = device
        return self


def held_out(windows: int, batch_size: int, process: int = 0) -> HeldOut:
    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=process, num_processes=2)
    return HeldOut(EvaluationConfig(), accelerator, range(windows), [], Batch, {}, batch_size)


class Measure:
    """Routing that is a different one in every window: the share of the first teacher layer is window / 100."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []

    def __call__(self, batch: Batch) -> dict:
        assert not self.model.training and not torch.is_grad_enabled() and batch.device.type == "cpu"
        assert next(self.model.parameters()).dtype == torch.float32
        self.seen.append(batch.windows)
        share = sum(batch.windows) / len(batch.windows) / 100
        return {"student_layers": [2], "teacher_layers": [3, 6], "weights": [[share, 1 - share]]}


@pytest.mark.parametrize(("device", "configured", "largest"), [("cpu", 2, 2), ("cuda:0", 2, 16), ("cuda:0", 20, 20)])
def test_a_gpu_is_scored_in_larger_batches_than_it_is_trained_in(device, configured, largest, monkeypatch):
    parameter = SimpleNamespace(device=torch.device(device))
    model = SimpleNamespace(parameters=lambda: iter([parameter]))
    monkeypatch.setattr(HeldOut, "_scored", lambda self, side, batches, note: batches)
    monkeypatch.setattr(scoring, "evaluate", lambda model, batches, *_, **__: batches)
    batches = held_out(windows=80, batch_size=configured).score(model, "student")
    assert max(map(len, batches)) == largest and sum(map(len, batches)) == 40


@pytest.mark.parametrize("process", [0, 1])
def test_routing_is_the_mean_over_the_first_windows_in_every_process(process):
    model = nn.Linear(1, 1).half().train()
    measure = Measure(model)
    found = held_out(windows=100, batch_size=3, process=process).routing(model, measure)["routing"]
    assert measure.seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]] and len(measure.seen) == ROUTING_BATCHES
    assert (found["student_layers"], found["teacher_layers"]) == ([2], [3, 6])
    assert found["weights"] == [pytest.approx([0.055, 0.945])]
    assert model.training and model.weight.dtype == torch.float16


def test_a_short_last_batch_weighs_less():
    measure = Measure(nn.Linear(1, 1))
    found = held_out(windows=4, batch_size=3).routing(measure.model, measure)
    assert measure.seen == [[0, 1, 2], [3]]
    assert found["routing"]["weights"][0][0] == pytest.approx(0.015)


def test_without_a_router_there_is_nothing_to_record():
    asked = []
    assert held_out(100, 3).routing(nn.Linear(1, 1), lambda batch: asked.append(batch)) == {}
    assert len(asked) == 1


def test_prompts_of_conversations_are_read_by_whoever_knows_their_templates():
    """One prompt is read for each sample; the prompts are spread over the text."""
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    documents, asked = [f"conversation {n}" for n in range(9)], []

    def prompt(document: str, side: str) -> tuple[str, list[int]]:
        asked.append((document, side))
        return f"shown of {document}", [1, 2]

    held = HeldOut(EvaluationConfig(samples=3), accelerator, [], documents, Batch, {}, 2, prompt)
    assert held.beginnings() == [f"shown of conversation {n}" for n in (0, 3, 6)]
    assert held.prompts("teacher")[0] == ("shown of conversation 0", [1, 2])
    assert asked[3:] == [(f"conversation {n}", "teacher") for n in (0, 3, 6)]


def test_the_beginning_of_a_long_document_is_no_warning_that_a_model_cannot_read_all_of_it():
    tokenizer = copy.deepcopy(byte_bpe(300))
    tokenizer.model_max_length = 8
    of = HeldOut(EvaluationConfig(prompt_tokens=4), None, [], ["word " * 100], Batch, {"student": tokenizer}, 1)
    assert len(of.prompts("student")[0][1]) in (4, 5)
    assert not tokenizer.deprecation_warnings  # where transformers notes what it has warned of


def test_written_text_is_judged_by_a_teacher_that_computes_here():
    tokenizers = {"student": byte_bpe(300), "teacher": byte_bpe(340)}
    config = EvaluationConfig(generation=3, prompt_tokens=4, new_tokens=6)
    alone = HeldOut(config, None, [], ["Once upon a time"] * 3, Batch, tokenizers, 1)
    student, teacher = tiny_llama(300), tiny_llama(340)
    metrics = alone.written_text(student, "student")
    assert metrics["samples"] == 3 and "teacher_bits_per_byte" not in metrics

    judged = replace(alone, judge=teacher)
    assert judged.written_text(student, "student")["teacher_bits_per_byte"] > 0
    assert alone.written_text(teacher, "teacher")["teacher_bits_per_byte"] > 0, "a teacher judges itself"
    assert "teacher_bits_per_byte" not in replace(judged, together=True).written_text(student, "student")

    answering = replace(judged, prompt=lambda document, side: (document, [7, 8]))
    assert answering.written_text(student, "student")["teacher_bits_per_byte"] > 0
    assert replace(judged, config=EvaluationConfig(generation=0)).written_text(student, "student") is None


class Full:
    """Agreement of a pair that has no memory for more than `most` windows."""

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, []

    def __call__(self, batch: Batch) -> dict:
        self.seen.append(len(batch.windows))
        if len(batch.windows) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"agree": len(batch.windows) / 2, "kl_sum": sum(batch.windows), "count": len(batch.windows)}


def agreement(monkeypatch, most: int, together: bool = False) -> tuple[dict, list[int]]:
    alone = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    held = HeldOut(EvaluationConfig(), alone, range(10), [], Batch, {}, 4, together=together)
    model = {"bits_per_byte": 1.0}
    scores = {"teacher": model, "student": model, "initial_student": model}
    pair = Full(most)
    start = {"samples": {"prompt": []}, "generation": {}}
    monkeypatch.setattr(HeldOut, "continuations", lambda self, model, side: [])
    return held.results(nn.Linear(1, 1), start, scores, pair)["retention"], pair.seen


def test_a_comparison_that_does_not_fit_into_memory_is_done_in_halves_with_the_same_result(monkeypatch):
    whole, cut = agreement(monkeypatch, 99), agreement(monkeypatch, 1)
    assert cut[0] == whole[0] and whole[0]["kl_nats_per_token"] == 4.5
    assert whole[1] == [4, 4, 2] and cut[1] == [4, 2] + [1] * 10


def test_where_other_processes_wait_it_raises(monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        agreement(monkeypatch, 1, together=True)


def test_routing_that_does_not_fit_into_memory_is_measured_in_halves():
    measure = Measure(nn.Linear(1, 1))

    def full(batch: Batch) -> dict:
        if len(batch.windows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(batch)

    whole = held_out(windows=100, batch_size=3).routing(measure.model, measure)["routing"]["weights"]
    cut = held_out(windows=100, batch_size=3).routing(measure.model, full)["routing"]["weights"]
    assert cut[0] == pytest.approx(whole[0])


def started(candidates: list[int], documents: list[str]) -> HeldOut:
    tokenizers = {"student": byte_bpe(300)}
    starts = {"student": TextStart(candidates[:1], candidates)}
    return HeldOut(EvaluationConfig(), None, [], documents, Batch, tokenizers, 1, starts=starts)


def test_a_model_that_finds_texts_likelier_behind_another_start_says_so_with_the_setting(caplog):
    model, documents = tiny_llama(300, spread=1.0), ["A girl and a dog.", "There was a park."]
    bits = {}
    for start in (0, 5, 9):
        nll = 0.0
        for document in documents:
            row = [start, *byte_bpe(300)(document, add_special_tokens=False)["input_ids"]]
            logits = model(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
            nll -= logits.gather(1, torch.tensor(row[1:])[:, None]).sum().item()
        bits[start] = nll / math.log(2) / sum(map(len, documents))
    worst, best = max(bits, key=bits.get), min(bits, key=bits.get)
    assert bits[best] < 0.99 * bits[worst]

    with caplog.at_level(logging.DEBUG):
        started([worst, *(start for start in bits if start != worst)], documents).compare_starts(model, "student")
    names = byte_bpe(300).convert_ids_to_tokens([worst, best])
    assert all(f"{value:.4f} behind" in caplog.text for value in bits.values())
    assert f"likelier behind {names[1]} than behind {names[0]}" in caplog.text
    assert f"--set student.text_start='{names[1]}'" in caplog.text

    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        started([best, *(start for start in bits if start != best)], documents).compare_starts(model, "student")
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_nothing_is_measured_where_there_is_one_way_to_start_and_samples_start_like_windows(caplog):
    of = started([7], ["A girl."])
    with caplog.at_level(logging.DEBUG):
        of.compare_starts(tiny_llama(300), "student")
    assert caplog.records == []
    assert of.prompts("student")[0][1][0] == 7


class Counted:
    """Collated windows of four tokens, whose model is asked for as many logits."""

    def __init__(self, windows: list[int]) -> None:
        self.bytes = torch.full((len(windows),), 9)
        self.ids = torch.tensor([[window, 1, 2, 3] for window in windows])

    def scored(self, side: str):
        return {"input_ids": self.ids}, self.ids


def shown(check=None) -> tuple[HeldOut, list[str]]:
    """A held-out text, and what its display was told."""
    noted = []

    class Display(Progress):
        def update(self, task, done: int) -> None:
            noted.append(f"{task.label} {done}/{task.total}")
            super().update(task, done)

    accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=0, num_processes=1)
    tokenizer = byte_bpe(300)
    text = HeldOut(
        EvaluationConfig(samples=2, prompt_tokens=3, new_tokens=4),
        accelerator,
        range(5),
        ["A girl and a dog.", "There was a park."],
        Counted,
        {"student": tokenizer, "teacher": tokenizer},
        batch_size=2,
        progress=Display(shown=False, check=check),
    )
    return text, noted


def test_every_measurement_shows_how_far_it_is():
    model = tiny_llama(300, eos_token_id=None)
    text, noted = shown()
    text.score(model, "student")
    assert noted == [f"student on held-out text {done}/5" for done in (2, 4, 5)]
    noted.clear()
    text.score(model, "teacher")
    assert noted == [f"teacher on held-out text {done}/5" for done in (2, 4, 5)]
    noted.clear()
    sample = text.sample(model)
    assert noted[0] == "samples of the student 1/4" and len(noted) <= 4
    assert sample == {"prompt": text.beginnings()[0], "text": text.continuations(model, "student")[0]}


@pytest.mark.parametrize("measure", [lambda text, model: text.score(model, "student"), HeldOut.sample])
def test_a_measurement_can_be_ended_between_two_parts_and_leaves_the_model_as_it_was(measure):
    def check() -> None:
        raise Interrupted("SIGINT")

    model = tiny_llama(300).half().train()
    text, noted = shown(check)
    with pytest.raises(Interrupted):
        measure(text, model)
    assert len(noted) == 1 and model.training and next(model.parameters()).dtype == torch.float16


def test_without_prompts_there_is_no_sample():
    text = replace(shown()[0], config=EvaluationConfig(samples=0))
    assert text.sample(tiny_llama(300)) is None
