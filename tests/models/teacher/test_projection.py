"""The projected target against dictionaries filled token by token, and against enumeration of all strings."""

import functools
import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from models.teacher.projection import Projection
from models.text.collate import count_channel
from models.types import PairedBatch
from tests.models.tiny import STORIES, Pair, byte_bpe, characters, from_merges, metaspace, pair_of, plain_bytes

PAIRS = {
    "finer student": lambda: pair_of(byte_bpe(300), byte_bpe(400)),
    "coarser student": lambda: pair_of(byte_bpe(400), byte_bpe(300)),
    "crossing boundaries": lambda: pair_of(byte_bpe(340, 2), byte_bpe(340, 0)),
    "SentencePiece teacher": lambda: pair_of(byte_bpe(340), metaspace()),
    "characters": lambda: pair_of(characters(), byte_bpe(400)),
    "from inside of one token into the next": lambda: pair_of(
        from_merges(["a", "b", "ba"]), from_merges(["a", "b", "ab"])
    ),
}
TEXTS = {"from inside of one token into the next": ["abaabaaab", "abaabbabaa"]}
cached = functools.cache(lambda name: PAIRS[name]())


@torch.no_grad()
def teacher_log_probs(pair: Pair, batch: PairedBatch) -> torch.Tensor:
    """[B * T, V] float64 from the model's own logits, windows one by one without padding."""
    width = batch.teacher_ids.shape[1]
    rows = torch.zeros(batch.teacher_ids.numel(), len(pair.vocabulary.segments), dtype=torch.float64)
    model = pair.teacher.double()
    for b, (ids, mask) in enumerate(zip(batch.teacher_ids, batch.teacher_mask, strict=True)):
        size = int(mask.sum())
        rows[b * width : b * width + size] = model(input_ids=ids[None, :size]).logits[0].log_softmax(-1)
    pair.teacher.float()
    return rows


def reference_target(pair: Pair, batch: PairedBatch, log_probs, row: int, top_k: int, correction: str):
    """({student token: mass}, tail, log mass of the prefix) of one row, from definitions alone."""
    segments = [[int(s) for s in segment if s >= 0] for segment in pair.vocabulary.segments]
    anchor, depth = int(batch.row_teacher[row]), int(batch.depth[row])
    at = int(batch.row_student[row])
    ids = batch.student_ids.flatten().tolist()
    read, real = ids[at + 1 - depth : at + 1], ids[at + 1]

    # The tokens that begin with what was read, and the most likely of them.
    p = log_probs[anchor].exp().tolist()
    fits = {t: p[t] for t in range(len(p)) if segments[t][:depth] == read or depth == 0}
    mass = sum(fits.values())
    kept = sorted(fits, key=lambda t: -fits[t])[:top_k]

    target, tail = defaultdict(float), 1.0
    for t in kept:
        spread = {segments[t][depth]: 1.0} if len(segments[t]) > depth else {}
        if correction == "channel" and depth == 0:
            channel = zip(pair.vocabulary.channel_ids[t], pair.vocabulary.channel_probs[t], strict=True)
            spread = {int(i): float(c) for i, c in channel if i >= 0}
        for s, share in spread.items():
            target[s] += share * fits[t] / mass
            tail -= share * fits[t] / mass

    # The text's own string is known whole: its mass goes to the real next token, away from its first piece.
    pieces = int(batch.pieces[row])
    if correction == "span" and pieces > 1:
        tokens = batch.teacher_ids.flatten().tolist()[anchor + 1 : anchor + 1 + pieces]
        string = math.exp(sum(float(log_probs[anchor + n, t]) for n, t in enumerate(tokens))) / mass
        target[real] += string
        if tokens[0] in kept and len(segments[tokens[0]]) > depth:
            target[segments[tokens[0]][depth]] -= string
        else:
            tail -= string

    return target, tail, math.log(mass)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("correction", ["none", "span", "channel"])
