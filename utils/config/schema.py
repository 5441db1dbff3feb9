"""The settings as data: a table of all keys, and a JSON schema for editors.

Both are made of the dataclasses of a run: names, types, ranges and defaults by pydantic, and the docstring under each
field. The flags of the command line and the page docs/settings.md are made of the table.
"""

import ast
import copy
import dataclasses
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, get_args, get_type_hints

from pydantic import TypeAdapter

from .plain import to_plain
from .short_forms import AUTOMATIC, main_key

Json = dict[str, Any]
"""A part of a JSON schema."""


class Section(NamedTuple):
    """Settings that belong together, such as `training` or `student.lora`."""

    path: str
    """Dotted; empty for those of the run itself."""

    meaning: str
    """First paragraph of its docstring."""


class Setting(NamedTuple):
    """A key of the configuration that has a value."""

    key: str
    """Dotted, such as `training.seed`."""

    meaning: str
    """Its docstring, on one line."""

    default: Any
    """A plain value."""

    forms: tuple[Json, ...]
    """Schemas of the values that it takes."""

    @property
    def section(self) -> str:
        """Return the first part of the key; settings of the run itself have none."""
        return self.key.partition(".")[0] if "." in self.key else ""

    @property
    def shown_default(self) -> str:
        """Return the default as a recipe writes it."""
        return self.default if isinstance(self.default, str) else json.dumps(self.default)

    @property
    def is_switch(self) -> bool:
        """Return whether its values are true and false."""
        return self._has_only("boolean")

    @property
    def admits_booleans(self) -> bool:
        """Return whether true and false are values of it."""
        return any(form.get("type") == "boolean" for form in self.forms)

    @property
    def is_list(self) -> bool:
        """Return whether it has several values."""
        return self._has_only("array")

    @property
    def is_list_of_texts(self) -> bool:
        """Return whether one text can stand for a list of one."""
        return self.is_list and self.forms[0].get("items", {}).get("type") == "string"

    @property
    def may_be_null(self) -> bool:
        """Return whether null is a value of it."""
        return any(form.get("type") == "null" for form in self.forms)

    def _has_only(self, kind: str) -> bool:
        return all(form.get("type") == kind for form in self.forms)


@cache
def adapter(config: type) -> TypeAdapter:
    """Return the validator of a dataclass, which takes far longer to make than to use."""
    return TypeAdapter(config)


def defaults(config: type) -> dict[str, Any]:
    """Return the default of every field of a dataclass as plain values, nested; the whole may contradict itself."""
    values = {}
    for field in dataclasses.fields(config):
        make: Any = field.default_factory
        values[field.name] = to_plain(field.default if make is dataclasses.MISSING else make())
    return values


@cache
def _schema(config: type) -> Json:
    """Return pydantic's JSON schema of a dataclass, described by the docstrings."""
    schema = adapter(config).json_schema()
    for kind in _dataclasses_in(config):
        definition = schema if kind is config else schema["$defs"][kind.__name__]
        definition["description"] = inspect.getdoc(kind)
        for name, docstring in _field_docstrings(kind).items():
            definition["properties"][name]["description"] = docstring
    return schema


