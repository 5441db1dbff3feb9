"""The measurements give on sound code the numbers that they name; faults are planted in tests/test_verify_fixes.py."""

from dataclasses import replace

import pytest
import torch

from models import self_check
from models.config import CurriculumConfig, LossConfig, Ramp, Term
from models.self_check import Twins
from models.student_aware_router import ROUTER_TERMS
from models.types import IGNORE
from tests.models.tiny import STORIES, byte_bpe, tiny_llama

LENGTH = 48


@pytest.fixture(scope="module")
def twins() -> Twins:
    tokenizer = byte_bpe(300)

    def make(seed: int) -> torch.nn.Module:
        return tiny_llama(len(tokenizer), seed, spread=0.02)

    return Twins.of(make, tokenizer, STORIES, LENGTH)


def test_a_fresh_model_knows_nothing_of_random_tokens(twins):
    assert self_check.fresh_loss(twins).ratio == pytest.approx(1, abs=0.05)


def test_our_loss_is_that_of_transformers_which_shifts_the_labels_itself(twins):
    batch = twins.batch
    assert self_check.shifted_once(twins).difference < 1e-5
    unshifted = replace(batch, labels=torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids))
    assert self_check.language_losses(twins.make(3), unshifted).difference > 1e-4


def test_a_student_learns_nothing_from_its_copy_by_any_divergence(twins):
    result = self_check.equal_models(twins)
    assert result.worst < 1e-5
    assert result.variants == len(self_check.DIVERGENCES) * len(self_check.OUTCOMES)


def test_kd_of_two_different_models_is_above_0(twins):
    result = self_check.kd_gradient(twins, LossConfig(), teacher_seed=1)
    assert result.loss > 0 and result.norm > 0


def test_random_windows_are_the_same_for_both_sides_and_have_the_asked_lengths():
    batch = next(self_check.random_batches(10, [3, 5], seed=0))
    assert torch.equal(batch.student_ids, batch.teacher_ids)
    assert batch.student_mask.sum(1).tolist() == [3, 5]


@pytest.mark.parametrize("term", ROUTER_TERMS)
def test_a_term_of_unrelated_states_is_about_1(term):
    assert 0.05 < self_check.fresh_value(term, 32, 32) < 2


def test_a_window_of_padding_neither_teaches_nor_changes_the_others():
    result = self_check.padding_row()
    assert result.difference < 1e-5 and result.gradient_norm == 0 and result.others_change < 1e-5


def test_the_reference_curriculum_has_no_other_weights_and_a_changed_one_is_named():
    reference = CurriculumConfig(
        kd=Term(0.7),
        lm=Term(0.3),
        feat=Term(Ramp(((0.1, 0.0), (0.4, 0.1)))),
        attn=Term(Ramp(((0.1, 0.0), (0.4, 0.1)))),
        layer=Term(Ramp(((0.4, 0.0), (1.0, 0.1)))),
    )
    assert self_check.other_weights(reference, LossConfig()) == []

    changed = replace(reference, lm=Term(0.4))
    differing = self_check.other_weights(changed, LossConfig())
    assert {(weight.term, weight.weight, weight.expected) for weight in differing} == {("lm", 0.4, 0.3)}
    assert [weight.percent for weight in differing] == [0.4, 50.2, 100]
