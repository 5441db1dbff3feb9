"""Configs and tokenizers of the two models of a run, by the names in its settings."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.models.tiny import byte_bpe, tiny_llama
from utils.config.settings import ModelConfig, StudentConfig
from utils.errors import UserError
from utils.pretrained.named import load_shapes, load_tokenizers


@pytest.fixture
def folders(tmp_path):
    """Folders of two models and, apart from them, of a larger tokenizer."""
    for name, size in (("small", 270), ("large", 300), ("beside", 310)):
        byte_bpe(size).save_pretrained(tmp_path / name)
        if name != "beside":
            tiny_llama(size).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("small", "large", "beside")}


def config(student: StudentConfig, teacher: ModelConfig | None = None) -> SimpleNamespace:
    return SimpleNamespace(student=student, teacher=teacher or ModelConfig(), several_teachers=[])


def sizes(tokenizers) -> dict[str, int]:
    return {role: len(tokenizer) for role, tokenizer in tokenizers.items()}


def test_a_tokenizer_given_beside_a_model_goes_before_its_own(folders):
    student, teacher = StudentConfig(name=folders["small"]), ModelConfig(name=folders["large"])
    own = sizes(load_tokenizers(config(student, teacher)))
    assert own["student"] < own["teacher"]

    teacher = ModelConfig(name=folders["large"], tokenizer=folders["beside"])
    assert sizes(load_tokenizers(config(student, teacher)))["teacher"] > own["teacher"]
    student = StudentConfig(name=folders["small"], tokenizer=folders["large"])
    assert sizes(load_tokenizers(config(student)))["student"] == own["teacher"]


def test_without_a_teacher_both_sides_read_as_the_student_does(folders):
    student = StudentConfig(name=folders["small"], tokenizer=folders["large"])
    tokenizers = sizes(load_tokenizers(config(student)))
    assert tokenizers["student"] == tokenizers["teacher"]


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere", "no such folder. Expected one with tokenizer.json"),
        ("nowhere.gguf", "no such file. Expected a GGUF file"),
    ],
)
def test_a_tokenizer_that_is_not_there_is_no_fault_of_the_model(folders, tmp_path, role, name, problem):
    models = {"student": StudentConfig(name=folders["small"]), "teacher": ModelConfig(name=folders["large"])}
    models[role] = replace(models[role], tokenizer=str(tmp_path / name))
    with pytest.raises(UserError, match=rf"^{role}\.tokenizer .*{re.escape(f'{name}: {problem}')}"):
        load_tokenizers(config(**models))


def test_a_student_of_some_layers_has_a_config_of_so_many(folders):
    depth = tiny_llama(270).config.num_hidden_layers
    shapes = load_shapes(
        config(StudentConfig(name=folders["small"], init="layers:1"), ModelConfig(name=folders["large"]))
    )
    assert shapes["student"].num_hidden_layers == 1
    assert shapes["teacher"].num_hidden_layers == depth
    with pytest.raises(UserError, match=f"has {depth} layers"):
        load_shapes(config(StudentConfig(name=folders["small"], init=f"layers:{depth + 1}")))
