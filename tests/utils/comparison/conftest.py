"""Folders of runs, as a run leaves them."""

import json
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from tests.utils.logs.test_step_logger import evaluation_at, record_at
from tests.utils.report.test_report import RESULTS, scores
from utils.comparison.compare import compare


@pytest.fixture(autouse=True)
def _console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def place(tmp_path):
    """Makes folders of runs: `finished` has a report, the others have got as far as `step` of 1,000."""

    def make(name: str, bits: float, step: int = 1000, finished: bool = True, settings=None, size: int = 4000) -> str:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        records = [record_at(s, 1000) for s in range(100, step + 1, 100)]
        records += [{**evaluation_at(s), "bits_per_byte": bits + 1 - s / 1000, "bytes": size} for s in (0, step)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        start = {"teacher": scores(0.8, 9), "initial_student": scores(2.8, 5)}
        (folder / "baseline_evaluation.json").write_text(json.dumps(start))
        if finished:
            run = {"steps": step, "seconds": 4100.0, "stopped_by": "finished"}
            report = RESULTS | {"student": scores(bits, 5), "run": run}
            (folder / "evaluation_report.json").write_text(json.dumps(report))
        if settings is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return str(folder)

    return make


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k))[1])
    return figures


def settings_of(seed: int, **training) -> dict:
    return {"training": {"seed": seed, **training}}


def change_report(folder: str, **figures) -> None:
    file = Path(folder, "evaluation_report.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | figures))


def shown_of(folders, tmp_path, capsys) -> str:
    capsys.readouterr()
    compare(folders, tmp_path / "out")
    return " ".join(capsys.readouterr().out.split())
