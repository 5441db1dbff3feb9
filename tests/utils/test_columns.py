"""Conversations in every kind of table, and which columns are read."""

import csv
import json

import datasets
import pytest

from utils.columns import Columns
from utils.config import DataConfig
from utils.data import leakage, load_documents
from utils.errors import UserError

ROWS = [
    {"prompt": f"question {n} <|im_end|>", "completion": f"ä \n answer {n}", "text": f"text {n}"} for n in range(30)
]
TALKS = [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in ROWS]


def write(folder, suffix, rows):
    file = folder / f"data{suffix}"
    table = datasets.Dataset.from_list(rows)
    match suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            file.write_text(json.dumps(rows))
        case ".csv":
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            table.to_parquet(file)
        case ".arrow":
            table.save_to_disk(folder / "saved")
            return next((folder / "saved").glob("*.arrow"))
    return file


def load(*files, **settings):
    return load_documents(DataConfig(train=[str(file) for file in files], **settings))


def talks(corpus) -> list:
    return sorted(map(json.loads, corpus.train + corpus.eval), key=lambda talk: talk[0]["content"])


BY_QUESTION = sorted(TALKS, key=lambda talk: talk[0]["content"])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_prompt_and_its_completion_are_a_conversation(tmp_path, suffix):
    corpus = load(write(tmp_path, suffix, ROWS))
    assert corpus.conversations and talks(corpus) == BY_QUESTION
    assert leakage(corpus.train, corpus.eval) == 0 and corpus.eval


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_messages_are_preferred_and_other_keys_of_a_message_are_left_out(tmp_path, suffix):
    rows = [row | {"messages": [m | {"name": None} for m in talk]} for row, talk in zip(ROWS, TALKS, strict=True)]
    rows = [row | {"prompt": "other"} for row in rows]
    corpus = load(write(tmp_path, suffix, rows))
    assert corpus.conversations and talks(corpus) == BY_QUESTION


def test_a_named_column_of_texts_is_read_as_text(tmp_path):
    corpus = load(write(tmp_path, ".jsonl", ROWS), text_column="completion")
    assert not corpus.conversations and sorted(corpus.train + corpus.eval) == sorted(r["completion"] for r in ROWS)


def test_columns_can_have_other_names(tmp_path):
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in ROWS]
    names = {"prompt_column": "question", "completion_column": "answer"}
    assert talks(load(write(tmp_path, ".jsonl", rows), **names)) == BY_QUESTION
    with pytest.raises(UserError, match=r"data\.jsonl:1: no column 'text', 'messages', or 'prompt' and 'completion'"):
        load(tmp_path / "data.jsonl")


def test_files_of_messages_and_of_pairs_go_together_but_not_with_plain_text(tmp_path):
    (tmp_path / "a").mkdir()
    messages = write(tmp_path / "a", ".jsonl", [{"messages": talk} for talk in TALKS[:10]])
    pairs = write(tmp_path, ".csv", ROWS[10:])
    assert talks(load(messages, pairs)) == BY_QUESTION
    (tmp_path / "plain.txt").write_text("one\n\ntwo\n")
    for settings in ({}, {"eval": str(tmp_path / "plain.txt")}):
        files = [messages] if settings else [messages, tmp_path / "plain.txt"]
        with pytest.raises(UserError, match=r"cannot be mixed: .*data.jsonl:1 is .*plain.txt:1 is plain text"):
            load(*files, **settings)


@pytest.mark.parametrize(("learn_from", "kept"), [("completions", 1), ("all", 2)])
def test_what_has_nothing_to_learn_from_is_empty(tmp_path, learn_from, kept):
    rows = [["a", "b"], ["a", " "], ["", ""], [None, "b"]]
    rows = [dict(zip(("prompt", "completion"), row, strict=True)) for row in rows]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "x", "completion": "y"}\n')
    corpus = load(write(tmp_path, ".jsonl", rows), eval=str(held_out), learn_from=learn_from)
    assert len(corpus.train) == kept and corpus.report["empty"] == 4 - kept


def test_conversations_are_compared_as_a_whole(tmp_path):
    rows = [ROWS[0], ROWS[1], ROWS[0] | {"text": "other"}]
    assert load(write(tmp_path, ".jsonl", rows)).report["duplicate"] == 1


def test_tools_are_refused(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]}
    with pytest.raises(UserError, match=r"data\.jsonl:1, message 0: it calls tools"):
        load(write(tmp_path, ".jsonl", [row]))


def test_the_order_of_what_is_looked_for():
    columns, everything = Columns(), ["text", "completion", "prompt", "messages"]
    assert columns.among("", everything) == ["messages"]
    assert columns.among("", everything[:3]) == ["prompt", "completion"]
    assert columns.among("", ["text", "prompt"]) == ["text"]
    assert Columns("prompt").among("", everything) == ["prompt"]
