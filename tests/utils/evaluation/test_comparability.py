"""Bits per byte of models whose tokens leave text out are not compared, wherever they are told."""

import pytest

from utils.checks.setup import spelt_text
from utils.comparison.notes import notes
from utils.evaluation.comparability import MOST_UNSPELT, unspelt_share, unspelt_text
from utils.evaluation.scores import retention
from utils.report.results import headline, retention_lines
from utils.training.red_flags import RedFlags

AGREEMENT = {"top1_agreement": 0.5, "kl_nats_per_token": 0.1}


def described(bits: float, unspelt: int = 0) -> dict:
    return {"bits_per_byte": bits, "bytes": 1000, "unspelt_bytes": unspelt, "loss": 1.0}


@pytest.mark.parametrize("unspelt", [0, int(1000 * MOST_UNSPELT)])
def test_a_text_that_is_said_but_for_a_trace_is_compared(unspelt):
    found = retention(described(1.5, unspelt), described(1.0), described(2.0), AGREEMENT)
    assert (found["gap_closed"], found["bits_per_byte_ratio"]) == (pytest.approx(0.5), pytest.approx(1.5))
    assert "not_comparable" not in found


@pytest.mark.parametrize("lossy", ["student", "teacher"])
def test_the_gap_of_a_model_that_leaves_text_out_is_not_told_and_the_reason_is(lossy):
    student, teacher = (described(0.9, 400 * (side == lossy)) for side in ("student", "teacher"))
    kept = retention(student, teacher, described(2.0, 400), AGREEMENT)
    assert kept["gap_closed"] is kept["bits_per_byte_ratio"] is None
    assert f"40.0% (by the {lossy}'s tokens) of the text's bytes are left out" in kept["not_comparable"]
    assert kept["top1_agreement"] == 0.5

    results = {"student": student, "teacher": teacher, "initial_student": described(2.0), "retention": kept}
    assert "closed is not told" in headline(results) and "40.0%" in headline(results)
    assert (f"Bytes of the text that the {lossy}'s tokens leave out", "40.0%") in retention_lines(results)


def test_reports_of_older_versions_say_nothing_of_it():
    assert unspelt_share({"bits_per_byte": 1.0, "bytes": 10}) == 0
    assert unspelt_text({"student": {"bytes": 10}, "teacher": {"bytes": 10}}) is None


def test_a_lossy_student_raises_a_flag_of_its_own_and_none_on_the_teacher():
    told: list[str] = []
    flags = RedFlags(10, 100, warn=told.append)
    flags.models(described(2.0), described(1.0, 600))
    assert flags.warned == ["lossy_tokenizer"] and "60.0%" in told[0]
    flags.models(described(2.0), described(1.0))
    assert flags.warned == ["lossy_tokenizer", "weak_teacher"]


def test_the_preflight_fails_where_too_much_is_left_out():
    class Job:
        class held_out:
            @staticmethod
            def unspelt_shares() -> dict[str, float]:
                return {"student": 0.3, "teacher": 0.0}

    assert not spelt_text(Job, ("student", "teacher")).passed
    assert spelt_text(Job, ("teacher",)).passed


def test_a_comparison_of_runs_names_students_that_leave_text_out():
    class Run:
        name, report, evaluations, settings, scored_bytes = "a", {"student": described(0.5, 300)}, [1], {"x": 1}, 1000

    assert any("a 30.0%" in note for note in notes([Run]))
