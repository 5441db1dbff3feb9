"""Input of any kind in a recipe, a command line or a data file is understood, or refused in plain words.

A few hundred generated cases in every test run, 12,000 with -m slow.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from models.text.vocabulary import VocabularyMap
from tests.models.text.test_alignment import STRINGS, TOYS, check_pair
from utils.config.arguments import SHORT_FLAGS
from utils.config.plain import to_plain
from utils.config.settings import DataConfig
from utils.data.documents import load_documents
from utils.errors import UserError


def both(full: int, check: Callable, **strategies: st.SearchStrategy) -> tuple[Callable, Callable]:
    """The same property for a quick test and, with so many cases, for a slow one."""
    quick = settings(max_examples=100)(given(**strategies)(check))
    slow = settings(max_examples=full)(given(**strategies)(check))
    return quick, pytest.mark.slow(pytest.mark.timeout(3600)(slow))


def understood_or_refused(action: Callable[[], Any]) -> None:
    """Any other exception than a `UserError` fails the test; so does one that says nothing, or a Python object."""
    try:
        action()
    except UserError as error:
        said = str(error)
        assert len(said.split()) > 2 and "Traceback" not in said and "object at 0x" not in said and "<class" not in said


# --------------------------------------------------------------------------------------- configuration


PAIR = ["--teacher", "t", "--student", "s", "--train-data", "d.txt"]
DEFAULTS = to_plain(train.configure(["--config", "quickstart", *PAIR])[0])


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "no", "1e-4", "-1", "0", "true", "null", "[1", "{points: [[0, 1]]}", "kd"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
RAMPS = st.fixed_dictionaries({"points": st.lists(st.lists(SCALARS, max_size=3), max_size=3) | SCALARS})


def recipes(tree: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Nested mappings with mostly known keys and mostly their own values, and some that make no sense."""
    pairs = []
    for key, value in tree.items():
        inner = recipes(value) if isinstance(value, dict) else st.just(value)
        keys = st.sampled_from([*[key] * 9, key.upper(), key[:-1], f"{key}s"])
        pairs.append(st.tuples(keys, st.one_of(inner, inner, inner, VALUES | RAMPS)))
    return st.lists(st.one_of(pairs), max_size=5).map(dict)


def check_recipe(tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
    understood_or_refused(lambda: train.configure(["--config", str(file), *PAIR]))


RECIPES = recipes(DEFAULTS) | recipes(DEFAULTS) | VALUES | st.text(st.characters(codec="utf-8"), max_size=60)
test_any_recipe, test_any_recipe_in_full = both(3000, check_recipe, recipe=RECIPES)


def check_words(words):
    understood_or_refused(lambda: train.configure(["--config", "quickstart", *words]))


FLAGS = [
    *SHORT_FLAGS,
    "--data.deduplicate",
    "--curriculum.kd",
    "--training.betas",
    "--set",
    "--config",
    "--no-resume",
    "-x",
]
KEYS = [
    "training.seed",
    "curriculum.kd.weight",
    "loss.temperature",
    "data.train",
    "router",
    "a.b",
    ".",
    "training.seed.x",
]
ASSIGNMENTS = st.tuples(st.sampled_from(KEYS), SCALARS | st.text(max_size=12)).map(lambda pair: f"{pair[0]}={pair[1]}")
WORDS = st.lists(st.sampled_from(FLAGS) | ASSIGNMENTS | SCALARS.map(str) | st.text(max_size=8), max_size=6)
test_any_command_line, test_any_command_line_in_full = both(2000, check_words, words=WORDS)


# ------------------------------------------------------------------------------------------ data files


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "title", ""]) | st.text(max_size=3), inner, max_size=3)
    ),
)
LINES = st.lists((JSON | st.fixed_dictionaries({"text": JSON})).map(json.dumps) | st.text(max_size=30), max_size=6)
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), min_size=2, max_size=6)
CONTENT = (
    st.binary(max_size=80)
    | TEXTS.map(lambda texts: "\n".join(json.dumps({"text": text}) for text in texts).encode())
    | TEXTS.map(lambda texts: "\n\n".join(texts).encode())
    | TEXTS.map(lambda texts: json.dumps([{"text": text} for text in texts]).encode())
    | LINES.map("\n".join).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.lists(st.lists(st.sampled_from(["text", "a", '"', "b,c", "", "\x00", "\r"]), max_size=3), max_size=4).map(
        lambda rows: "\n".join(map(",".join, rows)).encode()
    )
    | st.tuples(st.sampled_from([b"PAR1", b"ARROW1\0\0", b"\xff\xfe", b"\xef\xbb\xbf"]), st.binary(max_size=40)).map(
        lambda pair: pair[0] + pair[1] + pair[0]
    )
)


def check_data(tmp_path, content, suffix, options):
    file = tmp_path / f"data{suffix}"
    file.write_bytes(content)
    corpora = []
    understood_or_refused(lambda: corpora.append(load_documents(DataConfig(train=[str(file)], **options))))
    for corpus in corpora:
        assert all(text.strip() for text in corpus.train + corpus.eval) and corpus.train and corpus.eval


SUFFIXES = st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".bin", ""])
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "document_separator": st.text(max_size=3),
        "document_start": st.text(max_size=3),
        "text_column": st.text(),
    },
)
test_any_data_file, test_any_data_file_in_full = both(
    4000, check_data, content=CONTENT, suffix=SUFFIXES, options=OPTIONS
)


# ------------------------------------------------------------------------------------------- alignment


MAPS: dict[tuple[str, str], VocabularyMap] = {}


def check_alignment(student, teacher, texts):
    tokenizers = TOYS[student](), TOYS[teacher]()
    if (student, teacher) not in MAPS:
        MAPS[student, teacher] = VocabularyMap.build(*tokenizers)
    check_pair(tokenizers, MAPS[student, teacher], texts, max_length=32)


NAMES = st.sampled_from(sorted(TOYS))
test_any_text, test_any_text_in_full = both(
    3000, check_alignment, student=NAMES, teacher=NAMES, texts=st.lists(STRINGS, min_size=1, max_size=3)
)
