"""YAML is read as people expect it, and files that are none are refused by name."""

import pytest

from utils.config.yaml_files import find_config, load_yaml, read_assignment, set_dotted
from utils.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2.5E3", 2500.0),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("[a, b]", ["a", "b"]),
        ("", None),
    ],
)
def test_yaml_reads_as_people_expect(text, value):
    key, value_read = read_assignment(f"a.b-c={text}")
    values = {}
    set_dotted(values, key, value_read)
    assert values == {"a": {"b_c": value}}


@pytest.mark.parametrize("assignment", ["a", "=1", "a..b=1", "a=[1", "a={x: 1, x: 2}"])
def test_an_assignment_that_means_nothing_is_refused(assignment):
    with pytest.raises(UserError, match="--set"):
        read_assignment(assignment)


def test_a_key_below_a_value_is_refused():
    with pytest.raises(UserError, match=r"a\.b\.c: a\.b is 3 and has no keys"):
        set_dotted({"a": {"b": 3}}, "a.b.c", 1)


def test_a_key_given_twice_is_a_mistake(tmp_path):
    (tmp_path / "twice.yaml").write_text("training: {seed: 1}\ntraining: {seed: 2}\n")
    with pytest.raises(UserError, match="given twice: training"):
        load_yaml(tmp_path / "twice.yaml")


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2\n", b"\xff\xfe\x00", b"a: 1\n\tb: 2"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, content):
    (tmp_path / "broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_yaml(tmp_path / "broken.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}


def test_a_recipe_is_found_by_name_with_or_without_suffix_and_by_path(tmp_path):
    assert find_config("quickstart") == find_config("quickstart.yaml")
    own = tmp_path / "own.yaml"
    own.write_text("{}")
    assert find_config(str(own)) == own
    with pytest.raises(UserError, match=r"did you mean quickstart\?"):
        find_config("quikstart")


def test_the_folder_of_a_run_is_answered_with_the_recipe_in_it(tmp_path):
    (tmp_path / "config.yaml").write_text("training: {seed: 7}")
    with pytest.raises(UserError, match=r"a folder; expected a YAML file, such as .*config\.yaml"):
        find_config(str(tmp_path))
