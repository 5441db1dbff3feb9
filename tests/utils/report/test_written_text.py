"""The table of written text in the report."""

from utils.report.html import page
from utils.report.markdown import markdown
from utils.report.written_text import WRITTEN_TEXT_HEADS, written_text_rows

WRITTEN = {"samples": 16, "tokens": 40.25, "ended": 0.5, "repeated_4grams": 0.125, "teacher_bits_per_byte": 0.9}


def test_every_model_that_wrote_has_a_row_and_a_dash_where_nobody_judged():
    unjudged = {name: value for name, value in WRITTEN.items() if name != "teacher_bits_per_byte"}
    results = {
        "teacher": {"bytes": 1},
        "student": {"bytes": 1},
        "generation": {"student": unjudged, "teacher": WRITTEN, "initial_student": None},
    }
    assert written_text_rows(results) == [
        ["Teacher", "0.9000", "12.5%", "16", "50.0%", "40.2"],
        ["Distilled student", "-", "12.5%", "16", "50.0%", "40.2"],
    ]
    assert '<td data-label="repeated 4-grams">12.5%</td>' in page("run", results)
    text = markdown(results)
    assert "## Written text" in text and f"| {' | '.join(WRITTEN_TEXT_HEADS)} |" in text

    # Why there is a dash, where there is one, and who judged where there are several.
    why, several = "none was loaded, since a cache had all that the run needed", "Of several teachers the first one"
    assert why in text and why in page("run", results) and several not in text
    judged = {**results, "generation": {"student": WRITTEN, "teacher": WRITTEN}}
    assert why not in markdown(judged) + page("run", judged)
    of_two = {**judged, "teacher": {"bytes": 1, "teachers": [{"name": name, "bits_per_byte": 1.0} for name in "ab"]}}
    assert several in markdown(of_two) and several in page("run", of_two)


def test_without_written_text_there_is_no_section():
    for results in ({"student": {"bytes": 1}, "generation": {"student": None}}, {"student": {"bytes": 1}}):
        assert "Written text" not in markdown(results) + page("run", results)
