"""Exit codes. Those of whole runs: tests/faults."""

import atexit
import os

import pytest
import torch.distributed

from utils.machine.stop_signals import STOP_REASONS, STOP_SIGNALS
from utils.run.exit_codes import EXIT_CODES, Interrupted, end_process, exit_code


def test_every_signal_that_ends_a_run_is_a_reason_and_has_its_code():
    assert "SIGUSR1" in {number.name for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        assert EXIT_CODES[number.name] == 128 + number
        assert number.name in STOP_REASONS


def interrupted():
    raise Interrupted("SIGTERM")


@pytest.mark.parametrize(("command", "code"), [(lambda: None, 0), (interrupted, 143)])
def test_connections_that_do_not_close_change_nothing(monkeypatch, caplog, command, code):
    def fail():
        raise RuntimeError("NCCL error")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", fail)
    assert exit_code(command) == code
    assert "NCCL error" in caplog.text


@pytest.mark.parametrize(("code", "ends_at_once"), [(0, False), (1, False), (2, False), (130, True), (143, True)])
def test_after_a_signal_nobody_waits_for_the_interpreter_to_be_taken_down(monkeypatch, code, ends_at_once):
    ends = []
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: ends.append("cleaned up"))
    monkeypatch.setattr(os, "_exit", ends.append)
    with pytest.raises(SystemExit) as ended:
        end_process(code)
    assert ended.value.code == code
    assert ends == (["cleaned up", code] if ends_at_once else [])
