"""The whole program under DeepSpeed, in two processes: trained, evaluated, compared with a student alone, exported."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.faults.test_processes import torchrun

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install '.[deepspeed]'")

ROOT = Path(__file__).resolve().parents[2]
LAUNCHED = """
import sys
sys.path.insert(0, {root!r})
import train
sys.argv += ["--epochs", "1"]
from tests.gloo import launched
from utils.run import session
with launched({how!r}) as accelerator:
    session.build_accelerator = lambda *_, **__: accelerator
    code = train.main()
sys.exit(code)
"""


def test_a_run_ends_with_a_report_and_a_student_as_any_other(place, tmp_path):
    script, output, said = tmp_path / "launched.py", tmp_path / "run", tmp_path / "said.txt"
    script.write_text(LAUNCHED.format(root=str(ROOT), how="zero3"))
    run = torchrun(script, place, output, said)
    assert run.wait(200) == 0, said.read_text()
    report = json.loads((output / "evaluation_report.json").read_text())
    assert report["run"]["stopped_by"] == "finished"
    assert AutoModelForCausalLM.from_pretrained(output / "student").num_parameters() > 0
