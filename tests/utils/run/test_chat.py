"""Student and teacher of a run write beside each other, in a terminal and in a pipe."""

import io
import json
import sys

import pytest
import torch
import yaml

from models.distillation import Method
from tests.models.tiny import byte_bpe, tiny_llama
from utils.errors import UserError
from utils.pretrained.export import export
from utils.run import chat


@pytest.fixture
def run_folder(tmp_path):
    """A finished run with a tiny student and a tiny teacher."""
    export(tiny_llama(280), byte_bpe(280), tmp_path / "run" / "student", None)
    export(tiny_llama(300, seed=1), byte_bpe(300), tmp_path / "teacher", None)
    write(tmp_path / "run", teacher=str(tmp_path / "teacher"))
    return tmp_path / "run"


def write(folder, teacher, precision="no", **results):
    config = {"teacher": {"name": teacher, "dtype": "auto"}, "training": {"mixed_precision": precision}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    report = {"student": {}, "teacher": {}, "text_starts": {"student": [0], "teacher": [0]}, **results}
    (folder / "evaluation_report.json").write_text(json.dumps(report))


def piped(monkeypatch, capsys, text, *words):
    """Return what the chat prints where its input is a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.main([*map(str, words), "--new-tokens", "4"], Method.chat_tokenizers)
    return capsys.readouterr().out


def test_every_line_of_a_pipe_is_answered_by_both(run_folder, monkeypatch, capsys):
    shown = piped(monkeypatch, capsys, "Once upon a time\n\nThe end\n", run_folder)
    assert shown.count("Student: ") == shown.count("Teacher: ") == 2
    assert "Teacher" not in piped(monkeypatch, capsys, "Once\n", run_folder, "--student-only")
    assert piped(monkeypatch, capsys, "", run_folder) == ""


def test_a_teacher_that_is_gone_is_named_and_the_student_writes_alone(run_folder, monkeypatch, capsys, caplog):
    write(run_folder, teacher=str(run_folder / "nowhere"))
    shown = piped(monkeypatch, capsys, "Once upon a time\n", run_folder)
    assert "Student: " in shown and "Teacher: " not in shown
    assert "writes alone" in caplog.text and "nowhere" in caplog.text


def test_a_line_that_is_no_utf8_is_answered_too(run_folder, monkeypatch, capsys):
    shown = piped(monkeypatch, capsys, "caf\udce9\nOnce\n", run_folder, "--student-only")
    assert shown.count("Student: ") == 2


def test_the_teacher_reads_with_the_tokenizer_that_the_run_gave_it(run_folder):
    teacher = run_folder.parent / "teacher"
    apart = run_folder.parent / "tokenizer"
    apart.mkdir()
    for file in teacher.glob("tokenizer*"):
        file.rename(apart / file.name)

    write(run_folder, teacher=str(teacher))
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    config["teacher"]["tokenizer"] = str(apart)
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
    speakers = chat.load_speakers(run_folder, Method.chat_tokenizers)
    assert [speaker.name for speaker in speakers] == ["Student", "Teacher"]


@pytest.mark.parametrize("has_bf16, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_the_teacher_computes_in_what_auto_means_on_this_machine(run_folder, cpu, has_bf16, dtype):
    cpu(avx512_bf16=has_bf16)
    write(run_folder, teacher=str(run_folder.parent / "teacher"), precision="auto")
    _, teacher = chat.load_speakers(run_folder, Method.chat_tokenizers)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {dtype}


@pytest.mark.parametrize("word", ["0", "-3", "many"])
def test_a_count_of_tokens_that_is_none_is_refused(run_folder, word):
    with pytest.raises(UserError, match="expected a whole number above 0"):
        chat.main([str(run_folder), f"--new-tokens={word}"], Method.chat_tokenizers)


def test_a_student_of_conversations_remembers_its_own_answers_until_a_new_one_begins(run_folder, monkeypatch, capsys):
    write(run_folder, teacher=str(run_folder.parent / "teacher"), prompted=True)
    speakers = chat.load_speakers(run_folder, Method.chat_tokenizers)
    monkeypatch.setattr(chat, "load_speakers", lambda *arguments, **options: speakers)
    piped(monkeypatch, capsys, "Hello\nAnd then?\n", run_folder)
    for speaker in speakers:
        assert [message["role"] for message in speaker.messages] == ["user", "assistant"] * 2
    piped(monkeypatch, capsys, "/new\nHello\n", run_folder)
    assert [len(speaker.messages) for speaker in speakers] == [2, 2]


def test_a_conversation_that_is_too_long_forgets_its_beginning(run_folder):
    write(run_folder, teacher=None, prompted=True)
    [speaker] = chat.load_speakers(run_folder, Method.chat_tokenizers)
    context = speaker.model.config.max_position_embeddings
    for number in range(context // 16):
        speaker.reply(f"question {number} " + "word " * 20, 4)
    assert speaker.messages[-2]["content"].startswith(f"question {context // 16 - 1}")
    assert "question 0" not in speaker.messages[0]["content"]


@pytest.mark.parametrize(
    ("name", "problem"), [("nowhere", "no such folder"), ("run/student", "model's folder"), ("", "not finished")]
)
def test_what_is_no_finished_run_is_refused(run_folder, name, problem):
    with pytest.raises(UserError, match=problem):
        chat.main([str(run_folder.parent / name)], Method.chat_tokenizers)


class Terminal(io.StringIO):
    """A stream that a person watches."""

    def isatty(self) -> bool:
        return True


def type_into(monkeypatch, *inputs) -> Terminal:
    """Let a person type texts, and keys that raise an exception; return the screen."""
    left = list(inputs)

    def answer(prompt: str) -> str:
        assert prompt.endswith("> ")
        text = left.pop(0)
        if isinstance(text, type):
            raise text
        return text

    screen = Terminal()
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    return screen


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt], ids=["Ctrl-D", "Ctrl-C"])
def test_in_a_terminal_both_write_side_by_side_until_the_input_ends(run_folder, monkeypatch, end):
    screen = type_into(monkeypatch, "Once upon a time", "", end)
    chat.main([str(run_folder), "--new-tokens", "4"], Method.chat_tokenizers)
    assert any("Student" in line and "Teacher" in line for line in screen.getvalue().splitlines())


def test_ctrl_c_while_a_model_writes_stops_that_answer_and_the_chat_goes_on(run_folder, monkeypatch):
    write(run_folder, teacher=None, prompted=True)
    [speaker] = speakers = chat.load_speakers(run_folder, Method.chat_tokenizers)
    monkeypatch.setattr(chat, "load_speakers", lambda *arguments, **options: speakers)
    generate, calls = speaker.model.generate, []

    def interrupted_once(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(speaker.model, "generate", interrupted_once)
    screen = type_into(monkeypatch, "first", "second", EOFError)
    chat.main([str(run_folder), "--new-tokens", "4"], Method.chat_tokenizers)
    assert "(stopped)" in screen.getvalue() and "Student: " in screen.getvalue()
    assert [message["role"] for message in speaker.messages] == ["user", "assistant"]
    assert speaker.messages[0]["content"] == "second"


def test_what_a_model_writes_cannot_command_the_terminal():
    assert "\x1b" not in chat._printable("\x1b[2Jhello\x07") and "hello" in chat._printable("\x1b[2Jhello")
