"""The command line of `train.py`: flags are names for configuration keys, laid over those of a recipe.

Values stay text; `config.build` checks them together with those of the YAML file, so that all mistakes are
reported at once.
"""

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from ..errors import UserError
from ..machine import hardware
from ..paths import user_path
from .build import build
from .described_by import drop_descriptions, limit_to_training_text
from .settings import TrainingConfig
from .yaml_files import find_config, get_dotted, load_yaml, set_dotted

Config = TypeVar("Config")

FLAGS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "models": (
        ("--teacher", "teacher.name", "ID|DIR", "frozen teacher: hub id or local folder"),
        ("--teacher-device", "teacher.device", "auto|cpu|cuda:1|spread|sharded", "where the teacher computes"),
        ("--student", "student.name", "ID|DIR", "student: hub id or local folder"),
        ("--student-init", "student.init", "pretrained|random", "random: config.json and tokenizer only, no weights"),
        (
            "--teacher-dtype",
            "teacher.dtype",
            "TYPE",
            "auto, float32, float16, bfloat16, or 8bit, 4bit with bitsandbytes",
        ),
        ("--lora", "student.lora.enabled", "", "train a low-rank adapter, with peft, and save it alone"),
        ("--merge-lora", "student.lora.merge", "", "export a plain model with the adapter added to its weights"),
    ),
    "data": (
        ("--train-data", "data.train", "ID|PATH", "hub ids, files (.txt .jsonl .parquet .csv) or folders of them"),
        ("--eval-data", "data.eval", "ID|PATH", "text to measure on; default: a share of the training documents"),
        ("--max-length", "data.max_length", "N", "tokens per window, for either model"),
        (
            "--document-separator",
            "data.document_separator",
            "S",
            "string that cuts a .txt file into documents, wherever it is",
        ),
    ),
    "training": (
        ("--batch-size", "training.batch_size", "N|auto", "windows per forward pass; auto: what fits"),
        (
            "--gradient-accumulation-steps",
            "training.gradient_accumulation_steps",
            "N",
            "forward passes per optimizer step",
        ),
        ("--epochs", "training.epochs", "N", "passes over the data; overrules max_steps of a recipe"),
        ("--max-steps", "training.max_steps", "N", "optimizer steps in total, instead of epochs"),
        ("--learning-rate", "training.learning_rate", "X", "peak learning rate"),
        ("--mixed-precision", "training.mixed_precision", "auto|no|fp16|bf16", "precision of the computation"),
        (
            "--gradient-checkpointing",
            "training.gradient_checkpointing",
            "",
            "compute layers twice: less memory, slower",
        ),
        ("--seed", "training.seed", "N", "of initialisation, data order and dropout"),
        ("--max-hours", "training.max_hours", "H", "stop in time: save, evaluate, export, exit 0"),
    ),
    "distillation": (
        ("--temperature", "loss.temperature", "T", "temperature of teacher and student in KD"),
        ("--top-k", "loss.top_k", "K", "teacher tokens kept per position"),
    ),
    "teacher cache": (
        ("--cache-teacher", "cache.folder", "DIR", "keep what the teacher says there; later epochs and runs read it"),
        ("--build-cache-only", "cache.build_only", "", "build the whole cache first, and stop"),
        ("--cache-top-k", "cache.top_k", "K|adaptive", "teacher tokens kept per position, in place of --top-k"),
        ("--cache-accept-mismatch", "cache.accept_mismatch", "", "use a cache of another text or teacher"),
    ),
    "run": (
        ("--output-dir", "output_dir", "DIR", "folder of this run"),
        ("--resume", "resume", "auto|never|PATH", "continue from the newest whole checkpoint, never, or from PATH"),
        ("--log-every", "logging.every", "N", "optimizer steps between logged steps"),
        ("--track", "logging.track", "NAME", "also log to tensorboard, wandb or another tracker that accelerate knows"),
        ("--log-term-gradients", "logging.term_gradients", "", "also log the gradient norm of each term; slow"),
        ("--eval-every", "evaluation.every", "N", "optimizer steps between evaluations; 0: before and after only"),
        ("--eval-tasks", "evaluation.tasks", "TASK", "tasks of lm_eval for teacher and student, after training"),
        ("--eval-tasks-path", "evaluation.tasks_path", "DIR", "tasks of your own, in lm_eval's YAML form"),
        ("--push-to-hub", "hub.repository", "OWNER/NAME", "upload the student after the run, to a private repository"),
        ("--save-every", "training.save_every", "N", "optimizer steps between checkpoints"),
    ),
}
"""Per group of --help: flag, configuration key, what it takes (nothing: it sets the key to true), what it is."""

