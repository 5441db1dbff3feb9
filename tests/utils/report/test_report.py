"""The report says what was measured, to people and to programs, whatever a model wrote."""

import copy
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread

from utils.report.charts import curves_as_svg, draw_curves, draw_routing
from utils.report.markdown import markdown
from utils.report.report import print_summary, write_report
from utils.report.results import has_passed_teacher, headline, is_better_without_teacher, worse_than_before
from utils.run_layout import CURVES, REPORT_HTML, REPORT_JSON, REPORT_MD, ROUTING


def scores(bits: float, parameters: int) -> dict:
    return {
        "perplexity": 12.3,
        "bits_per_byte": bits,
        "tokens": 48231,
        "bytes": 201332,
        "parameters": parameters,
        "dtype": "float32",
    }


RESULTS = {
    "student": scores(1.0, 1312000),
    "teacher": scores(0.8, 3410560),
    "initial_student": scores(2.8, 1312000),
    "retention": {"bits_per_byte_ratio": 1.25, "top1_agreement": 0.713, "kl_nats_per_token": 0.31, "gap_closed": 0.9},
    "samples": [
        {
            "prompt": "Once <upon> a | time",
            "student": "one\ntwo | three",
            "teacher": "![x](y) *stars* `code`",
            "initial_student": "<script>alert(1)</script>",
        }
    ],
    "run": {"steps": 1200, "seconds": 4100.0, "stopped_by": "steps"},
}


def training(step: int, total: int = 1000, **terms: float) -> dict:
    return {
        "step": step,
        "loss": 3.0,
        "lr": 1e-3 * (1 - step / total),
        "grad_norm": None if step == 300 else 0.5,
        "terms": {name: {"raw": 20.0 / step, "weight": w, "weighted": w * 20.0 / step} for name, w in terms.items()},
    }


def run(**terms: float) -> list[dict]:
    records = [{"step": s, "split": "eval", "bits_per_byte": 1 + 1 / (1 + s)} for s in range(0, 1001, 100)]
    return records + [training(step, **terms) for step in range(100, 1001, 100)]


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1])
    return drawn


def test_the_four_files_are_written_and_nothing_else(tmp_path):
    given = copy.deepcopy(RESULTS)
    written = write_report(tmp_path, RESULTS, run(kd=0.7, lm=0.3))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([REPORT_JSON, REPORT_MD, REPORT_HTML, CURVES])
    assert written == json.loads((tmp_path / REPORT_JSON).read_text()) == RESULTS == given
    picture = imread(tmp_path / CURVES)
    assert picture.shape[0] > 800 and picture.shape[1] > 1200 and picture[..., :3].std() > 0.02


def test_metrics_are_read_from_the_runs_own_file(tmp_path, figures):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in run(kd=0.7, lm=0.3)))
    write_report(tmp_path, RESULTS)
    assert len(figures[0].axes[0].get_lines()) > 4


def test_not_a_number_becomes_null_and_a_dash(tmp_path):
    results = RESULTS | {"student": scores(1.0, 5) | {"perplexity": math.inf}}
    write_report(tmp_path, results, [])
    assert json.loads((tmp_path / REPORT_JSON).read_text())["student"]["perplexity"] is None
    assert "| Distilled student | 1.0000 | - |" in (tmp_path / REPORT_MD).read_text()


def legend_of(panel) -> list[str]:
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_the_picture_has_terms_weights_schedule_and_levels(tmp_path, figures):
    draw_curves(tmp_path / "a.png", run(kd=0.7, lm=0.3, feat=0.0), RESULTS, run(lm=1.0))
    panels = {panel.get_title(loc="left"): panel for panel in figures[0].axes}
    losses = panels["Loss terms"]
    assert legend_of(losses) == ["KD", "LM", "feature", "total", "weighted", "weight 0"]
    assert legend_of(panels["Curriculum weights"]) == ["KD", "LM"]
    rates = legend_of(panels["Learning rate and gradient norm"])
    assert rates == ["learning rate", "gradient norm (right)"]

    lines = {line.get_label(): line for line in losses.get_lines()}
    faint = [name for name in ("KD", "LM", "feature", "total") if lines[name].get_linestyle() != "-"]
    assert faint == ["feature"] and lines["feature"].get_alpha() < 1
    draw_curves(tmp_path / "b.png", run(kd=0.7, lm=0.3))
    assert "weight 0" not in legend_of(figures[1].axes[0])

    labels = legend_of(panels["Evaluation, bits per byte"])
    for part in ("Teacher  0.800", "Student before training  2.800", "Distilled", "without the teacher"):
        assert any(part in label for label in labels)


