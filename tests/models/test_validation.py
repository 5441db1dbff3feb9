"""Refusals of the library: got, expected, and no silent guess of what was meant."""

import math
import re
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from models import (
    CachedTeacher,
    CurriculumConfig,
    CurriculumScheduler,
    DistillationFramework,
    FrozenTeacher,
    LossConfig,
    PairCollator,
    PairEncoder,
    Ramp,
    RouterConfig,
    StudentAwareRouter,
    Term,
    VocabularyMap,
)
from models.curriculum import value_at
from models.teacher.top_k import exact_top_k
from models.text.chat import ChatEncoder
from models.text.encoder_decoder import SourceEncoder
from tests.models.tiny import STORIES, Pair, byte_bpe, pair_of, tiny_llama

# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "field", "wrong", "expected"),
    [
        (LossConfig, "divergence", "kl", "'forward_kl'"),
        (LossConfig, "tail", "foo", "'bucket' or 'renormalise'"),
        (LossConfig, "correction", "x", "'span', 'channel' or 'none'"),
        (LossConfig, "top_k", 0, "greater than 0"),
        (LossConfig, "top_k", 2.5, "integer"),
        (LossConfig, "top_k", "256", "integer"),
        (LossConfig, "top_k", True, "integer"),
        (LossConfig, "temperature", "hot", "number"),
        (LossConfig, "temperature", 0.0, "greater than 0"),
        (LossConfig, "temperature", {"points": [[0, 1]]}, "an instance of"),
        (LossConfig, "skew", 1.5, "from 0 to 1"),
        (LossConfig, "skew", math.nan, "finite"),
        (LossConfig, "max_depth", -1, "greater than or equal to 0"),
        (LossConfig, "min_prefix_mass", math.inf, "finite"),
        (LossConfig, "min_prefix_mass", 1.0, "less than 1"),
        (LossConfig, "span_temperature", -1.0, "greater than 0"),
        (RouterConfig, "layers", 0, "greater than 0"),
        (RouterConfig, "positions", 3, "greater than or equal to 4"),
        (RouterConfig, "gate", "token", "'window' or 'position'"),
        (RouterConfig, "initial", "zeros", "'ridge' or 'random'"),
        (RouterConfig, "learning_rate", math.inf, "finite"),
        (CurriculumConfig, "kd", 0.7, "Term"),
        (CurriculumConfig, "feat", None, "Term"),
        (CurriculumConfig, "feat", {"weight": 1.0, "shape": "cosine"}, "an instance of"),
        (Term, "weight", "much", "number"),
        (Term, "weight", None, "number"),
    ],
)
def test_a_value_that_an_annotation_does_not_admit_is_refused_by_name(kind, field, wrong, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as raised:
        kind(**{field: wrong})
    assert field in str(raised.value) and "got" in str(raised.value)


def test_every_wrong_field_is_told_at_once():
    with pytest.raises(ValueError, match=r"LossConfig: tail: got 'foo', expected .*; correction: got 'x', expected "):
        LossConfig(tail="foo", correction="x")


def test_a_copy_with_another_value_is_checked_too():
    with pytest.raises(ValueError, match="top_k"):
        replace(LossConfig(), top_k=-1)


def test_an_instance_holds_what_it_was_given():
    loss = LossConfig(temperature=2, top_k=16)
    assert loss.temperature == 2 and isinstance(loss.temperature, int)
    assert Term(np.float64(0.5)).weight == 0.5


@given(
    points=st.lists(st.tuples(st.floats(), st.floats()), max_size=4),
    shape=st.sampled_from(["linear", "cosine"]),
)
def test_a_ramp_is_refused_exactly_if_it_is_none(points, shape):
    progress = [p for p, _ in points]
    within = all(0 <= p <= 1 for p in progress)
    rising = all(a < b for a, b in pairwise(progress))
    finite = all(math.isfinite(value) for _, value in points)

    if points and within and rising and finite:
        ramp = Ramp(tuple(points), shape)
        low, high = min(v for _, v in points), max(v for _, v in points)
        assert all(low - abs(low) * 1e-9 <= value_at(ramp, p) <= high + abs(high) * 1e-9 for p in progress)
    else:
        with pytest.raises(ValueError):
            Ramp(tuple(points), shape)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 9)), min_size=1, max_size=4, unique_by=lambda point: point[0]))
def test_points_of_a_ramp_can_be_lists(points):
    points.sort()
    ramp = Ramp([list(point) for point in points])
    assert ramp == Ramp(tuple(points)) and hash(ramp) == hash(Ramp(tuple(points)))


