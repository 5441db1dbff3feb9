"""The real program, killed and interrupted: what it leaves is taken up again, and the student is the same bit for bit.

Four moments are tried, twenty with -m slow. Set KILL_SEED to kill at others.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train
from tests.faults.conftest import Place, documents, write_jsonl
from utils.logs.records import read_metrics
from utils.run import stages
from utils.run.quickstart import train_tokenizer
from utils.run_layout import FILES, FOLDERS, LOCK

ROOT = Path(__file__).resolve().parents[2]
MEASURED_ANEW = {"tokens_per_second", "peak_memory_mb"}
"""What may differ in metrics.jsonl."""
PATIENCE = 120
"""Seconds for a session to get as far as it must."""


class Session:
    """`python train.py ...`, or another script, in a process of its own, which leads a process group."""

    def __init__(self, place: Place, output: Path, *more: str, script: str | Path = "train.py") -> None:
        self.metrics, self.said = output / "metrics.jsonl", output.with_name(f"{output.name}-{time.monotonic_ns()}.txt")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(script), *place.arguments(output, *more)]

        with self.said.open("w") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )

    def ended(self) -> int:
        """Its exit code, once it has one."""
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()

    def stopped_after(self, step: int, number: int, delay: float = 0.0) -> int:
        """Exit code after a signal sent when this step has been logged, and a moment later."""
        self.wait_for(step)
        time.sleep(delay)
        self.process.send_signal(number)
        return self.ended()

    def wait_for(self, step: int) -> None:
        """Wait until this step has been logged."""
        limit = time.monotonic() + PATIENCE
        while not (self.metrics.exists() and steps_in(self.metrics) >= step):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < limit, self.output()
            time.sleep(0.002)

    def killed_during(self, folder: Path, staged: str, step: int, delay: float) -> int:
        """Exit code after SIGKILL while something is written: a staging folder of that name is there, after a step.

        On a busy machine the moment may pass unseen: then it is the code of a run that came to its end.
        """
        limit = time.monotonic() + PATIENCE
        while not (is_there(folder, f".staging-{staged}*") and steps_in(self.metrics) >= step):
            if self.process.poll() == 0:
                return 0
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < limit, self.output()
        time.sleep(delay)
        self.process.send_signal(signal.SIGKILL)
        return self.ended()

    def output(self) -> str:
        return self.said.read_text()


def is_there(folder: Path, pattern: str) -> bool:
    """Return whether a folder, which may come and go meanwhile, holds such a file."""
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:
        return False


def steps_in(metrics: Path) -> int:
    return max((record["step"] for record in read_metrics(metrics) if "terms" in record), default=0)


def student_of(output: Path) -> str:
    return hashlib.sha256((output / "student" / "model.safetensors").read_bytes()).hexdigest()


def record_of(output: Path) -> list[dict]:
    records = read_metrics(output / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in MEASURED_ANEW} for record in records]


def report_of(output: Path) -> dict:
    report = json.loads((output / "evaluation_report.json").read_text())
    return {key: report[key] for key in ("teacher", "initial_student", "student", "retention", "samples")}


def hidden_in(output: Path) -> list[str]:
    """Return the names of the files that a writer left half done; the lock stays."""
    return [path.name for path in output.rglob(".*") if path.name != LOCK]


def same_outcome(output: Path, uninterrupted: Path) -> bool:
    assert student_of(output) == student_of(uninterrupted)
    assert record_of(output) == record_of(uninterrupted)
    assert report_of(output) == report_of(uninterrupted)
    return not hidden_in(output)


@pytest.fixture(scope="module")
def uninterrupted(place, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    session = Session(place, output)
    assert session.ended() == 0, session.output()
    assert 35 < steps_in(output / "metrics.jsonl") < 90, "not the few dozen steps that the moments below suppose"
    return output


KINDS = ("step", "save", "step", "export", "save")
"""When a run is killed: after a step, while a checkpoint is written, or while the student is exported."""


def kill_somewhere(session: Session, output: Path, index: int, attempt: int) -> int:
    """Exit code of a session killed at a random moment, the same for an index and KILL_SEED; earlier each attempt."""
    draw = random.Random(f"{os.environ.get('KILL_SEED', '7')} {index}")
    kind, step, delay = KINDS[index % len(KINDS)], draw.randint(0, 60) >> attempt, draw.uniform(0, 0.05)
    if kind == "step":
        return session.stopped_after(max(step, 1), signal.SIGKILL, delay)
    if kind == "save":
        return session.killed_during(output / "checkpoints", "step-", step, delay / 5)
    return session.killed_during(output, "student", 0, delay / 5)


@pytest.mark.parametrize("moment", [pytest.param(i, marks=[pytest.mark.slow] if i > 3 else []) for i in range(20)])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_student(place, uninterrupted, tmp_path, moment):
    for attempt in range(3):
        output = tmp_path / f"run{attempt}"
        code = kill_somewhere(Session(place, output), output, moment, attempt)
        if code != 0:
            break
    assert code == -signal.SIGKILL, "over before the kill, three times"

    final = Session(place, output)
    assert final.ended() == 0, final.output()
    assert same_outcome(output, uninterrupted)


def test_sigterm_exits_143_and_ctrl_c_130_and_the_same_command_goes_on(place, uninterrupted, tmp_path):
    output = tmp_path / "run"
    for number, code, step in ((signal.SIGTERM, 143, 5), (signal.SIGINT, 130, 18)):
        session = Session(place, output)
        assert session.stopped_after(step, number) == code, session.output()
        said, done = session.output(), steps_in(output / "metrics.jsonl")
        assert f"stopped by {number.name}" in said and "Traceback (" not in said
        assert done < steps_in(uninterrupted / "metrics.jsonl")
        assert (output / "checkpoints" / f"step-{done:08d}" / "manifest.json").is_file()
        assert not (output / "student").exists() and not hidden_in(output)
    final = Session(place, output)
    assert final.ended() == 0, final.output()
    assert f"at step {done} of" in final.output() and same_outcome(output, uninterrupted)


@pytest.fixture(scope="module")
def out_of_time(place, tmp_path_factory) -> Path:
    """The folder of a run whose hours were over before the first step."""
    output = tmp_path_factory.mktemp("out_of_time") / "run"
    assert train.main(place.arguments(output, "--max-hours", "1e-6")) == 0
    return output


def test_when_the_hours_are_over_the_run_ends_well_with_report_and_student(out_of_time):
    report = json.loads((out_of_time / "evaluation_report.json").read_text())
    assert report["run"]["stopped_by"] == "max_hours" and report["run"]["steps"] == 0
    assert report["student"]["bits_per_byte"] == pytest.approx(report["initial_student"]["bits_per_byte"])
    assert (out_of_time / "evaluation_report.md").is_file() and (out_of_time / "checkpoints" / "step-00000000").is_dir()
    assert AutoModelForCausalLM.from_pretrained(out_of_time / "student").dtype == torch.float32


def test_a_run_is_not_continued_on_another_text(out_of_time, place, tmp_path, capsys):
    other = write_jsonl(tmp_path / "other.jsonl", documents(90, seed=1))
    before = sorted(path.name for path in out_of_time.rglob("*"))
    assert train.main(place.arguments(out_of_time, "--set", f"data.train=[{other}]")) == 2
    said = capsys.readouterr().out
    assert "the training text (a hash of it)" in said and "--output-dir" in said and "Traceback (" not in said
    assert sorted(path.name for path in out_of_time.rglob("*")) == before


@pytest.mark.parametrize("changed", ["the teacher's weights", "the tokenizers"])
def test_a_run_is_not_continued_with_another_teacher_or_tokenizer(out_of_time, place, tmp_path, capsys, changed):
    """Under the same name."""
    role = "teacher" if "teacher" in changed else "student"
    other = shutil.copytree(getattr(place, role), tmp_path / role)
    if role == "teacher":
        weights = load_file(other / "model.safetensors")
        weights["model.norm.weight"][0] += 1e-3
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    else:
        train_tokenizer(documents(90, seed=5), 290).save_pretrained(other)
    assert train.main(place.arguments(out_of_time, f"--{role}", str(other))) == 2
    said = capsys.readouterr().out
    assert f"- {changed}" in said and "--output-dir" in said and "Traceback (" not in said


def test_a_run_is_continued_in_its_own_precision_where_auto_has_come_to_mean_another(place, tmp_path, capsys, cpu):
    """A newer version, or another CPU; nobody has changed a setting."""
    output = tmp_path / "run"
    command = place.arguments(output, "--mixed-precision", "auto", "--max-steps", "3", "--eval-every", "0")
    cpu()
    assert train.main([*command, "--max-hours", "1e-6"]) == 0
    capsys.readouterr()

    cpu(amx_bf16=True)
    assert train.main(command) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert 'the precision that the student computes in: "no" -> "bf16"' in said
    assert "--mixed-precision no computes as that run did" in said

    assert train.main([*command, "--mixed-precision", "no"]) == 0
    assert steps_in(output / "metrics.jsonl") == 3


def test_every_name_that_a_run_writes_is_one_that_must_not_be_taken(out_of_time):
    assert {path.name for path in out_of_time.iterdir()} <= {*FILES, *FOLDERS}


def test_a_start_that_cannot_be_read_is_measured_again(out_of_time, place, tmp_path):
    output = shutil.copytree(out_of_time, tmp_path / "run")
    before = json.loads((output / "baseline_evaluation.json").read_text())
    (output / "baseline_evaluation.json").write_text("{")
    assert train.main(place.arguments(output, "--max-hours", "1e-6")) == 0
    assert json.loads((output / "baseline_evaluation.json").read_text()) == before


def test_a_file_that_no_manifest_lists_is_not_loaded(out_of_time, place, tmp_path):
    output = shutil.copytree(out_of_time, tmp_path / "run")
    (output / "checkpoints" / "step-00000000" / "more.pt").write_bytes(b"not a pickle")
    assert train.main(place.arguments(output, "--max-hours", "1e-6")) == 0


def test_a_signal_while_models_are_loaded_ends_the_run_before_training(place, tmp_path, monkeypatch):
    prepare = stages.prepare

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return prepare(*arguments)

    monkeypatch.setattr(stages, "prepare", interrupted)
    monkeypatch.setattr(stages, "load_teacher", lambda *_: pytest.fail("went on"))
    assert train.main(place.arguments(tmp_path / "run")) == 143


def test_real_models_learn_for_a_few_steps(real_models_dir, place, tmp_path):
    text = tmp_path / "stories.txt"
    corpus = (real_models_dir / "corpora" / "tinystories-v2.txt").read_text(encoding="utf-8")
    text.write_text(corpus[: corpus.index("<|endoftext|>", 60_000)], encoding="utf-8")

    settings = {
        "teacher.name": real_models_dir / "models" / "tinystories-neo-chat-3m",
        "student.name": real_models_dir / "models" / "stories260k-llama",
        "student.init": "pretrained",
        "data.train": f"[{text}]",
        "data.max_length": 128,
        "training.max_steps": 6,
        "training.learning_rate": 1e-4,
    }

    session = Session(place, tmp_path / "run", "--set", *(f"{key}={value}" for key, value in settings.items()))
    assert session.ended() == 0, session.output()

    report = json.loads((tmp_path / "run" / "evaluation_report.json").read_text())
    for model in ("teacher", "initial_student", "student"):
        assert 0.5 < report[model]["bits_per_byte"] < 1.5, model

    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert sum(p.numel() for p in student.parameters()) == report["student"]["parameters"]
