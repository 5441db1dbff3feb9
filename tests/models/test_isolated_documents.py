"""Isolated documents: a window of several is learned from as if each document had a window to itself."""

import pytest
import torch
import transformers

from models.config import RouterConfig
from models.language_model import check_isolation
from models.text.windows import SIDES, document_begins
from models.types import IGNORE
from tests.models import tiny
from tests.models.test_language_model import build

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
    packed = pair.encoder.windows(TEXTS)
    separate = [window for text in TEXTS for window in pair.encoder.windows([text])]
    assert len(packed) < len(separate)

    weights = {"kd": 0.6, "lm": 0.3, "span": 0.4}
    together = loss_and_gradients(pair, pair.collator()(packed), **weights)
    alone = loss_and_gradients(pair, pair.collator()(separate), **weights)
    for value, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        assert value.dtype == torch.float64


@pytest.mark.parametrize("side", SIDES)
def test_logits_of_an_evaluation_are_those_of_separate_windows(side):
    pair = isolated_pair()
    model = getattr(pair, side).double()
    packed = pair.encoder.windows(TEXTS)
    separate = [window for text in TEXTS for window in pair.encoder.windows([text])]

    nlls = []
    for windows in (packed, separate):
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
            for query in (anchors.sampled[row] >= 0).nonzero().flatten():
                anchor = anchors.sampled[row, query]
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
