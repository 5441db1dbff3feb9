"""A gallery of chat templates: of each, what is learned is what the model has to write when it is asked.

The templates are small ones that behave as those of the models they are named after.
"""

import copy
import functools
import json
from dataclasses import dataclass
from datetime import date

import pytest
import torch
from transformers import AddedToken, PreTrainedTokenizerFast

from models.text.chat import ChatEncoder
from models.text.chat_turns import chat_tokenizer, ends_turns, tokenizers_for_chat
from models.text.collate import PairCollator
from models.text.tokens import MARKER, MISMATCH, WRITTEN
from models.text.vocabulary import VocabularyMap
from models.types import IGNORE
from tests.models.tiny import Pair, byte_bpe, tiny_llama

TODAY = date(2026, 1, 31)

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
SYSTEM_BY_DEFAULT = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe of use.<|im_end|>\n' }}{%- endif %}" + CHATML
)
QWEN3 = (
    "{%- for m in messages %}{%- set said = m.content %}{%- set thought = m.reasoning_content | default('', true) %}"
    "{%- if m.role == 'assistant' and '</think>' in said %}"
    "{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- said + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{%- set system = '' %}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
GEMMA3 = (
    "{{- bos_token }}{%- set first = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set first = messages[0].content + '\n\n' %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}"
    "{{- m.content | trim + '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}{%- else %}{{- ' ' + m.content + eos_token }}"
    "{%- endif %}{%- endfor %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM3 = (
    "{%- if enable_thinking is not defined %}{%- set enable_thinking = true %}{%- endif %}"
    "{{- '<|im_start|>system\nDate: ' + strftime_now('%d %B %Y') + '\nMode: ' }}"
    "{{- ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' }}"
    "{%- for m in messages %}{%- set said = m.content %}{%- if m.role == 'assistant' and not enable_thinking %}"
    "{%- set said = '<think>\n\n</think>\n' + said.lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if not enable_thinking %}{{- '<think>\n\n</think>\n' }}{%- endif %}{%- endif %}"
)
GPT_OSS = (
    "{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- if m.thinking and loop.last %}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
R1 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}{%- endif %}"
    "{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}{%- endif %}"
    "{%- if m.role == 'assistant' %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"
)
QWEN3_THINKS = QWEN3.replace(
    "{{- '<|im_start|>assistant\n' }}{%- if", "{{- '<|im_start|>assistant\n<think>\n' }}{%- if"
)
GRANITE = (
    "{%- if messages[0].role != 'system' %}{{- '<|start_of_role|>system<|end_of_role|>Today: ' }}"
    "{{- strftime_now('%B %d, %Y') + '<|end_of_text|>\n' }}{%- endif %}{%- for m in messages %}"
    "{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
COMMAND = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|START_OF_TURN|><|' + m.role + '|>' }}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{%- else %}{{- m.content }}{%- endif %}"
    "{{- '<|END_OF_TURN|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|START_OF_TURN|><|assistant|>' }}{%- endif %}"
)
GLM = (
    "{{- '[gMASK]<sop>' }}{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
LLAMA2 = (
    "{%- set system = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m.content + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)
DEEPSEEK_CODER = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '### Response:\n' + m.content + '\n<|EOT|>\n' }}"
    "{%- else %}{{- '### Instruction:\n' + m.content + '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### Response:' }}{%- endif %}"
)
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<think>",
    "</think>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|User|>",
    "<|Assistant|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
    "<|START_OF_TURN|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|END_OF_TURN|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "[gMASK]",
    "<sop>",
    "[INST]",
    "[/INST]",
    "<|EOT|>",
]


@dataclass(frozen=True)
class Model:
    """A chat template, and what a model with it writes when it is to answer Hi."""

    template: str
    writes: str
    end: str


