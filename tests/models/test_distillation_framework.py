"""The framework as a module: what it holds, what it computes and what it leaves alone."""

import copy
import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaModel

from models.config import CurriculumConfig, LossConfig, Ramp, RouterConfig, Term
from models.curriculum import CurriculumScheduler, balanced
from models.distillation_framework import DistillationFramework
from models.student_aware_router import ROUTER_TERMS
from models.teacher.frozen import FrozenTeacher
from models.text.tokens import MARKER
from models.types import IGNORE, PairedBatch
from tests.models.tiny import STORIES, byte_bpe, curriculum, gradients, pair_of, tiny_llama

ALL = {"kd": 0.7, "span": 0.2, "lm": 0.3}


@pytest.fixture
def pair():
    return pair_of(byte_bpe(300), byte_bpe(400))


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by one entry each time a teacher is asked."""
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
    for step in range(20):
        optimizer.zero_grad()
        framework.train()(batch, step, measure=step % 2 == 0).loss.backward()
        optimizer.step()
    assert digest(pair.teacher) == before
    assert digest(pair.student) != student_before
    assert not gradients(pair.teacher)
    assert not any(p.requires_grad for p in pair.teacher.parameters())


def left_after(steps: int, framework: DistillationFramework, batch: PairedBatch, optimizer: torch.optim.Optimizer):
    """Share of a batch's loss that is left after some steps on it."""
    first = framework(batch).loss.item()
    for _ in range(steps):
        optimizer.zero_grad()
        framework(batch).loss.backward()
        optimizer.step()
    return framework(batch).loss.item() / first


@pytest.mark.parametrize("name", ALL)
def test_training_on_a_batch_brings_a_term_down(pair, name):
    framework, batch = pair.framework({name: 1.0}), pair.batch()
    optimizer = torch.optim.AdamW(framework.parameters(), 3e-2)
    assert left_after(25, framework, batch, optimizer) < 0.7


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


def test_a_ramp_of_the_skew_goes_from_forward_to_reverse_kl(pair):
    batch = pair.batch()
    weights = {"kd": 0.7, "span": 0.3}
    ramp = pair.framework(weights, divergence="generalised_jsd", skew=Ramp(((0.0, 0.0), (1.0, 1.0))))
    assert [ramp(batch, step).scalars["skew"] for step in (0, 3, 10)] == [0.0, 0.3, 1.0]

    for step, constant in (
        (0, {"divergence": "forward_kl"}),
        (3, {"divergence": "generalised_jsd", "skew": 0.3}),
        (10, {"divergence": "reverse_kl"}),
    ):
        expected = pair.framework(weights, **constant)
        assert ramp(batch, step).loss.item() == expected(batch, step).loss.item()
        for gradient, reference in zip(
            gradient_of(ramp, batch, step=step), gradient_of(expected, batch, step=step), strict=True
        ):
            assert torch.equal(gradient, reference)


def test_a_ramp_of_the_interpolation_ends_with_the_teacher_itself(pair):
    batch = pair.batch()
    weights = {"kd": 0.7, "lm": 0.3}
    ramp = pair.framework(weights, interpolation=Ramp(((0.0, 0.0), (1.0, 1.0))))
    plain = pair.framework(weights)
    outputs = [ramp(batch, step) for step in (0, 5, 10)]
    assert [output.scalars["interpolation"] for output in outputs] == [0.0, 0.5, 1.0]
    assert "interpolation" not in plain(batch).scalars
    assert outputs[2].loss.item() == plain(batch).loss.item()

    # Nothing is learned from oneself, and less than everything half-way.
    distances = [output.terms["kd"].sum.item() for output in outputs]
    assert abs(distances[0]) < 1e-4 < distances[1] < distances[2]


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
        assert not any(term.sum.requires_grad for term in output.terms.values())
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


def test_a_student_with_nothing_to_train_is_refused(pair):
    pair.student.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the student \(LlamaForCausalLM\) has nothing to train"):
        DistillationFramework(pair.student, pair.frozen(), pair.vocabulary, LossConfig(), curriculum())


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


def test_differences_are_the_positions_of_the_largest_divergence_one_of_a_window(pair):
    batch = pair.batch()
    framework = pair.framework(ALL)
    rows = framework.differences(batch, most=len(batch.labels))
    total = framework.compare(batch)["kl_sum"]
    assert 0 < len(rows) <= len(batch.labels) and len({row.window for row in rows}) == len(rows)
    assert [row.kl for row in rows] == sorted((row.kl for row in rows), reverse=True)
    assert 0 < rows[0].kl <= total
    assert framework.differences(batch, most=1) == rows[:1]

    # The student's guesses are those of its own logits at that position.
    with torch.no_grad():
        logits = pair.student(input_ids=batch.student_ids, attention_mask=batch.student_mask).logits
    for row in rows:
        probabilities = logits[row.window, row.position].softmax(0)
        assert row.student[0] == (int(probabilities.argmax()), pytest.approx(float(probabilities.max()), abs=1e-5))
        assert [probability for _, probability in row.teacher] == sorted(dict(row.teacher).values(), reverse=True)
        assert len(row.student) == 3 and sum(dict(row.teacher).values()) <= 1.0001


