"""The report says what the marked text is: which window, which share, which score, by which student."""

import html
import re

import pytest

from tests.utils.report.test_report import RESULTS
from utils.report.html import page
from utils.report.markdown import markdown
from utils.report.results import CHOSEN_BY, chosen_note

TITLE = "Where the teacher is listened to"
VIEW = {
    "window": 1035,
    "windows": 2000,
    "step": 1,
    "share": 0.2,
    "largest_share": 0.2,
    "select_by": "student_entropy",
    "tokens": [["One <day>", True], [" it", True], [" |*was*|", False], ["\n", True], [",", True], [" so", False]],
}


def both(**changes) -> list[str]:
    """Return the section in both forms of the report, as it is read: without markup of the words."""
    results = RESULTS | {"chosen_positions": VIEW | changes}
    in_markdown = markdown(results).partition(TITLE)[2].partition("\n\n|")[0].replace("\\", "")
    in_html = page("a", results).partition(TITLE)[2].partition("<pre")[0]
    return [in_markdown, html.unescape(in_html)]


def test_the_window_the_share_and_the_score_are_told():
    for section in both():
        for words in (
            "The beginning of window 1,035 of 2,000 of the training text, learned from in step 1.",
            "(curriculum.select) is 20 % of the window's positions:",
            "the student, as it is after training, is most in doubt (loss.select_by student_entropy)",
            "Each step of the run chose by the student as it was then.",
        ):
            assert words in section


@pytest.mark.parametrize(("share", "words"), [(0.0001, "0.01 %"), (0.005, "0.5 %"), (1 / 3, "33.3333 %")])
def test_a_small_share_is_not_told_as_none(share, words):
    for section in both(share=share):
        assert f"(curriculum.select) is {words} of" in section


def test_the_smallest_share_of_a_ramp_is_told_as_such():
    for section in both(largest_share=1.0):
        assert "20 % of the window's positions, the least in this run:" in section


def test_a_text_that_was_not_learned_from_is_told_as_such():
    for section in both(step=None):
        assert "which no step of the run learned from." in section
    for section in both(window=None, windows=None, step=None):
        assert "from the beginning of the stream; the run cut its text anew" in section


@pytest.mark.parametrize("score", CHOSEN_BY)
def test_the_student_of_now_is_named_only_where_it_chose(score):
    changes_with_student = score in ("student_entropy", "divergence", "excess_loss")
    for section in both(select_by=score):
        assert f"(loss.select_by {score})" in section
        assert ("as it was then" in section) == ("after training" in section) == changes_with_student


def test_every_score_has_its_words():
    from models.losses.selection import SCORES, STORED

    assert {*CHOSEN_BY} == {*SCORES, STORED}


def test_markdown_marks_the_chosen_tokens_and_shows_the_text_as_it_is():
    row = markdown(RESULTS | {"chosen_positions": VIEW}).partition(TITLE)[2].partition("|---|\n")[2].partition("\n")[0]
    assert row == r"| <b>One &lt;day> it</b> \|\*was\*\|<b><br>,</b> so |"


def test_without_them_there_is_no_section():
    assert chosen_note(RESULTS) == ""
    assert TITLE not in markdown(RESULTS) and TITLE not in page("a", RESULTS)


@pytest.mark.parametrize(
    ("curriculum", "words"),
    [
        ({"balance": "loss"}, "The weights are those in effect: curriculum.balance loss"),
        ({"sample_weights": 0.5}, "The sample spread is the standard deviation"),
    ],
)
def test_the_page_explains_what_the_curves_do_not_say(curriculum, words):
    assert words in page("a", RESULTS, ["<svg></svg>"], {"curriculum": curriculum})
    assert words not in page("a", RESULTS, ["<svg></svg>"], {"curriculum": {"balance": "none", "sample_weights": 0.0}})
    assert not re.search(r'<p class="note"></p>', page("a", RESULTS, ["<svg></svg>"], {}))