MAY_BE_EMPTY = ("data.document_separator",)
"""Keys whose flags take the empty string: cut nowhere."""

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
    """What was asked for on the command line."""

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
        """Lay flags, then --set, over the nested `values` of a recipe, in place."""
        if "training.epochs" in self.values and "training.max_steps" not in self.values:
            set_dotted(values, "training.max_steps=null")  # the flag was given for this run, the recipe was not
        self._keep_windows_per_step(values)
        self._lay_over(values)

    def _lay_over(self, values: dict[str, Any]) -> None:
        for key, value in self.values.items():
            *path, last = key.split(".")
            inner = values
            for part in path:
                inner = inner.setdefault(part, {})
                if not isinstance(inner, dict):
                    raise UserError(f"{part}: the recipe has {inner!r} where a mapping is expected")
            inner[last] = value

        for assignment in self.assignments:
            set_dotted(values, assignment)

    def _keep_windows_per_step(self, values: dict[str, Any]) -> None:
        """With `--batch-size auto`, accumulation counts windows: those that the recipe has in an optimizer step."""
        recipe, accumulation = values.get("training", {}), "gradient_accumulation_steps"
        if self.values.get("training.batch_size") != "auto" or f"training.{accumulation}" in self.values:
            return
        size, times = (recipe.get(key, getattr(TrainingConfig, key)) for key in ("batch_size", accumulation))
        if isinstance(size, int) and isinstance(times, int):
            set_dotted(values, f"training.{accumulation}={size * times}")


def configure(schema: type[Config], argv: Sequence[str]) -> tuple[Config, str]:
    """The configuration a command line asks for, and which recipe it starts from and why.

    Args:
        schema: the dataclass of a whole run.

    Raises:
        UserError: every mistake in recipe and flags.
    """
    arguments = parse(argv)
    given = arguments.given()
    name, why = (arguments.config, "asked for") if arguments.config else _default_recipe(given)

    values: dict[str, Any] = {}
    recipe, source = "no recipe", "the command line"
    dropped, limited = [], []
    if name is not None:
        path = find_config(name)
        values = {"output_dir": f"runs/{path.stem}"} | load_yaml(path)
        recipe, source = f"recipe {path.name}", f"{path.name} and the command line"
        dropped = drop_descriptions(values, given)
        limited = limit_to_training_text(values, given)

    arguments.apply(values)
    folder = values.get("output_dir")
    if isinstance(folder, str) and folder:  # the empty name would become this folder
        values["output_dir"] = str(user_path(folder))
    return build(schema, values, source=source), f"{recipe}: {why}{_without_effect(arguments, dropped, limited)}"


def _without_effect(arguments: Arguments, dropped: Sequence[str], limited: Sequence[str]) -> str:
    """Describe what a recipe or the command line says in vain.

    Args:
        dropped: settings of the recipe that fell with a text or a model.
        limited: settings of the recipe that the evaluation text is read without.
    """
    notes = ""
    epochs, steps = (arguments.values.get(f"training.{key}") for key in ("epochs", "max_steps"))
    if epochs and steps:
        notes += f"; max_steps {steps} replaces epochs {epochs}"
    if dropped:
        notes += (
            f"; not taken from it, because it describes the text or the model that is replaced: {', '.join(dropped)} "
            "(--set KEY=VALUE sets it nevertheless)"
        )
    if limited:
        notes += (
            "; the evaluation text is another one, and is read without what the recipe says of its training text: "
            f"{', '.join(limited)} (--set KEY=VALUE sets it for both)"
        )
    return notes


def _default_recipe(given: dict[str, Any]) -> tuple[str | None, str]:
    """Choose the recipe where none was named, and say why. None: the defaults of every setting.

    What a command with models of its own trains on and with must not depend on the machine, so no recipe is laid under
    it, with a GPU or without.

    Args:
        given: what the command line sets.
    """
    if get_dotted(given, "teacher.name") is not None or get_dotted(given, "student.name") is not None:
        return None, "no --config was given, and the models are your own; every setting has its default or is given"

    device = hardware.choose_device()
    if device.value.type == "cuda":
        return "kaggle_p100", f"no --config was given and there is a GPU ({device.reason})"

    why = f"no --config was given and there is no GPU ({device.reason})"
    if get_dotted(given, "data.train") is not None:
        why += (
            "; its models are toys, the teacher has read the documentation of Python: for a student of use give "
            "--teacher and --student"
        )
    return "quickstart", why


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  python {self.prog} --help shows all flags")


