"""The words of a command line: a parser whose flags are made of the settings, and what it finds.

A setting `training.seed` has the flag `--training.seed`, with its docstring and default as help. Those of everyday have
a short flag too: a line in `SHORT_FLAGS`.
"""

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NoReturn

from ..errors import UserError
from .schema import Setting, json_schema, lists_of_texts, sections_of, settings_of
from .short_forms import expand, full_key, main_key, own_path, split_list
from .yaml_files import read_assignment, read_value, set_dotted

SHORT_FLAGS = {
    "--teacher": "teacher.name",
    "--teacher-tokenizer": "teacher.tokenizer",
    "--teacher-model": "teacher.model",
    "--teacher-device": "teacher.device",
    "--teacher-dtype": "teacher.dtype",
    "--student": "student.name",
    "--student-init": "student.init",
    "--lora": "student.lora.enabled",
    "--merge-lora": "student.lora.merge",
    "--train-data": "data.train",
    "--eval-data": "data.eval",
    "--max-length": "data.max_length",
    "--document-separator": "data.document_separator",
    "--temperature": "loss.temperature",
    "--top-k": "loss.top_k",
    "--batch-size": "training.batch_size",
    "--gradient-accumulation-steps": "training.gradient_accumulation_steps",
    "--epochs": "training.epochs",
    "--max-steps": "training.max_steps",
    "--learning-rate": "training.learning_rate",
    "--lr": "training.learning_rate",
    "--mixed-precision": "training.mixed_precision",
    "--gradient-checkpointing": "training.gradient_checkpointing",
    "--seed": "training.seed",
    "--max-hours": "training.max_hours",
    "--save-every": "training.save_every",
    "--eval-every": "evaluation.every",
    "--without-teacher": "evaluation.without_teacher",
    "--eval-tasks": "evaluation.tasks",
    "--eval-tasks-path": "evaluation.tasks_path",
    "--cache-teacher": "cache.folder",
    "--build-cache-only": "cache.build_only",
    "--cache-top-k": "cache.top_k",
    "--cache-accept-mismatch": "cache.accept_mismatch",
    "--log-every": "logging.every",
    "--track": "logging.track",
    "--log-term-gradients": "logging.term_gradients",
    "--push-to-hub": "hub.repository",
    "--output-dir": "output_dir",
    "--resume": "resume",
}
"""Flag -> the setting that it is another name for. --help shows these settings, --help-all all."""

MAY_BE_EMPTY = ("data.document_separator",)
"""Settings whose flags take the empty string, which cuts a file nowhere."""

REPEATED = {"teacher.name": "teachers"}
"""Setting whose flag may be given more than once -> the list of sections that several of its values make."""

SHELLS = ("bash", "zsh", "tcsh")
"""Shells whose completion shtab writes."""

DESCRIPTION = "Teach a small language model from a large one, also across tokenizers."

EPILOG = """\
--help-all shows all {count} settings, docs/settings.md too. A weight or temperature may follow training progress:
  --curriculum.lm '{{points: [[0, 1], [0.5, 0.3]]}}'

Exit codes: 0 done (also stopped early or by --max-hours), 1 failure, 2 a mistake in what was asked for,
129 SIGHUP (a closed terminal), 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (these four save a checkpoint first)."""


@dataclass(frozen=True)
class Arguments:
    """The words of a command line, sorted but not yet checked."""

    config: str | None = None
    """Recipe or YAML file; None: the default for this machine."""

    flags: dict[str, Any] = field(default_factory=dict)
    """Setting -> value, from its flag: text, unless only YAML can say it."""

    assignments: list[tuple[str, Any]] = field(default_factory=list)
    """(setting or section, value) of each --set, in order; they lie over the flags."""

    compare: list[str] = field(default_factory=list)
    """Folders of runs to compare, instead of training."""

    csv: str | None = None
    """File for the comparison as a table."""

    print_config: bool = False
    """Print the configuration, instead of training."""

    def lay_over(self, values: dict[str, Any]) -> None:
        """Set what the command line sets in the nested `values` of a recipe, in place.

        Raises:
            UserError: a key below something that has no keys.
        """
        for key, value in [*self.flags.items(), *self.assignments]:
            set_dotted(values, key, value)

    def nested(self) -> dict[str, Any]:
        """Return what the command line sets, as nested values."""
        values: dict[str, Any] = {}
        self.lay_over(values)
        return values


# ----------------------------------------------------------------------------------------------- parser