def test_teacher_on_the_same_batch_object_leaves_it_alone(pair):
    batch = pair.batch()
    before = copy.deepcopy(batch)
    pair.framework(ALL)(batch, measure=True).loss.backward()
    for name, value in vars(before).items():
        now = getattr(batch, name)
        assert np.array_equal(now, value) if isinstance(value, torch.Tensor | np.ndarray) else now == value


def test_half_precision_teacher_and_autocast_student_give_a_float32_loss(pair):
    pair.teacher = tiny_llama(400, seed=2).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pair.framework(ALL)(pair.batch())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(pair.student))


# --- with a router ----------------------------------------------------------------------------------------------------

HIDDEN = dict.fromkeys(ROUTER_TERMS, 0.1)
LATER = Ramp(((0.5, 0.0), (1.0, 1.0)))


def routed_pair(layers: tuple[int, int] = (3, 4), sizes: tuple[int, int] = (300, 400), **config):
    """The teacher is wider than the student."""
    student, teacher = (
        tiny_llama(size, seed, width=width, num_hidden_layers=depth)
        for seed, (size, width, depth) in enumerate(zip(sizes, (16, 32), layers, strict=True), 1)
    )
    options = {"student": student, "teacher": teacher, "router": RouterConfig(**({"layers": 2, "span": 4} | config))}
    return pair_of(*map(byte_bpe, sizes), **options)


@pytest.fixture
def asked(monkeypatch):
    """Arguments of every call of a model's body."""
    seen, original = [], LlamaModel.forward

    def forward(self, *args, **kwargs):
        seen.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return seen


def test_router_terms_of_weight_zero_change_neither_loss_nor_gradient():
    pair = routed_pair()
    batch = pair.batch()
    plain, idle = pair.framework(ALL), pair.framework(ALL | dict.fromkeys(ROUTER_TERMS, LATER))
    assert plain.router is None and idle.router is not None
    expected, loss = gradient_of(plain, batch, step=2), plain(batch, 2).loss.item()
    for options in ({}, {"measure": True}):
        found = gradient_of(idle, batch, step=2, **options)  # none of the router's parameters has a gradient
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert idle(batch, 2, **options).loss.item() == loss
    assert idle(batch, 9).loss.item() != loss


def test_measured_router_terms_are_those_of_the_computed_ones_without_gradient():
    pair = routed_pair()
    batch = pair.batch()
    framework = pair.framework(ALL | dict.fromkeys(ROUTER_TERMS, LATER))
    measured, computed = framework(batch, 2, measure=True).terms, framework(batch, 9).terms
    assert not {*framework(batch, 2).terms} & {*ROUTER_TERMS}
    for name in ROUTER_TERMS:
        assert not measured[name].sum.requires_grad and computed[name].sum.requires_grad
        assert measured[name].sum.item() == computed[name].sum.item() > 0
        assert measured[name].count == computed[name].count == batch.counts[name] > 0


