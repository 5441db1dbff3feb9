"""A whole run on a console that shows little, from a file whose name is no UTF-8."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.faults.conftest import documents, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_is_told_line_by_line_on_a_console_that_shows_little(place, tmp_path):
    """ASCII, 20 columns wide, with text that it cannot show."""
    japanese = [f"子供たちは公園で遊んだ。 {text}" for text in documents(40)]
    text = Path(shutil.move(write_jsonl(tmp_path / "text.jsonl", japanese), tmp_path / os.fsdecode(b"t\xe9xt.jsonl")))
    output = tmp_path / "run"
    short = ["--train-data", str(text), "--max-steps", "2", "--set", "evaluation.every=0"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "20", "CUDA_VISIBLE_DEVICES": ""}

    done = subprocess.run(
        [sys.executable, "train.py", *place.arguments(output, *short)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout

    shown = done.stdout.decode("ascii")
    assert "Logging error" not in done.stderr.decode("ascii")
    lines = (output / "train.log").read_text(encoding="utf-8").splitlines()
    # What nobody can act on is in the log alone, and a row of a narrow console has the beginning of a step's figures.
    on_screen = [line for line in lines if " DEBUG " not in line and "[TOTAL]" not in line and "[sample]" not in line]
    messages = [re.sub(r"^\S+ \S+ (INFO|WARNING) +", "", line) for line in on_screen]
    assert any("子供" in message for message in messages)
    for message in messages:
        # Both spell out what UTF-8 lacks; the console replaces what it lacks itself.
        assert message.encode("ascii", "replace").decode() in shown
    assert r"t\udce9xt.jsonl" in shown
