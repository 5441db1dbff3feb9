"""Positions chosen by the student before training, by the whole program: once, for a smaller cache, continued alike."""

import json
import shutil

import pytest
from safetensors.torch import load_file

import train
from utils.run import chosen_positions
from utils.run_layout import POSITIONS
from utils.teacher_cache.store import SHARDS

STEPS = "2"


def arguments(place, output, *more: str) -> list[str]:
    """A command line that trains a student of trained weights: the teacher's own, whose states differ all the same."""
    settings = ["training.save_every=1", "evaluation.every=0", "evaluation.max_windows=1", "student.init=pretrained"]
    chosen = ["loss.select_by=first_student", "curriculum.select=0.25"]
    student = ["--student", str(place.teacher), "--max-steps", STEPS, "--epochs", "2"]
    return place.arguments(output, *student, "--set", *settings, *chosen, *more)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """Folder of a run in one go."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    assert train.main(arguments(place, folder)) == 0
    return folder


def shard_bytes(folder) -> int:
    return sum(file.stat().st_size for file in (folder / SHARDS).iterdir())


def test_the_log_says_how_many_were_chosen(finished):
    log = (finished / "train.log").read_text()
    assert "at most 25 % of a window, where the student before training is most in doubt" in log


def test_the_report_marks_them_in_the_text(finished):
    view = json.loads((finished / "evaluation_report.json").read_text())["chosen_positions"]
    marked = sum(is_marked for _, is_marked in view["tokens"])
    assert view["share"] == 0.25 and 0.1 < marked / len(view["tokens"]) < 0.4
    assert view["step"] == 1 and 1 <= view["window"] <= view["windows"] and view["select_by"] == "first_student"
    for name in ("report.html", "evaluation_report.md"):
        assert "Where the teacher is listened to" in (finished / name).read_text()


def test_the_report_marks_no_tokens_where_kd_weighs_nothing(place, tmp_path):
    by = ["loss.select_by=student_entropy", "curriculum.kd=0"]
    assert train.main(arguments(place, tmp_path / "run", *by)) == 0
    assert "chosen_positions" not in json.loads((tmp_path / "run" / "evaluation_report.json").read_text())


def test_a_share_below_1_percent_is_told(place, tmp_path):
    assert train.main(arguments(place, tmp_path / "run", "curriculum.select=0.0005")) == 0
    assert "at most 0.05 % of a window" in (tmp_path / "run" / "train.log").read_text()
    assert "is 0.05 % of the window's positions" in (tmp_path / "run" / "evaluation_report.md").read_text()


def test_a_run_is_continued_with_its_positions_and_bit_for_bit(place, finished, tmp_path, monkeypatch):
    folder = tmp_path / "continued"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "checkpoints" / "step-00000002")

    # On another machine, whose user has no caches yet.
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path / "caches"))
    monkeypatch.setattr(chosen_positions, "_choose", lambda *_: pytest.fail("the choice is stored"))
    assert train.main(arguments(place, folder)) == 0
    weights, expected = (load_file(run / "student" / "model.safetensors") for run in (folder, finished))
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_a_damaged_choice_is_made_again(place, finished, tmp_path):
    (tmp_path / "again").mkdir()
    shutil.copy(finished / POSITIONS, tmp_path / "again")
    for file in [tmp_path / "again" / POSITIONS, *chosen_positions.cache_dir().glob("positions/*.npz")]:
        file.write_bytes(file.read_bytes()[:100])
    assert train.main(arguments(place, tmp_path / "again")) == 0
    weights, expected = (load_file(run / "student" / "model.safetensors") for run in (tmp_path / "again", finished))
    assert all((weights[name] == expected[name]).all() for name in expected)


def test_a_cache_has_the_chosen_rows_alone_and_serves_a_run_without_the_teacher(place, tmp_path, capsys):
    building = ["--build-cache-only", "--cache-teacher"]
    assert train.main([*arguments(place, tmp_path / "a"), *building, str(tmp_path / "chosen")]) == 0
    every = arguments(place, tmp_path / "b", "curriculum.select=1")
    assert train.main([*every, *building, str(tmp_path / "every")]) == 0
    assert shard_bytes(tmp_path / "chosen") < 0.6 * shard_bytes(tmp_path / "every")

    assert train.main([*arguments(place, tmp_path / "c"), "--cache-teacher", str(tmp_path / "chosen")]) == 0
    assert "the teacher is not loaded" in (tmp_path / "c" / "train.log").read_text()


@pytest.mark.parametrize("share", ["{points: [[0, 0.25], [1, 1]]}", "{points: [[0, 1], [1, 0.25]]}"])
def test_a_share_that_begins_or_ends_at_all_positions_has_their_order(place, tmp_path, share):
    assert train.main(arguments(place, tmp_path / "run", f"curriculum.select={share}")) == 0
    assert "at most 100 % of a window" in (tmp_path / "run" / "train.log").read_text()
    assert json.loads((tmp_path / "run" / "evaluation_report.json").read_text())["chosen_positions"]["tokens"]


def test_a_run_at_all_positions_chooses_none(place, tmp_path, monkeypatch):
    monkeypatch.setattr(chosen_positions, "_choose", lambda *_: pytest.fail("nothing is to be chosen"))
    assert train.main(arguments(place, tmp_path / "run", "curriculum.select=1")) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    told = log.index("without effect, since KD is learned at all positions (curriculum.select 1): loss.select_by first")
    assert told < log.index("what is learned from")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["student.init=random"], "a student with random weights is in doubt everywhere"),
        (["curriculum.on_policy=0.5"], "has no positions chosen before"),
        (["curriculum.span.weight=0.1"], "span needs the teacher everywhere"),
    ],
)
def test_what_does_not_go_together_is_refused(place, tmp_path, capsys, more, says):
    assert train.main(arguments(place, tmp_path / "run", *more)) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert says in said and "choose another loss.select_by" in said
    assert not (tmp_path / "run").exists()


def test_the_report_marks_a_text_that_a_cache_of_a_short_run_has(place, tmp_path):
    for name in ("first", "second"):
        settings = ["--cache-teacher", str(tmp_path / "cache"), "--set", "loss.select_by=student_entropy"]
        assert train.main([*arguments(place, tmp_path / name), *settings, "training.max_steps=1"]) == 0
        report = json.loads((tmp_path / name / "evaluation_report.json").read_text())
        assert report["chosen_positions"]["tokens"], name
