"""The table of written text in the report."""

from utils.report.markdown import markdown
from utils.report.written_text import HEADS, written_text_rows

WRITTEN = {"samples": 16, "tokens": 40.25, "ended": 0.5, "repeated_4grams": 0.125, "teacher_bits_per_byte": 0.9}


def test_every_model_that_wrote_has_a_row_and_a_dash_where_nobody_judged():
    unjudged = {name: value for name, value in WRITTEN.items() if name != "teacher_bits_per_byte"}
    results = {
        "teacher": {"bytes": 1},
        "generation": {"student": unjudged, "teacher": WRITTEN, "initial_student": None},
    }
    assert written_text_rows(results) == [
        ["Teacher", "0.9000", "12.5%", "50.0%", "40.2"],
        ["Distilled student", "-", "12.5%", "50.0%", "40.2"],
    ]
    text = markdown(results)
    assert "## Written text" in text and f"| {' | '.join(HEADS)} |" in text


def test_without_written_text_there_is_no_section():
    assert "Written text" not in markdown({"generation": {"student": None}}) + markdown({})
