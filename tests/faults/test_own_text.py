"""A command with a text of one's own trains on that text, measures on it, and asks for nothing else, on any machine."""

import json
import re
import shlex
import shutil
import socket
from dataclasses import asdict
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import HfApi

import train
from tests.faults.conftest import documents, write_jsonl
from tests.faults.test_documented_commands import ASKS_FOR, TRAINING
from tests.pretended import MACHINES, pretend
from utils.checks import setup
from utils.commands import checks as verification
from utils.commands import settings as run_config
from utils.commands.run import method_of
from utils.config import command_line
from utils.config.described_by import DESCRIBED_BY
from utils.config.plain import to_plain
from utils.config.settings import DataConfig
from utils.config.yaml_files import CONFIG_FOLDER, get_dotted
from utils.data.documents import document_name, errors_name_their_document, load_documents
from utils.errors import UserError
from utils.machine import hardware
from utils.parallel.accelerator import build_accelerator
from utils.pretrained import precision as precision_module
from utils.run.prepare import Job, prepare

RECIPES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))
TEXT_DEFAULTS = {key: get_dotted({"data": to_plain(DataConfig())}, key) for key in DESCRIBED_BY["data.train"]}
OWN_MODELS = ["--teacher", "my/teacher", "--student", "my/student"]


def filled(words: str) -> list[str]:
    """The words of a documented command, with names in place of what stands for the reader's own."""
    missing = [more for flag, more in ASKS_FOR.items() if flag in words and more not in words]
    words = " ".join([words, *missing])
    # A second --teacher would be a teacher beside the first.
    models = OWN_MODELS[2:] if "--teacher " in words else OWN_MODELS
    words = re.sub(r"^\.\.\.(?= |$)", " ".join([*models, "--train-data my_texts.jsonl"]), words)
    return shlex.split(words.replace("--max-hours H", "--max-hours 1"))


def describe(words: list[str]) -> dict:
    """Return the settings that decide which text a command reads, and how."""
    return asdict(train.configure(words)[0].data)


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch) -> str:
    pretend(monkeypatch, request.param)
    return request.param


# ------------------------------------------------------------------------------------ configurations


WITH_TEXT = sorted({words for _, _, words in TRAINING if "--train-data" in words or words.startswith("...")})


def test_the_documents_have_commands_for_a_text_of_ones_own():
    assert len(WITH_TEXT) >= 10 and any("my_texts.jsonl" in words for words in WITH_TEXT)
    assert {"kaggle_p100", "single_24gb", "quickstart"} <= {*RECIPES}


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_every_documented_command_reads_the_text_it_names_and_nothing_else(machine, recipe):
    for documented in WITH_TEXT:
        # A recipe that learns from the text alone has no use for what the student writes, and says so.
        if recipe == "quickstart_teacher" and "on_policy" in documented:
            continue
        # Hidden states, which neither a server nor captures tell, are compared by these.
        is_elsewhere = "--teacher http" in documented or "--teacher captures" in documented
        if recipe in ("quickstart", "reference_curriculum") and is_elsewhere:
            continue

        words = filled(documented)
        if recipe is not None and "--config" not in words:
            words = ["--config", recipe, *words]

        config = train.configure(words)[0]
        asked_for = run_config.parse(words).nested()
        assert config.data.train == get_dotted(asked_for, "data.train"), documented
        for key, default in TEXT_DEFAULTS.items():
            expected = get_dotted(asked_for, key, default)
            assert str(get_dotted(to_plain(config), key)) == str(expected), (documented, key)


def test_the_text_a_command_reads_does_not_depend_on_the_machine(monkeypatch):
    for documented in WITH_TEXT:
        configured = []
        for name in MACHINES:
            pretend(monkeypatch, name)
            configured.append(to_plain(train.configure(filled(documented))[0]))
        assert all(config == configured[0] for config in configured), documented


@pytest.mark.parametrize("replace", [["--train-data", "my.txt"], ["--set", "data.train=[my.txt]"]])
def test_a_text_alone_is_read_in_the_same_way_on_every_machine(monkeypatch, replace):
    read = []
    for name in MACHINES:
        pretend(monkeypatch, name)
        data = describe(replace)
        read.append({key: data[key.partition(".")[2]] for key in ("data.train", *TEXT_DEFAULTS)})
    assert all(one == read[0] == {"data.train": ["my.txt"], **TEXT_DEFAULTS} for one in read)


def test_a_whole_section_on_the_command_line_replaces_that_of_a_recipe(machine):
    data = describe(["--config", "kaggle_p100", "--set", "data={train: [my.txt], max_length: 64}"])
    assert data == asdict(DataConfig(train=["my.txt"], max_length=64))


