"""Fixtures of the models' tests: real tokenizers, loaded once."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models.text.vocabulary import VocabularyMap


@pytest.fixture(scope="session")
def real_tokenizer(real_models_dir: Path) -> Callable[[str], PreTrainedTokenizerFast]:
    """Name of a folder in REAL_MODELS_DIR/tokenizers -> tokenizer."""
    return functools.cache(lambda name: AutoTokenizer.from_pretrained(real_models_dir / "tokenizers" / name))


@pytest.fixture(scope="session")
def real_map(real_tokenizer) -> Callable[[str, str], VocabularyMap]:
    """Names of student's and teacher's tokenizer -> vocabulary map."""
    return functools.cache(lambda s, t: VocabularyMap.build(real_tokenizer(s), real_tokenizer(t)))
