"""Isolated documents: a window of several is learned from as if each document had a window to itself."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from models import document_attention
from models.chosen_positions import places_of
from models.config import LossConfig, RouterConfig
from models.distillation import TeacherShare
from models.distillation_framework import DistillationFramework
from models.document_attention import DocumentAttention
from models.language_model import body_states, check_isolation, head_logits
from models.losses.selection import entropy, places
from models.student_aware_router import ROUTER_TERMS, StudentAwareRouter
from models.teacher.cached import CachedTeacher, RememberingCollator
from models.teacher.listed import ListedTeacher
from models.text.chat import ConversationSettings
from models.text.encoder_decoder import make_encoder
from models.text.tokens import MARKER
from models.text.windows import SIDES, document_begins
from models.types import IGNORE
from tests.models import tiny
from tests.models.teacher.test_cached import Memory
from tests.models.teacher.test_mixture import several
from tests.models.test_language_model import build
from tests.models.text.test_chat import CHATML, HEADED, messages, with_template

THREE = (TeacherShare(0.5), TeacherShare(0.3), TeacherShare(0.2))
TEXTS = ["Once upon a time", "there was a girl", "She loved to play", "The park was there"]
TOKENIZERS = {
    "one end of text for both": (tiny.byte_bpe(300), tiny.byte_bpe(320, 1)),
    "own start markers": (tiny.metaspace(), tiny.byte_bpe(300)),
    "no start marker": (tiny.t5_like(), tiny.t5_like(100)),
}


def isolated_pair(name="one end of text for both", max_length=64, **options):
    pair = tiny.pair_of(*TOKENIZERS[name], max_length=max_length, **options)
    pair.encoder = pair.encoder.isolated()
    return pair


@pytest.fixture
def in_float64(monkeypatch):
    """Let heads and losses compute in float64 where they ask for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def packed_and_separate(encoder, texts=TEXTS):
    """The windows of all texts together, and those of each text by itself, in the order of the former."""
    names = [str(number) for number in range(len(texts))]
    packed = encoder.windows(texts, names)
    order = [int(name) for window in packed for name in window["documents"].split(",")]
    separate = [window for number in order for window in encoder.windows([texts[number]])]
    assert len(packed) < len(separate) == len(texts)
    return packed, separate