@given(st.lists(st.floats(-1, 9), min_size=1, max_size=3))
def test_a_ramp_of_weights_or_temperatures_is_refused_exactly_where_one_would_be(values):
    ramp = Ramp(tuple((n / len(values), value) for n, value in enumerate(values)))

    def is_refused(make, schedule) -> bool:
        try:
            make(schedule)
        except ValueError:
            return True
        return False

    for make in (lambda s: CurriculumConfig(kd=Term(s)), lambda s: LossConfig(temperature=s)):
        assert is_refused(make, ramp) == any(is_refused(make, value) for value in values)


def test_a_shape_of_a_ramp_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match=r"shape: got 'step', expected 'linear' or 'cosine'"):
        Ramp(((0.0, 1.0), (1.0, 0.0)), "step")


# --- the curriculum -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["100", 10.5, None, True])
def test_the_steps_of_a_run_are_a_whole_number(steps):
    with pytest.raises(TypeError, match="total_steps: got"):
        CurriculumScheduler(CurriculumConfig(), LossConfig(), steps)


def test_configurations_in_the_wrong_order_are_refused():
    with pytest.raises(TypeError, match="curriculum: got a LossConfig, expected a CurriculumConfig"):
        CurriculumScheduler(LossConfig(), CurriculumConfig(), 10)


@given(total=st.integers(1, 50), step=st.integers(-60, 110))
def test_a_step_outside_of_the_run_is_never_taken_in_silence(total, step):
    scheduler = CurriculumScheduler(CurriculumConfig(), LossConfig(), total)
    if step < 0:
        with pytest.raises(ValueError, match="step: got -"):
            scheduler.progress(step)
    elif step > total:
        with pytest.warns(UserWarning, match="count optimizer steps, not micro-batches"):
            assert scheduler.progress(step) == 1
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert scheduler.progress(step) == step / total


# --- texts, windows, vocabularies -----------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pair_of(byte_bpe(280), byte_bpe(330))


def encoders(pair: Pair) -> list[PairEncoder]:
    tokenizers = (byte_bpe(280), byte_bpe(330))
    return [
        PairEncoder(*tokenizers, 48),
        ChatEncoder(*tokenizers, 48, "completions"),
        SourceEncoder(*tokenizers, 48, (0, 0)),
    ]


def test_one_text_in_place_of_a_list_is_refused_by_every_encoder(pair):
    for encoder in encoders(pair):
        with pytest.raises(TypeError, match=r"texts: got a str, expected a list of texts.*\[text\]"):
            encoder.windows("abc")


def test_what_is_no_text_is_refused_with_its_place(pair):
    with pytest.raises(TypeError, match=r"texts\[1\]: got None, expected a str"):
        pair.encoder.windows(["abc", None])
    with pytest.raises(TypeError, match=r"texts\[0\]: got a bytes"):
        pair.encoder.windows([b"abc"])
    with pytest.raises(TypeError, match="texts: got a dict"):
        pair.encoder.windows({"text": ["abc"]})


@pytest.mark.parametrize("names", ["ab", ["a"], ["a", "b", "c"]])
def test_documents_have_a_name_each(pair, names):
    with pytest.raises(ValueError, match="for 2 texts, expected a list with one name for each"):
        pair.encoder.windows(["abc", "def"], names)


@pytest.mark.parametrize("length", ["512", 12.0, None])
def test_the_length_of_a_window_is_a_whole_number(length):
    with pytest.raises(TypeError, match="max_length: got"):
        PairEncoder(byte_bpe(280), byte_bpe(330), length)


def test_a_name_in_place_of_a_tokenizer_is_refused():
    with pytest.raises(TypeError, match=r"tokenizer: got a str, expected what AutoTokenizer\.from_pretrained returns"):
        PairEncoder("gpt2", byte_bpe(330), 48)


@pytest.mark.parametrize("depth", [-1, 2.5, "16", None])
def test_a_depth_that_is_none_is_refused(pair, depth):
    with pytest.raises((TypeError, ValueError), match="max_depth: got"):
        PairCollator(pair.vocabulary, pair.encoder.end_of_text, depth)


def test_a_collator_is_given_what_it_asks_for(pair):
    ends = pair.encoder.end_of_text
    with pytest.raises(TypeError, match="vocabulary: got a PairEncoder"):
        PairCollator(pair.encoder, ends, 16)
    with pytest.raises(TypeError, match=r"end_of_text: got 0, expected .*PairEncoder\.end_of_text"):
        PairCollator(pair.vocabulary, 0, 16)
    with pytest.raises(TypeError, match="router: got a bool, expected a RouterConfig"):
        PairCollator(pair.vocabulary, ends, 16, True)


