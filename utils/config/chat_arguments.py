"""The words behind `curriculum-distill chat`. Nothing here loads torch, so that mistakes are answered at once."""

import argparse
from collections.abc import Sequence

from ..errors import UserError
from ..machine.launcher import program
from .arguments import Parser, describe_unknown

DESCRIPTION = """\
Student and teacher of a finished run side by side in the terminal. Both go on from the same text, or answer the same
conversation, where the student learned from conversations; each writes what it finds likeliest. In a pipe every line of
the input is one text or question."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Sort the words behind `chat`.

    Returns:
        `run`, `new_tokens` and `student_only`.

    Raises:
        UserError: mistakes in them.
    """
    flags = parser()
    options, unknown = flags.parse_known_args(words)
    if unknown:
        raise UserError(describe_unknown(unknown, flags, f"{flags.prog} --help shows the flags"))
    return options


def parser() -> Parser:
    """Make the parser."""
    result = Parser(prog=f"{program()} chat", description=DESCRIPTION, allow_abbrev=False)
    result.add_argument("run", metavar="RUN", help="folder of a finished run, such as runs/quickstart")
    result.add_argument(
        "--new-tokens", type=_positive, default=120, metavar="N", help="tokens that each writes, at most (default: 120)"
    )
    result.add_argument("--student-only", action="store_true", help="leave the teacher out: quicker, and less memory")
    return result


def _positive(word: str) -> int:
    """Return the whole number above 0 that a word says.

    Raises:
        ArgumentTypeError: it says none.
    """
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"got {word!r}, expected a whole number above 0")
    return int(word)
