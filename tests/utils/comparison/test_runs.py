"""Runs are read from their files, finished or not, and what is damaged is named and left out."""

import json
import math
from pathlib import Path

import pytest

from tests.utils.comparison.conftest import shown_of
from tests.utils.logs.test_step_logger import evaluation_at
from utils.comparison.compare import compare
from utils.comparison.runs import read_runs
from utils.errors import UserError


def test_a_report_that_the_run_has_left_behind_is_not_taken(place):
    folder = place("a", 0.5)
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write(json.dumps({**evaluation_at(1200), "bits_per_byte": 0.4}) + "\n" + json.dumps({"step": 1200})[:5])
    run = read_runs([folder, folder])[0]
    assert not run.report and run.bits("student") == 0.4 and run.bits("teacher") == 0.8


def test_a_run_that_has_logged_nothing_is_compared_as_well(place, tmp_path, capsys):
    empty = tmp_path / "runs" / "z"
    empty.mkdir(parents=True)
    (empty / "metrics.jsonl").write_text("")
    compare([str(empty), place("a", 1.0)], tmp_path)
    assert "Without an evaluation so far: z." in capsys.readouterr().out


def test_every_folder_that_no_run_left_is_told(place, tmp_path):
    good = place("a", 1.0)
    with pytest.raises(UserError) as raised:
        read_runs([good, str(tmp_path / "no"), str(tmp_path / "runs"), __file__])
    told = str(raised.value)
    assert "no: no such folder" in told and ": a file" in told
    assert "runs: no metrics.jsonl in it; runs in it: a" in told
    with pytest.raises(UserError, match="at least two"):
        read_runs([good])


def test_a_term_without_a_count_is_no_crash(place, tmp_path):
    folder = place("a", 1.0)
    Path(folder, "metrics.jsonl").write_text('{"step": 5, "terms": {"lm": {}}}\n')
    compare([folder, folder], tmp_path / "out")


REPORT, START = "evaluation_report.json", "baseline_evaluation.json"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b'"text"', b'{"run": null}', b'{"a": "\xe9"}', b"\x00\xff"]
)
def test_a_damaged_report_is_named_and_the_others_are_compared(place, tmp_path, capsys, content):
    names = [place("a", 1.0), place("b", 0.9)]
    (tmp_path / "runs" / "b" / REPORT).write_bytes(content)
    said = shown_of(names, tmp_path, capsys)
    assert f"Damaged in b, and left out: {REPORT} (" in said
    assert "a finished 1,000 1.0000" in said and "b no report 1,000 (100%) 0.9000" in said


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        (REPORT, ["run", "steps"], "1000"),
        (REPORT, ["run", "steps"], None),
        (REPORT, ["run", "seconds"], "long"),
        (REPORT, ["run", "stopped_by"], None),
        (REPORT, ["student", "bits_per_byte"], "0.9"),
        (REPORT, ["student"], [1]),
        (REPORT, ["teacher"], 3),
        (REPORT, ["retention"], [0.5]),
        (REPORT, ["retention", "gap_closed"], {}),
        (START, ["teacher"], "good"),
        (START, ["initial_student", "bits_per_byte"], []),
    ],
)
def test_a_value_of_another_type_is_named_with_its_place(place, tmp_path, capsys, file, path, value):
    names = [place("a", 1.0), place("b", 0.9)]
    changed = tmp_path / "runs" / "b" / file
    content = json.loads(changed.read_text())
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    changed.write_text(json.dumps(content))

    said = shown_of(names, tmp_path, capsys)
    assert f"Damaged in b, and left out: {file} ({'.'.join(path)} " in said
    assert "a finished" in said


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x", "bits_per_byte": 1.0}',
        '{"bits_per_byte": 1.0}',
        '{"step": 5, "bits_per_byte": "low"}',
        '{"step": 5, "bits_per_byte": 1.0, "bytes": "many"}',
        '{"step": 5, "terms": [1]}',
        '{"step": 5, "terms": {"lm": 3}}',
        '{"step": 5, "terms": {}, "progress": "half"}',
    ],
)
def test_records_that_cannot_be_used_are_counted(place, tmp_path, capsys, line):
    names = [place("a", 1.0), place("b", 0.9)]
    metrics = tmp_path / "runs" / "b" / "metrics.jsonl"
    metrics.write_bytes(line.encode() + b"\n" + metrics.read_bytes() + b"\xff\n" + b'{"step": 9, "bi')
    said = shown_of(names, tmp_path, capsys)
    assert "Damaged in b, and left out: metrics.jsonl (2 of 14 records)" in said
    assert "b finished 1,000 0.9000 -10.0%" in said


