"""A run in a notebook's kernel: one panel that is drawn anew, and a saved notebook that stays small."""

import base64
import logging
import math
import re
import sys
from types import SimpleNamespace

import pytest

from tests.utils.logs.test_progress import Clock
from tests.utils.logs.test_step_logger import _restore_logging, evaluation_at, record_at, simulate  # noqa: F401
from utils.logs import notebook, progress
from utils.logs.console import setup_logging
from utils.logs.progress import Progress
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.machine.jupyter import in_kernel

display_module = pytest.importorskip("IPython.display", reason="IPython is not installed: pip install -e .[test]")

MOST_ROWS = 60
MOST_BYTES = 100_000


@pytest.fixture
def cell(monkeypatch):
    """The outputs of a cell as a saved notebook has them, by their ids, and how often one was drawn."""
    outputs: dict[str, dict[str, str]] = {}
    result = SimpleNamespace(outputs=outputs, draws=0)

    def display(content, *, raw, display_id):
        assert raw and display_id not in outputs
        outputs[display_id] = content

    def update(content, *, raw, display_id):
        assert raw and display_id in outputs
        outputs[display_id] = content
        result.draws += 1

    monkeypatch.setattr(display_module, "display", display)
    monkeypatch.setattr(display_module, "update_display", update)
    monkeypatch.setattr(progress, "in_kernel", lambda: True)
    monkeypatch.setattr(progress, "BAR_DRAWS", 200)
    return result


def panels(cell) -> list[str]:
    return [content["text/html"] for content in cell.outputs.values()]


def steps_shown(panel: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"<tr><td>([\d,]+)</td>", panel)]


def test_a_saved_run_of_25000_steps_is_short_and_small(cell, tmp_path, capsys):
    simulate(tmp_path, None, Clock())
    logging.getLogger("utils.training.loop").warning("loss rose by half")
    written = capsys.readouterr().out
    (panel,) = panels(cell)

    rows = len(written.splitlines()) + panel.count("<tr>") + panel.count("<div")
    assert rows < MOST_ROWS
    assert len(written.encode()) + sum(len(text.encode()) for text in cell.outputs.popitem()[1].values()) < MOST_BYTES
    assert "[TOTAL]" not in written and "[Eval]" not in written and "\r" not in written
    assert "Warning: loss rose by half" in written
    assert 50 < cell.draws <= progress.BAR_DRAWS

    # The files have what they have elsewhere.
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 250 + 50
    assert (tmp_path / "train.log").read_text().count("[TOTAL]") == 250


def test_it_is_no_larger_where_every_step_is_logged_and_evaluated(cell):
    panel = notebook.Panel()
    panel.begin()
    for step in range(1, 25_001):
        panel.training(record_at(step, 25_000, loss=10 / step), 25_000)
        panel.evaluation(evaluation_at(step))
    panel.rest()
    (html,) = panels(cell)
    assert len(html) < MOST_BYTES / 5 and html.count("<tr>") < 20
    assert steps_shown(html)[0] == 1 and steps_shown(html)[-5:] == [*range(24_996, 25_001)]


def test_the_newest_steps_are_shown_and_of_the_others_some_that_were_evaluated(cell, tmp_path):
    simulate(tmp_path, None, Clock())
    (panel,) = panels(cell)
    shown = steps_shown(panel)
    assert shown == sorted(shown)
    assert shown[-5:] == [24_600, 24_700, 24_800, 24_900, 25_000]
    assert all(step % 500 == 0 for step in shown[:-5]) and shown[0] == 500
    assert "step 25,000 of 25,000" in panel and "<progress" not in panel
    assert panel.count("0.9000") == len([step for step in shown if step % 500 == 0])


def test_only_terms_that_are_on_have_a_column_and_curves_are_pictures(cell, tmp_path):
    simulate(tmp_path, None, Clock())
    (panel,) = panels(cell)
    assert re.findall(r"<th>([^<]+)</th>", panel) == [
        *("step", "loss", "kd", "lm", "feat", "lr", "tokens/s", "bits/byte")
    ]
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", panel)]
    assert ["bits per byte" in picture for picture in pictures] == [False, True]
    for picture in pictures:
        (points,) = re.findall(r'points="([^"]+)"', picture)
        assert 1 < len(points.split()) <= notebook.CURVE_POINTS


