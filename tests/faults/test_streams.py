"""The whole program on text that is read while training: killed and continued, mixed, in two processes."""

import json
import signal
from pathlib import Path

import pytest

import train
from tests.faults.conftest import Place, documents, make_place, write_jsonl
from tests.faults.test_kill import ROOT, Session, same_outcome
from tests.faults.test_processes import end_of, torchrun
from utils.logs.records import read_metrics

STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    """A set-up without dropout, which is another in each process."""
    return make_place(tmp_path_factory.mktemp("place"), dropout=0.0)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[Path]:
    """Two files of different documents, of which some are in both."""
    folder = tmp_path_factory.mktemp("sources")
    first, second = documents(60, seed=1), documents(60, seed=2)
    return [write_jsonl(folder / "a.jsonl", first), write_jsonl(folder / "b.jsonl", first[:20] + second)]


@pytest.fixture(scope="module")
def more(sources) -> list[str]:
    """A command line of a stream: of small blocks, so that a run goes through several of them."""
    settings = {
        "data.streaming": "true",
        "data.block_bytes": 4000,
        "data.mixture": json.dumps(dict(zip(map(str, sources), (1, 3), strict=True))),
        "training.save_every": 3,
        "evaluation.every": 6,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return ["--train-data", *map(str, sources), "--max-steps", str(STEPS), "--set", *words]


@pytest.fixture(scope="module")
def uninterrupted(place, more, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert train.main(place.arguments(output, *more)) == 0
    return output


def test_log_and_report_tell_where_the_text_came_from_and_how_much_was_read(uninterrupted):
    log = (uninterrupted / "train.log").read_text()
    assert "stream: shuffled in blocks of 0.004 MB of text; sources: " in log and "b.jsonl 3" in log
    assert "stream: block 2" in log, "not the several blocks that these tests suppose"

    run = json.loads((uninterrupted / "evaluation_report.json").read_text())["run"]
    assert run["documents read"] > run["documents seen before"] > 0
    assert "documents seen before" in (uninterrupted / "evaluation_report.md").read_text()
    assert not (uninterrupted / "blocks").exists()


def test_a_killed_run_is_continued_bit_for_bit(place, more, uninterrupted, tmp_path):
    output = tmp_path / "run"
    Session(place, output, *more).stopped_after(7, signal.SIGKILL)
    session = Session(place, output, *more)
    assert session.ended() == 0, session.output()
    assert "resumed from" in session.output()
    assert same_outcome(output, uninterrupted)


def test_two_processes_learn_from_the_text_of_one(place, more, uninterrupted, tmp_path):
    output = tmp_path / "run"
    said = tmp_path / "said.txt"
    assert torchrun(ROOT / "train.py", place, output, said, *more).wait(200) == 0, end_of(said)

    steps_of_both = zip(steps_of(output), steps_of(uninterrupted), strict=True)
    for of_two, of_one in steps_of_both:
        assert of_two["terms"]["kd"]["count"] == of_one["terms"]["kd"]["count"]
        assert of_two["loss"] == pytest.approx(of_one["loss"], rel=1e-4)
    read = [json.loads((folder / "evaluation_report.json").read_text())["run"] for folder in (output, uninterrupted)]
    assert read[0]["documents read"] == read[1]["documents read"]


def steps_of(output: Path) -> list[dict]:
    """Records of the optimizer steps of a run."""
    return [record for record in read_metrics(output / "metrics.jsonl") if "terms" in record]
