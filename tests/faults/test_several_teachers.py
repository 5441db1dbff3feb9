"""Whole runs with several teachers of different tokenizers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train
from tests.faults.conftest import documents, write_jsonl
from tests.served import PretendedServer, running
from utils.checks.checklist import Check
from utils.commands import checks
from utils.logs.records import read_metrics
from utils.run.quickstart import train_tokenizer
from utils.served import http_client

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
    assert report["retention"]["agreement_with"] == "mixture"
    for text in ((output / "report.html").read_text(), (output / "evaluation_report.md").read_text()):
        assert "Same most probable token as the teachers' mixture" in text.replace("&#39;", "'")
        assert "Bits per byte, student over best teacher" in text
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


def test_a_cache_beside_routes_holds_the_windows_of_its_route_and_teaches_the_same(place, second, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", documents(40, seed=5))
    routed = f"teachers=[{{name: {place.teacher}, only_for: [{place.text}]}}, {{name: {second}, only_for: [{other}]}}]"
    # All outcomes are stored, as they are: the run is then that without a cache.
    exact = ["--top-k", "600", "--cache-top-k", "600", "--set", "cache.storage=float32", routed]
    words = ["--train-data", str(place.text), str(other), *exact]
    cache = ["--cache-teacher", str(tmp_path / "cache")]
    without = run(place, tmp_path / "without", *words)
    first = run(place, tmp_path / "first", *cache, *words)
    said = " ".join(capsys.readouterr().out.split())
    for name in (place.teacher, second):
        assert f"(teacher {name})" in said and f"teacher {name} on cpu" in said
    assert are_equal(first, without)

    # Each window is in the cache of its teacher alone, and a second run needs none of them.
    windows = {}
    for name in ("teacher", "teacher_2"):
        windows[name] = set()
        for shard in (tmp_path / "cache" / name / "shards").iterdir():
            with safe_open(shard, framework="np") as file:
                windows[name] |= {bytes(key) for key in file.get_tensor("keys")}
    assert windows["teacher"] and windows["teacher_2"] and windows["teacher"].isdisjoint(windows["teacher_2"])
    again = run(place, tmp_path / "again", *cache, *words)
    assert are_equal(again, first)
    assert " ".join(capsys.readouterr().out.split()).count("the teacher is not loaded") == 2


def test_a_cache_is_built_for_every_route(place, second, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", documents(40, seed=5))
    routed = f"teachers=[{{name: {place.teacher}, only_for: [{place.text}]}}, {{name: {second}, only_for: [{other}]}}]"
    words = ["--train-data", str(place.text), str(other), "--cache-teacher", str(tmp_path / "cache")]
    assert train.main(place.arguments(tmp_path / "build", *SHORT, routed, *words, "--build-cache-only")) == 0
    capsys.readouterr()
    built = run(place, tmp_path / "run", *words, "--set", routed)
    assert " ".join(capsys.readouterr().out.split()).count("the teacher is not loaded") == 2
    filled = run(place, tmp_path / "filled", *words[:-1], str(tmp_path / "another"), "--set", routed)
    assert are_equal(built, filled)


SERVED = {
    "all text": "",
    "its route": ", only_for: ['{other}']",
    "the first half": ", weight: {{points: [[0, 1], [0.4, 1], [0.5, 0]]}}",
}


@pytest.mark.parametrize("when", SERVED)
def test_a_served_teacher_is_one_of_several_and_a_cache_spares_its_server(
    place, second, tmp_path, monkeypatch, capsys, when
):
    monkeypatch.setattr(http_client, "FIRST_DELAY", 0.02)
    other = write_jsonl(tmp_path / "other.jsonl", documents(20, seed=5))
    route = SERVED[when].format(other=other)
    exact = ["--top-k", "600", "--cache-top-k", "600", "--max-length", "48", "--set", "cache.storage=float32"]
    words = ["--train-data", str(place.text), str(other), *exact]
    cache = ["--cache-teacher", str(tmp_path / "cache")]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(second), AutoTokenizer.from_pretrained(second)
    with running(PretendedServer(model, tokenizer)) as server:
        served = f"teachers=[{place.teacher}, {{name: '{server.address}', tokenizer: {second}{route}}}]"
        first = run(place, tmp_path / "first", *cache, *words, served)
        assert server.scored > 10
    local = run(place, tmp_path / "local", *words, f"teachers=[{place.teacher}, {{name: {second}{route}}}]")
    for name, value in first.items():
        torch.testing.assert_close(value, local[name], atol=1e-4, rtol=1e-3)
    assert f"teacher {server.address}: vLLM with the model tiny" in " ".join(capsys.readouterr().out.split())
    of_teachers = [report_of(tmp_path / folder)["teacher"]["teachers"] for folder in ("first", "local")]
    served_bits, local_bits = (teachers[1]["bits_per_byte"] for teachers in of_teachers)
    assert served_bits == pytest.approx(local_bits, rel=1e-4)

    # Without the server.
    scored = server.scored
    assert are_equal(run(place, tmp_path / "again", *cache, *words, served), first)
    assert server.scored == scored
    assert " ".join(capsys.readouterr().out.split()).count("the teacher is not loaded") == 2


def test_two_served_teachers_and_what_one_among_several_needs_are_refused(place, tmp_path, capsys):
    def refused(teachers: str) -> str:
        assert train.main(place.arguments(tmp_path / "run", *SHORT, f"teachers=[{teachers}]")) == 2
        return " ".join(capsys.readouterr().out.split())

    one, other = "{name: 'http://a:1/v1', tokenizer: x}", "{name: 'http://b:1/v1', tokenizer: x}"
    assert "http://a:1/v1 and http://b:1/v1 are behind servers, with one key" in refused(f"{one}, {other}")
    told = refused(f"{place.teacher}, {{name: 'http://a:1/v1'}}")
    assert "a server does not hand out its tokenizer: give it in a recipe, teachers: [{name: http://a:1/v1" in told
    on_gpu = "{name: 'http://a:1/v1', tokenizer: x, device: 'cuda:1'}"
    assert "leave teacher.device and teacher.dtype at auto" in refused(f"{place.teacher}, {on_gpu}")


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
    "a mistake in the configuration (recipe.yaml and the command line): - teachers: got 0 for every weight": "teachers="
    "[{{name: {a}, weight: 0}}]",
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


def test_a_source_that_two_are_wrongly_for_is_named_once(place, second, tmp_path, capsys):
    both = ", ".join(f"{{name: {name}, only_for: [elsewhere.txt]}}" for name in (place.teacher, second))
    text = ["--train-data", str(place.text), "--eval-data", str(place.text)]
    assert train.main(place.arguments(tmp_path / "run", *text, *SHORT, f"teachers=[{both}]")) == 2
    words = " ".join(capsys.readouterr().out.split())
    assert f"got elsewhere.txt, expected sources of this run: {place.text} " in f"{words} "


def test_one_teacher_in_place_of_a_recipes_several_is_as_it_is_described_there(place, second, tmp_path):
    recipe = tmp_path / "two.yaml"
    described = {"name": str(second), "dtype": "float32", "weight": 3, "only_for": [str(place.text)]}
    recipe.write_text(yaml.safe_dump({"teachers": [str(place.teacher), described], "student": str(place.student)}))
    words = ["--config", str(recipe), "--train-data", str(place.text)]

    config, origin = train.configure([*words, "--teacher", str(second)])
    assert not config.several_teachers and (config.teacher.name, config.teacher.dtype) == (str(second), "float32")
    assert f"not asked, since the command line names its own teachers: {place.teacher}" in origin

    config, origin = train.configure([*words, "--teacher", "a-third"])
    assert config.teacher.name == "a-third" and not config.teachers
    assert f"its own teachers: {place.teacher}, {second}" in origin
    assert "not asked" not in train.configure(words)[1]


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


def checks_of(arguments: list[str]) -> dict[str, Check]:
    """Return the checks of a set-up that lie behind those of this code, by name."""
    setup, job = checks.own_setup(train.configure(arguments)[0])
    rows = [*checks.run_checks(setup, job), *(row.check({"setup": setup}) for row in checks.RESOURCES)]
    return {row.name: row for row in rows if isinstance(row, Check)}


def test_before_a_run_every_teacher_is_checked(place, second, tmp_path):
    teachers = ["--teacher", str(place.teacher), "--teacher", str(second)]
    found = checks_of(place.arguments(tmp_path / "run", *teachers))
    assert all(check.passed for check in found.values())
    assert {"alignment coverage: teacher", "alignment coverage: teacher_2", "text in tokens: teacher_2"} <= found.keys()
    assert found["models"].value == "teacher loads; teacher_2 loads"
    assert "teacher_2 128" in found["window length"].value

    # Weights of the second one take memory, and without them there is no run.
    alone = checks_of(place.arguments(tmp_path / "run", "--teacher", str(place.teacher)))
    assert found["memory"].value != alone["memory"].value
    (second / "model.safetensors").rename(tmp_path / "weights")
    try:
        missing = checks_of(place.arguments(tmp_path / "run", *teachers))["models"]
    finally:
        (tmp_path / "weights").rename(second / "model.safetensors")
    assert not missing.passed
    assert "teacher_2" in missing.value


def test_a_teacher_of_some_text_is_checked_on_all_of_it(place, second, tmp_path):
    other = write_jsonl(tmp_path / "other.jsonl", documents(40, seed=5))
    text = ["--train-data", str(place.text), str(other)]
    routed = f"teachers=[{{name: {place.teacher}, only_for: [{place.text}]}}, {{name: {second}, only_for: [{other}]}}]"
    found = checks_of(place.arguments(tmp_path / "run", *text, "--set", routed))
    assert all(check.passed for check in found.values())