def test_measuring_one_router_term_beside_another_changes_no_gradient():
    pair = routed_pair()
    framework, batch = pair.framework({"lm": 0.3, "feat": 0.1, "rel": LATER, "contr": LATER}), pair.batch()
    plain, measured = (gradient_of(framework, batch, step=2, measure=measure) for measure in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


def test_hidden_states_are_asked_for_only_where_a_term_needs_them(asked):
    pair = routed_pair()
    framework, batch = pair.framework(ALL | {"rel": LATER}), pair.batch()
    for options, wanted in (({"step": 2}, False), ({"step": 2, "measure": True}, True), ({"step": 9}, True)):
        asked.clear()
        framework(batch, **options)
        assert [call.get("output_hidden_states", False) for call in asked] == [wanted, wanted]  # teacher, student
    assert not any("output_attentions" in call for call in asked)
    assert framework.teacher.signal(batch, 4).hidden is None


@pytest.mark.parametrize("name", ROUTER_TERMS)
def test_training_brings_a_router_term_down_and_leaves_the_teacher_alone(name):
    pair = routed_pair()
    framework, batch, before = pair.framework({name: 1.0}), pair.batch(), digest(pair.teacher)
    framework.calibrate([batch])
    optimizer = torch.optim.AdamW(framework.parameter_groups(3e-3, 0.0))
    assert left_after(15, framework, batch, optimizer) < 0.9
    assert digest(pair.teacher) == before and not gradients(pair.teacher)


def test_router_gets_the_states_after_its_layers_and_those_of_the_teacher_have_no_gradient(monkeypatch):
    pair = routed_pair(teacher_layers=2)
    framework, batch, seen = pair.framework(HIDDEN), pair.batch(), []

    def forward(*args):
        seen.append(args)
        return dict.fromkeys(HIDDEN, args[0][0].sum())

    monkeypatch.setattr(framework.router, "forward", forward)
    framework(batch)
    assert (framework.router.student_layers, framework.router.teacher_layers) == ([2, 3], [2, 4])
    for states, side, layers in zip(seen[0][:2], ("student", "teacher"), ([2, 3], [2, 4]), strict=True):
        every = getattr(pair, side)(getattr(batch, f"{side}_ids"), output_hidden_states=True).hidden_states
        assert all(torch.equal(state, every[layer]) for state, layer in zip(states, layers, strict=True))
        assert all(state.requires_grad == (side == "student") for state in states)


def test_teacher_is_outside_of_a_state_that_holds_the_router():
    pair = routed_pair()
    framework = pair.framework(HIDDEN)
    own = {name for name in framework.state_dict() if not name.startswith("student.")}
    assert own == {f"router.{name}" for name in ("projection", "offset", "gate", "log_prior", "mean", "scale")}
    assert not {id(p) for p in framework.parameters()} & {id(p) for p in pair.teacher.parameters()}


def test_a_state_dict_carries_student_and_router_to_another_framework():
    one, other = routed_pair(), routed_pair()
    batch = one.batch()
    first, second = one.framework(HIDDEN), other.framework(HIDDEN)
    first.calibrate([batch])
    torch.nn.init.normal_(first.router.gate)
    assert second(batch).loss.item() != first(batch).loss.item()
    second.load_state_dict(first.state_dict())
    assert second(batch).loss.item() == first(batch).loss.item()


def test_calibration_leaves_student_and_mode_alone():
    pair = routed_pair()
    framework, before = pair.framework(HIDDEN).train(), digest(pair.student)
    framework.calibrate([pair.batch()])
    assert framework.student.training and digest(pair.student) == before and not gradients(framework)
    assert framework.router.scale.std() > 0


def test_parameter_groups_hold_every_parameter_once_and_decay_no_gate():
    pair = routed_pair(learning_rate=0.5)
    framework = pair.framework(HIDDEN)
    framework.student.model.embed_tokens.weight.requires_grad_(False)
    groups = framework.parameter_groups(0.1, 0.01)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in framework.parameters() if p.requires_grad)
    for group in groups:
        own = group["name"] != "student"
        assert group["lr"] == (0.5 if own else 0.1)
        for p in group["params"]:
            decays = p is framework.router.projection if own else p.ndim >= 2
            assert group["weight_decay"] == (0.01 if decays else 0.0)


def test_what_a_router_term_lacks_is_named():
    pair = routed_pair()
    framework, batch = pair.framework({"lm": 0.3, "rel": LATER, "feat": LATER}), pair.batch()
    signal, bare = pair.frozen().signal(batch, 8), copy.copy(batch)
    bare.anchors = None
    with pytest.raises(
        ValueError, match=r"cannot compute feat, rel: .* no anchors; give PairCollator the RouterConfig"
    ):
        framework(bare, 9)
    with pytest.raises(ValueError, match=r"cannot compute feat, rel: the signal has no hidden states.*teacher_layers"):
        framework(batch, 9, signal=signal)
    for options in ({"signal": signal}, {}):  # a term of weight 0 is not measured then
        assert not {*framework(bare, 2, measure=True, **options).terms} & {*ROUTER_TERMS}
    with pytest.raises(ValueError, match=r"weights for feat, rel and no teacher"):
        DistillationFramework(pair.student, None, None, LossConfig(), curriculum(rel=1.0, feat=0.1))


