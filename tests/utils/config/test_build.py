"""Configuration: one place for defaults, every mistake at once, and files that say what they mean."""

import math
import re
from dataclasses import dataclass, field

import pytest

from models.config import CurriculumConfig, Ramp
from utils.config import build as config
from utils.config import yaml_files
from utils.config.build import build
from utils.config.plain import to_plain
from utils.config.settings import (
    CacheConfig,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    StudentConfig,
    TrainingConfig,
)
from utils.config.yaml_files import set_dotted
from utils.errors import UserError


@dataclass(frozen=True)
class Everything:
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    output_dir: str = "runs"

    def __post_init__(self):
        if self.training.patience and self.training.save_every == 1:
            raise ValueError("patience and save_every contradict each other")


def mistakes(values) -> list[str]:
    with pytest.raises(UserError) as raised:
        build(Everything, values, source="a file")
    title, *lines = str(raised.value).splitlines()
    assert "a file" in title
    return [line.removeprefix("  - ") for line in lines]


def test_nothing_given_is_the_dataclass_defaults():
    assert build(Everything, {}, source="nothing") == Everything()


def test_what_was_built_builds_itself_again():
    values = {"curriculum": {"lm": {"weight": {"points": [[0, 1], [0.5, 0.25]], "shape": "cosine"}}}}
    built = build(Everything, values, source="values")
    assert built.curriculum.lm.weight == Ramp(points=((0.0, 1.0), (0.5, 0.25)), shape="cosine")
    assert build(Everything, to_plain(built), source="itself") == built


def test_all_mistakes_are_reported_at_once_each_with_its_path():
    lines = mistakes(
        {
            "trainig": {"seed": 3},
            "training": {"learning_rat": 1, "learning_rate": -1, "seed": "x", "betas": [0.9, 2]},
            "curriculum": {"kd": {"weight": "much"}, "lm": {"weight": {"points": [[0.5, 1], [0.5, 2]]}}},
            "data": 7,
        }
    )
    assert len(lines) == 8
    for path in (
        "trainig",
        "training.learning_rat",
        "training.learning_rate",
        "training.seed",
        "training.betas.1",
        "curriculum.kd.weight",
        "curriculum.lm.weight",
        "data",
    ):
        assert any(line.startswith(f"{path}: ") for line in lines), path


