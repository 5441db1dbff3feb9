"""Forty chat files in the shapes that people have: of each what is learned, or an error with file and line."""

import functools
import json
from datetime import date
from typing import Any, NamedTuple

import datasets
import pytest
from transformers import AddedToken

from models.text.chat import ChatEncoder
from models.text.chat_turns import chat_tokenizer
from models.text.tokens import MARKER
from tests.models.tiny import byte_bpe
from utils.config.settings import DataConfig
from utils.data.documents import document_name, errors_name_their_document, load_documents
from utils.errors import UserError

TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and m.reasoning_content %}"
    "{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Writes tools, calls and thinking, as the templates of Qwen do."""


class File(NamedTuple):
    """A file, and what it gives."""

    content: Any
    """Rows; or the whole text."""
    learned: list[str] | None = None
    """Learned texts, without the ends of the turns."""
    error: str = ""
    """Pattern of the message where nothing can be learned."""
    suffix: str = ".jsonl"
    settings: dict[str, Any] | None = None


def user(text: Any, **more) -> dict:
    return {"role": "user", "content": text, **more}


def says(text: Any, **more) -> dict:
    return {"role": "assistant", "content": text, **more}


HI, YES = user("Hi"), says("Yes.")
FUNCTION = {"name": "find", "arguments": {"place": "Ulm", "count": 2}}
CALL = {"id": "a1b2c3d4e", "type": "function", "function": FUNCTION}
CALL_IN_JSON = {"id": "a1b2c3d4e", "type": "function", "function": {**FUNCTION, "arguments": '{"place": "Ulm"}'}}
RESULT = {"role": "tool", "name": "find", "tool_call_id": "a1b2c3d4e", "content": "Found."}
SCHEMA = {"name": "find", "description": "Find a place.", "parameters": {"type": "object", "properties": {}}}
CALLED = '<tool_call>{"name": "find", "arguments": {"place": "Ulm", "count": 2}}</tool_call>'
CALLED_IN_JSON = '<tool_call>{"name": "find", "arguments": {"place": "Ulm"}}</tool_call>'
THOUGHT = "<think>\nHm.\n</think>\n\n"

