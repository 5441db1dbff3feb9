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
from models.curriculum import CurriculumScheduler
from models.losses import fused_head, hidden_state_terms, losses
from models.student_aware_router import ROUTER_TERMS, StudentAwareRouter
from models.teacher import frozen as teacher_module
from models.teacher.frozen import FrozenTeacher
from models.text import collate as pairing
from models.types import IGNORE
from utils import files
from utils.checks import checklist, miniature
from utils.checks import setup as preflight
from utils.commands import checks as verification
from utils.commands import settings as run_config
from utils.data import delivery as delivery_module
from utils.data import documents as data
from utils.data.stream import beginning
from utils.evaluation import scores
from utils.forecast import disk
from utils.machine import hardware as hardware_module
from utils.machine import kernels, packages
from utils.machine.packages import Package
from utils.pretrained import loading
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
def tiny(tmp_path_factory):
    """Subjects on which the checks on tiny models are measured."""
    return verification.tiny_subjects(tmp_path_factory.mktemp("bench"))


ROWS = {
    row.name: row
    for row in (
        *verification.MACHINE,
        verification.ONE_STEP,
        *verification.CODE,
        *verification.TINY,
        verification.DUPLICATES,
        verification.LEAKAGE,
        verification.COVERAGE,
        *verification.MODELS,
        verification.ROUTER,
        *verification.RESOURCES,
    )
}


def check(name: str, subjects: dict | None = None) -> checklist.Check:
    """Carry out one check of the table."""
    return ROWS[name].check(subjects)


@pytest.fixture(scope="module")
def setup():
    return verification.default_setup(run_config.configure(["--config", "quickstart"])[0])


def command(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """verify_fixes.py in an empty folder, without network."""
    cache = {"CURRICULUM_DISTILLATION_CACHE": str(folder / "cache"), "PYTHONIOENCODING": "utf-8"}
    call = [sys.executable, str(ROOT / "verify_fixes.py"), *flags]
    return subprocess.run(call, cwd=folder, env={**os.environ, **cache}, capture_output=True, text=True, timeout=240)


def test_everything_is_ticked_in_order_and_nothing_is_left_behind(tmp_path):
    done = command(tmp_path, "-v")
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
    tiny = miniature.build(folder)
    return [
        *("--student", str(tiny.student), "--student-init", "random", "--teacher", str(tiny.teacher)),
        *("--train-data", str(tiny.text), "--output-dir", str(folder / "run")),
    ]


def quiet(monkeypatch, cache: Path) -> None:
    """None of the checks on tiny models: main() is tested, not they."""
    monkeypatch.setattr(verification, "TINY", ())
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(cache))


def test_own_set_up_is_checked_and_a_teacher_without_weights_is_found(tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    assert verify_fixes.main(own_flags(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "✓ label shift: your architecture" in out and "✓ window length: 64 tokens" in out
    assert "✗ models: teacher" in out
    # whose states a random student is to learn from
    assert out.splitlines()[-1] == "Not ready: models; router at the start."
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
    # In place of what the set-up names: a second --teacher would be a teacher beside the first.
    words = own_flags(tmp_path)
    flag, name = flags
    words[words.index(flag) + 1] = name
    assert verify_fixes.main(words) == 2
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
    shape = loading.load_config(str(folder / "teacher"), "teacher")
    loading.random_model(shape).save_pretrained(folder / "teacher")
    return flags


def prepared(flags: list[str]):
    return verification.own_setup(run_config.configure(flags)[0])


def test_router_of_the_users_pair_is_measured_where_the_curriculum_uses_it(pair, tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    assert verify_fixes.main([*pair, *ROUTED]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "router at the start" in line]
    assert "✓" in line and all(f" {name} " in line for name in ROUTER_TERMS) and "calibrated on 8 windows" in line
    assert verify_fixes.main([*pair, *ROUTED[:2]]) == 0
    out = capsys.readouterr().out
    assert "router at the start: feat" in out and "contr" not in out.partition("router at the start")[2]
    assert verify_fixes.main([*pair, "--curriculum.feat=0", "--curriculum.attn=0"]) == 0
    assert "router" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "each that is set has an effect"),
        (["--router.span=8"], "router.span 8"),
        (["--curriculum.kd=0", "--loss.temperature=2"], "loss.temperature 2"),
    ],
)
def test_settings_without_effect_are_told(pair, tmp_path, monkeypatch, flags, said):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path))
    setup, _ = prepared([*pair, *flags])
    check = verification.SETTINGS.check({"setup": setup})
    assert check.passed
    assert check.doubtful is bool(flags)
    assert said in check.value


