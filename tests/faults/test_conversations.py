"""A run on conversations, whose texts hold what looks like control tokens."""

import json

from transformers import AutoTokenizer

import train

from .conftest import documents


def test_a_run_learns_answers_and_leaves_a_student_that_can_be_talked_with(place, tmp_path, capsys):
    rows = [{"prompt": f"Say <|endoftext|> {n}", "completion": text[:80]} for n, text in enumerate(documents(60))]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--train-data", tmp_path / "talks.jsonl", "--max-steps", 4, "--max-length", 128, "--eval-every", 0]
    assert train.main(place.arguments(tmp_path / "run", *map(str, settings))) == 0
    said = capsys.readouterr().out
    for role in ("student", "teacher"):
        assert said.count(f"{role}: no chat template") == 1
    shown = [line.split(" ", 1)[1] for line in said.splitlines() if "[read]" in line or "[learned]" in line]
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
