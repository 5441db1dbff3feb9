"""The benchmark of two real models, with tiny random ones in their place."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import real_pair
from benchmarks.quality import merged_probabilities
from benchmarks.real import schedules
from benchmarks.real.arms import HEALED, WHOLE, Arm, jobs, text_alone
from benchmarks.real.pair import ADAPTED, ITSELF, TEACHER, RealPair, Setting
from benchmarks.real.signals import SignalArrays
from benchmarks.real.tables import interval, tables
from benchmarks.real.text import CORPORA, read_text
from models.config import CurriculumConfig, Term
from models.distillation import Method
from tests.models.tiny import STORIES, byte_bpe, tiny_llama

SETTING = "--tokens 300 --size 2 --length 48 --unseen 800 --samples 3 --prompt-tokens 4 --new-tokens 6 --device cpu"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a student of four layers, a teacher of two, and a little text."""
    folder = tmp_path_factory.mktemp("real")
    for name, tokenizer, layers in (("student", byte_bpe(300), 4), ("teacher", byte_bpe(340), 2)):
        tiny_llama(len(tokenizer), num_hidden_layers=layers).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    for number, file in enumerate(("tinystories-v1.txt", "soda-chat.txt")):
        stories = [f"{story} {count}" for count in range(18) for story in STORIES[number : number + 2]]
        (folder / file).write_text("<|endoftext|>".join(stories))
    return folder


@pytest.fixture(scope="module")
def command(models) -> list[str]:
    """The command line of a run on these models."""
    paths = {"student": models / "student", "teacher": models / "teacher", "data": models, "folder": models / "made"}
    return SETTING.split() + [part for name, path in paths.items() for part in (f"--{name}", str(path))]


@pytest.fixture(scope="module")
def pair(models) -> RealPair:
    """The two models, with their windows."""
    setting = Setting(models / "made", torch.device("cpu"), "no", 300, 2, 48, 3, 4, 6)
    return RealPair(models / "student", models / "teacher", read_text(models, 800), setting)


@pytest.fixture
def few_arms(monkeypatch):
    """Arms with cuts that four layers allow, under one learning rate."""
    names = ("text alone", "KD", "KD, hidden states early")
    arms = [replace(arm, layers=min(arm.layers, 2)) for arm in HEALED if arm.layers != 20 and arm.name in names]
    monkeypatch.setattr(real_pair, "RATES", (1e-3,))
    monkeypatch.setattr(real_pair, "FIRST_RATES", {2: 1e-3, WHOLE: 1e-3})
    monkeypatch.setattr(real_pair, "CUTS", (2, WHOLE))
    monkeypatch.setattr(real_pair, "jobs", lambda seeds: ((arm, seed) for seed in range(seeds) for arm in arms))
    return arms


def test_every_arm_runs_and_none_twice(command, few_arms, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    arguments = [*command, "--results", str(results), "--seeds", "1"]
    real_pair.main(arguments)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "arm"]
    assert [(line["layers"], line["teacher"], line["name"]) for line in trained] == [
        (arm.layers, arm.teacher or "nobody", arm.name) for arm in few_arms
    ]
    assert all(0 < line["bits"]["all"] < 20 and 1 <= line["written"]["samples"] <= 3 for line in trained)
    assert "KD, hidden states early" in capsys.readouterr().out

    before = results.read_text()
    real_pair.main(arguments)
    assert results.read_text() == before


