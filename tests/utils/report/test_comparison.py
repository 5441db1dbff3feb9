"""Runs are compared from their files alone, finished or not, and what does not compare is said."""

import json
import math
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread

import train
from tests.utils.logs.test_step_logger import evaluation_at, record_at
from tests.utils.report.test_report import RESULTS, scores
from utils.commands import run as run_command
from utils.errors import UserError
from utils.report.comparison import (
    PICTURE,
    compare,
    differing_settings,
    interval,
    over_seeds,
    read_runs,
    result_table,
)


@pytest.fixture(autouse=True)
def _console(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def place(tmp_path):
    """Makes folders of runs: `finished` has a report, the others have got as far as `step` of 1,000."""

    def make(name: str, bits: float, step: int = 1000, finished: bool = True, settings=None, size: int = 4000) -> str:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        records = [record_at(s, 1000) for s in range(100, step + 1, 100)]
        records += [{**evaluation_at(s), "bits_per_byte": bits + 1 - s / 1000, "bytes": size} for s in (0, step)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        start = {"teacher": scores(0.8, 9), "initial_student": scores(2.8, 5)}
        (folder / "baseline_evaluation.json").write_text(json.dumps(start))
        if finished:
            run = {"steps": step, "seconds": 4100.0, "stopped_by": "finished"}
            report = RESULTS | {"student": scores(bits, 5), "run": run}
            (folder / "evaluation_report.json").write_text(json.dumps(report))
        if settings is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return str(folder)

    return make


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


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), saved(self, *a, **k))[1])
    return figures


def test_the_picture_is_over_steps_and_over_tokens_and_marks_what_is_unfinished(place, tmp_path, drawn):
    compare([place("a", 1.0), place("b", 1.0, step=500, finished=False)], tmp_path)
    steps, tokens = drawn[0].axes
    a, b = (line for line in steps.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert list(a.get_xdata()) == [0, 1000] and list(b.get_xdata()) == [0, 500] and "(unfinished)" in b.get_label()
    assert list(tokens.get_lines()[0].get_xdata()) == [0, 4096 * 1000]
    assert not steps.texts and legend_of(drawn[0])[-1] == "teacher  0.800"


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_settings_that_differ_are_named_and_the_folders_own_are_not(place):
    ramp = {"points": [[0, 0.1], [1, 0.7]]}
    common = {"training": {"seed": 1}, "resume": "auto"}
    one = place("a", 1.0, settings={**common, "curriculum": {"kd": {"weight": 0.7}}, "output_dir": "x"})
    two = place("b", 1.0, settings={**common, "curriculum": {"kd": {"weight": ramp}}, "output_dir": "y", "new": 1})
    three = place("c", 1.0)
    found = differing_settings(read_runs([one, two, three]))
    assert found == {"curriculum.kd.weight": ["0.7", json.dumps(ramp), "?"]}


def test_what_no_result_depends_on_is_named_apart(place, tmp_path, capsys):
    common = {"training": {"seed": 1, "save_every": 10}, "logging": {"every": 1}}
    other = {"training": {"seed": 1, "save_every": 20}, "logging": {"every": 2}}
    names = [place("a", 1.0, settings=common), place("b", 0.9, settings=other)]
    assert differing_settings(read_runs(names)) == {}
    compare(names, tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert "without an effect on the result: logging.every, training.save_every" in shown


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (["/home/me/models/small", "/home/me/models/large"], ["…/small", "…/large"]),
        ([["/a/b/x.txt", "/a/b/y.txt"], ["/a/b/c/z.txt"]], ["…/x.txt, …/y.txt", "…/c/z.txt"]),
        (["owner/small", "owner/large"], ["…/small", "…/large"]),
        (["owner/small", "/a/large"], ["owner/small", "/a/large"]),
        (["/a/x", "/b/x"], ["/a/x", "/b/x"]),
        ([None, "/a/x"], ["null", "/a/x"]),
        ([0.1, 0.2], ["0.1", "0.2"]),
    ],
)
def test_folders_that_all_values_share_are_cut(place, values, shown):
    names = [place(f"r{number}", 1.0, settings={"data": {"train": value}}) for number, value in enumerate(values)]
    assert differing_settings(read_runs(names)) == {"data.train": shown}


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


