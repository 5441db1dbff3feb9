"""From a command line to the configuration of a run: a recipe, with flags and --set laid over it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..machine.torch_build import why_no_gpu
from ..paths import user_path
from .arguments import Arguments, parse
from .build import build, check_values
from .described_by import drop_descriptions, limit_to_training_text
from .quickstart_names import NAMES
from .schema import lists_of_texts, sections_of
from .settings import TrainingConfig
from .short_forms import expand
from .yaml_files import find_config, get_dotted, load_yaml, set_dotted

Config = TypeVar("Config")

Completion = Callable[[Config, Mapping[str, Any]], tuple[Config, str]]
"""From a configuration, and the nested values that a recipe and a command line give, to the configuration in which
settings that are not given suit the others, and a line on them; empty: nothing is to be said."""


def configure(schema: type[Config], argv: Sequence[str], complete: Completion) -> tuple[Config, str]:
    """Return the configuration a command line asks for, and where it comes from: a line on the recipe that it starts
    from and why, and one on what followed from the other settings, if anything did.

    Args:
        schema: the dataclass of a whole run.
        argv: without the program's name.
        complete: chooses settings that are not given.

    Raises:
        UserError: every mistake in recipe and flags.
    """
    arguments = parse(schema, argv)
    overrides = arguments.nested()

    # The recipe is the ground, without what describes a text or a model that the command line replaces.
    if arguments.config:
        name, why = arguments.config, "asked for"
    else:
        name, why = _default_recipe(schema, overrides)
    recipe = _Recipe() if name is None else _load_recipe(schema, name, overrides)

    # Flags and --set lie over it.
    values = recipe.values
    _lay_over(arguments, values)

    folder = values.get("output_dir")
    if isinstance(folder, str) and folder:  # the empty name would become this folder
        values["output_dir"] = str(user_path(folder))

    config = build(schema, values, source=recipe.source)
    config, choice = complete(config, values)
    origin = f"{recipe.title}: {why}{_without_effect(arguments, recipe)}"
    return config, "\n".join(filter(None, [origin, choice]))


def _lay_over(arguments: Arguments, values: dict[str, Any]) -> None:
    """Lay flags, then --set, over the nested `values` of a recipe, in place.

    Raises:
        UserError: a key below something that has no keys.
    """
    flags = arguments.flags
    if "training.epochs" in flags and "training.max_steps" not in flags:
        # max_steps would overrule epochs, but the flag is meant for this run and the recipe for many
        set_dotted(values, "training.max_steps", None)

    # The setting for accumulation counts forward passes, but windows with `auto`: a step is to have as many as before.
    recipe = values.get("training", {})
    is_auto = flags.get("training.batch_size") == "auto" and "training.gradient_accumulation_steps" not in flags
    if is_auto and isinstance(recipe, dict):
        windows = recipe.get("batch_size", TrainingConfig.batch_size)
        passes = recipe.get("gradient_accumulation_steps", TrainingConfig.gradient_accumulation_steps)
        # else the recipe has `auto` itself, or a mistake that `build` will name
        if isinstance(windows, int) and isinstance(passes, int):
            set_dotted(values, "training.gradient_accumulation_steps", windows * passes)

    # Several teachers take the place of the one of a recipe, and one that of its several.
    replaced = arguments.nested()
    if "teachers" in replaced:
        set_dotted(values, "teacher.name", None)
    elif (name := get_dotted(replaced, "teacher.name")) is not None:
        _choose_teacher(values, name)

    arguments.lay_over(values)


def _choose_teacher(values: dict[str, Any], name: str) -> None:
    """Leave of a recipe's several teachers the one of this name, as it is described there, for all text.

    Args:
        values: nested values of a recipe, changed in place.
    """
    teachers = values.pop("teachers", None)
    if not isinstance(teachers, list):
        return
    for teacher in teachers:
        if isinstance(teacher, dict) and teacher.get("name") == name:
            values["teachers"] = [{key: value for key, value in teacher.items() if key not in ("weight", "only_for")}]


def _other_teachers(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Return the teachers of a recipe that a command line names others in place of."""
    teachers = values.get("teachers")
    given = overrides.get("teachers") or [{"name": get_dotted(overrides, "teacher.name")}]
    # What is no list is told as a mistake later.
    if not isinstance(teachers, list) or not isinstance(given, list) or given == [{"name": None}]:
        return []

    kept = [teacher.get("name") if isinstance(teacher, dict) else teacher for teacher in given]
    names = [teacher.get("name") for teacher in teachers if isinstance(teacher, dict)]
    return [str(name) for name in names if name not in kept]


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

    other_teachers: list[str] = field(default_factory=list)
    """Teachers of the recipe in whose place the command line names others."""

    is_for_toys: bool = False
    """The recipe teaches the embedded student, and the command line names another one."""


