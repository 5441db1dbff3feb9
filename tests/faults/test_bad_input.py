"""A user's mistake, through the whole program: one message that helps, exit code 2, no traceback, no folder left.

What the parser, the configuration and the readers say in detail is in their own tests.
"""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

import train
from models.teacher import frozen as teacher_module
from tests.faults.conftest import documents, write_jsonl
from utils.data import documents as data
from utils.pretrained import loading
from utils.pretrained.loading import load_model
from utils.run import folder as run_folder
from utils.run import stages


@pytest.fixture
def refused(place, tmp_path, capsys):
    """Words of the command line -> what was said; everything that every mistake has in common is checked."""

    def run(*words: str) -> str:
        output = tmp_path / "runs" / "run"
        assert train.main(place.arguments(output, *map(str, words))) == 2
        said = capsys.readouterr()
        assert "Traceback (" not in said.out + said.err
        assert len(re.findall(r"^(?:\S+ )?(?:Error|Critical): ", said.out, re.MULTILINE)) == 1
        assert not output.parent.exists()
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
    "copies": (GOOD * 3, ["a single document", "evaluation (2 copies were left out", "data.deduplicate"]),
    "malformed": (GOOD + b'{"text": "an open end\n', ["bad.jsonl:2:", "not valid JSON", "column"]),
    "not-utf-8": (GOOD + GOOD + b'{"text": "caf\xe9"}\n', ["bad.jsonl:3:", "not UTF-8", "0xe9"]),
    "no-column": (GOOD + b'{"story": "x", "title": "y"}\n', ["bad.jsonl:2:", "'text'", "story, title", "text_column"]),
    "no-object": (b'["a", "b"]\n', ["bad.jsonl:1:", "expected an object", "list"]),
    "no-messages": (chat("hi") + b'{"messages": "hi"}\n', ["bad.jsonl:2:", "list of messages", "got text"]),
    "no-role": (chat("hi") + b'{"messages": [{"from": "x"}]}\n', ["bad.jsonl:2, message 0:", "'role'", "keys from"]),
    "no-content": (
        chat("a") + chat(None),
        ["bad.jsonl:2, message 1:", "expected text as its content", "nothing (null)"],
    ),
    "half-a-pair": (b'{"prompt": "a", "answer": "b"}\n', ["bad.jsonl:1:", "prompt, answer", "data.completion_column"]),
    "mixed": (GOOD + chat("hi"), ["cannot be mixed", "bad.jsonl:2 is a conversation", "bad.jsonl:1 is plain text"]),
    "no-text": (b'{"text": 7}\n', ["bad.jsonl:1:", "expected text, got the number"]),
    "deep": (GOOD + b"[" * 100_000, ["bad.jsonl:2:", "cannot be read as JSON"]),
    "long-number": (GOOD + b'{"text": ' + b"7" * 5000 + b"}", ["bad.jsonl:2:", "cannot be read as JSON"]),
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


def test_text_in_parquet_that_is_not_utf8_is_told_with_its_rows(refused, tmp_path):
    column = pyarrow.array([b"good", b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "bad.parquet")
    assert "bad.parquet, rows 0 to 999: not UTF-8" in refused("--train-data", tmp_path / "bad.parquet")


def test_a_pipe_is_refused_and_one_among_files_is_not_read(refused, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / "pipe.txt")
    assert "got a pipe" in refused("--train-data", folder / "pipe.txt")
    assert "No data file in folder" in refused("--train-data", folder)


def test_a_path_that_cannot_be_is_a_file_that_is_not_there(refused):
    assert "No such file" in refused("--train-data", "x" * 300 + ".txt")


def test_data_in_the_home_of_nobody_is_told(refused):
    said = refused("--train-data", "~nobody-of-this-name/x.txt")
    assert "~nobody-of-this-name stands for a home folder" in said


@pytest.mark.parametrize("value", ["2020-99-99", "!!int abc", "[" * 5000])
def test_what_is_no_yaml_is_told(refused, value):
    assert "the value cannot be read as YAML" in refused("--set", f"training.seed={value}")


def test_numbers_with_which_nothing_can_be_learned_are_refused(refused):
    said = refused("--learning-rate", "inf", "--set", "training.weight_decay=.nan", "training.max_grad_norm=inf")
    for key in ("training.learning_rate: got inf", "training.weight_decay: got nan", "training.max_grad_norm: got inf"):
        assert f"{key}, expected" in said
    assert "training.seed" in refused("--set", f"training.seed={2**32}")


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


def test_a_tokenizer_that_is_made_up_for_a_model_without_one_is_refused(refused, tmp_path):
    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300, architectures=["GPT2LMHeadModel"]).save_pretrained(
        tmp_path / "bare"
    )
    assert "Expected the files of a tokenizer" in refused("--student", tmp_path / "bare")