def seeds(place, number: int, **training) -> list[str]:
    settings = {"training": {"seed": number, **training}, "output_dir": f"runs/{number}"}
    return [place(f"s{number}", 1.0 + number / 10, settings=settings)]


def test_over_seeds_there_is_a_mean_with_its_interval(place, tmp_path, capsys):
    """The mean of 1.0, 1.1 and 1.2 is 1.1, the deviation 0.1, and t with 2 degrees of freedom 4.303."""
    names = [*seeds(place, 0), *seeds(place, 1), *seeds(place, 2), *seeds(place, 3, learning_rate=1.0)]
    copied = place("copy", 1.0, settings={"training": {"seed": 0}})
    group, other = over_seeds(read_runs([*names, copied]))
    assert [run.name for run in group.runs] == ["s0", "s1", "s2"] and not group.left_out
    assert [run.name for run in other.runs] == ["s3"]
    assert interval([1.0, 1.1, 1.2]) == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-6)
    compare(names, tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert "s0, s1, s2 3 bits per byte 1.1000 ± 0.2484" in shown
    assert "without teacher" not in shown and "less the first" not in shown
    assert "without a mean: s3." in shown


def test_over_seeds_the_difference_from_the_student_without_the_teacher_is_paired(place, tmp_path, capsys):
    names = [*seeds(place, 0), *seeds(place, 1)]
    for name, bits in zip(names, (1.05, 1.15), strict=True):
        report = Path(name, "evaluation_report.json")
        report.write_text(json.dumps(json.loads(report.read_text()) | {"baseline": scores(bits, 5)}))
    compare(names, tmp_path / "out")
    shown = " ".join(capsys.readouterr().out.split())
    assert "bits per byte 1.0500 ± 0.6353 minus without teacher -0.0500 ± 0.0000" in shown


def test_settings_with_several_seeds_are_compared_seed_by_seed(place, tmp_path, capsys):
    """Seeds differ by 0.1, the settings by 0.01 and 0.02: -0.015 ± 12.706 * 0.00707 / sqrt(2)."""
    names = []
    for seed, first, second in ((0, 1.0, 0.99), (1, 1.1, 1.08), (2, 1.2, None)):
        for rate, bits in ((1e-3, first), (2e-3, second)):
            if bits is not None:
                settings = {"training": {"seed": seed, "learning_rate": rate}}
                names.append(place(f"r{rate:g}-{seed}", bits, settings=settings))
    for number, name in enumerate(names):
        report = Path(name, "evaluation_report.json")
        figures = {"retention": {"kl_nats_per_token": 0.5 - number / 10}, "generation": {"student": {"tokens": 3}}}
        report.write_text(json.dumps(json.loads(report.read_text()) | figures))

    compare(names, tmp_path / "out")
    shown = capsys.readouterr().out
    assert max(map(len, shown[: shown.index("picture:")].splitlines())) <= 80
    shown = " ".join(shown.split())
    assert "3 bits per byte 1.1000 ± 0.2484" in shown
    assert "2 bits per byte 1.0350 ± 0.5718 -0.0150 ± 0.0635" in shown
    assert "KL to the teacher 0.3000 ± 1.2706 -0.1000 ± 0.0000" in shown and "4-grams" not in shown


def test_a_table_for_other_programs_has_the_same_figures(place, tmp_path):
    import pandas as pd

    names = [*seeds(place, 0), *seeds(place, 1)]
    compare(names, tmp_path / "out", tmp_path / "a.csv")
    frame = pd.read_csv(tmp_path / "a.csv")
    assert [*frame["run"]] == ["s0", "s1"] and [*frame["student_bits_per_byte"]] == [1.0, 1.1]
    assert [*frame["training.seed"]] == [0, 1] and "baseline_bits_per_byte" not in frame
    compare(names, tmp_path / "out", tmp_path / "a.md")
    lines = (tmp_path / "a.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| run") and lines[3].startswith("| s1 ") and not lines[4]
    with pytest.raises(UserError, match="cannot be written"):
        compare(names, tmp_path / "out", tmp_path / "nowhere" / "a.csv")


def settings_of(seed: int, **training) -> dict:
    return {"training": {"seed": seed, **training}}


def change_report(folder: str, **figures) -> None:
    file = Path(folder, "evaluation_report.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | figures))


def shown_of(folders, tmp_path, capsys) -> str:
    capsys.readouterr()
    compare(folders, tmp_path / "out")
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def trio(place) -> list[str]:
    """Three seeds of one setting, at 1.0, 1.1 and 1.2 bits per byte."""
    return [place(f"a{seed}", 1 + seed / 10, settings=settings_of(seed)) for seed in range(3)]


def test_a_seed_that_has_diverged_leaves_its_setting_without_a_mean(place, trio, tmp_path, capsys):
    others = [place(f"d{seed}", 0.9, settings=settings_of(seed, weight_decay=1)) for seed in range(3)]
    change_report(others[2], student=scores(0.9, 5) | {"bits_per_byte": None})
    metrics = Path(others[2], "metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line | {"bits_per_byte": None} if "bits_per_byte" in line else line for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))

    shown = shown_of([*trio, *others], tmp_path, capsys)
    assert "d0, d1, d2 3 bits per byte - - " in shown and "0.9000 ±" not in shown
    assert "No mean of bits per byte where a run has none: d2." in shown

    # and the other way round there is no difference from it
    shown = shown_of([*others, *trio], tmp_path, capsys)
    assert "a0, a1, a2 3 bits per byte 1.1000 ± 0.2484 - " in shown


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_that_was_cut_short_is_named_beside_the_mean_of_the_others(place, trio, tmp_path, capsys, finished):
    cut = place("a3", 5.0, step=400, finished=finished, settings=settings_of(3))
    if finished:
        change_report(cut, run={"steps": 400, "seconds": 1.0, "stopped_by": "max_hours"})
    shown = shown_of([*trio, cut], tmp_path, capsys)
    assert "a0, a1, a2 3 of 4 bits per byte 1.1000 ± 0.2484" in shown
    reason = "max hours at step 400" if finished else "unfinished"
    assert f"Left out of the means over seeds: a3 ({reason})." in shown


def test_a_run_without_an_evaluation_so_far_is_named_too(place, trio, tmp_path, capsys):
    begun = place("a3", 1.0, step=0, finished=False, settings=settings_of(3))
    Path(begun, "metrics.jsonl").write_text("")
    shown = shown_of([*trio, begun], tmp_path, capsys)
    assert "3 of 4 bits per byte" in shown and "Left out of the means over seeds: a3 (unfinished)." in shown


def test_means_over_runs_that_were_stopped_early_tell_their_steps(place, trio, tmp_path, capsys):
    early = place("a3", 1.3, step=600, settings=settings_of(3))
    change_report(early, run={"steps": 600, "seconds": 1.0, "stopped_by": "early_stopping"})
    shown = shown_of([*trio, early], tmp_path, capsys)
    assert "a0, a1, a2, a3 4 bits per byte 1.1500" in shown
    assert "different numbers of steps: a0 1,000, a1 1,000, a2 1,000, a3 600." in shown
    assert "different numbers of steps" not in shown_of(trio, tmp_path, capsys)


def test_no_order_chooses_between_two_runs_of_one_seed(place, trio, tmp_path, capsys):
    again = place("again", 2.5, settings=settings_of(2))
    for folders in ([*trio, again], [again, *trio]):
        shown = shown_of(folders, tmp_path, capsys)
        assert "a0, a1 2 of 3 bits per byte 1.0500" in shown
        assert "a2 (seed 2 ran more than once, with other figures)" in shown and "again (seed 2" in shown
    assert "again (seed 2 ran more than once" in shown_of([trio[2], again], tmp_path, capsys)

    copy = place("copy", 1.2, settings=settings_of(2))
    shown = shown_of([*trio, copy], tmp_path, capsys)
    assert "a0, a1, a2 3 bits per byte 1.1000" in shown and "Left out" not in shown


def test_the_pairs_behind_a_difference_are_counted_where_they_are_fewer_than_the_seeds(place, trio, tmp_path, capsys):
    some = [place(f"c{seed}", 0.9 + seed / 10, settings=settings_of(seed, weight_decay=1)) for seed in (1, 2, 7)]
    one = [place(f"o{seed}", 0.9, settings=settings_of(seed, weight_decay=2)) for seed in (2, 3)]
    none = [place(f"n{seed}", 0.9, settings=settings_of(seed, weight_decay=3)) for seed in (8, 9)]
    single = place("x0", 0.9, settings=settings_of(0, weight_decay=4))
    shown = shown_of([*trio, *some, *one, *none, single], tmp_path, capsys)
    assert "less the first pairs" in shown
    assert "c1, c2, c7 3 bits per byte 1.2333 ± 0.7986 -0.1000 ± 0.0000 2 " in shown
    assert "o2, o3 2 bits per byte 0.9000 ± 0.0000 - " in shown
    assert "No difference from a0, a1, a2: o2, o3 have one seed in common with them." in shown
    assert "No difference from a0, a1, a2: n8, n9 have no seed in common with them." in shown
    assert "without a mean: x0." in shown

    assert "less the first pairs" not in shown_of([*trio, *some[:2]], tmp_path, capsys)


def test_there_is_no_difference_of_a_figure_without_a_mean(place, trio, tmp_path, capsys):
    others = [place(f"b{seed}", 0.9, settings=settings_of(seed, weight_decay=1)) for seed in range(3)]
    for folder in (*trio, *others[:2]):
        change_report(folder, retention={"kl_nats_per_token": 0.5})
    change_report(others[2], retention={})
    shown = shown_of([*trio, *others], tmp_path, capsys)
    assert "b0, b1, b2 3 bits per byte 0.9000 ± 0.0000 -0.2000 ± 0.2484 KL to the teacher - - " in shown
    assert "No mean of KL to the teacher where a run has none: b2." in shown


def test_tables_for_other_programs_have_the_figures_over_seeds(place, trio, tmp_path, capsys):
    import pandas as pd

    others = [place(f"c{seed}", 0.9 + seed / 10, settings=settings_of(seed, weight_decay=1)) for seed in (1, 2, 7)]
    cut = place("a3", 5.0, step=400, finished=False, settings=settings_of(3))
    compare([*trio, cut, *others], tmp_path / "out", tmp_path / "a.csv")
    assert f"table: {tmp_path / 'a-seeds.csv'}" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "a.csv")) == 7
    first, second = pd.read_csv(tmp_path / "a-seeds.csv").query("figure == 'bits per byte'").to_dict("records")
    assert first["runs"] == "a0, a1, a2" and first["seeds"] == 3 and first["left_out"] == "a3 (unfinished)"
    assert first["mean"] == pytest.approx(1.1) and first["interval"] == pytest.approx(0.2484, abs=1e-4)
    assert math.isnan(first["less_the_first"]) and math.isnan(first["pairs"])
    assert second["less_the_first"] == pytest.approx(-0.1) and second["pairs"] == 2 and second["interval_of_it"] < 1e-9

    compare([*trio, cut, *others], tmp_path / "out", tmp_path / "a.md")
    rows, _, seeds, told = (tmp_path / "a.md").read_text(encoding="utf-8").split("\n\n")
    assert "- Left out of the means over seeds: a3 (unfinished)." in told.splitlines()
    assert (
        len(rows.splitlines()) == 9 and "| a0, a1, a2 " in seeds and "| -0.1 " in seeds and "a3 (unfinished)" in seeds
    )

    compare([trio[0], others[0]], tmp_path / "out", tmp_path / "b.csv")
    assert not (tmp_path / "b-seeds.csv").exists()

    # A file of an earlier comparison stays, and is told.
    capsys.readouterr()
    compare([trio[0], others[0]], tmp_path / "out", tmp_path / "a.csv")
    assert "a-seeds.csv is of another comparison" in " ".join(capsys.readouterr().out.split())


def test_a_student_that_got_worse_has_closed_no_share(place, tmp_path, capsys):
    names = [place("a", 1.0), place("b", 0.9)]
    report = Path(names[0], "evaluation_report.json")
    report.write_text(json.dumps(json.loads(report.read_text()) | {"retention": {"gap_closed": -0.2}}))
    compare(names, tmp_path / "out")
    assert "a finished 1,000 1.0000 0.8000 worse" in " ".join(capsys.readouterr().out.split())


def test_what_makes_figures_incomparable_is_said(place, tmp_path, capsys):
    compare([place("a", 1.0), place("b", 1.0, size=5000)], tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "measured on different text (bytes: a 4,000, b 5,000)" in said and "unknown settings: a, b" in said


def test_on_different_texts_no_run_is_better_than_another(place):
    same, other = [place("a", 1.0), place("b", 0.9)], place("c", 0.5, size=5000)

    def best_and_changes(folders) -> tuple[list[int], list[str]]:
        table = result_table(read_runs(folders))
        (changes,) = [[*column.cells] for column in table.columns if column.header == "change"]
        return [number for number, row in enumerate(table.rows) if row.style == "bold"], changes

    assert best_and_changes(same) == ([1], ["", "-10.0%"])
    assert best_and_changes([*same, other]) == ([], ["", "", ""])


def test_each_teachers_line_tells_whose_it_is(place, tmp_path, drawn):
    folders = [place(name, 1.0) for name in "abc"]
    report = tmp_path / "runs" / "b" / "evaluation_report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"teacher": scores(0.6, 9)}))
    compare(folders, tmp_path)
    assert legend_of(drawn[0])[-2:] == ["teacher of a, c  0.800", "teacher of b  0.600"]


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


REPORT, START = "evaluation_report.json", "baseline_evaluation.json"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b'"text"', b'{"run": null}', b'{"a": "\xe9"}', b"\x00\xff"]
)
def test_a_damaged_report_is_named_and_the_others_are_compared(place, tmp_path, capsys, content):
    names = [place("a", 1.0), place("b", 0.9)]
    (tmp_path / "runs" / "b" / REPORT).write_bytes(content)
    compare(names, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
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

    compare(names, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
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
    compare(names, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "Damaged in b, and left out: metrics.jsonl (2 of 14 records)" in said
    assert "b finished 1,000 0.9000 -10.0%" in said


@pytest.mark.parametrize("bits", ["NaN", "Infinity", "-Infinity", "-1.0", "0.0", "0", "1e300", "1" + "0" * 400])
@pytest.mark.parametrize("place_of_run", [0, 1])
def test_bits_per_byte_that_cannot_be_are_damage(place, tmp_path, capsys, bits, place_of_run):
    names = [place("a", 1.0, finished=False), place("b", 0.9, finished=False)]
    with open(f"{names[place_of_run]}/metrics.jsonl", "a") as file:
        file.write(f'{{"step": 1001, "bits_per_byte": {bits}}}\n')

    compare(names, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
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

    compare(names, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
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


def test_a_term_without_a_count_is_no_crash(place, tmp_path):
    folder = place("a", 1.0)
    Path(folder, "metrics.jsonl").write_text('{"step": 5, "terms": {"lm": {}}}\n')
    compare([folder, folder], tmp_path / "out")


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


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- 1", b"a: \xe9"])
def test_damaged_settings_are_named(place, tmp_path, capsys, content):
    names = [place("a", 1.0), place("b", 0.9)]
    (tmp_path / "runs" / "b" / "config.yaml").write_bytes(content)
    compare(names, tmp_path)
    assert "Damaged in b, and left out: config.yaml (" in " ".join(capsys.readouterr().out.split())


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
