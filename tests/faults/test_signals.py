"""Signals that end a run, as batch systems, `timeout` and closed terminals send them: to every process of the run."""

import os
import signal
import time

import psutil
import pytest

import train
from tests.faults.test_comparison import report_of
from tests.faults.test_kill import ROOT, Session, hidden_in, steps_in
from utils.commands import run as run_command
from utils.run import stages

WORKERS = ("--set", "data.num_workers=2")
PATIENCE = 30
"""Seconds within which worker processes notice that the training process is gone."""

WHILE_TEXT_IS_TOKENISED = """
import os, signal, sys
sys.path.insert(0, {root!r})
os.environ["HF_DATASETS_CACHE"] = {cache!r}  # no windows of an earlier run: they have to be made
import train
from utils.data import windows as data

data.IN_MEMORY_BYTES, data.DOCUMENTS_PER_PACK = 0, 30
training_process, pack = os.getpid(), data._Pack.__call__

def pack_and_signal(self, *arguments):
    if os.getpid() != training_process:
        os.killpg(0, signal.SIGTERM)
    return pack(self, *arguments)

data._Pack.__call__ = pack_and_signal
sys.exit(train.main())
"""


def processes_of(session: Session) -> list[psutil.Process]:
    """Every living process of its group."""
    living = []
    for process in psutil.process_iter(["status"]):
        try:
            is_member = os.getpgid(process.pid) == session.process.pid
        except ProcessLookupError:
            continue
        if is_member and process.info["status"] != psutil.STATUS_ZOMBIE:
            living.append(process)
    return living


def wait_until_gone(session: Session) -> None:
    limit = time.monotonic() + PATIENCE
    while processes_of(session):
        assert time.monotonic() < limit, "worker processes outlive the run"
        time.sleep(0.1)


def test_a_signal_to_all_processes_ends_at_a_saved_step_with_its_code_and_leaves_no_process(place, tmp_path):
    """One after the other, each continuing the run of the one before."""
    output, steps = tmp_path / "run", 0
    cases = [
        (signal.SIGTERM, 143, WORKERS),
        (signal.SIGINT, 130, WORKERS),
        (signal.SIGHUP, 129, WORKERS),
        (signal.SIGUSR1, 138, WORKERS),
        (signal.SIGHUP, 129, ()),
    ]

    for number, code, more in cases:
        session = Session(place, output, *more)
        session.wait_for(steps + 2)
        assert len(processes_of(session)) == (3 if more else 1)

        os.killpg(session.process.pid, number)
        assert session.ended() == code, session.output()

        said, before, steps = session.output(), steps, steps_in(output / "metrics.jsonl")
        assert f"stopped by {number.name}" in said
        assert "Traceback (" not in said and "killed" not in said
        assert before == 0 or f"at step {before} of" in said
        assert (output / "checkpoints" / f"step-{steps:08d}" / "manifest.json").is_file()
        assert not (output / "student").exists() and not hidden_in(output)
        wait_until_gone(session)


def test_workers_that_ignore_signals_end_with_a_killed_training_process(place, tmp_path):
    session = Session(place, tmp_path / "run", *WORKERS)
    session.wait_for(2)
    assert len(processes_of(session)) == 3
    session.process.kill()
    session.process.wait()
    wait_until_gone(session)


def test_a_signal_to_all_processes_while_text_is_tokenised(place, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WHILE_TEXT_IS_TOKENISED.format(root=str(ROOT), cache=str(tmp_path / "cache")))
    session = Session(place, tmp_path / "run", *WORKERS, script=script)
    assert session.ended() == 143, session.output()
    assert "stopped by SIGTERM" in session.output() and "Traceback (" not in session.output()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    wait_until_gone(session)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_signal_during_the_export_fails_the_run_only_if_something_is_left_out(place, tmp_path, monkeypatch, left_out):
    export = run_command.export_student

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGHUP)
        return export(*arguments)

    command = place.arguments(tmp_path / "run", "--max-steps", "2", "--set", "evaluation.every=0")
    if left_out:
        command.append("evaluation.without_teacher=true")

    monkeypatch.setattr(run_command, "export_student", interrupted)
    assert train.main(command) == (129 if left_out else 0)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    assert "baseline" not in report_of(tmp_path / "run")

    monkeypatch.setattr(run_command, "export_student", export)
    assert train.main(command) == 0
    assert ("baseline" in report_of(tmp_path / "run")) == left_out


@pytest.mark.parametrize(
    ("module", "name", "first"), [(stages, "fit", "work"), (run_command, "export_student", "signal")]
)
def test_ctrl_c_after_the_last_step_and_in_the_export_ends_at_once(place, tmp_path, monkeypatch, module, name, first):
    work = getattr(module, name)

    def interrupted(*arguments, **options):
        result = work(*arguments, **options) if first == "work" else None
        os.kill(os.getpid(), signal.SIGINT)
        return result

    command = place.arguments(tmp_path / "run", "--max-steps", "2", "--set", "evaluation.every=0")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        assert train.main(command) == 130
    assert not (tmp_path / "run" / "student").exists()
    assert train.main(command) == 0
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