def _load_recipe(schema: type, name: str, overrides: dict[str, Any]) -> _Recipe:
    """Load a recipe in full, without what describes a text or a model that is replaced.

    Args:
        schema: the dataclass of a whole run.
        name: of the recipe, or a path.
        overrides: what the command line sets, as nested values.

    Raises:
        UserError: there is no such recipe, or it is not YAML.
    """
    path = find_config(name)
    values = {"output_dir": f"runs/{path.stem}", **expand(load_yaml(path), lists_of_texts(schema), sections_of(schema))}
    student = get_dotted(overrides, "student.name")
    # Whatever the recipe has as a name: that it is none is told later.
    is_for_toys = get_dotted(values, "student.name") in [*NAMES] and student is not None and student not in NAMES

    # in this order: where the training text is replaced too, nothing is left to limit
    dropped = drop_descriptions(values, overrides)
    limited = limit_to_training_text(values, overrides)

    return _Recipe(
        title=f"recipe {path.name}",
        source=f"{path.name} and the command line",
        values=values,
        dropped=dropped,
        limited=limited,
        other_teachers=_other_teachers(values, overrides),
        is_for_toys=is_for_toys,
    )


def _without_effect(arguments: Arguments, recipe: _Recipe) -> str:
    """Return the end of a sentence: what a recipe or the command line says in vain, empty if nothing."""
    notes = ""

    epochs = arguments.flags.get("training.epochs")
    steps = arguments.flags.get("training.max_steps")
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
    if recipe.other_teachers:
        notes += f"; not asked, since the command line names its own teachers: {', '.join(recipe.other_teachers)}"
    if recipe.is_for_toys:
        notes += (
            "; its learning rate and curriculum are made for its own student, small and with random weights, and stay "
            "where no flag says otherwise (without --config all settings have their defaults)"
        )
    return notes


def _default_recipe(schema: type, overrides: dict[str, Any]) -> tuple[str | None, str]:
    """Return the recipe to use where none was named, and the reason. None: the defaults of every setting.

    What a command with models of its own trains on and with must not depend on the machine, so no recipe is laid under
    it, with a GPU or without.

    Args:
        schema: the dataclass of a whole run.
        overrides: what the command line sets, as nested values.

    Raises:
        UserError: mistakes in the overrides.
    """
    has_teacher = get_dotted(overrides, "teacher.name") is not None or bool(overrides.get("teachers"))
    has_student = get_dotted(overrides, "student.name") is not None
    if has_teacher or has_student:
        return None, "no --config was given, and the models are your own; every setting has its default or is given"

    reason = why_no_gpu()
    if reason is None:
        # The machine has to be asked by torch, which takes seconds to load. Mistakes are answered at once.
        check_values(schema, overrides, source="the command line")
        from ..machine.hardware import choose_device

        device = choose_device()
        reason = device.reason
        if device.value.type == "cuda":
            return "kaggle_p100", f"no --config was given and there is a GPU ({reason})"

    why = f"no --config was given and there is no GPU ({reason})"
    if get_dotted(overrides, "data.train") is not None:
        # a text of one's own, and toys that learn from it: hardly what was meant
        why += (
            "; its models are toys, the teacher has read the documentation of Python: for a student of use give "
            "--teacher and --student"
        )
    return "quickstart", why