def test_models_of_ones_own_take_no_recipe_on_any_machine(machine):
    config, note = train.configure([*OWN_MODELS, "--train-data", "my.txt"])
    assert (config.teacher.name, config.student.name) == ("my/teacher", "my/student")
    assert note.startswith("no recipe") and config.output_dir == "runs/train"
    for words in (["--set", "teacher.name=a", "student.name=b", "data.train=[c]"], ["--set", "student={name: b}"]):
        assert command_line._default_recipe(train.RunConfig, run_config.parse(words).nested())[0] is None


# ---------------------------------------------------------------------------------- what falls, and how it is told


def test_what_falls_with_a_text_is_told_by_name():
    _, note = train.configure(["--config", "kaggle_p100", "--train-data", "my.txt"])
    for words in ("data.eval 'Salesforce/wikitext", "data.document_start '^ = [^=]'", "data.max_documents 12000"):
        assert words in note
    _, note = train.configure(["--config", "quickstart", "--train-data", "my.txt"])
    assert "not taken" not in note


def test_what_is_given_beside_a_text_stays():
    words = ["--config", "kaggle_p100", "--train-data", "my.txt", "--eval-data", "other.txt"]
    words += ["--set", "data.document_start=^Title", "data.max_documents=7"]
    config, note = train.configure(words)
    assert (config.data.eval, config.data.document_start, config.data.max_documents) == ("other.txt", "^Title", 7)
    assert "not taken" not in note


def test_an_evaluation_text_alone_is_not_read_as_the_training_text_of_a_recipe(tmp_path):
    titles_and_lines = [line for n in range(40) for line in (f" = Title {n} = \n", f"Line of text {n}.")]
    wiki = tmp_path / "wiki.jsonl"
    wiki.write_text("".join(json.dumps({"line": line}) + "\n" for line in titles_and_lines))
    stories = write_jsonl(tmp_path / "stories.jsonl", [f"Story {n}." for n in range(40)])
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        f"teacher: {{name: t}}\nstudent: {{name: s}}\n"
        f"data: {{train: ['{wiki}'], text_column: line, document_start: '^ = [^=]', max_documents: 5}}\n"
    )

    config, note = train.configure(["--config", str(recipe), "--eval-data", str(stories)])
    corpus = load_documents(config.data)
    assert len(corpus.eval) == 40 and len(corpus.train) == 5
    assert all("Title" in text and "Line of text" in text for text in corpus.train)
    assert config.data.train_only == ["text_column", "document_start"]
    assert "data.text_column 'line', data.document_start '^ = [^=]'" in note

    wrong = ValueError("wrong")
    wrong.document = document_name("Story 7.")
    with pytest.raises(UserError, match=r"stories\.jsonl:8"), errors_name_their_document(config.data):
        raise wrong


def test_what_is_given_beside_an_evaluation_text_holds_for_it(machine):
    words = ["--config", "kaggle_p100", "--eval-data", "my.txt"]
    config, note = train.configure(words)
    assert config.data.train_only == ["document_start"] and config.data.document_start == "^ = [^=]"
    assert "data.document_start '^ = [^=]' (--set" in note

    config, note = train.configure([*words, "--set", "data.document_start=^Title"])
    assert config.data.train_only == [] and "evaluation text is another one" not in note

    config, note = train.configure([*words, "--train-data", "other.txt"])
    assert config.data.train_only == [] and "evaluation text is another one" not in note


def test_the_evaluation_text_of_a_recipe_is_read_as_its_training_text(machine):
    recipe_text = "Salesforce/wikitext:wikitext-103-raw-v1:validation"
    for words in ([], ["--eval-data", train.configure(["--config", "kaggle_p100"])[0].data.eval or recipe_text]):
        assert train.configure(["--config", "kaggle_p100", *words])[0].data.train_only == []


@pytest.mark.parametrize("words", [[], ["--train-data", "Salesforce/wikitext:wikitext-103-raw-v1"]])
def test_a_recipe_keeps_what_describes_its_own_text(words):
    config, note = train.configure(["--config", "kaggle_p100", *words])
    assert config.data.max_documents == 12000 and config.data.document_start and "not taken" not in note


def test_the_rule_holds_for_a_recipe_of_ones_own_and_how_is_learned_stays(tmp_path):
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "teacher: {name: t, dtype: 4bit, allow_pickle: true}\n"
        "student: {name: s, init: random, allow_pickle: true, lora: {rank: 3, targets: [q_proj]}}\n"
        "data: {train: [x], text_column: story, split: test, eval_fraction: 0.2, max_length: 64, learn_from: all}\n"
        "training: {seed: 5}\n"
    )
    own = ["--config", str(recipe)]

    config, note = train.configure([*own, "--train-data", "y"])
    assert (config.data.text_column, config.data.split) == (None, "train")
    assert (config.data.eval_fraction, config.data.max_length, config.data.learn_from) == (0.2, 64, "all")
    assert config.student.init == "random" and "data.text_column 'story'" in note and "data.split 'test'" in note

    config, note = train.configure([*own, "--teacher", "u", "--student", "v"])
    assert not config.teacher.allow_pickle and not config.student.allow_pickle  # said of other files
    assert config.student.lora.targets == ["all-linear"] and "student.lora.targets ['q_proj']" in note
    assert (config.teacher.dtype, config.student.lora.rank, config.training.seed) == ("4bit", 3, 5)
    assert config.data.text_column == "story" and config.student.init == "random"

    config, _ = train.configure([*own, "--student", "v"])
    assert config.teacher.allow_pickle and not config.student.allow_pickle


