"""The page docs/settings.md, made of the table of settings."""

from collections.abc import Iterator

from .arguments import SHORT_FLAGS
from .schema import Json, Section, Setting, items_of

HEADING = """\
# All settings

Every setting of a run, with what it can be and its default. `training.seed` is written in a recipe as

```yaml
training:
  seed: 7
```

and on the command line as `--training.seed 7`; those of everyday have a short flag too, named beside them. A **ramp**,
`{points: [[0, 1], [0.5, 0.3]]}`, follows training progress from 0 to 1. `--print-config` prints what all of a command's
settings are, `--print-schema` a JSON schema with which an editor completes and checks recipes (its place is named in
the first line of those in `configs/`), and `--print-completion bash` what completes the flags of `curriculum-distill`.

Where it can mean one thing only, the short form is taken: `teacher: PATH` and `student: PATH` for their `name`,
`data: PATH` for `data.train`, `curriculum: {kd: 0.5}` for the weight of the term, one text for a list of one, commas
between the values of a list (but for names of files), and a section with nothing in it for its defaults. On the command
line a list is several words, or is in brackets: `--train-data a.txt b.txt`, `--train-data '[a.txt, b.txt]'`.
`curriculum: auto`, the default, gives no weight at all: those that are not given suit the student's beginning and
how often its text is read.

This page is generated of the settings' docstrings: `python -m utils.commands.settings` writes it."""

RANGES = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}", "exclusiveMaximum": "below {}"}
"""Key of a JSON schema -> its words."""


def page(config: type) -> str:
    """Return the page in Markdown.

    Args:
        config: the dataclass of a whole run.
    """
    parts = [HEADING]
    first_of_run = True
    for item in items_of(config):
        if isinstance(item, Section):
            parts.append(_section(item))
            continue
        if "." not in item.key and first_of_run:
            parts.append("## The run itself")
            first_of_run = False
        parts.append("\n".join(_setting(item)))
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    """Return the heading of a section, and its meaning."""
    level = "##" if "." not in section.path else "###"
    return f"{level} {section.path}\n\n{section.meaning}"


def _setting(setting: Setting) -> Iterator[str]:
    """Yield the lines on a setting: its name and flags, its values and default, its meaning."""
    flags = [f"`{flag}`" for flag, key in SHORT_FLAGS.items() if key == setting.key]
    names = ", ".join([f"**`{setting.key}`**", *flags])
    values = " or ".join(_words(form) for form in setting.forms)

    yield f"{names}  "
    yield f"{values}; default `{setting.shown_default}`  "
    yield setting.meaning


def _words(form: Json) -> str:
    """Return the values that a JSON schema admits, in words."""
    if "$ref" in form:
        return "a ramp" if form["$ref"].endswith("/Ramp") else "name or mapping"
    if "const" in form:
        return f"`{form['const']}`"
    if "enum" in form:
        return ", ".join(f"`{value}`" for value in form["enum"])
    if "examples" in form:
        return f"text such as `{form['examples'][0]}`"
    if form["type"] == "array" and "prefixItems" in form:
        return f"{len(form['prefixItems'])} of: {_words(form['prefixItems'][0])}"
    if form["type"] == "array":
        return f"list of: {_words(form['items'])}"
    if form["type"] == "object":
        return f"mapping of names to: {_words(form['additionalProperties'])}"

    kinds = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    ranges = [words.format(form[key]) for key, words in RANGES.items() if key in form]
    return " ".join([kinds[form["type"]], *ranges])