def no_layers() -> None:
    """Stand in for the choice of a student's layers, where the student keeps all of its own."""
    pytest.fail("this student is not cut")


def test_router_that_starts_too_large_or_is_not_a_number_is_found(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path))
    setup, job = prepared([*pair, *ROUTED])
    subjects = {"setup": setup, "job": job, "choose_layers": no_layers}
    with monkeypatch.context() as patch:
        scale_router_terms(patch, contr=lambda *_: math.nan)
        done = check("router at the start", subjects)
        assert not done.passed and "contr nan" in done.value
    plant_summed_channels(monkeypatch)
    done = check("router at the start", subjects)
    assert not done.passed and done.allowed == "2 or less"


def test_router_is_not_measured_where_a_model_is_not_there_yet_or_too_large(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("CURRICULUM_DISTILLATION_CACHE", str(tmp_path))
    setup, job = prepared([*pair, *ROUTED])
    later = replace(setup, built_later=frozenset({setup.config.teacher.name}))
    subjects = {"setup": setup, "job": job, "choose_layers": no_layers}
    done = check("router at the start", {**subjects, "setup": later})
    assert done.passed and done.value == "not measured: the teacher is built by the first run"
    monkeypatch.setattr(preflight, "LARGEST_BUILT", 10)
    assert "too large" in check("router at the start", subjects).value


def test_without_flags_what_train_would_take_is_checked(tmp_path, monkeypatch, capsys):
    quiet(monkeypatch, tmp_path)
    sound = run_config.configure
    default = sound(own_flags(tmp_path))
    monkeypatch.setattr(verify_fixes, "configure", lambda argv: sound(argv) if argv else default)
    assert verify_fixes.main([]) == 1
    out = capsys.readouterr().out
    assert "The default of this machine" in out and "✗ models: teacher" in out


def test_one_step_runs_in_the_precision_of_the_device_and_leaves_the_accelerator_as_it_was(tiny, setup, monkeypatch):
    def one_step(config) -> checklist.Check:
        return check("one step on this device", {**tiny, "config": config})

    done = one_step(setup.config)
    assert done.passed and "4 of 4 taken on cpu, as there is no GPU" in done.value, done
    half = replace(
        setup.config,
        training=replace(setup.config.training, mixed_precision="bf16"),
        teacher=replace(setup.config.teacher, dtype="bfloat16"),
    )
    done = one_step(half)
    assert done.passed and "mixed precision bf16, teacher in bfloat16" in done.value
    accelerator = tiny["bench"].accelerator
    assert accelerator.mixed_precision == "no" and accelerator.device.type == "cpu"
    with monkeypatch.context() as patch:
        patch.setattr(fused_head, "kd_loss", lambda logits, *_, **__: logits.sum() * float("nan"))
        assert not one_step(setup.config).passed
    routed = replace(setup.config, curriculum=CurriculumConfig(**dict.fromkeys(ROUTER_TERMS, Term(0.1))))
    assert one_step(routed).passed
    scale_router_terms(monkeypatch, feat=lambda *_: math.nan)
    without_router = replace(setup.config, curriculum=CurriculumConfig())
    assert one_step(without_router).passed and not one_step(routed).passed


def test_help_is_that_of_the_training_flags_under_its_own_name(capsys):
    with pytest.raises(SystemExit) as ended:
        verify_fixes.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "verify_fixes.py" in out and "--train-data" in out


# --- planted faults -------------------------------------------------------------------------------------------------


def change_batches(monkeypatch, change):
    """Let every batch that the collator makes pass through `change`."""
    collate = pairing.PairCollator.__call__
    monkeypatch.setattr(pairing.PairCollator, "__call__", lambda self, windows: change(collate(self, windows)))


def scale_router_terms(monkeypatch, **factors):
    """Multiply terms of the router by what `factors` make of its student states, teacher states and anchors."""
    sound = StudentAwareRouter.forward

    def scaled(self, student, teacher, anchors, terms):
        sums = sound(self, student, teacher, anchors, terms)
        return {
            name: value * factors.get(name, lambda *_: 1)(student, teacher, anchors) for name, value in sums.items()
        }

    monkeypatch.setattr(StudentAwareRouter, "forward", scaled)


def plant_unshifted_labels(monkeypatch):
    def unshifted(batch):
        return replace(batch, labels=torch.where(batch.labels == IGNORE, IGNORE, batch.student_ids))

    change_batches(monkeypatch, unshifted)


def plant_labels_shifted_twice(monkeypatch):
    sound = distillation_framework.DistillationFramework.forward

    def twice(self, batch, *args, **options):
        rolled = batch.labels.roll(-1, 1)
        rolled[:, -1] = IGNORE
        is_label = rolled.flatten()[batch.supervised] != IGNORE
        batch = replace(batch, labels=rolled, supervised=batch.supervised[is_label])
        return sound(self, batch, *args, **options)

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
    def leaking(model, batches, device, accelerator=None, **options):
        tokens = sum(int((labels != IGNORE).sum()) for _, labels in batches)
        return 0.1 * tokens, tokens

    monkeypatch.setattr(scores, "token_nll", leaking)


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
    change_batches(monkeypatch, lambda batch: replace(batch, counts={**batch.counts, "kd": 0, "depth0": 0}))


def plant_repeating_loader(monkeypatch):
    sound = delivery_module.step_batches

    def repeating(*args, **options):
        batches = list(sound(*args, **options))
        return iter([batches[0], *batches[:-1]])

    monkeypatch.setattr(delivery_module, "step_batches", repeating)


def plant_leaking_split(monkeypatch):
    sound = data.load_documents

    def leaking(config):
        corpus = sound(config)
        return replace(corpus, train=[*corpus.train, f"  {corpus.eval[0]}\n"])

    monkeypatch.setattr(beginning, "load_documents", leaking)


def plant_summed_channels(monkeypatch):
    """The distance of two states, a mean over their channels, becomes a sum."""

    def channels(student, teacher, anchors):
        return teacher[0].shape[-1]

    scale_router_terms(monkeypatch, feat=channels, layer=channels)


def plant_raw_states(monkeypatch):
    """States are neither standardised with the teacher's statistics nor normalised."""
    sound = StudentAwareRouter.calibrate

    def forgetful(self, batches):
        sound(self, batches)
        self.mean.zero_()
        self.scale.fill_(1)

    monkeypatch.setattr(StudentAwareRouter, "calibrate", forgetful)
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda states, shape: states)


