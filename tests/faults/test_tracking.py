"""`--track` through the whole program: what TensorBoard has is what metrics.jsonl has."""

import pytest

import train
from tests.utils.logs.test_trackers import flat_metrics
from utils import run_layout
from utils.logs import trackers
from utils.run import stages

SHORT = ["--max-steps", "3", "--set", "evaluation.every=2"]


def test_a_tracked_run_tells_tensorboard_all_its_records(place, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra [track])")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    assert train.main(place.arguments(output, "--track", "tensorboard", *SHORT)) == 0
    found = EventAccumulator(str(output / run_layout.TRACKERS / trackers.PROJECT)).Reload()
    told = {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
    assert told == flat_metrics(output) and [*told["train/loss"]] == [1, 2, 3] and [*told["eval/loss"]] == [0, 2, 3]


def test_a_tracker_that_is_not_installed_stops_the_run_before_anything_is_loaded(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    monkeypatch.setattr(stages, "prepare", lambda *_: pytest.fail("the run went on"))
    assert train.main(place.arguments(tmp_path / "run", "--track", "wandb")) == 2
    assert "pip install wandb" in capsys.readouterr().out and not (tmp_path / "run").exists()
