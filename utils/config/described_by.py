"""Settings that describe a text or a model, and are dropped when a command line replaces that text or model."""

from typing import Any, get_args

from .error_messages import shown
from .plain import to_plain
from .settings import DataConfig, HowTextIsRead, ModelConfig, StudentConfig
from .yaml_files import get_dotted

DESCRIBED_BY = {
    "data.train": (
        "data.eval",
        "data.tokenizer",
        "data.split",
        "data.text_column",
        "data.messages_column",
        "data.prompt_column",
        "data.completion_column",
        "data.document_separator",
        "data.document_start",
        "data.max_documents",
        "data.train_only",
    ),
    "teacher.name": ("teacher.tokenizer", "teacher.model", "teacher.allow_pickle"),
    "student.name": ("student.tokenizer", "student.allow_pickle", "student.lora.targets"),
}
"""Setting that names a text or a model -> settings that say how that one is read. They go with it: where a command line
replaces the name that a recipe has, they are no longer those of the recipe. The way of learning stays: from random
weights or trained ones, what of a conversation, the share that is held out, lengths, precision, the rank of an
adapter."""

_ABSENT = object()
"""Mark of a key that nested values lack; null is a value."""


def drop_descriptions(recipe: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Remove from a recipe what describes a text or a model that is replaced; see `DESCRIBED_BY`.

    Args:
        recipe: nested values, changed in place.
        overrides: nested values that are laid over it.

    Returns:
        `key value` of each setting that was not the default, and that is not set anew.
    """
    defaults = to_plain({"data": DataConfig(), "teacher": ModelConfig(), "student": StudentConfig()})

    dropped = []
    for name, descriptions in DESCRIBED_BY.items():
        if not _is_replaced(get_dotted(recipe, name), get_dotted(overrides, name)):
            continue

        for key in descriptions:
            path, _, last = key.rpartition(".")
            section = get_dotted(recipe, path)
            if not isinstance(section, dict) or last not in section:
                continue

            value = section.pop(last)
            # nobody misses a default, or what the same command line says again
            is_default = value == get_dotted(defaults, key)
            if not is_default and not _has(overrides, key):
                dropped.append(f"{key} {shown(value)}")
    return dropped


def limit_to_training_text(recipe: dict[str, Any], overrides: dict[str, Any]) -> list[str]:
    """Keep what a recipe says of its text away from an evaluation text that is replaced; see `DataConfig.train_only`.

    Call it after `drop_descriptions`, which leaves nothing to limit where the training text is replaced too.

    Args:
        recipe: nested values, changed in place.
        overrides: nested values that are laid over it.

    Returns:
        `key value` of each setting that the evaluation text is read without.
    """
    section = recipe.get("data")
    if not isinstance(section, dict):
        return []
    if not _is_replaced(section.get("eval"), get_dotted(overrides, "data.eval")):
        return []

    defaults = to_plain(DataConfig())
    limited = []
    for name in get_args(HowTextIsRead):
        is_default = section.get(name, defaults[name]) == defaults[name]
        # what the command line itself says of a column holds for both texts
        if not is_default and not _has(overrides, f"data.{name}"):
            limited.append(name)

    section["train_only"] = limited
    return [f"data.{name} {shown(section[name])}" for name in limited]


def _is_replaced(before: Any, now: Any) -> bool:
    """Return whether the name of a text or a model is another one now."""
    if now is None:
        return False
    return before != now


def _has(values: dict[str, Any], key: str) -> bool:
    """Return whether nested values have a dotted key."""
    return get_dotted(values, key, default=_ABSENT) is not _ABSENT
