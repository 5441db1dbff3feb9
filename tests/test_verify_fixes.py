"""The checklist is ticked on sound code, and each check fails when the fault it is for is planted."""

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import models.losses
import models.pairing
import utils.training
import verify_fixes
from models import distillation_framework
from models.outputs import IGNORE
from utils import checklist, data, environment, evaluation, forecast, hardware, preflight
from utils.environment import Package
from utils.stopping import EarlyStopping

ROOT = Path(__file__).resolve().parent.parent

NAMES = [
    *("Python and packages", "package conflicts", "device and kernels", "precision"),
    *("one step on this device", "curriculum table"),
    *("perplexity by tokens", "label shift: fresh student", "label shift: exactly once", "label shift: copying"),
    *("KD of equal models", "T squared in the gradient", "perplexity of a random model"),
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
    monkeypatch.setattr(hardware, "check_kernels", lambda: "install another torch")
    assert verify_fixes.main([*own_flags(tmp_path), *flags]) == 2
    captured = capsys.readouterr()
    assert "✗ device and kernels" in captured.out and "✓ one step on this device" in captured.out
    assert "tiny models" not in captured.out and said in captured.err and "Traceback" not in captured.err


def test_without_flags_what_train_would_take_is_checked(tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    own = verify_fixes.train.configure(own_flags(tmp_path))
    monkeypatch.setattr(verify_fixes.train, "configure", lambda argv: own)
    monkeypatch.setattr(verify_fixes, "curriculum_table", verify_fixes.preflight.versions)
    assert verify_fixes.main([]) == 1
    out = capsys.readouterr().out
    assert "The default of this machine" in out and "✗ models: teacher" in out


def test_one_step_runs_in_the_precision_of_the_device_and_leaves_the_accelerator_as_it_was(bench, setup, monkeypatch):
    found = verify_fixes.one_step(bench, setup.config)
    assert found.passed and "4 of 4 taken on cpu, as there is no GPU" in found.value, found
    half = replace(
        setup.config,
        training=replace(setup.config.training, mixed_precision="bf16"),
        teacher=replace(setup.config.teacher, dtype="bfloat16"),
    )
    found = verify_fixes.one_step(bench, half)
    assert found.passed and "mixed precision bf16, teacher in bfloat16" in found.value
    assert bench.accelerator.mixed_precision == "no" and bench.accelerator.device.type == "cpu"
    monkeypatch.setattr(distillation_framework, "kd_loss", lambda logits, *_, **__: logits.sum() * float("nan"))
    assert not verify_fixes.one_step(bench, setup.config).passed


def test_help_is_that_of_the_training_flags_under_its_own_name(capsys):
    assert verify_fixes.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "verify_fixes.py" in out and "--train-data" in out


# --- planted faults -------------------------------------------------------------------------------------------------


def plant_unshifted_labels(monkeypatch):
    collate = models.pairing.PairCollator.__call__

    def unshifted(self, windows):
        batch = collate(self, windows)
        return replace(batch, labels=torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids))

    monkeypatch.setattr(models.pairing.PairCollator, "__call__", unshifted)


def plant_labels_shifted_twice(monkeypatch):
    sound = distillation_framework.DistillationFramework._supervised_logits

    def twice(self, batch):
        rolled = batch.labels.roll(-1, 1)
        rolled[:, -1] = IGNORE
        return sound(self, replace(batch, labels=rolled))

    monkeypatch.setattr(distillation_framework.DistillationFramework, "_supervised_logits", twice)


def plant_no_temperature_squared(monkeypatch):
    sound = distillation_framework.kd_loss

    def without(logits, target, *, temperature, **options):
        return sound(logits, target, temperature=temperature, **options) / temperature**2

    monkeypatch.setattr(distillation_framework, "kd_loss", without)


def plant_teacher_renormalised_alone(monkeypatch):
    sound = models.losses.outcome_log_probs

    def lopsided(logits, target, tail):
        log_p, log_q = sound(logits, target, tail)
        return log_p[:, : target.ids.shape[1]].log_softmax(1), log_q[:, : target.ids.shape[1]]

    monkeypatch.setattr(models.losses, "outcome_log_probs", lopsided)
    monkeypatch.setattr(models.losses, "temper", lambda log_probs, temperature: log_probs / temperature)


def plant_mean_of_means(monkeypatch):
    sound = evaluation.token_nll

    def means(model, batches, device, accelerator=None):
        parts = [sound(model, [batch], device) for batch in batches]
        tokens = sum(count for _, count in parts)
        return sum(nll / count for nll, count in parts) / len(parts) * tokens, tokens

    monkeypatch.setattr(evaluation, "token_nll", means)


def plant_evaluation_sees_the_future(monkeypatch):
    monkeypatch.setattr(evaluation, "_rows_nll", lambda model, ids, mask, labels: (0.1 * len(ids), len(ids)))


def plant_student_cast_for_evaluation(monkeypatch):
    monkeypatch.setattr(evaluation, "float32_evaluation", lambda model: contextlib.nullcontext(model.float()))


def plant_mean_per_micro_batch(monkeypatch):
    sound = distillation_framework.DistillationFramework.forward

    def own_counts(self, batch, step=None, *, counts=None, **options):
        return sound(self, batch, step, counts=batch.counts, **options)

    monkeypatch.setattr(distillation_framework.DistillationFramework, "forward", own_counts)


def plant_optimizer_not_restored(monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", lambda self, state: None)


def plant_schedule_of_twice_the_length(monkeypatch):
    sound = utils.training.build_scheduler
    monkeypatch.setattr(utils.training, "build_scheduler", lambda o, config, total: sound(o, config, 2 * total))


def plant_endless_patience(monkeypatch):
    monkeypatch.setattr(EarlyStopping, "exhausted", property(lambda self: False))


def plant_no_anchors(monkeypatch):
    collate = models.pairing.PairCollator.__call__

    def bare(self, windows):
        batch = collate(self, windows)
        return replace(batch, counts={**batch.counts, "kd": 0, "depth0": 0})

    monkeypatch.setattr(models.pairing.PairCollator, "__call__", bare)


def plant_repeating_loader(monkeypatch):
    sound = data.step_batches

    def repeating(*args, **options):
        batches = list(sound(*args, **options))
        return iter([batches[0], *batches[:-1]])

    monkeypatch.setattr(data, "step_batches", repeating)


def plant_leaking_split(monkeypatch):
    sound = data._split

    def leaking(documents, fraction):
        train, held_out = sound(documents, fraction)
        return [*train, f"  {held_out[0]}\n"], held_out

    monkeypatch.setattr(data, "_split", leaking)


ON_BENCH = [
    (plant_unshifted_labels, verify_fixes.copying),
    (plant_unshifted_labels, verify_fixes.shifted_once),
    (plant_labels_shifted_twice, verify_fixes.shifted_once),
    (plant_no_temperature_squared, verify_fixes.temperature_squared),
    (plant_teacher_renormalised_alone, verify_fixes.equal_models),
    (plant_evaluation_sees_the_future, verify_fixes.random_perplexity),
    (plant_student_cast_for_evaluation, verify_fixes.dtype_round_trip),
    (plant_mean_per_micro_batch, verify_fixes.accumulation),
    (plant_optimizer_not_restored, verify_fixes.resume),
    (plant_endless_patience, verify_fixes.early_stopping),
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
    (plant_no_anchors, verify_fixes.coverage),
]


@pytest.mark.parametrize("plant, measure", ON_JOB, ids=lambda f: f.__name__)
def test_a_planted_fault_in_the_data_fails_its_check(plant, measure, bench, monkeypatch):
    plant(monkeypatch)
    found = measure(bench.job)
    assert not found.passed and found.allowed != "no error"


def test_a_schedule_that_does_not_end_with_the_run_is_found(tmp_path, monkeypatch):
    plant_schedule_of_twice_the_length(monkeypatch)
    assert not verify_fixes.optimizer_steps(verify_fixes.Bench(tmp_path)).passed


def test_a_mean_of_batch_means_is_found(monkeypatch):
    plant_mean_of_means(monkeypatch)
    found = preflight.weighted_perplexity()
    assert not found.passed and found.value.startswith("4.000")


def test_a_changed_curriculum_is_found_and_named(monkeypatch):
    sound = verify_fixes.CurriculumScheduler.weights
    changed = lambda self, step: sound(self, step) | {"feat": 0.05}  # noqa: E731
    monkeypatch.setattr(verify_fixes.CurriculumScheduler, "weights", changed)
    found = verify_fixes.curriculum_table()
    assert not found.passed and "feat 0.0500 instead of 0.1 at 50.2 %" in found.value


def test_harmful_and_harmless_conflicts_are_told_apart(monkeypatch):
    installed = environment.installed_packages()
    notebook = [Package("google-colab", "1.0", ("numpy<2", "pandas==2.2.2")), Package("numpy", "2.4.6")]
    monkeypatch.setattr(environment, "installed_packages", lambda: installed + notebook)
    found = preflight.conflicts()
    assert found.passed and "google-colab wants numpy<2, 2.4.6 is installed" in found.value
    old = [replace(p, version="0.20.0") if p.name == "tokenizers" else p for p in installed]
    monkeypatch.setattr(environment, "installed_packages", lambda: old)
    found = preflight.conflicts()
    assert not found.passed and "transformers wants tokenizers" in found.value


def test_machine_that_cannot_hold_the_run_is_found(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(forecast, "free_disk", lambda folder: 2**20)
    assert not preflight.memory(setup).passed and not preflight.disk(setup).passed
    monkeypatch.setattr(hardware, "check_kernels", lambda: "install another torch")
    found = preflight.kernels()
    assert not found.passed and found.hint == "install another torch"
    (tmp_path / "file").write_text("")
    in_the_way = replace(setup, config=replace(setup.config, output_dir=str(tmp_path / "file" / "run")))
    assert "is a file" in preflight.output_directory(in_the_way).value


def test_an_exception_is_a_failed_check_and_not_a_crash(bench, monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("by zero,\nof all things")

    monkeypatch.setattr(distillation_framework, "kd_loss", broken)
    assert checklist.run([verify_fixes.equal_models(bench)]) == 1
    assert "KD of equal models: ZeroDivisionError: by zero, of all things" in capsys.readouterr().out


def test_a_crash_between_checks_is_a_failed_one(monkeypatch, capsys):
    def broken(folder):
        raise OSError("no space left")

    monkeypatch.setattr(verify_fixes, "Bench", broken)
    assert verify_fixes.main([]) == 1
    out = capsys.readouterr().out
    assert "all further checks: OSError: no space left" in out and "Ready" not in out
