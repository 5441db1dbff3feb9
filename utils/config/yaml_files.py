"""YAML files of settings."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..paths import user_path
from ..run_layout import CONFIG


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a folder's config.yaml, and what follows as comments (`notes`, `environment`); {} where none.

    Raises:
        UserError: the file is not YAML.
    """
    if not (folder / CONFIG).is_file():
        return {}, {}
    lines = (folder / CONFIG).read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        told = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("# ")))
    except yaml.YAMLError:  # somebody's own comments
        told = None
    return load_yaml(folder / CONFIG), told if isinstance(told, dict) else {}


CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"


class _Loader(yaml.SafeLoader):
    """YAML as people expect it: `no` is a word, `1e-4` is a number, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"given twice: {', '.join(twice)}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""What a text can make the loader raise: dates and numbers that are none, brackets without end, bytes of no text."""


def find_config(name_or_path: str) -> Path:
    """The YAML file a user means: a path, or the name of a shipped recipe.

    Raises:
        UserError: there is no such file; the message lists the recipes that exist.
    """
    shipped = {path.stem: path for path in sorted(CONFIG_FOLDER.glob("*.yaml"))}
    for path in (user_path(name_or_path), CONFIG_FOLDER / name_or_path):
        if path.is_file():
            return path
    if name_or_path in shipped:
        return shipped[name_or_path]
    raise UserError(
        f"--config {name_or_path}: no such file and no such recipe.\n"
        f"  expected: a YAML file, or one of {', '.join(shipped) or '(no recipes are installed)'}"
        f"{_did_you_mean(name_or_path, shipped)}"
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

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


def set_dotted(values: dict[str, Any], assignment: str) -> None:
    """Apply `a.b=value` to nested dicts in place; the value is parsed as YAML.

    Raises:
        UserError: no `=`, an empty key, a value that is not YAML, or a path through something that has no keys.
    """
    key, equals, text = assignment.partition("=")
    parts = key.strip().replace("-", "_").split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {assignment}: expected dotted.key=value, such as --set curriculum.kd.weight=0")
    try:
        value = yaml.load(text, _Loader)
    except NOT_YAML as error:
        raise UserError(f"--set {assignment}: the value cannot be read as YAML.\n  {error}") from error
    for depth, part in enumerate(parts[:-1], start=1):
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {assignment}: {'.'.join(parts[:depth])} is {values!r} and has no keys")
    values[parts[-1]] = value


def get_dotted(values: Any, key: str, default: Any = None) -> Any:
    """Return the value of `a.b` in nested dicts, or `default` where there is none."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return default
        values = values[part]
    return values


def _did_you_mean(word: str, candidates: Any, prefix: str = "") -> str:
    near = difflib.get_close_matches(word, [str(c) for c in candidates], n=1, cutoff=0.6)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(candidates)}" if prefix else ""
