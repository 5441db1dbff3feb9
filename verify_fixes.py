"""Checks to run before a long training, printed as a checklist; under a minute on two CPU cores.

    python verify_fixes.py                                                 this machine and this code
    python verify_fixes.py --teacher DIR --student DIR --train-data FILE   and your own set-up (flags of train.py)
    python verify_fixes.py -v                                              every check of this code, one a line

The first group of checks trains tiny models with the real loop, loss, loader and evaluation, on text that ships
with Python: no network, nothing left behind. Exit code 0: all is well; 1: a check failed; 2: a mistake in what
was asked for.
"""

if __name__ == "__main__":
    # Before all else, which takes half a second to import.
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from utils.commands.settings import configure, parse
from utils.errors import UserError
from utils.interrupt import raise_on_interrupt
from utils.logs.streams import make_streams_safe
from utils.logs.terminal import printable
from utils.machine.stop_signals import interrupt_ends_process
from utils.run.exit_codes import EXIT_CODES, end_process

VERBOSE = ("-v", "--verbose")
"""Flags that show every check of this code; else those are shown that fail, and how many passed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    make_streams_safe()
    all_words = list(sys.argv[1:] if argv is None else argv)
    # The one flag that train.py does not have.
    words = [word for word in all_words if word not in VERBOSE]
    # The loop says much of toy runs that is no news.
    logging.getLogger("utils").setLevel(logging.ERROR)

    try:
        raise_on_interrupt()
        arguments = parse(words, program="verify_fixes.py", description=__doc__)
        if arguments.compare or arguments.print_config:
            raise UserError("--compare and --print-config are answered by train.py; expected the flags of a run")
        config, recipe = configure(words)

        # Only now: these load torch, which takes seconds, and a mistake is answered at once.
        with interrupt_ends_process():
            import torch
            import transformers

            from utils.checks import checklist
            from utils.commands.checks import all_checks

        transformers.utils.logging.disable_progress_bar()
        # Tiny products gain nothing from more threads, and on a busy machine lose a hundredfold.
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            checks = all_checks(config, recipe, is_default=not words, folder=Path(folder))
            return checklist.run(checks, shows_all=words != all_words)

    except UserError as error:
        print(printable(str(error)), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return EXIT_CODES["SIGINT"]


if __name__ == "__main__":
    end_process(main())
