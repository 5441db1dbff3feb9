"""Runs that differ in their seed alone have a mean, and a difference from others, seed by seed."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from tests.utils.comparison.conftest import change_report, settings_of, shown_of
from tests.utils.report.test_report import scores
from utils.comparison.compare import compare
from utils.comparison.runs import read_runs
from utils.comparison.seeds import interval, over_seeds
from utils.errors import UserError


def seeds(place, number: int, **training) -> list[str]:
    settings = {"training": {"seed": number, **training}, "output_dir": f"runs/{number}"}
    return [place(f"s{number}", 1.0 + number / 10, settings=settings)]


@pytest.fixture
def trio(place) -> list[str]:
    """Three seeds of one setting, at 1.0, 1.1 and 1.2 bits per byte."""
    return [place(f"a{seed}", 1 + seed / 10, settings=settings_of(seed)) for seed in range(3)]


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


def test_a_table_for_other_programs_has_the_same_figures(place, tmp_path):
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


def test_tables_for_other_programs_have_the_figures_over_seeds(place, trio, tmp_path, capsys):
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
