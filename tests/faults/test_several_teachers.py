"""Whole runs with several teachers of different tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import train
from tests.faults.conftest import documents, write_jsonl
from utils.logs.records import read_metrics
from utils.run.quickstart import train_tokenizer

SHORT = ["--max-steps", "4", "--save-every", "2", "--set", "evaluation.every=2", "evaluation.samples=1"]


@pytest.fixture(scope="module")
def second(tmp_path_factory) -> Path:
    """A second teacher, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("second")
    tokenizer = train_tokenizer(documents(30, seed=7), 320)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, initializer_range=0.3, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def run(place, output: Path, *more: str) -> dict[str, torch.Tensor]:
    """Do a run and return the weights of its student."""
    assert train.main(place.arguments(output, *SHORT, *more)) == 0
    return load_file(output / "student" / "model.safetensors")


def are_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def report_of(output: Path) -> dict:
    return json.loads((output / "evaluation_report.json").read_text())


def test_a_run_goes_on_where_it_was_and_its_report_knows_all_teachers(place, second, tmp_path, capsys):
    teachers = ["--teacher", str(place.teacher), "--teacher", str(second)]
    output = tmp_path / "run"
    whole = run(place, output, *teachers)
    report = report_of(output)
    of_teachers = report["teacher"]["teachers"]
    assert [teacher["name"] for teacher in of_teachers] == [str(place.teacher), str(second)]
    assert report["teacher"]["bits_per_byte"] == min(teacher["bits_per_byte"] for teacher in of_teachers)
    text = (output / "report.html").read_text()
    assert text.count("Bits per byte of the teacher") == 2
    card = (output / "student" / "README.md").read_text()
    assert f"teachers `{place.teacher.name}` and `{second.name}`" in card

    # back to step 2, as if it had been killed after it
    newest = max((output / "checkpoints").iterdir(), key=lambda folder: int(folder.name.rpartition("-")[2]))
    shutil.rmtree(newest)
    shutil.rmtree(output / "student")
    capsys.readouterr()
    assert are_equal(run(place, output, *teachers), whole)
    assert "from step 2" in " ".join(capsys.readouterr().out.split())

    # another teacher, or other weights of the same ones, are another run
    weighted = f"teachers=[{place.teacher}, {{name: {second}, weight: 2}}]"
    assert train.main(place.arguments(output, *SHORT, "--set", weighted)) == 2


def test_a_teacher_with_the_only_weight_is_one_teacher_bit_for_bit(place, second, tmp_path):
    alone = run(place, tmp_path / "alone", "--teacher", str(place.teacher))
    teachers = f"teachers=[{place.teacher}, {{name: {second}, weight: 0}}]"
    assert are_equal(run(place, tmp_path / "of-two", "--set", teachers), alone)


def test_each_teacher_has_its_cache_and_is_not_loaded_again(place, second, tmp_path, capsys):
    teachers = ["--teacher", str(place.teacher), "--teacher", str(second), "--mix", "likelihood"]
    cache = ["--cache-teacher", str(tmp_path / "cache")]
    first = run(place, tmp_path / "first", *teachers, *cache)
    assert sorted(folder.name for folder in (tmp_path / "cache").iterdir()) == ["teacher", "teacher_2"]
    capsys.readouterr()
    again = run(place, tmp_path / "again", *teachers, *cache)
    assert are_equal(again, first)
    words = " ".join(capsys.readouterr().out.split())
    assert words.count("the teacher is not loaded") == 2


def test_a_cache_is_built_for_every_teacher(place, second, tmp_path, capsys):
    words = ["--teacher", str(place.teacher), "--teacher", str(second), "--cache-teacher", str(tmp_path / "cache")]
    assert train.main(place.arguments(tmp_path / "build", *SHORT, *words, "--build-cache-only")) == 0
    for name in ("teacher", "teacher_2"):
        assert list((tmp_path / "cache" / name / "shards").iterdir())
    assert " ".join(capsys.readouterr().out.split()).count("is complete of") == 2


