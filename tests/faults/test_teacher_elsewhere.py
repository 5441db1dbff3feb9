"""A teacher whose model is in no process of the run: asked for its signals alone, through `utils.interfaces.Teacher`.

Nothing of the loop, the cache, the evaluation or the report knows of it: a run under it ends as under the same teacher
in this process.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

import train
from utils.run import stages

SHORT = ["--max-steps", "4", "--set", "evaluation.every=2", "evaluation.samples=2"]


class Elsewhere:
    """Answers as a teacher behind a server would."""

    model = None

    def __init__(self, behind) -> None:
        self._behind = behind

    def signal(self, batch, top_k=None, layers=()):
        assert not layers
        return self._behind.signal(batch, top_k)

    def begin(self, batch, top_k=None):
        return True

    def identity(self) -> dict[str, str]:
        return {"server": "somewhere", "model": "a teacher"}


@pytest.fixture
def elsewhere(monkeypatch):
    """Lets every run have its teacher elsewhere."""
    load = stages.load_teacher
    return lambda: monkeypatch.setattr(stages, "load_teacher", lambda job, check: Elsewhere(load(job)))


@pytest.mark.parametrize("cached", [False, True], ids=["asked", "cached"])
def test_a_run_ends_as_under_the_same_teacher_in_this_process(place, tmp_path, elsewhere, cached):
    def run(name: str) -> tuple[dict, dict]:
        cache = ["--cache-teacher", str(tmp_path / f"cache-{name}")] if cached else []
        assert train.main(place.arguments(tmp_path / name, *cache, *SHORT)) == 0
        report = json.loads((tmp_path / name / "evaluation_report.json").read_text())
        return load_file(tmp_path / name / "student" / "model.safetensors"), report

    weights, report = run("here")
    elsewhere()
    same_weights, same_report = run("there")

    for name, value in weights.items():
        torch.testing.assert_close(same_weights[name], value, rtol=0, atol=0)
    for name in ("loss", "bits_per_byte", "perplexity"):
        assert same_report["teacher"][name] == pytest.approx(report["teacher"][name], rel=1e-5)
    assert same_report["teacher"]["tokens"] == report["teacher"]["tokens"]
    assert same_report["student"] == report["student"]
    assert [sample["teacher"] for sample in same_report["samples"]] == [None, None]
    assert same_report["generation"]["teacher"] is None
    assert "teacher_bits_per_byte" not in same_report["generation"]["student"]


def test_it_resumes_and_refuses_another_teacher(place, tmp_path, elsewhere, capsys):
    elsewhere()
    assert train.main(place.arguments(tmp_path / "run", *SHORT)) == 0
    assert train.main(place.arguments(tmp_path / "run", *SHORT)) == 0
    assert "already finished" in " ".join(capsys.readouterr().out.split())


def test_terms_on_hidden_states_are_refused(place, tmp_path, elsewhere, capsys):
    elsewhere()
    assert train.main(place.arguments(tmp_path / "run", *SHORT, "curriculum.feat.weight=0.3")) == 2
    assert "a teacher whose model is elsewhere: it has no states" in " ".join(capsys.readouterr().out.split())