def test_baseline_and_student_that_end_close_together_are_magnified(tmp_path, figures):
    draw_curves(tmp_path / "a.png", run(lm=0.3), RESULTS, run(lm=1.0))
    draw_curves(tmp_path / "b.png", run(lm=0.3), RESULTS)
    titles = [[panel.get_title(loc="left") for panel in figure.axes] for figure in figures]
    assert ["Last half of the evaluation" in names for names in titles] == [True, False]


TERMS = dict.fromkeys(("kd", "span", "lm", "feat", "rel", "attn", "layer", "contr"), 0.1)


@pytest.mark.parametrize("high", [1, 100])
def test_no_name_lies_on_a_curve(figures, high):
    """Names of curves stand above their panel, and below the title; nothing but ticks is written beside them."""
    records = run(**TERMS)
    for record in records:
        record["grad_norm"] = high
    curves_as_svg(records, RESULTS, run(lm=1.0))
    assert len(figures) == 5
    for figure in figures:
        panel = figure.axes[0]
        legend = panel.get_legend().get_window_extent()
        assert legend.y0 >= panel.bbox.y1 and not panel.texts and not panel.child_axes
        title = next(
            child for child in panel.get_children() if getattr(child, "get_text", str)() == panel.get_title("left")
        )
        assert title.get_window_extent().y0 >= legend.y1 - 2 and title.get_window_extent().y1 <= figure.bbox.y1
        assert legend.x1 <= figure.bbox.x1


@pytest.mark.parametrize("records", [[], [training(7, lm=1.0)], [{"step": 0, "split": "eval", "bits_per_byte": 2.0}]])
def test_a_run_that_logged_next_to_nothing_is_still_drawn(tmp_path, records):
    draw_curves(tmp_path / "a.png", records, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_high_temperature_gets_a_logarithmic_axis(tmp_path, figures):
    draw_curves(tmp_path / "a.png", [training(1, kd=0.7), training(500, kd=0.7)])
    draw_curves(tmp_path / "b.png", [training(400, kd=0.7), training(500, kd=0.7)] * 2)
    assert figures[0].axes[0].get_yscale() == "log" and figures[0].axes[2].get_yscale() == "linear"


def test_what_changes_beside_the_weights_is_drawn_with_them(tmp_path, figures):
    records = [training(step, kd=0.7) | {"skew": step / 100, "temperature": 2.0} for step in (1, 50, 100)]
    draw_curves(tmp_path / "a.png", records)
    panels = {panel.get_title(loc="left"): panel for panel in figures[0].axes}
    assert legend_of(panels["Curriculum weights"]) == ["KD", "skew"]


def test_the_degree_and_the_spread_of_sample_weights_are_drawn_with_the_weights(tmp_path, figures):
    records = []
    for step in (1, 50, 100):
        records.append(training(step, kd=0.7) | {"sample_weights": step / 100, "sample_spread": 0.2 + step / 500})
    draw_curves(tmp_path / "a.png", records)
    panels = {panel.get_title(loc="left"): panel for panel in figures[0].axes}
    assert legend_of(panels["Curriculum weights"]) == ["KD", "sample weights", "sample spread"]


def evaluated(step: int, weights: list[list[float]] | None = None) -> dict:
    record = {"step": step, "split": "eval", "bits_per_byte": 1.0}
    layers = {"student_layers": [4, 8], "teacher_layers": [6, 9, 12]}
    return record if weights is None else record | {"routing": {**layers, "weights": weights}}


def test_the_last_routing_is_drawn_told_and_in_the_json(tmp_path, figures):
    weights = [[0.7, 0.2, 0.1], [0.05, 0.25, 0.7]]
    records = [evaluated(0), evaluated(500, [[1.0, 0, 0]] * 2), evaluated(1500, weights), evaluated(2000)]
    written = write_report(tmp_path, RESULTS, records)

    routing = json.loads((tmp_path / REPORT_JSON).read_text())["routing"]
    assert written["routing"] == routing and "routing" not in RESULTS
    assert routing == {"step": 1500, "student_layers": [4, 8], "teacher_layers": [6, 9, 12], "weights": weights}

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [REPORT_JSON, REPORT_MD, REPORT_HTML, CURVES, ROUTING]
    )
    text = (tmp_path / REPORT_MD).read_text()
    assert f"![Routing]({ROUTING})" in text and "at step 1,500" in text

    panel = figures[-1].axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["6", "9", "12"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["4", "8"]
    assert [(*cell.get_position(), cell.get_text()) for cell in panel.texts][:3] == [
        (0, 0, "0.70"), (1, 0, "0.20"), (2, 0, "0.10"),
    ]  # fmt: skip
    assert panel.images[0].get_array().tolist() == weights and panel.get_ylim()[0] < panel.get_ylim()[1]


def test_without_routing_there_is_no_word_of_it(tmp_path):
    written = write_report(tmp_path, RESULTS, [evaluated(500)])
    assert "routing" not in written and "outing" not in (tmp_path / REPORT_MD).read_text()
    assert not (tmp_path / ROUTING).exists()


def test_many_layers_are_drawn_without_numbers_and_within_bounds(tmp_path, figures):
    layers = list(range(1, 65))
    routing = {"step": 1, "student_layers": layers, "teacher_layers": layers, "weights": [[1 / 64] * 64] * 64}
    draw_routing(tmp_path / "a.png", routing)
    assert not figures[0].axes[0].texts and max(figures[0].get_size_inches()) <= 13


def test_routing_that_is_not_a_number_is_still_drawn(tmp_path):
    routing = {"step": 1, "student_layers": [1], "teacher_layers": [1, 2], "weights": [[None, None]]}
    draw_routing(tmp_path / "a.png", routing)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_table_has_a_row_for_every_model_that_was_measured():
    text = markdown(RESULTS)
    assert "| Teacher | 0.8000 | 12.30 | 48,231 | 201,332 | 3,410,560 | float32 |" in text
    assert "without the teacher" not in text and "gap to the teacher closed: 90.0%" in text
    assert f"![Training curves]({CURVES})" in text and "duration: 1 h 08 min" in text
    assert "| Same student without the teacher | 1.1000 |" in markdown(RESULTS | {"baseline": scores(1.1, 5)})


def test_a_run_without_a_teacher_has_no_retention_and_no_distilled_student(tmp_path):
    alone = {key: RESULTS[key] for key in ("student", "initial_student", "run")}
    write_report(tmp_path, alone, run(lm=1.0))
    text = (tmp_path / REPORT_MD).read_text()
    assert "| Trained student | 1.0000 |" in text and "Retention" not in text and "istilled" not in text


def test_what_models_wrote_cannot_break_the_table():
    lines = markdown(RESULTS).splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("| Teacher | Distilled"))
    row = lines[header + 2]
    assert row.replace("\\|", "").count("|") == 4 and "one<br>two \\| three" in row
    assert "&lt;script>" in row and "\\*stars\\*" in row and "!\\[x\\](y)" in row
    assert lines[header - 2] == "### 1. Once &lt;upon> a \\| time"


