"""Exit codes. Those of whole runs: tests/faults."""

import pytest
import torch.distributed

from utils.endings import Interrupted, exit_code


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
