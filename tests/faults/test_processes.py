"""Two processes under torchrun: what one of them suffers ends the run, with its reason; the same command goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.faults.conftest import Place
from tests.faults.test_kill import steps_in

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
"""Seconds within which the failure of one process has to end them all."""
UNLUCKY = """
import os, sys
sys.path.insert(0, {root!r})
import train
from utils.run import stages
def fail(*_):
    raise RuntimeError("out of luck")
if os.environ["RANK"] == "1":
    stages.students.make = fail
sys.exit(train.main())
"""

LEAVING = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed
import train
code = train.main()
sys.exit(code or torch.distributed.is_initialized() and "it has not left the group")
"""


def torchrun(script: Path, place: Place, output: Path, said: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with said.open("w") as stream:
        arguments = [*place.arguments(output), "--gradient-accumulation-steps", "2", *more]
        return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment, stdout=stream, stderr=stream)


def end_of(said: Path) -> str:
    """Its last lines: what a failure is about, also where the report of a failure is cut."""
    return "\n".join(said.read_text().splitlines()[-40:])


def test_a_killed_process_ends_the_run_and_the_same_command_finishes_it(place, tmp_path):
    output, said = tmp_path / "run", tmp_path / "said.txt"
    run = torchrun(ROOT / "train.py", place, output, said)
    limit = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or steps_in(output / "metrics.jsonl") < 6:
        assert run.poll() is None and time.monotonic() < limit, end_of(said)
        time.sleep(0.01)

    (victim,) = (child for child in psutil.Process(run.pid).children() if child.environ().get("RANK") == "1")
    victim.kill()
    assert run.wait(PATIENCE) not in (0, None)
    assert "Signal 9 (SIGKILL)" in said.read_text()
    done = steps_in(output / "metrics.jsonl")

    script = tmp_path / "leaving.py"
    script.write_text(LEAVING.format(root=str(ROOT)))
    run = torchrun(script, place, output, said)
    assert run.wait(120) == 0, end_of(said)
    assert "resumed from" in said.read_text()
    assert steps_in(output / "metrics.jsonl") > done

    report = json.loads((output / "evaluation_report.json").read_text())
    assert report["run"]["stopped_by"] == "finished"


def test_an_exception_in_one_process_is_told_and_ends_the_run(place, tmp_path):
    script, said = tmp_path / "unlucky.py", tmp_path / "said.txt"
    script.write_text(UNLUCKY.format(root=str(ROOT)))
    run = torchrun(script, place, tmp_path / "run", said)
    assert run.wait(PATIENCE + 60) == 1
    told = said.read_text()
    assert "process 1: RuntimeError: out of luck" in told
    cause = told[told.index("Root Cause") :]
    assert "RuntimeError: out of luck" in cause and "rank      : 1" in cause