def test_one_window_or_none_in_place_of_a_list_is_refused(pair):
    windows = pair.encoder.windows(STORIES)
    with pytest.raises(TypeError, match=r"got one window.*\[window\]"):
        pair.collator()(windows[0])
    with pytest.raises(ValueError, match="windows: got none"):
        pair.collator()([])


def test_swapped_rows_are_refused():
    with pytest.raises(ValueError, match=r"330 tokens but its model only 280 rows.*swapped\?"):
        VocabularyMap.build(byte_bpe(280), byte_bpe(330), 330, 280)
    with pytest.raises(TypeError, match="student_vocab_size: got"):
        VocabularyMap.build(byte_bpe(280), byte_bpe(330), tiny_llama(280), 330)


# --- the teacher ----------------------------------------------------------------------------------


def test_a_teacher_is_frozen_and_evaluates_whatever_state_it_came_in(pair):
    model = tiny_llama(330).train()
    teacher = FrozenTeacher(model, pair.vocabulary)
    assert not any(part.training for part in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_is_a_model_and_has_the_rows_of_the_map(pair):
    with pytest.raises(TypeError, match="teacher: got a str, expected a transformers language model"):
        FrozenTeacher("Qwen/Qwen2.5-1.5B", pair.vocabulary)
    with pytest.raises(TypeError, match="vocabulary: got a Llama"):
        FrozenTeacher(pair.vocabulary, pair.teacher)
    with pytest.raises(ValueError, match="no output embeddings"):
        FrozenTeacher(torch.nn.Linear(2, 2), pair.vocabulary)
    with pytest.raises(ValueError, match="teacher_vocab_size=280"):
        FrozenTeacher(tiny_llama(280), pair.vocabulary)


@pytest.mark.parametrize("k", [0, -3])
def test_no_outcomes_are_refused(pair, k):
    with pytest.raises(ValueError, match="top_k: got"):
        pair.frozen().signal(pair.batch(), k)
    with pytest.raises(ValueError, match="k: got"):
        exact_top_k(torch.randn(2, 64), k)


def test_a_memory_that_is_none_is_refused(pair):
    with pytest.raises(TypeError, match="memory: got a dict, expected one that has top_k, read, keep too"):
        CachedTeacher(None, {})
    with pytest.raises(TypeError, match="teacher: got a Llama"):
        CachedTeacher(pair.teacher, None)


# --- the framework --------------------------------------------------------------------------------


def arguments(pair: Pair, **changed) -> dict:
    loss = LossConfig(top_k=8)
    usual = {
        "student": pair.student,
        "teacher": pair.frozen(),
        "vocabulary": pair.vocabulary,
        "loss": loss,
        "curriculum": CurriculumScheduler(CurriculumConfig(), loss, 10),
        "router": None,
    }
    return usual | changed


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("student", "SmolLM2", "a transformers language model"),
        ("teacher", tiny_llama(330), r"FrozenTeacher\(model, vocabulary\)"),
        ("teacher", "Qwen2.5", r"FrozenTeacher\(model, vocabulary\)"),
        ("loss", CurriculumConfig(), "a LossConfig"),
        ("curriculum", CurriculumConfig(), r"CurriculumScheduler\("),
        ("vocabulary", tiny_llama(280), "VocabularyMap"),
        ("router", True, "a RouterConfig"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(pair, name, wrong, expected):
    with pytest.raises(TypeError, match=rf"{name}: got a \w+, expected .*{expected}"):
        DistillationFramework(**arguments(pair, **{name: wrong}))


def test_swapped_models_are_refused(pair):
    with pytest.raises(ValueError, match="student_vocab_size=330, or are student and teacher swapped"):
        DistillationFramework(**arguments(pair, student=tiny_llama(330)))


def test_a_student_with_other_rows_than_the_map_is_refused(pair):
    with pytest.raises(ValueError, match="280 rows, the student's head has 288"):
        DistillationFramework(**arguments(pair, student=tiny_llama(288)))


def test_a_teacher_with_another_map_is_refused(pair):
    backwards = replace(pair.vocabulary, order=pair.vocabulary.order[::-1].copy())
    with pytest.raises(ValueError, match="another vocabulary map"):
        DistillationFramework(**arguments(pair, teacher=FrozenTeacher(pair.teacher, backwards)))


def test_one_model_as_student_and_teacher_is_refused():
    same = pair_of(byte_bpe(280), byte_bpe(280))
    with pytest.raises(ValueError, match=r"share weights.*load the model a second time"):
        DistillationFramework(**arguments(same, student=same.teacher))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_trained_in_half_precision_is_refused(pair, dtype):
    half = tiny_llama(280).to(dtype)
    with pytest.raises(ValueError, match=r"(float16|bfloat16), expected float32.*dtype=torch.float32"):
        DistillationFramework(**arguments(pair, student=half))


def test_frozen_weights_beside_trained_ones_can_be_of_any_precision(pair):
    student = tiny_llama(280)
    student.model.embed_tokens.to(torch.float16)
    student.requires_grad_(False)
    student.model.norm.requires_grad_(True)
    framework = DistillationFramework(**arguments(pair, student=student))
    assert framework.student is student


def test_two_temperatures_are_refused(pair):
    with pytest.raises(ValueError, match=r"loss\.temperature: got 2\.0 here and 1\.0 in CurriculumScheduler"):
        DistillationFramework(**arguments(pair, loss=LossConfig(temperature=2.0)))


def test_a_term_that_needs_a_teacher_is_not_left_out_in_silence(pair):
    framework = DistillationFramework(**arguments(pair, teacher=None))
    with pytest.warns(UserWarning, match="kd cannot be computed without a teacher"):
        assert framework(pair.batch(), 0).terms.keys() == {"lm"}
    told = framework(pair.batch(), 0, signal=pair.frozen().signal(pair.batch(), 8))
    assert told.terms.keys() >= {"kd", "lm"}


def test_counts_that_lack_a_term_are_refused(pair):
    framework = DistillationFramework(**arguments(pair))
    with pytest.raises(ValueError, match="counts: got none for kd"):
        framework(pair.batch(), 0, counts={"lm": 12})


def test_calibrating_what_is_not_there_or_with_one_batch_is_refused(pair):
    framework = DistillationFramework(**arguments(pair))
    with pytest.raises(TypeError, match="got one batch"):
        framework.calibrate(pair.batch())
    with pytest.raises(ValueError, match="nothing to calibrate"):
        framework.calibrate([pair.batch()])


def test_a_router_that_was_never_calibrated_warns_once(pair):
    routed = replace(pair, router=RouterConfig())
    batch = routed.batch()

    def uncalibrated() -> DistillationFramework:
        return routed.framework({"lm": 1.0, "feat": 1.0}, top_k=8)

    framework = uncalibrated()
    with pytest.warns(UserWarning, match=r"call DistillationFramework\.calibrate"):
        framework(batch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        framework(batch, 1)

        calibrated = uncalibrated()
        calibrated.calibrate([batch])
        calibrated(batch, 0)

        resumed = uncalibrated()
        resumed.load_state_dict(calibrated.state_dict())
        resumed(batch, 0)


def test_a_router_needs_its_config():
    with pytest.raises(TypeError, match="config: got a dict"):
        StudentAwareRouter({}, (2, 16), (2, 16))


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers(), max_size=2)))
def test_whatever_is_given_for_a_literal_is_one_of_its_values_or_refused(value):
    assume(value not in ("bucket", "renormalise"))
    with pytest.raises(ValueError, match="tail: got"):
        LossConfig(tail=value)