def loss_and_gradients(pair, batch, **weights):
    module = pair.framework(weights)
    module.zero_grad()
    output = module(batch, 0)
    output.loss.backward()
    return [output.loss.detach(), *tiny.gradients(module)]


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_loss_and_every_gradient_are_those_of_a_window_for_each_document(name):
    pair = isolated_pair(name)
    pair.student.double()
    pair.teacher.double()
    packed, separate = packed_and_separate(pair.encoder)

    weights = {"kd": 0.6, "lm": 0.3, "span": 0.4}
    together = loss_and_gradients(pair, pair.collator()(packed), **weights)
    alone = loss_and_gradients(pair, pair.collator()(separate), **weights)
    for value, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        assert value.dtype == torch.float64


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("term", [*ROUTER_TERMS])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_terms_on_hidden_states_are_those_of_a_window_for_each_document(name, term):
    pair = isolated_pair(name, router=RouterConfig(layers=1, teacher_layers=1, span=4, positions=6))
    pair.student.double()
    pair.teacher.double()
    packed, separate = (pair.collator()(windows) for windows in packed_and_separate(pair.encoder))
    assert packed.counts == separate.counts

    of_both = []
    for batch in (packed, separate):
        # The same random projections for both.
        torch.manual_seed(0)
        of_both.append(loss_and_gradients(pair, batch, **{term: 1.0}))
    assert of_both[0][0] > 0.01
    for value, expected in zip(*of_both, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("in_float64")
def test_conversations_are_learned_as_if_each_had_a_window_to_itself():
    tokenizers = with_template(tiny.metaspace(), HEADED), with_template(tiny.byte_bpe(400), CHATML)
    pair = tiny.pair_of(*tokenizers)
    pair.student.double()
    pair.teacher.double()
    pair.encoder = make_encoder(tokenizers, 200, conversations=ConversationSettings(), starts=None).isolated()
    conversations = [json.dumps(messages(question, answer)) for question, answer in itertools.pairwise(TEXTS)]

    packed, separate = (pair.collator()(rows) for rows in packed_and_separate(pair.encoder, conversations))
    together, alone = (loss_and_gradients(pair, batch, kd=0.6, lm=0.3, span=0.4) for batch in (packed, separate))
    for value, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_a_gate_of_several_layers_looks_at_each_document_by_itself():
    pair = isolated_pair(router=RouterConfig(layers=2, teacher_layers=2))
    router = StudentAwareRouter(pair.router, (2, 8), (2, 8))
    torch.nn.init.normal_(router.gate)
    anchors = pair.collator()(pair.encoder.windows(TEXTS)).anchors
    states = torch.randn(len(anchors.student), 8)
    changed = torch.where(anchors.text[:, None] == 0, torch.randn_like(states), states)
    texts = len(anchors.sampled)
    assert texts == len(TEXTS)

    before, after = (router.log_routing(0, rows, anchors.text, texts) for rows in (states, changed))
    assert (before != after).any(1).tolist() == (anchors.text == 0).tolist()


def test_a_cached_teacher_answers_each_document_by_itself():
    pair = isolated_pair()
    memory = Memory(len(pair.vocabulary.segments), 256)
    collate = RememberingCollator(pair.collator(), memory)
    batches = [collate(windows) for windows in packed_and_separate(pair.encoder)]

    losses = []
    for teacher in (CachedTeacher(pair.frozen(), memory), CachedTeacher(None, memory)):
        scheduler = tiny.curriculum(kd=1.0)
        module = DistillationFramework(pair.student, teacher, pair.vocabulary, LossConfig(), scheduler)
        losses += [module(batch, 0).loss.item() for batch in batches]
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)


class Model:
    """Lists of windows, each read by itself."""

    def __init__(self, model):
        self.model = model
        self.lengths = []

    def lists(self, windows, top_k):
        answers = []
        for ids in windows:
            self.lengths.append(len(ids))
            log_probs = self.model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            top = log_probs.topk(top_k)
            realised = log_probs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            answers.append((top.indices.numpy(), top.values.detach().numpy(), realised.detach().numpy()))
        return answers