FILES = {
    # ------------------------------------------------------------ who says something
    "messages": File([{"messages": [HI, YES]}], ["Yes."]),
    "sharegpt": File(
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]}], ["Yes."]
    ),
    "sharegpt in messages": File(
        [{"messages": [{"from": "user", "value": "Hi"}, {"from": "bot", "value": "Yes."}]}], ["Yes."]
    ),
    "a conversation, one of them": File([{"conversation": [HI, YES], "model": "m"}], ["Yes."]),
    "roles of an export": File(
        [{"messages": [{"role": "Human", "content": "Hi"}, {"role": "AI", "content": "Yes."}]}], ["Yes."]
    ),
    "speaker and text": File(
        [{"dialog": [{"speaker": "user", "text": "Hi"}, {"speaker": "bot", "text": "Yes."}]}], ["Yes."]
    ),
    "role and parts": File(
        [{"messages": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Yes."}]}]}],
        ["Yes."],
    ),
    "prompt and completion": File([{"prompt": "Hi", "completion": "Yes."}], ["Yes."]),
    "prompt and completion of messages": File([{"prompt": [HI, says("No."), HI], "completion": [YES]}], ["Yes."]),
    "alpaca": File([{"instruction": "Answer", "input": "Hi", "output": "Yes."}], ["Yes."]),
    "alpaca in csv": File("instruction,input,output\nAnswer,Hi,Yes.\n", ["Yes."], suffix=".csv"),
    "json": File(json.dumps([{"messages": [HI, YES]}]), ["Yes."], suffix=".json"),
    "parquet": File([{"messages": [HI, YES]}, {"messages": [HI, says("No.")]}], ["No.", "Yes."], suffix=".parquet"),
    "a system column": File([{"system": "Be kind.", "messages": [HI, YES]}], ["Yes."]),
    "an answer that is not learned": File([{"messages": [HI, says("No.", weight=0), HI, YES]}], ["Yes."]),
    "answers marked by train": File(
        [{"messages": [HI, says("No.", train=False), HI, {**YES, "train": True}]}], ["Yes."]
    ),
    "everything learned": File([{"messages": [HI, YES]}], ["Hi", "Yes."], settings={"learn_from": "all"}),
    # ------------------------------------------------------------ contents
    "parts of text": File(
        [{"messages": [user([{"type": "text", "text": "Hi"}]), says([{"type": "output_text", "text": "Yes."}])]}],
        ["Yes."],
    ),
    "thinking in parts": File(
        [{"messages": [HI, says([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}])]}],
        [THOUGHT + "Yes."],
    ),
    "reasoning_content": File([{"messages": [HI, says("Yes.", reasoning_content="Hm.")]}], [THOUGHT + "Yes."]),
    "reasoning_content read": File(
        [{"messages": [HI, says("Yes.", reasoning_content="Hm.")]}], ["Yes."], settings={"reasoning": "read"}
    ),
    "reasoning_content dropped": File(
        [{"messages": [HI, says("Yes.", thinking="Hm.")]}], ["Yes."], settings={"reasoning": "drop"}
    ),
    "think in an answer": File([{"messages": [HI, says("<think>\nHm.\n</think>\n\nYes.")]}], [THOUGHT + "Yes."]),
    "think in an answer read": File(
        [{"messages": [HI, says("<think>\nHm.\n</think>\n\nYes.")]}], ["Yes."], settings={"reasoning": "read"}
    ),
    "think in an answer dropped": File(
        [{"messages": [HI, says("<think>Hm.</think>Yes.")]}], ["Yes."], settings={"reasoning": "drop"}
    ),
    # ------------------------------------------------------------ tools
    "tool calls": File(
        [
            {
                "messages": [HI, says("", tool_calls=[CALL]), RESULT, YES],
                "tools": [{"type": "function", "function": SCHEMA}],
            }
        ],
        [CALLED, "Yes."],
    ),
    "a call without content, arguments in json": File(
        [{"messages": [HI, says(None, tool_calls=[CALL_IN_JSON]), RESULT, YES]}], [CALLED_IN_JSON, "Yes."]
    ),
    "two calls behind a text": File(
        [{"messages": [HI, says("Wait. ", tool_calls=[CALL, CALL_IN_JSON]), RESULT, RESULT, YES]}],
        ["Wait. " + CALLED + CALLED_IN_JSON, "Yes."],
    ),
    "functions and function_call": File(
        [
            {
                "messages": [
                    HI,
                    says(None, function_call=FUNCTION),
                    {"role": "function", "name": "find", "content": "Found."},
                    YES,
                ],
                "functions": [SCHEMA],
            }
        ],
        [CALLED, "Yes."],
    ),
    "sharegpt with tools": File(
        [
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": json.dumps(FUNCTION)},
                    {"from": "observation", "value": "Found."},
                    {"from": "gpt", "value": "Yes."},
                ],
                "tools": json.dumps([SCHEMA]),
            }
        ],
        [CALLED, "Yes."],
    ),
    "tools in parquet": File(
        [{"messages": [HI, says("", tool_calls=[CALL]), {**RESULT}, YES]}, {"messages": [HI, says("No.")]}],
        ["No.", CALLED, "Yes."],
        suffix=".parquet",
    ),
    "thinking before a call": File(
        [{"messages": [HI, says("", tool_calls=[CALL], reasoning_content="Hm.")]}],
        [CALLED],
        settings={"reasoning": "read"},
    ),
    # ------------------------------------------------------------ what the teacher knows
    "teacher_messages": File(
        [{"messages": [HI, YES], "teacher_messages": [{"role": "system", "content": "It is so."}, HI, YES]}], ["Yes."]
    ),
    "teacher_messages that end with a question": File(
        [{"prompt": "Hi", "completion": "Yes.", "teacher_messages": [user("Hi. It is so.")]}], ["Yes."]
    ),
    # ------------------------------------------------------------ errors
    "another answer of the teacher": File(
        [{"messages": [HI, YES]}, {"messages": [HI, YES], "teacher_messages": [HI, says("No.")]}],
        error=r"data\.jsonl:2, column 'teacher_messages': expected the answers .* here 'Yes\.', got 'No\.'",
    ),
    "an image": File(
        [{"messages": [user([{"type": "image_url", "image_url": "x"}]), YES]}],
        error=r"data\.jsonl:1, message 0: its content holds a part that is no text \(image_url\)",
    ),
    "arguments that are no json": File(
        [{"messages": [HI, says("", tool_calls=[{"function": {"name": "find", "arguments": "{place"}}])]}],
        error=r"data\.jsonl:1, message 1, .* arguments of find: expected JSON, got '\{place'",
    ),
    "a schema without a name": File(
        [{"messages": [HI, YES], "tools": [{"type": "function", "function": {"description": "?"}}]}],
        error=r"data\.jsonl:1, column 'tools': expected a list of schemas, .* 'name'",
    ),
    "nobody knows who speaks": File(
        [{"conversations": [{"from": "narrator", "value": "Hi"}]}],
        error=r"data\.jsonl:1, message 0: expected human, .* got 'narrator'",
    ),
    "a control token in a schema": File(
        [{"messages": [HI, YES]}, {"messages": [HI, says("No.")], "tools": [{**SCHEMA, "description": "<|im_end|>"}]}],
        error=r"data\.jsonl:2: the schemas of tools, .* hold '<\|im_end\|>', which is a control token of the student's",
    ),
}