def plant_items_counted_as_windows(monkeypatch):
    def by_window(batch):
        return replace(batch, counts={**batch.counts, **dict.fromkeys(ROUTER_TERMS, len(batch.student_ids))})

    change_batches(monkeypatch, by_window)


def plant_relations_summed_over_pairs(monkeypatch):
    def pairs(student, teacher, anchors):
        sampled = anchors.sampled.shape[1]
        return sampled * (sampled - 1) / 2

    scale_router_terms(monkeypatch, rel=pairs)


def plant_attention_not_divided_by_its_keys(monkeypatch):
    scale_router_terms(monkeypatch, attn=lambda student, teacher, anchors: math.log(teacher[0].shape[1]))


def plant_products_for_cosines(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "normalize", lambda x, dim: x)
    monkeypatch.setattr(hidden_state_terms, "SAME_TEXT", math.inf)


def plant_padding_is_a_negative(monkeypatch):
    def one_more(batch):
        empty = int((batch.anchors.queries < 0).all(1).sum())
        return replace(batch, anchors=replace(batch.anchors, runs=batch.anchors.runs + empty))

    change_batches(monkeypatch, one_more)


def plant_padding_is_averaged_with_weight_0(monkeypatch):
    sound = StudentAwareRouter.forward

    def weighted(self, student, teacher, anchors, terms):
        return sound(self, [x + 0 * x.sum((0, 1)) for x in student], teacher, anchors, terms)

    monkeypatch.setattr(StudentAwareRouter, "forward", weighted)


def plant_student_cut_off(monkeypatch):
    """All terms but the relations look at the student's states without teaching it."""
    sound = StudentAwareRouter.forward

    def cut_off(self, student, teacher, anchors, terms):
        relations = sound(self, student, teacher, anchors, terms & {"rel"})
        others = sound(self, [states.detach() for states in student], teacher, anchors, terms - {"rel"})
        return {**relations, **others}

    monkeypatch.setattr(StudentAwareRouter, "forward", cut_off)


