"""Windows and batches: every byte once, both sides the same bytes, common boundaries, nothing shifted."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.config import RouterConfig
from models.text.alignment import paired_tokens
from models.text.collate import PairCollator, count_channel
from models.text.tokens import END, MARKER, MISMATCH, Reading
from models.text.vocabulary import VocabularyMap
from models.text.windows import PairEncoder
from models.types import IGNORE
from tests.models.tiny import STORIES, byte_bpe, characters, from_merges, metaspace, pair_of, wordpiece

SIDES = ("student", "teacher")
TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), min_size=1, max_size=5)


def encoder(max_length: int, student: int = 300, teacher: int = 400) -> PairEncoder:
    return PairEncoder(byte_bpe(student), byte_bpe(teacher), max_length)


def column(window: dict, side: str, name: str) -> np.ndarray:
    return window[f"{side}_{name}"]


def supervised_text(window: dict, side: str, table) -> bytes:
    """The bytes of text that a window supervises."""
    ids, roles = column(window, side, "ids"), column(window, side, "roles")
    return b"".join(table.bytes[i] or b"" for i, role in zip(ids, roles, strict=True) if role not in (MARKER, END))


def ends_of_text(window: dict, side: str) -> int:
    return int((column(window, side, "roles") == END).sum())


@settings(max_examples=40)
@given(texts=TEXTS, max_length=st.integers(32, 80))
def test_windows_supervise_every_byte_of_every_document_exactly_once(texts, max_length):
    maker = encoder(max_length)
    windows = maker.windows(texts)
    expected = sorted(text for text in map(maker.canonical, texts) if text)
    assert sum(w["bytes"] for w in windows) == sum(len(t.encode()) for t in expected)
    for side in SIDES:
        # windows hold documents in another order
        found = [supervised_text(w, side, maker.tables[SIDES.index(side)]) for w in windows]
        assert sorted(b"".join(found)) == sorted("".join(expected).encode())
        assert sum(ends_of_text(w, side) for w in windows) == len(expected)


@settings(max_examples=40)
@given(texts=TEXTS, max_length=st.integers(16, 60))
def test_both_sides_of_a_window_supervise_the_same_bytes(texts, max_length):
    maker = encoder(max_length)
    for window in maker.windows(texts):
        one, other = (supervised_text(window, side, maker.tables[i]) for i, side in enumerate(SIDES))
        assert one == other
        assert len(one) == window["bytes"]
        assert ends_of_text(window, "student") == ends_of_text(window, "teacher")


@settings(max_examples=40)
@given(texts=TEXTS, max_length=st.integers(8, 60))
def test_what_is_not_supervised_is_counted_as_left_out(texts, max_length):
    """Windows may be so short that long words without a common boundary do not fit."""
    maker = encoder(max_length)
    windows = maker.windows(texts)
    size = sum(len(maker.canonical(text).encode()) for text in texts)
    if windows:
        assert sum(w["bytes"] + w["left_out"] for w in windows) == size


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_the_least_window_that_teaches_something_of_a_text_is_known(text):
    least = encoder(16).least_length(text)
    assert (least is None) == (not encoder(10_000).windows([text]))
    assert least is None or encoder(max(least, 8)).windows([text])


@pytest.mark.parametrize("text", ["abab{}abba", "abab{}", "{}", "{}ab"])
def test_a_long_stretch_without_a_common_boundary_is_left_out_and_counted(text):
    """One side drops characters that the other spells with more tokens than a window holds."""
    maker = PairEncoder(from_merges(["a", "b", "ab"]), byte_bpe(300), 24)
    windows = maker.windows([text.format("\u2603" * 40), "abba"])
    assert sum(w["bytes"] for w in windows) >= len("abba")
    assert sum(w["bytes"] + w["left_out"] for w in windows) == len(text.format("")) + 120 + len("abba")


@settings(max_examples=40)
@given(texts=TEXTS, max_length=st.integers(8, 60))
def test_no_window_is_longer_than_the_limit_on_either_side(texts, max_length):
    for window in encoder(max_length).windows(texts):
        assert max(len(column(window, side, "ids")) for side in SIDES) <= max_length


@settings(max_examples=40)
@given(texts=TEXTS, max_length=st.integers(16, 60))
def test_windows_end_on_a_common_boundary(texts, max_length):
    for window in encoder(max_length).windows(texts):
        assert column(window, "student", "ends")[-1] == column(window, "teacher", "ends")[-1]


def test_a_document_that_fits_is_not_cut_and_a_longer_one_continues_after_its_last_span():
    maker = encoder(40)
    windows = maker.windows([STORIES[0] * 3])
    assert len(windows) > 1
    for side in SIDES:
        # all but the first of the document begin with the last tokens of another window
        ends = [column(w, side, "ids").tolist() for w in windows]
        contexts = [column(w, side, "ids")[1:][column(w, side, "roles")[1:] == MARKER].tolist() for w in windows]
        assert [not c for c in contexts].count(True) == 1
        assert all(any(end[-len(c) :] == c for end in ends) for c in contexts if c)
    short = maker.windows(["One day. "] * 6)
    assert sum(int((column(w, "student", "roles") == END).sum()) for w in short) == 6
    assert sum(int((column(w, "student", "roles") == MARKER).sum()) for w in short) == len(short)


def test_names_of_documents_travel_with_their_windows():
    windows = encoder(64).windows(["One day.", "", "The girl went."], ["a", "empty", "b"])
    assert sorted(",".join(w["documents"] for w in windows).split(",")) == ["a", "b"]


@pytest.mark.parametrize(
    "pair", [("qwen2.5-sub8k", "smollm"), ("llama2c-tok512", "gpt2"), ("mistral-v0.1", "gpt-neox")]
)
def test_real_tokenizers_supervise_every_byte_exactly_once_on_both_sides(pair, real_tokenizer, real_models_dir):
    maker = PairEncoder(*map(real_tokenizer, pair), 128)
    text = (real_models_dir / "corpora" / "udhr-multilingual.txt").read_text(encoding="utf-8")
    documents = [text[i : i + 700] for i in range(0, len(text), 40_000)]
    windows = maker.windows(documents)
    expected = [maker.canonical(d).encode() for d in documents]
    assert sum(w["bytes"] for w in windows) == sum(map(len, expected))
    assert all(w["left_out"] == 0 for w in windows)
    for i, side in enumerate(SIDES):
        found = b"".join(supervised_text(w, side, maker.tables[i]) for w in windows)
        if all((column(w, side, "roles") != MISMATCH).all() for w in windows):
            # a tokenizer may put one space in front of a document
            assert 0 <= len(found) - sum(map(len, expected)) <= len(documents)


@pytest.mark.parametrize("bad", ["\ud800", "a\udc00b", "\ud83d\ude00", "\udc00\ud800", "x\ud83d"])
def test_lone_surrogates_are_replaced_and_their_neighbours_stay(bad):
    text = encoder(32).canonical(bad)
    text.encode("utf-8")
    assert [c for c in bad if not "\ud800" <= c <= "\udfff"] == [c for c in text if c.isascii()]


def test_a_byte_order_mark_in_front_of_a_text_stays():
    assert encoder(32).canonical("\ufeffa") == "\ufeffa"


def test_text_is_normalised_once_for_both_sides(real_tokenizer):
    maker = PairEncoder(byte_bpe(300), real_tokenizer("qwen2.5-sub8k"), 64)
    assert maker.canonical("e\u0301") == "\u00e9"
    (window,) = maker.windows(["cafe\u0301 e\u0301te\u0301 and then"])
    assert all((column(window, side, "roles") != MISMATCH).all() for side in SIDES)


@pytest.mark.parametrize("max_length", [-1, 0, 7])
def test_a_window_too_short_to_learn_from_is_refused(max_length):
    with pytest.raises(ValueError, match="at least 8"):
        encoder(max_length)


def test_fingerprint_tells_tokenizers_lengths_and_directions_apart():
    makers = [encoder(32), encoder(33), encoder(32, 400, 300), encoder(32, 300, 300)]
    assert len({m.fingerprint for m in makers}) == 4
    assert encoder(32).fingerprint == makers[0].fingerprint


def test_encoder_and_collator_survive_pickling():
    maker = encoder(40)
    windows = maker.windows(STORIES)
    copied = pickle.loads(pickle.dumps(maker)).windows(STORIES)
    assert all(np.array_equal(a[k], b[k]) for a, b in zip(windows, copied, strict=True) for k in a)
    collator = PairCollator(VocabularyMap.build(byte_bpe(300), byte_bpe(400)), maker.end_of_text, 8)
    assert torch.equal(pickle.loads(pickle.dumps(collator))(windows).row_student, collator(windows).row_student)


def test_labels_are_the_next_supervised_token_of_the_same_window():
    pair = pair_of(byte_bpe(300), byte_bpe(400))
    windows = pair.encoder.windows(STORIES)
    batch = pair.collator()(windows)
    for b, window in enumerate(windows):
        for name, labels in (("student", batch.labels), ("teacher", batch.teacher_labels)):
            ids, roles = column(window, name, "ids"), column(window, name, "roles")
            expected = [int(i) if r != MARKER else IGNORE for i, r in zip(ids[1:], roles[1:], strict=True)]
            assert labels[b].tolist() == expected + [IGNORE] * (labels.shape[1] - len(expected))


@pytest.mark.parametrize("make", [lambda: byte_bpe(300), metaspace, wordpiece, characters])
def test_every_supervised_position_has_one_anchor_or_none(make):
    batch = pair_of(make(), byte_bpe(400)).batch()
    supervised = (batch.labels.flatten() != IGNORE).nonzero()[:, 0].tolist()
    rows = batch.row_student.tolist()
    assert rows == sorted(set(rows))
    assert set(rows) <= set(supervised)
    assert batch.counts["lm"] == len(supervised)
    assert batch.counts["kd"] == len(rows) <= len(supervised)
    assert batch.counts["depth0"] == int((batch.depth == 0).sum())
    assert batch.counts["span"] == int(batch.student_spans.max()) + 1 == int(batch.teacher_spans.max()) + 1


def test_evaluation_scores_the_same_bytes_on_both_sides_without_ends_of_text():
    pair = pair_of(byte_bpe(300), byte_bpe(400))
    batch = pair.batch()
    for side, table in zip(SIDES, pair.encoder.tables, strict=True):
        _, labels = batch.scored(side)
        per_window = [sum(len(table.bytes[i]) for i in row.tolist() if i != IGNORE) for row in labels]
        assert per_window == batch.bytes.tolist()


def test_channel_pairs_are_the_tokens_that_start_at_the_same_byte():
    windows = encoder(64).windows(STORIES)
    teacher, student = count_channel(windows)
    expected = []
    for w in windows:
        start = {side: dict(zip(column(w, side, "starts"), column(w, side, "ids"), strict=True)) for side in SIDES}
        real = {s: {b for b, r in zip(column(w, s, "starts"), column(w, s, "roles"), strict=True) if r} for s in SIDES}
        common = sorted(real["student"] & real["teacher"])
        expected += [(start["teacher"][b], start["student"][b]) for b in common]
    assert list(zip(teacher.tolist(), student.tolist(), strict=True)) == expected


def test_no_pair_is_counted_at_a_token_with_foreign_bytes():
    """Neither start markers nor tokens whose bytes a normaliser changed say what follows what."""
    reading = Reading(np.arange(4), np.array([0, 0, 1, 2]), np.array([0, 1, 2, 3]), np.array([MARKER, 1, MISMATCH, 1]))
    teacher, student = paired_tokens(reading, reading)
    assert teacher.tolist() == student.tolist() == [1, 3]


# --- what the router compares -----------------------------------------------------------------------------------------

TOKENIZERS = [(byte_bpe(300), byte_bpe(400)), (byte_bpe(400), metaspace()), (characters(), byte_bpe(300))]


@pytest.mark.parametrize("tokenizers", TOKENIZERS)
def test_anchors_are_where_both_models_have_read_the_same_bytes(tokenizers):
    """Every pair of positions whose next tokens start at the same byte and are predicted; the first one left out."""
    pair = pair_of(*tokenizers, router=RouterConfig())
    windows = pair.encoder.windows(STORIES)
    batch = pair.collator()(windows)
    widths, expected = (batch.student_ids.shape[1], batch.teacher_ids.shape[1]), []
    for b, window in enumerate(windows):
        starts, roles = ([column(window, side, name) for side in SIDES] for name in ("starts", "roles"))
        for j, k in np.argwhere(starts[0][:, None] == starts[1][None]) - 1:
            predicted = all(role[i + 1] not in (MARKER, MISMATCH) for role, i in zip(roles, (j, k), strict=True))
            if predicted and j > 0 and k > 0:
                expected.append((b * widths[0] + j, b * widths[1] + k, b))
    a = batch.anchors
    assert list(zip(a.student.tolist(), a.teacher.tolist(), a.text.tolist(), strict=True)) == expected
    assert batch.counts["feat"] == batch.counts["layer"] == len(expected) > 50


@pytest.mark.parametrize("span", [1, 5, 16, 1000])
def test_runs_are_neighbouring_anchors_of_one_window_and_of_about_the_same_number(span):
    pair = pair_of(byte_bpe(300), byte_bpe(400), router=RouterConfig(span=span))
    batch = pair.batch()
    run, window = batch.anchors.run, batch.anchors.text
    assert batch.counts["contr"] == batch.anchors.runs == int(run[-1]) + 1
    assert set(run.diff().tolist()) <= {0, 1}  # none is empty, and none is torn apart
    for b in range(len(batch.labels)):
        sizes = run[window == b].unique(return_counts=True)[1]
        assert len(sizes) == max(1, round(int(sizes.sum()) / span))
        assert sizes.max() - sizes.min() <= 1
    assert all(len(window[run == r].unique()) == 1 for r in range(batch.anchors.runs))


def test_sampled_anchors_are_spread_from_a_windows_first_to_its_last():
    pair = pair_of(byte_bpe(300), byte_bpe(400), router=RouterConfig(positions=7))
    batch = pair.batch([*STORIES, "Hm."])
    a = batch.anchors
    for b, row in enumerate(a.sampled):
        own, chosen = (a.text == b).nonzero()[:, 0], row[row >= 0]
        assert len(chosen) == min(7, len(own)) and (row[len(chosen) :] == -1).all()
        assert (chosen[0], chosen[-1]) == (own[0], own[-1])
        assert chosen.diff().min() > 0 and chosen.diff().max() - chosen.diff().min() <= 1
    assert batch.counts["rel"] == int(((a.sampled >= 0).sum(1) >= 4).sum())


@pytest.mark.parametrize("tokenizers", TOKENIZERS)
def test_queries_and_keys_of_attention_lie_at_the_bytes_of_their_tokens(tokenizers):
    pair = pair_of(*tokenizers, router=RouterConfig(positions=9))
    windows = pair.encoder.windows(STORIES)
    batch, attending = pair.collator()(windows), 0
    a, width = batch.anchors, batch.student_ids.shape[1]

    for b, window in enumerate(windows):
        first, last = (column(window, "teacher", name) for name in ("starts", "ends"))
        keys = list(zip(first, last, strict=True))
        assert a.key_bytes[b, : len(keys)].tolist() == [list(key) for key in keys]
        assert (a.key_bytes[b, len(keys) :] > 2**30).all()

        for q, anchor in enumerate(a.sampled[b].tolist()):
            attends = False
            if anchor >= 0:
                token = int(a.student[anchor]) - b * width
                lo, hi = (column(window, "student", name)[token] for name in ("starts", "ends"))
                assert a.query_bytes[b, q].tolist() == [lo, hi]
                seen = [key for key in keys[1:] if key[1] <= hi]
                attends = len(seen) > 1 and any(min(key[1], hi) > max(key[0], lo) for key in seen)
            assert bool(a.attends[b, q]) == attends
            attending += attends

    assert batch.counts["attn"] == attending > 0


@pytest.mark.parametrize("tokenizers", TOKENIZERS)
def test_no_query_sees_a_teacher_token_that_the_student_has_not_read(tokenizers):
    """The anchor's teacher position is the last one visible: an end in bytes never comes after a later token's."""
    batch = pair_of(*tokenizers, router=RouterConfig()).batch()
    a, width = batch.anchors, batch.teacher_ids.shape[1]
    for b, q in a.attends.nonzero().tolist():
        seen = (a.key_bytes[b, :, 1] <= a.query_bytes[b, q, 1]).nonzero()[:, 0]
        assert seen.tolist() == list(range(len(seen)))
        assert len(seen) - 1 == int(a.teacher[a.sampled[b, q]]) - b * width


def test_counts_of_parts_add_up_to_those_of_the_whole():
    pair = pair_of(byte_bpe(300), byte_bpe(400), router=RouterConfig())
    windows = pair.encoder.windows(STORIES)
    parts = [pair.collator()([window]).counts for window in windows]
    assert {name: sum(part[name] for part in parts) for name in parts[0]} == pair.collator()(windows).counts


def test_a_router_changes_nothing_else_of_a_batch_and_without_one_there_are_no_anchors():
    pair = pair_of(byte_bpe(300), byte_bpe(400))
    plain, pair.router = pair.batch(), RouterConfig()
    batch = pair.batch()
    assert plain.anchors is None and not {"feat", "rel", "attn", "layer", "contr"} & {*plain.counts}
    assert torch.equal(plain.row_student, batch.row_student) and plain.counts.items() < batch.counts.items()