@pytest.mark.parametrize("bits", ["NaN", "Infinity", "-Infinity", "-1.0", "0.0", "0", "1e300", "1" + "0" * 400])
@pytest.mark.parametrize("place_of_run", [0, 1])
def test_bits_per_byte_that_cannot_be_are_damage(place, tmp_path, capsys, bits, place_of_run):
    names = [place("a", 1.0, finished=False), place("b", 0.9, finished=False)]
    with open(f"{names[place_of_run]}/metrics.jsonl", "a") as file:
        file.write(f'{{"step": 1001, "bits_per_byte": {bits}}}\n')

    said = shown_of(names, tmp_path, capsys)
    assert f"Damaged in {'ab'[place_of_run]}, and left out: metrics.jsonl (1 of 13 records)" in said
    assert "0.9000 -10.0%" in said


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("run", {"seconds": math.inf}),
        ("run", {"seconds": math.nan}),
        ("run", {"seconds": -1e300}),
        ("run", {"steps": 10**400}),
        ("run", {"steps": -1}),
        ("student", {"bits_per_byte": 0.0}),
        ("student", {"bits_per_byte": math.nan}),
        ("teacher", {"bits_per_byte": -1.0}),
        ("student", {"unspelt_bytes": "x", "bytes": "y"}),
        ("student", {"unspelt_bytes": 1, "bytes": 0}),
        ("student", {"unspelt_bytes": 1, "bytes": None}),
        ("retention", {"gap_closed": math.inf}),
    ],
)
def test_numbers_in_a_report_that_cannot_be_are_damage(place, tmp_path, capsys, key, change):
    names = [place("a", 1.0), place("b", 0.9)]
    file = tmp_path / "runs" / "b" / REPORT
    report = json.loads(file.read_text())
    file.write_text(json.dumps(report | {key: report[key] | change}))

    said = shown_of(names, tmp_path, capsys)
    assert f"Damaged in b, and left out: {REPORT} ({key}" in said
    assert "b no report 1,000 (100%) 0.9000" in said


@pytest.mark.parametrize(
    ("content", "damage"),
    [
        ('{"step": 1}\n{"step": 2}\n'.encode("utf-16"), "2 of 2"),
        (b"1\n2\nnull\n[]\n", "4 of 4"),
        (b'{"step": 1' + b"0" * 400 + b', "bits_per_byte": 2.0}\n', "1 of 1"),
        (b'{"step": 1' + b"0" * 5000 + b', "bits_per_byte": 2.0}\n', "1 of 1"),
        (b"[" * 100_000 + b"\n", "1 of 1"),
    ],
)
def test_metrics_that_are_none_are_named(place, tmp_path, capsys, content, damage):
    names = [place("a", 1.0), place("b", 0.9, finished=False)]
    (tmp_path / "runs" / "b" / "metrics.jsonl").write_bytes(content)
    compare(names, tmp_path / "out")
    assert f"Damaged in b, and left out: metrics.jsonl ({damage} records)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- 1", b"a: \xe9"])
def test_damaged_settings_are_named(place, tmp_path, capsys, content):
    names = [place("a", 1.0), place("b", 0.9)]
    (tmp_path / "runs" / "b" / "config.yaml").write_bytes(content)
    compare(names, tmp_path)
    assert "Damaged in b, and left out: config.yaml (" in " ".join(capsys.readouterr().out.split())