# --- what is none of what it should be ---------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).half()]
)
def test_numbers_of_numpy_and_torch_become_pythons(number):
    assert type(Term(number).weight) is float and Term(number) == Term(0.5)
    ramp = Ramp([[0, number], (1, number)])
    assert ramp == Ramp(((0, 0.5), (1, 0.5))) and hash(ramp)
    assert type(LossConfig(top_k=np.int64(8)).top_k) is int


def test_one_array_is_no_number():
    with pytest.raises(ValueError, match="weight: got"):
        Term(np.array([0.5]))


def test_whatever_is_no_batch_is_refused(pair):
    framework, windows = DistillationFramework(**arguments(pair)), pair.encoder.windows(STORIES)
    uses = (framework, framework.ask, framework.compare, framework.routing, lambda b: framework.teacher.signal(b, 8))
    for use in uses:
        for wrong in (windows, windows[0], None):
            with pytest.raises(TypeError, match=r"batch: got .*, expected a PairedBatch: PairCollator"):
                use(wrong)


@pytest.mark.parametrize(
    ("count", "problem"),
    [(0, "this batch alone has"), (1, "this batch alone has"), (-5, "expected at least 0"), (0.5, "a whole number")],
)
def test_a_count_that_is_none_is_refused(pair, count, problem):
    framework, batch = DistillationFramework(**arguments(pair)), pair.batch()
    with pytest.raises((TypeError, ValueError), match=rf"counts\['\w+'\]: got .*{problem}"):
        framework(batch, 0, counts=dict.fromkeys(batch.counts, count))


