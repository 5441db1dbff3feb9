"""The command line of `train.py`: flags are names for configuration keys, laid over those of a recipe.

Values stay text; `build` checks them together with those of the YAML file, so that all mistakes are reported at once.

A new flag is a line in `FLAGS`. A new setting needs none: --set reaches every key.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeVar

from ..errors import UserError
from ..paths import user_path
from .build import build
from .described_by import drop_descriptions, limit_to_training_text
from .settings import TrainingConfig
from .yaml_files import find_config, get_dotted, load_yaml, set_dotted

Config = TypeVar("Config")


class Flag(NamedTuple):
    """A flag that sets a configuration key."""

    name: str
    """Such as `--batch-size`."""

    key: str
    """Dotted configuration key."""

    metavar: str
    """Form of the value, for --help; empty: the flag takes none and sets the key to true."""

    help: str
    """Line of --help."""


FLAGS: dict[str, tuple[Flag, ...]] = {
    "models": (
        Flag("--teacher", "teacher.name", "ID|DIR|FILE.gguf", "frozen teacher: hub id, local folder or GGUF file"),
        Flag("--teacher-device", "teacher.device", "auto|cpu|cuda:1|spread|sharded", "where the teacher computes"),
        Flag("--student", "student.name", "ID|DIR|FILE.gguf", "student: hub id, local folder or GGUF file"),
        Flag(
            "--student-init",
            "student.init",
            "pretrained|random|layers:K",
            "random: config.json and tokenizer only, no weights; layers:K: K of its layers",
        ),
        Flag(
            "--teacher-dtype",
            "teacher.dtype",
            "TYPE",
            "auto, float32, float16, bfloat16, or 8bit, 4bit with bitsandbytes",
        ),
        Flag("--lora", "student.lora.enabled", "", "train a low-rank adapter, with peft, and save it alone"),
        Flag("--merge-lora", "student.lora.merge", "", "export a plain model with the adapter added to its weights"),
    ),
    "data": (
        Flag("--train-data", "data.train", "ID|PATH", "hub ids, files (.txt .jsonl .parquet .csv) or folders of them"),
        Flag("--eval-data", "data.eval", "ID|PATH", "text to measure on; default: a share of the training documents"),
        Flag("--max-length", "data.max_length", "N", "tokens per window, for either model"),
        Flag(
            "--document-separator",
            "data.document_separator",
            "S",
            "string that cuts a .txt file into documents, wherever it is",
        ),
    ),
    "training": (
        Flag("--batch-size", "training.batch_size", "N|auto", "windows per forward pass; auto: what fits"),
        Flag(
            "--gradient-accumulation-steps",
            "training.gradient_accumulation_steps",
            "N",
            "forward passes per optimizer step",
        ),
        Flag("--epochs", "training.epochs", "N", "passes over the data; overrules max_steps of a recipe"),
        Flag("--max-steps", "training.max_steps", "N", "optimizer steps in total, instead of epochs"),
        Flag("--learning-rate", "training.learning_rate", "X", "peak learning rate"),
        Flag("--mixed-precision", "training.mixed_precision", "auto|no|fp16|bf16", "precision of the computation"),
        Flag(
            "--gradient-checkpointing",
            "training.gradient_checkpointing",
            "",
            "compute layers twice: less memory, slower",
        ),
        Flag("--seed", "training.seed", "N", "of initialisation, data order and dropout"),
        Flag("--max-hours", "training.max_hours", "H", "stop in time: save, evaluate, export, exit 0"),
    ),
    "distillation": (
        Flag("--temperature", "loss.temperature", "T", "temperature of teacher and student in KD"),
        Flag("--top-k", "loss.top_k", "K", "teacher tokens kept per position"),
    ),
    "teacher cache": (
        Flag(
            "--cache-teacher", "cache.folder", "DIR", "keep what the teacher says there; later epochs and runs read it"
        ),
        Flag("--build-cache-only", "cache.build_only", "", "build the whole cache first, and stop"),
        Flag("--cache-top-k", "cache.top_k", "K|adaptive", "teacher tokens kept per position, in place of --top-k"),
        Flag("--cache-accept-mismatch", "cache.accept_mismatch", "", "use a cache of another text or teacher"),
    ),
    "run": (
        Flag("--output-dir", "output_dir", "DIR", "folder of this run"),
        Flag("--resume", "resume", "auto|never|PATH", "continue from the newest whole checkpoint, never, or from PATH"),
        Flag("--log-every", "logging.every", "N", "optimizer steps between logged steps"),
        Flag(
            "--track",
            "logging.track",
            "NAME",
            "also log to tensorboard, wandb or another tracker that accelerate knows",
        ),
        Flag("--log-term-gradients", "logging.term_gradients", "", "also log the gradient norm of each term; slow"),
        Flag("--eval-every", "evaluation.every", "N", "optimizer steps between evaluations; 0: before and after only"),
        Flag("--eval-tasks", "evaluation.tasks", "TASK", "tasks of lm_eval for teacher and student, after training"),
        Flag("--eval-tasks-path", "evaluation.tasks_path", "DIR", "tasks of your own, in lm_eval's YAML form"),
        Flag(
            "--push-to-hub", "hub.repository", "OWNER/NAME", "upload the student after the run, to a private repository"
        ),
        Flag("--save-every", "training.save_every", "N", "optimizer steps between checkpoints"),
    ),
}
"""Group of --help -> its flags."""

MAY_BE_EMPTY = ("data.document_separator",)
"""Keys whose flags take the empty string, which cuts a file nowhere."""

SEVERAL = ("data.train", "logging.track", "evaluation.tasks")
"""Keys of lists: their flags take several values."""

EPILOG = """\
Every other setting has a dotted key, for example:
  --set curriculum.kd.weight=0 curriculum.lm.weight=1             the baseline without a teacher's signal
  --set 'curriculum.lm.weight={points: [[0, 1], [0.5, 0.3]]}'     a weight that follows training progress

