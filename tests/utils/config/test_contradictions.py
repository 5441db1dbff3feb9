"""Settings that change nothing are named; contradictions themselves are tested where their sections are."""

import pytest

from models.config import CurriculumConfig, Ramp, Term
from utils.commands.settings import RunConfig
from utils.config.contradictions import without_effect
from utils.config.settings import DataConfig, ModelConfig, StudentConfig

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