def test_the_whole_student_teaches_its_cuts_after_it_has_learned_from_the_text(
    command, few_arms, tmp_path, monkeypatch
):
    taught = replace(few_arms[2], teacher=ADAPTED)
    alone = text_alone(WHOLE)
    rates = [real_pair.ADAPTING.rate]
    monkeypatch.setattr(real_pair, "RATES", rates)
    monkeypatch.setattr(real_pair, "FIRST_RATES", {2: rates[0], WHOLE: rates[0]})

    def lines_of(name: str, arms: list[Arm]) -> list[dict]:
        monkeypatch.setattr(real_pair, "jobs", lambda seeds: ((arm, 0) for arm in [text_alone(2), *arms]))
        folder = tmp_path / f"made-{name}"
        file = tmp_path / f"{name}.jsonl"
        real_pair.main([*command, "--folder", str(folder), "--results", str(file), "--seeds", "1"])
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        return [line for line in lines if line.get("teacher") == ADAPTED]

    # Trained for the purpose, or an arm of its own before: the same teacher.
    (own_run,) = lines_of("own run", [taught])
    (after_arm,) = lines_of("after an arm", [alone, taught])
    assert own_run["bits"] == after_arm["bits"]

    # A folder in which it lies already trains it no more.
    trained = []
    train = real_pair.train
    monkeypatch.setattr(real_pair, "train", lambda run, *more: trained.append(run) or train(run, *more))
    (tmp_path / "own run.jsonl").unlink()
    (again,) = lines_of("own run", [taught])
    assert again["bits"] == own_run["bits"]
    assert real_pair.ADAPTING not in trained


@pytest.mark.usefixtures("few_arms")
def test_a_schedule_is_tried_beside_its_opponents_at_each_depth(command, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    arguments = [*command, "--results", str(results), "--seeds", "2", "--rate", "1e-3"]
    arguments += ["--depths", "2", str(WHOLE), "--schedules", "ever less KD"]
    real_pair.main(arguments)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"schedule"}
    expected = [arm.name for arm in schedules.arms("ever less KD", WHOLE)]
    runs = [(line["layers"], line["seed"], line["name"]) for line in lines]
    assert runs == [(layers, seed, name) for layers in (2, WHOLE) for seed in (0, 1) for name in expected]
    assert all(line["kl"] > 0 and 0 <= line["top1"] <= 1 for line in lines)

    written = capsys.readouterr().out
    assert "**ever less KD**" in written and "against its reversal" in written
    assert "2 of its layers" in written and "all of its layers" in written and "learning rate 0.001" in written
    assert "shuffled (2 of 3 seeds)" in written and "as long" not in written
    real_pair.main([*arguments, "--table"])
    assert "against its reversal" in capsys.readouterr().out


def test_schedules_that_need_more_than_a_step_are_not_offered():
    assert {"forward to reverse KL", "ever more positions"} <= set(schedules.NAMES)
    assert not {"sample weights later", "ever less KD, balanced losses"} & set(schedules.NAMES)