GALLERY = {
    "qwen2.5": Model(SYSTEM_BY_DEFAULT, "Hi<|im_end|>", "<|im_end|>"),
    "qwen3": Model(QWEN3, "<think>\n\n</think>\n\nHi<|im_end|>", "<|im_end|>"),
    "qwen3-thinking": Model(QWEN3_THINKS, "\n</think>\n\nHi<|im_end|>", "<|im_end|>"),
    "llama-3.2": Model(LLAMA3, "Hi<|eot_id|>", "<|eot_id|>"),
    "gemma-3": Model(GEMMA3, "Hi<end_of_turn>", "<end_of_turn>"),
    "mistral": Model(MISTRAL, " Hi</s>", "</s>"),
    "phi-4": Model(PHI4, "Hi<|im_end|>", "<|im_end|>"),
    "phi-3": Model(PHI3, "Hi<|end|>", "<|end|>"),
    "smollm2": Model(SYSTEM_BY_DEFAULT, "Hi<|im_end|>", "<|im_end|>"),
    "smollm3": Model(SMOLLM3, "Hi<|im_end|>", "<|im_end|>"),
    "gpt-oss": Model(GPT_OSS, "<|channel|>final<|message|>Hi<|return|>", "<|return|>"),
    "r1-distill": Model(R1, "Hi</s>", "</s>"),
    "granite": Model(GRANITE, "Hi<|end_of_text|>", "<|end_of_text|>"),
    "command-r7b": Model(COMMAND, "<|START_RESPONSE|>Hi<|END_RESPONSE|><|END_OF_TURN|>", "<|END_OF_TURN|>"),
    "glm": Model(GLM, "\nHi<|user|>", "<|user|>"),
    "llama-2": Model(LLAMA2, " Hi </s>", "</s>"),
    "deepseek-coder": Model(DEEPSEEK_CODER, "\nHi\n<|EOT|>", "<|EOT|>"),
}

USER, SYSTEM = {"role": "user", "content": "Who is there?"}, {"role": "system", "content": "Be kind."}
HI, BYE = {"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Bye, little girl.\n\nSee you"}
CONVERSATIONS = {
    "one turn": [USER, HI],
    "three turns": [USER, BYE, USER, HI, USER, BYE],
    "with a system message": [SYSTEM, USER, BYE, USER, HI],
    "a question at the end": [USER, HI, USER],
}


