"""Documents of a stream: mixed, cleaned, and the same from any block on."""

import pytest

from tests.utils.data.stream.toy_stream import config, write
from utils.data.documents import load_documents, text_key
from utils.data.stream.beginning import load_corpus, read_beginning
from utils.data.stream.text import TextSources, TextStream
from utils.errors import UserError


def stream_of(settings, held_out=()) -> TextStream:
    return TextStream(TextSources.of(settings, 3), held_out)


def names(letter: str, count: int) -> list[str]:
    return [f"{letter} {number:05d}" for number in range(count)]


def test_sources_come_in_turn_and_a_block_ends_where_all_of_them_have_ended(tmp_path):
    files = [write(tmp_path / f"{letter}.jsonl", names(letter, 3)) for letter in "ab"]
    stream = stream_of(config(*files))
    assert list(stream.block(10**6)) == [*names("a", 3), *names("b", 3)]
    assert list(stream.block(10**6)) == [*names("a", 3), *names("b", 3)]
    assert stream.passes == 2


def test_a_mixture_draws_by_weight_and_reads_a_source_that_ends_again(tmp_path):
    files = [write(tmp_path / "a.jsonl", names("a", 3000)), write(tmp_path / "b.jsonl", names("b", 20))]
    weights = dict(zip(map(str, files), (3.0, 1.0), strict=True))
    stream = stream_of(config(*files, mixture=weights, deduplicate=False))
    drawn = list(stream.block(7 * 2000))
    share = sum(text.startswith("a") for text in drawn) / len(drawn)
    assert 0.72 < share < 0.78
    assert [reader.passes for reader in stream.readers] == [0, stream.readers[1].passes]
    assert stream.readers[1].passes > 20
    assert drawn == list(stream_of(config(*files, mixture=weights, deduplicate=False)).block(7 * 2000))


def test_what_is_empty_repeated_or_held_out_is_left_out_and_counted(tmp_path):
    file = write(tmp_path / "a.jsonl", ["one", " ", "two", "one", "three", " two"])
    stream = stream_of(config(file), {text_key("three")})
    assert list(stream.block(10**6)) == ["one", "two", " two"]
    counted = {"read": 6, "empty": 1, "duplicate": 1, "in_eval": 1, "train": 3, "train_bytes": 10}
    assert stream.counts == counted
    assert list(stream.block(10**6)) == ["one", "two", " two"]


def test_from_any_block_on_come_the_documents_of_an_uninterrupted_stream(tmp_path):
    files = [write(tmp_path / f"{letter}.jsonl", names(letter, 37) + names("c", 5)) for letter in "ab"]
    settings = config(*files, mixture=dict.fromkeys(map(str, files), 1.0), remembered_documents=50)
    whole = stream_of(settings)
    states, blocks = [], []
    for _ in range(12):
        states.append(whole.state_dict())
        blocks.append(list(whole.block(100)))
    assert whole.passes >= 1

    for number in range(12):
        other = stream_of(settings)
        other.load_state_dict(states[number])
        assert [list(other.block(100)) for _ in range(12 - number)] == blocks[number:]
        assert other.counts == whole.counts


def test_a_text_of_which_nothing_is_left_is_an_error_and_no_endless_loop(tmp_path):
    file = write(tmp_path / "a.jsonl", ["one", "two"])
    stream = stream_of(config(file), {text_key("one"), text_key("two")})
    with pytest.raises(UserError, match="nothing to learn from"):
        for _ in range(10):
            list(stream.block(10))


def test_a_small_text_is_split_as_without_a_stream(tmp_path):
    file = write(tmp_path / "a.jsonl", names("a", 200))
    streamed, whole = load_corpus(config(file), 3), load_documents(config(file))
    assert (streamed.train, streamed.eval) == (whole.train, whole.eval)
    assert {name: streamed.report[name] for name in whole.report} == whole.report


def test_a_small_source_of_a_mixture_is_in_the_beginning_once(tmp_path):
    files = [write(tmp_path / "a.jsonl", names("a", 200)), write(tmp_path / "b.jsonl", names("b", 20))]
    weights = dict(zip(map(str, files), (1e-9, 1.0), strict=True))
    beginning = read_beginning(config(*files, mixture=weights, deduplicate=False), 3)
    texts = [*beginning.corpus.train, *beginning.corpus.eval]
    assert sorted(texts) == sorted([*names("a", 200), *names("b", 20)])
    assert beginning.corpus.report["read"] == 220


def test_of_a_text_to_measure_on_nothing_is_learned(tmp_path):
    file = write(tmp_path / "a.jsonl", names("a", 20))
    measured = write(tmp_path / "b.jsonl", names("a", 5))
    beginning = read_beginning(config(file, eval=str(measured)), 3)
    assert beginning.corpus.train == names("a", 20)[5:]
    assert list(stream_of(config(file), beginning.held_out).block(10**6)) == names("a", 20)[5:]
    assert beginning.corpus.report["in_eval"] == 5


def test_a_stream_is_recognised_by_its_text_and_its_mixture(tmp_path):
    file = write(tmp_path / "a.jsonl", names("a", 20))
    other = write(tmp_path / "b.jsonl", names("b", 20))
    prints = {
        read_beginning(
            config(file, other, mixture=dict(zip((str(file), str(other)), weights, strict=True))), 3
        ).fingerprint
        for weights in ((1.0, 1.0), (1.0, 2.0))
    }
    write(file, names("a", 19) + names("c", 1))
    prints.add(read_beginning(config(file, other, mixture={str(file): 1.0, str(other): 1.0}), 3).fingerprint)
    assert len(prints) == 3