@pytest.mark.parametrize("change", [{"hidden_act": "nope"}, {"num_attention_heads": 0}])
def test_a_config_that_makes_no_model_is_refused(refused, place, tmp_path, change):
    shutil.copytree(place.student, tmp_path / "odd")
    config = json.loads((place.student / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | change))
    assert "odd" in refused("--student", tmp_path / "odd")


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
    monkeypatch.setattr(teacher_module, "check_head", lambda *_: None)  # on a few tokens nothing may overflow
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
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded first"))
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
    monkeypatch.setattr(stages, "prepare", lambda *_: pytest.fail("loaded first"))
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


@pytest.mark.usefixtures("nothing_loaded")
def test_a_name_that_the_run_writes_to_is_not_taken_by_something_else(place, tmp_path, capsys):
    (tmp_path / "train.log").mkdir()
    (tmp_path / "student").write_text("mine")
    assert train.main(place.arguments(tmp_path)) == 2
    said = capsys.readouterr().out
    assert "train.log is a folder, not a file, student is a file, not a folder" in " ".join(said.split())
    assert (tmp_path / "student").read_text() == "mine" and "Traceback (" not in said


def test_two_runs_do_not_share_a_folder(refused, place, tmp_path, monkeypatch):
    """The second one would take what the first is writing for leftovers."""
    monkeypatch.setattr(run_folder, "PATIENCE", 0.1)
    (tmp_path / "run").mkdir()
    with run_folder.locked_run_folder(tmp_path / "run"):
        before = sorted((tmp_path / "run").iterdir())
        assert train.main(place.arguments(tmp_path / "run", "--max-steps", "1")) == 2
        assert sorted((tmp_path / "run").iterdir()) == before
    with run_folder.locked_run_folder(tmp_path / "run"):
        pass


def test_a_folder_in_the_home_is_meant_so(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.configure(place.arguments("~/run"))[0].output_dir == str(tmp_path / "run")


def test_a_student_that_diverged_is_not_exported(place, tmp_path, capsys, monkeypatch):
    fit = stages.fit

    def diverging(framework, *arguments, **options):
        result = fit(framework, *arguments, **options)
        torch.nn.init.constant_(next(framework.student.parameters()), torch.nan)
        return result

    monkeypatch.setattr(stages, "fit", diverging)
    assert train.main(place.arguments(tmp_path / "run", "--max-steps", "3")) == 1
    said = capsys.readouterr().out
    assert "there is nothing to export" in said and "--learning-rate" in said and "Traceback (" not in said
    assert not (tmp_path / "run" / "student").exists() and (tmp_path / "run" / "checkpoints").is_dir()


def test_a_folder_that_was_there_keeps_what_it_holds(place, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert train.main(place.arguments(tmp_path, "--train-data", "/no/such.txt")) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unexpected_failure_is_one_message_and_the_log_has_the_traceback(place, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("the reason")

    monkeypatch.setattr(teacher_module.FrozenTeacher, "__init__", fail)
    assert train.main(place.arguments(tmp_path / "run")) == 1
    said = capsys.readouterr()
    assert "Traceback (" not in said.out + said.err
    assert said.out.count("RuntimeError: the reason") == 1 and "train.log" in said.out
    assert "Traceback (" in (tmp_path / "run" / "train.log").read_text()