def tokenizer_of(template: str, size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(byte_bpe(size))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def encoder_of(student: str, teacher: str = "qwen2.5", learn_from: str = "completions") -> ChatEncoder:
    pair = [chat_tokenizer(tokenizer_of(GALLERY[name].template, n)) for name, n in ((student, 300), (teacher, 400))]
    return ChatEncoder(*pair, 2000, learn_from, TODAY)


def taken(name: str, kind: str) -> list[dict]:
    """A conversation, or a skipped test where the template takes no system message."""
    if kind == "with a system message" and name == "mistral":
        pytest.skip("refused by the template")
    return CONVERSATIONS[kind]


def learned_runs(window: dict, side: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    runs, run = [], []
    roles = window[f"{side}_roles"].tolist()
    for i, role in zip([*window[f"{side}_ids"].tolist(), 0], [*roles, MARKER], strict=True):
        if role != MARKER:
            run.append(i)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def asked_and_answered(tokenizer: PreTrainedTokenizerFast, talk: list[dict], answer: int) -> tuple[str, str]:
    asked = tokenizer.apply_chat_template(talk[:answer], tokenize=False, add_generation_prompt=True)
    return asked, tokenizer.apply_chat_template(talk[: answer + 1], tokenize=False)


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", GALLERY)
def test_what_is_learned_is_what_follows_the_models_own_generation_prompt(name, kind):
    model, talk = GALLERY[name], taken(name, kind)
    encoder = encoder_of(name)
    tokenizer = encoder.sides[0].tokenizer
    runs = []
    for window in encoder.windows([json.dumps(talk)]):
        runs += learned_runs(window, "student", tokenizer)

    expected = []
    for number, message in enumerate(talk):
        if message["role"] == "assistant":
            asked, answered = asked_and_answered(tokenizer, talk, number)
            assert answered.startswith(asked)
            behind = answered[len(asked) :]
            said = behind.rindex(message["content"]) + len(message["content"])
            end = behind.find(model.end, said)
            expected.append(behind[: end + len(model.end)] if end >= 0 else behind + model.end)
    assert sorted(runs) == sorted(expected)
    assert ends_turns(tokenizer) and tokenizer.eos_token == model.end


@pytest.mark.parametrize("name", GALLERY)
def test_what_a_model_writes_is_known_in_words_and_asked_for_as_its_card_says(name):
    """By a tokenizer that is saved and loaded, as whoever uses the student does it."""
    model, encoder = GALLERY[name], encoder_of(name)
    (window,) = encoder.windows([json.dumps([USER, HI])])
    assert learned_runs(window, "student", encoder.sides[0].tokenizer) == [model.writes]

    shown, ids = encoder.prompt(json.dumps([USER, HI]), "student")
    asked = encoder.sides[0].tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert shown == USER["content"] and ids == asked
    assert window["student_ids"].tolist()[: len(ids)] == ids


@pytest.mark.parametrize("name", GALLERY)
def test_templates_of_the_gallery_lack_nothing_but_what_is_said(name):
    _, lacking = tokenizers_for_chat({"student": tokenizer_of(GALLERY[name].template)})
    if name != "r1-distill":
        assert lacking == []
        return
    (line,) = lacking
    assert "'<|Assistant|><think>\\n'" in line and "'<|Assistant|>'" in line and "exported" in line


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", GALLERY)
def test_all_messages_are_learned_with_answers_as_they_are_asked_for(name, kind):
    talk = taken(name, kind)
    if name in ("gemma-3", "llama-2", "llama-3.2") and kind == "with a system message":
        talk = talk[1:]
    if name in ("smollm3", "r1-distill"):
        talk = [message for message in talk if message["role"] != "system"]
    encoder = encoder_of(name, learn_from="all")
    windows = encoder.windows([json.dumps(talk)])
    assert sum(window["bytes"] for window in windows) == sum(len(m["content"].encode()) for m in talk)
    runs = [run for window in windows for run in learned_runs(window, "student", encoder.sides[0].tokenizer)]
    assert sum(USER["content"] in run for run in runs) == talk.count(USER)
    answers = [run for run in runs if "Hi" in run]
    assert len(answers) == talk.count(HI) and all(run.endswith(GALLERY[name].end) for run in answers)


@pytest.mark.parametrize("teacher", ["qwen3", "command-r7b", "llama-2", "gpt-oss"])
@pytest.mark.parametrize("name", GALLERY)
def test_markup_is_learned_but_is_no_target_and_is_not_scored(name, teacher):
    encoder = encoder_of(name, teacher)
    talk = [USER, BYE, USER, HI]
    windows = encoder.windows([json.dumps(talk)])
    tokenizers = [side.tokenizer for side in encoder.sides]
    batch = PairCollator(VocabularyMap.build(*tokenizers), encoder.end_of_text, 16)(windows)

    width = batch.student_ids.shape[1]
    anchored = set(batch.row_student.tolist())
    for row, window in enumerate(windows):
        for place, role in enumerate(window["student_roles"].tolist()):
            if role in (WRITTEN, MISMATCH, MARKER):
                assert row * width + place - 1 not in anchored
            if role == WRITTEN:
                assert batch.labels[row, place - 1] == window["student_ids"][place]

    roles = [windows[0]["teacher_roles"], windows[-1]["teacher_roles"]]
    assert teacher == "llama-2" or any((role == WRITTEN).any() for role in roles)

    spoken = sum(len(message["content"].encode()) for message in (BYE, HI))
    assert batch.bytes.sum() == spoken
    for side, tokenizer in zip(("student", "teacher"), tokenizers, strict=True):
        _, labels = batch.scored(side)
        text = "".join(tokenizer.decode(row[row != IGNORE]) for row in labels)
        assert sorted(text.replace(" ", "")) == sorted((BYE["content"] + HI["content"]).replace(" ", ""))


@pytest.mark.parametrize("name", GALLERY)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(name):
    tokenizer = chat_tokenizer(tokenizer_of(GALLERY[name].template))
    encoder = ChatEncoder(tokenizer, tokenizer, 2000, today=TODAY)
    model = tiny_llama(len(tokenizer), 1)
    pair = Pair(model, copy.deepcopy(model), encoder, VocabularyMap.build(tokenizer, tokenizer))
    windows = encoder.windows([json.dumps([USER, BYE, USER, HI])])
    terms = pair.framework({"kd": 1.0, "lm": 1.0})(pair.collator()(windows), 0).terms
    assert terms["kd"].count > 10
    assert torch.isclose(terms["kd"].sum / terms["kd"].count, torch.zeros(()), atol=1e-5)


# ---------------------------------------------------------------- thinking


THOUGHT = "She knocks.\n\nSo greet her."
IN_CONTENT = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nHi"}
IN_ITS_OWN_KEY = {"role": "assistant", "content": "Hi", "reasoning_content": THOUGHT}


@pytest.mark.parametrize("answer", [IN_CONTENT, IN_ITS_OWN_KEY], ids=["in content", "in its own key"])
def test_thinking_is_learned_in_front_of_every_answer_and_distilled_where_both_models_write_it(answer):
    encoder = encoder_of("qwen3", "qwen3")
    windows = encoder.windows([json.dumps([USER, answer, USER, answer])])
    runs = [run for window in windows for run in learned_runs(window, "student", encoder.sides[0].tokenizer)]
    assert runs == [f"<think>\n{THOUGHT}\n</think>\n\nHi<|im_end|>"] * 2
    assert sum(window["bytes"] for window in windows) == 2 * len(THOUGHT + "Hi")
    assert encoder.notes([json.dumps([USER, answer])]) == []


def test_a_teacher_that_writes_no_thinking_leaves_it_to_the_text():
    encoder = encoder_of("qwen3", "r1-distill")
    talk = json.dumps([USER, IN_CONTENT])
    (window,) = encoder.windows([talk])
    (run,) = learned_runs(window, "student", encoder.sides[0].tokenizer)
    assert run == f"<think>\n{THOUGHT}\n</think>\n\nHi<|im_end|>" and window["bytes"] == 2
    (note,) = encoder.notes([talk, json.dumps([USER, HI])])
    assert "not written in the teacher's conversations" in note and "1 of 2" in note


def test_a_student_whose_template_drops_thinking_in_a_content_is_refused():
    with pytest.raises(
        ValueError, match=r"the student's chat template leaves out the thinking .*Take the thinking out"
    ):
        encoder_of("r1-distill").windows([json.dumps([USER, IN_CONTENT])])


def test_thinking_in_its_own_key_that_a_template_does_not_write_is_named():
    (note,) = encoder_of("phi-4", "qwen3").notes([json.dumps([USER, IN_ITS_OWN_KEY])])
    assert "(reasoning_content, <think>) is not written in the student's conversations" in note


def test_an_answer_that_is_read_and_not_learned_is_a_marker():
    encoder = encoder_of("qwen2.5")
    bad = {"role": "assistant", "content": "BAD", "weight": 0}
    (window,) = encoder.windows([json.dumps([USER, bad, USER, HI])])
    assert learned_runs(window, "student", encoder.sides[0].tokenizer) == ["Hi<|im_end|>"]
    shown, ids = encoder.prompt(json.dumps([USER, HI, {"role": "user", "content": "More"}, bad]), "student")
    assert shown == USER["content"] and "Hi" not in encoder.sides[0].tokenizer.decode(ids)


# ---------------------------------------------------------------- what a template leaves out or changes


ONLY_USER_AND_ASSISTANT = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
    "{%- if m.role in ('user', 'assistant') %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endif %}",
)


def encoder_for(student: str, teacher: str = CHATML) -> ChatEncoder:
    """An encoder of templates that are in no gallery."""
    return ChatEncoder(*(chat_tokenizer(tokenizer_of(template)) for template in (student, teacher)), 2000, today=TODAY)


@pytest.mark.parametrize("role", ["system", "developer", "tool", "context"])
def test_messages_that_a_template_does_not_write_are_counted_for_each_model(role):
    left_out = {"role": role, "content": "Answer in French."}
    talks = [[left_out, USER, HI], [USER, left_out, HI], [USER, HI]]
    texts = [json.dumps(talk) for talk in talks]

    told = f"chat template does not write {role} messages: 2 of 3 conversations are read without them"
    assert encoder_for(ONLY_USER_AND_ASSISTANT).notes(texts) == [f"the student's {told}"]
    assert encoder_for(CHATML, ONLY_USER_AND_ASSISTANT).notes(texts) == [f"the teacher's {told}"]
    both = encoder_for(ONLY_USER_AND_ASSISTANT, ONLY_USER_AND_ASSISTANT).notes(texts)
    assert sorted(both) == [f"the student's {told}", f"the teacher's {told}"]


def test_an_answer_to_read_that_a_template_does_not_write_is_counted():
    template = CHATML.replace("in messages %}", "in messages %}{%- if not (loop.index0 == 1 and not loop.last) %}", 1)
    template = template.replace("{%- endfor %}", "{%- endif %}{%- endfor %}", 1)
    (note,) = encoder_for(template).notes([json.dumps([USER, BYE | {"weight": 0}, USER, HI])])
    assert "the student's chat template does not write assistant messages: 1 of 1" in note


@pytest.mark.parametrize("template", [CHATML, LLAMA3, GEMMA3, LLAMA2, R1], ids=["own", "first", "gemma", "llama", "r1"])
def test_a_system_message_that_is_written_somewhere_is_no_reason_to_warn(template):
    system = {"role": "system", "content": "Be kind."}
    assert encoder_for(template).notes([json.dumps([system, USER, HI])]) == []


def test_a_message_that_says_nothing_is_not_missed():
    talk = json.dumps([{"role": "system", "content": " "}, USER, HI])
    assert encoder_for(ONLY_USER_AND_ASSISTANT).notes([talk]) == []


def test_what_stands_before_an_answer_that_is_learned_in_a_piece_of_its_own_is_not_missed():
    """Results of tools that go away once the user has spoken again."""
    template = CHATML.replace(
        "in messages %}", "in messages %}{%- if m.role != 'tool' or loop.index0 > messages | length - 3 %}", 1
    ).replace("{%- endfor %}", "{%- endif %}{%- endfor %}", 1)
    tool = {"role": "tool", "content": "42"}
    assert encoder_for(template).notes([json.dumps([USER, tool, HI, USER, HI])]) == []


NO_THINK = (
    "{%- set mode = '/no_think' if '/no_think' in messages[0].content else '/think' %}"
    "{{- '<|im_start|>system\nMode: ' + mode + '\n\n' + messages[0].content.replace('/no_think', '').rstrip() }}"
    "{{- '<|im_end|>\n' }}" + CHATML.replace("in messages %}", "in messages[1:] %}", 1)
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            NO_THINK,
            r"expected message 0 (system) to be written 'Be brief. /no_think', got '/no_think\n\nBe brief.'. ",
        ),
        (NO_THINK.replace("' + mode", "'"), "(system) to be written 'Be brief. /no_think', got 'Be brief.'. "),
        (
            CHATML.replace("m.content +", "(m.content | upper if m.role == 'user' else m.content) +"),
            f"message 1 (user) to be written {USER['content']!r}, got {USER['content'].upper()!r}. ",
        ),
        (
            CHATML.replace("m.role + '\n'", "m.role + (' short' if m.content | length < 19 else ' long') + '\n'"),
            "expected the text around the contents to be written 'short', got 'long'. ",
        ),
    ],
    ids=["with its mode", "taken out", "upper case", "markup"],
)
def test_a_template_that_changes_a_message_is_told_with_what_it_makes_of_it(template, expected):
    talk = [{"role": "system", "content": "Be brief. /no_think"}, USER, HI]
    with pytest.raises(ValueError, match="the student's chat template changes what is said") as error:
        encoder_for(template).windows([json.dumps(talk)])
    assert expected in str(error.value)


