"""Whole runs whose teacher is a folder of captures, which also has the text; nothing is written into it."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from tests.captures import EXACT, write_captures
from tests.faults.conftest import documents
from tests.utils.captures.test_source import contents
from utils.logs.records import read_metrics
from utils.run_layout import METRICS

SHORT = [
    *("--max-steps", "4", "--save-every", "100", "--max-length", "48", "--top-k", "16", "--cache-top-k", "16"),
    *("--set", "evaluation.every=0", "evaluation.samples=0", "evaluation.generation=0", "evaluation.max_windows=4"),
]


@pytest.fixture(scope="module")
def captured(place, tmp_path_factory) -> Path:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place.teacher), AutoTokenizer.from_pretrained(place.teacher)
    folder = tmp_path_factory.mktemp("captured") / "captures"
    return write_captures(folder, model, tokenizer, documents(40), EXACT, has_start=True)


def arguments(place, output, folder, *more: str) -> list[str]:
    teacher = ["--teacher", f"captures:{folder}", "--teacher-tokenizer", str(place.teacher)]
    return [
        "--student",
        str(place.student),
        "--output-dir",
        str(output),
        *teacher,
        *SHORT,
        "student.init=random",
        *more,
    ]


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / METRICS) if "terms" in record]


def said(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_run_learns_from_captures_and_their_text_alone(place, captured, tmp_path, capsys):
    before = contents(captured)
    assert train.main(arguments(place, tmp_path / "run", captured)) == 0
    output = said(capsys)
    assert "40 rows" in output and "documents:" in output

    report = json.loads((tmp_path / "run" / "evaluation_report.json").read_text())
    assert report["student"]["bits_per_byte"] > 0 and report["teacher"]["bits_per_byte"] > 0
    [*_, last] = [record for record in read_metrics(tmp_path / "run" / METRICS) if "terms" in record]
    assert last["terms"]["kd"]["raw"] > 0 and last["coverage"]["anchored"] > 0.3

    # From a cache that it fills, a second run has the same losses; then nothing has changed in the folder.
    cached = ["--cache-teacher", str(tmp_path / "cache")]
    for name in ("first", "second"):
        assert train.main(arguments(place, tmp_path / name, captured, *cached)) == 0
    assert losses(tmp_path / "first") == losses(tmp_path / "second")
    assert contents(captured) == before


def test_other_text_learns_where_it_was_captured(place, captured, tmp_path):
    """A text that is given beside captures is matched with them; the rest of it is learned by LM."""
    text = tmp_path / "text.jsonl"
    lines = [{"text": line} for line in [*documents(20), *documents(20, seed=9)]]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train.main(arguments(place, tmp_path / "run", captured, "--train-data", str(text))) == 0
    [*_, last] = [record for record in read_metrics(tmp_path / "run" / METRICS) if "terms" in record]
    assert 0.1 < last["coverage"]["unlisted"] < 0.9


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-k", "17"], "have 16 tokens that can be read, and the run wants 17"),
        (["--curriculum.span", "0.1"], "captures do not have the probability of a real token"),
        (["--teacher-dtype", "bfloat16"], "captures need neither"),
        (["--teacher-tokenizer", "null"], "captures do not hand out its tokenizer"),
        (
            ["--set", "data.streaming=true", "--max-steps", "4"],
            "captures of a teacher are windows already: leave out data.streaming",
        ),
        (["--curriculum.on-policy", "0.5"], "captures say nothing of the student's own text"),
    ],
)
def test_what_captures_cannot_do_is_refused(place, captured, tmp_path, capsys, more, message):
    assert train.main(arguments(place, tmp_path / "run", captured, *more)) == 2
    assert message in said(capsys)


def test_no_run_is_written_into_captures(place, captured, capsys):
    assert train.main(arguments(place, captured / "run", captured)) == 2
    assert "would write into" in said(capsys)