class Parser(argparse.ArgumentParser):
    """A parser that reports mistakes as `UserError`, not by an end of the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  {self.program} --help shows the flags")

    @property
    def program(self) -> str:
        """Return how the command is started."""
        return f"python {self.prog}" if self.prog.endswith(".py") else self.prog


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help in which a flag of several names has its value once, as Python 3.13 writes it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        values = {0: "", "?": f" [{action.metavar}]", "+": f" {action.metavar} ..."}
        return ", ".join(action.option_strings) + values.get(action.nargs, f" {action.metavar}")


class _Answer(argparse.Action):
    """A flag that prints something and ends the command, as --help does.

    Args:
        answer: from the parser and the flag's value to the text.
    """

    def __init__(self, answer: Callable[[argparse.ArgumentParser, Any], str], **options: Any) -> None:
        super().__init__(**{"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, **options})
        self.answer = answer

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(self.answer(parser, values))
        parser.exit()


def parser(config: type, *, everything: bool = False) -> Parser:
    """Make the parser of the command line.

    Args:
        config: the dataclass of a whole run.
        everything: the help has all settings, not only those with a short flag.
    """
    settings = settings_of(config)
    result = Parser(
        prog="train.py",
        usage="%(prog)s [--config NAME|PATH] [flags]",
        description=DESCRIPTION,
        epilog=EPILOG.format(count=len(settings)),
        allow_abbrev=False,
        add_help=False,
        formatter_class=_Help,
    )
    _add_general_flags(result.add_argument_group("recipe"), config)
    _add_answers(result.add_argument_group("answers, in place of a run"), config)

    groups = {
        name: result.add_argument_group(name, section.meaning)
        for name, section in sections_of(config).items()
        if "." not in name
    }
    groups[""] = result.add_argument_group("run", "The folder of a run, and its continuation.")
    for setting in settings.values():
        _add_flag(groups[setting.section], setting, config, is_shown=everything)

    # beside its other spelling, and so not among the flags, which set a key each
    groups[""].add_argument("--no-resume", action="store_true", help="same as --resume never")
    return result


def _add_general_flags(group: argparse._ArgumentGroup, config: type) -> None:
    """Add the flags that choose a recipe and change it."""
    group.add_argument(
        "--config",
        metavar="NAME|PATH",
        help="recipe of configs/ or YAML file; default: quickstart without a GPU, kaggle_p100 with one, none where "
        "--teacher or --student is given. What a recipe says of a text or a model (evaluation text, columns, ...) "
        "falls where a flag replaces that text or model",
    )
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        help="any setting or section in YAML, after all flags: --set 'router={layers: 2, heads: 4}'",
    )


def _add_answers(group: argparse._ArgumentGroup, config: type) -> None:
    """Add the flags that train nothing."""

    def add(*names: str, answer: Callable[[argparse.ArgumentParser, Any], str], help: str, **options: Any) -> None:
        group.add_argument(*names, action=_Answer, answer=answer, help=help, **options)

    def whole_help(parser_of_some: argparse.ArgumentParser, _: Any) -> str:
        whole = parser(config, everything=True)
        whole.prog, whole.description = parser_of_some.prog, parser_of_some.description
        return whole.format_help()

    add("-h", "--help", answer=lambda some, _: some.format_help(), help="show this and exit")
    add("--help-all", answer=whole_help, help="show all settings and exit")
    add(
        "--print-schema",
        answer=lambda *_: json.dumps(json_schema(config), indent=2),
        help="print the JSON schema of recipes, for editors",
    )
    add(
        "--print-completion",
        answer=lambda _, shell: completion(config, shell),
        help="print what completes curriculum-distill in a shell; needs the package shtab",
        nargs=None,
        choices=SHELLS,
        metavar="|".join(SHELLS),
    )

    group.add_argument(
        "--print-config", action="store_true", help="print the settings of the run as YAML, for --config"
    )
    group.add_argument(
        "--compare", metavar="RUN", nargs="+", help="compare the folders of runs, in words and a picture"
    )
    group.add_argument(
        "--csv",
        metavar="FILE",
        help="beside --compare: the same in tables for other programs; Markdown where the name ends with .md",
    )


def _add_flag(group: argparse._ArgumentGroup, setting: Setting, config: type, *, is_shown: bool) -> None:
    """Add the flag of a setting, under all its names. Its value stays text, which `build` reads."""
    names = [flag for flag, key in SHORT_FLAGS.items() if key == setting.key]
    section, _, last = setting.key.rpartition(".")
    short_form = [section] if main_key(section) == last else []
    meaning = setting.meaning
    if short_form and "." in section:  # the weight of a term: what the term is says more
        meaning = sections_of(config)[section].meaning
    long_names = [f"--{key.replace('_', '-')}" for key in [*short_form, setting.key]]

    options: dict[str, Any] = {}
    if setting.is_switch:
        options = {"nargs": "?", "const": "true"}
    elif setting.is_list:
        options = {"action": "extend", "nargs": "+"}
    elif setting.key in REPEATED:
        options = {"action": "append"}

    text = f"{meaning} (default: {setting.shown_default})".replace("%", "%%")
    group.add_argument(
        *dict.fromkeys([*names, *long_names]),
        dest=setting.key,
        metavar="|".join(metavars(setting)),
        help=text if names or is_shown else argparse.SUPPRESS,
        **options,
    )


def metavars(setting: Setting) -> list[str]:
    """Return the values that a setting takes: words that are meant literally, and N, X, TEXT, RAMP or a mapping."""
    kinds = {"integer": "N", "number": "X", "string": "TEXT", "object": "{NAME: X}", "null": "null"}

    values: list[str] = []
    for form in setting.forms:
        form = form.get("items", form)
        form = form.get("prefixItems", [form])[0]
        if "$ref" in form:
            values.append("RAMP" if form["$ref"].endswith("/Ramp") else "TEXT")
        elif form["type"] == "boolean":
            values += ["true", "false"]
        else:
            literal = form.get("enum", [form["const"]] if "const" in form else None)
            values += literal or [kinds[form["type"]]]
    return values


def completion(config: type, shell: str) -> str:
    """Return the script that lets a shell complete the flags of `curriculum-distill`, and their values.

    Raises:
        UserError: shtab, which writes it, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError("--print-completion needs the package shtab: python -m pip install shtab") from error

    whole = parser(config, everything=True)
    whole.prog = "curriculum-distill"
    settings = settings_of(config)
    for action in whole._actions:
        values = metavars(settings[action.dest]) if action.dest in settings else []
        words = [value for value in values if not value.isupper()]
        if words:
            action.choices = words
        elif "TEXT" in values or action.dest in ("config", "compare", "csv"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(whole, shell)


# ---------------------------------------------------------------------------------------------- parsing


@cache
def _parser(config: type) -> Parser:
    """Make the parser for `parse`, once."""
    return parser(config)


def parse(config: type, argv: Sequence[str], program: str = "train.py", description: str = DESCRIPTION) -> Arguments:
    """Sort the words of a command line.

    Args:
        config: the dataclass of a whole run.
        argv: without the program's name.
        program: its name, for the help.
        description: likewise.

    Raises:
        UserError: unknown flags (all of them, each with the nearest known one), a flag without its value, or
            flags that contradict each other.
    """
    flags = _parser(config)
    flags.prog, flags.description = program, description
    words = [_with_dashes(word) for word in _join_separator(argv)]
    namespace, unknown = flags.parse_known_args(words)
    if unknown:
        closing = f"{flags.program} --help shows the flags of everyday, --help-all those of every setting"
        raise UserError(describe_unknown(unknown, flags, closing))

    words_of = {key: words for key, words in vars(namespace).items() if words is not None}
    _require_words(words_of, {action.dest: action.option_strings[0] for action in flags._actions})

    # what is left are the flags that set no key
    settings = settings_of(config)
    _make_lists(words_of)
    values = {key: _value(settings[key], words_of.pop(key)) for key in settings if key in words_of}
    if words_of["no_resume"]:
        if values.get("resume", "never") != "never":
            raise UserError(f"--no-resume contradicts --resume {values['resume']}: give one of them")
        values["resume"] = "never"

    arguments = Arguments(
        config=words_of.get("config"),
        flags=values,
        assignments=[_assignment(config, text) for text in words_of["set"]],
        compare=words_of.get("compare", []),
        csv=words_of.get("csv"),
        print_config=words_of["print_config"],
    )
    _check_comparison(arguments)
    return arguments


def _make_lists(words_of: dict[str, Any]) -> None:
    """Make of the values of a flag that may be repeated a single value, or the list that they stand for, in place.

    Raises:
        UserError: the list was given too, or one of several values is null.
    """
    for key, plural in REPEATED.items():
        values = words_of.pop(key, [])
        if len(values) > 1 and plural in words_of:
            raise UserError(f"--{plural} contradicts several --{key.partition('.')[0]}: give one of them")
        if len(values) > 1 and "null" in values:
            flag = key.partition(".")[0]
            raise UserError(f"--{flag} null is no {flag}, and cannot stand beside another one: give one of them")
        if len(values) == 1:
            words_of[key] = values[0]
        elif values:
            words_of[plural] = [{key.rpartition(".")[2]: value} for value in values]


def _check_comparison(arguments: Arguments) -> None:
    """Refuse what a comparison does not read, and a table of none."""
    trains = arguments.config or arguments.assignments or arguments.print_config
    if arguments.compare and (trains or arguments.flags.keys() - {"output_dir"}):
        raise UserError(
            "--compare trains nothing. Expected beside it only --output-dir DIR, where the picture goes, and --csv "
            "FILE."
        )
    if arguments.csv and not arguments.compare:
        raise UserError(f"--csv {arguments.csv}: a table of a comparison. Expected --compare RUN RUN ... beside it.")


def _assignment(config: type, text: str) -> tuple[str, Any]:
    """Return the key and the value of a --set, without short forms."""
    key, value = read_assignment(text)
    full = full_key(own_path(key), value)
    return full, expand(value, lists_of_texts(config), sections_of(config), full)


def _value(setting: Setting, words: Any) -> Any:
    """Return the value of a flag: its text, which pydantic reads, unless it is null or in YAML's brackets."""
    if isinstance(words, list):
        values = [value for word in words for value in _values_of_list(setting.key, word)]
        return expand(values, (), (), setting.key)
    if words == "null" and setting.may_be_null:
        return None

    takes_any_text = "TEXT" in metavars(setting)
    if takes_any_text:
        return words
    if words.startswith(("{", "[")):
        return read_value(f"--{setting.key} {words}", words)

    # 1e4 steps are a whole number, which pydantic does not see in the text
    if "e" in words.lower():
        with suppress(ValueError):
            return float(words)
    return words


def _values_of_list(key: str, word: Any) -> list[Any]:
    """Return the values that one word says of a list: `[a, b]`, `a,b`, or itself; a section is one value."""
    if not isinstance(word, str):
        return [word]
    if word.startswith("[") and word.endswith("]"):
        return read_value(f"--{key} {word}", word)
    return split_list(key, word)


def _require_words(values: dict[str, Any], names: dict[str, str]) -> None:
    """Refuse flags with nothing behind them: `--student "$STUDENT"` where the variable of the shell is not set.

    Args:
        names: destination of the parser -> the flag's first name.

    Raises:
        UserError: names every such flag.
    """
    empty = []
    for key, value in values.items():
        words = value if isinstance(value, list) else [value]
        is_empty = any(isinstance(word, str) and not word.strip() for word in words)
        if is_empty and key not in MAY_BE_EMPTY:
            empty.append(names[key])

    if empty:
        raise UserError(
            f"got nothing behind {', '.join(empty)}: an empty word. Expected a value, or leave the flag out; a "
            "variable of the shell that is not set gives an empty word."
        )


def _with_dashes(word: str) -> str:
    """Return `--batch-size=2` for `--batch_size=2`; what is not a flag stays as it is."""
    if not word.startswith("--"):
        return word

    # the value may be a path, whose underscores are its own
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _join_separator(argv: Sequence[str]) -> list[str]:
    """Put an equals sign into `--document-separator ---`, whose dashes would be taken for a flag's."""
    words = [*argv]
    for index, word in enumerate(words[:-1]):
        if _with_dashes(word) in ("--document-separator", "--data.document-separator"):
            words[index : index + 2] = [f"{word}={words[index + 1]}"]
            break
    return words


def describe_unknown(words: Sequence[str], flags: argparse.ArgumentParser, closing: str) -> str:
    """Return a message with one line for each word that no flag takes, and a closing one."""
    options = [*flags._option_string_actions]
    lines = ["not understood on the command line:"]
    is_value = False
    for word in words:
        # what follows an unknown flag was meant as its value
        is_value, follows = word.startswith("-") and "=" not in word, is_value
        if follows and not word.startswith("-"):
            continue

        flag = word.partition("=")[0]
        same_name = [option for option in options if option.rpartition(".")[2] == flag.lstrip("-") and "." in option]
        nearest = same_name or difflib.get_close_matches(flag, options, n=1, cutoff=0.6)
        if nearest:
            lines.append(f"  - {word}: unknown; did you mean {' or '.join(nearest)}?")
        elif word.startswith("-"):
            lines.append(f"  - {word}: unknown flag")
        else:
            lines.append(f"  - {word}: no flag takes this word")

    lines.append(f"  {closing}")
    return "\n".join(lines)
