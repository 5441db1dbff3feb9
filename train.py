"""Distil a large language model into a small one, also across tokenizers.

    python train.py --batch-size 2 --epochs 1

The command: from its words to the settings of a run, which `utils/commands/run.py` then does.
"""

if __name__ == "__main__":
    # Before all else, which takes half a second to import.
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

import sys
import time
from collections.abc import Sequence

from utils.commands.settings import RunConfig, configure, parse
from utils.config import chat_arguments
from utils.config.plain import to_plain
from utils.config.unused_settings import unused_settings
from utils.config.yaml_files import as_yaml
from utils.interrupt import raise_on_interrupt
from utils.logs.console import setup_logging
from utils.logs.streams import make_streams_safe
from utils.machine.launcher import rank
from utils.machine.stop_signals import interrupt_ends_process
from utils.paths import user_path
from utils.run.exit_codes import end_process, exit_code

__all__ = ["RunConfig", "configure", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what a command line asks for; return its exit code."""
    started = time.monotonic()
    make_streams_safe()
    setup_logging(None, main_process=rank() == 0)

    def command() -> None:
        raise_on_interrupt()
        words = sys.argv[1:] if argv is None else argv
        if words[:1] == ["chat"]:
            chat_arguments.parse(words[1:])
            with interrupt_ends_process():
                from utils.commands.run import chat

            return chat(words[1:])

        arguments = parse(words)
        if arguments.compare:
            from utils.comparison.compare import compare

            table = None if arguments.csv is None else user_path(arguments.csv)
            return compare(arguments.compare, user_path(arguments.flags.get("output_dir", ".")), table)

        config, recipe = configure(words)
        if arguments.print_config:
            notes = "".join(f"# {line}\n" for line in unused_settings(config))
            return print(notes + as_yaml(to_plain(config)), end="")

        # Only now: this loads torch, which takes seconds, and a mistake is answered at once.
        with interrupt_ends_process():
            from utils.commands.run import start

        start(config, recipe, started)

    return exit_code(command)


if __name__ == "__main__":
    end_process(main())
