"""A run on conversations, whose texts hold what looks like control tokens."""

import datetime
import json
import re
import shutil

import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

import train
from tests.faults.conftest import documents
from utils.files import remove_folder
from utils.teacher_cache import conversation_date

ALTERNATING = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{{ message['content'] + '\n' }}{% endfor %}"
)


def test_a_run_learns_answers_and_leaves_a_student_that_can_be_talked_with(place, tmp_path, capsys):
    rows = [{"prompt": f"Say <|endoftext|> {n}", "completion": text[:80]} for n, text in enumerate(documents(60))]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--train-data", tmp_path / "talks.jsonl", "--max-steps", 4, "--max-length", 128, "--eval-every", 0]
    assert train.main(place.arguments(tmp_path / "run", *map(str, settings))) == 0

    said = capsys.readouterr().out
    for role in ("student", "teacher"):
        assert said.count(f"{role}: no chat template") == 1

    # A narrow console shows no clock in front of the tags.
    shown = re.findall(r"^.*?(\[(?:read|learned)\] .*)$", said, re.MULTILINE)
    assert shown[0].startswith("[read]    User:\\nSay <|endoftext|> ") and shown[0].endswith("Assistant:\\n")
    answer = shown[1].removeprefix("[learned] ").removesuffix("<|endoftext|>")
    assert answer in [row["completion"] for row in rows]

    report = json.loads((tmp_path / "run" / "evaluation_report.json").read_text())
    assert report["samples"][0]["prompt"] in [row["prompt"] for row in rows]
    assert report["student"]["bytes"] == report["teacher"]["bytes"] and report["prompted"]
    for page in ("report.html", "student/README.md"):
        assert "tokenizer.apply_chat_template(messages, add_gen" in (tmp_path / "run" / page).read_text()

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "User:\nHi\n\nAssistant:\n"


@pytest.mark.parametrize("role", ["train", "eval"])
def test_a_conversation_that_a_template_refuses_is_told_with_file_and_line(place, tmp_path, capsys, role):
    """The line is the right one also behind rows that are empty or were read before."""
    shutil.copytree(place.teacher, tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.chat_template = ALTERNATING
    tokenizer.save_pretrained(tmp_path / "teacher")

    rows = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "No."}] for n in (1, 1, 2, 3)]
    for name in ("train", "eval"):
        lines = [json.dumps({"messages": row}) for row in rows]
        lines.insert(2, json.dumps({"messages": None}))
        if name == role:
            lines.append(json.dumps({"messages": [{"role": "system", "content": "Be kind"}, *rows[0]]}))
        rows = [[row[0], {"role": "assistant", "content": "Yes."}] for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    sources = ["--train-data", str(tmp_path / "train.jsonl"), "--eval-data", str(tmp_path / "eval.jsonl")]
    asked = ["--teacher", str(tmp_path / "teacher"), *sources]
    assert train.main(place.arguments(tmp_path / "run", *asked)) == 2

    said = capsys.readouterr().out
    assert f"{role}.jsonl:6: the teacher's chat template refuses a conversation of system, user, assistant" in said
    assert "roles must alternate" in said and "begins: 'Be kind Say 1" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "student").exists()


DATED = (
    "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + (eos_token if message['role'] == 'assistant' else '') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def dated(place, tmp_path) -> list[str]:
    """Arguments of a run whose student writes the date into conversations."""
    shutil.copytree(place.student, tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path / "student")
    rows = [{"prompt": f"Say {n}", "completion": text[:80]} for n, text in enumerate(documents(40))]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--student", tmp_path / "student", "--train-data", tmp_path / "talks.jsonl", "--max-length", 128]
    return [*map(str, arguments), "--max-steps", "4", "--eval-every", "0", "--set", "training.save_every=2"]


@pytest.fixture
def on_day(monkeypatch):
    """Make it another day for whoever looks at the clock."""

    def turn(day: int) -> None:
        class Date(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date(2026, 1, day)

        class Moment(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(2026, 1, day)

        monkeypatch.setattr(conversation_date, "date", Date)
        monkeypatch.setattr(chat_template_utils, "datetime", Moment)

    return turn


def test_the_same_command_goes_on_the_next_day_with_the_date_of_the_first(place, tmp_path, dated, on_day, capsys):
    on_day(30)
    assert train.main(place.arguments(tmp_path / "run", *dated)) == 0
    assert "the date: for this run it is always 2026-01-30, the day on which this run begins" in capsys.readouterr().out
    remove_folder(tmp_path / "run" / "checkpoints" / "step-00000004")

    on_day(31)
    assert train.main(place.arguments(tmp_path / "run", *dated)) == 0
    said = capsys.readouterr().out
    assert "always 2026-01-30, the day on which this run began" in said and "at step 2 of 4" in said
    read = [line for line in said.splitlines() if "[read]" in line]
    assert "Today: 30 Jan 2026\\n" in read[0], said
    exported = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert exported.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith("Today: 31 Jan")

    moved = ["--resume", str(tmp_path / "run" / "checkpoints" / "step-00000002")]
    assert train.main(place.arguments(tmp_path / "moved", *dated, *moved)) == 0
    assert "always 2026-01-30" in capsys.readouterr().out


def test_a_teacher_cache_of_yesterday_is_used_by_a_run_of_today(place, tmp_path, dated, on_day, capsys):
    cache = ["--cache-teacher", str(tmp_path / "cache")]
    on_day(30)
    assert train.main(place.arguments(tmp_path / "first", *dated, *cache)) == 0
    capsys.readouterr()

    on_day(31)
    assert train.main(place.arguments(tmp_path / "second", *dated, *cache)) == 0
    said = capsys.readouterr().out
    assert "always 2026-01-30, the day of the teacher cache" in said and "the teacher is not loaded" in said
