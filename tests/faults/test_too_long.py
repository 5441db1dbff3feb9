"""Text that does not fit into a window is told as too long: by how much, which row comes nearest, and the flag."""

import json
import re
from pathlib import Path

import pytest

import train
from models import distillation
from tests.faults.conftest import Place, documents
from utils.commands.run import method_of
from utils.errors import UserError
from utils.parallel.accelerator import build_accelerator
from utils.run.prepare import Job
from utils.run.prepare import prepare as prepare_job

WINDOW = 64


def chat(prompt: str, answer: str, system: str = "") -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + messages}


def pair(prompt: str, answer: str) -> dict:
    return {"prompt": prompt, "completion": answer}


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def long_text(size: int) -> str:
    return " ".join(documents(1, seed=size)[0].split() * 9)[:size]


def prepare(place: Place, output: Path, *words: object, window: int = WINDOW) -> Job:
    asked = place.arguments(output, *map(str, words), "--max-length", str(window))
    config, _ = train.configure(asked)
    return prepare_job(config, method_of(config), build_accelerator("no", cpu=True))


SIZES = [400, 350, 130, 300, 380, 420, 360, 330]
"""Characters of prompts, all longer than a window; the shortest is in line 3."""
TALKS = {
    "system": [chat(f"Say {n}.", f"No {n}.", system=long_text(size)) for n, size in enumerate(SIZES)],
    "prompt": [chat(f"{long_text(size)} {n}", f"No {n}.") for n, size in enumerate(SIZES)],
    "pair": [pair(f"{long_text(size)} {n}", f"No {n}.") for n, size in enumerate(SIZES)],
}


@pytest.mark.parametrize("kind", TALKS)
def test_prompts_that_are_all_longer_than_a_window_are_told_with_the_shortest(place, tmp_path, kind):
    text = write(tmp_path / "talks.jsonl", TALKS[kind])
    held_out = write(tmp_path / "held_out.jsonl", [pair("Say.", "Yes.")])
    words = ["--train-data", text, "--eval-data", held_out]
    with pytest.raises(UserError) as refused:
        prepare(place, tmp_path / "run", *words)

    message = str(refused.value)
    assert message.startswith(f"{text}:3: longer than a window, and it is the shortest of 8 training documents")
    assert f"a window holds {WINDOW}" in message and "too short" not in message
    needed = int(re.search(r"Raise --max-length to (\d+)", message)[1])
    assert WINDOW < needed <= 128

    with pytest.raises(UserError, match=f"{needed} tokens are needed"):
        prepare(place, tmp_path / "run", *words, window=needed - 1)
    job = prepare(place, tmp_path / "run", *words, window=needed)  # with what was advised something is learned
    assert sum(job.windows["bytes"][:]) > 0


def test_held_out_prompts_that_are_longer_than_a_window_are_told_as_such(place, tmp_path):
    text = write(tmp_path / "talks.jsonl", [pair(f"Say {n}.", f"No {n}.") for n in range(9)])
    held_out = write(tmp_path / "held_out.jsonl", TALKS["pair"])
    with pytest.raises(UserError, match=r"held_out\.jsonl:3: longer than a window.* shortest of 8 held-out documents"):
        prepare(place, tmp_path / "run", "--train-data", text, "--eval-data", held_out)


def test_some_that_are_longer_than_a_window_are_counted_and_the_shortest_is_named(place, tmp_path, caplog):
    rows = [pair(f"Say {n}.", f"No {n}.") for n in range(30)] + TALKS["pair"]
    text = write(tmp_path / "talks.jsonl", rows)
    held_out = write(tmp_path / "held_out.jsonl", [pair("Say.", "Yes.")])
    prepare(place, tmp_path / "run", "--train-data", text, "--eval-data", held_out)
    assert "nothing is learned of 8 of 38 training documents, which are longer than a window" in caplog.text
    assert f"the shortest of them is {text}:33: " in caplog.text and "Raise --max-length to" in caplog.text


def test_answers_that_lose_their_end_are_not_called_missing(place, tmp_path, caplog):
    text = write(tmp_path / "talks.jsonl", [pair(f"Say {n}.", f"{n} {long_text(600)}") for n in range(9)])
    prepare(place, tmp_path / "run", "--train-data", text)
    assert "are left out, because they do not fit into a window" in caplog.text
    assert "nothing is learned of" not in caplog.text


def test_texts_that_are_too_short_are_told_as_too_short(place, tmp_path, monkeypatch):
    text = write(tmp_path / "talks.jsonl", [pair(f"Say {n}.", f"No {n}.") for n in range(9)])
    monkeypatch.setattr(distillation, "make_encoder", lambda *_, **__: EmptyEncoder())
    with pytest.raises(UserError, match=r"None of \d training documents has anything to learn: they are too short"):
        prepare(place, tmp_path / "run", "--train-data", text)


class EmptyEncoder:
    """Finds nothing to learn in anything."""

    fingerprint = "empty"

    def windows(self, texts: list[str], documents: list[str]) -> list[dict]:
        return []

    def least_length(self, text: str) -> None:
        return None

    def notes(self, texts: list[str]) -> list[str]:
        return []