Exit codes: 0 done (also stopped early or by --max-hours), 1 failure, 2 a mistake in what was asked for,
129 SIGHUP (a closed terminal), 130 Ctrl-C, 138 SIGUSR1, 143 SIGTERM (these four save a checkpoint first)."""


@dataclass(frozen=True)
class Arguments:
    """The words of a command line, sorted but not yet checked."""

    config: str | None = None
    """Recipe or YAML file; None: the default for this machine."""

    values: dict[str, Any] = field(default_factory=dict)
    """Configuration key -> text (or list of texts), from flags."""

    assignments: list[str] = field(default_factory=list)
    """`dotted.key=value` of --set, in order."""

    compare: list[str] = field(default_factory=list)
    """Folders of runs to compare, instead of training."""

    def given(self) -> dict[str, Any]:
        """Return what the command line sets, as nested values.

        Raises:
            UserError: an assignment that is none.
        """
        values: dict[str, Any] = {}
        self._lay_over(values)
        return values

    def apply(self, values: dict[str, Any]) -> None:
        """Lay flags, then --set, over the nested `values` of a recipe, in place.

        Raises:
            UserError: an assignment that is none, or a key below something that has no keys.
        """
        if "training.epochs" in self.values and "training.max_steps" not in self.values:
            # max_steps would overrule epochs, but the flag is meant for this run and the recipe for many
            set_dotted(values, "training.max_steps=null")

        self._keep_windows_per_step(values)
        self._lay_over(values)

    def _lay_over(self, values: dict[str, Any]) -> None:
        """Set the keys of all flags and assignments in nested values."""
        for key, value in self.values.items():
            *sections, last = key.split(".")
            inner = values
            for section in sections:
                inner = inner.setdefault(section, {})
                if not isinstance(inner, dict):
                    raise UserError(f"{section}: the recipe has {inner!r} where a mapping is expected")
            inner[last] = value

        for assignment in self.assignments:
            set_dotted(values, assignment)

    def _keep_windows_per_step(self, values: dict[str, Any]) -> None:
        """With `--batch-size auto`, let an optimizer step have as many windows as it has in the recipe.

        The setting for accumulation counts forward passes otherwise, and windows with `auto`.
        """
        if self.values.get("training.batch_size") != "auto":
            return
        if "training.gradient_accumulation_steps" in self.values:
            return

        recipe = values.get("training", {})
        if not isinstance(recipe, dict):
            return  # a mistake that will be named

        windows = recipe.get("batch_size", TrainingConfig.batch_size)
        passes = recipe.get("gradient_accumulation_steps", TrainingConfig.gradient_accumulation_steps)
        # else the recipe has `auto` itself, or a mistake that `build` will name
        if isinstance(windows, int) and isinstance(passes, int):
            set_dotted(values, f"training.gradient_accumulation_steps={windows * passes}")


# ---------------------------------------------------------------------------------- from words to a configuration


def configure(schema: type[Config], argv: Sequence[str]) -> tuple[Config, str]:
    """Return the configuration a command line asks for, and a sentence on the recipe that it starts from and why.

    Args:
        schema: the dataclass of a whole run.
        argv: without the program's name.

    Raises:
        UserError: every mistake in recipe and flags.
    """
    arguments = parse(argv)
    overrides = arguments.given()

    # The recipe is the ground, without what describes a text or a model that the command line replaces.
    if arguments.config:
        name, why = arguments.config, "asked for"
    else:
        name, why = _default_recipe(overrides)
    recipe = _Recipe() if name is None else _load_recipe(name, overrides)

    # Flags and --set lie over it.
    values = recipe.values
    arguments.apply(values)

    folder = values.get("output_dir")
    if isinstance(folder, str) and folder:  # the empty name would become this folder
        values["output_dir"] = str(user_path(folder))

    config = build(schema, values, source=recipe.source)
    return config, f"{recipe.title}: {why}{_without_effect(arguments, recipe)}"


@dataclass(frozen=True)
class _Recipe:
    """Settings that a command line is laid over."""

    title: str = "no recipe"
    """Name of the recipe, for the log."""

    source: str = "the command line"
    """Everything that the configuration comes from, for messages about mistakes."""

    values: dict[str, Any] = field(default_factory=dict)
    """Nested values."""

    dropped: list[str] = field(default_factory=list)
    """Settings of the recipe that were removed with a text or a model."""

    limited: list[str] = field(default_factory=list)
    """Settings of the recipe that the evaluation text is read without."""


def _load_recipe(name: str, overrides: dict[str, Any]) -> _Recipe:
    """Load a recipe without what describes a text or a model that is replaced.

    Args:
        overrides: what the command line sets, as nested values.

    Raises:
        UserError: there is no such recipe, or it is not YAML.
    """
    path = find_config(name)
    values = {"output_dir": f"runs/{path.stem}", **load_yaml(path)}
    # in this order: where the training text is replaced too, nothing is left to limit
    dropped = drop_descriptions(values, overrides)
    limited = limit_to_training_text(values, overrides)

    return _Recipe(
        title=f"recipe {path.name}",
        source=f"{path.name} and the command line",
        values=values,
        dropped=dropped,
        limited=limited,
    )


def _without_effect(arguments: Arguments, recipe: _Recipe) -> str:
    """Return the end of a sentence: what a recipe or the command line says in vain, empty if nothing."""
    notes = ""

    epochs = arguments.values.get("training.epochs")
    steps = arguments.values.get("training.max_steps")
    if epochs and steps:
        notes += f"; max_steps {steps} replaces epochs {epochs}"

    if recipe.dropped:
        notes += (
            "; not taken from it, because it describes the text or the model that is replaced: "
            f"{', '.join(recipe.dropped)} (--set KEY=VALUE sets it nevertheless)"
        )
    if recipe.limited:
        notes += (
            "; the evaluation text is another one, and is read without what the recipe says of its training text: "
            f"{', '.join(recipe.limited)} (--set KEY=VALUE sets it for both)"
        )
    return notes


def _default_recipe(overrides: dict[str, Any]) -> tuple[str | None, str]:
    """Return the recipe to use where none was named, and the reason. None: the defaults of every setting.

    What a command with models of its own trains on and with must not depend on the machine, so no recipe is laid under
    it, with a GPU or without.

    Args:
        overrides: what the command line sets, as nested values.
    """
    has_teacher = get_dotted(overrides, "teacher.name") is not None
    has_student = get_dotted(overrides, "student.name") is not None
    if has_teacher or has_student:
        return None, "no --config was given, and the models are your own; every setting has its default or is given"

    # Imported only now, because it loads torch: --help and mistakes in flags are to be answered at once.
    from ..machine.hardware import choose_device

    device = choose_device()
    if device.value.type == "cuda":
        return "kaggle_p100", f"no --config was given and there is a GPU ({device.reason})"

    why = f"no --config was given and there is no GPU ({device.reason})"
    if get_dotted(overrides, "data.train") is not None:
        # a text of one's own, and toys that learn from it: hardly what was meant
        why += (
            "; its models are toys, the teacher has read the documentation of Python: for a student of use give "
            "--teacher and --student"
        )
    return "quickstart", why


# ------------------------------------------------------------------------------------------------- argparse


class _Parser(argparse.ArgumentParser):
    """A parser that reports mistakes as `UserError`, not by an end of the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  python {self.prog} --help shows all flags")


