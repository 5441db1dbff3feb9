"""The description of the text, in words, before training."""

from utils.run.prepare import corpus_in_words


def test_of_documents_is_said_what_they_serve_and_why_some_are_left_out():
    counts = {"read": 12, "empty": 0, "duplicate": 0, "in_eval": 0, "train": 1200, "eval": 4}
    report = counts | {"train_bytes": 2_500_000, "eval_bytes": 30_000}
    assert corpus_in_words(report) == "1,200 to learn from (2.50 MB), 4 held out (0.03 MB)"
    assert corpus_in_words(report | {"empty": 1, "duplicate": 2, "in_eval": 3}).endswith(
        "1 left out (empty), 2 left out (seen before), 3 left out (in the held-out text too)"
    )
