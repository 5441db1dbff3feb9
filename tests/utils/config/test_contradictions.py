"""Settings that change nothing are named; contradictions themselves are tested where their sections are."""

import pytest

from models.config import CurriculumConfig, Ramp, Term
from utils.commands.settings import RunConfig
from utils.config.build import build
from utils.config.contradictions import without_effect
from utils.config.settings import DataConfig, ModelConfig, StudentConfig
from utils.errors import UserError

NO_KD = {"kd": Term(0.0)}
RAMP = Ramp(((0.0, 0.2), (1.0, 1.0)))


@pytest.mark.parametrize(
    ("curriculum", "settings"),
    [
        ({}, []),
        ({"select": RAMP, "sample_weights": 0.5, "balance": "loss"}, []),
        (NO_KD, []),
        (NO_KD | {"select": RAMP}, ["curriculum.select"]),
        (NO_KD | {"sample_weights": Ramp(((0.0, 0.0), (1.0, 1.0)))}, ["curriculum.sample_weights"]),
        (NO_KD | {"balance": "gradient"}, ["curriculum.balance"]),
        (NO_KD | {"balance": "gradient", "span": Term(0.5)}, []),
    ],
)
def test_settings_that_change_nothing_are_named(curriculum, settings):
    config = RunConfig(
        teacher=ModelConfig("teacher"),
        student=StudentConfig(name="student"),
        data=DataConfig(train=["text.txt"]),
        curriculum=CurriculumConfig(**curriculum),
    )
    assert without_effect(config) == settings


@pytest.mark.parametrize("name", ["127.0.0.1:8000/v1", "localhost:8000", "gpu-box.local:18431/"])
def test_an_address_without_its_scheme_is_no_name_of_a_model(name):
    values = {"teacher": {"name": name}, "student": {"name": "student"}, "data": {"train": ["text.txt"]}}
    with pytest.raises(UserError, match=f"without http://: give --teacher http://{name}"):
        build(RunConfig, values, source="a test")
    assert build(RunConfig, values | {"teacher": {"name": "org/model:7b.gguf"}}, source="a test")
