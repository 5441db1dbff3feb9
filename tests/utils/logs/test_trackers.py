"""A tracker gets what metrics.jsonl has, and a run that is continued goes on in the same place."""

import io
import json
import time
from typing import get_args, get_type_hints

import pytest
from accelerate.utils import LoggerType

from tests.utils.logs.test_step_logger import evaluation_at, record_at
from utils.config.settings import LoggingConfig
from utils.errors import UserError
from utils.logs import trackers
from utils.logs.progress import Progress
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.logs.trackers import PROJECT, Tracking, flat_record, require
from utils.parallel.accelerator import build_accelerator
from utils.run_layout import TRACKERS

SETTINGS = {"training": {"seed": 3, "max_hours": None, "betas": [0.9, 0.95]}, "lm": {"weight": {"points": [[0, 1]]}}}


@pytest.fixture
def tensorboard(tmp_path):
    """(build a logger that continues after some steps, read what TensorBoard has: tag -> {step: value})."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra [track])")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logger(done: int = 0) -> StepLogger:
        accelerator = build_accelerator("no", cpu=True, track=["tensorboard"], folder=tmp_path)
        display = Progress(io.StringIO())
        return StepLogger(
            tmp_path, 1000, 100, tracker=Tracking(accelerator, tmp_path, SETTINGS, done), progress=display
        )

    def read() -> dict[str, dict[int, float]]:
        found = EventAccumulator(str(tmp_path / TRACKERS / PROJECT)).Reload()
        return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}

    return logger, read


def flat_metrics(folder) -> dict[str, dict[int, float]]:
    wanted: dict[str, dict[int, float]] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        for path, value in flat_record(record).items():
            wanted.setdefault(path, {})[record["step"]] = pytest.approx(value, rel=1e-6)
    return wanted


def test_a_flat_record_has_every_number_by_its_path():
    record = record_at(100, 1000, loss=float("nan"))
    flat = flat_record(record)
    assert flat["train/terms/kd/raw"] == 32.0 and flat["train/coverage/depth0"] == 0.932 and "train/loss" not in flat
    routing = {"routing": {"student_layers": [4], "weights": [[0.25, None]]}}
    assert flat_record({**evaluation_at(5), **routing}) == {
        **{
            f"eval/{name}": evaluation_at(5)[name]
            for name in ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
        },
        "eval/routing/student_layers/0": 4,
        "eval/routing/weights/0/0": 0.25,
    }


def test_tensorboard_has_exactly_what_the_metrics_have(tmp_path, tensorboard):
    make, read = tensorboard
    logger = make()
    for step in (100, 200):
        logger.training(record_at(step, 1000, loss=step / 7))
        logger.evaluation(evaluation_at(step))
    logger.close()
    assert read() == flat_metrics(tmp_path) and len(read()["train/loss"]) == 2


def test_a_continued_run_drops_what_came_after_the_checkpoint_and_goes_on_beside_it(tmp_path, tensorboard):
    make, read = tensorboard
    logger = make()
    for step in (100, 200, 300):
        logger.training(record_at(step, 1000, loss=1.0))
    logger.close()
    logger = make(done=200)
    logger.truncate_after(200)
    logger.training(record_at(400, 1000, loss=2.0))
    logger.close()
    assert read() == flat_metrics(tmp_path) and list(read()["train/loss"]) == [100, 200, 400]
    settings = list((tmp_path / TRACKERS).rglob("hparams.yml"))
    assert len(settings) == 1 and "training.seed: 3" in settings[0].read_text()


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path, tensorboard, monkeypatch, caplog):
    logger = tensorboard[0]()
    broken = logger.tracker.accelerator.trackers[0]
    monkeypatch.setattr(broken, "log", lambda *_, **__: 1 / 0)
    for step in (100, 200):
        logger.training(record_at(step, 1000))
    logger.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert caplog.text.count("no longer tracked from step 100 on: ZeroDivisionError") == 1


def test_a_missing_package_is_told_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    require(["tensorboard"])
    with pytest.raises(UserError, match="pip install wandb aim"):
        require(["tensorboard", "wandb", "aim"])


def test_a_tracker_that_cannot_start_is_a_users_error(tmp_path, monkeypatch):
    accelerator = build_accelerator("no", cpu=True)
    monkeypatch.setattr(accelerator, "log_with", ["wandb"])
    monkeypatch.setattr(accelerator, "init_trackers", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=r"--track wandb: cannot be started.*WANDB_MODE=offline"):
        Tracking(accelerator, tmp_path, SETTINGS)


def test_the_names_are_those_of_accelerate():
    names = get_args(get_args(get_type_hints(LoggingConfig)["track"])[0])
    assert {*names} == {*LoggerType.list()} - {"all"}


def test_weights_and_biases_keeps_the_run_in_its_folder_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed (extra [track])")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    accelerator = build_accelerator("no", cpu=True, track=["wandb"], folder=tmp_path)

    for done in (0, 100):
        tracker = Tracking(accelerator, tmp_path, SETTINGS, done)
        run = accelerator.trackers[0].tracker
        tracker.log(record_at(done + 100, 1000))
        tracker.log(evaluation_at(done + 100))
        assert run.id == (tmp_path / TRACKERS / "run_id").read_text() and run.project == PROJECT
        assert done or json.loads(run.config["training.betas"]) == [0.9, 0.95]
        tracker.close()

    kept = sorted((tmp_path / TRACKERS / "wandb").glob(f"offline-run-*-{run.id}/*.wandb"))
    assert len(kept) == 2
    names = [path.encode() for path in (*flat_record(record_at(100, 1000)), *flat_record(evaluation_at(100)))]

    # Its service writes in a process of its own, which may be behind on a busy machine.
    deadline = time.monotonic() + 60
    while lacking := [name for file in kept for name in names if name not in file.read_bytes()]:
        assert time.monotonic() < deadline, lacking
        time.sleep(0.2)