def test_counts_are_a_dict(pair):
    framework = DistillationFramework(**arguments(pair))
    with pytest.raises(TypeError, match=r"counts: got a list, expected a dict, the sum of batch\.counts"):
        framework(pair.batch(), 0, counts=[1, 2])


def test_items_of_a_filler_are_in_no_count(pair):
    framework, batch = DistillationFramework(**arguments(pair)), pair.batch()
    assert framework(batch.without_anchors(), 0, counts=dict.fromkeys(batch.counts, 0)).loss.isfinite()


def test_what_no_encoder_made_is_no_window(pair):
    collate = pair.collator()
    for wrong in ("a text", [1, 2], None):
        with pytest.raises(TypeError, match=r"windows\[1\]: got a \w+, expected one that an encoder made"):
            collate([*pair.encoder.windows(STORIES)[:1], wrong])
    with pytest.raises(ValueError, match=r"windows\[0\]: got a window without student_ids, .*, bytes, documents"):
        collate([{}])


@pytest.mark.parametrize(("ends", "side"), [((9999, 0), "student"), ((0, 330), "teacher"), ((-1, 0), "student")])
def test_an_end_of_text_that_is_no_token_is_refused(pair, ends, side):
    with pytest.raises(ValueError, match=rf"end_of_text: got -?\d+ for the {side}.*PairEncoder\.end_of_text"):
        PairCollator(pair.vocabulary, ends, 16)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("token", [-1, 330])
def test_a_token_that_the_map_lacks_is_refused_on_the_host(pair, side, token):
    window = pair.encoder.windows(STORIES)[0]
    ids = window[f"{side}_ids"].copy()
    ids[0] = token
    with pytest.raises(ValueError, match=rf"got token {token} for the {side}.*student and teacher swapped"):
        pair.collator()([window | {f"{side}_ids": ids}])


def test_a_batch_of_the_swapped_pair_is_refused(pair):
    swapped = pair_of(byte_bpe(330), byte_bpe(280))
    for one, other, side in ((pair, swapped, "student"), (swapped, pair, "teacher")):
        framework = DistillationFramework(**arguments(one))
        with pytest.raises(ValueError, match=rf"batch: got tokens of a {side} with 330.*swapped"):
            framework(other.batch(), 0)


@pytest.mark.parametrize("names", [[1, 2], ["a", None]])
def test_names_of_documents_are_text(pair, names):
    for encoder in encoders(pair):
        with pytest.raises(TypeError, match=r"documents\[\d\]: got .*, expected a str"):
            encoder.windows(["abc", "def"], names)


@pytest.mark.parametrize("shape", [tiny_llama(280), (2,), 16, (2, 0), (2, "16")])
def test_a_router_is_given_shapes(shape):
    for shapes in ((shape, (2, 16)), ((2, 16), shape)):
        with pytest.raises((TypeError, ValueError), match=r"(student|teacher)_shape.*: got .*, expected|least"):
            StudentAwareRouter(RouterConfig(), *shapes)


@pytest.mark.parametrize("rate", ["1e-4", math.nan, math.inf, -1.0, None, True])
def test_a_rate_that_is_none_is_refused(pair, rate):
    framework = DistillationFramework(**arguments(pair))
    with pytest.raises((TypeError, ValueError), match="learning_rate: got"):
        framework.parameter_groups(rate, 0.0)
    with pytest.raises((TypeError, ValueError), match="weight_decay: got"):
        framework.parameter_groups(1e-4, rate)


def test_a_curriculum_that_learns_nothing_or_is_of_another_loss_is_refused(pair):
    loss = LossConfig(top_k=8)
    nothing = CurriculumScheduler(CurriculumConfig(kd=Term(0.0), lm=Term(0.0)), loss, 10)
    framework, batch = DistillationFramework(**arguments(pair, curriculum=nothing)), pair.batch()
    with pytest.raises(ValueError, match="curriculum: got 0 for every weight"):
        framework(batch, 0)
    assert framework(batch, 0, measure=True).terms
    with pytest.raises(ValueError, match=r"loss\.top_k: got 3 here and 256 in CurriculumScheduler"):
        other = CurriculumScheduler(CurriculumConfig(), LossConfig(), 10)
        DistillationFramework(**arguments(pair, loss=LossConfig(top_k=3), curriculum=other))
