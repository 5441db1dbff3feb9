"""The command that measures a GPU: every part runs, is recorded at once, and is left out where it cannot be."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.parts import BY_NAME
from benchmarks.gpu.report import markdown
from benchmarks.gpu.targets import verdicts

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 6000
"""Seconds of --budget: far more than toy sizes take, on a machine that does much else besides."""
ON_A_CPU = ("where", "waits", "step_bf16", "gradients")
ON_A_CARD = ("waits", "head_bf16", "forecast")
SLOW_PARTS = tuple(name for name in BY_NAME if name not in ON_A_CARD)
SKIPPED = {"pair": "no --data DIR", "quantised": "bitsandbytes"}
"""Parts that cannot run there -> words of the reason; the second needs libraries of CUDA itself."""
PRETENDS = f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
from tests.gpu import pretended

device = pretended.install("H100")

import torch


def leave(fraction, index=None):
    device.limit(int(fraction * torch.cuda.get_device_properties(0).total_memory))


torch.cuda.set_per_process_memory_fraction = leave
"""
"""What every Python of the command does first, by `sitecustomize`: its GPU is pretended."""


def run(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> tuple[int, dict, str]:
    """Return (exit status, the JSON, the Markdown) of the command at toy size."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(folder / "out"), *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)

    assert (folder / "out" / "gpu.json").is_file(), done.stderr
    results = json.loads((folder / "out" / "gpu.json").read_text(encoding="utf-8"))
    text = (folder / "out" / "gpu.md").read_text(encoding="utf-8")
    return done.returncode, results, text


def check(results: dict, text: str, names: tuple[str, ...]) -> None:
    """Every part of `names` has rows with numbers, and its table in the Markdown."""
    for name in names:
        part = results["parts"][name]
        assert part["state"] == "done", f"{name}: {part['why']}"
        assert part["rows"] and part["seconds"] > 0
        assert f"## {name}: {BY_NAME[name].title}" in text

    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 1 + sum(bool(part["rows"]) for part in results["parts"].values())
    for table in tables:
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


@pytest.fixture
def pretended(tmp_path) -> dict[str, str]:
    """Variables under which every Python has a GPU; skipped where there is nothing to make one with."""
    device = pytest.importorskip("tests.gpu.pretended", reason="there is no pretended GPU")
    try:
        device.build()
    except device.CannotBuild as reason:
        pytest.skip(str(reason))

    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(PRETENDS, encoding="utf-8")
    # DeepSpeed would look for CUDA's own libraries
    return {"PYTHONPATH": str(folder), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.timeout(900)
def test_what_makes_sense_on_a_cpu_runs_there(tmp_path):
    status, results, text = run(tmp_path, "--device", "cpu", "--budget", str(PATIENCE), "--parts", *ON_A_CPU)
    assert status == 0
    check(results, text, tuple(name for name in ON_A_CPU if name != "waits"))

    waits = results["parts"]["waits"]
    assert (waits["state"], waits["rows"]) == ("skipped", []) and "needs a GPU" in waits["why"]
    assert "No figure says anything of the device" in text and "Beside what is right" not in text

    step = {row["what"]: row for row in results["parts"]["step_bf16"]["rows"]}
    assert step["bare models"]["times_bare"] == 1 and step["this project"]["times_bare"] > 0
    assert all(row["gradient_off"] < 0.1 and row["finite"] for row in results["parts"]["gradients"]["rows"])


@pytest.mark.timeout(1800)
def test_cheap_parts_run_on_a_pretended_gpu(tmp_path, pretended):
    status, results, text = run(tmp_path, "--budget", str(PATIENCE), "--parts", *ON_A_CARD, environment=pretended)
    assert status == 0, results["parts"]
    check(results, text, ON_A_CARD)
    assert "H100" in results["machine"]["gpu"] and text.startswith("# NVIDIA H100")

    watched = [row for row in results["parts"]["waits"]["rows"] if row["watched"]]
    assert watched and all(row["waits"] == "none" and row["steps"] == 4 for row in watched)
    assert all(row["forecast_over_peak"] > 0 for row in results["parts"]["forecast"]["rows"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_other_parts_run_on_a_pretended_gpu(tmp_path, pretended):
    status, results, text = run(tmp_path, "--budget", str(PATIENCE), "--parts", *SLOW_PARTS, environment=pretended)
    assert status == 0, results["parts"]

    for name, reason in SKIPPED.items():
        part = results["parts"][name]
        assert part["state"] == "skipped" and reason in part["why"], part
    check(results, text, tuple(name for name in SLOW_PARTS if name not in SKIPPED))
    assert results["parts"]["repeat_deterministic"]["rows"][0]["continued"] == "same bits"

    (tight,) = results["parts"]["tight"]["rows"]
    assert tight["halved"] >= 1 and tight["exit"] == 0
    for part in ("train_bf16", "train_fp16"):
        (row,) = results["parts"][part]["rows"]
        assert row["exit"] == 0 and row["exported"] and row["waiting"] >= 0


def test_a_part_that_does_not_fit_the_budget_is_left_out_and_named(tmp_path):
    status, results, text = run(tmp_path, "--device", "cpu", "--budget", "1", "--parts", "where", "step_bf16")
    assert status == 0
    for name in ("where", "step_bf16"):
        assert results["parts"][name]["state"] == "skipped"
        assert "of --budget 1" in results["parts"][name]["why"]
    assert "of --budget 1" in text


@pytest.mark.timeout(600)
def test_a_part_that_runs_out_of_time_is_stopped(tmp_path):
    """Time for a start of Python, not for whole runs of training."""
    status, results, _ = run(tmp_path, "--device", "cpu", "--budget", "15.5", "--parts", "repeat")
    part = results["parts"]["repeat"]
    assert part["state"] == "stopped" and "time limit" in part["why"]
    assert status == 0 and 10 < part["seconds"] < 60


@pytest.mark.timeout(600)
def test_a_command_that_is_killed_has_written_the_rows_so_far(tmp_path):
    arguments = ["--toy", "--device", "cpu", "--budget", str(PATIENCE), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--parts", "where", "repeat"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("repeat:"):  # it has begun
            process.terminate()
            break
    process.communicate()

    parts = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert process.returncode == 128 + signal.SIGTERM
    assert parts["where"]["state"] == "done" and len(parts["where"]["rows"]) > 3
    assert parts["repeat"]["state"] == "interrupted"


def test_a_missing_package_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("benchmarks.gpu.parts.find_spec", lambda name: None if name == "datasets" else found(name))
    assert BY_NAME["train_bf16"].obstacle("cuda") == "not installed: datasets"
    assert BY_NAME["step_bf16"].obstacle("cuda") == ""


def test_figures_are_judged_by_their_targets():
    step = {"what": "this project", "times_bare": 1.08}
    head = {"variant": "fused head", "V": 49152, "N": 8192, "ms": 3.0, "times_bare": 1.4, "memory_of_plain": 0.01}
    liger = {"variant": "Liger JSD, beta 0, chunk 1,024", "V": 49152, "N": 8192, "ms": 2.0}
    rows = {
        "step_bf16": [step | {"size": "2 x 512"}, step | {"size": "8 x 1024"}, step | {"size": "4 x 512"}],
        "head_bf16": [head, liger, liger | {"N": 1024}],
        "train_bf16": [{"precision": "bf16", "exit": 0, "waiting": 0.03}],
        "forecast": [{"precision": "bf16", "size": "2 x 512", "forecast_over_peak": share} for share in (0.89, 1.1)],
        "waits": [{"precision": "bf16", "loss": "LM", "watched": True, "waits": "called item"}],
    }
    met = [verdict.met for verdict in verdicts(rows)]
    assert met == [True, False, False, True, False, True, False, False, True, False]


def test_the_table_can_be_pasted():
    machine = {"date": "today", "cpu": "a CPU", "gpu": "a card", "cores": 2, "torch": "2", "python": "3"}
    part = {
        "title": "t",
        "state": "failed",
        "why": "a | b\nc",
        "seconds": 1.0,
        "rows": [{"ms": 1234.5}, {"note": "x|y"}],
    }
    text = markdown({"machine": machine, "scale": "16 GB", "toy": False, "seconds": 2.0, "parts": {"where": part}})
    assert "| where | t | failed | 1 | a \\| b c |" in text
    assert "| 1,234 |  |" in text and "|  | x\\|y |" in text
