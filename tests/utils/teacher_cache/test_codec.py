"""Packing keeps what a teacher said about a window: exactly, or within the stated error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.teacher_cache.codec import ADAPTIVE_SHARE, Codec, Said, join, pack_bits, unpack_bits

VOCABULARY = 151_936


def said(rows: int, top_k: int, vocabulary: int = 3000, seed: int = 0, spread: float = 2.5) -> Said:
    """Top-k of random distributions; every fifth row is restricted, one to fewer than k tokens."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, spread, (rows, vocabulary)) - 1.1 * np.log(np.arange(1, vocabulary + 1))
    mass = np.zeros(rows)
    for row in range(0, rows, 5):
        kept = random.random(vocabulary) < (0.5 if row else 2 / vocabulary)
        kept[7] = True
        mass[row] = -1.5
        logits[row, ~kept] = -np.inf
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-log_probs, axis=1, kind="stable")
    top = np.take_along_axis(log_probs, order[:, :top_k], 1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(np.take_along_axis(log_probs, order[:, top_k:], 1)).sum(1))
    numbers = (top, tail, mass, random.normal(-4, 3, rows + 3).clip(max=0))
    return Said(np.where(np.isneginf(top), -1, order[:, :top_k]), *(column.astype(np.float32) for column in numbers))


@given(st.data(), st.integers(1, 31))
def test_numbers_of_any_width_come_back(data, bits):
    numbers = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1))), dtype=np.int64)
    packed = pack_bits(numbers, bits)
    assert len(packed) == -(-len(numbers) * bits // 8)
    assert unpack_bits(np.frombuffer(packed, np.uint8), len(numbers), bits).tolist() == numbers.tolist()


@given(st.integers(0, 12), st.integers(1, 40), st.integers(0, 99))
def test_float32_gives_back_every_bit(rows, top_k, seed):
    codec, before = Codec(3000, top_k, "float32"), said(rows, top_k, seed=seed)
    for there, here in zip(codec.decode(codec.encode(before)), before, strict=True):
        assert there.dtype == here.dtype and np.array_equal(there, here)


@given(st.integers(0, 12), st.integers(1, 40), st.integers(0, 99), st.floats(0.01, 8))
def test_compact_keeps_ids_and_order_and_its_masses_add_to_one(rows, top_k, seed, spread):
    codec, before = Codec(3000, top_k), said(rows, top_k, seed=seed, spread=spread)
    after = codec.decode(codec.encode(before))
    assert np.array_equal(after.ids, before.ids)
    assert np.array_equal(np.isneginf(after.log_probs), after.ids < 0)
    with np.errstate(invalid="ignore"):
        assert not (np.diff(after.log_probs) > 0).any()
    flat = np.exp(before.log_tail) > 0.99  # there the tail's own rounding is more than the rest
    assert np.allclose((np.exp(after.log_probs).sum(1) + np.exp(after.log_tail))[~flat], 1, atol=1e-5)
    assert np.array_equal(after.log_mass == 0, before.log_mass == 0)
    assert np.allclose(after.realised, before.realised, rtol=1e-3)
    # what is packed and unpacked again stays: a signal does not wear out
    assert np.array_equal(codec.decode(codec.encode(after)).ids, before.ids)


@pytest.mark.parametrize("spread", [1.0, 2.5, 4.0])
def test_a_token_of_a_large_vocabulary_takes_200_bytes_and_loses_a_hundredth_of_a_nat(spread):
    codec, before = Codec(VOCABULARY, 64), said(60, 64, VOCABULARY, spread=spread)
    whole = Said(*(column[before.log_mass == 0] for column in before[:4]), before.realised[:48])
    data = codec.encode(whole)
    assert len(data) / len(whole.ids) < 200
    error = np.abs(codec.decode(data).log_probs - whole.log_probs)
    assert error.mean() < 0.01
    assert (error * np.exp(whole.log_probs)).sum(1).mean() < 0.01


def test_errors_of_steps_do_not_add_up():
    before = said(200, 256)
    codec = Codec(3000, 256)
    whole = before.log_mass == 0
    error = np.abs(codec.decode(codec.encode(before)).log_probs[whole] - before.log_probs[whole])
    assert error[:, 200:].mean() < 1.5 * error[:, 2:50].mean() + 0.005


def test_adaptive_keeps_the_fewest_that_hold_the_share_and_moves_the_rest_to_the_tail():
    before = said(60, 256, spread=3.0)
    codec = Codec(3000, "adaptive", "float32")
    after = codec.decode(codec.encode(before))
    for row in range(60):
        probs = np.exp(before.log_probs[row].astype(np.float64))
        wanted = min(int(np.searchsorted(np.cumsum(probs), ADAPTIVE_SHARE) + 1), int((before.ids[row] >= 0).sum()))
        assert (after.ids[row] >= 0).sum() == wanted
        total = np.exp(after.log_probs[row].astype(np.float64)).sum() + np.exp(float(after.log_tail[row]))
        assert total == pytest.approx(1, abs=1e-6)
    assert len(codec.encode(before)) < len(Codec(3000, 256, "float32").encode(before))


def test_windows_are_joined_in_order_and_damage_is_noticed():
    codec, parts = Codec(3000, 16, "float32"), [said(n, 16, seed=n) for n in (3, 0, 5)]
    joined = join([codec.decode(codec.encode(part)) for part in parts])
    assert np.array_equal(joined.ids, np.concatenate([part.ids for part in parts]))
    data = codec.encode(parts[0])
    for damaged in (data[:-1], data + b"\0", data[:5]):
        with pytest.raises(ValueError, match="bytes"):
            codec.decode(damaged)
    with pytest.raises(ValueError, match="expected at most 8"):
        Codec(3000, 8).encode(parts[0])
