"""Groups of documents that are packed together, and the length of what a window is of."""

from datasets import Dataset

from utils.data import windows as windows_module
from utils.data.documents import Corpus, document_name
from utils.data.windows import make_windows, window_lengths


def encode(texts, names):
    """Return a window for every call, which tells how many documents came at once."""
    return [{"together": len(texts), "documents": ",".join(names)}]


def test_long_documents_are_packed_in_smaller_groups(monkeypatch):
    texts = ["a" * 60, "b" * 60, "c", "d" * 200, "e"]
    assert make_windows(texts, encode, "v1")["together"][:].tolist() == [5]

    monkeypatch.setattr(windows_module, "MOST_CHARACTERS_PER_PACK", 100)
    assert make_windows(texts, encode, "v1")["together"][:].tolist() == [2, 2, 1]


def test_the_length_of_a_window_is_that_of_its_documents_whole():
    texts = ["four", "nine it\u2019s", "a" * 30]
    names = [document_name(text) for text in texts]
    windows = Dataset.from_dict({"documents": [f"{names[0]},{names[1]}", names[2], names[2]]})
    corpus = Corpus(texts, [], conversations=False, report={})
    assert window_lengths(windows, corpus).tolist() == [(4 + 11) / 2, 30, 30]


def test_the_length_of_a_conversation_is_that_of_its_messages():
    talk = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]'
    windows = Dataset.from_dict({"documents": [document_name(talk)]})
    [length] = window_lengths(windows, Corpus([talk], [], conversations=True, report={}))
    assert 10 <= length < len(talk) / 2
