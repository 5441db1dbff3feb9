import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from utils.config.settings import DataConfig, ModelConfig, StudentConfig
from utils.data.documents import leakage, load_documents
from utils.errors import UserError
from utils.run import quickstart


@dataclass(frozen=True)
class SimpleRun:
    """The parts of a run's configuration that can name the material."""

    teacher: ModelConfig
    student: StudentConfig
    data: DataConfig


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def material(cache) -> quickstart.Material:
    return quickstart.material(cache)


def test_second_call_reads_what_the_first_built(cache, material, monkeypatch):
    monkeypatch.setattr(quickstart.stories, "write_stories", lambda count: pytest.fail("built again"))
    assert quickstart.material(cache) == material
    assert [path.name for path in cache.iterdir()] == [material.file.parent.name]


def test_material_is_read_without_loss_and_no_held_out_story_is_trained_on(material):
    corpus = load_documents(DataConfig(train=[str(material.file)]))
    assert corpus.report["read"] == corpus.report["train"] + corpus.report["eval"] == len(material.texts)
    assert len(corpus.eval) > 100 and leakage(corpus.train, corpus.eval) == 0


def test_nearly_every_story_fits_into_a_window(material, tokenizer):
    length = train.configure(["--config", "quickstart"])[0].data.max_length
    sizes = [len(ids) for ids in tokenizer(material.texts[:300])["input_ids"]]
    assert sum(size < length for size in sizes) > 0.95 * len(sizes)


def test_models_have_their_tokenizers_size_and_tied_embeddings(material):
    sizes = {}
    for name, vocabulary in (("teacher", 2048), ("student", 1024)):
        folder = getattr(material, name)
        config = AutoConfig.from_pretrained(folder)
        assert len(AutoTokenizer.from_pretrained(folder)) == config.vocab_size == vocabulary
        model = AutoModelForCausalLM.from_config(config)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        sizes[name] = model.num_parameters()
    assert 1e6 < sizes["teacher"] < 2e6 and 2e5 < sizes["student"] < 5e5
    assert not material.trained_teacher.exists() and material.trained_teacher.parent.is_dir()


@pytest.fixture(scope="module")
def tokenizer(material):
    return AutoTokenizer.from_pretrained(material.student)


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_tokenizer_reads_any_text_without_loss(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_training_is_repeatable(material):
    first, second = (quickstart.train_tokenizer(material.texts[:60], 600) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert first.eos_token == first.bos_token == "<|endoftext|>" and first.pad_token is None


def test_cache_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="CURRICULUM_DISTILLATION_CACHE"):
        quickstart.material(tmp_path / "file")


def test_a_failed_build_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart.stories, "write_stories", lambda count: ["text " * 50] * 3)
    monkeypatch.setattr(quickstart, "train_tokenizer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quickstart.material(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("student_config", lambda size: quickstart._llama(size, width=64, layers=2, heads=4)),
        ("TEACHER_VOCABULARY", 512),
        ("STORIES", 60),
        ("stories.NAMES", {"she": ["Ann", "Eve", "Joan"], "he": ["Bob"]}),
    ],
)
def test_other_models_vocabularies_or_stories_are_built_elsewhere(cache, material, tmp_path, monkeypatch, name, value):
    if name != "STORIES":
        monkeypatch.setattr(quickstart, "STORIES", 80)
    before = quickstart.material(tmp_path)
    monkeypatch.setattr(f"utils.run.quickstart.{name}" if "." not in name else f"utils.data.{name}", value)
    after = quickstart.material(tmp_path)
    assert after.file.parent != before.file.parent and after.fingerprint != before.fingerprint


def test_names_stand_for_paths_of_models_and_of_both_texts(material):
    def run(teacher, student, train, held_out):
        parts = (ModelConfig(teacher), StudentConfig(student), DataConfig(train=train, eval=held_out))
        return SimpleRun(*parts)

    found = quickstart.with_paths(
        run("quickstart-teacher", "quickstart", ["own.txt"], "quickstart"), material, lambda: Path("trained")
    )
    assert (found.teacher.name, found.student.name, found.student.init) == ("trained", str(material.student), "random")
    assert (found.data.train, found.data.eval) == (["own.txt"], str(material.file))
    assert quickstart.is_named(run(None, "own", ["own.txt"], "quickstart"))
    assert not quickstart.is_named(run(None, "own", ["own.txt"], None))


def test_a_teacher_is_made_in_a_place_of_its_own_or_where_a_dead_process_left_it(tmp_path, monkeypatch):
    folder = tmp_path / "teacher"
    mine = quickstart.scratch_folder(folder)
    assert mine.name.endswith(f"-{os.getpid()}") and not mine.exists()
    left = mine.with_name(mine.name.removesuffix(str(os.getpid())) + "999999999")
    (left / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(quickstart.psutil, "pid_exists", lambda number: True)
    assert quickstart.scratch_folder(folder) == mine and left.exists()
    monkeypatch.setattr(quickstart.psutil, "pid_exists", lambda number: False)
    assert quickstart.scratch_folder(folder) == mine and (mine / "checkpoints").is_dir() and not left.exists()


def test_of_two_that_made_the_same_folder_the_faster_one_counts(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "student").mkdir(parents=True)
        (tmp_path / name / "student" / "made_by").write_text(name)
        quickstart.put_into_place(tmp_path / name, tmp_path / "folder")
        assert not (tmp_path / name).exists()
    assert (tmp_path / "folder" / "made_by").read_text() == "first"
    with pytest.raises(OSError):
        quickstart.put_into_place(tmp_path / "nothing", tmp_path / "other")


def test_a_mistake_in_ones_own_text_is_told_before_the_teacher_is_trained(material, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(quickstart, "material", lambda: material)
    text, output = tmp_path / "texts.jsonl", tmp_path / "run"
    text.write_text('{"text": "an open end\n', encoding="utf-8")

    assert train.main(["--config", "quickstart", "--train-data", str(text), "--output-dir", str(output)]) == 2
    said = capsys.readouterr().out
    assert "not valid JSON" in said
    assert "training one now" not in said