# ---------------------------------------------------------------- generation prompts, ends and dates


def test_a_switch_of_the_template_that_makes_prompt_and_answer_agree_is_set_for_good(tmp_path):
    """Answers have an empty block of thinking; only without thinking the generation prompt has one, too."""
    template = QWEN3_THINKS.replace(
        "{{- '<think>\n' + thought + '\n</think>\n\n' }}", "{{- '<think>\n\n</think>\n\n' }}"
    )
    template = template.replace("assistant\n<think>\n' }}{%- if", "assistant\n' }}{%- if")
    template = template.replace("{%- endif %}{%- endif %}", "{%- else %}{{- '<think>\nWell' }}{%- endif %}{%- endif %}")
    tokenizer = tokenizer_of(template)
    prepared, (line,) = tokenizers_for_chat({"student": tokenizer})
    assert "enable_thinking=false" in line
    prepared["student"].save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    asked, answered = asked_and_answered(loaded, [USER, HI], 1)
    assert asked.endswith("<think>\n\n</think>\n\n") and answered.startswith(asked)


def test_a_generation_prompt_that_fits_no_answer_is_told_before_training():
    template = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ 'You there, speak: ' }}").replace(
        "'<|im_start|>' + m.role", "'<|im_start|>' + (m.role if loop.last else m.role | upper)"
    )
    _, lines = tokenizers_for_chat({"student": tokenizer_of(template)})
    assert any("'You there, speak: '" in line and "does not begin answers so" in line for line in lines)