def _dataclasses_in(annotation: Any) -> set[type]:
    """Return the dataclasses of an annotation, and those of their fields."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        kinds: set[type] = {annotation}
        inner = tuple(get_type_hints(annotation).values())
    else:
        kinds = set()
        inner = get_args(annotation)
    return kinds.union(*map(_dataclasses_in, inner))


def _field_docstrings(kind: type) -> dict[str, str]:
    """Return the string under each field of a dataclass. (pydantic reads them too, but not in all its versions.)"""
    definition = _classes_of(kind.__module__).get(kind.__name__)
    statements = definition.body if definition else []

    docstrings = {}
    for field, text in pairwise(statements):
        is_documented = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_documented:
            docstrings[field.target.id] = inspect.cleandoc(text.value.value)  # type: ignore[attr-defined]
    return docstrings


@cache
def _classes_of(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes in the source of a module, by name; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@cache
def items_of(config: type) -> tuple[Section | Setting, ...]:
    """Return sections and settings of a run, in the order of the dataclasses."""
    schema = _schema(config)
    return tuple(_walk(schema, schema["properties"], defaults(config)))


@cache
def settings_of(config: type) -> dict[str, Setting]:
    """Return every setting of a run by its dotted key."""
    return {item.key: item for item in items_of(config) if isinstance(item, Setting)}


@cache
def sections_of(config: type) -> dict[str, Section]:
    """Return every section of a run by its dotted path."""
    return {item.path: item for item in items_of(config) if isinstance(item, Section)}


def lists_of_texts(config: type) -> set[str]:
    """Return the keys of the settings for which one text may stand alone."""
    return {key for key, setting in settings_of(config).items() if setting.is_list_of_texts}


@cache
def keys_of(config: type) -> tuple[str, ...]:
    """Return every dotted key that a recipe may have: of sections, settings, and values that are mappings."""
    definitions = _schema(config)["$defs"]

    keys = [*sections_of(config)]
    for setting in settings_of(config).values():
        keys.append(setting.key)
        names = [form["$ref"].rpartition("/")[2] for form in setting.forms if "$ref" in form]
        keys += [f"{setting.key}.{inner}" for name in names for inner in definitions[name]["properties"]]
    return tuple(keys)


def _walk(
    schema: Json, properties: Mapping[str, Json], values: Mapping[str, Any], path: str = ""
) -> Iterator[Section | Setting]:
    """Yield sections, each before what is in it, and settings.

    Args:
        schema: of the whole configuration.
        properties: schemas of the keys of one section.
        values: their defaults.
        path: dotted path of the section, with its dot.
    """
    for name, form in properties.items():
        key, default = f"{path}{name}", values[name]
        is_section = isinstance(default, dict) and "points" not in default
        if not is_section:
            yield Setting(key, _one_line(form), default, tuple(form.get("anyOf", [form])))
            continue

        definition = _resolved(schema, form)
        yield Section(key, _one_line(form) or _one_line(definition))
        yield from _walk(schema, definition["properties"], default, f"{key}.")


def _resolved(schema: Json, form: Json) -> Json:
    """Return the definition that a schema refers to."""
    return schema["$defs"][form["$ref"].rpartition("/")[2]]


def _one_line(form: Json) -> str:
    """Return the first paragraph of a schema's description."""
    paragraph, _, _ = form.get("description", "").partition("\n\n")
    return " ".join(paragraph.split())


# ------------------------------------------------------------------------------------------ JSON schema


def json_schema(config: type) -> Json:
    """Return the JSON schema of a recipe: what pydantic says, with all defaults and the short forms."""
    schema = copy.deepcopy(_schema(config))
    _complete(schema, schema["properties"], defaults(config))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _complete(schema: Json, properties: dict[str, Json], values: Mapping[str, Any], path: str = "") -> None:
    """Add to the schemas of a section's keys, in place, what pydantic does not know.

    The arguments are those of `_walk`.
    """
    for name, form in properties.items():
        key, default = f"{path}{name}", values[name]
        is_section = isinstance(default, dict) and "points" not in default
        if not is_section:
            form.setdefault("default", default)  # pydantic calls no factory

        forms = [{"$ref": form.pop("$ref")}] if "$ref" in form else None
        if is_section:
            definition = _resolved(schema, forms[0])
            _complete(schema, definition["properties"], default, f"{key}.")
            main = main_key(key)
            forms += _forms_of(definition["properties"][main]) if main else []
            forms += [{"const": AUTOMATIC[key]}] if key in AUTOMATIC else []
            if {"type": "null"} not in forms:  # a section with nothing in it
                forms.append({"type": "null"})
        elif form.get("type") == "array" and form.get("items", {}).get("type") == "string":
            forms = [{"type": form.pop("type"), "items": form["items"]}, form.pop("items")]

        if forms is not None:
            form["anyOf"] = forms


def _forms_of(form: Json) -> list[Json]:
    """Return the schemas of the values that a schema admits, without what it says about them."""
    if "anyOf" in form:
        return form["anyOf"]
    return [{key: value for key, value in form.items() if key not in ("title", "description", "default")}]