@pytest.mark.parametrize("top_k", [3, 40, 10_000])
def test_target_of_every_row_is_what_the_definition_says(name, correction, top_k):
    pair = cached(name)
    vocabulary = pair.vocabulary.with_channel(count_channel(pair.encoder.windows(TEXTS.get(name, STORIES))))
    pair = Pair(pair.student, pair.teacher, pair.encoder, vocabulary)

    batch = pair.batch(TEXTS.get(name, STORIES))
    log_probs = teacher_log_probs(pair, batch)
    signal = pair.frozen().signal(batch, top_k)
    found = Projection(vocabulary, correction, 0.0)(signal, batch)

    seen = set()
    for row in range(0, len(batch.depth), 1 if name in TEXTS else 3):
        target, tail, log_mass = reference_target(pair, batch, log_probs, row, top_k, correction)
        masses = dict(zip(found.ids[row].tolist(), found.probs[row].tolist(), strict=True))
        assert signal.log_mass[row].item() == pytest.approx(log_mass, abs=1e-5)
        assert found.tail[row].item() == pytest.approx(tail, abs=2e-6)
        for s in {*target, *masses} - {-1}:
            assert masses.get(s, 0.0) == pytest.approx(target.get(s, 0.0), abs=2e-6, rel=1e-4)
        seen.add((int(batch.depth[row]) > 0, int(batch.pieces[row]) > 1))

    assert len(seen) > 1
    assert name not in TEXTS or (True, True) in seen


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("correction", ["none", "span", "channel"])
@pytest.mark.parametrize("top_k", [1, 16, 10_000])
def test_masses_and_tail_add_up_to_one_on_distinct_student_tokens(name, correction, top_k):
    pair = cached(name)
    vocabulary = pair.vocabulary.with_channel(count_channel(pair.encoder.windows(STORIES[:2])))
    batch = pair.batch(TEXTS.get(name, STORIES))
    found = Projection(vocabulary, correction, 0.0)(pair.frozen().signal(batch, top_k), batch)
    assert ((found.probs.sum(1) + found.tail - 1).abs() <= 2e-6).all()
    assert (found.tail >= 0).all() and (found.probs >= 0).all()
    assert ((found.ids >= 0) == (found.probs > 0)).all()
    assert found.ids.max() < len(pair.encoder.tables[0].bytes)
    for ids in found.ids.tolist():
        kept = [i for i in ids if i >= 0]
        assert kept == sorted(set(kept))