def test_a_wrong_value_hides_no_contradiction():
    lines = mistakes({"training": {"patience": 2, "save_every": 1, "seed": -1}})
    assert any("training.seed" in line for line in lines) and any("contradict" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "suggestion"),
    [
        ({"training": {"batchsize": 2}}, "did you mean training.batch_size?"),
        ({"batch_size": 2}, "did you mean training.batch_size?"),
        ({"curriculum": {"kdd": {"weight": 1}}}, "did you mean curriculum.kd?"),
        ({"curriculum": {"kd": {"weight": {"point": [[0, 1]]}}}}, "did you mean curriculum.kd.weight.points?"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(values, suggestion):
    assert any(suggestion in line for line in mistakes(values))


def test_a_message_says_what_was_got_and_what_is_expected():
    (line,) = mistakes({"training": {"mixed_precision": "fp8"}})
    assert "'fp8'" in line and "'bf16'" in line


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
    values = {}
    set_dotted(values, f"a.b-c={text}")
    assert values == {"a": {"b_c": value}}


@pytest.mark.parametrize("assignment", ["a", "=1", "a..b=1", "a.b.c=1", "a=[1", "a={x: 1, x: 2}"])
def test_an_assignment_that_means_nothing_is_refused(assignment):
    with pytest.raises(UserError, match="--set"):
        set_dotted({"a": {"b": 3}}, assignment)


def test_a_key_given_twice_is_a_mistake(tmp_path):
    (tmp_path / "twice.yaml").write_text("training: {seed: 1}\ntraining: {seed: 2}\n")
    with pytest.raises(UserError, match="given twice: training"):
        yaml_files.load_yaml(tmp_path / "twice.yaml")


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2\n", b"\xff\xfe\x00", b"a: 1\n\tb: 2"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, content):
    (tmp_path / "broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.yaml"):
        yaml_files.load_yaml(tmp_path / "broken.yaml")


def test_an_empty_file_changes_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert yaml_files.load_yaml(tmp_path / "empty.yaml") == {}


def test_a_recipe_is_found_by_name_with_or_without_suffix_and_by_path(tmp_path):
    assert yaml_files.find_config("quickstart") == yaml_files.find_config("quickstart.yaml")
    own = tmp_path / "own.yaml"
    own.write_text("{}")
    assert yaml_files.find_config(str(own)) == own
    with pytest.raises(UserError, match=r"did you mean quickstart\?"):
        yaml_files.find_config("quikstart")


def test_every_field_is_documented():
    """A string follows each field: it is what a reader of the configuration finds."""
    import ast
    import inspect

    for node in ast.walk(ast.parse(inspect.getsource(config))):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for at, item in enumerate(node.body):
                if isinstance(item, ast.AnnAssign):
                    after = node.body[at + 1] if at + 1 < len(node.body) else None
                    documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    assert documented, f"{node.name}.{item.target.id}"


@pytest.mark.parametrize(
    ("kind", "field", "wrong", "expected"),
    [
        (ModelConfig, "dtype", "fp16", "'float16'"),
        (ModelConfig, "allow_pickle", "no", "boolean"),
        (LoraConfig, "rank", 0, "greater than 0"),
        (LoraConfig, "targets", "q_proj", "list"),
        (LoraConfig, "targets", [], "at least 1 item"),
        (StudentConfig, "init", "scratch", "'random'"),
        (StudentConfig, "lora", True, "LoraConfig"),
        (StudentConfig, "lora", {"rank": 8, "rnak": 8}, "an instance of LoraConfig"),
        (DataConfig, "train", "stories.txt", "list"),
        (DataConfig, "eval_fraction", 1.0, "less than 1"),
        (DataConfig, "max_documents", 0, "greater than 0"),
        (TrainingConfig, "batch_size", "big", "'auto'"),
        (TrainingConfig, "batch_size", 0, "greater than 0"),
        (TrainingConfig, "epochs", 1.5, "integer"),
        (TrainingConfig, "learning_rate", math.nan, "finite"),
        (TrainingConfig, "max_grad_norm", math.inf, "finite"),
        (TrainingConfig, "betas", (0.9, 1.0), "less than 1"),
        (TrainingConfig, "scheduler", "constant", "'linear'"),
        (EvaluationConfig, "samples", -1, "greater than or equal to 0"),
        (EvaluationConfig, "tasks", "arc_easy", "list"),
        (CacheConfig, "storage", "zip", "'compact'"),
        (CacheConfig, "build_only", True, "--cache-teacher DIR"),
        (LoggingConfig, "track", ["print"], "'tensorboard'"),
        (HubConfig, "private", 1, "boolean"),
    ],
)
def test_a_section_made_in_a_program_is_checked(kind, field, wrong, expected):
    with pytest.raises(ValueError, match=re.escape(expected)) as raised:
        kind(**{field: wrong})
    assert field in str(raised.value)


def test_every_default_is_one_that_is_accepted():
    for kind in (ModelConfig, StudentConfig, DataConfig, TrainingConfig, EvaluationConfig, CacheConfig, LoggingConfig):
        assert build(kind, to_plain(kind()), source="defaults") == kind()


def test_numbers_that_are_not_finite_have_their_path():
    lines = mistakes({"training": {"max_grad_norm": math.inf}, "curriculum": {"kd": {"weight": math.nan}}})
    assert any(line.startswith("training.max_grad_norm: got inf, expected a finite number") for line in lines)
    assert any(line.startswith("curriculum.kd.weight: got nan, expected a finite number") for line in lines)