def test_a_template_without_an_end_says_so_and_white_space_is_none():
    _, lines = tokenizers_for_chat(
        {"student": tokenizer_of(CHATML.replace("<|im_end|>", " ").replace("<|im_start|>", ""))}
    )
    assert any("marks no end" in line for line in lines)


def test_the_date_is_the_one_that_is_given_and_the_student_is_handed_on_with_its_clock():
    tokenizer = chat_tokenizer(tokenizer_of(LLAMA3))
    days = [ChatEncoder(tokenizer, tokenizer, 500, today=date(2026, 1, n)) for n in (31, 30, 31)]
    texts = [
        encoder.sides[0].tokenizer.decode(encoder.prompt(json.dumps([USER, HI]), "student")[1]) for encoder in days
    ]
    assert "Today: 31 Jan 2026" in texts[0] and "Today: 30 Jan 2026" in texts[1]
    assert days[0].fingerprint == days[2].fingerprint != days[1].fingerprint and days[0].day == TODAY
    assert "strftime_now" in tokenizer.chat_template and "Jan" not in tokenizer.chat_template

    plain = chat_tokenizer(tokenizer_of(CHATML))
    undated = [ChatEncoder(plain, plain, 500, today=date(2026, 1, n)) for n in (30, 31)]
    assert undated[0].fingerprint == undated[1].fingerprint and undated[0].day is None


@pytest.mark.parametrize("directive", ["%d %b %Y", "%Y-%m-%d", "%B %d, %Y", "%A, %-d %B %y", "no date"])
def test_a_date_is_written_as_the_clock_would(directive):
    tokenizer = chat_tokenizer(tokenizer_of("{{- strftime_now('" + directive + "') }}" + CHATML))
    encoder = ChatEncoder(tokenizer, tokenizer, 500, today=TODAY)
    rendered = encoder.sides[0].tokenizer.apply_chat_template([USER], tokenize=False)
    assert rendered.startswith(TODAY.strftime(directive) + "<|im_start|>")
