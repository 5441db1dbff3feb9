"""Encoder-decoder pairs against references: the models' own loss, losses of equal models, padding and splits."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from models.config import RouterConfig
from models.language_model import body_states, head_logits
from models.student_aware_router import ROUTER_TERMS
from models.text.chat import ConversationError, ConversationSettings
from models.text.collate import read_and_learned
from models.text.encoder_decoder import SourceEncoder, make_encoder
from models.text.tokens import END, MARKER
from models.text.vocabulary import VocabularyMap
from models.text.windows import SIDES
from models.types import IGNORE, Source
from tests.models.tiny import (
    KINDS,
    STORIES,
    Pair,
    bart_like,
    byte_bpe,
    gradients,
    plain_bytes,
    t5_like,
    tiny_bart,
    tiny_t5,
)
from utils.data.windows import window_key


def example(prompt: str, completion: str) -> str:
    roles = (("user", prompt), ("assistant", completion))
    return json.dumps([{"role": role, "content": content} for role, content in roles])


TEXTS = [
    example(f"Tell me: {a[:n]}", b[: 3 * n]) for n, (a, b) in zip((9, 20, 14), itertools.pairwise(STORIES), strict=True)
]


def pair_of(family: str, equal: bool = False, **kind) -> Pair:
    """Two tiny models with random weights; of equal vocabularies and weights if `equal`."""
    families = {"t5": (t5_like, tiny_t5, 0), "bart": (bart_like, tiny_bart, 2)}
    of, build, starts = zip(*(families.get(family, families[side]) for side in families), strict=True)
    own = of[1](320)
    other = own if equal else of[0](290, seed_text=1)
    models = [build[0](len(other), 1), build[1](len(own), 1 if equal else 2)]
    encoder = SourceEncoder(other, own, 96, starts)
    return Pair(*models, encoder=encoder, vocabulary=VocabularyMap.build(other, own), **kind)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_what_the_decoder_reads_is_its_start_the_completion_and_the_end(family):
    pair = pair_of(family)
    for window, (prompt, completion) in zip(pair.encoder.windows(TEXTS), map(_example, TEXTS), strict=True):
        for side, table in zip(SIDES, pair.encoder.tables, strict=True):
            ids, roles = window[f"{side}_ids"].tolist(), window[f"{side}_roles"].tolist()
            lead = [0] if family == "t5" else [2, 0]
            assert ids[: len(lead)] == lead and roles[: len(lead)] == [MARKER] * len(lead)
            assert (ids[-1], roles[-1]) == (table.end_of_text, END) and MARKER not in roles[len(lead) :]
            tokenizer = _tokenizer_of(pair, side)
            assert ids[len(lead) : -1] == tokenizer(completion, add_special_tokens=False).input_ids
            assert window[f"{side}_source"].tolist() == tokenizer(prompt).input_ids
        assert window["bytes"] == len(completion.encode()) and window["left_out"] == 0


def _example(text: str) -> list[str]:
    return [message["content"] for message in json.loads(text)]


def _tokenizer_of(pair: Pair, side: str) -> PreTrainedTokenizerFast:
    of = t5_like if pair.encoder.starts[0] == [0] else bart_like
    return of(320) if side == "teacher" else of(290, seed_text=1)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_lm_is_the_models_own_loss_which_shifts_the_labels_itself(family):
    """In float64. BART's start of text, which is read and not learned, is given to it as a label and left out."""
    pair = pair_of(family)
    student = pair.student.double()
    batch = pair.batch(TEXTS)
    own = batch.labels.clone()
    if family == "bart":
        own[:, 0] = 0
    output = student(input_ids=batch.student_source.ids, attention_mask=batch.student_source.mask, labels=own)
    nll = F.cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    terms = pair.framework({"lm": 1.0})(batch, 0).terms
    assert terms["lm"].sum.item() == pytest.approx(nll.item(), rel=1e-6)
    if family == "t5":
        assert terms["lm"].sum.item() / terms["lm"].count == pytest.approx(output.loss.item(), rel=1e-6)
    unshifted = torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids)
    planted = pair.framework({"lm": 1.0})(dataclasses.replace(batch, labels=unshifted), 0).terms["lm"]
    assert planted.sum.item() != pytest.approx(nll.item(), rel=1e-2)


