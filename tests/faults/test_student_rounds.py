"""A student that learns from its own text, in the real program: with a cache, in conversations, and refused."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from models.teacher.frozen import FrozenTeacher
from tests.faults.conftest import Place, documents
from tests.gloo import launch
from tests.models.tiny import wordpiece
from utils.commands.api import distil
from utils.files import sha256_of
from utils.logs.records import is_own_text, read_metrics
from utils.machine import stop_signals
from utils.on_policy.sampling import GenerateEngine

OWN = ["--set", "curriculum.on_policy=0.5", "on_policy.every=2", "on_policy.new_tokens=8", "on_policy.prompt_tokens=6"]
SHORT = ["--max-steps", "4", "--eval-every", "0", "--log-every", "1"]
MEASURED = {"every": 0, "max_windows": 2, "samples": 0, "generation": 0}
SHORT += ["--set", *(f"evaluation.{name}={value}" for name, value in MEASURED.items())]


def run(place: Place, output: Path, *more: str) -> int:
    return train.main(place.arguments(output, *SHORT, *OWN, *more))


def report_of(output: Path) -> dict:
    return json.loads((output / "evaluation_report.json").read_text())


def test_a_cache_answers_about_text_that_the_student_has_written_before(place, tmp_path, monkeypatch, capsys):
    """The second run writes the same texts, whose answers it reads; the teacher is there for others."""
    cache = ["--cache-teacher", str(tmp_path / "cache")]
    assert run(place, tmp_path / "writing", *cache) == 0
    assert "the text that the student writes itself" in " ".join(capsys.readouterr().out.split())

    monkeypatch.setattr(FrozenTeacher, "signal", lambda *_: pytest.fail("the cache has it all"))
    assert run(place, tmp_path / "reading", *cache) == 0
    files = [tmp_path / name / "student" / "model.safetensors" for name in ("writing", "reading")]
    assert sha256_of(files[0]) == sha256_of(files[1])


@pytest.mark.parametrize("kind", ["an adapter", "a cache"])
def test_a_run_that_is_taken_up_in_the_middle_of_a_round_ends_with_the_same_student(place, tmp_path, kind, capsys):
    more = ["--student", str(place.teacher), "--set", "student.init=pretrained", "student.lora.enabled=true"]
    if kind == "a cache":
        more = ["--cache-teacher", str(tmp_path / "cache")]
    more += ["--set", "on_policy.every=4", "training.save_every=1"]
    whole = tmp_path / "whole"
    assert run(place, whole, *more) == 0

    # As a kill behind the third step leaves it.
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    shutil.rmtree(broken / "student")
    shutil.rmtree(broken / "checkpoints" / "step-00000004")
    capsys.readouterr()
    assert run(place, broken, *more) == 0
    assert "from step 3" in capsys.readouterr().out

    name = "adapter_model.safetensors" if kind == "an adapter" else "model.safetensors"
    assert sha256_of(broken / "student" / name) == sha256_of(whole / "student" / name)


def test_an_engine_handed_to_distil_writes_and_the_report_shows_texts_beside_the_teachers(place, tmp_path):
    asked = []

    def engine(student, prompts, rule, note):
        asked.append(len(prompts))
        return GenerateEngine(lambda tokens: 2)(student, prompts, rule, note)

    own = {"every": 2, "new_tokens": 8, "prompt_tokens": 6}
    settings = {"curriculum": {"on_policy": 0.5}, "on_policy": own, "evaluation": MEASURED}
    distil(config=place.recipe, output_dir=tmp_path / "run", max_steps=4, engine=engine, **settings)
    assert asked == [8, 8]
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if is_own_text(r)]
    assert [(record["step"], record["share"]) for record in records] == [(0, 0.5), (2, 0.5)]

    texts = report_of(tmp_path / "run")["own_text"]
    assert texts["step"] == 2 and texts["texts"] and all(text["prompt"] for text in texts["texts"])
    assert all(text["student"] is not None and text["teacher"] is not None for text in texts["texts"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The student's own text" in page and "share of own text" in page
    assert "The student's own text" in (tmp_path / "run" / "evaluation_report.md").read_text()


def test_a_round_that_the_hours_do_not_reach_for_is_given_up_and_the_steps_before_it_are_kept(
    place, tmp_path, monkeypatch
):
    """The limit comes while the student writes the texts of steps 2 and 3."""
    rounds = []

    def engine(student, prompts, rule, note):
        rounds.append(len(prompts))
        if len(rounds) == 2:
            monkeypatch.setattr(stop_signals, "time", SimpleNamespace(monotonic=lambda: math.inf))
        return GenerateEngine(lambda tokens: 2)(student, prompts, rule, note)

    own = {"every": 2, "new_tokens": 8, "prompt_tokens": 6}
    settings = {"curriculum": {"on_policy": 0.5}, "on_policy": own, "evaluation": MEASURED}
    distil(
        config=place.recipe,
        output_dir=tmp_path / "run",
        max_steps=4,
        engine=engine,
        **settings,
        training={"max_hours": 1.0},
    )
    assert len(rounds) == 2
    ended = report_of(tmp_path / "run")["run"]
    assert (ended["stopped_by"], ended["steps"]) == ("max_hours", 2)
    assert ended["learned_by"] == "kd 0.2 at 0 % to 0.8 at 100 %, lm 0.5, on_policy 0.5"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def signal_while_one_process_writes(arguments: list[str]) -> int:
    """To the second of the processes, in its second round."""
    write = GenerateEngine.__call__
    rounds = []

    def signalled(engine, student, prompts, rule, note):
        rounds.append(len(prompts))
        if len(rounds) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return write(engine, student, prompts, rule, note)

    GenerateEngine.__call__ = signalled
    return train.main(arguments)


def test_a_signal_to_one_process_while_it_writes_ends_them_all_and_the_same_command_goes_on(place, tmp_path):
    """A round may take minutes, longer than a batch system waits before it kills."""
    arguments = [place.arguments(tmp_path / name, *SHORT, *OWN) for name in ("signalled", "whole")]
    assert launch(2, signal_while_one_process_writes, arguments[0]) == [143, 143]
    assert [path.name for path in (tmp_path / "signalled" / "checkpoints").iterdir()] == ["step-00000002"]

    assert [launch(2, train.main, words) for words in arguments] == [[0, 0], [0, 0]]
    files = [tmp_path / name / "student" / "model.safetensors" for name in ("signalled", "whole")]
    assert sha256_of(files[0]) == sha256_of(files[1])


def test_in_conversations_the_student_writes_answers_of_its_own_to_what_was_asked(place, tmp_path):
    asked = [f"Say {number}." for number in range(40)]
    with (tmp_path / "talks.jsonl").open("w") as file:
        for question, answer in zip(asked, documents(40), strict=True):
            turns = [question, answer[:30], "More.", answer[30:60]]
            roles = ("user", "assistant") * 2
            messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")

    talks = ["--train-data", str(tmp_path / "talks.jsonl"), "--set", "curriculum.on_policy=1.0"]
    for name in ("first", "second"):
        assert run(place, tmp_path / name, *talks) == 0
    assert sha256_of(tmp_path / "first/student/model.safetensors") == sha256_of(
        tmp_path / "second/student/model.safetensors"
    )

    texts = report_of(tmp_path / "first")["own_text"]["texts"]
    for text in texts:
        assert text["prompt"].endswith("Assistant:\n") and text["prompt"].startswith("User:\nSay ")
        assert "User:" not in text["student"]

    records = read_metrics(tmp_path / "first" / "metrics.jsonl")
    rounds = [record for record in records if is_own_text(record)]
    assert [record["texts"] for record in rounds] == [16, 16] and all(0 < record["tokens"] <= 8 for record in rounds)
    steps = [record for record in records if "terms" in record]
    assert steps and all(record["terms"]["lm"]["count"] == 0 < record["terms"]["kd"]["count"] for record in steps)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (["--set", "curriculum.kd.weight=0"], "lm learns nothing from the student's own text"),
        (["--teacher-device", "sharded"], "a sharded teacher cannot answer about it"),
        (["--set", "on_policy.prompt_tokens=64"], "leaves no room in windows of data.max_length 64"),
        (["--set", "curriculum.on_policy=1.5"], "from 0 to 1"),
    ],
)
def test_contradictions_are_refused_before_anything_is_loaded(changed, words, place, tmp_path, capsys):
    assert run(place, tmp_path / "run", *changed) == 2
    assert words in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


def test_a_student_whose_tokens_do_not_spell_its_text_is_refused_before_models_are_loaded(place, tmp_path, capsys):
    student = tmp_path / "student"
    tokenizer = wordpiece()
    tokenizer.save_pretrained(student)
    config = json.loads((place.student / "config.json").read_text()) | {"vocab_size": len(tokenizer)}
    (student / "config.json").write_text(json.dumps(config))

    assert run(place, tmp_path / "run", "--student", str(student)) == 2
    assert "whose tokenizer drops spaces" in " ".join(capsys.readouterr().out.split())