def test_the_headline_tells_gain_loss_and_a_teacher_that_cannot_help():
    assert "10.0% fewer bits per byte" in headline(RESULTS | {"baseline": scores(1 / 0.9, 5)})
    assert "did not help" in headline(RESULTS | {"baseline": scores(0.8, 5)})
    assert "25.0% more bits per byte" in headline(RESULTS | {"baseline": scores(0.8, 5)})
    assert "as many bits per byte as" in headline(RESULTS | {"baseline": scores(1.0001, 5)})
    baselines = [scores(bits, 5) for bits in (0.8, 1.0001, 1.2, math.nan)]
    better = [is_better_without_teacher(RESULTS | {"baseline": baseline}) for baseline in baselines]
    assert better == [True, False, False, False]
    assert not is_better_without_teacher(RESULTS)
    assert "closed 90.0% of the gap" in headline(RESULTS)
    weak = RESULTS | {"teacher": scores(2.9, 5), "retention": {"gap_closed": None}}
    assert "no better" in headline(weak)
    assert "fewer bits per byte than the teacher" in headline(RESULTS | {"student": scores(0.7, 5)})


def test_a_student_has_passed_only_a_teacher_that_it_was_behind():
    passed = RESULTS | {"student": scores(0.7, 5)}
    assert has_passed_teacher(passed) and not has_passed_teacher(RESULTS)
    assert not has_passed_teacher(passed | {"teacher": scores(2.9, 5)})
    assert not has_passed_teacher(passed | {"retention": {"not_comparable": "the teacher reads other text"}})
    assert not has_passed_teacher({key: passed[key] for key in ("student", "initial_student")})