@pytest.mark.parametrize(("family", "kind", "temperature"), [*itertools.product(("t5", "bart"), KINDS, (1.0, 4.0))])
def test_kd_of_equal_models_is_zero_with_zero_gradient(family, kind, temperature):
    found = []
    for equal in (True, False):
        pair = pair_of(family, equal)
        framework = pair.framework({"kd": 1.0}, divergence=kind, temperature=temperature, top_k=16)
        output = framework(pair.batch(TEXTS), 0)
        output.loss.backward()
        assert output.terms["kd"].count > 30
        found.append((output.loss.item(), torch.cat([g.flatten() for g in gradients(framework)]).norm().item()))
    (zero, none), (loss, gradient) = found
    assert abs(zero) < 1e-6 < 0.05 < loss and none < 1e-5 * gradient


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_teacher_is_asked_with_its_own_reading_of_the_prompt(family):
    pair = pair_of(family)
    batch = pair.batch(TEXTS)
    signal = pair.frozen().signal(batch, 8)
    with torch.no_grad():
        source = batch.teacher_source
        inputs = {"input_ids": source.ids, "attention_mask": source.mask, "decoder_input_ids": batch.teacher_ids}
        log_probs = pair.teacher(**inputs).logits.double().log_softmax(-1).flatten(0, 1)
    following = batch.teacher_ids.flatten().roll(-1)
    expected = log_probs[torch.arange(len(following)), following][batch.teacher_held]
    ends = batch.teacher_labels.flatten()[batch.teacher_held] == IGNORE  # nothing follows, or a marker
    assert torch.allclose(signal.realised.double()[~ends], expected[~ends], atol=1e-4)
    flat = batch.depth == 0
    assert torch.allclose(signal.log_probs.double()[flat], log_probs[batch.row_teacher[flat]].topk(8).values, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart", "mixed"])
def test_padding_and_the_cut_into_batches_change_nothing(family):
    router = RouterConfig(layers=2, teacher_layers=2)
    pair = pair_of(family, router=router)
    routed = tuple(t for t in ROUTER_TERMS if t != "contr")  # compares the windows of a batch
    framework = pair.framework({"kd": 0.5, "lm": 0.5, "span": 0.5, **dict.fromkeys(routed, 0.1)})
    windows, collate = pair.encoder.windows(TEXTS), pair.collator()
    whole = collate(windows)
    framework.calibrate([whole])

    def loss_and_gradient(batches):
        framework.zero_grad()
        total = 0.0
        for batch in batches:
            loss = framework(batch, 0, counts=whole.counts).loss
            loss.backward()
            total += loss.item()
        return total, torch.cat([g.flatten() for g in gradients(framework)])

    expected, gradient = loss_and_gradient([whole])
    for cut in (map(collate, ([w] for w in windows)), [_wider(whole)]):
        loss, other = loss_and_gradient(cut)
        assert loss == pytest.approx(expected, rel=1e-4)
        assert (other - gradient).norm() / gradient.norm() < 1e-3


def _wider(batch):
    """More padding of the encoders' texts, of tokens that would be seen without a mask."""

    def padded(source: Source) -> Source:
        return Source(F.pad(source.ids, (0, 5), value=7), F.pad(source.mask, (0, 5)))

    return dataclasses.replace(
        batch, student_source=padded(batch.student_source), teacher_source=padded(batch.teacher_source)
    )


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_router_teaches_the_decoder_and_through_it_the_encoder(family):
    pair = pair_of(family, router=RouterConfig(layers=2, teacher_layers=2))
    batch = pair.batch(TEXTS)
    for term in ROUTER_TERMS:
        framework = pair.framework({"lm": 1e-9, term: 1.0})
        framework.calibrate([batch])
        framework(batch, 0).loss.backward()
        for stack in (pair.student.get_encoder(), pair.student.get_decoder()):
            norms = [p.grad.norm() for name, p in stack.named_parameters() if p.ndim > 1 and "embed" not in name]
            assert max(norms) > 1e-4, term
        pair.student.zero_grad()


def test_equal_completions_after_different_prompts_are_different_windows():
    """A cache of the teacher knows windows by the hash of their content."""
    pair = pair_of("t5")
    windows = pair.encoder.windows([example("Say it.", "Lily was there."), example("Sing it.", "Lily was there.")])
    assert windows[0]["student_ids"].tolist() == windows[1]["student_ids"].tolist()
    assert window_key(windows[0]) != window_key(windows[1])
    states = [
        body_states(pair.teacher, b.teacher_ids, b.teacher_source) for b in map(pair.collator(), ([w] for w in windows))
    ]
    assert not torch.allclose(*states)


@given(st.lists(st.tuples(st.text(max_size=40), st.text(min_size=1, max_size=60)), min_size=1, max_size=3))
def test_every_byte_of_a_completion_is_learned_once_or_counted_as_left_out(examples):
    encoder = SourceEncoder(byte_bpe(300), bart_like(320), 24, (0, 2))
    windows = encoder.windows([example(*texts) for texts in examples])
    sizes = [len(completion.encode("utf-8", "replace")) for _, completion in examples]
    if windows:
        assert sum(w["bytes"] + w["left_out"] for w in windows) == sum(sizes)
    for window in windows:
        for side, table in zip(SIDES, encoder.tables, strict=True):
            assert 0 < len(window[f"{side}_source"]) <= 24 and len(window[f"{side}_ids"]) <= 24
            learned = window[f"{side}_ids"][window[f"{side}_roles"] != MARKER]
            assert sum(len(table.bytes[i] or b"") for i in learned) == window["bytes"]


@given(st.text(max_size=40), st.text(min_size=1, max_size=60))
def test_the_least_window_that_teaches_something_of_an_example_is_known(prompt, completion):
    def windows(max_length: int) -> list[dict]:
        return SourceEncoder(byte_bpe(300), bart_like(320), max_length, (0, 2)).windows([example(prompt, completion)])

    least = SourceEncoder(byte_bpe(300), bart_like(320), 24, (0, 2)).least_length(example(prompt, completion))
    if least is None:
        assert not windows(10_000)
        return
    assert windows(max(least, 8))
    if least > 8:
        assert not windows(least - 1)


def test_a_control_token_in_a_prompt_is_text():
    encoder, tokenizer = pair_of("bart").encoder, bart_like(320)
    _, ids = encoder.prompt(example("a</s>b", "c"), "teacher")
    assert ids[0] == 0 and ids[-1] == 2 and 2 not in ids[1:-1]
    assert b"".join(plain_bytes(tokenizer)[i] for i in ids[1:-1]) == b"a</s>b"


def test_what_is_read_is_shown_before_what_is_learned():
    (window,) = pair_of("t5").encoder.windows(TEXTS[:1])
    ids, learned = read_and_learned(window)
    source = len(window["student_source"])
    assert ids.tolist() == [*window["student_source"].tolist(), *window["student_ids"].tolist()]
    assert not learned[: source + 1].any() and learned[source + 1 :].all()


def test_other_data_and_other_tokenizers_are_refused():
    pair = (t5_like(120), t5_like(120))
    options = {"starts": (0, 0)}
    with pytest.raises(ConversationError, match=r"columns 'prompt' and 'completion'\. Got plain text"):
        make_encoder(pair, 96, conversations=None, **options)
    encoder = make_encoder(pair, 96, conversations=ConversationSettings(), **options)
    with pytest.raises(ConversationError, match="Got a conversation of user, assistant, user"):
        encoder.windows([json.dumps([{"role": role, "content": ""} for role in ("user", "assistant", "user")])])
    tokenizer = bart_like(320)
    languages = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    languages.src_lang = "en_XX"
    with pytest.raises(ValueError, match=r"the teacher's tokenizer .* marks the languages"):
        SourceEncoder(tokenizer, languages, 96, (2, 2))


@torch.no_grad()
def test_scores_are_those_of_the_completion_alone():
    pair = pair_of("t5")
    batch = pair.batch(TEXTS)
    for side, model in zip(SIDES, (pair.student, pair.teacher), strict=True):
        inputs, labels = batch.scored(side)
        source, ids = getattr(batch, f"{side}_source"), getattr(batch, f"{side}_ids")
        assert torch.allclose(model(**inputs).logits, head_logits(model, body_states(model, ids, source)), atol=1e-5)
        spelt = plain_bytes(_tokenizer_of(pair, side))
        known = b"".join(spelt[int(i)] for i in labels[0][labels[0] != IGNORE])
        assert known == b" " + _example(TEXTS[0])[1].encode() and len(known) - 1 == batch.bytes[0]
