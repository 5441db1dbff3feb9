"""The commands answer at once: torch, which takes seconds to load, comes after the command line is right."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HEAVY = {"torch", "transformers", "datasets", "accelerate", "matplotlib"}

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
sys.argv = {argv!r}
try:
    import {module}
    code = {module}.main()
except SystemExit as ended:
    code = ended.code
print("LOADED", code, *sorted({heavy!r} & sys.modules.keys()))
"""


def answer(module: str, *words: str) -> tuple[str, str, list[str]]:
    """Return the output of a command, its exit code, and the heavy packages that it loaded."""
    script = SCRIPT.format(root=str(ROOT), module=module, argv=[f"{module}.py", *words], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    output, _, end = done.stdout.rpartition("LOADED ")
    code, *loaded = end.split()
    return output + done.stderr, code, loaded


@pytest.mark.parametrize(
    ("module", "words", "code", "message"),
    [
        ("train", ["--help"], "0", "--gradient-accumulation-steps"),
        ("train", ["--batchsize", "3"], "2", "did you mean --batch-size?"),
        ("train", ["--seed", "x"], "2", "training.seed: got 'x'"),
        ("train", ["--config", "kaggle_p100", "--set", "loss.divergence=kl"], "2", "'forward_kl', 'reverse_kl'"),
        ("train", ["--teacher", "a", "--student", "b"], "2", "no training data"),
        ("train", ["--print-config", "--config", "kaggle_p100"], "0", "gradient_accumulation_steps: 8"),
        ("verify_fixes", ["--help"], "0", "--gradient-accumulation-steps"),
        ("verify_fixes", ["--seed", "x"], "2", "training.seed: got 'x'"),
    ],
)
def test_help_settings_and_mistakes_are_answered_without_torch(module, words, code, message):
    output, ended, loaded = answer(module, *words)
    assert (ended, loaded) == (code, []) and message in output
