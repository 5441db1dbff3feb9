"""The settings as data: the table of all keys, the JSON schema for editors, and the page made of them."""

import json
from pathlib import Path

import pytest
import yaml

from utils.commands import settings as run_config
from utils.commands.settings import RunConfig
from utils.config.build import build
from utils.config.schema import json_schema, keys_of, lists_of_texts, sections_of, settings_of
from utils.config.short_forms import expand
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

SHORT = {
    "teacher": "some/teacher",
    "student": "some/student",
    "data": "text.txt",
    "curriculum": {"kd": 0.5, "feat": {"points": [[0, 0], [1, 0.5]]}},
    "logging": {"track": "wandb"},
}
"""A recipe of short forms."""


def schema_errors(recipe: dict) -> list[str]:
    """Return what an editor would underline."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: it comes with nbformat")
    validator = jsonschema.Draft202012Validator(json_schema(RunConfig))
    return [error.message for error in validator.iter_errors(recipe)]


@pytest.mark.parametrize("file", run_config.generated_files(), ids=lambda file: file.name)
def test_generated_files_are_those_of_these_settings(file):
    read = json.loads if file.suffix == ".json" else str
    expected = read(run_config.generated_files()[file])
    assert read(file.read_text(encoding="utf-8")) == expected, (
        f"{file.name} is old: python -m utils.commands.settings writes it"
    )


def test_every_setting_is_on_the_page_with_its_default_and_in_the_schema():
    files = {file.name: text for file, text in run_config.generated_files().items()}
    schema = json.loads(files["schema.json"])
    assert len(settings_of(RunConfig)) > 90

    for key, setting in settings_of(RunConfig).items():
        assert f"**`{key}`**" in files["settings.md"], key
        assert setting.meaning and setting.meaning in files["settings.md"], key

        properties = schema["properties"]
        *sections, last = key.split(".")
        for section in sections:
            reference = properties[section].get("$ref") or properties[section]["anyOf"][0]["$ref"]
            properties = schema["$defs"][reference.rpartition("/")[2]]["properties"]
        assert properties[last]["description"] and "default" in properties[last], key


def test_every_default_is_that_of_a_recipe_that_says_nothing_else():
    minimal = {"student": {"name": "s"}, "data": {"train": ["t"]}, "curriculum": {"kd": {"weight": 0}}}
    config = build(RunConfig, minimal, source="test")
    for key, setting in settings_of(RunConfig).items():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if key not in ("student.name", "data.train", "curriculum.kd.weight"):
            assert value == (tuple(setting.default) if isinstance(value, tuple) else setting.default), key


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_the_schema_and_fulfils_it(recipe):
    text = recipe.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert schema_errors(yaml.safe_load(text.replace("e-", ".0e-"))) == []  # PyYAML reads 1e-4 as text


def test_the_schema_admits_short_forms_and_refuses_what_the_program_refuses():
    assert schema_errors(SHORT) == []
    assert schema_errors({"training": None, "curriculum": {"kd": None}, "teacher": None}) == []
    for wrong in (
        {"training": {"batchsize": 2}},
        {"training": {"seed": -1}},
        {"teacher": 3},
        {"loss": {"divergence": "kl"}},
        {"curriculum": {"kd": {"points": [[0]]}}},
        {"trainig": {}},
    ):
        assert schema_errors(wrong), wrong
        with pytest.raises(UserError):
            build(RunConfig, expand(wrong, lists_of_texts(RunConfig), sections_of(RunConfig)), source="test")


def test_short_forms_are_written_in_full():
    assert expand(SHORT, lists_of_texts(RunConfig), sections_of(RunConfig)) == {
        "teacher": {"name": "some/teacher"},
        "student": {"name": "some/student"},
        "data": {"train": ["text.txt"]},
        "curriculum": {"kd": {"weight": 0.5}, "feat": {"weight": {"points": [[0, 0], [1, 0.5]]}}},
        "logging": {"track": ["wandb"]},
    }


def test_a_section_with_nothing_in_it_has_its_defaults():
    empty = yaml.safe_load("training:\ncurriculum:\n  kd:\n  lm: 0.5\nstudent:\n  lora:\n")
    full = expand(empty, lists_of_texts(RunConfig), sections_of(RunConfig))
    assert full == {"curriculum": {"lm": {"weight": 0.5}}, "student": {}}


def test_commas_part_a_list_but_not_the_name_of_a_file():
    short = {"evaluation": {"tasks": "piqa, arc_easy"}, "data": "one,two.txt"}
    assert expand(short, lists_of_texts(RunConfig), sections_of(RunConfig)) == {
        "evaluation": {"tasks": ["piqa", "arc_easy"]},
        "data": {"train": ["one,two.txt"]},
    }


def test_what_is_written_in_full_stays_as_it_is():
    full = expand(SHORT, lists_of_texts(RunConfig), sections_of(RunConfig))
    assert expand(full, lists_of_texts(RunConfig), sections_of(RunConfig)) == full


def test_keys_are_those_of_sections_settings_and_ramps():
    assert {"curriculum", "curriculum.kd", "curriculum.kd.weight", "curriculum.kd.weight.points"} <= {
        *keys_of(RunConfig)
    }


def test_a_shell_completes_flags_and_their_values():
    shtab = pytest.importorskip("shtab", reason="shtab is not installed: pip install -e .[completion]")
    from utils.config.arguments import completion

    assert "bash" in shtab.SUPPORTED_SHELLS
    script = completion(RunConfig, "bash")
    assert "--training.weight-decay" in script and "bfloat16" in script and "curriculum-distill" in script
