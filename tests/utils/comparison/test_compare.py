"""The command shows figures, curves and what does not compare, whatever runs are called."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import train
from tests.utils.comparison.conftest import shown_of
from tests.utils.report.test_report import scores
from utils.commands import run as run_command
from utils.comparison.compare import PICTURE, compare
from utils.comparison.runs import read_runs
from utils.comparison.seeds import over_seeds
from utils.comparison.tables import result_table
from utils.errors import UserError


def test_the_table_has_figures_states_and_changes(place, tmp_path, capsys):
    names = [place("a", 1.0), place("b", 0.9), place("c", 1.1, step=400, finished=False)]
    compare(names, tmp_path / "out")
    shown = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.split()[:1] in (["a"], ["b"], ["c"])
    }
    assert rows["a"] == ["finished", "1,000", "1.0000", "0.8000", "90.0%", "1:08:20"]
    assert rows["b"] == ["finished", "1,000", "0.9000", "-10.0%", "0.8000", "90.0%", "1:08:20"]
    assert rows["c"] == ["unfinished", "400", "(40%)", "1.7000", "+70.0%", "0.8000", "-", "-"]
    assert max(map(len, shown.splitlines()[:8])) <= 80
    assert f"picture: {tmp_path / 'out' / PICTURE}" in shown
    picture = imread(tmp_path / "out" / PICTURE)
    assert picture.shape[1] > 1200 and picture[..., :3].std() > 0.02


def test_the_picture_is_over_steps_and_over_tokens_and_marks_what_is_unfinished(place, tmp_path, drawn):
    compare([place("a", 1.0), place("b", 1.0, step=500, finished=False)], tmp_path)
    steps, tokens = drawn[0].axes
    a, b = (line for line in steps.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert list(a.get_xdata()) == [0, 1000] and list(b.get_xdata()) == [0, 500] and "(unfinished)" in b.get_label()
    assert list(tokens.get_lines()[0].get_xdata()) == [0, 4096 * 1000]
    assert not steps.texts and legend_of(drawn[0])[-1] == "teacher  0.800"


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_each_teachers_line_tells_whose_it_is(place, tmp_path, drawn):
    folders = [place(name, 1.0) for name in "abc"]
    report = tmp_path / "runs" / "b" / "evaluation_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"teacher": scores(0.6, 9)}))
    compare(folders, tmp_path)
    assert legend_of(drawn[0])[-2:] == ["teacher of a, c  0.800", "teacher of b  0.600"]


def test_many_runs_with_long_names_and_paths_fit_80_columns(place, tmp_path, capsys):
    folder = "/home/somebody/a/very/long/path/to/some/models/that/nobody/would/like/to/read"
    names = []
    for number in range(9):
        settings = {"training": {"seed": number, "learning_rate": 1e-4 * (number % 3 + 1)}}
        settings["teacher"] = {"name": f"{folder}/teacher-{number % 2}-of-quite-a-long-name"}
        names.append(place(f"smollm-from-gemma-lr{number % 3}-seed{number}", 1.0 + number / 100, settings=settings))
    compare(names, tmp_path / "out")
    shown = capsys.readouterr().out
    tables = shown[: shown.index("picture:")]
    assert max(map(len, tables.splitlines())) <= 80 and "somebody" not in tables and "…/teacher-0" in tables
    rows = [line for line in tables.splitlines() if line.strip().startswith("smollm-from-gemma-lr0-seed0 ")]
    assert rows and rows[0].split()[1:] == ["1,000", "1.0000", "90.0%", "1:08:20"]


def test_a_student_that_got_worse_has_closed_no_share(place, tmp_path, capsys):
    names = [place("a", 1.0), place("b", 0.9)]
    report = Path(names[0], "evaluation_report.json")
    report.write_text(json.dumps(json.loads(report.read_text()) | {"retention": {"gap_closed": -0.2}}))
    compare(names, tmp_path / "out")
    assert "a finished 1,000 1.0000 0.8000 worse" in " ".join(capsys.readouterr().out.split())


def test_what_makes_figures_incomparable_is_said(place, tmp_path, capsys):
    said = shown_of([place("a", 1.0), place("b", 1.0, size=5000)], tmp_path, capsys)
    assert "measured on different text (bytes: a 4,000, b 5,000)" in said and "unknown settings: a, b" in said


def test_on_different_texts_no_run_is_better_than_another(place):
    same, other = [place("a", 1.0), place("b", 0.9)], place("c", 0.5, size=5000)

    def best_and_changes(folders) -> tuple[list[int], list[str]]:
        runs = read_runs(folders)
        table = result_table(runs, over_seeds(runs))
        (changes,) = [[*column.cells] for column in table.columns if column.header == "change"]
        return [number for number, row in enumerate(table.rows) if row.style == "bold"], changes

    assert best_and_changes(same) == ([1], ["", "-10.0%"])
    assert best_and_changes([*same, other]) == ([], ["", "", ""])


@pytest.mark.parametrize("name", ["a[", "[red]o", "[bold]", ":smile:", "$x_$", "$\\frac$", "_hidden"])
def test_names_and_values_are_shown_as_they_are(place, tmp_path, capsys, drawn, name):
    value = f"{name}[/x]"
    compare([place("b", 1.0, settings={"a": "c"}), place(name, 0.9, settings={"a": value})], tmp_path / "out")
    shown = capsys.readouterr().out
    assert [name] in [line.split()[:1] for line in shown.splitlines()]
    assert value in shown

    assert [label.split()[0] for label in legend_of(drawn[0])] == ["b", name, "teacher"]


def test_a_run_in_a_folder_that_looks_like_markup(place, tmp_path, capsys):
    compare([place("b", 1.0), place("a[/x]b", 0.9)], tmp_path / "out")
    assert "a[/x]b" in capsys.readouterr().out


@pytest.mark.parametrize("below", ["", "folder"])
def test_a_file_in_place_of_the_output_folder_is_a_mistake(place, tmp_path, below):
    (tmp_path / "text.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"text\.jsonl.*expected a folder.*Choose another --output-dir"):
        compare([place("a", 1.0), place("b", 0.9)], tmp_path / "text.jsonl" / below)


def test_the_command_compares_and_loads_nothing(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_command, "run", lambda *_: pytest.fail("it trained"))
    names = [place("a", 1.0), place("b", 0.9)]
    assert train.main(["--compare", *names, "--output-dir", str(tmp_path / "o")]) == 0
    assert (tmp_path / "o" / PICTURE).is_file() and "-10.0%" in capsys.readouterr().out
    assert train.main(["--compare", *names, "--output-dir", str(tmp_path), "--csv", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").is_file() and train.main(["--csv", "a.csv"]) == 2
    assert train.main(["--compare", *names, "--epochs", "2"]) == 2
    assert "trains nothing" in capsys.readouterr().out
    assert train.main(["--compare", names[0], "nowhere"]) == 2
    assert "nowhere: no such folder" in " ".join(capsys.readouterr().out.split())
