"""The framework as a module: what it holds, what it computes and what it leaves alone."""

import copy
import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import CurriculumConfig, LossConfig, Ramp, Term
from models.curriculum import CurriculumScheduler
from models.distillation_framework import DistillationFramework
from models.outputs import IGNORE
from models.teacher import FrozenTeacher
from models.vocabulary import MARKER
from tests.models.tiny import STORIES, byte_bpe, curriculum, gradients, pair_of, tiny_llama

ALL = {"kd": 0.7, "span": 0.2, "lm": 0.3}


@pytest.fixture
def pair():
    return pair_of(byte_bpe(300), byte_bpe(400))


@pytest.fixture
def calls(monkeypatch):
    """How often a teacher was asked."""
    counted, original = [], FrozenTeacher.signal

    def signal(self, *args):
        counted.append(1)
        return original(self, *args)

    monkeypatch.setattr(FrozenTeacher, "signal", signal)
    return counted


def digest(model: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest()


def gradient_of(framework, batch, **options) -> list[torch.Tensor]:
    framework.zero_grad()
    framework(batch, **options).loss.backward()
    return [g.clone() for g in gradients(framework)]


def test_teacher_is_outside_of_parameters_state_and_training_mode(pair):
    framework = pair.framework(ALL).train()
    mine = {id(p) for p in framework.parameters()}
    assert mine == {id(p) for p in pair.student.parameters()}
    assert not mine & {id(p) for p in pair.teacher.parameters()}
    assert set(framework.state_dict()) == {f"student.{name}" for name in pair.student.state_dict()}
    assert pair.teacher not in list(framework.modules())
    assert pair.student.training and not pair.teacher.training
    framework.double()
    assert next(pair.teacher.parameters()).dtype == torch.float32


def test_teacher_is_bit_for_bit_the_same_after_training(pair):
    framework, before = pair.framework(ALL), digest(pair.teacher)
    optimizer, student_before = torch.optim.AdamW(framework.parameters(), 1e-2), digest(pair.student)
    batch = pair.batch()
    for step in range(5):
        optimizer.zero_grad()
        framework.train()(batch, step, measure=step % 2 == 0).loss.backward()
        optimizer.step()
    assert digest(pair.teacher) == before
    assert digest(pair.student) != student_before
    assert not gradients(pair.teacher)
    assert not any(p.requires_grad for p in pair.teacher.parameters())


@pytest.mark.parametrize("name", ALL)
def test_training_on_a_batch_brings_a_term_down(pair, name):
    framework, batch = pair.framework({name: 1.0}), pair.batch()
    optimizer = torch.optim.AdamW(framework.parameters(), 3e-2)
    first = framework(batch).loss.item()
    for _ in range(25):
        optimizer.zero_grad()
        framework(batch).loss.backward()
        optimizer.step()
    assert framework(batch).loss.item() < 0.7 * first


def test_loss_is_the_weighted_sum_of_means(pair):
    batch = pair.batch()
    output = pair.framework(ALL)(batch)
    assert output.weights == {name: ALL.get(name, 0.0) for name in output.weights}
    expected = sum(weight * output.terms[name].sum.item() / batch.counts[name] for name, weight in ALL.items())
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert {name: term.count for name, term in output.terms.items()} == {name: batch.counts[name] for name in ALL}
    assert output.scalars == {"temperature": 1.0, "span_temperature": 1.0, "top_k": 256}


def test_without_a_step_the_end_of_the_curriculum_counts(pair):
    config = CurriculumConfig(kd=Term(Ramp(((0.0, 1.0), (1.0, 0.0)))), lm=Term(0.5))
    scheduler = CurriculumScheduler(config, LossConfig(), 10)
    framework = DistillationFramework(pair.student, pair.frozen(), pair.vocabulary, LossConfig(), scheduler)
    batch = pair.batch()
    assert framework(batch).loss.item() == framework(batch, 10).loss.item() != framework(batch, 0).loss.item()
    assert "kd" not in framework(batch).terms and "kd" in framework(batch, 9).terms


def test_terms_of_weight_zero_are_neither_computed_nor_asked_of_the_teacher(pair, calls):
    output = pair.framework({"lm": 1.0})(pair.batch())
    assert set(output.terms) == {"lm"}
    assert not calls
    assert set(pair.framework({"kd": 1.0})(pair.batch()).terms) == {"kd"}
    assert len(calls) == 1


def test_measuring_terms_of_weight_zero_changes_neither_loss_nor_gradient(pair):
    batch = pair.batch()
    for weights in ({"lm": 1.0}, {"kd": 1.0}, {"span": 1.0}, {"kd": 0.5, "lm": 0.5}):
        framework = pair.framework(weights)
        plain, measured = gradient_of(framework, batch), gradient_of(framework, batch, measure=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))
        output = framework(batch, measure=True)
        assert set(output.terms) == {"kd", "lm", "span"}
        assert all(output.terms[name].sum.requires_grad == (name in weights) for name in output.terms)
        assert output.loss.item() == framework(batch).loss.item()


