"""YAML files of settings: recipes, the config.yaml of a run, and dotted keys in what they hold."""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..paths import user_path
from ..run_layout import CONFIG
from .error_messages import did_you_mean

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"
"""Recipes of the project, in a checkout and in an installation."""

NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What a text can make the loader raise: dates and numbers that are none, brackets without end, bytes of no text."""


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `no` is a word, `1e-4` is a number, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        # PyYAML would silently take the last of them
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            problem = f"given twice: {', '.join(repeated)}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads `no`, `off` and `y` as booleans, and `1e-4`, which has no dot, as text.
_BOOL_TAG = "tag:yaml.org,2002:bool"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL_TAG, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    _FLOAT_TAG, re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings in a folder's config.yaml, and what follows as comments (`notes`, `environment`).

    Both are empty where there is no such file, the second also where the comments are somebody's own.

    Raises:
        UserError: the file is not YAML.
    """
    file = folder / CONFIG
    if not file.is_file():
        return {}, {}

    settings = load_yaml(file)
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    try:
        remarks = yaml.safe_load("\n".join(comments))
    except yaml.YAMLError:  # somebody's own comments
        remarks = None
    return settings, remarks if isinstance(remarks, dict) else {}


def find_config(name_or_path: str) -> Path:
    """Return the YAML file a user means: a path, or the name of a shipped recipe.

    Raises:
        UserError: there is no such file; the message lists the recipes that exist.
    """
    # a user's own file comes before a recipe of that name
    for path in (user_path(name_or_path), CONFIG_FOLDER / name_or_path):
        if path.is_file():
            return path

    recipes = {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}
    if name_or_path in recipes:
        return recipes[name_or_path]

    inside = user_path(name_or_path) / "config.yaml"
    if inside.is_file():
        raise UserError(f"--config {name_or_path}: a folder; expected a YAML file, such as {inside}")

    raise UserError(
        f"--config {name_or_path}: no such file and no such recipe.\n"
        f"  expected: a YAML file, or one of {', '.join(recipes) or '(no recipes are installed)'}"
        f"{did_you_mean(name_or_path, recipes)}"
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """Load the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        UserError: unreadable, not YAML (with line and column), or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (OSError, *NOT_YAML) as error:
        raise UserError(f"{path}: cannot be read as YAML.\n  {error}") from error

    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: got {type(values).__name__}, expected a mapping such as `training: {{seed: 1}}`")
    return values


def read_assignment(text: str) -> tuple[str, Any]:
    """Return the dotted key and the value of `a.b=value`; the value is read as YAML.

    Raises:
        UserError: no `=`, an empty key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    # keys are written like flags too: training.batch-size
    key = key.strip().replace("-", "_")
    if not equals or not all(key.split(".")):
        raise UserError(f"--set {text}: expected dotted.key=value, such as --set curriculum.kd.weight=0")
    return key, read_value(f"--set {text}", value)


def read_value(origin: str, text: str) -> Any:
    """Return a value that is written as YAML.

    Args:
        origin: the words of the command line that it is from, for the message.

    Raises:
        UserError: not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except NOT_YAML as error:
        raise UserError(f"{origin}: the value cannot be read as YAML.\n  {error}") from error


def as_yaml(values: dict[str, Any]) -> str:
    """Return settings as YAML, in the order that they have."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `a.b` in nested dicts, in place.

    Raises:
        UserError: something on the way has no keys.
    """
    *sections, last = key.split(".")
    inner = values
    for depth, section in enumerate(sections, start=1):
        inner = inner.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"{key}: {'.'.join(sections[:depth])} is {inner!r} and has no keys")
    inner[last] = value


def get_dotted(values: Any, key: str, default: Any = None) -> Any:
    """Return the value of `a.b` in nested dicts, or `default` where there is none."""
    inner = values
    for part in key.split("."):
        if not isinstance(inner, dict) or part not in inner:
            return default
        inner = inner[part]
    return inner
