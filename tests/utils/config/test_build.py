"""A configuration is built of plain values, with every mistake reported at once."""

import math
from dataclasses import dataclass, field

import pytest

from models.config import CurriculumConfig, Ramp
from utils.commands.settings import RunConfig
from utils.config.build import build, check_values
from utils.config.plain import to_plain
from utils.config.schema import settings_of
from utils.config.settings import DataConfig, LoggingConfig, TrainingConfig
from utils.config.validation import Validated
from utils.config.yaml_files import set_dotted
from utils.errors import UserError


@dataclass(frozen=True)
class Everything(Validated):
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    output_dir: str = "runs"

    def __post_init__(self):
        super().__post_init__()
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
        ({"training": {3: 4}}, "training.3: unknown key"),
        ({"curriculum": {"kdd": {"weight": 1}}}, "did you mean curriculum.kd?"),
        ({"curriculum": {"kd": {"weight": {"point": [[0, 1]]}}}}, "did you mean curriculum.kd.weight.points?"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(values, suggestion):
    assert any(suggestion in line for line in mistakes(values))


def test_a_message_says_what_was_got_and_what_is_expected():
    (line,) = mistakes({"training": {"mixed_precision": "fp8"}})
    assert "'fp8'" in line and "'bf16'" in line


def test_numbers_that_are_not_finite_have_their_path():
    lines = mistakes({"training": {"max_grad_norm": math.inf}, "curriculum": {"kd": {"weight": math.nan}}})
    assert any(line.startswith("training.max_grad_norm: got inf, expected a finite number") for line in lines)
    assert any(line.startswith("curriculum.kd.weight: got nan, expected a finite number") for line in lines)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"training": {"seed": True}}, "training.seed: got True, expected a valid integer"),
        ({"training": {"batch_size": False}}, "training.batch_size: got False, expected a valid integer or 'auto'"),
        ({"training": {"betas": [0.9, False]}}, "training.betas.1: got False, expected a valid number"),
        ({"data": {"mixture": {"a": True}}}, "data.mixture.a: got True, expected a valid number"),
        ({"curriculum": {"select": True}}, "curriculum.select: got True, expected a valid number or a mapping"),
        ({"curriculum": {"kd": {"weight": True}}}, "curriculum.kd.weight: got True, expected a valid number"),
        ({"curriculum": {"select": {"points": [[0, 0.2], [True, 1]]}}}, "curriculum.select.points.1.0: got True"),
    ],
)
def test_true_and_false_are_no_numbers(values, line):
    assert [given for given in mistakes(values) if given.startswith(line)]


def test_wrong_ramps_are_told_in_words():
    of_number = mistakes({"training": {"seed": {"points": [[0, 8]]}}})
    assert of_number == ["training.seed: got {'points': [[0, 8]]}, expected a valid integer (it takes no ramp)"]
    of_three = mistakes({"curriculum": {"select": {"points": [[0, 0.2, 3]]}}})
    assert of_three == ["curriculum.select.points.0: got [0, 0.2, 3], expected 2 values"]


def test_no_setting_but_a_switch_takes_a_boolean():
    switches = {key for key, setting in settings_of(RunConfig).items() if setting.admits_booleans}
    assert {"data.deduplicate", "student.lora.enabled", "resume_changed"} <= switches
    for key in settings_of(RunConfig).keys() - switches:
        values: dict = {}
        set_dotted(values, key, True)
        with pytest.raises(UserError, match=rf"{key}[\w.]*: got True, expected"):
            check_values(RunConfig, values, source="a file")
