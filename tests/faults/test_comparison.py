"""The comparison without the teacher costs the run nothing: the report comes first, and adds it only if it is fair."""

import json
from dataclasses import replace

import pytest

import train
from utils.config.settings import TrainingConfig
from utils.run import stages
from utils.run.exit_codes import Interrupted

SHORT = ["--max-steps", "2", "--set", "evaluation.without_teacher=true", "evaluation.every=0"]


def report_of(output) -> dict:
    return json.loads((output / "evaluation_report.json").read_text())


@pytest.fixture
def output(place, tmp_path, monkeypatch):
    """The folder of a run that was interrupted in the comparison."""
    sound = stages.train_student

    def interrupted(job, teacher, *arguments):
        if teacher is None:
            raise Interrupted("SIGTERM")
        return sound(job, teacher, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train_student", interrupted)
        assert train.main(place.arguments(tmp_path / "run", *SHORT)) == 143
    return tmp_path / "run"


def test_student_and_report_are_there_before_it_and_the_same_command_adds_it(place, output, capsys):
    assert (output / "student" / "model.safetensors").is_file()
    assert "baseline" not in report_of(output) and report_of(output)["run"]["steps"] == 2
    capsys.readouterr()
    assert train.main(place.arguments(output, *SHORT)) == 0
    assert "this run is already finished (2 of 2 steps)" in " ".join(capsys.readouterr().out.split())
    report = report_of(output)
    assert report["baseline"]["bits_per_byte"] > 0 and list(report["samples"][0])[-1] == "baseline"
    assert report["generation"].keys() == {"teacher", "initial_student", "student", "baseline"}
    assert all(written["teacher_bits_per_byte"] > 0 for written in report["generation"].values())


def test_a_teacher_that_did_not_help_is_told_with_what_to_try(place, output, capsys, monkeypatch):
    monkeypatch.setattr(stages, "is_better_without_teacher", lambda results: "baseline" in results)
    assert train.main(place.arguments(output, *SHORT)) == 0
    assert "the same student learned more without the teacher; try" in " ".join(capsys.readouterr().out.split())
    assert "learned more without the teacher" in (output / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        ([], True),
        (["--set", "curriculum.kd.weight={points: [[0, 0.7], [0.5, 0]]}", "curriculum.lm.weight=1"], False),
        (["--without-teacher"], False),
    ],
    ids=["kd to the end", "kd falls to 0", "compared"],
)
def test_a_teacher_that_the_student_has_passed_is_told_while_it_still_weighs(
    place, tmp_path, capsys, monkeypatch, words, is_told
):
    monkeypatch.setattr(stages, "has_passed_teacher", lambda results: True)
    assert train.main(place.arguments(tmp_path / "run", "--max-steps", "2", *words)) == 0
    told = "has passed its teacher" in " ".join(capsys.readouterr().out.split())
    assert told is is_told
    assert ("has passed its teacher" in (tmp_path / "run" / "report.html").read_text()) is is_told


def test_after_another_number_of_steps_it_is_dropped(place, output, capsys, monkeypatch):
    sound = stages.train_student

    def too_short(job, teacher, *arguments):
        if teacher is None:
            job = replace(job, config=replace(job.config, training=TrainingConfig(max_steps=1)))
        return sound(job, teacher, *arguments)

    monkeypatch.setattr(stages, "train_student", too_short)
    assert train.main(place.arguments(output, *SHORT)) == 0
    assert "no comparison" in capsys.readouterr().out and "baseline" not in report_of(output)


def test_a_checkpoint_may_have_any_name_and_samples_may_change(place, output, tmp_path, capsys):
    kept = (output / "checkpoints" / "step-00000002").rename(tmp_path / "the-best")
    (output / "checkpoints").rmdir()
    start = json.loads((output / "baseline_evaluation.json").read_text())
    other = [*SHORT, "--resume", str(kept), "--set", "evaluation.without_teacher=false", "evaluation.samples=2"]
    assert train.main(place.arguments(output, *other)) == 0
    assert "at step 2 of 2" in " ".join(capsys.readouterr().out.split())
    anew = json.loads((output / "baseline_evaluation.json").read_text())
    assert len(report_of(output)["samples"]) == 2 and len(start["samples"]["prompt"]) == 1
    assert anew["initial_student"] == start["initial_student"] and anew["teacher"] == start["teacher"]


def test_a_run_that_learns_from_the_text_alone_is_its_own_comparison(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stages, "compare_without_teacher", lambda *_: pytest.fail("the run beside it is the same"))
    alone = ["--curriculum.kd=0", "--set", "evaluation.generation=500"]
    assert train.main(place.arguments(tmp_path / "run", *SHORT, *alone)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "without effect, since all terms but lm weigh 0" in said
    assert "one for each held-out document, not 500" in said