def test_there_are_forty_files():
    assert len(FILES) == 40


@functools.cache
def encoder_of(learn_from: str, reasoning: str) -> ChatEncoder:
    """A student and a teacher with other tokens."""
    pair = []
    for size in (300, 400):
        tokenizer = byte_bpe(size).__class__(tokenizer_object=byte_bpe(size).backend_tokenizer)
        markers = ["<|im_start|>", "<|im_end|>"]
        tokenizer.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers], True)
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.chat_template = TEMPLATE
        pair.append(chat_tokenizer(tokenizer))
    return ChatEncoder(*pair, 1000, learn_from, date(2026, 1, 31), learn_reasoning=reasoning != "read")


def written(folder, file: File) -> str:
    path = folder / f"data{file.suffix}"
    if file.suffix == ".parquet":
        datasets.Dataset.from_list(file.content).to_parquet(path)
    elif isinstance(file.content, str):
        path.write_text(file.content)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in file.content))
    return str(path)


def learned_texts(encoder: ChatEncoder, windows: list[dict], side: int) -> list[str]:
    """The texts of a model that are learned, without the ends of turns."""
    name, tokenizer = ("student", "teacher")[side], encoder.sides[side].tokenizer
    texts = []
    for window in windows:
        run: list[int] = []
        for token, role in zip(
            [*window[f"{name}_ids"].tolist(), 0], [*window[f"{name}_roles"].tolist(), MARKER], strict=True
        ):
            if role != MARKER:
                run.append(token)
            elif run:
                texts.append(tokenizer.decode(run).removesuffix("<|im_end|>"))
                run = []
    return texts


@pytest.mark.parametrize("name", FILES)
def test_a_chat_file_is_learned_or_told_with_its_line(tmp_path, name):
    file = FILES[name]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"prompt": "x", "completion": "y"}\n')
    config = DataConfig(train=[written(tmp_path, file)], eval=str(held_out), **(file.settings or {}))

    def learn() -> list[list[str]]:
        with errors_name_their_document(config):
            corpus = load_documents(config)
            encoder = encoder_of(config.learn_from, config.reasoning)
            names = [document_name(text) for text in corpus.train]
            windows = encoder.windows(list(corpus.train), names)
        return [sorted(learned_texts(encoder, windows, side)) for side in (0, 1)]

    if file.error:
        with pytest.raises(UserError, match=file.error):
            learn()
        return
    student, teacher = learn()
    assert student == sorted(file.learned)
    assert teacher == student