def test_a_spent_budget_leaves_arms_out(command, few_arms, tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    real_pair.main([*command, "--results", str(results), "--budget", "0"])
    assert "the budget is spent" in capsys.readouterr().out
    assert '"arm"' not in results.read_text()


def test_an_arm_that_fails_costs_no_other(command, few_arms, tmp_path, monkeypatch, capsys):
    train = real_pair.train

    def fails_with_a_teacher(run, *arguments):
        if run.arm.teacher == TEACHER:
            raise RuntimeError("out of something")
        return train(run, *arguments)

    monkeypatch.setattr(real_pair, "train", fails_with_a_teacher)
    results = tmp_path / "results.jsonl"
    real_pair.main([*command, "--results", str(results), "--seeds", "1"])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert {line["teacher"] for line in lines if line["kind"] == "arm"} == {"nobody", ITSELF}
    assert "failed: 2 layers, taught by the teacher, KD, seed 0" in capsys.readouterr().out


def test_both_teachers_teach_the_same_text_and_a_copy_of_its_teacher_has_nothing_to_learn(pair):
    by_teacher, by_itself = pair.windows_of_steps(TEACHER, 1), pair.windows_of_steps(ITSELF, 1)
    for ours, theirs in zip(by_teacher, by_itself, strict=True):
        assert [window["number"] for window in ours] == [window["number"] for window in theirs]

    curriculum = replace(CurriculumConfig(), lm=Term(0.0))
    distillation = replace(pair.distillations[ITSELF], method=Method(curriculum=curriculum))
    framework = distillation.framework(1, student=pair.whole, teacher=pair.teacher(ITSELF))
    batch = pair.batches(ITSELF, 1)[0]
    loss = framework(batch, 0).loss.item()
    assert batch.counts["kd"] == batch.counts["lm"] == batch.counts["depth0"]
    assert abs(loss) < 1e-5


def test_stored_answers_are_those_that_were_computed(pair, tmp_path):
    batches = pair.batches(TEACHER, 0)
    stored = SignalArrays(pair.signals[TEACHER].file, pair.signals[TEACHER].top_k)
    assert stored.windows.keys() == pair.signals[TEACHER].windows.keys()
    for batch in batches:
        ids, log_probs, *_, realised = stored.read(batch.keys)
        assert (ids == batch.signal.ids.numpy()).all() and ids.dtype == np.int64
        assert (log_probs == batch.signal.log_probs.numpy()).all()
        assert (realised == batch.signal.realised.numpy()).all()
    assert stored.read([b"none"]) is None


def test_unseen_documents_are_not_learned_and_every_corpus_has_some(tmp_path):
    for files, _ in CORPORA.values():
        for file in files:
            paragraphs = [f" = {file} {count} = \nCHAPTER {count}\n" + "word " * 400 for count in range(60)]
            separator = "<|endoftext|>" if "stories" in file or "chat" in file else "\n\n"
            (tmp_path / file).write_text(separator.join(paragraphs))
    text = read_text(tmp_path, 2500)
    assert text.unseen.keys() == CORPORA.keys()
    for documents in text.unseen.values():
        assert 1000 < sum(map(len, documents)) < 6000
        assert not any(learned.startswith(unseen) for unseen in documents for learned in text.training)
    with pytest.raises(SystemExit, match="REAL_MODELS_DIR"):
        read_text(tmp_path / "nowhere", 100)


def test_what_decides_a_default_comes_first_and_has_most_seeds():
    planned = list(jobs(3))
    assert [arm for arm, _ in planned[: len(HEALED)]] == HEALED
    assert {seed for arm, seed in planned if arm in HEALED} == {0, 1, 2}
    assert {seed for arm, seed in planned if arm not in HEALED} == {0}
    assert len(set(planned)) == len(planned)


def test_golds_merged_probabilities_are_those_of_its_definition():
    probs = torch.rand(6, 9).softmax(1)
    groups, tokens = [[0], [1, 2, 3], [4, 5]], [4, 1, 8, 0, 2, 3]
    expected = []
    for first, *later in groups:
        expected.append(probs[first] * math.prod(probs[position, tokens[position]].item() for position in later))
    torch.testing.assert_close(merged_probabilities(probs, groups, tokens), torch.stack(expected))


def test_tables_compare_seed_by_seed_under_the_best_rate_without_a_teacher():
    def arm(teacher: str, name: str, seed: int, bits: float, rate: float = 1e-3) -> dict:
        written = {
            "the teacher_bits_per_byte": 1.0,
            "itself_bits_per_byte": 1.0,
            "repeated_4grams": 0.1,
            "ended": 0.5,
            "tokens": 9,
        }
        facts = {"kind": "arm", "layers": 10, "teacher": teacher, "name": name, "seed": seed, "rate": rate}
        return facts | {"bits": {"all": bits}, "tokens": 5, "tokens_per_second": 1.0, "written": written}

    results = [arm("nobody", "text alone", seed, bits) for seed, bits in enumerate((2.0, 1.0, 2.0))]
    results += [arm("itself", "KD", seed, bits) for seed, bits in enumerate((1.0, 0.9, 1.8))]
    results.append(arm("nobody", "text alone", 0, 3.0, rate=1e-2))
    results.append(arm("itself", "KD", 0, 0.8, rate=1e-4))
    lines = tables(results).splitlines()
    assert "| itself | KD | 1.2333 ± 1.2255 | -23.33 ± 57.37 % | -50.00 to -10.00 | 3 | 1 |" in lines
    rates = [line for line in lines if line.startswith("| 10 layers") and line.count("|") == 6]
    assert rates == [
        "| 10 layers | nobody | text alone | 0.001 | 2.0000 |",
        "| 10 layers | nobody | text alone | 0.01 | 3.0000 |",
        "| 10 layers | itself | KD | 0.0001 | 0.8000 |",
        "| 10 layers | itself | KD | 0.001 | 1.0000 |",
    ]
    assert interval([1.5]) == "1.5000"