def test_the_start_is_called_by_what_it_was():
    trained, random = RESULTS | {"student_init": "pretrained"}, RESULTS | {"student_init": "random"}
    assert "itself before training" in headline(trained) and "random" not in headline(trained) + markdown(trained)
    assert "itself with random weights" in headline(random)
    assert "| Student with random weights | 2.8000 |" in markdown(random) and "before training" not in markdown(random)


WORSE = RESULTS | {"student": scores(3.0, 5), "retention": {"gap_closed": -0.1}}


def test_a_student_that_got_worse_is_called_worse_and_never_praised_for_a_negative_share(tmp_path):
    write_report(tmp_path, WORSE, run(kd=0.7))
    page = (tmp_path / REPORT_HTML).read_text(encoding="utf-8")
    for text in (headline(WORSE), page, (tmp_path / REPORT_MD).read_text(encoding="utf-8")):
        assert "got worse: 3.0000 bits per byte on unseen text, 2.8000 before training" in text
        assert "-10.0%" not in text and "closed -" not in text
    assert worse_than_before(RESULTS) is None and worse_than_before(WORSE)
    alone = {key: value for key, value in WORSE.items() if key not in ("teacher", "retention")}
    assert headline(alone).startswith("The trained student got worse")


SHARES = st.one_of(st.none(), st.floats(0.01, 10))


@given(SHARES, SHARES, SHARES, SHARES, st.sampled_from(["random", "pretrained", None]))
def test_no_headline_begins_with_a_pronoun_or_praises_what_is_negative(student, start, teacher, baseline, init):
    bits = {"student": student, "initial_student": start, "teacher": teacher, "baseline": baseline}
    models = {key: {"bits_per_byte": value} for key, value in bits.items() if value is not None}
    share = None
    if None not in (student, start, teacher) and start > teacher:
        share = (start - student) / (start - teacher)
    text = headline({**models, "retention": {"gap_closed": share}, "student_init": init})
    assert not text.startswith("It") and not re.search(r"-\d", text)
    assert not (share is not None and share < 0 and "closed" in text)


def test_a_student_that_is_not_a_number_is_reported_all_the_same(tmp_path):
    write_report(tmp_path, RESULTS | {"student": scores(math.nan, 5), "baseline": scores(1.1, 5)}, run(lm=1.0))
    assert "| Distilled student | - |" in (tmp_path / REPORT_MD).read_text()
    assert "fewer" not in (tmp_path / REPORT_HTML).read_text(encoding="utf-8")


def test_the_console_table_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_summary(RESULTS | {"baseline": scores(1.1, 5)})
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "Same student without the teacher" in shown and "3,410,560" in shown and "…" not in shown


def test_tasks_are_in_the_last_table_within_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    score = {"value": 0.75, "stderr": 0.0089}
    models = dict.fromkeys(("teacher", "student", "initial_student"), score)
    task = {"task": "hellaswag_of_a_long_name", "metric": "acc_norm", "higher_is_better": True, "documents": 2376}
    print_summary(RESULTS | {"tasks": [{**task, **models}]})
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "Tasks, measured by lm_eval" in shown
    # The columns are folded where they do not fit, and nothing is cut.
    assert shown.count("0.7500") == 3 and "…" not in shown


def test_tasks_are_told_with_their_error_and_their_better_side(tmp_path):
    row = {"task": "arc_easy", "metric": "acc", "higher_is_better": True, "documents": 2376}
    tasks = [
        {**row, "teacher": {"value": 0.75, "stderr": 0.0089}, "student": {"value": 0.5, "stderr": None}},
        {**row, "metric": "ppl", "higher_is_better": False, "student": {"value": 12.5, "stderr": None}},
    ]
    write_report(tmp_path, {**RESULTS, "tasks": tasks}, run(kd=0.7))
    markdown = (tmp_path / "evaluation_report.md").read_text(encoding="utf-8")
    assert "| task | metric | documents | Teacher | Distilled student |" in markdown
    assert "| arc_easy | acc ↑ | 2,376 | 0.7500 ± 0.0089 | 0.5000 |" in markdown
    assert "| arc_easy | ppl ↓ | 2,376 | - | 12.5000 |" in markdown
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">0.7500 ± 0.0089</td>" in page and "Measured by lm_eval" in page
    write_report(tmp_path, RESULTS, run(kd=0.7))
    assert "lm_eval" not in (tmp_path / "evaluation_report.md").read_text(encoding="utf-8")
    assert "lm_eval" not in (tmp_path / "report.html").read_text(encoding="utf-8")
