"""Signs of a student that loses itself: raised by rounds that show them, and by no others."""

import random

import pytest

from utils.on_policy.warning_signs import COMPARED, WarningSigns

HEALTHY = {
    "texts": 100,
    "ended": 0.4,
    "given_ended": 0.5,
    "tokens": 60.0,
    "commonest_token": 0.06,
    "empty": 0.0,
    "teacher_bits_per_byte": 1.2,
}


def signs_of(*rounds: dict) -> tuple[list[str], list[str]]:
    """The signs that the last of some rounds shows, and all warnings."""
    warnings: list[str] = []
    signs = WarningSigns(warnings.append)
    shown: list[str] = []
    for step, figures in enumerate(rounds):
        shown = signs.check(HEALTHY | {"step": step} | figures)
    return shown, warnings


def test_healthy_rounds_show_none():
    wandering = [{"tokens": 60 + (-1) ** n * n, "teacher_bits_per_byte": 1.2 + 0.2 * (-1) ** n} for n in range(20)]
    assert signs_of(*wandering) == ([], [])
    # of a run that neither gained nor lost
    bits = [1.82, 1.83, 1.81, 1.90, 1.94, 1.65, 1.87, 1.89, 1.89, 1.96]
    assert signs_of(*[{"teacher_bits_per_byte": value} for value in bits]) == ([], [])


def test_a_growth_with_breaks_is_seen():
    # of a run whose student got 6 % worse on given text; one more round than that
    bits = [1.82, 1.85, 2.03, 2.19, 2.13, 2.45, 2.39, 2.27, 2.30, 2.60]
    shown, warnings = signs_of(*[{"teacher_bits_per_byte": value} for value in bits])
    assert shown == ["unlikely"] and len(warnings) == 1


@pytest.mark.parametrize(
    ("name", "rounds", "cause"),
    [
        ("no_ends", [{"ended": 0.0}] * 2, "instruct teacher's template"),
        ("longer", [{"tokens": 50 * 1.15**n} for n in range(2 * COMPARED)], "learning rate"),
        ("one_token", [{"commonest_token": 0.7}], "70% of the tokens"),
        ("empty", [{"empty": 0.9}], "ends at once"),
        ("repeats", [{"repeated_4grams": 0.9}], "90% of the student's 4-grams"),
        ("broken", [{"broken": 0.6}], "the end of a base model"),
        ("no_ends", [*[{}] * 3, *[{"ended": 0.05}] * 3], "ever fewer"),
        ("unlikely", [{"teacher_bits_per_byte": 1.07**n} for n in range(2 * COMPARED)], "1.000, 1.070, 1.145"),
        ("unlikely", [{"teacher_bits_per_byte": 1.2}, {"teacher_bits_per_byte": 2.5}], "1.200, 2.500"),
    ],
)
def test_a_sign_is_told_once_with_its_cause_and_seen_as_long_as_it_lasts(name, rounds, cause):
    shown, warnings = signs_of(*rounds)
    assert shown == [name]
    assert len(warnings) == 1 and warnings[0].startswith("[RED FLAG]") and cause in warnings[0]

    # one round less, or one that breaks the row, shows none
    assert signs_of(*rounds[:-1]) == ([], []) and signs_of(*rounds[:-1], {})[0] == []
    assert len(signs_of(*rounds, rounds[-1])[1]) == 1


def test_a_student_whose_given_texts_do_not_end_either_is_no_sign():
    assert signs_of(*[{"ended": 0.0, "given_ended": 0.1}] * 5) == ([], [])


@pytest.mark.parametrize("name", ["teacher_bits_per_byte", "tokens"])
def test_a_slow_change_over_many_rounds_is_seen(name):
    sign = {"teacher_bits_per_byte": "unlikely", "tokens": "longer"}[name]
    assert signs_of(*[{name: HEALTHY[name] * 1.01**n} for n in range(100)])[0] == [sign]
    assert signs_of(*[{name: HEALTHY[name] * 1.002**n} for n in range(100)]) == ([], [])


def test_rounds_of_few_texts_are_looked_at_together():
    rounds = [{"texts": 6, "teacher_bits_per_byte": bits, "tokens": 40.0} for bits in (1.0, 1.1, 1.2, 3.0, 3.0, 3.0)]
    assert signs_of(*rounds[:5]) == ([], []), "two looks are of 18 texts each"
    shown, warnings = signs_of(*rounds)
    assert shown == ["unlikely"]
    assert "1.100, 3.000" in warnings[0]


def test_a_student_that_ends_few_texts_is_no_sign():
    """None of 16 texts ends in every fifth round of a student that ends one in ten."""
    draw = random.Random(0)
    rounds = []
    for _ in range(60):
        ended = sum(draw.random() < 0.1 for _ in range(16)) / 16
        rounds.append({"texts": 16, "ended": ended, "given_ended": 0.25})
    assert any(figures["ended"] == 0 for figures in rounds)
    assert signs_of(*rounds)[1] == []
    assert signs_of(*[figures | {"ended": 0.0} for figures in rounds])[0] == ["no_ends"]


def test_few_texts_say_nothing():
    assert signs_of(*[{"texts": 3, "ended": 0.0, "commonest_token": 1.0, "empty": 1.0}] * 5) == ([], [])


def test_figures_that_could_not_be_measured_are_left_out():
    assert signs_of(*[{"teacher_bits_per_byte": None}] * 5) == ([], [])


def test_signs_go_on_where_a_checkpoint_was_saved():
    def round_of(number: int) -> dict:
        return HEALTHY | {"step": number, "tokens": 20 * 1.2**number, "commonest_token": 0.9}

    first = WarningSigns(lambda message: None)
    last = 2 * COMPARED - 1
    for n in range(last):
        assert first.check(round_of(n)) == ["one_token"]
    warnings: list[str] = []
    second = WarningSigns(warnings.append)
    second.load_state_dict(first.state_dict())
    # the same round is looked at again where a run goes on at its begin
    for _ in range(2):
        assert second.check(round_of(last)) == ["longer", "one_token"] and len(warnings) == 1
