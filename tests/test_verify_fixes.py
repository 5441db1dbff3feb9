"""The checklist is ticked on sound code, and each check fails when the fault it is for is planted."""

import contextlib
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import verify_fixes
from models import distillation_framework
from models.config import CurriculumConfig, Term
from models.losses import fused_head, hidden_state_terms, losses
from models.losses.hidden_state_terms import HIDDEN_STATE_TERMS
from models.student_aware_router import ROUTER_TERMS, StudentAwareRouter
from models.teacher import frozen as teacher_module
from models.teacher.frozen import FrozenTeacher
from models.text import collate as pairing
from models.types import IGNORE
from utils import files
from utils.checks import checklist, evaluation, loop, machine
from utils.checks import setup as preflight
from utils.data import delivery as delivery_module
from utils.data import documents as data
from utils.evaluation import scores
from utils.forecast import disk
from utils.machine import hardware as hardware_module
from utils.machine import kernels, packages
from utils.machine.packages import Package
from utils.training import loop as training_loop
from utils.training.early_stopping import EarlyStopping

ROOT = Path(__file__).resolve().parent.parent

NAMES = [
    *("Python and packages", "package conflicts", "device and kernels", "precision"),
    *("one step on this device", "curriculum table"),
    *("perplexity by tokens", "contrastive: a row of padding"),
    *("normalisation: feature", "normalisation: attention relations", "normalisation: attention alignment"),
    *("normalisation: layer", "normalisation: contrastive"),
    *("label shift: fresh student", "label shift: exactly once", "label shift: copying"),
    *("KD of equal models", "T squared in the gradient", "hidden states at weight 0", "fp16 teacher, fp32 student"),
    "perplexity of a random model",
    *("evaluation leaves fp16 as it was", "gradient accumulation", "resume", "optimizer steps and schedule"),
    *("early stopping", "duplicates", "leakage", "alignment coverage", "memory", "disk", "output directory"),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return verify_fixes.Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def setup():
    return verify_fixes.default_setup(verify_fixes.train.configure(["--config", "quickstart"])[0])


def command(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """verify_fixes.py in an empty folder, without network."""
    cache = {"CURRICULUM_DISTILLATION_CACHE": str(folder / "cache"), "PYTHONIOENCODING": "utf-8"}
    call = [sys.executable, str(ROOT / "verify_fixes.py"), *flags]
    return subprocess.run(call, cwd=folder, env={**os.environ, **cache}, capture_output=True, text=True, timeout=240)


def test_everything_is_ticked_in_order_and_nothing_is_left_behind(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    ticked = [line.strip().removeprefix("✓ ") for line in lines if line.startswith("  ✓")]
    assert len(ticked) == len(NAMES)
    for line, name in zip(ticked, NAMES, strict=True):
        assert line.startswith(f"{name}: ") and line.endswith("]")
    assert lines[-1] == "Ready to train!"
    assert list(tmp_path.iterdir()) == []


def own_flags(folder: Path) -> list[str]:
    """A set-up of the user's: the miniature, with random start and text of its own."""
    tiny = verify_fixes.miniature.build(folder)
    return [
        *("--student", str(tiny.student), "--student-init", "random", "--teacher", str(tiny.teacher)),
        *("--train-data", str(tiny.text), "--output-dir", str(folder / "run")),
    ]


def quiet(monkeypatch, cache: Path) -> None:
    """None of the checks on tiny models: main() is tested, not they."""
    monkeypatch.setattr(verify_fixes, "TINY", ())
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(cache))


def test_own_set_up_is_checked_and_a_teacher_without_weights_is_found(tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    assert verify_fixes.main(own_flags(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "✓ label shift: your architecture" in out and "✓ window length: 64 tokens" in out
    assert "✗ models: teacher" in out
    assert out.splitlines()[-1] == "Not ready: models."
    assert not (tmp_path / "run").exists()


def test_real_models_are_ready_to_train(real_models_dir, tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    flags = [
        *("--teacher", str(real_models_dir / "models/tinystories-neo-chat-3m")),
        *("--student", str(real_models_dir / "models/stories260k-llama")),
        *("--train-data", str(real_models_dir / "corpora/tinystories-v2.txt"), "--set", "data.max_documents=200"),
    ]
    monkeypatch.chdir(tmp_path)
    assert verify_fixes.main(flags) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Ready to train!"
    assert "student loads; teacher loads" in out and "window length: 256 tokens" in out


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--techer", "x"], "did you mean --teacher"),
        (["--config", "nothing"], "no such recipe"),
        (["--set", "loss.temperature=0"], "loss: temperatures must be greater than 0"),
    ],
)
def test_a_mistake_of_the_user_is_one_message_and_exit_code_2(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path))
    assert verify_fixes.main([*own_flags(tmp_path), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--teacher", "/nowhere"], "teacher /nowhere: no such folder"),
        (["--train-data", "./nothing.txt"], "nothing.txt"),
    ],
)
def test_what_is_missing_does_not_hide_what_is_wrong_with_the_machine(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "check_kernels", lambda: "install another torch")
    assert verify_fixes.main([*own_flags(tmp_path), *flags]) == 2
    captured = capsys.readouterr()
    assert "✗ device and kernels" in captured.out and "✓ one step on this device" in captured.out
    assert "tiny models" not in captured.out and said in captured.err and "Traceback" not in captured.err


ROUTED = [flag for name in ROUTER_TERMS for flag in ("--set", f"curriculum.{name}.weight=0.1")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Flags of a set-up of the user's, whose teacher has weights."""
    folder = tmp_path_factory.mktemp("pair")
    flags = own_flags(folder)
    torch.manual_seed(0)
    shape = verify_fixes.loading.load_config(str(folder / "teacher"), "teacher")
    verify_fixes.loading.random_model(shape).save_pretrained(folder / "teacher")
    return flags


def prepared(flags: list[str]):
    return verify_fixes.own_setup(verify_fixes.train.configure(flags)[0])


def test_router_of_the_users_pair_is_measured_where_the_curriculum_uses_it(pair, tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    assert verify_fixes.main([*pair, *ROUTED]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "router at the start" in line]
    assert "✓" in line and all(f" {name} " in line for name in ROUTER_TERMS) and "calibrated on 8 windows" in line
    assert verify_fixes.main([*pair, *ROUTED[:2]]) == 0
    out = capsys.readouterr().out
    assert "router at the start: feat" in out and "contr" not in out.partition("router at the start")[2]
    assert verify_fixes.main(pair) == 0
    assert "router" not in capsys.readouterr().out


def test_router_that_starts_too_large_or_is_not_a_number_is_found(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path))
    made = prepared([*pair, *ROUTED])
    with monkeypatch.context() as patch:
        patch.setattr(StudentAwareRouter, "_contrast", lambda self, projected, *_: projected[0].sum() * float("nan"))
        found = verify_fixes.own_router(*made)
        assert not found.passed and "contr nan" in found.value
    plant_summed_channels(monkeypatch)
    found = verify_fixes.own_router(*made)
    assert not found.passed and found.allowed == "2 or less"


def test_router_is_not_measured_where_a_model_is_not_there_yet_or_too_large(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path))
    setup, job = prepared([*pair, *ROUTED])
    later = replace(setup, built_later=frozenset({setup.config.teacher.name}))
    assert verify_fixes.own_router(later, job).value == "not measured: the teacher is built by the first run"
    monkeypatch.setattr(preflight, "LARGEST_BUILT", 10)
    assert "too large" in verify_fixes.own_router(setup, job).value


def test_without_flags_what_train_would_take_is_checked(tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    own = verify_fixes.train.configure(own_flags(tmp_path))
    monkeypatch.setattr(verify_fixes.train, "configure", lambda argv: own)
    monkeypatch.setattr(verify_fixes, "curriculum_table", verify_fixes.machine.versions)
    assert verify_fixes.main([]) == 1
    out = capsys.readouterr().out
    assert "The default of this machine" in out and "✗ models: teacher" in out


def test_one_step_runs_in_the_precision_of_the_device_and_leaves_the_accelerator_as_it_was(bench, setup, monkeypatch):
    found = verify_fixes.loop.one_step(bench, setup.config)
    assert found.passed and "4 of 4 taken on cpu, as there is no GPU" in found.value, found
    half = replace(
        setup.config,
        training=replace(setup.config.training, mixed_precision="bf16"),
        teacher=replace(setup.config.teacher, dtype="bfloat16"),
    )
    found = verify_fixes.loop.one_step(bench, half)
    assert found.passed and "mixed precision bf16, teacher in bfloat16" in found.value
    assert bench.accelerator.mixed_precision == "no" and bench.accelerator.device.type == "cpu"
    with monkeypatch.context() as patch:
        patch.setattr(fused_head, "kd_loss", lambda logits, *_, **__: logits.sum() * float("nan"))
        assert not verify_fixes.loop.one_step(bench, setup.config).passed
    routed = replace(setup.config, curriculum=CurriculumConfig(**dict.fromkeys(ROUTER_TERMS, Term(0.1))))
    assert verify_fixes.loop.one_step(bench, routed).passed
    monkeypatch.setattr(hidden_state_terms, "state_distance", lambda a, b: a.sum(-1) * float("nan"))
    assert (
        verify_fixes.loop.one_step(bench, setup.config).passed and not verify_fixes.loop.one_step(bench, routed).passed
    )


def test_help_is_that_of_the_training_flags_under_its_own_name(capsys):
    assert verify_fixes.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "verify_fixes.py" in out and "--train-data" in out


# --- planted faults -------------------------------------------------------------------------------------------------


def plant_unshifted_labels(monkeypatch):
    collate = pairing.PairCollator.__call__

    def unshifted(self, windows):
        batch = collate(self, windows)
        return replace(batch, labels=torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids))

    monkeypatch.setattr(pairing.PairCollator, "__call__", unshifted)


def plant_labels_shifted_twice(monkeypatch):
    sound = distillation_framework.DistillationFramework.forward

    def twice(self, batch, *rest, **options):
        rolled = batch.labels.roll(-1, 1)
        rolled[:, -1] = IGNORE
        kept = rolled.flatten()[batch.supervised] != IGNORE
        return sound(self, replace(batch, labels=rolled, supervised=batch.supervised[kept]), *rest, **options)

    monkeypatch.setattr(distillation_framework.DistillationFramework, "forward", twice)


def plant_no_temperature_squared(monkeypatch):
    sound = fused_head.kd_loss

    def without(logits, target, *, temperature, **options):
        return sound(logits, target, temperature=temperature, **options) / temperature**2

    monkeypatch.setattr(fused_head, "kd_loss", without)


def plant_teacher_renormalised_alone(monkeypatch):
    sound = losses.outcome_log_probs

    def lopsided(logits, target, tail):
        log_p, log_q = sound(logits, target, tail)
        return log_p[:, : target.ids.shape[1]].log_softmax(1), log_q[:, : target.ids.shape[1]]

    monkeypatch.setattr(losses, "outcome_log_probs", lopsided)
    monkeypatch.setattr(losses, "temper", lambda log_probs, temperature: log_probs / temperature)


def plant_mean_of_means(monkeypatch):
    sound = scores.token_nll

    def means(model, batches, device, accelerator=None, **options):
        parts = [sound(model, [batch], device) for batch in batches]
        tokens = sum(count for _, count in parts)
        return sum(nll / count for nll, count in parts) / len(parts) * tokens, tokens

    monkeypatch.setattr(scores, "token_nll", means)


def plant_evaluation_sees_the_future(monkeypatch):
    monkeypatch.setattr(scores, "_rows_nll", lambda model, inputs, labels: (0.1 * len(labels), len(labels)))


def plant_student_cast_for_evaluation(monkeypatch):
    monkeypatch.setattr(scores, "float32_evaluation", lambda model: contextlib.nullcontext(model.float()))


def plant_mean_per_micro_batch(monkeypatch):
    sound = distillation_framework.DistillationFramework.forward

    def own_counts(self, batch, step=None, *, counts=None, **options):
        return sound(self, batch, step, counts=batch.counts, **options)

    monkeypatch.setattr(distillation_framework.DistillationFramework, "forward", own_counts)


def plant_optimizer_not_restored(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)


def plant_schedule_of_twice_the_length(monkeypatch):
    sound = training_loop.build_scheduler
    monkeypatch.setattr(training_loop, "build_scheduler", lambda o, config, total: sound(o, config, 2 * total))


def plant_endless_patience(monkeypatch):
    monkeypatch.setattr(EarlyStopping, "exhausted", property(lambda self: False))


def plant_no_anchors(monkeypatch):
    collate = pairing.PairCollator.__call__

    def bare(self, windows):
        batch = collate(self, windows)
        return replace(batch, counts={**batch.counts, "kd": 0, "depth0": 0})

    monkeypatch.setattr(pairing.PairCollator, "__call__", bare)


def plant_repeating_loader(monkeypatch):
    sound = delivery_module.step_batches

    def repeating(*args, **options):
        batches = list(sound(*args, **options))
        return iter([batches[0], *batches[:-1]])

    monkeypatch.setattr(delivery_module, "step_batches", repeating)


def plant_leaking_split(monkeypatch):
    sound = data._split

    def leaking(documents, fraction):
        train, held_out = sound(documents, fraction)
        return [*train, f"  {held_out[0]}\n"], held_out

    monkeypatch.setattr(data, "_split", leaking)


def plant_summed_channels(monkeypatch):
    monkeypatch.setattr(hidden_state_terms, "state_distance", lambda a, b: (a - b).square().sum(-1) / 2)


def plant_raw_states(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda x, shape: x)
    monkeypatch.setattr(StudentAwareRouter, "standardise", lambda self, layer, states: states)


def plant_items_counted_as_windows(monkeypatch):
    sound = pairing.count_items

    def windows(anchors):
        return dict.fromkeys(sound(anchors), len(anchors.sampled))

    monkeypatch.setattr(pairing, "count_items", windows)


def plant_relations_summed_over_pairs(monkeypatch):
    def summed(a, b, mask):
        return 1 - ((a - b).square() * mask).sum(-1)

    monkeypatch.setattr(hidden_state_terms, "masked_correlation", summed)


def plant_attention_not_divided_by_its_keys(monkeypatch):
    sound = HIDDEN_STATE_TERMS["attn"]

    def undivided(states):
        return sound.loss(states) * math.log(states.teacher[0].shape[1])

    monkeypatch.setitem(HIDDEN_STATE_TERMS, "attn", sound._replace(loss=undivided))


def plant_products_for_cosines(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "normalize", lambda x, dim: x)
    monkeypatch.setattr(hidden_state_terms, "SAME_TEXT", math.inf)


def plant_padding_is_a_negative(monkeypatch):
    sound = pairing.collect_anchors

    def one_more(*args):
        anchors = sound(*args)
        return replace(anchors, runs=anchors.runs + int((anchors.sampled < 0).all(1).sum()))

    monkeypatch.setattr(pairing, "collect_anchors", one_more)


def plant_padding_is_averaged_with_weight_0(monkeypatch):
    sound = StudentAwareRouter.forward

    def weighted(self, student, teacher, anchors, terms):
        return sound(self, [x + 0 * x.sum((0, 1)) for x in student], teacher, anchors, terms)

    monkeypatch.setattr(StudentAwareRouter, "forward", weighted)


def plant_student_cut_off(monkeypatch):
    sound = StudentAwareRouter.project
    monkeypatch.setattr(StudentAwareRouter, "project", lambda self, layer, x: sound(self, layer, x.detach()))


def plant_coarse_teacher_states(monkeypatch):
    sound = FrozenTeacher.signal

    def coarse(self, *args):
        signal = sound(self, *args)
        hidden = tuple(x.bfloat16().to(torch.float8_e4m3fn) if x.dtype == torch.float16 else x for x in signal.hidden)
        return replace(signal, hidden=tuple(x.float() for x in hidden))

    monkeypatch.setattr(FrozenTeacher, "signal", coarse)


def plant_hidden_states_of_every_step(monkeypatch):
    def always(model, ids, layers, source):
        out = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
        return out.last_hidden_state, tuple(out.hidden_states[layer] for layer in layers)

    monkeypatch.setattr(distillation_framework, "body_layers", always)
    monkeypatch.setattr(teacher_module, "body_layers", always)


def plant_terms_of_weight_0_computed(monkeypatch):
    sound = distillation_framework.DistillationFramework.forward

    def everything(self, batch, step=None, **options):
        return sound(self, batch, step, **(options | {"measure": True}))

    monkeypatch.setattr(distillation_framework.DistillationFramework, "forward", everything)


ON_BENCH = [
    (plant_unshifted_labels, verify_fixes.copying),
    (plant_unshifted_labels, verify_fixes.shifted_once),
    (plant_labels_shifted_twice, verify_fixes.shifted_once),
    (plant_no_temperature_squared, verify_fixes.temperature_squared),
    (plant_teacher_renormalised_alone, verify_fixes.equal_models),
    (plant_evaluation_sees_the_future, evaluation.random_perplexity),
    (plant_student_cast_for_evaluation, evaluation.dtype_round_trip),
    (plant_mean_per_micro_batch, loop.accumulation),
    (plant_optimizer_not_restored, loop.resume),
    (plant_endless_patience, loop.early_stopping),
    (plant_student_cut_off, loop.half_teacher),
    (plant_coarse_teacher_states, loop.half_teacher),
    (plant_hidden_states_of_every_step, verify_fixes.hidden_states),
    (plant_terms_of_weight_0_computed, verify_fixes.hidden_states),
]


@pytest.mark.parametrize("plant, measure", ON_BENCH, ids=lambda f: f.__name__)
def test_a_planted_fault_fails_its_check(plant, measure, bench, monkeypatch, capsys):
    _ = bench.whole_run  # from sound code
    plant(monkeypatch)
    assert checklist.run([measure(bench)]) == 1
    out = capsys.readouterr().out
    assert "✗" in out and "no error" not in out and "→" in out and "Ready" not in out


ON_JOB = [
    (plant_repeating_loader, preflight.duplicates),
    (plant_leaking_split, preflight.leakage),
    (plant_no_anchors, preflight.coverage),
]


@pytest.mark.parametrize("plant, measure", ON_JOB, ids=lambda f: f.__name__)
def test_a_planted_fault_in_the_data_fails_its_check(plant, measure, bench, monkeypatch):
    plant(monkeypatch)
    found = measure(bench.job)
    assert not found.passed and found.allowed != "no error"


FEATURE, RELATIONS, ALIGNMENT, LAYER, CONTRASTIVE = verify_fixes.NORMALISED
ON_STATES = [
    (plant_summed_channels, FEATURE),
    (plant_raw_states, FEATURE),
    (plant_items_counted_as_windows, FEATURE),
    (plant_relations_summed_over_pairs, RELATIONS),
    (plant_attention_not_divided_by_its_keys, ALIGNMENT),
    (plant_products_for_cosines, ALIGNMENT),
    (plant_summed_channels, LAYER),
    (plant_raw_states, LAYER),
    (plant_products_for_cosines, CONTRASTIVE),
    (plant_padding_is_a_negative, verify_fixes.padding_row),
    (plant_padding_is_averaged_with_weight_0, verify_fixes.padding_row),
]


@pytest.mark.parametrize("plant, measure", ON_STATES, ids=lambda f: f.__name__)
def test_a_planted_fault_in_a_hidden_state_term_fails_its_check(plant, measure, monkeypatch):
    assert measure().passed
    plant(monkeypatch)
    found = measure()
    assert not found.passed and found.allowed != "no error", found


def test_a_schedule_that_does_not_end_with_the_run_is_found(tmp_path, monkeypatch):
    plant_schedule_of_twice_the_length(monkeypatch)
    assert not loop.optimizer_steps(verify_fixes.Bench(tmp_path)).passed


def test_a_mean_of_batch_means_is_found(monkeypatch):
    plant_mean_of_means(monkeypatch)
    found = evaluation.weighted_perplexity()
    assert not found.passed and found.value.startswith("4.000")


def test_a_changed_curriculum_is_found_and_named(monkeypatch):
    sound = verify_fixes.CurriculumScheduler.weights
    changed = lambda self, step: sound(self, step) | {"feat": 0.05}  # noqa: E731
    monkeypatch.setattr(verify_fixes.CurriculumScheduler, "weights", changed)
    found = verify_fixes.curriculum_table()
    assert not found.passed and "feat 0.0500 instead of 0.1 at 50.2 %" in found.value


def test_harmful_and_harmless_conflicts_are_told_apart(monkeypatch):
    installed = packages.installed_packages()
    notebook = [Package("google-colab", "1.0", ("numpy<2", "pandas==2.2.2")), Package("numpy", "2.4.6")]
    monkeypatch.setattr(packages, "installed_packages", lambda: installed + notebook)
    found = machine.conflicts()
    assert found.passed and "google-colab wants numpy<2, 2.4.6 is installed" in found.value
    old = [replace(p, version="0.20.0") if p.name == "tokenizers" else p for p in installed]
    monkeypatch.setattr(packages, "installed_packages", lambda: old)
    found = machine.conflicts()
    assert not found.passed and "transformers wants tokenizers" in found.value


def test_machine_that_cannot_hold_the_run_is_found(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware_module, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(files, "free_disk", lambda folder: 2**20)
    assert not preflight.memory(setup).passed and not preflight.disk(setup).passed
    monkeypatch.setattr(kernels, "check_kernels", lambda: "install another torch")
    found = machine.kernels()
    assert not found.passed and found.hint == "install another torch"
    (tmp_path / "file").write_text("")
    in_the_way = replace(setup, config=replace(setup.config, output_dir=str(tmp_path / "file" / "run")))
    assert "is a file" in preflight.output_directory(in_the_way).value


def test_where_there_is_a_cache_memory_is_asked_for_without_the_teacher(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "largest", ", ".join)  # the names of all parts
    cached = replace(setup, config=replace(setup.config, cache=replace(setup.config.cache, folder=str(tmp_path))))
    assert "teacher weights" in preflight.memory(setup).value
    found = preflight.memory(cached).value
    assert "teacher weights" not in found and found.endswith("if the teacher cache is complete")


def test_an_exception_is_a_failed_check_and_not_a_crash(bench, monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("by zero,\nof all things")

    monkeypatch.setattr(fused_head, "kd_loss", broken)
    assert checklist.run([verify_fixes.equal_models(bench)]) == 1
    assert "KD of equal models: ZeroDivisionError: by zero, of all things" in capsys.readouterr().out


def test_a_crash_between_checks_is_a_failed_one(monkeypatch, capsys):
    def broken(folder):
        raise OSError("no space left")

    monkeypatch.setattr(verify_fixes, "Bench", broken)
    assert verify_fixes.main([]) == 1
    out = capsys.readouterr().out
    assert "all further checks: OSError: no space left" in out and "Ready" not in out
