"""Each red flag is raised by the planted fault, once, and a healthy run raises none; bad steps and spikes are told."""

import json
import logging
import math
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from utils.training.red_flags import EXPLAINED_STEPS, RedFlags
from utils.training.step_guard import MOST_PENDING, MOST_SKIPPED, Spikes, StepGuard

TOTAL = 4000


def watch(**changes) -> tuple[RedFlags, list[str]]:
    messages: list[str] = []
    settings = {"total_steps": TOTAL, "vocabulary_size": 4096, "warmup_steps": 200} | changes
    return RedFlags(**settings, warn=messages.append), messages


def record_at(step: int, lm: float, **changes) -> dict:
    warm, progress = min(step / 200, 1.0), step / TOTAL
    kd = max(0.2, 5 * math.exp(-4 * progress))
    return {
        "step": step,
        "epoch": 2 * progress,
        "loss": lm,
        "lr": 1e-3 * warm * 0.5 * (1 + math.cos(math.pi * progress)),
        "grad_norm": 0.7,
        "terms": {"lm": {"raw": lm, "weight": 0.3}, "kd": {"raw": kd, "weight": 0.7}},
        "kd_nats_per_token": kd,
        "coverage": {"anchored": 0.97, "depth0": 0.93},
        **changes,
    }


def healthy_lm(step: int, start: float, end: float) -> float:
    return end + (start - end) * math.exp(-step / 300)


@pytest.mark.parametrize(
    ("vocabulary_size", "start", "end"),
    [
        (4096, 8.3, 1.9),  # random student, stories
        (512, 6.2, 1.2),  # the same with tiny tokens
        (105, 4.6, 0.7),  # characters
        (49152, 10.8, 3.0),  # random student, true vocabulary
        (49152, 2.9, 2.5),  # pretrained
        (49152, 0.9, 0.7),  # pretrained, on code
        (49152, 2.5, 0.6),  # pretrained, on a narrow domain
    ],
)
def test_healthy_runs_raise_no_flag(vocabulary_size, start, end):
    flags, messages = watch(vocabulary_size=vocabulary_size)
    flags.teacher(0.7, 2.3)
    flags.check({"step": 0, "split": "eval", "loss": start})
    for step in range(100, TOTAL + 1, 100):
        flags.check(record_at(step, healthy_lm(step, start, end)))
        if step % 500 == 0:
            flags.check({"step": step, "split": "eval", "loss": healthy_lm(step, start, end)})
    generator = torch.Generator().manual_seed(0)
    for epoch in range(2):
        for _ in range(50):
            flags.batch(torch.randint(0, 4096, (2, 32), generator=generator), epoch)
    assert messages == [] and flags.warned == []


@pytest.mark.parametrize("start", [8.3, None, 11.0])
def test_loss_that_falls_as_copying_does_is_flagged_once(start):
    flags, messages = watch(initial_loss=start)
    for step in range(100, TOTAL + 1, 100):
        flags.check(record_at(step, 0.05))
    assert len(messages) == 1 and "not shifted" in messages[0] and "step 100" in messages[0]


def test_falling_too_fast_is_flagged_before_the_loss_is_near_zero():
    flags, _ = watch(initial_loss=8.3)
    flags.check(record_at(100, 2.0))
    assert flags.warned == ["copying"]


def test_a_low_evaluation_loss_is_flagged_but_a_text_learnt_by_heart_is_not():
    flags, _ = watch(initial_loss=8.3)
    flags.check(record_at(300, 0.05, epoch=25.0))
    flags.check(record_at(EXPLAINED_STEPS + 1, 0.05))
    assert flags.warned == []
    flags.check({"step": 300, "split": "eval", "loss": 0.05})
    assert flags.warned == ["copying"]


def test_a_low_loss_on_a_text_that_repeats_itself_is_not_flagged():
    flags, _ = watch(initial_loss=8.3, text_repeats=True)
    flags.check(record_at(300, 0.05))
    flags.check({"step": 300, "split": "eval", "loss": 0.05})
    assert flags.warned == []


