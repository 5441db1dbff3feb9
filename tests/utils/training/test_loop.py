"""The loop: what it logs, when it stops, what it leaves out, and what must not change its result."""

import itertools
import math
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from tests.toy import ToyModule, digest, toy_collate, toy_config, toy_windows, train
from utils.errors import RunError, UserError
from utils.logs.records import read_metrics
from utils.logs.step_logger import StepLogger
from utils.machine.stop_signals import Interrupted, StopSignal
from utils.parallel.accelerator import build_accelerator
from utils.training.checkpoints import CheckpointStore
from utils.training.early_stopping import EarlyStopping
from utils.training.loop import fit
from utils.training.optimizer import build_optimizer, build_scheduler
from utils.training.options import LoopOptions
from utils.training.plan import Plan
from utils.training.red_flags import RedFlags


def evaluation(step: int, bits: float = 2.0) -> dict:
    return {
        "step": step,
        "split": "eval",
        "loss": bits,
        "perplexity": 2.0,
        "bits_per_byte": bits,
        "tokens": 5,
        "bytes": 9,
    }


# --- invariance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 3, 10**6])
def test_logging_more_or_less_often_does_not_change_the_weights(every):
    """The toy module draws random numbers at logged steps only."""
    often, seldom = ToyModule(dropout=0.3), ToyModule(dropout=0.3)
    train(often, toy_config(), every=1)
    train(seldom, toy_config(), every=every)
    assert digest(often) == digest(seldom)


@pytest.mark.parametrize("every", [1, 4])
def test_evaluating_does_not_change_the_weights_nor_the_mode_of_any_part(every):
    plain, evaluated = ToyModule(dropout=0.3), ToyModule(dropout=0.3)
    evaluated.norm.eval()
    modes = []

    def evaluate(step):
        modes.append((evaluated.dropout.training, evaluated.norm.training))
        evaluated.eval()
        torch.rand(10)
        return evaluation(step)

    train(plain, toy_config())
    train(evaluated, toy_config(), evaluate=evaluate, evaluate_every=every)
    assert digest(plain) == digest(evaluated)
    assert set(modes) == {(True, True)} and len(modes) == 6 // every
    assert evaluated.training and evaluated.dropout.training


def test_saving_does_not_change_the_weights(tmp_path):
    plain, saved = ToyModule(dropout=0.3), ToyModule(dropout=0.3)
    train(plain, toy_config())
    train(saved, toy_config(save_every=1), checkpoints=CheckpointStore(tmp_path, keep=2))
    assert digest(plain) == digest(saved)
    assert list(CheckpointStore(tmp_path).steps()) == [6, 5]


def test_workers_do_not_change_the_weights():
    alone, helped = ToyModule(dropout=0.3), ToyModule(dropout=0.3)
    train(alone, toy_config())
    train(helped, toy_config(), num_workers=1)
    assert digest(alone) == digest(helped)


def test_seed_changes_the_run_and_nothing_else_does():
    runs = []
    for seed in (1, 1, 2):
        module = ToyModule(dropout=0.3)
        torch.manual_seed(len(runs))
        train(module, toy_config(seed=seed))
        runs.append(digest(module))
    assert runs[0] == runs[1] != runs[2]


def test_one_accelerator_serves_several_runs():
    accelerator, results = build_accelerator("no", cpu=True), []
    for _ in range(2):
        module = ToyModule(dropout=0.3)
        options = LoopOptions(logger=StepLogger(None, 6, main_process=False))
        fit(module, toy_windows(), toy_collate, toy_config(), accelerator=accelerator, options=options)
        results.append(digest(module))
        assert "forward" not in vars(module)
    assert results[0] == results[1]


def test_accumulation_set_by_the_launcher_does_not_divide_the_gradient(monkeypatch):
    plain, launched = ToyModule(), ToyModule()
    train(plain, toy_config())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    GradientState._reset_state()
    train(launched, toy_config())
    assert digest(plain) == digest(launched)


# --- the record -----------------------------------------------------------------------------------------------------


