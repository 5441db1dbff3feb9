"""A student made from some layers of a bigger model, by the whole program: chosen once, and continued bit for bit."""

import json
import shutil
from functools import partial
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

import train
from utils.checks.checklist import Check
from utils.commands import checks
from utils.errors import UserError
from utils.pretrained import layers
from utils.run import student_layers

STEPS = "2"


def arguments(place, output, *more: str) -> list[str]:
    """A command line that trains one of the two layers that the teacher of `place` has."""
    settings = ["training.save_every=1", "evaluation.every=0", "evaluation.max_windows=1"]
    student = ["--student", str(place.teacher), "--student-init", "layers:1", "--max-steps", STEPS]
    return place.arguments(output, *student, "--set", *settings, *more)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """Folder of a run in one go."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    assert train.main(arguments(place, folder)) == 0
    return folder


def test_the_student_has_the_layers_that_were_chosen(finished, capsys):
    choice = json.loads((finished / "student_layers.json").read_text())
    assert choice["depth"] == len(choice["changes"]) == 2
    assert choice["indices"] == [max(range(2), key=lambda index: choice["changes"][index])]
    assert AutoConfig.from_pretrained(finished / "student").num_hidden_layers == 1

    log = (finished / "train.log").read_text()
    assert f"layer {choice['indices'][0]} of 2" in log
    assert f"layer {choice['indices'][0]} of 2" in (finished / "config.yaml").read_text()
    assert "1 of its layers" in (finished / "student" / "README.md").read_text()


def test_a_run_is_continued_with_its_layers_and_bit_for_bit(place, finished, tmp_path, monkeypatch):
    folder = tmp_path / "continued"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "checkpoints" / "step-00000002")

    monkeypatch.setattr(layers, "choose_layers", lambda *_: pytest.fail("the choice is stored"))
    assert train.main(arguments(place, folder)) == 0
    weights, expected = (load_file(run / "student" / "model.safetensors") for run in (folder, finished))
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_another_number_of_layers_is_another_run(place, finished, capsys):
    assert train.main(arguments(place, finished, "student.init=pretrained")) == 2
    assert 'student.init: "layers:1" -> "pretrained"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["student.init=layers:3"], "has 2 layers. Expected layers:1 to layers:2"),
        (["student.init=layers:0"], "expected pretrained, random or layers:K"),
        (["student.lora.enabled=true"], "leave out --lora or layers:1"),
    ],
)
def test_what_cannot_be_is_refused_before_training(place, tmp_path, capsys, more, says):
    assert train.main(arguments(place, tmp_path / "run", *more)) == 2
    assert says in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


def test_before_a_run_its_layers_are_chosen_once_and_judged(place, tmp_path, monkeypatch):
    """Also behind the states of the whole model, which the router would compare otherwise."""
    measured = Mock(wraps=student_layers.measure)
    monkeypatch.setattr(student_layers, "measure", measured)
    setup, job = checks.own_setup(train.configure(arguments(place, tmp_path, "curriculum.layer.weight=1"))[0])
    found = {row.name: row for row in checks.run_checks(setup, job) if isinstance(row, Check)}
    assert found["layers of the student"].passed
    assert found["layers of the student"].value.endswith("those that turn the hidden states most, on 16 windows")
    assert found["router at the start"].passed
    assert measured.call_count == 1

    def unlike(*_) -> None:
        raise UserError("the layers are not alike")

    monkeypatch.setattr(layers, "require_kept", unlike)
    refused = checks.LAYERS.check({"setup": setup, "choose_layers": partial(student_layers.measure, job)})
    assert not refused.passed and refused.value == "the layers are not alike"
