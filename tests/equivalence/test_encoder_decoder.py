"""Runs of encoder-decoder pairs from the command line: trained, resumed, evaluated and exported; or refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import train
from models import self_check
from tests.models.tiny import STORIES, bart_like, byte_bpe, t5_like, tiny_bart, tiny_llama, tiny_t5
from utils.checks import setup as preflight
from utils.commands import checks as verification
from utils.logs.records import read_metrics

ROWS = [
    {"prompt": f"Tell {n}: {story[n : n + 30]}", "completion": story[n % 7 : n % 7 + 40 + n]}
    for n in range(10)
    for story in STORIES[:3]
]


def saved(folder: Path, model: torch.nn.Module, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for name, seed, size, layers in (("teacher", 1, 200, 3), ("student", 2, 120, 2)):
        tokenizer = t5_like(size, seed - 1)
        shape = {"num_layers": layers, "num_decoder_layers": layers - 1, "dropout_rate": 0.1, "initializer_factor": 0.5}
        saved(folder / f"t5-{name}", tiny_t5(len(tokenizer), seed, **shape), tokenizer)
        tokenizer = bart_like(size + 200, seed - 1)
        saved(folder / f"bart-{name}", tiny_bart(len(tokenizer), seed, dropout=0.1, init_std=0.1), tokenizer)
    saved(folder / "llama", tiny_llama(len(byte_bpe(300))), byte_bpe(300))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "plain.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    turns = [{"role": role, "content": f"{role} speaks"} for role in ("user", "assistant", "user", "assistant")]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": turns[i:]}) + "\n" for i in (0, 2)))
    return folder


def command(place: Path, output: Path, teacher: str, student: str, text: str, *more: object) -> list[str]:
    words = ["--teacher", place / teacher, "--student", place / student, "--train-data", place / text]
    words += ["--output-dir", output, "--max-length", 96, "--batch-size", 2, "--gradient-accumulation-steps", 2]
    words += ["--mixed-precision", "no", "--set", "evaluation.new_tokens=8", "data.eval_fraction=0.2"]
    return list(map(str, [*words, "training.learning_rate=1e-2", *more]))


ROUTED = [f"curriculum.{term}.weight=0.1" for term in ("feat", "rel", "attn", "layer", "contr")]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_pair_trains_with_every_term_evaluates_and_leaves_a_student_that_loads_alone(place, tmp_path, family, capsys):
    pair = (f"{family}-teacher", f"{family}-student")
    assert train.main(command(place, tmp_path / "run", *pair, "rows.jsonl", "training.max_steps=12", *ROUTED)) == 0
    said = capsys.readouterr().out
    assert "no chat template" not in said and "no forecast" not in said

    # A narrow console shows no clock in front.
    tagged = (re.search(r"\[(read|learned)\].*", line) for line in said.splitlines())
    shown = [match[0] for match in tagged if match]
    assert shown[0].startswith("[read]    ") and "Tell" in shown[0]
    learned = re.split("<unk>|</s>", shown[1].removeprefix("[learned] "))[0]
    assert len(learned) > 5 and any(repr(row["completion"])[1:].startswith(learned) for row in ROWS)

    report = json.loads((tmp_path / "run" / "evaluation_report.json").read_text())
    assert report["student"]["bits_per_byte"] < report["initial_student"]["bits_per_byte"]
    assert report["student"]["bytes"] == report["teacher"]["bytes"]
    assert report["samples"][0]["prompt"] in [row["prompt"] for row in ROWS]
    terms = next(r["terms"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "terms" in r)
    assert {"kd", "lm", "feat", "rel", "attn", "layer", "contr"} <= terms.keys()

    folder = tmp_path / "run" / "student"
    student, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(report["samples"][0]["prompt"], return_tensors="pt").input_ids
    written = student.generate(asked, max_new_tokens=8, num_beams=1, do_sample=False, forced_eos_token_id=None)[0]
    assert family == "t5" or written[:2].tolist() == [2, 0]  # as it was trained
    assert tokenizer.decode(written, skip_special_tokens=True) == report["samples"][0]["student"]

    for page in (folder / "README.md", tmp_path / "run" / "report.html"):
        assert "AutoModelForSeq2SeqLM" in page.read_text() and "AutoModelForCausalLM" not in page.read_text()
    assert ">Prompt<" in (tmp_path / "run" / "report.html").read_text() and report["prompted"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()


def test_a_resumed_run_is_bit_for_bit_an_uninterrupted_one_with_dropout_and_a_cache(place, tmp_path):
    settings = ["training.max_steps=6", "training.save_every=2", "training.keep_checkpoints=9", ROUTED[0]]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    cached = ("t5-teacher", "t5-student", "rows.jsonl", *settings, f"cache.folder={tmp_path / 'cache'}")
    assert train.main(command(place, whole, *cached)) == 0
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("student", "step-00000004", "step-00000006"))
    assert train.main(command(place, resumed, *cached)) == 0  # the teacher's signals are those of the cache now
    expected, found = weights(whole / "student"), weights(resumed / "student")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    before = weights(place / "t5-student")
    assert not any(torch.equal(value, found[name]) for name, value in before.items() if value.ndim > 1)


@pytest.mark.parametrize(
    ("pair", "text", "told"),
    [
        (("t5-teacher", "llama"), "rows.jsonl", r"student llama and teacher t5.*Expected two of one kind"),
        (("t5-teacher", "t5-student"), "plain.jsonl", "columns 'prompt' and 'completion'. Got plain text"),
        (("t5-teacher", "t5-student"), "talks.jsonl", "conversation of user, assistant, user, assistant"),
    ],
)
def test_what_the_family_cannot_do_is_refused_in_one_sentence(place, tmp_path, capsys, pair, text, told):
    assert train.main(command(place, tmp_path / "run", *pair, text)) == 2
    assert re.search(told, " ".join(capsys.readouterr().out.split()))
    assert not (tmp_path / "run" / "student").exists()


def test_the_checks_before_a_run_pass_for_a_pair_and_see_a_wrong_start_of_the_decoder(place, tmp_path, monkeypatch):
    pair = ("t5-teacher", "t5-student", "rows.jsonl")
    setup, job = verification.own_setup(train.configure(command(place, tmp_path / "run", *pair, *ROUTED))[0])
    checks = [verification.label_shift_of_architecture(setup), verification.router_at_start(setup, job, lambda: None)]
    checks += [check(setup) for check in (preflight.models, preflight.window_length, preflight.memory, preflight.disk)]
    checks += [check(job) for check in (preflight.duplicates, preflight.leakage, preflight.coverage)]
    assert [check for check in checks if not check.passed] == []
    assert "transformers' own shift" in checks[0].value and "calibrated on 8 windows" in checks[1].value
    sound = self_check.random_batches
    monkeypatch.setattr(self_check, "random_batches", lambda *args, start: sound(*args, start=start + 5))
    assert not verification.label_shift_of_architecture(setup).passed
