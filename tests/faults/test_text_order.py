"""Easier text first, by the whole program: the teacher is asked once, and a run is continued alike."""

import json
import shutil

import pytest
from safetensors.torch import load_file

import train
from tests.faults.test_processes import ROOT, end_of, torchrun
from utils.logs.records import read_metrics
from utils.run import text_order

RAMP = "curriculum.open_text={points: [[0, 0.2], [0.8, 1]]}"


def arguments(place, output) -> list[str]:
    """A command line of four steps."""
    settings = ["training.save_every=2", "evaluation.every=0", "evaluation.max_windows=1", "logging.every=1"]
    order = ["data.order=teacher_loss", RAMP]
    return place.arguments(output, "--max-steps", "4", "--epochs", "2", "--set", *settings, *order)


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """Folder of a run in one go."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    assert train.main(arguments(place, folder)) == 0
    return folder


def test_log_and_records_tell_the_order(finished):
    assert "by bits per byte of the teacher" in (finished / "train.log").read_text()
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    shares = [record["open_text"] for record in records if "open_text" in record]
    assert shares == pytest.approx([0.2, 0.45, 0.7, 0.95])


def test_two_processes_read_in_the_order_of_one(place, finished, tmp_path):
    output, said = tmp_path / "run", tmp_path / "said.txt"
    (_, _, _, _, *words) = arguments(place, output)
    assert torchrun(ROOT / "train.py", place, output, said, *words).wait(150) == 0, end_of(said)

    of_two, of_one = (read_metrics(folder / "metrics.jsonl") for folder in (output, finished))
    counts = [[step["terms"]["lm"]["count"] for step in records if "terms" in step] for records in (of_two, of_one)]
    assert counts[0] == counts[1] and len(counts[0]) == 4


def test_a_run_is_continued_in_its_order_and_bit_for_bit(place, finished, tmp_path, monkeypatch):
    folder = tmp_path / "continued"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "student")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")

    monkeypatch.setattr(text_order, "_ask", lambda *_: pytest.fail("what the teacher said is stored"))
    assert train.main(arguments(place, folder)) == 0
    weights, expected = (load_file(run / "student" / "model.safetensors") for run in (folder, finished))
    assert all((weights[name] == expected[name]).all() for name in expected)
