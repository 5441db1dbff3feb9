"""The folder of a run is refused before training where it cannot serve."""

import os

import pytest

from utils.errors import UserError
from utils.run import folder as run_folder
from utils.run_layout import FILES, FOLDERS

CONFIG = {"resume_changed": False}


@pytest.mark.parametrize("name", FILES)
def test_a_folder_under_the_name_of_a_file_that_a_run_writes_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder, not a file"):
        run_folder.check(tmp_path, CONFIG, "auto")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_under_the_name_of_a_folder_that_a_run_writes_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"{name} is a file, not a folder"):
        run_folder.check(tmp_path, CONFIG, "auto")


def test_a_pipe_is_refused_because_it_would_be_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="a pipe, not a file"):
        run_folder.check(tmp_path, CONFIG, "auto")


def test_a_name_that_is_no_utf8_is_refused_before_training(tmp_path):
    """Python writes there, and the libraries that write weights do not."""
    folder = tmp_path / os.fsdecode(b"r\xe9n")
    with pytest.raises(UserError, match="no UTF-8"):
        run_folder.check(folder, CONFIG, "auto")
    assert not folder.exists()


@pytest.mark.parametrize("inside", ["", "runs/first"])
@pytest.mark.parametrize("key", ["teacher.name", "student.name", "data.train", "data.eval"])
def test_a_run_is_not_written_where_its_models_and_texts_are(tmp_path, key, inside):
    source = tmp_path / "source"
    source.mkdir()
    section, name = key.split(".")
    config = CONFIG | {section: {name: [str(source)] if name == "train" else str(source)}}
    with pytest.raises(UserError, match=f"which it reads from .{key}"):
        run_folder.check(source / inside, config, "auto")
    assert not list(source.iterdir())

    run_folder.check(tmp_path / "run", config, "auto")


def test_the_export_of_a_run_does_not_replace_the_model_that_it_starts_from(tmp_path):
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    with pytest.raises(UserError, match=r"which it reads from .student\.name"):
        run_folder.check(tmp_path / "run", CONFIG | {"student": {"name": str(student)}}, "auto")


@pytest.mark.parametrize("init", ["random", "pretrained", "layers:2"])
def test_a_finished_run_that_is_given_more_steps_says_how_a_follow_up_is_started(tmp_path, init):
    (tmp_path / "checkpoints" / "step-00000020").mkdir(parents=True)
    config = CONFIG | {"student": {"init": init}, "training": {"max_steps": 20}}
    run_folder.write_config(tmp_path, config, {})
    more = config | {"training": {"max_steps": 40}}
    with pytest.raises(UserError, match=r"max_steps: 20 -> 40") as unfinished:
        run_folder.check(tmp_path, more, "auto")
    assert "--student" not in str(unfinished.value)

    (tmp_path / "evaluation_report.json").write_text("{}")
    with pytest.raises(UserError, match="That run is finished") as finished:
        run_folder.check(tmp_path, more, "auto")
    assert f"--student {tmp_path / 'student'}" in str(finished.value)
    assert ("--student-init pretrained" in str(finished.value)) is (init != "pretrained")
