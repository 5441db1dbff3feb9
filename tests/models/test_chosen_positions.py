"""Positions chosen before training: the same loss as without the others' rows, of which the teacher is never asked."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.chosen_positions import with_places
from models.config import CurriculumConfig, LossConfig, Ramp, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.losses import selection
from models.text.collate import PLACES
from tests.models.tiny import STORIES, byte_bpe, gradients, pair_of

SHARE = 0.3


@pytest.fixture(scope="module")
def pair():
    return pair_of(byte_bpe(300), byte_bpe(400), max_length=24)


@pytest.fixture(scope="module")
def windows(pair):
    return with_places(pair.encoder.windows(STORIES), pair.collator(), pair.student, SHARE, batch_size=3)


def framework_of(pair, select, *, name: str = selection.STORED, correction: str = "span", **weights):
    terms = {"kd": Term(0.7), "lm": Term(0.3)} | {key: Term(value) for key, value in weights.items()}
    # Every row counts: a choice before training does not know which ones the teacher cannot judge.
    config = LossConfig(select_by=name, top_k=32, correction=correction, min_prefix_mass=0.0)
    scheduler = CurriculumScheduler(CurriculumConfig(select=select, **terms), config, 10)
    return DistillationFramework(pair.student, pair.frozen(), pair.vocabulary, config, scheduler)


def learn(framework, batch, **options) -> tuple[float, float, list[torch.Tensor]]:
    framework.zero_grad()
    output = framework(batch, **options)
    output.loss.backward()
    return output.terms["kd"].sum.item(), output.loss.item(), [gradient.clone() for gradient in gradients(framework)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_places_are_ranks_and_end_at_the_share(scores, share):
    places = selection.places(np.array(scores, dtype=np.float32), share).tolist()
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    count = max(1, round(share * len(scores)))
    assert [places[index] for index in ranked] == [*range(count), *[-1] * (len(scores) - count)]


@pytest.mark.parametrize("correction", ["span", "none"])
def test_the_loss_is_that_of_a_choice_by_the_same_student_among_all_rows(pair, windows, correction):
    """The untrained student's entropy chooses the same rows in the step, where all rows of the teacher are there."""
    stored = framework_of(pair, SHARE, correction=correction)
    among_all = framework_of(pair, SHARE, name="student_entropy", correction=correction)
    thinned = pair.collator()(windows)
    whole = pair.batch()
    assert len(thinned.row_student) < 0.4 * len(whole.row_student) and len(thinned.asked) < 0.6 * len(whole.asked)
    assert thinned.counts == whole.counts

    mine, reference = learn(stored, thinned), learn(among_all, whole)
    assert mine[:2] == pytest.approx(reference[:2], rel=1e-6)
    for one, other in zip(mine[2], reference[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_smaller_share_later_takes_the_first_of_the_stored_places(pair, windows):
    ramp = framework_of(pair, Ramp(((0.0, SHARE), (1.0, 0.1))))
    among_all = framework_of(pair, Ramp(((0.0, SHARE), (1.0, 0.1))), name="student_entropy")
    for step in (0, 4, 10):
        mine = learn(ramp, pair.collator()(windows), step=step)
        reference = learn(among_all, pair.batch(), step=step)
        assert mine[:2] == pytest.approx(reference[:2], rel=1e-6)


def test_micro_batches_change_nothing(pair, windows):
    framework = framework_of(pair, SHARE)
    whole = pair.collator()(windows)
    reference = learn(framework, whole)[2]
    framework.zero_grad()
    for window in windows:
        framework(pair.collator()([window]), counts=whole.counts).loss.backward()
    for one, other in zip(gradients(framework), reference, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_teacher_is_asked_about_the_chosen_rows_alone(pair, windows):
    batch, whole = pair.collator()(windows), pair.batch()
    teacher = pair.frozen()
    signal, reference = teacher.signal(batch, 32), teacher.signal(whole, 32)
    is_chosen = np.concatenate([window[PLACES] for window in windows]) >= 0
    assert len(signal.ids) == is_chosen.sum() < len(is_chosen)
    torch.testing.assert_close(signal.log_probs, reference.log_probs[torch.from_numpy(is_chosen)])

    # The text's probability where KD needs it, and nothing elsewhere.
    is_asked = torch.zeros(len(batch.teacher_held), dtype=torch.bool)
    is_asked[batch.asked] = True
    torch.testing.assert_close(signal.realised[is_asked], reference.realised[is_asked])
    assert not signal.realised[~is_asked].any()


def test_windows_without_a_row_among_them(pair, windows):
    nothing = [{**window, PLACES: np.full(len(window[PLACES]), -1)} for window in windows]
    batch = pair.collator()(nothing)
    assert not len(batch.row_student)
    assert framework_of(pair, SHARE)(batch, measure=True).terms["kd"].sum == 0


def test_terms_that_need_the_teacher_everywhere_are_refused_and_not_measured(pair, windows):
    batch = pair.collator()(windows)
    assert "span" not in framework_of(pair, SHARE)(batch, measure=True).terms
    with pytest.raises(ValueError, match="span: got windows whose positions were chosen before"):
        framework_of(pair, SHARE, span=0.5)(batch)


def test_what_does_not_fit_is_refused(pair, windows):
    with pytest.raises(ValueError, match="select_by first_student and a batch without places"):
        framework_of(pair, SHARE)(pair.batch())
    with pytest.raises(ValueError, match="a column places in 1 of 2 windows"):
        plain = {name: value for name, value in windows[1].items() if name != PLACES}
        pair.collator()([windows[0], plain])
    with pytest.raises(ValueError, match="KD rows; choose positions again"):
        pair.collator()([{**windows[0], PLACES: windows[0][PLACES][1:]}])