@pytest.mark.parametrize("layers", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("sizes", [(300, 400), (300, 300)])
def test_router_takes_models_of_one_layer_and_equal_tokenizers(layers, sizes):
    pair = routed_pair(layers, sizes)
    framework, batch = pair.framework(HIDDEN), pair.batch()
    framework.calibrate([batch])
    output = framework(batch)
    output.loss.backward()
    assert all(term.sum.isfinite() and term.count > 0 for term in output.terms.values())
    assert all(g.isfinite().all() for g in gradients(framework))
    if sizes[0] == sizes[1]:  # every position that is supervised, but the first of each window
        assert batch.counts["feat"] == batch.counts["lm"] - int((batch.labels[:, 0] != IGNORE).sum())


@pytest.mark.parametrize("weights", [HIDDEN, *({name: 1.0} for name in ROUTER_TERMS)])
def test_a_batch_without_anchors_is_a_differentiable_zero_for_the_router(weights):
    pair = routed_pair()
    windows = pair.encoder.windows(STORIES)
    for window in windows:
        for side in ("student", "teacher"):
            window[f"{side}_roles"][:] = MARKER
    framework = pair.framework(weights)
    output = framework(pair.collator()(windows), measure=True)
    assert output.loss.item() == 0
    output.loss.backward()
    assert not any(g.any() for g in gradients(framework))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_teacher_and_autocast_give_the_router_what_float32_gives(dtype):
    pair = routed_pair()
    batch = pair.batch()
    framework = pair.framework(HIDDEN)
    framework.calibrate([batch])
    expected = {name: term.sum.item() / term.count for name, term in framework(batch).terms.items()}
    pair.teacher.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = framework(batch)
    assert output.loss.dtype == torch.float32
    found = {name: term.sum.item() / term.count for name, term in output.terms.items()}
    assert found == pytest.approx(expected, rel=0.05, abs=0.01)
    output.loss.backward()
    assert all(g.isfinite().all() for g in gradients(framework))


def test_routing_of_a_framework_is_a_row_per_student_layer():
    pair = routed_pair(teacher_layers=3)
    found = pair.framework(HIDDEN).routing(pair.batch())
    assert (found["student_layers"], found["teacher_layers"]) == ([2, 3], [1, 3, 4])
    assert [sum(row) for row in found["weights"]] == pytest.approx([1, 1])
    for weights in (ALL, {"feat": 1.0}):  # no router, no mixture
        assert pair.framework(weights).routing(pair.batch()) is None


def test_a_filler_is_no_candidate_and_compares_nothing():
    pair = routed_pair(teacher_layers=3)
    framework, batch = pair.framework(HIDDEN), pair.batch()
    output = framework(batch.without_anchors(), counts=batch.counts)
    assert all(output.terms[name].sum.item() == 0 for name in ("feat", "rel", "attn", "layer", "contr"))
    output.loss.backward()
    assert all(g.isfinite().all() for g in gradients(framework))


@pytest.mark.parametrize("name", ["lm", "kd", "span", *ROUTER_TERMS])
def test_a_router_couples_windows_from_the_time_that_it_is_planned(name):
    """It measures the contrastive term, over all processes, also where another term is learned."""
    pair = routed_pair()
    for weight in (1.0, LATER):
        assert pair.framework({name: weight}).couples_windows == (name in ROUTER_TERMS)
    assert not pair.framework({"lm": 1.0, name: 0.0}).couples_windows


def test_a_signal_is_enough_where_there_is_no_teacher(pair):
    batch, signal = pair.batch(), pair.frozen().signal(pair.batch(), 256)
    scheduler = curriculum(lm=0.3, kd=0.7)
    alone = DistillationFramework(pair.student, None, pair.vocabulary, LossConfig(), scheduler)
    with_teacher = DistillationFramework(pair.student, pair.frozen(), pair.vocabulary, LossConfig(), scheduler)
    assert alone(batch, signal=signal).loss.item() == with_teacher(batch).loss.item()


def test_every_term_is_measured_in_inference_mode(pair):
    framework, batch = pair.framework(ALL), pair.batch()
    with torch.inference_mode():
        inferred = framework(batch)
    assert inferred.loss.item() == pytest.approx(framework(batch).loss.item(), rel=1e-5)


def test_a_balance_is_the_loss_under_balanced_weights_bit_for_bit():
    pair = pair_of(byte_bpe(300), byte_bpe(400), max_length=24)
    batch = pair.batch()
    sizes = {"kd": 0.5, "lm": 4.0}

    def output_under(config, **options):
        scheduler = CurriculumScheduler(config, LossConfig(), 10)
        framework = DistillationFramework(pair.student, pair.frozen(), pair.vocabulary, LossConfig(), scheduler)
        return framework(batch, 3, **options)

    output = output_under(CurriculumConfig(balance="loss"), statistics=sizes)
    weights = balanced({"kd": 0.7, "lm": 0.3}, sizes)
    assert {name: output.weights[name] for name in weights} == weights
    assert output.loss.item() == output_under(CurriculumConfig.of_weights(weights)).loss.item()
    # Nothing is known of a step before the first.
    first = output_under(CurriculumConfig(balance="loss"), statistics={})
    assert first.loss.item() == output_under(CurriculumConfig()).loss.item()

    wrong = {"got 'foo'": {"foo": 1.0}, "got nan": {"kd": float("nan")}, "got None": {"kd": None}}
    for message, statistics in wrong.items():
        with pytest.raises(ValueError, match=message):
            output_under(CurriculumConfig(balance="loss"), statistics=statistics)
    with pytest.raises(TypeError, match="got a list, expected a mapping"):
        output_under(CurriculumConfig(balance="loss"), statistics=[1.0, 2.0])
