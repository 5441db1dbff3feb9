"""The benchmarks measure what they say they measure."""

import numpy as np
import pytest
import torch

from benchmarks import cache, curricula, measure, peers, quality, situations, step_time
from models.config import LossConfig
from models.curriculum import value_at

CPU = torch.device("cpu")
EXACT = ("online, 256", "256, float32")


@pytest.mark.parametrize("name", ["plain", "fused", "plain-full"])
def test_the_gradient_of_a_variant_is_that_of_its_loss_in_float64(name, tmp_path):
    args = peers.parser("").parse_args(["--tokens", "150", "--width", "8", "--vocabulary", "300", "--top-k", "16"])
    work = peers.Work(peers.VARIANTS[name], peers.Problem(args), tmp_path)
    work()
    errors = work.answer("error")
    assert 0 < max(errors.values()) < 1e-5


def test_peak_memory_sees_what_is_freed_before_the_end():
    size = 64 * 2**20

    def work():
        torch.ones(size // 4).sum()

    measure.measure(work, CPU)
    run = measure.measure(work, CPU)
    if measure._reset_peak() != "VmHWM":
        pytest.skip("the high-water mark cannot be set back here")
    assert 0.98 * size < run.peak < 1.1 * size


def test_random_windows_are_read_by_both_models_and_anchored_nearly_everywhere():
    vocabulary = step_time.vocabulary_map(3000, 1000)
    batch = step_time.random_batch(vocabulary, 2, 64)
    assert batch.student_ids.shape[1] <= 64
    assert batch.counts["lm"] > 100
    assert batch.counts["kd"] >= 0.95 * batch.counts["lm"]
    assert 0 < int((batch.depth > 0).sum()) < batch.counts["kd"] / 2
    assert int(batch.depth.max()) <= LossConfig().max_depth


def test_the_forecast_counts_operations_and_bytes_once():
    a, b = torch.empty(3, 5), torch.empty(5, 7)
    costs = step_time._counted(lambda: (a @ b).view(-1).exp_())
    assert costs.flop == 2 * 3 * 5 * 7
    assert costs.bytes == 4 * (15 + 35 + 21) + 4 * 21
    card = step_time.CARDS["T4"]
    assert np.isclose(costs.seconds(card), costs.bytes / (card.bytes * card.bytes_share))


def test_the_cache_benchmark_sees_what_a_cache_changes_and_what_it_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(step_time, "TEACHER_VOCABULARY", 3000)
    monkeypatch.setattr(step_time, "STUDENT_VOCABULARY", 1000)
    setting = cache.tiny_bodies(48)
    exact = cache.errors(setting, "64, float32", tmp_path / "exact", 1)
    compact = cache.errors(setting, "64", tmp_path / "compact", 1)
    assert exact["error"] == 0 and 0 < compact["error"] < 0.01
    assert exact["kd 1"] < 0 and abs(exact["kd 1"] - compact["kd 1"]) < 1e-3
    assert compact["bytes"] < 0.6 * exact["bytes"] and compact["worst"] <= compact["mass"] < 1
    assert cache.steps(setting, tmp_path / "steps", 1).keys() >= {"LM only", "cached", "online", "ratio"}


def test_a_real_pair_learns_the_same_from_a_cache_as_from_the_running_teacher(real_models_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "stories", lambda share, all_of=quality.stories: (all_of(share)[0][:40], []))
    pair = quality.Pair("neo-260k", 0.01, tmp_path)
    losses = {name: cache.train(pair, name, 3, 2, tmp_path / name)[1] for name in ("online, 64", "64", *EXACT)}
    assert losses["256, float32"] == losses["online, 256"]
    off = {name: np.abs(np.subtract(losses["64"], losses[f"online, {name}"])).max() for name in (64, 256)}
    assert 0 < off[64] < 1e-3 < off[256], "of the running teacher with as many outcomes, and of another loss"


def result(arm: str, seed: int, bits: float, likely: float) -> dict:
    """A line of the results of `benchmarks.situations`."""
    written = {"teacher_bits_per_byte": likely, "repeated_4grams": 0.01, "ended": 0.5, "tokens": 90.0}
    levels = {
        "pair": "neo-260k",
        "share": situations.SHARE,
        "teacher": 0.9,
        "before": 1.1,
        "written_before": written,
        "epochs": 0.5,
    }
    return levels | {"arm": arm, "seed": seed, "bits_per_byte": bits, "written": written}


def test_arms_of_a_situation_are_compared_seed_by_seed():
    runs = [("off", 0, 1.0), ("off", 1, 2.0), ("on", 0, 0.99), ("on", 1, 1.96), ("T 2", 1, 2.2)]
    rows = situations.tables([result(arm, seed, bits, likely=seed + 1.0) for arm, seed, bits in runs]).splitlines()
    cells = {row.split(" | ")[0].removeprefix("| "): row.split(" | ") for row in rows if row.startswith("| ")}
    assert cells["off"][4] == "+0.00%" and cells["T 2"][4] == "+10.00%"
    assert cells["on"][4:6] == ["-1.50%", "-2.00% to -1.00%"] and cells["on"][6] == "1.500"
    assert cells["before training"][6] == "1.000"


def test_every_arm_of_the_plan_exists_for_a_pair_that_exists():
    for part in situations.PLAN:
        assert part.pair in quality.PAIRS and set(part.arms) <= situations.ARMS.keys()
    off, early = situations.ARMS["off"].curriculum, situations.ARMS["early"].curriculum
    assert off.used() == {"kd", "lm"} and early.used() == {"kd", "lm", "feat", "attn"}


@pytest.mark.parametrize("name", curricula.CANDIDATES)
def test_opponents_of_a_schedule_have_its_values(name):
    candidate = curricula.CANDIDATES[name]
    schedule = candidate.schedule
    arms = curricula.arms_of(candidate)
    assert [*arms][-4:] == ["schedule", "mean", "reversed", "shuffled"] and len(arms) == 4 + len(candidate.constants)

    middles = [(piece + 0.5) / curricula.PIECES for piece in range(curricula.PIECES)]
    values = [value_at(schedule, progress) for progress in middles]
    backwards = [value_at(arms["reversed"], progress) for progress in middles]
    assert backwards == pytest.approx(values[::-1], abs=1e-12)
    shuffled = [value_at(arms["shuffled"], progress) for progress in middles]
    assert shuffled != values and sorted(shuffled) == pytest.approx(sorted(values), abs=1e-6)
    assert arms["mean"] == pytest.approx(sum(values) / len(values), abs=0.02)
    for arm in arms.values():
        # Only the weight of KD itself can be 0.
        assert candidate.variant(arm).is_taught or (arm == 0.0 and name == "KD, then text alone")


NAME = "forward to reverse KL"
ARMS = {
    **{f"constant {value:g}": 1.2 for value in curricula.CANDIDATES[NAME].constants},
    "constant 1": 1.0,
    "schedule": 0.9,
    "mean": 1.0,
    "reversed": 1.0,
    "shuffled": 1.0,
    curricula.AS_LONG: 1.0,
}
"""Bits per byte of each arm of a schedule that earns a default."""


def result_of(arm: str, seed: int, bits: float | None, repeated: float | None = 0.1, name: str = NAME) -> dict:
    """A line of the results of `benchmarks.curricula`; seeds differ."""
    setting = {"pair": "a", "share": 1.0, "steps": 10, "size": 4, "schedule": name, "arm": arm, "seed": seed}
    if arm == curricula.AS_LONG:
        setting |= {"constant": "constant 1", "trained_steps": 12}
    figures = {"kl": 0.5, "top1": 0.5, "seconds": 1.0, "bits_per_byte": bits and bits + 0.1 * seed}
    return setting | figures | {"written": {"teacher_bits_per_byte": 1.0, "repeated_4grams": repeated}}


def results_of(seeds: int = 5, arms: dict[str, float | None] = ARMS, **changed: float | None) -> list[dict]:
    return [result_of(arm, seed, bits) for arm, bits in (arms | changed).items() for seed in range(seeds)]


def test_a_schedule_earns_something_only_against_the_best_constant_and_its_reversal():
    def verdict(**bits: float) -> str:
        return curricula.tables(results_of(**bits))

    assert "- bits per byte: -8." in verdict() and verdict().endswith("It earns to be a default.")
    at_least = ({"reversed": 0.9}, {"constant 1": 0.9}, {"mean": 0.9}, {"shuffled": 0.9}, {curricula.AS_LONG: 0.8})
    for worse in (*at_least, {"schedule": 0.997}):
        assert "earns to be a default" not in verdict(**worse)
    assert verdict(shuffled=0.9).endswith("It earns no default.")


@pytest.mark.parametrize("arm", ARMS)
def test_a_schedule_earns_nothing_before_each_opponent_has_run_with_enough_seeds(arm):
    def verdict(lines: list[dict]) -> str:
        return curricula.tables(lines).splitlines()[-1]

    lines = results_of()
    without = verdict([line for line in lines if line["arm"] != arm])
    assert "earns no default before" in without and f"{arm} (0 of 5 seeds)" in without
    few = verdict([line for line in lines if line["arm"] != arm or line["seed"] < 4])
    assert "earns no default before" in few and f"{arm} (4 of 5 seeds)" in few
    other_seeds = [line | {"seed": line["seed"] + 3 * (line["arm"] == arm)} for line in lines]
    assert "(2 of 5 seeds)" in verdict(other_seeds)

    for bits in (float("nan"), None):
        diverged = verdict([*lines, result_of(arm, 5, bits)])
        assert "earns no default before" in diverged and f"{arm} (no finite figures for seed 5)" in diverged
        assert "no finite figures for seed 0, 1, 2, 3, 4" in verdict(results_of(**{arm: bits}))
        assert "earns no default before" in verdict([result_of(arm, seed, bits) for seed in range(5)])


def test_more_seeds_than_are_needed_are_taken():
    assert curricula.tables(results_of(seeds=12)).endswith("It earns to be a default.")


def test_results_without_constants_are_told_and_no_crash():
    shown = curricula.tables([result_of(arm, seed, 1.0, name="another") for arm in ("schedule",) for seed in range(5)])
    assert "not run yet against the best constant" in shown and "before these are there: constants; " in shown


def test_a_verdict_takes_no_seed_twice_and_no_run_as_long_of_another_constant():
    lines = results_of()
    assert curricula.tables([*lines, *lines]) == curricula.tables(lines)

    twice = curricula.tables([*lines, result_of("reversed", 0, 1.5)])
    assert "reversed (a seed ran more than once, with other figures)" in twice
    better = curricula.tables(results_of(**{"constant 0": 0.95}))
    assert better.endswith(f"before these are there: {curricula.AS_LONG} (0 of 5 seeds).")
    longer = [result_of(curricula.AS_LONG, seed, 0.8) | {"trained_steps": 20} for seed in range(5)]
    assert curricula.tables([*lines, *longer]).endswith("It earns no default.")


def test_without_a_constant_that_is_trained_as_long_nothing_is_earned():
    arms = {arm: bits for arm, bits in ARMS.items() if arm != curricula.AS_LONG}
    demands = curricula.Demands(seeds=3, has_equal_time=False)
    assert curricula.tables(results_of(3, arms), demands).endswith("it earns no default.")
    assert "Over as much time nothing was compared" in curricula.tables(results_of(3, arms), demands)
    assert "(2 of 3 seeds)" in curricula.tables(results_of(2, arms), demands)
    assert curricula.tables(results_of(3, arms, shuffled=0.9), demands).endswith("- It earns no default.")


def test_a_schedule_can_earn_by_the_text_that_its_students_write():
    arms = dict.fromkeys(ARMS, 0.2) | {"schedule": 0.18}

    def verdict(bits: float = 1.0, **repeated: float | None) -> str:
        lines = []
        for arm, share in (arms | repeated).items():
            of_arm = bits if arm == "schedule" else 1.0
            lines += [
                result_of(arm, seed, of_arm, None if share is None else share + 0.001 * seed) for seed in range(5)
            ]
        # The best constant in bits per byte, of equal ones, is the first.
        return curricula.tables([line | {"constant": "constant 0"} for line in lines])

    assert "- repeated 4-grams: -2.00% ± 0.00%" in verdict()
    assert verdict().endswith("It earns to be a default.")
    assert verdict(schedule=0.195).endswith("It earns no default.")
    assert "no finite figures for seed 0, 1, 2, 3, 4" in verdict(mean=None)

    # and must not pay for it with another figure
    assert verdict(bits=1.02).endswith("It earns no default.")


def test_a_cut_line_of_results_is_left_out(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text('{"a": 1}\n{"a"')
    assert curricula.read_results(file) == [{"a": 1}]
    curricula.drop_cut_line(file)
    assert file.read_text() == '{"a": 1}\n'
    assert curricula.read_results(tmp_path / "none") == []
