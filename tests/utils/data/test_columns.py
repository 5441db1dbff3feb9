"""Conversations in every kind of table, and which columns are read."""

import csv
import json

import datasets
import pytest

from utils.config.settings import DataConfig
from utils.data.columns import Columns
from utils.data.documents import leakage, load_documents
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
    with pytest.raises(UserError, match=r"data\.jsonl:1: no column 'text', 'messages', .* 'prompt' and 'completion'"):
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


ANSWER = {"role": "assistant", "content": "Yes."}
QUESTION = {"role": "user", "content": "Is it?"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [QUESTION, {**ANSWER, "weight": 0.5}]}, ", message 1: expected 0 or 1 as its weight, got 0.5"),
        ({"messages": [QUESTION, {**ANSWER, "loss": False}]}, ", message 1: its key 'loss' is False, .* 'weight': 0"),
        ({"messages": [QUESTION, {**ANSWER, "loss": 0}]}, ", message 1: its key 'loss' is 0"),
        ({"messages": [QUESTION, {**ANSWER, "mask": 1}]}, ", message 1: its key 'mask' is 1"),
        ({"messages": [QUESTION, {**ANSWER, "mask": False}]}, ", message 1: its key 'mask' is False"),
        ({"messages": [QUESTION, {**ANSWER, "loss_mask": [0, 1]}]}, ", message 1: its key 'loss_mask' is"),
        ({"messages": [QUESTION, {**ANSWER, "trainable": "no"}]}, "expected 0 or 1 as its trainable, got 'no'"),
        (
            {"messages": [QUESTION, ANSWER], "weight": 0},
            ":1: column 'weight' is 0, .* not to be learned. Leave such rows",
        ),
        ({"messages": [QUESTION, ANSWER], "train": False}, ":1: column 'train' is False"),
        ({**ROWS[0], "trainable": False}, ":1: column 'trainable' is False"),
        ({**ROWS[0], "loss": 0.0}, ":1: column 'loss' is 0.0"),
        ({**ROWS[0], "input": "the letter"}, ":1: column 'input' holds a part of what is asked.* into the prompt"),
        ({"messages": [{**QUESTION, "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "is no text \\(image\\)"),
        ({"messages": [QUESTION, {**ANSWER, "content": None}]}, "expected text as its content, got nothing"),
        ({"messages": [QUESTION, ANSWER], "chat_template_kwargs": {"tools": []}}, "'tools', which .* from elsewhere"),
        ({"messages": [QUESTION, {**ANSWER, "reasoning_content": 7}]}, "its thinking: .* number 7. Write it as a text"),
        (
            {"messages": [QUESTION, {**ANSWER, "reasoning": "A", "thinking": "B"}]},
            "thinking: expected one text, got 2: 'A'",
        ),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": "<think>B</think>C", "reasoning": "A"}]},
            "got 'A' under a key of its own and 'B' in its content",
        ),
        ({"messages": [{"role": 7, "content": "Hi"}]}, "as its role, got the number 7. Write who speaks"),
        ({"messages": [{"from": "narrator", "value": "Hi"}]}, "message 0: expected human, .*, got 'narrator'"),
        ({"conversations": [{"from": None, "value": "Hi"}]}, "message 0: expected human, .* as its 'from', got None"),
        ({"conversations": [{"speaker": "human"}]}, r"\(or 'from' and 'value'\), got the keys speaker"),
        ({"instruction": "Go on.", "output": "Yes.", "history": [["a", "b"]]}, "column 'history' changes"),
        ({"instruction": "Go on.", "output": "Yes.", "input": 3}, "column 'input': expected text, got the number"),
        ({"messages": [{"role": "system", "content": "A"}, ANSWER], "system": "B"}, "different system messages"),
    ],
)
def test_what_would_be_lost_is_refused_with_its_place(tmp_path, row, told):
    with pytest.raises(UserError, match=rf"data\.jsonl.*{told}"):
        load(write_jsonl(tmp_path, [row]))


def write_jsonl(folder, rows):
    """Write rows that fit into no table, and so cannot be written with `write`."""
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_back(tmp_path, *rows: dict, **settings) -> list[list[dict]]:
    """The conversations of rows that differ, and of one that is held out."""
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    file = write_jsonl(tmp_path, rows)
    return [json.loads(talk) for talk in load(file, eval=str(tmp_path / "held_out.jsonl"), **settings).train]


def test_columns_and_keys_that_hold_nothing_change_nothing(tmp_path):
    nothing = {"tools": [], "system": "", "chat_template_kwargs": None}
    message = {**ANSWER, "tool_calls": None, "function_call": None, "weight": None, "reasoning_content": ""}
    assert read_back(tmp_path, {"messages": [QUESTION, message], **nothing}) == [[QUESTION, ANSWER]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_system_column_is_the_first_message(tmp_path, suffix):
    corpus = load(write(tmp_path, suffix, [row | {"system": f"Be {row['text']}."} for row in ROWS]))
    assert all([m["role"] for m in talk] == ["system", "user", "assistant"] for talk in talks(corpus))
    assert {talk[0]["content"] for talk in talks(corpus)} == {f"Be {row['text']}." for row in ROWS}


def test_a_system_column_that_repeats_the_first_message_is_read_once(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    row = {"messages": [system, QUESTION, ANSWER], "system": "Be kind."}
    assert read_back(tmp_path, row) == [[system, QUESTION, ANSWER]]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_is_kept_under_one_name(tmp_path, key):
    (talk,) = read_back(tmp_path, {"messages": [QUESTION, {**ANSWER, key: "Hm."}]})
    assert talk[1] == {**ANSWER, "reasoning_content": "Hm."}


THOUGHTS = ["<think>A</think>\nYes.", "A</think>Yes.", "<think>A</think><think>B</think> Yes."]


@pytest.mark.parametrize("content", THOUGHTS)
def test_all_thinking_can_be_dropped(tmp_path, content):
    row = {"messages": [QUESTION, {"role": "assistant", "content": content, "reasoning": ""}]}
    ((_, answer),) = read_back(tmp_path, row, reasoning="drop")
    assert answer == {"role": "assistant", "content": "Yes."}


def test_thinking_that_was_cut_short_is_no_answer(tmp_path):
    row = {"messages": [QUESTION, {"role": "assistant", "content": "<think>A, and"}]}
    with pytest.raises(UserError, match=r":1, message 1: its thinking does not end .*Leave such conversations out"):
        read_back(tmp_path, row, reasoning="drop")


def test_thinking_that_is_in_the_content_too_is_taken_once(tmp_path):
    row = {"messages": [QUESTION, {"role": "assistant", "content": "<think>\nA\n</think>\n\nYes.", "reasoning": "A"}]}
    ((_, answer),) = read_back(tmp_path, row)
    assert answer == {"role": "assistant", "content": "Yes.", "reasoning_content": "A"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("weight", 0.0), ("weight", False), ("train", False), ("trainable", False), ("training", 0)],
)
def test_a_message_that_is_not_to_be_learned_says_so(tmp_path, key, value):
    (talk,) = read_back(tmp_path, {"messages": [QUESTION, {**ANSWER, key: value}, QUESTION, ANSWER]})
    assert [message.get("weight") for message in talk] == [None, 0, None, None]


def test_a_conversation_of_which_nothing_is_to_be_learned_is_empty(tmp_path):
    rows = [{"messages": [QUESTION, {**ANSWER, "weight": 0}]}, {"messages": [QUESTION, ANSWER]}]
    assert read_back(tmp_path, *rows) == [[QUESTION, ANSWER]]


def test_a_content_of_several_texts_is_one_text(tmp_path):
    parts = [{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}]
    assert read_back(tmp_path, {"messages": [{**QUESTION, "content": parts}, ANSWER]}) == [[QUESTION, ANSWER]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_columns_that_are_not_read_are_named_once(tmp_path, suffix, caplog):
    caplog.set_level("WARNING")
    rows = [row | {"label": "good", "id": str(n)} for n, row in enumerate(ROWS)]
    load(write(tmp_path, suffix, rows))
    (line,) = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert line.endswith("columns not read: id, label, text")
    caplog.clear()
    load(write(tmp_path, suffix, rows), text_column="completion", max_documents=3)
    assert caplog.text.count("columns not read: id, label, prompt, text") == 1


def test_keys_of_messages_that_are_not_read_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    read_back(tmp_path, {"messages": [{**QUESTION, "name": "Ann", "id": None}, ANSWER]})
    assert [r.getMessage() for r in caplog.records if "not read" in r.getMessage()] == [
        f"{tmp_path / 'data.jsonl'}: keys of messages not read: name"
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["weight", "train", "trainable", "loss"])
def test_a_row_that_is_not_to_be_learned_is_refused_in_every_kind_of_table(tmp_path, suffix, column):
    rows = [row | {column: n != 3} for n, row in enumerate(ROWS)]
    with pytest.raises(
        UserError, match=f"column '{column}' is '?False'?, which says that the row is not to be learned"
    ):
        load(write(tmp_path, suffix, rows))


@pytest.mark.parametrize("value", [1, True, 0.7, None])
def test_weights_of_rows_that_mask_nothing_are_named_and_not_read(tmp_path, value, caplog):
    caplog.set_level("INFO")
    assert read_back(tmp_path, {"messages": [QUESTION, ANSWER], "weight": value}) == [[QUESTION, ANSWER]]
    assert "columns not read: weight" in caplog.text


def test_an_input_is_refused_only_beside_a_prompt_and_where_it_holds_something(tmp_path):
    names = {"prompt_column": "question", "completion_column": "answer"}
    row = {"question": QUESTION["content"], "answer": ANSWER["content"]}
    held_out = tmp_path / "other.jsonl"
    held_out.write_text(json.dumps({"question": "x", "answer": "y"}) + "\n")

    corpus = load(write_jsonl(tmp_path, [row | {"input": ""}]), eval=str(held_out), **names)
    assert talks(corpus)[0] == [QUESTION, ANSWER]
    with pytest.raises(UserError, match=r"data\.jsonl:1: column 'input' holds a part of what is asked"):
        load(write_jsonl(tmp_path, [row | {"input": "a letter"}]), eval=str(held_out), **names)
    assert read_back(tmp_path, {"messages": [QUESTION, ANSWER], "input": "a letter"}) == [[QUESTION, ANSWER]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_a_prompt_and_a_completion_that_are_lists_of_messages_are_one_conversation(tmp_path, suffix):
    rows = [{"prompt": talk[:1], "completion": talk[1:]} for talk in TALKS]
    assert talks(load(write(tmp_path, suffix, rows))) == BY_QUESTION


@pytest.mark.parametrize(("learn_from", "weight"), [("completions", 0), ("all", None)])
def test_answers_in_a_prompt_of_messages_are_read_and_not_learned(tmp_path, learn_from, weight):
    row = {"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER, QUESTION, ANSWER], "system": "Be kind."}
    (talk,) = read_back(tmp_path, row, learn_from=learn_from)
    assert [message["role"] for message in talk] == ["system", *["user", "assistant"] * 3]
    assert [message.get("weight") for message in talk] == [None, None, weight, None, None, None, None]


def test_a_prompt_of_messages_can_have_a_completion_of_text(tmp_path):
    row = {"prompt": [QUESTION], "completion": ANSWER["content"]}
    assert read_back(tmp_path, row) == [[QUESTION, ANSWER]]


SHAREGPT_TALKS = [
    [{"from": speaker, "value": message["content"]} for speaker, message in zip(("human", "gpt"), talk, strict=True)]
    for talk in TALKS
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["conversations", "messages"])
def test_sharegpt_is_a_conversation_in_every_kind_of_table(tmp_path, suffix, column):
    rows = [{"id": str(n), column: talk} for n, talk in enumerate(SHAREGPT_TALKS)]
    assert talks(load(write(tmp_path, suffix, rows))) == BY_QUESTION


@pytest.mark.parametrize(
    ("speaker", "role"), [("user", "user"), *((name, "assistant") for name in ("assistant", "chatgpt", "bard", "GPT"))]
)
def test_speakers_of_sharegpt_have_the_usual_roles(tmp_path, speaker, role):
    spoken = [("system", "Be kind."), (speaker, "Hm."), ("gpt", "Yes.")]
    (talk,) = read_back(tmp_path, {"conversations": [{"from": name, "value": text} for name, text in spoken]})
    assert [message["role"] for message in talk] == ["system", role, "assistant"]


def test_a_column_conversations_may_have_roles_and_both_forms_of_keys(tmp_path):
    """A table merged from two sources has the keys of both forms; in each message those of the other form are empty."""
    merged = [{**message, "from": None, "value": None} for message in (QUESTION, ANSWER)]
    other = [{"role": None, "content": None, "from": "human", "value": "Was it?"}, {**ANSWER, "from": None}]
    rows = [{"conversations": merged}, {"conversations": other}]
    assert read_back(tmp_path, *rows) == [[QUESTION, ANSWER], [{**QUESTION, "content": "Was it?"}, ANSWER]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_alpaca_is_a_conversation_whose_question_has_both_parts(tmp_path, suffix):
    rows = [
        {"instruction": row["prompt"], "input": subject, "output": row["completion"], "text": "all of it"}
        for row, subject in zip(ROWS, ["", "the letter"] * 15, strict=True)
    ]
    questions = [row["instruction"] + ("\n\n" + row["input"] if row["input"] else "") for row in rows]
    corpus = load(write(tmp_path, suffix, rows))
    assert [talk[0]["content"] for talk in talks(corpus)] == sorted(questions)


def test_alpaca_under_the_names_of_the_settings_is_the_same(tmp_path):
    names = {"prompt_column": "instruction", "completion_column": "output", "learn_from": "all"}
    row = {"instruction": "Translate.", "input": "Ja.", "output": "Yes.", "system": "Be kind."}
    (tmp_path / "one").mkdir()
    (talk,) = read_back(tmp_path / "one", row)
    assert [message["content"] for message in talk] == ["Be kind.", "Translate.\n\nJa.", "Yes."]

    held_out = tmp_path / "other.jsonl"
    held_out.write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n")
    corpus = load(write_jsonl(tmp_path, [row]), eval=str(held_out), **names)
    assert [json.loads(text) for text in corpus.train] == [talk]


def test_nothing_is_said_where_all_is_read(tmp_path, caplog):
    caplog.set_level("INFO")
    read_back(tmp_path, {"messages": [QUESTION, ANSWER]})
    assert "not read" not in caplog.text


def test_the_order_of_what_is_looked_for():
    columns, everything = Columns(), ["text", "completion", "prompt", "messages"]
    assert columns.document_columns("", everything) == ["messages"]
    assert columns.document_columns("", everything[:3]) == ["prompt", "completion"]
    assert columns.document_columns("", [*everything[:3], "conversations"]) == ["conversations"]
    assert columns.document_columns("", ["text", "input", "output", "instruction"]) == ["instruction", "output"]
    assert columns.document_columns("", ["text", "prompt"]) == ["text"]
    assert Columns("prompt").document_columns("", everything) == ["prompt"]
