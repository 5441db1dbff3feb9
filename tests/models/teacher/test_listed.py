"""Lists of a teacher's most probable tokens tell what its model says, or rows are left out."""

import functools

import pytest
import torch

from models.teacher import listed as listed_module
from models.teacher.listed import UNKNOWN, ListedReader, ListedTokens
from models.teacher.projection import Projection
from tests.models.teacher.test_projection import PAIRS, TEXTS, teacher_log_probs
from tests.models.tiny import STORIES, gradients

FIELDS = ("ids", "log_probs", "log_tail", "log_mass")


@functools.cache
def case(name: str):
    """A pair, a batch, and its teacher's whole distributions [B * T, V] in float64."""
    pair = PAIRS[name]()
    # Random weights are nearly uniform; a trained teacher has few likely tokens.
    head = pair.teacher.get_output_embeddings().weight
    head.data *= 2
    batch = pair.batch(TEXTS.get(name, STORIES))
    return pair, batch, teacher_log_probs(pair, batch)


def lists(batch, log_probs: torch.Tensor, k: int) -> ListedTokens:
    """The k most probable tokens of each position, and the real one's log-probability."""
    rows = log_probs[batch.teacher_held]
    top = rows.topk(min(k, rows.shape[1]))
    real = batch.teacher_ids.flatten().roll(-1)[batch.teacher_held]
    return ListedTokens(top.indices, top.values.float(), rows.gather(1, real[:, None])[:, 0].float())


def masses(ids: torch.Tensor, probs: torch.Tensor, size: int) -> torch.Tensor:
    """[N, size] masses by token."""
    dense = torch.zeros(len(ids), size + 1, dtype=torch.float64)
    return dense.scatter_add_(1, ids % (size + 1), probs.double())[:, :size]


