"""Every setting is documented, has a default that is accepted, and refuses what it cannot be."""

import ast
import inspect
import math
import re
from itertools import pairwise

import pytest

from utils.config import settings
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
    OnPolicyConfig,
    ServedConfig,
    StudentConfig,
    TrainingConfig,
)

SECTIONS = (
    ModelConfig,
    LoraConfig,
    StudentConfig,
    DataConfig,
    TrainingConfig,
    OnPolicyConfig,
    ServedConfig,
    EvaluationConfig,
    CacheConfig,
    LoggingConfig,
    HubConfig,
)


def test_every_field_is_documented():
    """A string follows each field: it is what a reader of the configuration finds."""
    nodes = ast.walk(ast.parse(inspect.getsource(settings)))
    classes = [node for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    assert len(classes) == len(SECTIONS)

    for node in classes:
        for item, following in pairwise([*node.body, None]):
            if isinstance(item, ast.AnnAssign):
                is_documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                assert is_documented, f"{node.name}.{item.target.id}"


@pytest.mark.parametrize(
    ("kind", "field", "wrong", "expected"),
    [
        (ModelConfig, "dtype", "fp16", "'float16'"),
        (ModelConfig, "allow_pickle", "no", "boolean"),
        (LoraConfig, "rank", 0, "greater than 0"),
        (OnPolicyConfig, "every", 0, "greater than 0"),
        (ServedConfig, "requests", 0, "greater than 0"),
        (ServedConfig, "key_variable", "", "not empty"),
        (OnPolicyConfig, "top_p", 1.5, "less than or equal to 1"),
        (LoraConfig, "targets", "q_proj", "list"),
        (LoraConfig, "targets", [], "at least 1 item"),
        (StudentConfig, "init", "scratch", "layers:K"),
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
    for kind in SECTIONS:
        assert build(kind, to_plain(kind()), source="defaults") == kind()
