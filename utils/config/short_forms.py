"""Short forms of settings, for those that can mean one thing only.

teacher: PATH                   teacher: {name: PATH}                  and so the student
teachers: [PATH, PATH]          teachers: [{name: PATH}, {name: PATH}]
data: PATH                      data: {train: [PATH]}
curriculum: {kd: 0.5}           curriculum: {kd: {weight: 0.5}}
curriculum: auto                curriculum: {}
logging: {track: wandb}         logging: {track: [wandb]}              and so every list of texts
logging: {track: "wandb,aim"}   logging: {track: [wandb, aim]}         but for names of files, which may have commas
training:                       nothing, so its defaults               and so every section with nothing in it
training: {lr: 1e-4}            training: {learning_rate: 1e-4}
"""

from collections.abc import Container, Mapping
from typing import Any

MAIN_KEYS = {
    "teacher": "name",
    "student": "name",
    "data": "train",
    "curriculum.*": "weight",
    "curriculum.on_policy": None,
    "curriculum.select": None,
    "curriculum.open_text": None,
    "curriculum.sample_weights": None,
    "curriculum.balance": None,
}
"""Path of a section (`*`: each section in it) -> the key that a value in place of its keys is meant for; None: a
setting among such sections, which has no keys."""

AUTOMATIC = {"curriculum": "auto"}
"""Section -> the word for none of its keys: all of them are chosen by the program."""

LISTS_OF_SECTIONS = {"teachers": "name"}
"""List of sections -> the key that a text in place of one of them is meant for."""

NAMES_OF_FILES = ("data.train",)
"""Lists whose values may have commas in them."""

OTHER_NAMES = {"training.lr": "training.learning_rate"}
"""Another name of a setting -> its own."""


def main_key(path: str) -> str | None:
    """Return the key of a section that its short form sets; None: it has no short form."""
    parent, _, _ = path.rpartition(".")
    return MAIN_KEYS.get(path, MAIN_KEYS.get(f"{parent}.*"))


def full_key(path: str, value: Any) -> str:
    """Return the key that is meant by a path and a value: `teacher.name` for a `teacher` that is no mapping."""
    main = main_key(path)
    # a ramp, `{points: [...]}`, is a value and not the keys of a section
    has_keys = isinstance(value, Mapping) and "points" not in value
    return f"{path}.{main}" if main and not has_keys else path


def expand(value: Any, lists: Container[str], sections: Container[str], path: str = "") -> Any:
    """Return nested values in which every short form is written in full.

    Args:
        lists: keys of settings that are lists of texts.
        sections: paths of all sections.
        path: dotted path of the value itself.
    """
    is_automatic = isinstance(value, str) and AUTOMATIC.get(path) == value
    if is_automatic or (value is None and path in sections):
        return {}
    if full_key(path, value) != path:
        value = {main_key(path): value}

    if isinstance(value, Mapping):
        prefix = f"{path}." if path else ""
        own_keys = {key: _own_key(prefix, key, value) for key in value}
        # left out and not made an empty mapping, which for a term is the weight 0
        stated = {
            key: own for key, own in own_keys.items() if value[key] is not None or f"{prefix}{own}" not in sections
        }
        return {own: expand(value[key], lists, sections, f"{prefix}{own}") for key, own in stated.items()}
    if path in LISTS_OF_SECTIONS and isinstance(value, list):
        return [{LISTS_OF_SECTIONS[path]: item} if isinstance(item, str) else item for item in value]
    if path in lists and isinstance(value, str):
        return split_list(path, value)
    return value


def split_list(path: str, text: str) -> list[str]:
    """Return the values that one text says of a list: those between its commas.

    Args:
        path: key of the list.
    """
    if path in NAMES_OF_FILES:
        return [text]
    return [value.strip() for value in text.split(",")]


def own_path(path: str) -> str:
    """Return the path of a setting by its own name."""
    return OTHER_NAMES.get(path, path)


def _own_key(prefix: str, key: Any, section: Mapping[Any, Any]) -> Any:
    """Return a key by the setting's own name; where the section has both names, the other one stays, as a mistake."""
    path = f"{prefix}{key}"
    if path not in OTHER_NAMES:
        return key
    own = own_path(path).removeprefix(prefix)
    return key if own in section else own
