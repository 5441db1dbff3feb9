"""The settings in which a run and its continuation are compared."""

import copy
import logging

import pytest

from utils.config.resume_rules import ADDED, CHANGEABLE, FREE_TO_CHANGE, MICRO_BATCH, check_same_run, identity
from utils.errors import UserError

SETTINGS = {
    "output_dir": "runs/a",
    "training": {"seed": 1, "batch_size": 2, "gradient_accumulation_steps": 8, "deterministic": False},
    "curriculum": {"kd": {"weight": 0.7}, "contr": {"weight": 0}},
    "loss": {"top_k": 8},
    "data": {},
}


def changed(key: str, value: object) -> dict:
    settings = copy.deepcopy(SETTINGS)
    section, _, name = key.rpartition(".")
    inner = settings
    for part in section.split(".") if section else []:
        inner = inner[part]
    inner[name] = value
    return settings


def test_the_three_sets_do_not_contradict_each_other():
    assert MICRO_BATCH <= FREE_TO_CHANGE
    assert not [key for key in FREE_TO_CHANGE if key.startswith(CHANGEABLE)]


@pytest.mark.parametrize("key", sorted(MICRO_BATCH))
@pytest.mark.parametrize("weight", [0.1, {"points": [[0, 0], [1, 0.1]]}])
def test_micro_batches_are_free_only_while_no_term_compares_their_windows(key, weight):
    assert identity(changed(key, 99)) == identity(SETTINGS)
    contrastive = changed("curriculum.contr.weight", weight)
    assert identity(contrastive)[key] == contrastive["training"][key.rpartition(".")[2]]


def test_settings_of_own_text_are_compared_only_where_there_is_any():
    """So that runs which were made before there was such a thing can be continued."""
    rounds = {"every": 50, "stop_on_collapse": False}
    unused = {**changed("curriculum.on_policy", 0), "on_policy": rounds}
    assert identity(unused) == identity(SETTINGS)

    used = {**changed("curriculum.on_policy", {"points": [[0, 0], [1, 1]]}), "on_policy": rounds}
    compared = identity(used).keys() - identity(SETTINGS).keys()
    assert compared == {"curriculum.on_policy", "on_policy.every"}
    check_same_run("run", identity(SETTINGS), identity(used), True)


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("curriculum.balance", "loss"),
        ("curriculum.sample_weights", 0.5),
        ("curriculum.open_text", 0.5),
        ("data.streaming", True),
    ],
)
def test_what_older_runs_had_not_is_compared_only_where_it_is_used(key, other):
    assert identity(changed(key, ADDED[key])) == identity(SETTINGS)
    assert identity(changed(key, other)).keys() - identity(SETTINGS).keys() == {key}


def test_the_names_of_a_mixture_are_free_as_those_of_its_sources_are():
    """Their weights are compared with the text."""
    assert identity(changed("data.mixture", {"here/a.jsonl": 1.0})) == identity(SETTINGS)


def test_a_whole_section_that_is_free_is_not_compared():
    assert identity({**SETTINGS, "logging": {"every": 3}}) == identity(SETTINGS)


def test_a_difference_is_named_with_both_values_and_the_override_only_where_there_is_one():
    with pytest.raises(UserError, match=r"curriculum.kd.weight: 0.7 -> 0.5") as raised:
        check_same_run("run", identity(SETTINGS), identity(changed("curriculum.kd.weight", 0.5)), False)
    assert "resume_changed=true" in str(raised.value)
    with pytest.raises(UserError, match=r"training.seed: 1 -> 2") as raised:
        check_same_run("run", identity(SETTINGS), identity(changed("training.seed", 2)), True)
    assert "resume_changed" not in str(raised.value)


RAMP = {"points": [[0, 0.2], [1, 1]]}


@pytest.mark.parametrize(
    ("key", "other", "line"),
    [
        ("curriculum.balance", "loss", 'curriculum.balance: "none" -> "loss"'),
        ("curriculum.select", RAMP, 'curriculum.select: 1.0 -> {"points": [[0, 0.2], [1, 1]]}'),
        ("curriculum.on_policy", 0.5, "curriculum.on_policy: 0.0 -> 0.5"),
        ("loss.select_by", "divergence", 'loss.select_by: "student_entropy" -> "divergence"'),
        ("training.deterministic", True, "training.deterministic: false -> true"),
        ("served", {"listed": 256}, "served.listed: null -> 256"),
        ("teachers", [{"name": "a"}], "teachers: [] -> [{}]"),
    ],
)
def test_a_setting_that_is_not_compared_at_its_default_is_told_with_it(key, other, line):
    settings = identity(SETTINGS), identity(changed(key, other))
    with pytest.raises(UserError) as raised:
        check_same_run("run", *settings, False)
    assert f"- {line}\n" in str(raised.value)

    name, _, values = line.partition(": ")
    before, _, now = values.partition(" -> ")
    with pytest.raises(UserError) as raised:
        check_same_run("run", *reversed(settings), False)
    assert f"- {name}: {now} -> {before}\n" in str(raised.value)


def test_the_precision_that_was_computed_in_is_compared_and_not_how_it_was_asked_for():
    """`auto` means another one on another device, and may on a newer version."""
    asked = {**changed("training.mixed_precision", "no"), "teacher": {"dtype": "float32"}}
    assert identity(asked) == identity(SETTINGS)

    # as earlier versions wrote it into their checkpoints
    earlier = {
        "training.mixed_precision": "auto",
        "teacher.dtype": "auto",
        "teachers": [{"name": "a", "dtype": "auto"}],
    }
    now = {"teachers": [{"name": "b", "dtype": "float32"}]}
    saved = {**identity(SETTINGS), **earlier, "mixed_precision": "no"}
    current = {**identity({**SETTINGS, **now}), "mixed_precision": "no"}
    check_same_run("run", saved, current, False)

    with pytest.raises(UserError, match=r"computes in: \"no\" -> \"bf16\"[\s\S]*--mixed-precision no computes as"):
        check_same_run("run", saved, {**current, "mixed_precision": "bf16"}, False)


def test_what_another_setting_switches_on_had_no_effect_before():
    used = {**changed("curriculum.on_policy", 0.5), "on_policy": {"every": 50}}
    with pytest.raises(UserError, match=r"on_policy.every: \(without effect\) -> 50"):
        check_same_run("run", identity(SETTINGS), identity(used), False)


def test_a_change_that_is_asked_for_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        check_same_run("run", identity(SETTINGS), identity(changed("loss.top_k", 16)), True)
    assert "loss.top_k: 8 -> 16" in caplog.text


def test_the_length_of_a_servers_lists_counts_once_it_is_set_and_how_it_is_asked_never():
    asked = {"requests": 2, "timeout": 1.0, "patience": 1.0, "key_variable": "KEY"}
    assert identity({**SETTINGS, "served": {**asked, "listed": None}}) == identity(SETTINGS)
    assert identity({**SETTINGS, "served": {**asked, "listed": 256}}) == {**identity(SETTINGS), "served.listed": 256}
