"""A user's mistake, through the whole program: one message that helps, exit code 2, no traceback, no folder left.

What the parser, the configuration and the readers say in detail is in their own tests.
"""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import models.teacher
import train
from tests.faults.conftest import documents, write_jsonl
from utils import data, pretrained
from utils.pretrained import load_model


@pytest.fixture
def refused(place, tmp_path, capsys):
    """Words of the command line -> what was said; everything that every mistake has in common is checked."""

    def run(*words: str) -> str:
        output = tmp_path / "runs" / "run"
        assert train.main(place.arguments(output, *map(str, words))) == 2
        said = capsys.readouterr()
        assert "Traceback (" not in said.out + said.err
        assert len(re.findall(r"^\S+ (?:Error|Critical): ", said.out, re.MULTILINE)) == 1
        assert not output.exists()
        return said.out

    return run


def test_mistakes_in_settings_are_told_together(refused):
    weights = ["curriculum.kd.weight=-1", "curriculm.lm.weight=1"]
    said = refused("--temperature", "-3", "--batch-size", "0", "--max-hours", "0", "--set", *weights)
    for part in ("temperature", "training.batch_size", "training.max_hours", "kd.weight", "did you mean curriculum"):
        assert part in said
    assert "5 mistakes" in said


def test_an_unknown_flag_comes_with_the_nearest_one(refused):
    assert "did you mean --learning-rate?" in refused("--learning-rat", "1")


GOOD = json.dumps({"text": documents(1)[0]}).encode() + b"\n"


def chat(answer: str | None) -> bytes:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}).encode() + b"\n"