def test_a_teacher_that_is_elsewhere_is_sent_each_document_by_itself():
    pair = isolated_pair("own start markers")
    batch = pair.batch(TEXTS)
    source = Model(pair.teacher)
    signal = ListedTeacher(source, pair.vocabulary).signal(batch, 300)
    assert len(source.lengths) == len(TEXTS) > len(batch.teacher_ids)
    assert sum(source.lengths) == int(batch.teacher_mask.sum())

    expected = pair.frozen().signal(batch, 300)
    torch.testing.assert_close(signal.log_mass.exp(), expected.log_mass.exp(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(signal.log_probs[:, 0], expected.log_probs[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mix", ["weights", "likelihood"])
def test_several_teachers_read_each_document_by_itself(mix):
    setting = several(THREE, mix, isolates=True)
    module = setting.framework()
    packed, separate = (setting.pair.collate(windows) for windows in packed_and_separate(setting.pair.encoder))
    assert len(packed.student_ids) < len(separate.student_ids)

    together, alone = (module(batch, 0).loss for batch in (packed, separate))
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)


def test_positions_are_chosen_as_in_separate_windows():
    pair = isolated_pair(max_length=32)
    module = pair.framework({"kd": 1.0}, select_by="student_entropy")
    windows = pair.encoder.windows(TEXTS)
    batch = pair.collator()(windows)
    assert batch.student_positions is not None
    with torch.no_grad():
        states = body_states(pair.student, batch.student_ids, positions=batch.student_positions)
        scores = entropy(head_logits(pair.student, states.flatten(0, 1)[batch.row_student]))

    order = np.concatenate(places_of(batch, pair.student, share=0.5))
    expected = np.concatenate([places(part.numpy(), 0.5) for part in scores.split(batch.window_rows.tolist())])
    assert np.array_equal(order, expected)
    chosen = {int(position) for position in module.chosen(batch, 0.5)}
    assert chosen == {int(position) for position in batch.row_student[torch.from_numpy(order >= 0)]}


def varlen(module, query, key, value, attention_mask, scaling=None, position_ids=None, **options):
    """Attention as that of flash kernels: rows laid end to end, and no mask but what the positions say."""
    assert attention_mask is None and len(query) == 1
    key, value = (states.repeat_interleave(module.num_key_value_groups, 1) for states in (key, value))
    begins = (position_ids[0] == 0).nonzero().flatten().tolist()
    parts = []
    for begin, end in zip(begins, [*begins[1:], query.shape[2]], strict=True):
        document = [states[:, :, begin:end] for states in (query, key, value)]
        parts.append(F.scaled_dot_product_attention(*document, is_causal=True, scale=scaling))
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.fixture
def varlen_kernel():
    """Name of an attention that behaves as flash kernels of variable length do."""
    name = "varlen_for_tests"
    AttentionInterface.register(name, varlen)
    AttentionMaskInterface.register(name, lambda *_, **__: None)
    return name


def test_a_kernel_of_variable_length_reads_what_a_mask_lets_be_seen(varlen_kernel):
    pair = isolated_pair("own start markers", max_length=24)
    batch = pair.batch([*TEXTS, *tiny.STORIES[:2]])
    teacher = pair.frozen()
    expected = teacher.signal(batch, 8, layers=[1])
    assert document_attention.failure_of(pair.teacher, varlen_kernel) == ""

    teacher.document_attention = DocumentAttention(varlen_kernel, "for a test")
    signal = teacher.signal(batch, 8, layers=[1])
    held = batch.teacher_held
    for states, expected_states in zip(signal.hidden, expected.hidden, strict=True):
        torch.testing.assert_close(states.flatten(0, 1)[held], expected_states.flatten(0, 1)[held])
    torch.testing.assert_close(signal.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)
    # Evaluations and windows of one document go on as they did.
    assert pair.teacher.config._attn_implementation == "sdpa"


def test_a_kernel_that_fails_or_reads_across_documents_is_found_out(varlen_kernel):
    model = tiny.tiny_llama(40)
    AttentionInterface.register(varlen_kernel, lambda module, query, *_, **__: 1 / 0)
    assert "division by zero" in document_attention.failure_of(model, varlen_kernel)
    AttentionInterface.register(varlen_kernel, sdpa_attention_forward)
    assert "reads across documents" in document_attention.failure_of(model, varlen_kernel)
    assert "flash" in document_attention.failure_of(model, "flash_attention_2").lower()
    assert model.config._attn_implementation == "sdpa"


def test_the_choice_of_a_kernel_says_why():
    choice = document_attention.choose(tiny.tiny_llama(40))
    assert choice.name is None
    assert "on cpu" in choice.reason and "block mask" in choice.reason


@pytest.mark.parametrize("side", SIDES)
def test_logits_of_an_evaluation_are_those_of_separate_windows(side):
    pair = isolated_pair()
    model = getattr(pair, side).double()
    nlls = []
    for windows in packed_and_separate(pair.encoder):
        inputs, labels = pair.collator()(windows).scored(side)
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
        nlls.append(torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum"))
    torch.testing.assert_close(*nlls, rtol=1e-12, atol=0)


def test_the_attention_term_looks_at_no_other_document():
    router = RouterConfig(layers=1, teacher_layers=1, positions=512)
    pair = isolated_pair(router=router)
    batches = []
    for texts in (TEXTS, ["xyzzy " + TEXTS[0], *TEXTS[1:]]):
        windows = pair.encoder.windows(texts)
        batches.append((windows, pair.collator()(windows)))

    for windows, batch in batches:
        anchors = batch.anchors
        for row, window in enumerate(windows):
            begins = {side: document_begins(window, side) for side in SIDES}
            for query in (anchors.queries[row] >= 0).nonzero().flatten():
                anchor = anchors.queries[row, query]
                width = batch.student_ids.shape[1]
                document = (begins["student"] <= int(anchors.student[anchor]) - row * width).sum() - 1
                keys = anchors.key_bytes[row]
                visible = (keys[:, 1] <= anchors.query_bytes[row, query, 1]) & (
                    keys[:, 0] >= anchors.query_begin[row, query]
                )
                visible[0] = False
                own = torch.arange(len(keys)) > int(begins["teacher"][document])
                assert not (visible & ~own).any()


def test_no_anchor_is_the_first_token_of_a_document():
    pair = isolated_pair(router=RouterConfig(layers=1, teacher_layers=1))
    windows = pair.encoder.windows(TEXTS)
    batch = pair.collator()(windows)
    first = batch.student_positions.flatten() == 0
    assert first.sum() > len(windows)
    assert not first[batch.anchors.student].any()
    assert not (batch.teacher_positions.flatten() == 0)[batch.anchors.teacher].any()


def test_a_long_document_keeps_its_context_and_windows_of_one_document_need_no_positions():
    pair = isolated_pair(max_length=16)
    batch = pair.collator()(pair.encoder.windows([" ".join(TEXTS)]))
    plain = tiny.pair_of(*TOKENIZERS["one end of text for both"], max_length=16)
    expected = plain.collator()(plain.encoder.windows([" ".join(TEXTS)]))
    assert batch.student_positions is None
    assert torch.equal(batch.student_ids, expected.student_ids)
    assert torch.equal(batch.labels, expected.labels)


@pytest.mark.usefixtures("in_float64")
def test_the_end_of_a_long_document_keeps_its_context_beside_another_document():
    pair = isolated_pair(max_length=24)
    pair.student.double()
    pair.teacher.double()
    long, short = " ".join(TEXTS), "to play"
    packed = pair.encoder.windows([long, short])
    separate = [*pair.encoder.windows([long]), *pair.encoder.windows([short])]
    assert 1 < len(packed) < len(separate)

    # The span that is read again is no target.
    shared = next(window for window in packed if len(document_begins(window, "student")) > 1)
    roles = shared["student_roles"]
    assert (roles[:2] == MARKER).all()
    losses = [loss_and_gradients(pair, pair.collator()(windows), kd=0.6, lm=0.4)[0] for windows in (packed, separate)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_windows_and_caches_of_isolated_documents_have_another_identity():
    pair = tiny.pair_of(*TOKENIZERS["one end of text for both"])
    assert pair.encoder.isolated().fingerprint != pair.encoder.fingerprint


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2", "Mistral"])
def test_models_that_take_positions_pass_with_either_attention(name):
    model = build(name)
    check_isolation(model, "student")
    model.set_attn_implementation("eager")
    check_isolation(model, "student")


def recurrent():
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def alibi():
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=40, hidden_size=16, n_head=2, n_layer=1))


@pytest.mark.parametrize("make", [recurrent, alibi])
def test_models_that_cannot_are_refused_with_the_reason(make):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    with pytest.raises(ValueError, match=r"isolate_documents: the student .*(takes no position|predicts a doc)"):
        check_isolation(model, "student")


def test_attention_that_ignores_the_mask_is_refused():
    model = tiny.tiny_llama(40)
    plain_forward = model.model.forward
    model.model.forward = lambda position_ids=None, **inputs: plain_forward(**inputs)
    with pytest.raises(ValueError, match="reads across documents"):
        check_isolation(model, "teacher")
