"""The benchmark of two real models, with tiny random ones in their place."""

import json

import numpy as np
import pytest
import torch

from benchmarks import real_pair
from benchmarks.quality import merged_probabilities
from benchmarks.real import text as corpora
from benchmarks.real.arms import HEALED, WHOLE
from benchmarks.real.pair import ITSELF, TEACHER, _as_both_sides
from benchmarks.real.tables import interval
from tests.models.tiny import STORIES, byte_bpe, tiny_llama

ARGUMENTS = "--tokens 600 --size 2 --length 48 --unseen 800 --samples 4 --prompt-tokens 4 --new-tokens 6 --device cpu"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The command line of a run with a student of four layers, a teacher of two, and a little text."""
    folder = tmp_path_factory.mktemp("real")
    for name, tokenizer, layers in (("student", byte_bpe(300), 4), ("teacher", byte_bpe(340), 2)):
        tiny_llama(len(tokenizer), num_hidden_layers=layers).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    for number, file in enumerate(("tinystories-v1.txt", "soda-chat.txt")):
        stories = [f"{story} {count}" for count in range(18) for story in STORIES[number : number + 2]]
        (folder / file).write_text("<|endoftext|>".join(stories))
    paths = {"student": folder / "student", "teacher": folder / "teacher", "data": folder, "folder": folder / "made"}
    return ARGUMENTS.split() + [part for name, path in paths.items() for part in (f"--{name}", str(path))]


@pytest.fixture
def few_arms(monkeypatch):
    """An arm of each kind, with cuts that four layers allow."""
    from dataclasses import replace

    arms = [replace(arm, layers=min(arm.layers, 2)) for arm in HEALED if arm.layers in (10, WHOLE)]
    monkeypatch.setattr(real_pair, "FIRST_RATES", {2: 1e-3, WHOLE: 1e-4})
    monkeypatch.setattr(real_pair, "HEALED", arms)
    monkeypatch.setattr(real_pair, "CUTS", (2, WHOLE))
    monkeypatch.setattr(real_pair, "jobs", lambda seeds: ((arm, seed) for seed in range(seeds) for arm in arms))
    return arms


def test_every_arm_runs_and_is_not_run_again(command, few_arms, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    arguments = [*command, "--results", str(results), "--seeds", "1"]
    real_pair.main(arguments)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "arm"]
    assert {(line["layers"], line["teacher"], line["name"]) for line in trained} == {
        (arm.layers, arm.teacher or "nobody", arm.name) for arm in few_arms
    }
    assert all(0 < line["bits"]["all"] < 20 and line["written"]["samples"] == 4 for line in trained)

    before = results.read_text()
    real_pair.main(arguments)
    assert results.read_text() == before


def test_a_spent_budget_leaves_arms_out(command, few_arms, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    real_pair.main([*command, "--results", str(results), "--budget", "0"])
    assert "the budget is spent" in capsys.readouterr().out
    assert '"arm"' not in results.read_text()