def test_record_has_the_documented_keys_and_its_arithmetic_holds(tmp_path):
    train(ToyModule(), toy_config(epochs=3), tmp_path, every=3, total=9)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 9]

    for record in records:
        assert list(record) == [
            "step", "epoch", "progress", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_mb",
            "terms", "kd_nats_per_token", "coverage", "top_k", "temperature",
        ]  # fmt: skip
        assert set(record["terms"]) == {"lm", "kd", "span"}
        assert all(list(term) == ["raw", "weight", "weighted", "count"] for term in record["terms"].values())

        assert math.isclose(record["loss"], sum(term["weighted"] for term in record["terms"].values()), rel_tol=1e-5)
        assert record["kd_nats_per_token"] == record["terms"]["kd"]["raw"] / 4
        assert record["coverage"]["anchored"] == 1.0 and 0 < record["coverage"]["depth0"] <= 0.5
        assert record["tokens_per_second"] > 0 and record["peak_memory_mb"] > 0 and record["grad_norm"] > 0

    last = records[-1]
    assert (last["epoch"], last["progress"], last["temperature"], last["top_k"]) == (3.0, 1.0, 2.0, 4)
    assert last["terms"]["kd"]["weight"] == 0.05 * 8  # the module counts steps from 0


@pytest.mark.parametrize("every", [2, 4])
def test_logged_values_are_means_since_the_last_logged_step(tmp_path, every):
    """Twelve steps; `kd` weighs nothing in the first, and 0.05 more in each."""
    for number, folder in ((1, tmp_path / "each"), (every, tmp_path / "means")):
        train(ToyModule(), toy_config(epochs=4), folder, every=number, total=12)
    each, means = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("each", "means"))
    assert [record["step"] for record in means] == list(range(every, 13, every))

    for record in means:
        steps = each[record["step"] - every : record["step"]]
        for key in ("loss", "grad_norm", "kd_nats_per_token"):
            assert record[key] == pytest.approx(sum(step[key] for step in steps) / every, rel=1e-6)
        for name in ("lm", "kd"):
            for key in ("raw", "weighted", "count"):
                mean = sum(step["terms"][name][key] for step in steps) / every
                assert record["terms"][name][key] == pytest.approx(mean, rel=1e-6)
            assert record["terms"][name]["weight"] == steps[-1]["terms"][name]["weight"]
        lm = record["terms"]["lm"]
        assert lm["weighted"] == pytest.approx(lm["weight"] * lm["raw"])
        assert record["loss"] == pytest.approx(sum(term["weighted"] for term in record["terms"].values()), rel=1e-6)
        assert (record["lr"], record["temperature"]) == (steps[-1]["lr"], steps[-1]["temperature"])


def test_a_step_that_is_left_out_is_not_in_the_means(tmp_path):
    for name, steps in (("plain", ()), ("poisoned", {3})):
        train(Poisoned(steps, math.nan), toy_config(), tmp_path / name, every=1 if name == "plain" else 4, total=4)
    plain, poisoned = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "poisoned"))
    assert poisoned[0]["loss"] == pytest.approx(sum(record["loss"] for record in plain[:3]) / 3, rel=1e-6)
    assert poisoned[0]["grad_norm"] == pytest.approx(sum(record["grad_norm"] for record in plain[:3]) / 3, rel=1e-6)


def test_gradient_norm_is_the_one_before_clipping(tmp_path):
    for limit, folder in ((1e9, tmp_path / "free"), (1e-3, tmp_path / "clipped")):
        train(ToyModule(), toy_config(max_steps=1, max_grad_norm=limit), folder)
    free, clipped = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("free", "clipped"))
    assert free["grad_norm"] == clipped["grad_norm"] > 1e-3


def test_counts_of_a_step_are_those_of_its_windows(tmp_path):
    train(ToyModule(), toy_config(epochs=1), tmp_path)
    records = read_metrics(tmp_path / "metrics.jsonl")
    supervised = sum(int((window["labels"] != -100).sum()) for window in toy_windows())
    assert sum(record["terms"]["lm"]["count"] for record in records) == supervised


def test_micro_batch_and_effective_batch_are_logged_once(caplog):
    with caplog.at_level("INFO", "utils"):
        train(ToyModule(), toy_config(batch_size=2, gradient_accumulation_steps=3))
    lines = [record.getMessage() for record in caplog.records if "effective batch" in record.getMessage()]
    assert len(lines) == 1
    assert "micro-batch 2 x accumulation 3 x processes 1 = effective batch of 6 windows" in lines[0]


def test_an_unlogged_step_asks_for_no_measurement():
    measured = []

    class Watching(ToyModule):
        def forward(self, *args, measure=False, **options):
            measured.append(measure)
            return super().forward(*args, measure=measure, **options)

    train(Watching(), toy_config(epochs=1), every=2, total=3)
    assert measured == [False] * 4 + [True] * 4 + [True] * 3  # 4 + 4 + 3 windows; the last step is logged