def test_measured_values_are_those_of_the_computed_terms(pair):
    batch = pair.batch()
    computed, measured = pair.framework(ALL)(batch).terms, pair.framework({})(batch, measure=True).terms
    assert {n: t.sum.item() for n, t in computed.items()} == {n: t.sum.item() for n, t in measured.items()}


def test_a_known_signal_stands_for_the_teacher(pair, calls):
    framework, batch = pair.framework(ALL), pair.batch()
    signal = pair.frozen().signal(batch, 256)
    calls.clear()
    known = framework(batch, signal=signal).loss.item()
    assert not calls
    assert known == framework(batch).loss.item()


@pytest.mark.parametrize("weights", [ALL, {"lm": 1.0}, {"kd": 1.0}, {"span": 1.0}, {}])
def test_a_batch_with_nothing_to_learn_from_is_a_finite_differentiable_zero(pair, weights):
    windows = pair.encoder.windows(STORIES)
    for window in windows:
        for side in ("student", "teacher"):
            window[f"{side}_roles"][:] = MARKER
    batch = pair.collator()(windows)
    assert (batch.labels == IGNORE).all()
    framework = pair.framework(weights)
    output = framework(batch, measure=True)
    assert output.loss.item() == 0
    output.loss.backward()
    assert all((g == 0).all() for g in gradients(framework))
    assert framework.compare(batch)["count"] == 0


@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_losses_of_micro_batches_add_up_to_the_loss_of_one_batch(sizes):
    pair = pair_of(byte_bpe(300), byte_bpe(400))
    windows = pair.encoder.windows(STORIES + STORIES[:2])
    cuts = [*torch.tensor([0, *sizes]).cumsum(0).clamp_max(len(windows)).tolist(), len(windows)]
    parts = [windows[a:b] for a, b in pairwise(cuts) if a < b]
    framework = pair.framework(ALL)
    whole = pair.collator()(windows)
    batches = [pair.collator()(part) for part in parts]
    counts = {name: sum(b.counts[name] for b in batches) for name in whole.counts}
    assert counts == whole.counts
    expected = gradient_of(framework, whole)
    framework.zero_grad()
    total = 0.0
    for batch in batches:
        loss = framework(batch, counts={name: torch.tensor(n) for name, n in counts.items()}).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(framework(whole).loss.item(), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(framework), expected, strict=True))


def test_a_student_alone_learns_from_text(pair):
    framework = DistillationFramework(pair.student, None, None, LossConfig(), curriculum(lm=0.3, kd=0.7))
    output = framework(pair.batch(), measure=True)
    assert set(output.terms) == {"lm"}
    output.loss.backward()
    assert gradients(framework)


def test_a_teacher_without_a_map_is_refused(pair):
    with pytest.raises(ValueError, match="no vocabulary map"):
        DistillationFramework(pair.student, pair.frozen(), None, LossConfig(), curriculum())


def test_comparison_of_equal_models_is_perfect_and_of_others_is_not(pair):
    equal = pair_of(byte_bpe(300), byte_bpe(300), teacher=copy.deepcopy(pair.student), student=pair.student)
    batch = equal.batch()
    found = equal.framework(ALL).compare(batch)
    assert found["count"] == found["agree"] == batch.counts["depth0"]
    assert found["kl_sum"] == pytest.approx(0, abs=1e-4)
    other = pair.framework(ALL).compare(pair.batch())
    assert other["agree"] < 0.5 * other["count"] and other["kl_sum"] > 0.1 * other["count"]


def test_teacher_on_the_same_batch_object_leaves_it_alone(pair):
    batch = pair.batch()
    before = copy.deepcopy(batch)
    pair.framework(ALL)(batch, measure=True).loss.backward()
    for name, value in vars(before).items():
        now = getattr(batch, name)
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value


def test_half_precision_teacher_and_autocast_student_give_a_float32_loss(pair):
    pair.teacher = tiny_llama(400, seed=2).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pair.framework(ALL)(pair.batch())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(pair.student))