BAD_DATA = {
    "empty": (b"", ["0 documents read", "text column"]),
    "blank": (b'{"text": " "}\n{"text": ""}\n', ["2 documents read, 2 of them empty"]),
    "single": (GOOD, ["single document", "document_separator"]),
    "malformed": (GOOD + b'{"text": "an open end\n', ["bad.jsonl:2:", "not valid JSON", "column"]),
    "not-utf-8": (GOOD + GOOD + b'{"text": "caf\xe9"}\n', ["bad.jsonl:3:", "not UTF-8", "0xe9"]),
    "no-column": (GOOD + b'{"story": "x", "title": "y"}\n', ["bad.jsonl:2:", "'text'", "story, title", "text_column"]),
    "no-object": (b'["a", "b"]\n', ["bad.jsonl:1:", "expected an object", "list"]),
    "no-messages": (chat("hi") + b'{"messages": "hi"}\n', ["bad.jsonl:2:", "list of messages", "got str"]),
    "no-role": (chat("hi") + b'{"messages": [{"from": "x"}]}\n', ["bad.jsonl:2, message 0:", "'role'", "keys from"]),
    "no-content": (chat("a") + chat(None), ["bad.jsonl:2, message 1:", "expected text as its content", "NoneType"]),
    "half-a-pair": (b'{"prompt": "a", "answer": "b"}\n', ["bad.jsonl:1:", "prompt, answer", "data.completion_column"]),
    "mixed": (GOOD + chat("hi"), ["cannot be mixed", "bad.jsonl:2 is a conversation", "bad.jsonl:1 is plain text"]),
    "no-text": (b'{"text": 7}\n', ["bad.jsonl:1:", "expected text, got int"]),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_told_with_file_and_line(refused, tmp_path, kind):
    content, parts = BAD_DATA[kind]
    (tmp_path / "bad.jsonl").write_bytes(content)
    said = refused("--set", f"data.train=[{tmp_path / 'bad.jsonl'}]")
    for part in parts:
        assert part in said


def test_a_missing_file_is_told_with_what_is_there(refused, tmp_path):
    write_jsonl(tmp_path / "stories.jsonl", documents(2))
    said = refused("--train-data", tmp_path / "storys.jsonl")
    assert "No such file" in said and "stories.jsonl" in said


def test_evaluation_on_the_training_text_is_refused(refused, place):
    assert "also in the evaluation data" in refused("--eval-data", place.text)


def test_a_slow_tokenizer_is_refused(refused, place, tmp_path):
    shutil.copytree(place.student, tmp_path / "slow")
    (tmp_path / "slow" / "tokenizer.json").unlink()
    (tmp_path / "slow" / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    said = refused("--student", tmp_path / "slow")
    assert "student" in said and "ByT5Tokenizer" in said and "Expected a fast one" in said


def test_a_student_without_a_tokenizer_is_refused(refused, place, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(place.student / "config.json", tmp_path / "bare")
    said = refused("--student", tmp_path / "bare")
    assert "tokenizer cannot be loaded" in said and "config.json" in said


@pytest.mark.parametrize("flag", ["--teacher", "--student"])
def test_a_model_that_is_not_here_is_named_when_offline(refused, flag):
    said = refused(flag, "nobody/has-this-model")
    assert f"{flag[2:]} nobody/has-this-model" in said and "To attach a model" in said


def test_missing_weights_are_told_with_the_way_to_start_at_random(refused, place):
    assert "--student-init random" in refused("--student-init", "pretrained")


def test_weights_of_another_shape_are_refused(refused, place, tmp_path):
    shutil.copytree(place.teacher, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    for key, value, told in (
        ("num_hidden_layers", 3, "its weights lack"),
        ("intermediate_size", 48, "cannot be loaded"),
    ):
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | {key: value}))
        assert told in refused("--teacher", tmp_path / "other")


@pytest.mark.parametrize(
    ("file", "what"),
    [("model.safetensors", "weights"), ("tokenizer.json", "tokenizer"), ("config.json", "config.json")],
)
def test_a_download_cut_short_is_told_with_model_and_part(refused, place, tmp_path, file, what):
    shutil.copytree(place.teacher, tmp_path / "cut")
    content = (tmp_path / "cut" / file).read_bytes()
    (tmp_path / "cut" / file).write_bytes(content[: len(content) * 2 // 3])
    said = refused("--teacher", tmp_path / "cut")
    assert f"teacher {tmp_path / 'cut'}: its {what} cannot be loaded" in said


@pytest.mark.parametrize(("dtype", "remedy"), [("float16", "--set teacher.dtype=float32"), ("float32", "damaged")])
def test_a_teacher_that_overflows_on_the_text_is_named(refused, place, tmp_path, monkeypatch, dtype, remedy):
    monkeypatch.setattr(models.teacher, "check_head", lambda *_: None)  # on a few tokens nothing may overflow
    shutil.copytree(place.teacher, tmp_path / "hot")
    weights = load_file(tmp_path / "hot" / "model.safetensors")
    weights["model.norm.weight"][:] = float("inf")
    save_file(weights, tmp_path / "hot" / "model.safetensors", metadata={"format": "pt"})
    said = refused("--teacher", tmp_path / "hot", "--set", f"teacher.dtype={dtype}")
    assert "teacher's loss" in said and dtype in said and remedy in said


def test_weights_in_pickle_files_are_refused_unless_asked_for_and_never_run_code(refused, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place.teacher, tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    assert "--set teacher.allow_pickle=true" in refused("--teacher", tmp_path / "old")
    loaded = load_model(str(tmp_path / "old"), "teacher", torch.float32, allow_pickle=True)
    assert torch.equal(loaded.state_dict()["model.norm.weight"], weights["model.norm.weight"])

    class Bomb:
        def __reduce__(self):
            return os.system, ("touch EXECUTED",)

    torch.save(Bomb(), tmp_path / "old" / "pytorch_model.bin")
    assert "its weights cannot be loaded" in refused(
        "--teacher", tmp_path / "old", "--set", "teacher.allow_pickle=true"
    )
    assert not (tmp_path / "EXECUTED").exists()


def test_code_that_comes_with_a_model_is_refused_and_never_run(refused, place, tmp_path):
    shutil.copytree(place.teacher, tmp_path / "own-code")
    code = f"open({str(tmp_path / 'EXECUTED')!r}, 'w')\nclass C: pass\n"
    (tmp_path / "own-code" / "code.py").write_text(code)
    config = json.loads((place.teacher / "config.json").read_text()) | {"model_type": "its-own"}
    auto = {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C"}}
    (tmp_path / "own-code" / "config.json").write_text(json.dumps(config | auto))
    said = refused("--teacher", tmp_path / "own-code")
    assert f"teacher {tmp_path / 'own-code'}" in said and "Python code of its own, which is never run" in said
    assert not (tmp_path / "EXECUTED").exists()


# ----------------------------------------------------------------------------- before models are loaded


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(pretrained, "load_model", lambda *_: pytest.fail("a model was loaded first"))
    monkeypatch.setattr(data, "load_documents", lambda *_: pytest.fail("text was read first"))


@pytest.mark.usefixtures("nothing_loaded")
def test_heads_that_do_not_divide_the_widths_are_found_before_anything_is_loaded(refused):
    said = refused("--set", "router.heads=3", "curriculum.rel.weight=0.1")
    assert "router.heads 3" in said and "width 16 (student) and 32 (teacher)" in said


@pytest.mark.usefixtures("nothing_loaded")
def test_too_little_disk_is_refused_with_the_estimate_before_anything_is_loaded(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    said = refused()
    assert "too little disk" in said and "this run needs about" in said and "checkpoints" in said


@pytest.mark.usefixtures("nothing_loaded")
def test_a_gpu_without_kernels_in_this_build_is_refused_with_the_remedy_before_anything_is_loaded(refused, monkeypatch):
    """A P100 under a build that begins at compute capability 7.5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    said = refused()
    assert "Tesla P100" in said and "sm_60" in said and "https://download.pytorch.org/whl/cu126" in said


@pytest.mark.parametrize("word", ["step-00000001", "no/such/place"])
def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_loaded(refused, tmp_path, word, monkeypatch):
    monkeypatch.setattr(train, "prepare", lambda *_: pytest.fail("loaded first"))
    said = refused("--resume", tmp_path / word)
    assert f"--resume {tmp_path / word}" in said


def test_a_folder_that_cannot_be_written_to_is_refused(place, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):  # root may write anywhere
        locked = "/proc"
    assert train.main(place.arguments(f"{locked}/run")) == 2
    said = capsys.readouterr().out
    assert "cannot be written to" in said and "--output-dir" in said and "Traceback (" not in said


def test_a_folder_that_was_there_keeps_what_it_holds(place, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert train.main(place.arguments(tmp_path, "--train-data", "/no/such.txt")) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unexpected_failure_is_one_message_and_the_log_has_the_traceback(place, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("the reason")

    monkeypatch.setattr(train.FrozenTeacher, "__init__", fail)
    assert train.main(place.arguments(tmp_path / "run")) == 1
    said = capsys.readouterr()
    assert "Traceback (" not in said.out + said.err
    assert said.out.count("RuntimeError: the reason") == 1 and "train.log" in said.out
    assert "Traceback (" in (tmp_path / "run" / "train.log").read_text()