def whole_rows(pair, batch, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] every row's distribution, restricted to what was read, and its mass; from the definition, in float64."""
    probs = log_probs[batch.row_teacher].exp()
    for row, (low, high) in enumerate(zip(batch.prefix_lo.tolist(), batch.prefix_hi.tolist(), strict=True)):
        if batch.depth[row] > 0:
            begins = torch.zeros(probs.shape[1], dtype=torch.bool)
            begins[pair.vocabulary.order[low:high]] = True
            probs[row, ~begins] = 0
    mass = probs.sum(1)
    return probs / mass[:, None], mass


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("top_k", [3, 10_000])
def test_lists_of_the_whole_vocabulary_give_the_signal_of_the_model(name, top_k):
    pair, batch, log_probs = case(name)
    size = log_probs.shape[1]
    signal = ListedReader(pair.vocabulary)(lists(batch, log_probs, size), batch, top_k)
    local = pair.frozen().signal(batch, top_k)

    assert signal.ids.shape == local.ids.shape
    for ours, theirs in ((signal, local), (local, signal)):
        ours_dense = masses(ours.ids, ours.log_probs.exp(), size)
        assert torch.allclose(ours_dense, masses(theirs.ids, theirs.log_probs.exp(), size), atol=2e-6)
    for field in ("log_tail", "log_mass"):
        assert torch.allclose(getattr(signal, field).exp(), getattr(local, field).exp(), atol=2e-6)
    real = batch.teacher_labels.flatten()[batch.teacher_held] >= 0
    assert torch.allclose(signal.realised[real], local.realised[real], atol=2e-5)

    for correction in ("none", "span"):
        projection = Projection(pair.vocabulary, correction, 1e-3)
        target, expected = projection(signal, batch), projection(local, batch)
        assert torch.equal(target.valid, expected.valid)
        students = pair.vocabulary.student_vocab_size
        dense = masses(target.ids, target.probs, students)[expected.valid]
        assert torch.allclose(dense, masses(expected.ids, expected.probs, students)[expected.valid], atol=5e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("k", [2, 8, 32])
def test_short_lists_give_the_same_rows_within_their_bounds_or_leave_them_out(name, k):
    pair, batch, log_probs = case(name)
    size = log_probs.shape[1]
    signal = ListedReader(pair.vocabulary)(lists(batch, log_probs, k), batch, k)
    exact, exact_mass = whole_rows(pair, batch, log_probs)
    is_told = signal.log_mass != UNKNOWN
    shallow = batch.depth == 0
    assert is_told[shallow].all()

    # At depth 0 nothing is lost.
    listed = masses(signal.ids, signal.log_probs.exp(), size)
    assert torch.allclose(listed[shallow], torch.where(listed > 0, exact, 0)[shallow], atol=1e-6)

    # Deeper, the mass is right within the share that may be unlisted, and so is every probability.
    slack = 1 / listed_module.LEAST_LISTED_SHARE
    ratio = signal.log_mass.double().exp()[is_told] / exact_mass[is_told]
    assert (ratio <= slack + 1e-5).all() and (ratio >= 1 / slack - 1e-5).all()
    scale = torch.where(listed > 0, exact, 0)[is_told] * slack
    assert (listed[is_told] <= scale + 1e-5).all()
    assert (listed[is_told] >= torch.where(listed > 0, exact, 0)[is_told] / slack - 1e-5).all()

    # Listed tokens stand to each other exactly as in the model.
    ratios = torch.where(listed > 0, listed / exact.clamp_min(1e-300), torch.nan)[is_told]
    spread = ratios.nan_to_num(-torch.inf).amax(1) / ratios.nan_to_num(torch.inf).amin(1)
    assert torch.allclose(spread, torch.ones_like(spread), rtol=1e-4)

    # Masses and tail add to 1.
    total = signal.log_probs.exp().sum(1) + signal.log_tail.exp()
    assert torch.allclose(total[is_told], torch.ones_like(total[is_told]), atol=1e-5)


def test_more_listed_tokens_leave_fewer_rows_out_and_none_at_last():
    pair, batch, log_probs = case("finer student")
    reader = ListedReader(pair.vocabulary)
    lost = []
    for k in (1, 8, 64, 400):
        signal = reader(lists(batch, log_probs, k), batch, k)
        lost.append(int((signal.log_mass == UNKNOWN).sum()))
        # Rows that are left out do not count, whatever the least mass.
        valid = Projection(pair.vocabulary, "span", 0.0)(signal, batch).valid
        assert not valid[signal.log_mass == UNKNOWN].any()
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0 == lost[-1]


def test_the_order_of_a_list_and_its_padding_do_not_matter():
    pair, batch, log_probs = case("crossing boundaries")
    reader = ListedReader(pair.vocabulary)
    plain = lists(batch, log_probs, 16)
    padding = torch.full_like(plain.ids[:, :3], -1)
    ids = torch.cat([padding, plain.ids.flip(1)], 1)
    shuffled = ListedTokens(
        ids=ids,
        log_probs=torch.cat([torch.full(padding.shape, -torch.inf), plain.log_probs.flip(1)], 1),
        realised=plain.realised,
    )
    signal, expected = reader(shuffled, batch, 16), reader(plain, batch, 16)
    for field in FIELDS:
        assert torch.equal(getattr(signal, field), getattr(expected, field))


def test_a_position_without_a_list_is_left_out():
    pair, batch, log_probs = case("crossing boundaries")
    plain = lists(batch, log_probs, 16)
    ids, values = plain.ids.clone(), plain.log_probs.clone()
    ids[:], values[:] = -1, -torch.inf
    signal = ListedReader(pair.vocabulary)(ListedTokens(ids, values, plain.realised), batch, 16)
    assert (signal.log_mass == UNKNOWN).all()
    assert not Projection(pair.vocabulary, "span", 0.0)(signal, batch).valid.any()


def test_no_row_has_its_anchor_at_the_last_position_of_a_window():
    """Behind a window's last token a server that scores the text lists nothing."""
    for name in PAIRS:
        _, batch, _ = case(name)
        is_token = batch.teacher_mask.flatten().roll(-1)[batch.row_teacher]
        width = batch.teacher_ids.shape[1]
        assert is_token.all()
        assert (batch.row_teacher % width < width - 1).all()


def test_lists_of_something_else_are_refused():
    pair, batch, log_probs = case("crossing boundaries")
    reader, plain = ListedReader(pair.vocabulary), lists(batch, log_probs, 4)
    with pytest.raises(ValueError, match="one for each teacher token of the batch"):
        reader(ListedTokens(plain.ids[1:], plain.log_probs[1:], plain.realised[1:]), batch, 4)
    with pytest.raises(ValueError, match="got the token 340 of a vocabulary of 340"):
        reader(ListedTokens(plain.ids + 340 - plain.ids.max(), plain.log_probs, plain.realised), batch, 4)


@pytest.mark.parametrize("name", PAIRS)
def test_positions_without_a_list_are_left_out_and_everything_stays_finite(name):
    """Lists are missing at every second position, as in text that was not captured; some are in rows at depth > 0."""
    pair, batch, log_probs = case(name)
    listed = lists(batch, log_probs, 64)
    is_empty = torch.arange(len(listed.ids)) % 2 == 0
    listed = ListedTokens(
        ids=torch.where(is_empty[:, None], -1, listed.ids),
        log_probs=torch.where(is_empty[:, None], -torch.inf, listed.log_probs),
        realised=listed.realised,
    )
    signal = ListedReader(pair.vocabulary)(listed, batch, 64)
    is_unknown = is_empty[batch.asked[batch.row_asked]]
    assert (signal.log_mass[is_unknown] == UNKNOWN).all()
    assert not any(getattr(signal, field).isnan().any() for field in FIELDS)

    module = pair.framework({"kd": 1.0}, top_k=64)
    module.zero_grad()
    module(batch, signal=signal).loss.backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(module))