def test_a_curve_runs_from_its_first_step_to_its_last_and_from_its_lowest_value_to_its_highest():
    picture = notebook.draw_curve("loss", [(10, 4.0), (15, 2.0), (20, 3.0)])
    (points,) = re.findall(r'points="([^"]+)"', picture)
    (x1, y1), (x2, y2), (x3, y3) = [map(float, point.split(",")) for point in points.split()]
    assert x2 - x1 == x3 - x2 > 0
    assert y2 - y1 == pytest.approx(2 * (y2 - y3)) and y1 < y2


def test_while_steps_are_taken_the_panel_has_a_bar_and_the_time_left(cell):
    clock = Clock()
    display = Progress(clock=clock)
    steps = StepLogger(None, 1000, 10, progress=display)
    display.time_left.expect({"step": 1000}, {})
    steps.begin(0)
    for step in range(1, 31):
        clock.now += 1.0
        if steps.due(step):
            steps.training(record_at(step, 1000))
        steps.progress(step)
    (panel,) = panels(cell)
    assert "training: step 30 of 1,000, 16:10 left" in panel and 'value="0.030"' in panel
    assert cell.draws < 15

    steps.close()
    (panel,) = panels(cell)
    assert "<progress" not in panel and "step 30 of 1,000" in panel


def test_what_a_model_writes_is_shown_as_it_is_and_in_bounds(cell):
    display = Progress(clock=Clock())
    steps = StepLogger(None, 100, 10, progress=display)
    steps.begin(0)
    text = "<script>alert(1)</script> " + "very " * 1000
    steps.evaluation({**evaluation_at(10), "sample": {"prompt": "a & b", "text": text}})
    steps.close()
    (content,) = cell.outputs.values()
    assert "<script>" not in content["text/html"] and "&lt;script&gt;" in content["text/html"]
    assert len(content["text/html"]) < 3000
    assert content["text/plain"].splitlines()[0].startswith("step 10 bits/byte 0.9000")


def test_a_loss_that_is_no_number_is_a_dash_and_leaves_the_curve(cell):
    steps = StepLogger(None, 100, 10, progress=Progress(clock=Clock()))
    steps.begin(0)
    for step, loss in ((10, 3.0), (20, math.nan), (30, None), (40, 2.0)):
        steps.training(record_at(step, 100, loss=loss))
    steps.close()
    (panel,) = panels(cell)
    assert panel.count("<td>-</td>") == 2 and panel.count("base64,") == 1


def test_a_second_training_has_a_panel_of_its_own(cell, tmp_path):
    display = Progress(clock=Clock())
    for folder in ("with", "without"):
        steps = StepLogger(tmp_path / folder, 100, 10, progress=display)
        steps.begin(0)
        steps.training(record_at(10, 100))
        steps.close()
    assert [steps_shown(panel) for panel in panels(cell)] == [[10], [10]]


def test_a_continued_run_shows_the_steps_of_its_earlier_sessions(cell, tmp_path):
    for done, step in ((0, 10), (10, 20)):
        steps = StepLogger(tmp_path, 100, 10, progress=Progress(clock=Clock()))
        steps.begin(done)
        steps.training(record_at(step, 100))
        steps.evaluation(evaluation_at(step))
        steps.close()
    assert steps_shown(panels(cell)[-1]) == [10, 20]


def test_elsewhere_there_is_no_panel(capsys):
    assert not in_kernel()
    assert Progress().panel is None and Progress(shown=False).panel is None
    setup_logging(None)
    steps = StepLogger(None, 100, 10, progress=Progress())
    steps.training(record_at(10, 100))
    assert "[TOTAL] step 10/100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shell", "expected"),
    [(SimpleNamespace(kernel=object()), True), (SimpleNamespace(), False), (None, False)],
)
def test_a_kernel_is_told_from_a_shell_in_a_terminal(monkeypatch, shell, expected):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_kernel() is expected
