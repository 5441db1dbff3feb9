"""Documents in one buffer: the same sequence as a list of strings, in as many bytes as UTF-8 takes."""

import tracemalloc

import numpy as np

from utils.data import sources
from utils.data.columns import Columns
from utils.data.documents import byte_count
from utils.data.texts import Texts

DOCUMENTS = ["plain", "", "caf\u00e9", "it\u2019s", "\U0001f600 four bytes"]


def test_texts_are_the_sequence_that_they_were_made_of():
    texts = Texts.of(iter(DOCUMENTS))
    assert texts == DOCUMENTS and list(texts) == DOCUMENTS and len(texts) == 5
    assert texts[-1] == DOCUMENTS[-1] and texts[1:4] == DOCUMENTS[1:4]
    assert texts.select(np.array([True, False, False, True, False])) == ["plain", "it\u2019s"]
    assert byte_count(texts) == byte_count(DOCUMENTS) and len(Texts.of([])) == 0


def test_texts_take_little_more_than_their_bytes():
    tracemalloc.start()
    texts = Texts.of(f"number {number}: it\u2019s a document of the usual length. " * 20 for number in range(2000))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    size = byte_count(texts)
    assert held < 1.2 * size and peak < 1.5 * size


def test_a_separator_of_several_lines_cuts_and_documents_begin_behind_it(tmp_path):
    text = "one\n--\n--\ntwo\nand more\n--\n--\nthree\n--\n--\n\n"
    file = tmp_path / "a.txt"
    file.write_bytes(text.encode())

    parts = list(sources.read([str(file)], split="train", columns=Columns(), separator="--\n--\n"))
    assert [part.strip("\n") for _, part in parts] == ["one", "two\nand more", "three"]
    assert [place for place, _ in parts] == [f"{file}:{line}" for line in (1, 4, 8)]
