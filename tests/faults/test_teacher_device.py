"""Whole runs with a teacher on several devices are those of any run."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import train
from tests.gloo import launch
from utils.logs.records import read_metrics
from utils.pretrained import teacher

CHANGING = {"tokens_per_second", "peak_memory_mb"}
MORE = ("--set", "curriculum.feat.weight=1", "evaluation.samples=2", "--save-every", "2", "--max-steps", "4")


def outcome(folder: Path) -> tuple[list[dict], dict]:
    """Every record and the report, without what clocks and meters say."""
    records = [
        {k: v for k, v in record.items() if k not in CHANGING} for record in read_metrics(folder / "metrics.jsonl")
    ]
    report = json.loads((folder / "evaluation_report.json").read_text())
    del report["run"]
    return records, report


def test_a_run_with_a_spread_teacher_is_that_of_any(place, tmp_path, monkeypatch):
    """Losses, evaluation, samples and agreement, bit for bit; a continued run may change where the teacher computes."""
    load, spread = AutoModelForCausalLM.from_pretrained, []

    def spy(*args, **options):
        model = load(*args, **options)
        spread.append(getattr(model[0], "hf_device_map", None)) if "max_memory" in options else None
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    monkeypatch.setattr(teacher, "_gpus", lambda: 2)
    monkeypatch.setattr(teacher, "room", lambda student, needed: {"cpu": 130_000})
    assert train.main(place.arguments(tmp_path / "plain", *MORE)) == 0
    assert train.main(place.arguments(tmp_path / "spread", *MORE, "--teacher-device", "spread")) == 0
    assert {"cpu", "disk"} <= {*spread[0].values()}
    assert outcome(tmp_path / "spread") == outcome(tmp_path / "plain")
    assert train.main(place.arguments(tmp_path / "plain", *MORE, "--teacher-device", "spread")) == 0  # the same teacher


def test_a_run_with_a_sharded_teacher_is_that_of_any(place, tmp_path):
    """In two processes, of which one has fewer windows to evaluate and none to learn from in an epoch's last step."""
    more = [*MORE[:-2], "--epochs", "2", "--batch-size", "3", "--gradient-accumulation-steps", "1"]
    more += ["--set", "data.max_documents=16", "evaluation.max_windows=3", "evaluation.every=3"]
    more += ["evaluation.generation=0"]  # a sharded teacher judges no text: its forward takes all processes
    runs = [place.arguments(tmp_path / "whole", *more)]
    runs.append(place.arguments(tmp_path / "sharded", *more, "--teacher-device", "sharded"))
    assert [launch(2, train.main, run) for run in runs] == [[0, 0], [0, 0]]
    (plain, report), (records, found) = outcome(tmp_path / "whole"), outcome(tmp_path / "sharded")
    assert records == plain and min(r["terms"]["lm"]["count"] for r in records if "terms" in r) < 64  # of one window
    measured, expected = found.pop("retention"), report.pop("retention")
    assert found == report and measured == pytest.approx(expected, rel=1e-6)  # batches of it are cut otherwise