def parser() -> argparse.ArgumentParser:
    """The parser, for `parse` and for documentation."""
    made = _Parser(
        prog="train.py",
        description="Teach a small language model from a large one, also across tokenizers.",
        epilog=EPILOG,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe = made.add_argument_group("recipe")
    recipe.add_argument(
        "--config",
        metavar="NAME|PATH",
        help="recipe of configs/ or YAML file; default: quickstart without a GPU, kaggle_p100 with one, none where "
        "--teacher or --student is given. What a recipe says of a text or a model (evaluation text, columns, ...) "
        "falls where a flag replaces that text or model",
    )
    recipe.add_argument(
        "--set", metavar="KEY=VALUE", action="extend", nargs="+", default=[], help="any setting, after all flags"
    )
    recipe.add_argument(
        "--compare", metavar="RUN", nargs="+", help="train nothing: compare the folders of runs, in words and a picture"
    )
    recipe.add_argument("-h", "--help", action="help", help="show this and exit")
    for title, flags in FLAGS.items():
        group = made.add_argument_group(title)
        for flag, key, metavar, text in flags:
            taken = {"metavar": metavar} if metavar else {"action": "store_const", "const": "true"}
            several = {"nargs": "+", "action": "extend"} if key in SEVERAL else {}
            group.add_argument(flag, dest=key, help=text, **taken, **several)
            if key == "resume":
                group.add_argument("--no-resume", dest="no_resume", action="store_true", help="same as --resume never")
    return made


def parse(argv: Sequence[str]) -> Arguments:
    """What `argv` (without the program's name) asks for.

    Raises:
        UserError: unknown flags (all of them, each with the nearest known one), a flag without its value, or
            flags that contradict each other.
    """
    made = parser()
    known = [option for action in made._actions for option in action.option_strings if option.startswith("--")]
    given, unknown = made.parse_known_args([_with_dashes(word) for word in _separator_joined(argv)])
    if unknown:
        raise UserError(_describe_unknown(unknown, known))
    found = vars(given)
    config, assignments, no_resume = found.pop("config"), found.pop("set"), found.pop("no_resume")
    compare = found.pop("compare") or []
    values = {key: value for key, value in found.items() if value is not None}
    _require_words(values | {"config": config, "compare": compare})
    if no_resume:
        if values.get("resume", "never") != "never":
            raise UserError(f"--no-resume contradicts --resume {values['resume']}: give one of them")
        values["resume"] = "never"
    arguments = Arguments(config, values, assignments, compare)
    if compare and (config or assignments or values.keys() - {"output_dir"}):
        raise UserError("--compare trains nothing. Expected beside it only --output-dir DIR, where the picture goes.")
    return arguments


def _require_words(values: dict[str, Any]) -> None:
    """Refuse flags with nothing behind them: `--student "$STUDENT"` where the variable of the shell is not set.

    Raises:
        UserError: names every such flag.
    """
    flag_of = {key: flag for flags in FLAGS.values() for flag, key, *_ in flags}
    empty = []
    for key, value in values.items():
        words = value if isinstance(value, list) else [value]
        if key not in MAY_BE_EMPTY and any(isinstance(word, str) and not word.strip() for word in words):
            empty.append(flag_of.get(key, f"--{key}"))

    if empty:
        raise UserError(
            f"got nothing behind {', '.join(empty)}: an empty word. Expected a value, or leave the flag out; a "
            "variable of the shell that is not set gives an empty word."
        )


def _with_dashes(word: str) -> str:
    """`--batch_size=2` as `--batch-size=2`; what is not a flag stays as it is."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def _separator_joined(words: Sequence[str]) -> list[str]:
    """`--document-separator ---` with an equals sign, or its dashes would be taken for a flag's."""
    at = next((i for i, word in enumerate(words[:-1]) if _with_dashes(word) == "--document-separator"), None)
    return [*words] if at is None else [*words[:at], f"{words[at]}={words[at + 1]}", *words[at + 2 :]]


def _describe_unknown(words: Sequence[str], known: Sequence[str]) -> str:
    lines = []
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1, cutoff=0.6)
        if near:
            lines.append(f"  - {word}: unknown; did you mean {near[0]}?")
        elif word.startswith("-"):
            lines.append(f"  - {word}: unknown flag")
        else:
            lines.append(f"  - {word}: no flag takes this word")
    return "not understood on the command line:\n" + "\n".join(lines) + "\n  python train.py --help shows all flags"