def test_teachers_are_asked_about_their_sources(place, second, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", documents(40, seed=5))
    text = ["--train-data", str(place.text), str(other)]
    routed = f"teachers=[{{name: {place.teacher}, only_for: [{place.text}]}}, {{name: {second}, only_for: [{other}]}}]"
    run(place, tmp_path / "routed", *text, "--set", routed)
    records = read_metrics(tmp_path / "routed" / "metrics.jsonl")
    coverage = [record["coverage"]["anchored"] for record in records if "coverage" in record]
    # every window is for one of the two
    assert coverage and min(coverage) > 0.5


def test_teachers_are_asked_about_the_rows_of_their_values(place, second, tmp_path, capsys):
    texts = documents(60, seed=5)
    rows = [{"text": text, "domain": ("code", "law", "poems")[index % 3]} for index, text in enumerate(texts)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*SHORT, "--train-data", str(file), "--set"]
    of_first = f"{{name: {place.teacher}, only_for: {{domain: [code, poems]}}}}"
    of_second = f"{{name: {second}, only_for: {{domain: [law]}}}}"
    run(place, tmp_path / "routed", *words[len(SHORT) :], f"teachers=[{of_first}, {of_second}]")
    records = read_metrics(tmp_path / "routed" / "metrics.jsonl")
    coverage = [record["coverage"]["anchored"] for record in records if "coverage" in record]
    # every window is for one of the two
    assert coverage and min(coverage) > 0.5

    misspelt = f"teachers=[{of_first}, {{name: {second}, only_for: {{domain: [lwa]}}}}]"
    assert train.main(place.arguments(tmp_path / "misspelt", *words, misspelt)) == 2
    assert "got 'lwa' for the column 'domain'" in " ".join(capsys.readouterr().out.split())


REFUSED = {
    "only_for: got elsewhere.txt, expected sources of this run": "teachers=[{{name: {a}, only_for: [elsewhere.txt]}}]",
    "got sources and the column domain, expected": "teachers=[{{name: {a}, only_for: [x]}}, "
    "{{name: {b}, only_for: {{domain: [x]}}}}]",
    "got domain with 0 values, expected one column": "teachers=[{{name: {a}, only_for: {{domain: []}}}}, {b}]",
    "got domain with 1 values, year with 1 values": "teachers=[{{name: {a}, only_for: {{domain: [x], year: [y]}}}}]",
    "the spans of text of each differ": "curriculum.span.weight=0.5",
    "the student's own text goes to one teacher": "curriculum.on_policy=0.5",
    "expected auto, cpu or a GPU for each": "teacher.device=spread",
    "got 0 for every weight": "teachers=[{{name: {a}, weight: 0}}]",
    "got the weight -1, expected 0 or more": "teachers=[{a}, {{name: {b}, weight: -1}}]",
    "teachers.1.wieght: unknown key": "teachers=[{a}, {{name: {b}, wieght: 1}}]",
    "compare with the first teacher, which is for some text alone": "curriculum.feat.weight=1",
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_with_several_teachers_is_refused(place, second, tmp_path, capsys, message):
    teachers = f"teachers=[{{name: {place.teacher}, only_for: [{place.text}]}}, {second}]"
    setting = REFUSED[message].format(a=place.teacher, b=second)
    assert train.main(place.arguments(tmp_path / "run", *SHORT, teachers, setting)) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_a_column_is_not_of_rows_that_are_joined(place, tmp_path, capsys):
    by_column = f"teachers=[{{name: {place.teacher}, only_for: {{domain: [x]}}}}]"
    words = [*SHORT, by_column, "data.document_start=^A"]
    assert train.main(place.arguments(tmp_path / "run", *words)) == 2
    assert "which data.document_start joins" in " ".join(capsys.readouterr().out.split())


def test_conversations_are_for_one_teacher(place, second, tmp_path, capsys):
    file = tmp_path / "chat.jsonl"
    rows = [{"prompt": text, "completion": text} for text in documents(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--teacher", str(place.teacher), "--teacher", str(second), "--train-data", str(file)]
    assert train.main(place.arguments(tmp_path / "run", *words)) == 2
    assert "got 2 teachers and conversations, expected plain text" in " ".join(capsys.readouterr().out.split())