def parser() -> argparse.ArgumentParser:
    """Make the parser, for `parse` and for documentation."""
    result = _Parser(
        prog="train.py",
        description="Teach a small language model from a large one, also across tokenizers.",
        epilog=EPILOG,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_recipe_flags(result.add_argument_group("recipe"))

    for title, flags in FLAGS.items():
        group = result.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)
            if flag.key == "resume":
                # beside its other spelling, and so not among the flags, which set a key each
                group.add_argument("--no-resume", dest="no_resume", action="store_true", help="same as --resume never")
    return result


def _add_recipe_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that set no configuration key."""
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
        help="any setting, after all flags",
    )

    group.add_argument(
        "--compare",
        metavar="RUN",
        nargs="+",
        help="train nothing: compare the folders of runs, in words and a picture",
    )

    group.add_argument("-h", "--help", action="help", help="show this and exit")


def _add_flag(group: argparse._ArgumentGroup, flag: Flag) -> None:
    """Add a flag that sets a configuration key. Its value stays text, which `build` reads."""
    options: dict[str, Any] = {}
    if flag.metavar:
        options["metavar"] = flag.metavar
    else:
        options["action"] = "store_const"
        options["const"] = "true"

    if flag.key in SEVERAL:
        options["action"] = "extend"
        options["nargs"] = "+"

    group.add_argument(flag.name, dest=flag.key, help=flag.help, **options)


def parse(argv: Sequence[str]) -> Arguments:
    """Sort the words of a command line.

    Args:
        argv: without the program's name.

    Raises:
        UserError: unknown flags (all of them, each with the nearest known one), a flag without its value, or
            flags that contradict each other.
    """
    flags = parser()
    words = [_with_dashes(word) for word in _join_separator(argv)]
    namespace, unknown = flags.parse_known_args(words)
    if unknown:
        options = [option for action in flags._actions for option in action.option_strings]
        long_options = [option for option in options if option.startswith("--")]
        raise UserError(_describe_unknown(unknown, long_options))

    # Four flags set no key. Of the others, those that were not given are None.
    by_key = vars(namespace)
    config = by_key.pop("config")
    assignments = by_key.pop("set")
    no_resume = by_key.pop("no_resume")
    compare = by_key.pop("compare") or []
    values = {key: value for key, value in by_key.items() if value is not None}
    _require_words({**values, "config": config, "compare": compare})

    if no_resume:
        if values.get("resume", "never") != "never":
            raise UserError(f"--no-resume contradicts --resume {values['resume']}: give one of them")
        values["resume"] = "never"

    if compare and (config or assignments or values.keys() - {"output_dir"}):
        raise UserError("--compare trains nothing. Expected beside it only --output-dir DIR, where the picture goes.")
    return Arguments(config=config, values=values, assignments=assignments, compare=compare)


def _require_words(values: dict[str, Any]) -> None:
    """Refuse flags with nothing behind them: `--student "$STUDENT"` where the variable of the shell is not set.

    Raises:
        UserError: names every such flag.
    """
    flag_of = {flag.key: flag.name for flags in FLAGS.values() for flag in flags}

    empty = []
    for key, value in values.items():
        if key in MAY_BE_EMPTY:
            continue

        words = value if isinstance(value, list) else [value]
        if any(isinstance(word, str) and not word.strip() for word in words):
            empty.append(flag_of.get(key, f"--{key}"))

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
        if _with_dashes(word) == "--document-separator":
            words[index : index + 2] = [f"{word}={words[index + 1]}"]
            break
    return words


def _describe_unknown(words: Sequence[str], options: Sequence[str]) -> str:
    """Return a message with one line for each word that no flag takes."""
    lines = ["not understood on the command line:"]
    for word in words:
        nearest = difflib.get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.6)
        if nearest:
            lines.append(f"  - {word}: unknown; did you mean {nearest[0]}?")
        elif word.startswith("-"):
            lines.append(f"  - {word}: unknown flag")
        else:
            lines.append(f"  - {word}: no flag takes this word")

    lines.append("  python train.py --help shows all flags")
    return "\n".join(lines)
