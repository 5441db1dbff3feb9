"""Commands end as they should, whatever becomes of the console."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

TALKS = """
import sys
print("before")
import logging
early = logging.StreamHandler(sys.stdout)
from utils.logs.streams import make_streams_safe
make_streams_safe()
make_streams_safe()
print("子 ✓ \\udce9 end")
print("子 \\udce9 end", file=sys.stderr)
early.emit(logging.makeLogRecord({"msg": "子 of a library"}))
print("after")
"""


def run(code: str, encoding: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=120)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_every_line_comes_with_what_cannot_be_shown_replaced(encoding):
    done = run(TALKS, encoding)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode(encoding).splitlines()
    text = "子 ✓ ? end" if encoding == "utf-8" else "? ? ? end"
    library = "子 of a library" if encoding == "utf-8" else "? of a library"
    assert lines == ["before", text, library, "after"]
    assert done.stderr.decode(encoding).strip().endswith("\\udce9 end")


MANY_LINES = """
import sys
from utils.logs.streams import make_streams_safe
make_streams_safe()
for number in range(100_000):
    print("line", number)
    print("line", number, file=sys.stderr)
sys.exit(7)
"""


def test_a_reader_that_is_gone_does_not_decide_how_a_command_ends():
    process = subprocess.Popen(
        [sys.executable, "-c", MANY_LINES], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline().strip() == b"line 0"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(120) == 7


WITHOUT_CONSOLE = """
import sys
sys.stdout = sys.stderr = None
from utils.logs.streams import make_streams_safe
make_streams_safe()
from utils.logs.terminal import person_may_watch
print("nowhere", flush=True)
print("nowhere", file=sys.stderr)
sys.exit(7 if not person_may_watch(sys.stdout) else 1)
"""


def test_without_a_console_what_is_printed_is_dropped():
    done = run(WITHOUT_CONSOLE, "utf-8")
    assert done.returncode == 7, done.stderr
    assert done.stdout == b""


def test_streams_that_a_test_or_a_notebook_put_in_place_stay(capsys):
    from utils.logs.streams import make_streams_safe

    before = sys.stdout
    make_streams_safe()
    assert sys.stdout is before


def test_error_and_output_that_are_one_stream_outlive_each_other():
    """A program that sends its output to standard error, runs a command, and takes its output back."""
    program = """
import contextlib, gc, sys
from utils.logs.streams import make_streams_safe

with contextlib.redirect_stdout(sys.stderr):
    make_streams_safe()
gc.collect()
make_streams_safe()
print("still there", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "still there\n")
