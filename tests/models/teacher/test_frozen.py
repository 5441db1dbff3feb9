"""The teacher's answer is its own distribution, whatever the batch, the padding and the chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models.teacher.frozen import FrozenTeacher
from models.teacher.top_k import exact_top_k
from models.types import TeacherSignal
from tests.models.teacher.test_projection import teacher_log_probs
from tests.models.tiny import STORIES, byte_bpe, pair_of, tiny_llama

FIELDS = ("ids", "log_probs", "log_tail", "log_mass", "realised")


@pytest.fixture(scope="module")
def pair():
    return pair_of(byte_bpe(300), byte_bpe(400))


def close(one: TeacherSignal, other: TeacherSignal) -> bool:
    return all(torch.allclose(getattr(one, f).float(), getattr(other, f).float(), atol=1e-5) for f in FIELDS)


@pytest.mark.parametrize("top_k", [1, 3, 64, 10_000])
def test_signal_is_the_float64_top_k_and_its_exact_tail(pair, top_k):
    batch = pair.batch()
    signal, full = pair.frozen().signal(batch, top_k), teacher_log_probs(pair, batch)
    assert signal.ids.shape[1] == min(top_k, 400)
    for row in range(len(batch.depth)):
        p = full[batch.row_teacher[row]].exp()
        if batch.depth[row] > 0:
            p[pair.vocabulary.order[: batch.prefix_lo[row]]] = 0
            p[pair.vocabulary.order[batch.prefix_hi[row] :]] = 0
        mass, kept = p.sum(), signal.ids[row][signal.ids[row] >= 0]
        assert signal.log_mass[row].exp().item() == pytest.approx(mass.item(), rel=1e-4)
        expected = (p / mass).sort(descending=True).values[: len(kept)]
        assert torch.allclose(signal.log_probs[row, : len(kept)].exp().double(), expected, atol=1e-6, rtol=1e-4)
        assert torch.allclose((p / mass)[kept], expected, atol=1e-6, rtol=1e-4)
        assert signal.log_tail[row].exp().item() == pytest.approx((1 - expected.sum()).item(), abs=2e-6)
        assert (signal.log_probs[row, len(kept) :] == -torch.inf).all()


def test_realised_is_the_log_probability_of_the_texts_next_token(pair):
    batch = pair.batch()
    realised, full = pair.frozen().signal(batch, 4).realised, teacher_log_probs(pair, batch)
    at = -1
    for flat in batch.teacher_mask.flatten().nonzero()[:, 0].tolist():
        at += 1
        label = int(batch.teacher_labels.flatten()[flat])
        if label >= 0:
            assert realised[at].item() == pytest.approx(full[flat, label].item(), abs=1e-4)
    assert at + 1 == len(realised)


def test_signals_of_single_windows_are_those_of_the_batch(pair):
    windows, collator, teacher = pair.encoder.windows(STORIES), pair.collator(), pair.frozen()
    single = [teacher.signal(collator([w]), 8) for w in windows]
    together = TeacherSignal(*(torch.cat([getattr(s, f) for s in single]) for f in FIELDS))
    batch = teacher.signal(collator(windows), 8)
    last = torch.tensor([len(s.realised) for s in single]).cumsum(0) - 1
    together.realised[last] = batch.realised[last] = 0  # the text has no token after a window's last
    assert close(together, batch)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_signal_does_not_depend_on_the_size_of_chunks(pair, rows, monkeypatch):
    batch = pair.batch()
    whole = pair.frozen().signal(batch, 8)
    monkeypatch.setattr("models.teacher.frozen.chunk_rows", lambda *_, **__: (rows, "asked for"))
    assert close(pair.frozen().signal(batch, 8), whole)


@given(
    rows=st.integers(0, 3),
    width=st.integers(1, 3000),
    k=st.integers(1, 40),
    kinds=st.integers(1, 50),
    seed=st.integers(0, 2**16),
)
def test_top_k_in_blocks_is_top_k_also_among_equals(rows, width, k, kinds, seed):
    k = min(k, width)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, kinds, (rows, width), generator=generator).float()
    values[values == 0] = -torch.inf
    top, columns = exact_top_k(values, k)
    assert torch.equal(top, values.topk(k)[0])
    assert torch.equal(values.gather(1, columns), top)
    assert all(len(set(row)) == k for row in columns.tolist())


def test_teacher_is_no_module_and_cannot_be_trained(pair):
    model = tiny_llama(400).train()
    teacher = FrozenTeacher(model, pair.vocabulary)
    assert not isinstance(teacher, nn.Module)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(getattr(teacher.signal(pair.batch(), 4), f).requires_grad for f in FIELDS)


def test_a_model_that_is_refused_stays_as_it_was(pair):
    model = tiny_llama(41).train()
    with pytest.raises(ValueError, match="the teacher's head has 41 rows"):
        FrozenTeacher(model, pair.vocabulary)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_map_for_another_head_is_refused(pair):
    with pytest.raises(ValueError, match="teacher_vocab_size=448"):
        FrozenTeacher(tiny_llama(448), pair.vocabulary)


def test_a_half_precision_teacher_speaks_float32_also_under_autocast(pair):
    batch = pair.batch()
    teacher = FrozenTeacher(tiny_llama(400, seed=2).to(torch.bfloat16), pair.vocabulary)
    plain = teacher.signal(batch, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(teacher.signal(batch, 8), plain)
    assert plain.log_probs.dtype == plain.realised.dtype == torch.float32


def test_a_batch_without_anchors_gives_a_signal_without_rows(pair):
    collator = pair.collator()
    window = pair.encoder.windows(STORIES[:1])[0]
    for column in ("teacher_starts", "teacher_ends"):
        window[column] = window[column] + 1000  # nothing is read by both
    batch = collator([window])
    assert batch.counts["kd"] == 0
    signal = pair.frozen().signal(batch, 8)
    assert signal.ids.shape == (0, 8) and signal.log_mass.shape == (0,)
    assert len(signal.realised) == int(batch.teacher_mask.sum())


def test_a_teacher_follows_its_model_to_another_device():
    """And the framework's tables its student."""
    pair = pair_of(byte_bpe(300), byte_bpe(400))
    teacher, framework = pair.frozen(), pair.framework({"lm": 0.3, "kd": 0.7})
    assert teacher.device.type == framework.projection.segments.device.type == "cpu"
    with FakeTensorMode(allow_non_fake_inputs=True):
        pair.teacher.get_output_embeddings().weight = torch.nn.Parameter(torch.empty(400, 16, device="cuda"))
        assert teacher.device.type == "cuda"


def test_the_frameworks_tables_are_moved_with_it_and_not_in_its_first_step():
    pair = pair_of(byte_bpe(300), byte_bpe(400))
    framework, moved = pair.framework({"lm": 0.3, "kd": 0.7}), []
    framework.projection.to = moved.append
    framework.to(torch.float64)
    assert moved == [torch.device("cpu")]
