import io
import logging
import sys

import pytest
from rich.text import Text

from utils.logs.console import setup_logging
from utils.logs.lines import sample_line
from utils.logs.terminal import console, person_may_watch, printable

COMMANDS = {
    "\x1b[2J": "\\x1b[2J",
    "\x07": "\\x07",
    "\r": "\\r",
    "\x9b": "\\x9b",
    "\u202e": "\\u202e",
    "\u2066": "\\u2066",
    "\u200f": "\\u200f",
    "\udcff": "\\udcff",
    "\U000e0041": "\\U000e0041",
}
TEXTS = [
    "tab\tand\nlines",
    "naïve café",
    "शिक्षा",
    "می\u200cخواهم",
    "👩\u200d🔬 ✓",
    "全角\u3000空白",
    "a\u00a0b",
    "שלום",
]


@pytest.mark.parametrize("command", COMMANDS, ids=ascii)
def test_what_commands_or_hides_is_an_escape(command):
    assert printable(f"a{command}b") == f"a{COMMANDS[command]}b"


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_of_any_script_stays(text):
    assert printable(text) == text


def test_no_line_of_a_run_commands_the_terminal(tmp_path, capsys):
    setup_logging(tmp_path)
    log = logging.getLogger("utils.test")
    log.info("Reading \x1b]0;title\x07\u202egpj.txt")
    log.info("long", extra={"screen": lambda columns: "[sample] \x1b[31m\u2067red"})
    log.error("%s", "lost", exc_info=ValueError("\x1b[2J"))
    seen = capsys.readouterr().out + (tmp_path / "train.log").read_text(encoding="utf-8")
    assert not {"\x1b", "\x07", "\u202e", "\u2067"} & {*seen}
    assert seen.count("\\u202egpj.txt") == 2 and "[sample] \\x1b[31m\\u2067red" in seen


def test_a_sample_with_escapes_stays_in_its_columns():
    line = sample_line({"prompt": "once\u202e", "text": "\x0e" * 60}, 60)
    assert line.startswith("[sample] once\\u202e | \\x0e\\x0e") and len(line) == 60


def test_a_run_does_not_begin_with_advice_on_4_bit_weights_on_a_cpu(tmp_path, capsys):
    setup_logging(tmp_path)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Please make sure you already `pip install kernels`")
    logging.getLogger("bitsandbytes.cextension").warning("was compiled without GPU support")
    for said in (capsys.readouterr().out, (tmp_path / "train.log").read_text()):
        assert "kernels" not in said and "without GPU support" in said


class Watched(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_console_made_for_a_terminal_writes_no_colours_into_a_file(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TERM"):
        monkeypatch.delenv(name, raising=False)
    written = []
    for stream in (Watched(), io.StringIO(), Watched()):
        monkeypatch.setattr(sys, "stdout", stream)
        console().print(Text("kept", "bold red"))
        written.append(stream.getvalue())
    assert "\x1b[" in written[0] and written[1] == "kept\n" and written[2] == written[0]


def test_a_program_without_a_console_has_nobody_who_watches(monkeypatch):
    """Programs under pythonw.exe and services have no standard output."""
    monkeypatch.setattr(sys, "stdout", None)
    assert not person_may_watch(None)
    assert console() is console()