@torch.no_grad()
def string_probabilities(pair: Pair, context: list[int], length: int) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of `length` teacher tokens after a context."""
    found = {}
    for sequence in itertools.product(range(len(pair.vocabulary.segments)), repeat=length):
        ids = torch.tensor([context + list(sequence)])
        log_probs = pair.teacher(input_ids=ids).logits[0].double().log_softmax(-1)
        steps = range(len(context) - 1, len(context) - 1 + length)
        found[sequence] = math.exp(sum(float(log_probs[n, t]) for n, t in zip(steps, sequence, strict=True)))
    return found


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (["a", "b"], ["a", "b", "ab", "ba", "aab", "abb"]),  # every student token lies in one teacher token
        (["a", "b", "ab"], ["a", "b"]),  # a student token is made of several
    ],
)
def test_target_is_the_probability_of_the_next_student_token_over_all_strings(student, teacher):
    """Every continuation of two teacher tokens is enumerated, spelt and read again by the student.

    At common boundaries and, where the student's token spans several, where the real text is known. There the
    projection is exact; elsewhere it can only say which piece comes first.
    """
    pair = pair_of(from_merges(student), from_merges(teacher), max_length=32)
    texts = ["abbaabab", "bbaaababba"]
    batch = pair.batch(texts)
    found = Projection(pair.vocabulary, "span", 0.0)(pair.frozen().signal(batch, 100), batch)

    letters = plain_bytes(from_merges(teacher))
    tokenizer, checked = from_merges(student), 0
    width = batch.teacher_ids.shape[1]

    for row in (batch.depth == 0).nonzero()[:, 0].tolist():
        anchor = int(batch.row_teacher[row])
        if max(map(len, teacher)) == 1 and batch.pieces[row] < 2:
            continue
        context = batch.teacher_ids.flatten()[anchor // width * width : anchor + 1].tolist()

        # Every string counts for the student token that it begins with.
        expected = defaultdict(float)
        for sequence, p in string_probabilities(pair, context, 2).items():
            if sequence[0] == 0:
                expected[tokenizer.eos_token_id] += p
                continue
            string = letters[sequence[0]] + letters.get(sequence[1], b"")
            expected[tokenizer(string.decode())["input_ids"][0]] += p

        masses = dict(zip(found.ids[row].tolist(), found.probs[row].tolist(), strict=True))
        for s, p in expected.items():
            assert masses.get(s, 0.0) == pytest.approx(p, abs=1e-5)
        assert found.tail[row].item() == pytest.approx(0, abs=1e-5)
        checked += 1

    assert checked >= 3


def test_inside_a_teacher_token_the_target_is_conditional_on_the_letters_read():
    """Enumerated over all teacher tokens by their letters: those that begin with what was read, renormalised."""
    pieces = ["a", "b", "ab", "aba", "abb", "abab", "ba"]
    pair = pair_of(from_merges(["a", "b"]), from_merges(pieces), max_length=32)
    batch = pair.batch(["ababbaabaab", "babaababb"])
    log_probs = teacher_log_probs(pair, batch)
    found = Projection(pair.vocabulary, "none", 0.0)(pair.frozen().signal(batch, 100), batch)
    letters, student = plain_bytes(from_merges(pieces)), plain_bytes(from_merges(["a", "b"]))

    deep = (batch.depth > 0).nonzero()[:, 0].tolist()
    assert len(deep) >= 5
    assert batch.depth.max() >= 2

    for row in deep:
        at, depth = int(batch.row_student[row]), int(batch.depth[row])
        read = b"".join(student[i] for i in batch.student_ids.flatten()[at + 1 - depth : at + 1].tolist())
        p = log_probs[batch.row_teacher[row]].exp().tolist()
        mass = sum(p[t] for t, word in letters.items() if word.startswith(read))

        for s, letter in student.items():
            expected = sum(p[t] for t, word in letters.items() if word.startswith(read + letter)) / mass
            masses = dict(zip(found.ids[row].tolist(), found.probs[row].tolist(), strict=True))
            assert masses.get(s, 0.0) == pytest.approx(expected, abs=1e-5)

        # a token that ends here says nothing about the next one
        ending = sum(p[t] for t, word in letters.items() if word == read) / mass
        assert found.tail[row].item() == pytest.approx(ending, abs=1e-5)


def test_rows_whose_prefix_the_teacher_deems_impossible_do_not_count():
    pair = cached("finer student")
    batch = pair.batch()
    signal = pair.frozen().signal(batch, 20)
    limit = float(signal.log_mass[batch.depth > 0].median().exp())
    found = Projection(pair.vocabulary, "none", limit)(signal, batch)
    assert found.valid.tolist() == (signal.log_mass > math.log(limit)).tolist()
    assert 0 < int((~found.valid).sum()) < len(batch.depth)


def test_a_channel_that_was_not_counted_is_refused():
    with pytest.raises(ValueError, match="with_channel"):
        Projection(cached("finer student").vocabulary, "channel", 1e-3)


def test_rows_without_any_student_token_are_not_valid():
    pair = cached("finer student")
    batch = pair.batch()
    signal = pair.frozen().signal(batch, 1)
    signal.ids[0] = len(pair.vocabulary.segments) - 1
    segments = pair.vocabulary.segments.copy()
    segments[-1] = -1
    lost = type(pair.vocabulary).from_segments(segments, pair.vocabulary.student_vocab_size)
    found = Projection(lost, "none", 0.0)(signal, batch)
    assert not found.valid[0]
    assert found.tail[0].item() == pytest.approx(1)
    assert np.isfinite(found.probs.numpy()).all()
