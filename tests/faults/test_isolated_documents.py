"""Whole runs whose documents do not see each other: with a teacher, from its cache, continued."""

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import BloomConfig

import train
from tests.faults.conftest import WORDS, write_jsonl


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory) -> Path:
    """Documents of which several share a window."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS.split(), k=draw.randint(4, 12))) + "." for _ in range(150)]
    return write_jsonl(tmp_path_factory.mktemp("text") / "short.jsonl", texts)


def run(place, text: Path, output: Path, *more: str) -> int:
    """Do a run with isolated documents."""
    terms = ["curriculum.feat.weight=0.2", "curriculum.attn.weight=0.1", "curriculum.contr.weight=0.1"]
    settings = ["data.isolate_documents=true", "evaluation.every=0", "evaluation.max_windows=4", *terms]
    words = ["--train-data", str(text), "--max-steps", "3", "--save-every", "2", "--set", *settings, *more]
    return train.main(place.arguments(output, *words))


def weights_of(output: Path) -> dict:
    return load_file(output / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(place, short_texts, tmp_path_factory):
    """Folder of a run in one go."""
    folder = tmp_path_factory.mktemp("run") / "finished"
    assert run(place, short_texts, folder) == 0
    return folder


def test_the_log_says_how_documents_are_read(finished):
    log = " ".join((finished / "train.log").read_text().split())
    assert "attention of the student: SDPA with a block mask" in log
    assert "attention of the teacher: sdpa with a block mask: flash kernels need a model on one GPU" in log


def test_a_run_is_continued_bit_for_bit(place, short_texts, finished, tmp_path):
    folder = tmp_path / "continued"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "student")
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: path.name)
    shutil.rmtree(newest)

    assert run(place, short_texts, folder) == 0
    expected = weights_of(finished)
    assert all((value == expected[name]).all() for name, value in weights_of(folder).items())

    # Documents that see each other are another run.
    assert run(place, short_texts, folder, "data.isolate_documents=false") == 2


def test_a_cache_serves_isolated_documents_alone(place, short_texts, tmp_path, capsys):
    settings = ["curriculum.feat.weight=0", "curriculum.attn.weight=0", "curriculum.contr.weight=0"]
    settings.append(f"cache.folder={tmp_path / 'cache'}")
    assert run(place, short_texts, tmp_path / "first", *settings) == 0
    assert run(place, short_texts, tmp_path / "second", *settings) == 0
    first, second = weights_of(tmp_path / "first"), weights_of(tmp_path / "second")
    assert all((second[name] == first[name]).all() for name in first)
    assert "the teacher is not loaded" in (tmp_path / "second" / "train.log").read_text()

    capsys.readouterr()
    assert run(place, short_texts, tmp_path / "third", *settings, "data.isolate_documents=false") == 2
    assert "cache" in capsys.readouterr().out


def test_a_student_without_positions_is_refused_with_what_to_do(place, short_texts, tmp_path, capsys):
    folder = tmp_path / "bloom"
    shutil.copytree(place.student, folder)
    config = json.loads((place.student / "config.json").read_text())
    BloomConfig(vocab_size=config["vocab_size"], hidden_size=16, n_head=2, n_layer=1).save_pretrained(folder)

    assert run(place, short_texts, tmp_path / "run", f"student.name={folder}") == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "data.isolate_documents: the student (BloomForCausalLM, bloom)" in said
    assert "leave data.isolate_documents at false" in said