@pytest.mark.parametrize("shift", [0, 1])
def test_a_real_model_trained_without_the_shift_is_flagged_and_with_it_is_not(shift):
    """An embedding, one recurrent layer and a head on a language with real structure, 150 steps."""
    torch.manual_seed(0)
    size = 128
    table = torch.randn(size, size).mul(1.5).softmax(-1)  # a first-order language, about 3.7 nats per token

    model = torch.nn.ModuleList([torch.nn.Embedding(size, 64), torch.nn.GRU(64, 64), torch.nn.Linear(64, size)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    flags, _ = watch(vocabulary_size=size, initial_loss=math.log(size))

    for step in range(1, 151):
        text = torch.randint(0, size, (1, 32))
        for _ in range(16):
            text = torch.cat([text, torch.multinomial(table[text[-1]], 1).T])

        ids, labels = text[:-1], text[shift : len(text) - 1 + shift]
        hidden, _ = model[1](model[0](ids))
        loss = F.cross_entropy(model[2](hidden).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if step % 50 == 0:
            flags.check(record_at(step, loss.item()))

    assert flags.warned == (["copying"] if shift == 0 else [])


def test_a_batch_seen_twice_in_an_epoch_is_flagged_and_in_the_next_epoch_is_not():
    flags, messages = watch()
    a, b, masked = torch.arange(64).view(2, 32), torch.arange(1, 65).view(2, 32), torch.full((2, 32), -100)
    for epoch in range(3):
        for labels in (a, masked, b, masked):
            flags.batch(labels, epoch)
    assert messages == []
    flags.batch(a[:, ::2], 3)
    flags.batch(a[:, ::2], 3, ["doc-7", "doc-9"])
    flags.batch(a[:, ::2], 3)
    assert flags.warned == ["duplicate_batch"] and len(messages) == 1 and "doc-7, doc-9" in messages[0]


def test_gradient_norm_zero_is_flagged_and_an_unknown_one_is_not():
    flags, messages = watch()
    flags.check(record_at(1000, 3.0, grad_norm=None))
    flags.check(record_at(1100, 3.0, grad_norm=float("nan")))
    assert messages == []
    flags.check(record_at(1200, 3.0, grad_norm=0.0))
    assert flags.warned == ["zero_gradient"]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps_per_update", [1, 2])
def test_a_scheduler_stepped_twice_per_update_is_flagged(kind, steps_per_update):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=50, num_training_steps=1000)
    flags, _ = watch(total_steps=1000, warmup_steps=50)
    for step in range(1, 1001):
        optimizer.step()
        for _ in range(steps_per_update):
            scheduler.step()
        if step % 30 == 0 or step == 1000:
            flags.check(record_at(step, 3.0, lr=scheduler.get_last_lr()[0], kd_nats_per_token=0.3))
    assert flags.warned == (["scheduler"] if steps_per_update == 2 else [])


def test_low_coverage_and_high_kd_are_flagged_only_where_kd_counts():
    flags, messages = watch()
    off = {"lm": {"raw": 3.0, "weight": 1.0}, "kd": {"raw": 5.0, "weight": 0.0}}
    flags.check(record_at(3000, 3.0, terms=off, coverage={"anchored": 0.2}, kd_nats_per_token=5.0))
    flags.check(record_at(100, 6.0, kd_nats_per_token=5.0))
    assert messages == []
    flags.check(record_at(100, 6.0, coverage={"anchored": 0.43}))
    flags.check(record_at(3000, 3.0, kd_nats_per_token=2.5))
    assert flags.warned == ["coverage", "kd_high"] and "43.0%" in messages[0] and "2.50" in messages[1]


def test_of_several_teachers_low_coverage_may_be_text_that_none_is_asked_about():
    flags, messages = watch()
    flags.has_several_teachers = True
    flags.check(record_at(100, 6.0, coverage={"anchored": 0.0}))
    assert "Likely cause: text that none of the teachers is asked about (only_for" in messages[0]


def test_a_teacher_no_better_than_the_untrained_student_is_flagged():
    flags, messages = watch()
    flags.teacher(1.0, 1.2)
    assert messages == []
    flags.teacher(1.2, 1.2)
    assert flags.warned == ["weak_teacher"]


def test_state_is_plain_survives_json_and_silences_what_was_said():
    flags, _ = watch()
    flags.check({"step": 0, "split": "eval", "loss": 8.0})
    flags.check(record_at(100, 0.05))
    flags.batch(torch.arange(8).view(1, 8), 4)
    state = json.loads(json.dumps(flags.state_dict()))
    resumed, messages = watch()
    resumed.load_state_dict(state)
    resumed.check(record_at(200, 0.05))
    assert messages == [] and resumed.initial_loss == 8.0
    resumed.batch(torch.arange(8).view(1, 8), 4)
    assert resumed.warned == ["copying", "duplicate_batch"] and resumed.state_dict()["batches"] == state["batches"]


# --- steps that are not finite --------------------------------------------------------------------------------------


def guard(scaled: bool = False) -> StepGuard:
    return StepGuard(lambda tensor: tensor, lambda items: items, scaled)


def output(**terms: float) -> SimpleNamespace:
    """A module's output: each term weighs 1, those called `off...` nothing."""
    weights = {name: float(not name.startswith("off")) for name in terms}
    loss = torch.tensor(sum(value for name, value in terms.items() if weights[name]))
    terms = {name: SimpleNamespace(sum=torch.tensor(value)) for name, value in terms.items()}
    return SimpleNamespace(loss=loss, terms=terms, weights=weights)


def step(watched: StepGuard, number: int, norm: float = 1.0, *outputs: SimpleNamespace) -> bool:
    for index, each in enumerate(outputs or [output(lm=1.0)]):
        watched.look(each, [f"{number}.{index}a,{number}.{index}b"])
    return bool(watched.decide(number, torch.tensor(norm)))


def test_first_offending_term_and_only_the_documents_with_it_are_named(caplog):
    watched, nan = guard(), math.nan
    assert step(watched, 1, nan, output(lm=1.0, kd=2.0), output(lm=1.0, off=nan, kd=math.inf, feat=nan))
    watched.read()
    assert [record.getMessage() for record in caplog.records] == [
        "step 1 left out, number 1: kd is not finite; documents 1.1a, 1.1b"
    ]


@pytest.mark.parametrize(
    ("loss", "norm", "left_out"),
    [(1.0, 1.0, False), (1.0, math.nan, True), (1.0, math.inf, True), (math.nan, 1.0, True), (math.inf, 0.0, True)],
)
def test_a_step_is_left_out_if_loss_or_gradient_is_not_finite(loss, norm, left_out, caplog):
    watched = guard()
    assert step(watched, 1, norm, output(lm=loss)) is left_out
    watched.read()
    assert watched.skipped == left_out
    assert ("the gradient (every term" in caplog.text) == (left_out and loss == 1.0)


def test_the_search_for_a_scale_is_told_below_the_level_of_a_warning(caplog):
    watched = guard(scaled=True)
    with caplog.at_level(logging.INFO, "utils.training.step_guard"):
        step(watched, 1, math.inf)
        step(watched, 2, math.nan, output(lm=math.nan))
        watched.read()
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]


def test_a_row_of_bad_steps_exhausts_the_guard_also_across_a_resume():
    watched = guard()
    for number in range(MOST_SKIPPED - 1):
        step(watched, number, math.nan)
    watched.read()
    assert not watched.exhausted
    again = guard()
    again.load_state_dict(json.loads(json.dumps(watched.state_dict())))
    step(again, MOST_SKIPPED, math.inf)
    again.read()
    assert again.exhausted and again.skipped == MOST_SKIPPED
    again.load_state_dict(watched.state_dict())
    for number in range(2 * MOST_SKIPPED):
        step(watched, number, math.nan if number % 2 else 1.0)
    watched.read()
    assert not watched.exhausted


def test_what_waits_on_the_device_is_bounded():
    watched = guard()
    for number in range(MOST_PENDING):
        assert not watched.must_read
        step(watched, number)
    assert watched.must_read
    watched.read()
    assert not watched.must_read


# --- spikes ---------------------------------------------------------------------------------------------------------


def test_a_constant_loss_times_a_million_is_one_spike_and_a_nan_none():
    spikes = Spikes()
    for number in range(200):
        spikes.add(number, math.nan if number % 50 == 49 else 1e6 if number == 120 else 1.0)
    assert spikes.total == 1 and all(map(math.isfinite, spikes.recent))


def test_ordinary_noise_and_a_falling_or_slowly_rising_loss_are_no_spikes():
    noise = random.Random(0)
    for course in (lambda n: 2.0, lambda n: 10 * math.exp(-n / 100) + 1, lambda n: 1 + n / 200, lambda n: 0.0):
        spikes = Spikes()
        for number in range(1000):
            spikes.add(number, course(number) * noise.gauss(1.0, 0.05))
        assert spikes.total == 0


def test_many_spikes_do_not_hide_the_next_and_are_told_ever_more_rarely(caplog):
    spikes = Spikes()
    for number in range(400):
        spikes.add(number, 50.0 if number > 40 and number % 4 == 0 else 1.0)
    assert spikes.total == 89 and len(caplog.records) == 7


def test_statistics_of_spikes_survive_a_resume():
    whole, first, second = guard(), guard(), guard()
    losses = [1.0 + 0.01 * (number % 7) for number in range(60)] + [9.0, 1.0]
    for number, loss in enumerate(losses):
        step(whole, number, 1.0, output(lm=loss))
        step(first if number < 60 else second, number, 1.0, output(lm=loss))
        if number == 59:
            first.read()
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    whole.read()
    second.read()
    assert second.state_dict() == whole.state_dict() and second.spikes.total == 1