def test_red_flags_see_every_batch_and_every_record(tmp_path):
    flags = RedFlags(6, 12, warn=lambda _: None)
    train(ToyModule(), toy_config(), tmp_path, windows=[toy_windows()[0]] * 11, flags=flags)
    assert "duplicate_batch" in flags.warned
    assert flags.state_dict()["last_lr"] is not None


# --- optimizer and schedule -----------------------------------------------------------------------------------------


def test_weight_decay_spares_biases_and_norms():
    module = ToyModule()
    module.hidden.weight.requires_grad = False
    decayed, spared = build_optimizer(module, toy_config(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(module.embed.weight)]  # tied: once
    assert {id(p) for p in spared["params"]} == {id(module.hidden.bias), id(module.norm.weight), id(module.norm.bias)}
    with pytest.raises(UserError, match="no parameter"):
        build_optimizer(module.requires_grad_(False), toy_config())


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_learning_rate_rises_over_the_warm_up_and_ends_with_the_last_step(tmp_path, kind):
    train(ToyModule(), toy_config(max_steps=20, warmup_ratio=0.2, scheduler=kind), tmp_path)
    rates = [record["lr"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(rates) == 20
    assert rates[:5] == pytest.approx([0.05 * step / 4 for step in range(5)])
    assert all(a > b for a, b in itertools.pairwise(rates[4:])) and 0 < rates[-1] < 0.05 / 8
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = build_scheduler(optimizer, toy_config(scheduler=kind), 10)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-12)


def test_no_windows_is_a_mistake_of_the_user():
    with pytest.raises(UserError, match="0 training windows"):
        train(ToyModule(), toy_config(), windows=[])


def arguments(**changed) -> dict:
    usual = {"module": ToyModule(), "dataset": toy_windows(4), "collate": toy_collate, "config": toy_config()}
    return usual | {"accelerator": build_accelerator("no", cpu=True)} | changed


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("module", toy_collate, "a DistillationFramework"),
        ("dataset", "stories.txt", "windows by index"),
        ("dataset", {"ids": [1]}, "windows by index"),
        ("dataset", iter([]), "windows by index"),
        ("collate", [], "a function that makes a batch"),
        ("config", {"batch_size": 2}, "a TrainingConfig"),
        ("accelerator", "cpu", "build_accelerator"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(name, wrong, expected):
    with pytest.raises(TypeError, match=rf"{name}: got a \w+, expected .*{expected}"):
        fit(**arguments(**{name: wrong}))


@pytest.mark.parametrize("name", ["evaluate_every", "num_workers"])
def test_negative_numbers_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name}: got -1, expected 0 or more"):
        LoopOptions(**{name: -1})


@pytest.mark.parametrize("options", [{}, {"evaluate_every": 1}, LoopOptions, 3])
def test_options_of_another_kind_are_refused(options):
    with pytest.raises(TypeError, match=r"options: got a .*, expected LoopOptions"):
        fit(ToyModule(), [1, 2], list, toy_config(), accelerator=build_accelerator("no", cpu=True), options=options)


@pytest.mark.parametrize(
    "fields", [{"evaluate_every": "2"}, {"evaluate_every": 1.5}, {"num_workers": None}, {"checkpoints": "/a/folder"}]
)
def test_a_field_of_another_kind_is_refused_before_training(fields):
    with pytest.raises(TypeError, match=f"{next(iter(fields))}: got"):
        LoopOptions(**fields)


def test_a_module_that_does_not_say_whether_it_couples_windows_is_refused():
    with pytest.raises(TypeError, match="module: got a Linear without couples_windows, expected a DistillationFram"):
        fit(**arguments(module=nn.Linear(2, 2)))


def test_without_options_steps_are_logged_on_the_console(caplog):
    with caplog.at_level("INFO", "utils"):
        result = fit(**arguments(config=toy_config(max_steps=2)))
    assert result.steps == 2 and "[TOTAL] step 2/2 loss " in caplog.text


def test_a_batch_size_that_is_not_known_yet_is_refused():
    with pytest.raises(UserError, match="batch_size: got auto, expected a number"):
        fit(**arguments(config=toy_config(batch_size="auto")))


@pytest.mark.parametrize("windows", [1, 3])
def test_a_batch_larger_than_the_data_is_one_step_an_epoch(windows):
    result = train(ToyModule(), toy_config(batch_size=8, epochs=3), windows=toy_windows(windows))
    assert result.steps == 3


# --- gradients that are not finite ----------------------------------------------------------------------------------


class Poisoned(ToyModule):
    """The loss is NaN, or infinite, at the given steps."""

    def __init__(self, steps, value: float) -> None:
        super().__init__()
        self.steps, self.value = steps, value

    def forward(self, batch, step, **options):
        output = super().forward(batch, step, **options)
        return SimpleNamespace(**vars(output) | {"loss": output.loss * (self.value if step in self.steps else 1.0)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_touches_neither_weights_nor_moments(tmp_path, value):
    module, states = Poisoned({3}, value), []

    def evaluate(step):
        states.append(digest(module))

    store = CheckpointStore(tmp_path / "checkpoints", keep=100)
    config = toy_config(save_every=1)
    result = train(module, config, tmp_path, evaluate=evaluate, evaluate_every=1, checkpoints=store)
    assert (result.skipped_steps, result.steps) == (1, 6)
    assert states[3] == states[2] and len(set(states)) == 5
    before, after = (store.load(store.steps()[step]).objects["optimizer"]["state"] for step in (3, 4))
    for index in before:
        assert all(torch.equal(before[index][key], after[index][key]) for key in before[index])
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[3]["grad_norm"] is None and records[4]["grad_norm"] > 0


def test_the_run_stops_after_too_many_in_a_row_with_a_checkpoint_and_says_why(tmp_path):
    module, store = Poisoned(range(2, 1000), float("nan")), CheckpointStore(tmp_path)
    with pytest.raises(RunError, match=r"20 optimizer steps in a row .*\(up to step 22\)"):
        train(module, toy_config(max_steps=100), checkpoints=store)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    kept = store.load(store.newest_whole())
    assert kept.step == 22
    again = ToyModule(seed=5)
    result = train(again, toy_config(max_steps=100), checkpoints=store, resume_from=kept.path)
    assert (result.steps, result.skipped_steps) == (100, 20)  # the cause is gone, so the run goes on


def test_what_is_not_finite_is_named_with_its_documents(caplog):
    class Bad(ToyModule):
        def forward(self, batch, step, **options):
            output = super().forward(batch, step, **options)
            if step == 3 and "d4" in batch.documents:
                output.terms["kd"].sum = output.terms["kd"].sum * math.inf
                output.loss = output.loss + output.weights["kd"] * output.terms["kd"].sum
            return output

    train(Bad(), toy_config(gradient_accumulation_steps=11, max_steps=5))
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert told == ["step 4 left out, number 1: kd is not finite; documents d4"]


def test_scattered_bad_steps_do_not_stop_the_run(caplog):
    module = Poisoned(range(0, 120, 2), float("nan"))
    result = train(module, toy_config(max_steps=120))
    assert (result.skipped_steps, result.stopped_by) == (60, "finished")
    assert 0 < sum("left out" in record.getMessage() for record in caplog.records) <= 21


def test_a_loss_spike_is_counted_and_does_not_stop_the_run(tmp_path, caplog):
    class Jumps(ToyModule):
        def forward(self, batch, step, **options):
            output = super().forward(batch, step, **options)
            output.loss = output.loss * (1e6 if step == 60 else math.nan if step == 50 else 1.0)
            return output

    store = CheckpointStore(tmp_path)
    result = train(Jumps(), toy_config(max_steps=70, learning_rate=1e-6), checkpoints=store)
    assert (result.loss_spikes, result.skipped_steps, result.steps) == (1, 1, 70)
    assert caplog.text.count("loss spike at step 61") == 1
    kept = store.load(store.newest_whole()).state["guard"]
    assert kept["spikes"] == 1 and len(kept["recent"]) == 69 and all(map(math.isfinite, kept["recent"]))


# --- stopping -------------------------------------------------------------------------------------------------------


def test_early_stopping_counts_evaluations_without_a_better_one():
    early = EarlyStopping(patience=2)
    assert [early.update(step, bits) for step, bits in enumerate([2.0, 1.0, 1.0, math.nan])] == [
        True,
        True,
        False,
        False,
    ]
    assert early.exhausted and (early.best, early.best_step) == (1.0, 1)
    never = EarlyStopping(patience=0)
    assert not any(never.update(step, math.nan) for step in range(5)) and not never.exhausted


def test_early_stopping_leaves_the_weights_of_the_best_evaluation(tmp_path):
    module, seen = ToyModule(), {}

    def evaluate(step):
        seen[step] = digest(module)
        return evaluation(step, [0, 3.0, 2.0, 2.5, 2.1, 2.2][step])

    store = CheckpointStore(tmp_path, keep=1)
    result = train(module, toy_config(epochs=9, patience=3), evaluate=evaluate, evaluate_every=1, checkpoints=store)
    assert (result.steps, result.stopped_by, result.best_step, result.best_bits_per_byte) == (
        5,
        "early_stopping",
        2,
        2.0,
    )
    assert digest(module) == seen[2]
    assert list(store.steps()) == [5, 2]


def test_deadline_stops_at_a_step_boundary_and_saves(tmp_path):
    store = CheckpointStore(tmp_path)
    with StopSignal(max_hours=0.0) as stop:
        result = train(ToyModule(), toy_config(), stop=stop, checkpoints=store)
    assert (result.steps, result.stopped_by) == (0, "max_hours")
    assert list(store.steps()) == [0]
    assert StopSignal(max_hours=1.0).requested() is None
    assert StopSignal(max_hours=1.0, started=time.monotonic() - 3601).requested() == "max_hours"
    assert StopSignal().requested() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_obeyed_at_the_next_boundary_and_handlers_come_back(tmp_path, number, capfd):
    former = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    store = CheckpointStore(tmp_path)

    class Signalled(ToyModule):
        def forward(self, batch, step, **options):
            if step == 2:
                os.kill(os.getpid(), number)
            return super().forward(batch, step, **options)

    with StopSignal() as stop:
        result = train(Signalled(), toy_config(), stop=stop, checkpoints=store)
    assert (result.steps, result.stopped_by) == (3, number.name)
    assert list(store.steps()) == [3]
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == former
    assert capfd.readouterr().err.count(f"{number.name}: stopping") == 1


def signal_at(call: int):
    """A check that raises when it is called so often."""
    calls = itertools.count(1)

    def check() -> None:
        if next(calls) == call:
            raise Interrupted("SIGINT")

    return check


@pytest.mark.parametrize(("call", "steps"), [(1, 0), (2, 0), (7, 1), (12, 3)])
@pytest.mark.parametrize("every", [1, 4])
def test_a_step_that_is_broken_off_is_taken_back_and_the_run_goes_on_as_if_nothing_was(tmp_path, call, steps, every):
    """Steps have four micro-batches, the third and sixth have three."""
    plain = ToyModule(dropout=0.3)
    train(plain, toy_config(), tmp_path / "plain", every=every, total=6)

    store = CheckpointStore(tmp_path / "checkpoints")
    first = train(
        ToyModule(dropout=0.3), toy_config(), tmp_path, every=every, total=6, checkpoints=store, check=signal_at(call)
    )
    assert (first.stopped_by, first.steps) == ("SIGINT", steps)

    module, newest = ToyModule(dropout=0.3, seed=9), store.newest_whole()
    assert newest.name == f"step-{first.steps:08d}"
    second = train(
        module, toy_config(), tmp_path, every=every, total=6, checkpoints=store, resume_from=store.steps()[first.steps]
    )
    assert second.stopped_by == "finished" and digest(module) == digest(plain)
    kept, expected = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, tmp_path / "plain"))
    for record in (*kept, *expected):
        del record["tokens_per_second"], record["peak_memory_mb"]
    assert kept == expected


def test_an_evaluation_that_is_broken_off_is_made_by_the_next_session(tmp_path):
    plain, moments = ToyModule(dropout=0.3), []

    def broken(step):
        moments.append(step)
        torch.rand(3)
        if len(moments) == 2:
            raise Interrupted("SIGTERM")
        return evaluation(step, bits=5.0 - step)

    train(plain, toy_config())
    store, module = CheckpointStore(tmp_path / "checkpoints"), ToyModule(dropout=0.3)
    options = {"evaluate": broken, "evaluate_every": 2, "checkpoints": store, "every": 100}
    first = train(module, toy_config(), tmp_path, **options)
    assert (first.stopped_by, first.steps, moments) == ("SIGTERM", 4, [2, 4])
    assert module.training and module.dropout.training

    module = ToyModule(dropout=0.3, seed=9)
    second = train(module, toy_config(), tmp_path, resume_from=store.steps()[4], **options)
    assert moments == [2, 4, 4, 6] and second.best_step == 6 and digest(module) == digest(plain)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 6]


def test_a_second_signal_during_the_save_corrupts_nothing(tmp_path, monkeypatch):
    store, save = CheckpointStore(tmp_path), CheckpointStore.save

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        path = save(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        return path

    monkeypatch.setattr(CheckpointStore, "save", interrupted)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        result = train(ToyModule(), toy_config(), stop=stop, checkpoints=store)
    assert result.stopped_by == "SIGTERM"
    assert CheckpointStore(tmp_path).newest_whole().name == "step-00000000"


def test_outside_the_main_thread_only_the_limit_works():
    seen = []

    def work():
        with StopSignal(max_hours=0.0) as stop:
            seen.append(stop.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["max_hours"]


def test_result_carries_the_last_evaluation_and_the_time():
    result = train(ToyModule(), toy_config(), evaluate=evaluation, evaluate_every=2)
    assert result.evaluation == evaluation(6) and result.seconds > 0
    assert (result.best_step, result.best_bits_per_byte) == (2, 2.0)
    assert train(ToyModule(), toy_config(), evaluate=lambda step: None, evaluate_every=1).evaluation is None


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_bfloat16_computes_in_half_and_keeps_float32_weights(tmp_path):
    module, dtypes = ToyModule(), set()
    module.hidden.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
    logger = StepLogger(tmp_path, 6, 1)
    accelerator = build_accelerator("bf16", cpu=True)
    options = LoopOptions(logger=logger)
    fit(module, toy_windows(), toy_collate, toy_config(), accelerator=accelerator, options=options)
    logger.close()
    assert dtypes == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert all(math.isfinite(record["loss"]) for record in read_metrics(tmp_path / "metrics.jsonl"))


class OverflowsFirst(ToyModule):
    """Its gradient overflows while the scale is above 256, as with fp16."""

    scaler = None

    def forward(self, batch, step, **options):
        output = super().forward(batch, step, **options)
        factor = float("inf") if self.scaler.get_scale() > 256 else 1.0
        return SimpleNamespace(**vars(output) | {"loss": output.loss * factor})


@pytest.mark.usefixtures("fresh_accelerate")
def test_search_for_a_scale_steps_the_schedule_and_not_the_weights(tmp_path):
    """accelerate refuses fp16 on a CPU, but torch's scaler works there: 65,536 -> 256 takes eight skipped steps."""
    accelerator = build_accelerator("no", cpu=True)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    accelerator.state._mixed_precision = "fp16"
    module = OverflowsFirst()
    module.scaler = accelerator.scaler

    store, logger = CheckpointStore(tmp_path / "checkpoints"), StepLogger(tmp_path, 12, 1)
    config = toy_config(max_steps=12, warmup_ratio=0.25)
    options = LoopOptions(logger=logger, checkpoints=store)
    result = fit(module, toy_windows(), toy_collate, config, accelerator=accelerator, options=options)
    logger.close()

    assert result.skipped_steps == 8
    rates = [record["lr"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    risen = [0.05 * step / 3 for step in range(3)]
    fallen = [0.025 * (1 + math.cos(math.pi * step / 9)) for step in range(9)]
    assert rates == pytest.approx(risen + fallen)

    saved = store.load(store.newest_whole())
    assert saved.objects["scaler"]["scale"] == 256
    assert saved.objects["scheduler"]["last_epoch"] == 12
    assert (saved.state["guard"]["in_a_row"], saved.state["guard"]["skipped"]) == (0, 8)

    # The scale comes from the checkpoint: a new scaler begins at 65,536.
    continued = torch.amp.GradScaler("cpu")
    accelerator.scaler = module.scaler = continued
    silent = StepLogger(None, 12, 1, main_process=False)
    options = LoopOptions(logger=silent, checkpoints=store, resume_from=store.newest_whole())
    result = fit(module, toy_windows(), toy_collate, config, accelerator=accelerator, options=options)
    assert result.steps == result.resumed_from == 12 and continued.get_scale() == 256


def test_plan_names_what_may_not_change():
    plan = Plan.of(toy_config(batch_size=2, gradient_accumulation_steps=3), 11)
    assert plan.identity() == {"windows": 11, "windows_per_step": 6, "total_steps": 4}
