"""Equality where it must hold, and mistakes that must be caught: whole models, from text to gradient."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.text.collate import PairCollator
from models.types import IGNORE
from tests.models.tiny import (
    KINDS,
    STORIES,
    Pair,
    byte_bpe,
    characters,
    gradients,
    metaspace,
    pad_further,
    pair_of,
    permuted,
    tiny_llama,
    wordpiece,
)

TAILS = ("bucket", "renormalise")
TEMPERATURES = (1.0, 2.0, 4.0)
FEWEST = {"bucket": 1, "renormalise": 2}
"""Tokens that a tail leaves something to learn with."""
TOKENIZERS = {"byte-level": lambda: byte_bpe(300), "Metaspace": metaspace, "WordPiece": wordpiece, "chars": characters}


def twins(tokenizer, model=None) -> Pair:
    model = tiny_llama(len(tokenizer)) if model is None else model
    return pair_of(tokenizer, tokenizer, student=model, teacher=copy.deepcopy(model))


def term(pair: Pair, batch, name: str, **loss) -> tuple[float, float]:
    """(value per item, largest gradient) of one term."""
    pair.student.zero_grad()
    output = pair.framework({name: 1.0}, **loss)(batch)
    output.loss.backward()
    return output.loss.item(), max(g.abs().max().item() for g in gradients(pair.student))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_student_equal_to_teacher_has_kd_zero_and_no_gradient(name, kind):
    pair = twins(TOKENIZERS[name]())
    batch = pair.batch()
    for tail in TAILS:
        for temperature in TEMPERATURES:
            for top_k in (FEWEST[tail], 3, 256, 10_000):
                options = {"tail": tail, "temperature": temperature, "top_k": top_k, "divergence": kind}
                loss, gradient = term(pair, batch, "kd", **options)
                assert abs(loss) <= 1e-6, options
                assert gradient <= 1e-5, options


@pytest.mark.parametrize("kind", KINDS)
def test_student_equal_to_teacher_has_span_zero_and_no_gradient(kind):
    pair = twins(byte_bpe(300))
    for temperature in TEMPERATURES:
        loss, gradient = term(pair, pair.batch(), "span", span_temperature=temperature, divergence=kind)
        assert abs(loss) <= 1e-6
        assert gradient <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_equal_to_its_teacher_has_kd_and_span_zero(kind, real_models_dir):
    folder = real_models_dir / "models" / "stories260k-llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pair = twins(tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    batch = pair.batch(STORIES[:1])
    for tail in TAILS:
        for temperature in TEMPERATURES:
            for top_k in (FEWEST[tail], 3, 256, 10_000):
                options = {"tail": tail, "temperature": temperature, "top_k": top_k, "divergence": kind}
                loss, gradient = term(pair, batch, "kd", **options)
                assert abs(loss) <= 1e-6, options
                assert gradient <= 1e-4, options
    loss, gradient = term(pair, batch, "span", divergence=kind)
    assert abs(loss) <= 1e-6
    assert gradient <= 1e-4


@pytest.mark.parametrize("shifted", ["row_asked", "row_supervised"])
def test_anchors_shifted_by_one_are_caught(shifted):
    """Equal models, rows moved to a neighbour: what was 0 is far from it."""
    pair = twins(byte_bpe(300))
    batch = pair.batch()
    order = getattr(batch, shifted).clone()
    setattr(batch, shifted, torch.cat([order[1:], order[-1:]]))
    assert term(pair, batch, "kd")[0] > 0.1


class Copier(torch.nn.Module):
    """A student that predicts, with certainty, the token it has just read."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        size = model.config.vocab_size
        with torch.no_grad():
            for p in model.model.layers.parameters():
                p.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(size))
            model.lm_head.weight.copy_(10 * torch.eye(size))


def test_labels_shifted_by_one_are_caught():
    """A copier does badly on text, and would be perfect if labels were the inputs."""
    tokenizer = byte_bpe(300)
    student = Copier(tiny_llama(300, width=300)).model
    pair = pair_of(tokenizer, tokenizer, student=student)
    batch = pair.batch()
    right = pair.framework({"lm": 1.0})(batch).loss.item()
    batch.labels = torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids)
    wrong = pair.framework({"lm": 1.0})(batch).loss.item()
    assert right > np.log(300)
    assert wrong < 0.01


