"""Tool calls: the bytes that both models write alike are learned from the teacher, the rest from the text alone."""

import copy
import functools
import json
import os
from datetime import date
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.text.chat import ChatEncoder
from models.text.chat_template import ConversationError
from models.text.chat_turns import chat_tokenizer, tokenizers_for_chat
from models.text.collate import PairCollator
from models.text.tokens import END, MARKER, TEXT, WRITTEN
from models.text.vocabulary import VocabularyMap
from models.types import IGNORE
from tests.models.text.test_chat import QWEN_INSTRUCT, SMOLLM_INSTRUCT
from tests.models.text.test_chat_templates import CHATML, QWEN3, SYSTEM, USER, tokenizer_of
from tests.models.tiny import Pair, plain_bytes, tiny_llama

TODAY = date(2026, 1, 31)
LLAMA_CALLS = (
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{%- if m.tool_calls %}"
    "{%- set call = m.tool_calls[0].function %}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""Writes a call as the templates of Llama 3 do: without the content beside it, its arguments as parameters."""
XML_CALLS = CHATML.replace(
    "m.content + ",
    "m.content }}{%- for call in m.tool_calls or [] %}{{- '<function=' + call.function.name + '>' }}"
    "{%- for key, value in call.function.arguments | items %}"
    "{{- '<parameter=' + key + '>' + value | string + '</parameter>' }}{%- endfor %}{{- '</function>' }}{%- endfor %}"
    "{{- ",
)
"""Writes arguments as they are, as the templates of Qwen3-Coder do."""
CALLS_IN_JSON = CHATML.replace(
    "m.content + ",
    "m.content }}{%- for call in m.tool_calls or [] %}"
    "{{- '[' + call.function.name + ']' + call.function.arguments }}{%- endfor %}{{- ",
)
"""Expects arguments that are JSON, as the templates of DeepSeek do."""
PYTHON_CALLS = CHATML.replace(
    "m.content + ",
    "m.content }}{%- for call in m.tool_calls or [] %}{{- '[' + call.function.name + '(' }}"
    "{%- for key, value in call.function.arguments | items %}{{- key + '=' }}{%- if value is string %}"
    """{{- "'" + value | replace("\\\\", "\\\\\\\\") | replace("'", "\\\\'") | replace("\n", "\\\\n") + "'" }}"""
    "{%- else %}{{- value | tojson }}{%- endif %}{%- endfor %}{{- ')]' }}{%- endfor %}"
    "{{- ",
)
"""Writes a call as Python does, as the templates of LFM2 do."""
CHANNELS = (
    "{%- for m in messages %}{%- set is_last = loop.last %}{%- if m.tool_calls %}"
    "{%- if messages[-1].role == 'tool' or is_last %}{{- '<|im_start|>assistant thinks:' + m.thinking + '<|im_end|>' }}"
    "{%- endif %}{{- '<|im_start|>assistant calls:' + (m.tool_calls[0].function | tojson) + '<|im_end|>' }}"
    "{%- elif m.role == 'assistant' and is_last and not add_generation_prompt %}"
    "{{- '<|im_start|>assistant thinks:' + m.thinking + '<|im_end|><|im_start|>assistant says:' + m.content }}"
    "{{- '<|im_end|>' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + ' says:' + m.content + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant' }}{%- endif %}"
)
"""Drops the thinking before a call once the answer is there, as the templates of gpt-oss do."""
THINKING_AND_CALLS = QWEN3.replace(
    "{{- said + '<|im_end|>\n' }}",
    "{{- said }}{%- for call in m.tool_calls or [] %}{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}",
)

TOOLS = [{"type": "function", "function": {"name": "find", "description": "Find.", "parameters": {}}}]
RESULT = {"role": "tool", "name": "find", "content": "There it is."}
ANSWER = {"role": "assistant", "content": "It is there."}


def calling(arguments: dict, content: str = "", **more) -> dict:
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


def conversation(*messages: dict, tools: list | None = TOOLS, **more) -> str:
    return json.dumps({"messages": list(messages), "tools": tools or [], **more})


def encoder_of(student: str, teacher: str, **settings) -> ChatEncoder:
    pair = [chat_tokenizer(tokenizer_of(template, size)) for template, size in ((student, 300), (teacher, 400))]
    return ChatEncoder(*pair, 4000, today=TODAY, **settings)


def texts_of(encoder: ChatEncoder, window: dict, side: int, *roles: int) -> list[str]:
    """The runs of tokens of a side that have these roles, in words."""
    name, tokenizer = ("student", "teacher")[side], encoder.sides[side].tokenizer
    texts: list[str] = []
    run: list[int] = []
    for token, role in zip(
        [*window[f"{name}_ids"].tolist(), 0], [*window[f"{name}_roles"].tolist(), None], strict=True
    ):
        if role in roles:
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


# ---------------------------------------------------------------- what is learned of a call


def test_models_that_write_a_call_alike_learn_all_of_it_from_the_teacher():
    encoder = encoder_of(QWEN_INSTRUCT, QWEN_INSTRUCT)
    (window,) = encoder.windows([conversation(USER, calling({"place": "Ulm", "n": 2}), RESULT, ANSWER)])
    call = '<tool_call>\n{"name": "find", "arguments": {"place": "Ulm", "n": 2}}\n</tool_call>'
    for side in (0, 1):
        assert texts_of(encoder, window, side, TEXT) == [call, "It is there."]
        assert texts_of(encoder, window, side, WRITTEN) == []
    assert window["bytes"] == len(call + "It is there.")


def test_of_a_call_that_models_write_in_their_own_ways_the_common_words_are_distilled():
    encoder = encoder_of(QWEN_INSTRUCT, LLAMA_CALLS)
    (window,) = encoder.windows([conversation(USER, calling({"place": "Ulm"}))])
    common = ['{"name": "find", "', '": {"place": "Ulm"}}']
    assert [texts_of(encoder, window, side, TEXT) for side in (0, 1)] == [common, common]
    assert texts_of(encoder, window, 0, WRITTEN) == ["<tool_call>\n", "arguments", "\n</tool_call><|im_end|>"]
    assert texts_of(encoder, window, 1, WRITTEN) == ["parameters", "<|eot_id|>"]
    assert window["bytes"] == len("".join(common))


def test_an_argument_that_only_one_model_escapes_is_learned_from_the_text():
    encoder = encoder_of(XML_CALLS, QWEN_INSTRUCT)
    (window,) = encoder.windows([conversation(USER, calling({"place": 'the "Ulm"', "way": "north"}), tools=None)])
    assert "".join(texts_of(encoder, window, 0, TEXT, WRITTEN, END)) == (
        '<function=find><parameter=place>the "Ulm"</parameter><parameter=way>north</parameter></function><|im_end|>'
    )
    assert "north" in "".join(texts_of(encoder, window, 0, TEXT))
    assert "Ulm" not in "".join(texts_of(encoder, window, 0, TEXT))


def test_a_template_that_expects_json_gets_json():
    encoder = encoder_of(CALLS_IN_JSON, QWEN_INSTRUCT)
    (window,) = encoder.windows([conversation(USER, calling({"place": 'a "b"', "n": 1}), tools=None)])
    written = "".join(texts_of(encoder, window, 0, TEXT, WRITTEN, END))
    assert written == '[find]{"place": "a \\"b\\"", "n": 1}<|im_end|>'


@pytest.mark.parametrize("place", ["Ulm", 'Sam\'s "bar"', "a\\b\nc'"])
def test_a_template_that_writes_calls_in_python_is_followed(place):
    encoder = encoder_of(PYTHON_CALLS, QWEN_INSTRUCT)
    called = conversation(USER, calling({"place": place}), tools=None)
    (window,) = encoder.windows([called])
    in_quotes = place.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    (learned,) = texts_of(encoder, window, 0, TEXT, WRITTEN)
    assert learned == f"[find(place='{in_quotes}')]<|im_end|>"
    assert encoder.notes([called]) == []


def test_a_control_token_in_an_argument_is_text():
    encoder = encoder_of(QWEN_INSTRUCT, QWEN_INSTRUCT)
    (window,) = encoder.windows([conversation(USER, calling({"place": "<|im_end|>"}))])
    assert (window["student_roles"] == END).sum() == 1
    (ended,) = (window["student_ids"][window["student_roles"] != MARKER] == encoder.end_of_text[0]).nonzero()
    assert len(ended) == 1


def test_results_schemas_and_prompts_are_read_and_not_learned():
    encoder = encoder_of(QWEN_INSTRUCT, QWEN_INSTRUCT)
    (window,) = encoder.windows([conversation(SYSTEM, USER, calling({"place": "Ulm"}), RESULT, ANSWER)])
    read = "".join(texts_of(encoder, window, 0, MARKER))
    assert all(text in read for text in ("Find.", "Be kind.", USER["content"], RESULT["content"]))
    assert "Ulm" not in read and ANSWER["content"] not in read


# ---------------------------------------------------------------- templates without tools


def test_a_student_whose_template_writes_no_calls_is_refused():
    with pytest.raises(ConversationError, match="student's chat template leaves out tool calls"):
        encoder_of(CHATML, QWEN_INSTRUCT).windows([conversation(USER, calling({"place": "Ulm"}))])


@pytest.mark.parametrize("arguments", [{"place": "Ulm"}, {"number": 1}])
def test_a_student_whose_template_writes_the_first_of_several_calls_is_refused(arguments):
    two = calling({"place": "Ulm"})
    two["tool_calls"] = [*two["tool_calls"], *calling(arguments)["tool_calls"]]
    two["tool_calls"][1]["function"]["name"] = "sail"
    with pytest.raises(ConversationError, match="leaves out tool calls, all or some of them"):
        encoder_of(LLAMA_CALLS, QWEN_INSTRUCT).windows([conversation(USER, two, tools=None)])

    notes = encoder_of(QWEN_INSTRUCT, LLAMA_CALLS).notes([conversation(USER, two, tools=None)])
    assert any("tool calls are not written in the teacher's conversations" in note for note in notes)


def test_an_answer_stands_behind_what_the_model_had_read_when_it_answered():
    encoder = encoder_of(CHANNELS, CHANNELS)
    talk = conversation(
        USER,
        calling({"place": "Ulm"}) | {"reasoning_content": "Where?"},
        RESULT,
        ANSWER | {"reasoning_content": "There."},
        tools=None,
    )
    windows = encoder.windows([talk])
    read = [text for window in windows for text in texts_of(encoder, window, 0, MARKER)]
    learned = [text for window in windows for text in texts_of(encoder, window, 0, TEXT, WRITTEN, END)]
    assert any(text.endswith("<|im_start|>assistant") and "thinks:Where?" in text for text in read)
    assert any(f" thinks:There.<|im_end|><|im_start|>assistant says:{ANSWER['content']}" in text for text in learned)


def test_a_teacher_whose_template_writes_no_tools_leaves_calls_to_the_text():
    encoder = encoder_of(QWEN_INSTRUCT, CHATML)
    talk = conversation(USER, calling({"place": "Ulm"}), RESULT, ANSWER)
    (window,) = encoder.windows([talk])
    assert texts_of(encoder, window, 0, TEXT) == ["It is there."]
    assert '"place": "Ulm"' in "".join(texts_of(encoder, window, 0, WRITTEN))
    notes = encoder.notes([talk, json.dumps([USER, ANSWER])])
    assert any("teacher's chat template does not write the tools that may be called: 1 of 2" in note for note in notes)
    assert any("tool calls are not written in the teacher's conversations" in note for note in notes)


def test_a_content_beside_a_call_that_the_students_template_drops_is_refused():
    talk = conversation(USER, calling({"place": "Ulm"}, content="Wait."), tools=None)
    with pytest.raises(ConversationError, match="the text beside the tool calls"):
        encoder_of(LLAMA_CALLS, QWEN_INSTRUCT).windows([talk])
    encoder = encoder_of(QWEN_INSTRUCT, LLAMA_CALLS)
    assert any("the text beside tool calls is not written in the teacher's" in note for note in encoder.notes([talk]))


def test_a_model_without_a_template_writes_tools_in_words():
    encoder = ChatEncoder(chat_tokenizer(tokenizer_of(None)), chat_tokenizer(tokenizer_of(QWEN_INSTRUCT)), 4000)
    (window,) = encoder.windows([conversation(USER, calling({"place": "Ulm"}, content="Wait."))])
    read = texts_of(encoder, window, 0, MARKER)[0]
    assert read.startswith('Tools:\n{"type": "function"') and read.endswith("\n\nUser:\nWho is there?\n\nAssistant:\n")
    written = "".join(texts_of(encoder, window, 0, TEXT, WRITTEN))
    assert written == 'Wait.\n<tool_call>\n{"name": "find", "arguments": {"place": "Ulm"}}\n</tool_call>'


# ---------------------------------------------------------------- thinking, and a teacher that knows more

THOUGHT = {"role": "assistant", "content": "Hi", "reasoning_content": "Hm."}


@pytest.mark.parametrize("message", [THOUGHT, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nHi"}])
def test_thinking_that_is_read_is_no_target(message):
    encoder = encoder_of(QWEN3, QWEN3, learn_reasoning=False)
    windows = encoder.windows([json.dumps([USER, message, USER, message])])
    for window in windows:
        for side in (0, 1):
            assert texts_of(encoder, window, side, TEXT, WRITTEN, END) == ["Hi<|im_end|>"] * 2
            assert "Hm." in texts_of(encoder, window, side, MARKER)[0]
    assert encoder.fingerprint != encoder_of(QWEN3, QWEN3).fingerprint


def test_a_teacher_reads_its_own_messages_before_the_same_answer():
    encoder = encoder_of(CHATML, CHATML)
    hint = {"role": "system", "content": "It is Ann."}
    earlier = [USER, {"role": "assistant", "content": "Ann, as always."}]
    talk = conversation(USER, ANSWER, tools=None, teacher_messages=[hint, *earlier, USER, ANSWER])
    (window,) = encoder.windows([talk])
    for side in (0, 1):
        assert texts_of(encoder, window, side, TEXT) == [ANSWER["content"]]
    assert "Ann" in "".join(texts_of(encoder, window, 1, MARKER))
    assert "Ann" not in "".join(texts_of(encoder, window, 0, MARKER))
    assert encoder.prompt(talk, "teacher")[0] == encoder.prompt(talk, "student")[0] == USER["content"]


def test_a_teacher_without_the_answer_is_refused():
    talk = conversation(USER, ANSWER, tools=None, teacher_messages=[USER])
    with pytest.raises(ConversationError, match="the teacher has no message for it"):
        encoder_of(CHATML, CHATML).windows([talk])


def test_values_for_a_template_change_what_its_model_reads_and_stay_in_its_template():
    tokenizers = {"student": tokenizer_of(QWEN3), "teacher": tokenizer_of(QWEN3)}
    prepared, _ = tokenizers_for_chat(tokenizers, {"student": {"enable_thinking": False}})
    asked = {
        role: tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
        for role, tokenizer in prepared.items()
    }
    assert asked["student"].endswith("<think>\n\n</think>\n\n") and asked["teacher"].endswith("assistant\n")
    again, _ = tokenizers_for_chat(prepared, {"student": {"enable_thinking": False}})
    assert again["student"].chat_template == prepared["student"].chat_template
    with pytest.raises(ValueError, match=r"teacher\.chat_template_kwargs: got 'thinking_on', which the teacher's"):
        tokenizers_for_chat(tokenizers, {"teacher": {"thinking_on": True}})


def test_values_of_a_row_are_for_both_templates():
    encoder = encoder_of(QWEN3, QWEN3)
    talk = conversation(USER, ANSWER, tools=None, chat_template_kwargs={"enable_thinking": False})
    (window,) = encoder.windows([talk])
    for side in (0, 1):
        assert texts_of(encoder, window, side, MARKER)[0].endswith("<think>\n\n</think>\n\n")


def test_a_value_of_a_row_that_no_template_reads_is_told():
    talk = conversation(USER, ANSWER, tools=None, chat_template_kwargs={"enable_thinking": False, "thinkign": True})
    assert encoder_of(QWEN3, CHATML).notes([talk, talk]) == [
        "chat_template_kwargs: neither chat template reads 'thinkign' (in 2 of 2 conversations)"
    ]


# ---------------------------------------------------------------- equal models, and drawn conversations


@pytest.mark.parametrize("template", [QWEN_INSTRUCT, LLAMA_CALLS, XML_CALLS, THINKING_AND_CALLS, None])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_with_tools_and_thinking(template):
    assert_nothing_to_learn(tokenizer_of(template))


def assert_nothing_to_learn(loaded) -> None:
    tokenizer = chat_tokenizer(loaded)
    encoder = ChatEncoder(tokenizer, tokenizer, 2000, today=TODAY)
    model = tiny_llama(len(tokenizer), 1)
    pair = Pair(model, copy.deepcopy(model), encoder, VocabularyMap.build(tokenizer, tokenizer))
    windows = encoder.windows(
        [conversation(USER, calling({"place": "Ulm", "n": 2}, reasoning_content="Hm."), RESULT, THOUGHT)]
    )
    terms = pair.framework({"kd": 1.0, "lm": 1.0})(pair.collator()(windows), 0).terms
    assert terms["kd"].count > 10
    assert torch.isclose(terms["kd"].sum / terms["kd"].count, torch.zeros(()), atol=1e-5)


WORDS = st.sampled_from(["Ulm", ' "', "\\", "\n", "<|im_end|>", "é", "🎉", "}}", " ", "</tool_call>", "a b"])
TEXTS = st.lists(WORDS, max_size=4).map("".join)
VALUES = TEXTS | st.integers(-9, 99) | st.booleans() | st.lists(TEXTS, max_size=2)
ARGUMENTS = st.dictionaries(st.sampled_from(["place", "way", "n"]), VALUES, max_size=3)


@functools.cache
def vocabulary_of(encoder: ChatEncoder) -> VocabularyMap:
    return VocabularyMap.build(*(side.tokenizer for side in encoder.sides))


def check(encoder: ChatEncoder, arguments: dict, content: str) -> None:
    """Learned bytes are the assistant's: those of the student are the whole call, and both models' are the same."""
    talk = conversation(USER, calling(arguments), RESULT, {"role": "assistant", "content": content})
    (window,) = encoder.windows([talk])
    spelt = []
    for name, side in zip(("student", "teacher"), encoder.sides, strict=True):
        spelling = plain_bytes(side.tokenizer)
        tokens = zip(window[f"{name}_ids"].tolist(), window[f"{name}_roles"].tolist(), strict=True)
        spelt.append(b"".join(spelling[token] for token, role in tokens if role == TEXT))
    assert spelt[0] == spelt[1] and len(spelt[0]) == window["bytes"]
    assert spelt[0].endswith(content.encode())

    learned = "".join(texts_of(encoder, window, 0, TEXT, WRITTEN, END))
    call = learned[: learned.rindex("\n</tool_call>", 0, len(learned) - len(content))].removeprefix("<tool_call>\n")
    assert json.loads(call) == {"name": "find", "arguments": arguments}

    # A marker of either model is never what a learned row of the teacher's is about, but for the end of a turn.
    tokenizers = [side.tokenizer for side in encoder.sides]
    batch = PairCollator(vocabulary_of(encoder), encoder.end_of_text, 16)([window])
    for labels, rows, tokenizer in (
        (batch.labels, batch.row_student, tokenizers[0]),
        (batch.teacher_labels, batch.row_teacher, tokenizers[1]),
    ):
        targets = set(labels.flatten()[rows].tolist()) - {IGNORE, tokenizer.eos_token_id}
        assert not targets & set(tokenizer.all_special_ids)


@given(arguments=ARGUMENTS, content=TEXTS)
@pytest.mark.parametrize("teacher", [QWEN_INSTRUCT, LLAMA_CALLS, None])
def test_learned_bytes_are_those_of_the_assistant(teacher, arguments, content):
    check(sampled_encoder(teacher), arguments, content)


@functools.cache
def sampled_encoder(teacher: str | None) -> ChatEncoder:
    return encoder_of(QWEN_INSTRUCT, teacher)


# ---------------------------------------------------------------- real tokenizers and templates

SMOLLM2_INSTRUCT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    + SMOLLM_INSTRUCT.removeprefix("{% for message in messages %}")
)


@pytest.fixture(scope="module")
def real(real_tokenizer):
    """Tokenizer with another template, by its name."""

    def made(name: str, template: str | None):
        tokenizer = copy.deepcopy(real_tokenizer(name))
        tokenizer.chat_template = template
        return tokenizer

    return made


def test_real_tokenizers_learn_the_bytes_of_calls(real):
    encoder = ChatEncoder(
        chat_tokenizer(real("smollm", QWEN_INSTRUCT)),
        chat_tokenizer(real("qwen2.5-sub8k", QWEN_INSTRUCT)),
        4000,
        today=TODAY,
    )
    for arguments in ({"place": "Ulm", "n": 12}, {"place": 'a "b"\n\\c'}, {"way": ["<|im_end|>", "é"]}, {}):
        check(encoder, arguments, "Über 12 km, in the north.")


def test_a_real_template_without_tools_is_told(real):
    encoder = ChatEncoder(
        chat_tokenizer(real("smollm", SMOLLM2_INSTRUCT)), chat_tokenizer(real("qwen2.5-sub8k", QWEN_INSTRUCT)), 4000
    )
    with pytest.raises(ConversationError, match="the student's chat template leaves out tool calls"):
        encoder.windows([conversation(USER, calling({"place": "Ulm"}))])
    (window,) = encoder.windows([json.dumps([USER, ANSWER])])
    assert texts_of(encoder, window, 0, TEXT) == texts_of(encoder, window, 1, TEXT) == [ANSWER["content"]]


def test_a_real_student_that_is_its_teacher_has_nothing_to_learn(real):
    assert_nothing_to_learn(real("qwen2.5-sub8k", QWEN_INSTRUCT))


@pytest.mark.parametrize("file", os.environ.get("REAL_GGUF", "").split(os.pathsep))
def test_the_template_of_a_gguf_file_is_followed(file):
    """REAL_GGUF names files, such as one of Gemma."""
    if not file:
        pytest.skip("REAL_GGUF is not set")
    gguf = pytest.importorskip("gguf")
    entry = gguf.GGUFReader(Path(file)).fields.get("tokenizer.chat_template")
    if entry is None:
        pytest.skip(f"{Path(file).name} has no chat template")
    encoder = encoder_of(QWEN_INSTRUCT, bytes(entry.parts[entry.data[0]]).decode())
    (window,) = encoder.windows([json.dumps([SYSTEM, USER, ANSWER])])
    assert texts_of(encoder, window, 0, TEXT) == texts_of(encoder, window, 1, TEXT) == [ANSWER["content"]]
