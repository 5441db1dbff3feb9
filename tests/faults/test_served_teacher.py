"""Whole runs whose teacher is behind a server: into a cache and on without it, and through the end of the server."""

import json
import logging

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from tests.gloo import launch
from tests.served import PretendedServer, running
from utils.logs.records import read_metrics
from utils.run_layout import METRICS
from utils.served import http_client

KEY = "sk-very-secret-1234"
SHORT = [
    *("--max-steps", "4", "--save-every", "100", "--max-length", "48", "--top-k", "16", "--cache-top-k", "16"),
    *("--set", "evaluation.every=0", "evaluation.samples=0", "evaluation.generation=0", "evaluation.max_windows=4"),
]


@pytest.fixture
def server(place, monkeypatch):
    monkeypatch.setattr(http_client, "FIRST_DELAY", 0.02)
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    model = AutoModelForCausalLM.from_pretrained(place.teacher)
    with running(PretendedServer(model, AutoTokenizer.from_pretrained(place.teacher), key=KEY)) as started:
        yield started


def arguments(place, output, server, *more: str) -> list[str]:
    served = ["--teacher", server.address, "--teacher-tokenizer", str(place.teacher)]
    return place.arguments(output, *served, *SHORT, *more)


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / METRICS) if "terms" in record]


def weights(folder) -> dict:
    return load_file(folder / "student" / "model.safetensors")


def said(capsys) -> str:
    """Return what was printed since the last time, in one line."""
    return " ".join(capsys.readouterr().out.split())


def test_a_cache_that_a_server_filled_needs_no_server(place, tmp_path, server, capsys):
    cached = ["--cache-teacher", str(tmp_path / "cache")]
    assert train.main(arguments(place, tmp_path / "with", server, *cached)) == 0
    assert "vLLM with the model tiny" in said(capsys)
    scored = server.scored

    server.stop()
    assert train.main(arguments(place, tmp_path / "without", server, *cached)) == 0
    assert "the teacher is not loaded: all that it says is in" in said(capsys)
    assert server.scored == scored

    first, second = losses(tmp_path / "with"), losses(tmp_path / "without")
    assert len(first) == 4 and first == second
    for name, value in weights(tmp_path / "with").items():
        assert (value == weights(tmp_path / "without")[name]).all()

    # The teacher is in the report, and the key in no file.
    report = json.loads((tmp_path / "without" / "evaluation_report.json").read_text())
    assert report["student"]["bits_per_byte"] > 0 and report["teacher"]["bits_per_byte"] > 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(KEY.encode() in path.read_bytes() for path in files)


def test_a_run_whose_server_goes_away_ends_with_a_checkpoint_and_continues(place, tmp_path, server, capsys):
    patience = ["--set", "served.patience=0.3"]
    assert train.main(arguments(place, tmp_path / "whole", server, *patience)) == 0
    windows = server.scored

    # Somewhere in training, and behind the evaluation.
    def leave(number, body):
        if number > windows + 0.7 * windows:
            server.stop()
            return 500, ""
        return None

    server.fault = leave
    capsys.readouterr()
    assert train.main(arguments(place, tmp_path / "run", server, *patience)) == 1
    words = said(capsys)
    assert "Start the server again: the same command continues" in words and "does not answer" in words
    assert KEY not in words
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))

    server.fault = lambda number, body: None
    server.start()
    assert train.main(arguments(place, tmp_path / "run", server, *patience)) == 0
    assert "resumed from" in said(capsys)
    for name, value in weights(tmp_path / "whole").items():
        assert (value == weights(tmp_path / "run")[name]).all()


@pytest.mark.slow
def test_processes_that_lose_the_server_end_together_with_a_checkpoint(place, tmp_path, server):
    patience = ["--set", "served.patience=0.3", "training.gradient_accumulation_steps=2"]

    # Each process asks for some windows in every step; the first ones are those that are measured.
    def leave(number, body):
        if number > 20:
            server.stop()
            return 500, ""
        return None

    server.fault = leave
    assert launch(2, train.main, arguments(place, tmp_path / "run", server, *patience)) == [1, 1]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["curriculum.feat.weight=0.3"], "feat compare hidden states, which a server does not tell"),
        (["teacher.device=cpu"], "those of a served teacher are the server's"),
        (["teacher.tokenizer=null"], "a server does not hand out its tokenizer: give --teacher-tokenizer"),
    ],
)
def test_what_a_server_cannot_do_is_refused_at_once(place, tmp_path, server, capsys, more, message):
    assert train.main(arguments(place, tmp_path / "run", server, "--set", *more)) == 2
    assert message in said(capsys)
    assert server.scored == 0


@pytest.mark.parametrize(
    ("address", "key", "message"),
    [
        ("http://user:pw@127.0.0.1:9/v1", KEY, "with a user, a password or a query in it"),
        ("http://127.0.0.1:99999/v1", KEY, "got no address of a server"),
        (None, "two words", "in the environment variable TEACHER_API_KEY: got one with a space"),
    ],
)
def test_an_address_or_a_key_that_cannot_be_is_refused_before_the_text_is_read(
    place, tmp_path, server, monkeypatch, capsys, address, key, message
):
    monkeypatch.setenv("TEACHER_API_KEY", key)
    more = [f"teacher.name={address}"] if address else []
    assert train.main(arguments(place, tmp_path / "run", server, *more)) == 2
    words = said(capsys)
    assert message in words and "documents:" not in words and "user:pw" not in words


def test_a_server_that_is_not_there_and_one_of_another_kind_are_refused(place, tmp_path, server, capsys, caplog):
    caplog.set_level(logging.INFO)
    server.owner = "llamacpp"
    assert train.main(arguments(place, tmp_path / "run", server)) == 2
    assert "this is llama.cpp, which tells the log-probabilities of tokens that it generates" in said(capsys)
    server.stop()
    assert train.main(arguments(place, tmp_path / "run", server)) == 2
    assert "Expected a running server" in said(capsys)