@pytest.mark.parametrize("top_k", [1, 3, 50, 300])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_same_tokenizer_is_plain_top_k_kd_with_a_bucket(top_k, temperature):
    """From the full logits of both models in float64; the teacher's end of text is the only special token."""
    tokenizer = byte_bpe(300)
    pair = pair_of(tokenizer, tokenizer, student=tiny_llama(300, seed=1), teacher=tiny_llama(300, seed=2))
    windows, expected, count = pair.encoder.windows(STORIES), 0.0, 0

    for window in windows:
        ids = torch.tensor(window["student_ids"]).long()[None]
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits[0].double().softmax(-1) for m in (pair.teacher, pair.student))

        for j in np.flatnonzero(window["student_roles"][1:] != 0):
            kept = p[j].topk(top_k).indices
            both = [torch.cat([d[j][kept], (1 - d[j][kept].sum()).clamp_min(1e-12)[None]]) for d in (p, q)]
            # The whole vocabulary leaves no bucket.
            if top_k == 300:
                both = [d[:-1] for d in both]
            a, b = (d ** (1 / temperature) / (d ** (1 / temperature)).sum() for d in both)
            expected += float((a * (a / b).log()).sum()) * temperature**2
            count += 1

    batch = pair.collator()(windows)
    assert batch.counts["kd"] == batch.counts["depth0"] == batch.counts["lm"] == count
    found = pair.framework({"kd": 1.0}, top_k=top_k, temperature=temperature)(batch).terms["kd"].sum.item()
    # a bucket that is empty counts as 1e-7
    assert found == pytest.approx(expected, rel=1e-4 if top_k < 300 else 2e-2 * (temperature > 1) + 1e-4)


def renumbered(model, permutation: list[int]):
    """The same function on renumbered tokens."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for mine, theirs in zip(
            (other.get_input_embeddings(), other.get_output_embeddings()),
            (model.get_input_embeddings(), model.get_output_embeddings()),
            strict=True,
        ):
            mine.weight[permutation] = theirs.weight
    return other


@pytest.mark.parametrize("name", ["byte-level", "Metaspace"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_with_permuted_vocabulary_has_kd_zero_against_itself(name, kind):
    tokenizer = TOKENIZERS[name]()
    permutation = np.random.default_rng(0).permutation(len(tokenizer)).tolist()
    teacher = tiny_llama(len(tokenizer))
    pair = pair_of(
        permuted(tokenizer, permutation), tokenizer, student=renumbered(teacher, permutation), teacher=teacher
    )
    batch = pair.batch()
    assert not torch.equal(batch.student_ids, batch.teacher_ids)
    for tail in TAILS:
        for top_k in (FEWEST[tail], 3, 256):
            loss, gradient = term(pair, batch, "kd", tail=tail, top_k=top_k, divergence=kind, temperature=2.0)
            assert abs(loss) <= 1e-6
            assert gradient <= 1e-5


@pytest.fixture(scope="module")
def different():
    pair = pair_of(byte_bpe(300), byte_bpe(400))
    return pair, pair.encoder.windows(STORIES + STORIES[:1])


def sums(pair: Pair, batch) -> dict[str, float]:
    weights = {"kd": 1.0, "span": 1.0, "lm": 1.0}
    return {name: term.sum.item() for name, term in pair.framework(weights, top_k=16)(batch).terms.items()}


def test_padding_changes_no_sum(different, monkeypatch):
    pair, windows = different
    plain = sums(pair, pair.collator()(windows))
    pad_further(monkeypatch)
    padded = pair.collator()(windows)
    assert padded.student_ids.shape[1] > max(len(w["student_ids"]) for w in windows)
    assert sums(pair, padded) == pytest.approx(plain, rel=1e-5)


def test_split_and_order_of_a_batch_change_no_sum(different):
    pair, windows = different
    collate = pair.collator()
    whole = sums(pair, collate(windows))
    single = [sums(pair, collate([w])) for w in windows]
    assert {name: sum(s[name] for s in single) for name in whole} == pytest.approx(whole, rel=1e-5)
    assert sums(pair, collate(windows[::-1])) == pytest.approx(whole, rel=1e-5)


def test_depth_zero_only_is_the_same_as_leaving_out_deeper_rows(different):
    pair, windows = different
    shallow = PairCollator(pair.vocabulary, pair.encoder.end_of_text, 0)(windows)
    deep = pair.collator()(windows)
    assert shallow.row_student.tolist() == deep.row_student[deep.depth == 0].tolist()
    assert shallow.counts["kd"] == shallow.counts["depth0"] == deep.counts["depth0"] < deep.counts["kd"]
    assert shallow.counts["lm"] == deep.counts["lm"]