def plant_coarse_teacher_states(monkeypatch):
    sound = FrozenTeacher.signal

    def coarse(self, *args):
        signal = sound(self, *args)
        hidden = tuple(x.bfloat16().to(torch.float8_e4m3fn) if x.dtype == torch.float16 else x for x in signal.hidden)
        return replace(signal, hidden=tuple(x.float() for x in hidden))

    monkeypatch.setattr(FrozenTeacher, "signal", coarse)


def plant_hidden_states_of_every_step(monkeypatch):
    def always(model, ids, layers, *more):
        out = model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
        return out.last_hidden_state, tuple(out.hidden_states[layer] for layer in layers)

    monkeypatch.setattr(distillation_framework, "body_layers", always)
    monkeypatch.setattr(teacher_module, "body_layers", always)


def plant_terms_of_weight_0_computed(monkeypatch):
    sound = distillation_framework.DistillationFramework.forward

    def everything(self, batch, step=None, **options):
        return sound(self, batch, step, **{**options, "measure": True})

    monkeypatch.setattr(distillation_framework.DistillationFramework, "forward", everything)


ON_TINY_MODELS = [
    (plant_unshifted_labels, "label shift: copying"),
    (plant_unshifted_labels, "label shift: exactly once"),
    (plant_labels_shifted_twice, "label shift: exactly once"),
    (plant_no_temperature_squared, "T squared in the gradient"),
    (plant_teacher_renormalised_alone, "KD of equal models"),
    (plant_evaluation_sees_the_future, "perplexity of a random model"),
    (plant_student_cast_for_evaluation, "evaluation leaves fp16 as it was"),
    (plant_mean_per_micro_batch, "gradient accumulation"),
    (plant_optimizer_not_restored, "resume"),
    (plant_endless_patience, "early stopping"),
    (plant_student_cut_off, "fp16 teacher, fp32 student"),
    (plant_coarse_teacher_states, "fp16 teacher, fp32 student"),
    (plant_hidden_states_of_every_step, "hidden states at weight 0"),
    (plant_terms_of_weight_0_computed, "hidden states at weight 0"),
    (plant_repeating_loader, "duplicates"),
    (plant_leaking_split, "leakage"),
    (plant_no_anchors, "alignment coverage"),
]


def case_name(value) -> str:
    return value if isinstance(value, str) else value.__name__


@pytest.mark.parametrize("plant, name", ON_TINY_MODELS, ids=case_name)
def test_a_planted_fault_fails_its_check(plant, name, tiny, monkeypatch, capsys):
    _ = tiny["bench"].whole_run  # from sound code
    plant(monkeypatch)
    assert checklist.run([check(name, tiny)]) == 1
    out = capsys.readouterr().out
    assert "✗" in out and "no error" not in out and "→" in out and "Ready" not in out


ON_STATES = [
    (plant_summed_channels, "normalisation: feature"),
    (plant_raw_states, "normalisation: feature"),
    (plant_items_counted_as_windows, "normalisation: feature"),
    (plant_relations_summed_over_pairs, "normalisation: attention relations"),
    (plant_attention_not_divided_by_its_keys, "normalisation: attention alignment"),
    (plant_products_for_cosines, "normalisation: attention alignment"),
    (plant_summed_channels, "normalisation: layer"),
    (plant_raw_states, "normalisation: layer"),
    (plant_products_for_cosines, "normalisation: contrastive"),
    (plant_padding_is_a_negative, "contrastive: a row of padding"),
    (plant_padding_is_averaged_with_weight_0, "contrastive: a row of padding"),
]


@pytest.mark.parametrize("plant, name", ON_STATES, ids=case_name)
def test_a_planted_fault_in_a_hidden_state_term_fails_its_check(plant, name, monkeypatch):
    assert check(name).passed
    plant(monkeypatch)
    done = check(name)
    assert not done.passed and done.allowed != "no error", done


def test_a_schedule_that_does_not_end_with_the_run_is_found(tmp_path, monkeypatch):
    plant_schedule_of_twice_the_length(monkeypatch)
    assert not check("optimizer steps and schedule", verification.tiny_subjects(tmp_path)).passed


