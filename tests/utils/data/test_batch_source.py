"""The batches of a step: a function of the step alone, whatever happened before it and however it is cut."""

from itertools import chain, islice

import pytest
import torch

from tests.toy import toy_collate, toy_config, toy_windows
from utils.data.batch_source import BatchSource, OwnWindows, with_signals
from utils.training.plan import Plan

WINDOWS = 11


def source(rank: int = 0, after_epoch=lambda: None) -> BatchSource:
    return BatchSource(
        windows=toy_windows(WINDOWS),
        collate=toy_collate,
        seed=3,
        rank=rank,
        device=torch.device("cpu"),
        num_workers=0,
        after_epoch=after_epoch,
    )


def plan(micro_batch: int = 2, accumulation: int = 2, processes: int = 1) -> Plan:
    config = toy_config(batch_size=micro_batch, gradient_accumulation_steps=accumulation)
    return Plan.of(config, WINDOWS, processes)


def documents(steps, count: int) -> list[tuple]:
    """(step, epoch, documents by micro-batch) of the first steps."""
    rows = []
    for step in islice(steps, count):
        rows.append((step.step, step.epoch, [batch.documents for batch in step.batches]))
    return rows


@pytest.mark.parametrize("first", range(7))
def test_from_any_step_on_come_the_batches_of_an_uninterrupted_run(first):
    whole = documents(source().steps(plan(), 0), 8)  # 3 steps an epoch
    assert [epoch for _, epoch, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert documents(source().steps(plan(), first), 8 - first) == whole[first:]


def test_a_step_has_the_same_windows_in_smaller_micro_batches_and_in_two_processes():
    whole = documents(source().steps(plan(4, 1), 0), 6)
    small = documents(source().steps(plan(1, 4), 0), 6)
    shares = [documents(source(rank).steps(plan(1, 2, processes=2), 0), 6) for rank in range(2)]

    for number, (_, _, batches) in enumerate(whole):
        expected = sorted(chain(*batches))
        assert sorted(chain(*small[number][2])) == expected
        assert sorted(chain(*shares[0][number][2], *shares[1][number][2])) == expected


def test_processes_have_as_many_micro_batches_and_one_without_windows_is_none():
    short = 2  # the step with 3 windows
    steps = [next(source(rank).steps(plan(1, 2, processes=2), short)) for rank in range(2)]
    assert [len(step.micro_batches) for step in steps] == [2, 2]
    assert sorted(len(step.batches) for step in steps) == [1, 2]


def test_an_epoch_is_reported_once_its_batches_are_delivered():
    ended: list[int] = []
    steps = source(after_epoch=lambda: ended.append(1)).steps(plan(), 0)
    counts = []
    for _ in range(7):
        next(steps)
        counts.append(len(ended))
    assert counts == [0, 0, 0, 1, 1, 1, 2]


def test_signals_belong_to_their_batches_and_none_are_asked_for_behind_the_last_step():
    steps = with_signals(source().steps(plan(), 0), lambda batch, step: (step, batch.documents), end=2)
    first, second, behind = islice(steps, 3)
    for step in (first, second):
        assert [signal for _, signal in step.micro_batches] == [(step.step, b.documents) for b in step.batches]
    assert {signal for _, signal in behind.micro_batches} == {None}


# --- windows that the student wrote -----------------------------------------------------------------------------------


def written(number: int) -> dict:
    return {**toy_windows(1)[0], "documents": f"own{number}"}


def test_windows_of_the_student_stand_in_their_slots_and_all_others_stay():
    """Over the end of an epoch, where a step has three windows."""
    given = documents(source().steps(plan(4, 1), 0), 5)
    own = OwnWindows(5, {(1, 0): written(10), (1, 3): written(13), (2, 2): written(22), (4, 1): None})
    mixed = documents(source().steps(plan(4, 1), 0, own), 9)
    assert [step for step, _, _ in mixed] == list(range(5))

    expected = [list(batches[0]) for _, _, batches in given]
    expected[1][0], expected[1][3], expected[2][2] = "own10", "own13", "own22"
    del expected[4][1]
    assert [batches[0] for _, _, batches in mixed] == expected


def test_windows_of_the_student_are_the_same_in_smaller_micro_batches_and_in_two_processes():
    own = OwnWindows(3, {(step, 1): written(step) for step in range(3)})
    whole = documents(source().steps(plan(4, 1), 0, own), 3)
    small = documents(source().steps(plan(1, 4), 0, own), 3)
    shares = [documents(source(rank).steps(plan(1, 2, processes=2), 0, own), 3) for rank in range(2)]
    for number, (_, _, batches) in enumerate(whole):
        expected = sorted(chain(*batches))
        assert f"own{number}" in expected
        assert sorted(chain(*small[number][2])) == expected
        assert sorted(chain(*shares[0][number][2], *shares[1][number][2])) == expected


def test_no_step_behind_the_texts_that_are_written_is_looked_at():
    """Not by a teacher that is asked one step ahead either: the student's weights are not known there yet."""
    asked = []
    steps = source().steps(plan(), 0, OwnWindows(2, {}))
    answered = list(with_signals(steps, lambda batch, step: asked.append(step), 2))
    assert [step.step for step in answered] == [0, 1] and set(asked) == {0, 1}


@pytest.mark.parametrize(("end", "epochs"), [(2, 0), (3, 1), (4, 1), (7, 2)])
def test_epochs_that_end_within_the_texts_or_with_them_are_reported(end, epochs):
    ended: list[int] = []
    list(source(after_epoch=lambda: ended.append(1)).steps(plan(), 0, OwnWindows(end, {})))
    assert len(ended) == epochs
