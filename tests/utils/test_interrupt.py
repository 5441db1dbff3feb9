"""Ctrl-C while a command imports its modules: a line and exit code 130, whichever module it meets."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils import interrupt

ROOT = Path(__file__).resolve().parents[2]
AT_AN_IMPORT = """
import os, runpy, signal, sys

# A job in the background is born with an ignored SIGINT, and so are all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv = [{script!r}, "--techer"]
sys.path.insert(0, {root!r})
runpy.run_path({script!r}, run_name="__main__")
"""
"""A program that starts a command, and presses Ctrl-C when it imports a module."""


@pytest.mark.parametrize("module", ["utils.commands.settings", "pydantic", "utils.run.exit_codes"])
@pytest.mark.parametrize("script", ["train.py", "verify_fixes.py"])
def test_an_import_that_is_interrupted_ends_in_a_line(module, script):
    program = AT_AN_IMPORT.format(module=module, script=str(ROOT / script), root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.split("\n") == ["", interrupt.MESSAGE, ""]


def test_an_interrupt_that_is_ignored_stays_so_and_another_handler_stays():
    for handler in (signal.SIG_IGN, lambda *_: None):
        before = signal.signal(signal.SIGINT, handler)
        try:
            interrupt.end_on_interrupt()
            interrupt.raise_on_interrupt()
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)


def test_it_raises_again_where_that_is_caught():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.end_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is interrupt.end
        interrupt.raise_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