def test_a_mean_of_batch_means_is_found(monkeypatch):
    plant_mean_of_means(monkeypatch)
    done = check("perplexity by tokens")
    assert not done.passed and done.value.startswith("4.000")


def test_a_changed_curriculum_is_found_and_named(monkeypatch):
    sound = CurriculumScheduler.weights
    monkeypatch.setattr(CurriculumScheduler, "weights", lambda self, step: sound(self, step) | {"feat": 0.05})
    done = check("curriculum table")
    assert not done.passed and "feat 0.0500 instead of 0.1 at 50.2 %" in done.value


def test_harmful_and_harmless_conflicts_are_told_apart(monkeypatch):
    installed = packages.installed_packages()
    notebook = [Package("google-colab", "1.0", ("numpy<2", "pandas==2.2.2")), Package("numpy", "2.4.6")]
    monkeypatch.setattr(packages, "installed_packages", lambda: installed + notebook)
    done = check("package conflicts")
    assert done.passed and "google-colab wants numpy<2, 2.4.6 is installed" in done.value
    old = [replace(p, version="0.20.0") if p.name == "tokenizers" else p for p in installed]
    monkeypatch.setattr(packages, "installed_packages", lambda: old)
    done = check("package conflicts")
    assert not done.passed and "transformers wants tokenizers" in done.value


def test_machine_that_cannot_hold_the_run_is_found(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware_module, "free_memory", lambda device: 2**20)
    monkeypatch.setattr(files, "free_disk", lambda folder: 2**20)
    assert not check("memory", {"setup": setup}).passed and not check("disk", {"setup": setup}).passed
    monkeypatch.setattr(kernels, "check_kernels", lambda: "install another torch")
    done = check("device and kernels")
    assert not done.passed and done.hint == "install another torch"
    (tmp_path / "file").write_text("")
    in_the_way = replace(setup, config=replace(setup.config, output_dir=str(tmp_path / "file" / "run")))
    assert "is a file" in check("output directory", {"setup": in_the_way}).value


def test_where_there_is_a_cache_memory_is_asked_for_without_the_teacher(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "largest", ", ".join)  # the names of all parts
    # Terms on hidden states need the teacher beside a cache, too.
    setup = replace(setup, config=replace(setup.config, curriculum=CurriculumConfig()))
    cached = replace(setup, config=replace(setup.config, cache=replace(setup.config.cache, folder=str(tmp_path))))
    assert "teacher weights" in preflight.memory(setup).value
    found = preflight.memory(cached).value
    assert "teacher weights" not in found and found.endswith("if the teacher cache is complete")


def test_an_exception_is_a_failed_check_and_not_a_crash(tiny, monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("by zero,\nof all things")

    monkeypatch.setattr(fused_head, "kd_loss", broken)
    assert checklist.run([check("KD of equal models", tiny)]) == 1
    assert "KD of equal models: ZeroDivisionError: by zero, of all things" in capsys.readouterr().out


def test_of_the_projects_own_checks_those_that_fail_are_shown_and_how_many_passed(capsys):
    def result(name: str, passed: bool = True) -> checklist.Check:
        return checklist.Check(name, "1", "1", passed, hint=f"mend {name}")

    items = [
        *("This machine", result("device"), checklist.BriefGroup("This code"), result("one"), result("two", False)),
        *(result("three"), "Your set-up", result("memory")),
    ]
    assert checklist.run(items, shows_all=False) == 1
    brief = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].split(" (")[0].strip() for line in brief[:-2]] == [
        *("This machine", "✓ device", "This code", "✗ two", "→ mend two", "✗ 2 of 3", "Your set-up", "✓ memory"),
    ]
    assert brief[-2].startswith("4 of 5 checks passed")

    assert checklist.run(items) == 1
    assert len(capsys.readouterr().out.splitlines()) == len(brief) + 2 - 1


def test_a_crash_between_checks_is_a_failed_one(monkeypatch, capsys):
    def broken(folder):
        raise OSError("no space left")

    monkeypatch.setattr(miniature, "build", broken)
    assert verify_fixes.main([]) == 1
    out = capsys.readouterr().out
    assert "all further checks: OSError: no space left" in out and "Ready" not in out
