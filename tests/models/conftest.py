"""Fixtures of the models' tests: real tokenizers, loaded once; `slow` tests run only when asked for with -m slow."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.vocabulary import VocabularyMap


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes long; run with -m slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


@pytest.fixture(scope="session")
def real_tokenizer(real_models_dir: Path) -> Callable[[str], PreTrainedTokenizerFast]:
    """Name of a folder in REAL_MODELS_DIR/tokenizers -> tokenizer."""
    return functools.cache(lambda name: AutoTokenizer.from_pretrained(real_models_dir / "tokenizers" / name))


@pytest.fixture(scope="session")
def real_map(real_tokenizer) -> Callable[[str, str], VocabularyMap]:
    """Names of student's and teacher's tokenizer -> vocabulary map."""
    return functools.cache(lambda s, t: VocabularyMap.build(real_tokenizer(s), real_tokenizer(t)))