def test_toy_models_under_a_text_of_ones_own_are_told(monkeypatch):
    pretend(monkeypatch, "cpu")
    config, note = train.configure(["--train-data", "my.txt"])
    assert config.student.name == "quickstart" and "give --teacher and --student" in note
    assert "give --teacher" not in train.configure([])[1]


# ----------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("recipe", [None, *(name for name in RECIPES if "quickstart" not in name)])
def test_precision_is_that_of_the_card_whatever_the_recipe(machine, recipe):
    words = ["--config", recipe] if recipe else []
    config, device = train.configure(words)[0], hardware.choose_device().value
    precision = hardware.choose_precision(config.training.mixed_precision, device).value
    dtype = precision_module.frozen_dtype(config.teacher.dtype, device, precision).value
    assert (precision, dtype) == {
        "cpu": ("no", torch.float32),
        "A10": ("bf16", torch.bfloat16),
        "H100": ("bf16", torch.bfloat16),
    }.get(machine, ("fp16", torch.float16))


# ---------------------------------------------------------------------------- from the command to windows


@pytest.fixture
def home(place, tmp_path, monkeypatch) -> Path:
    """A folder with the files that README's command names, on a machine whose network answers nobody."""
    for name, hub_id in ((place.teacher, "Qwen/Qwen2.5-1.5B"), (place.student, "HuggingFaceTB/SmolLM2-360M")):
        shutil.copytree(name, tmp_path / hub_id)
    write_jsonl(tmp_path / "my_texts.jsonl", documents(90))
    write_jsonl(tmp_path / "held_out.jsonl", documents(20, seed=1))
    turns = [
        {"messages": [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[40:80]}]}
        for text in documents(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        pytest.fail("something was asked of the network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(HfApi, "model_info", refuse)
    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path


def own_text_command() -> list[str]:
    """README's command for one's own models and text."""
    (words,) = (words for page, _, words in TRAINING if page == "README.md" and "my_texts.jsonl" in words)
    return shlex.split(words)


def prepared(words: list[str]) -> Job:
    config, _ = train.configure(words)
    return prepare(config, method_of(config), build_accelerator("no", cpu=True))


def documents_in(windows: datasets.Dataset) -> set[str]:
    return {name for row in windows["documents"] for name in row.split(",")}


def named(texts: list[str]) -> set[str]:
    return {document_name(text) for text in texts}


def test_readmes_command_trains_and_measures_on_the_text_it_names(machine, home):
    job = prepared(own_text_command())
    trained, measured = documents_in(job.windows), documents_in(job.held_out.windows)
    assert trained | measured == named(documents(90)) and not trained & measured
    assert 0 < len(measured) < 20


def test_readmes_command_measures_on_the_evaluation_text_it_is_given(machine, home):
    job = prepared([*own_text_command(), "--eval-data", "held_out.jsonl"])
    assert documents_in(job.windows) == named(documents(90))
    assert documents_in(job.held_out.windows) == named(documents(20, seed=1))


def test_readmes_command_takes_conversations(machine, home):
    words = [word.replace("my_texts.jsonl", "chat.jsonl") for word in own_text_command()]
    job = prepared(words)
    assert len(documents_in(job.windows) | documents_in(job.held_out.windows)) == 60


def test_a_recipe_under_a_text_of_ones_own_reads_that_text(machine, home):
    models = own_text_command()[:4]
    job = prepared(["--config", "kaggle_p100", *models, "--train-data", "my_texts.jsonl", "--max-length", "64"])
    assert documents_in(job.windows) | documents_in(job.held_out.windows) == named(documents(90))


def test_the_checklist_checks_the_text_that_the_same_flags_train_on(machine, home):
    _, job = verification.own_setup(train.configure([*own_text_command(), "--eval-data", "held_out.jsonl"])[0])
    check = setup.documents(job)
    assert check.passed and not check.doubtful
    assert "training: 90 documents" in check.value and "held-out: 20 documents" in check.value


def test_rows_joined_into_one_document_are_found_by_run_and_checklist(home, caplog):
    joined = ["--eval-data", "held_out.jsonl", "--max-length", "64", "--set", "data.document_start=^ = [^=]"]
    job = prepared([*own_text_command(), *joined])
    assert "[RED FLAG] training text: 1 documents; the longest holds 100% of the text" in caplog.text
    check = verification.DOCUMENTS.check({"job": job})
    assert check.passed and check.doubtful and "--document-separator" in check.hint
