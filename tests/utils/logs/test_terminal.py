import logging

import pytest

from utils.logs.console import setup_logging
from utils.logs.lines import sample_line
from utils.logs.terminal import printable

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
