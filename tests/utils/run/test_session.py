"""The start of a run, before anything else."""

from types import SimpleNamespace

import pytest

from utils.errors import UserError
from utils.run import session
from utils.run.session import Session


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The list of what a start calls, in order, up to the check of what the settings require."""
    calls = []

    def refuse(*_) -> None:
        calls.append("requirements")
        raise UserError("no further")

    monkeypatch.setattr(session.hardware, "configure_allocator", lambda: calls.append("allocator"))
    monkeypatch.setattr(
        session.hardware, "choose_device", lambda: calls.append("device") or SimpleNamespace(value=None)
    )
    monkeypatch.setattr(session.kernels, "check_kernels", lambda: calls.append("kernels"))
    monkeypatch.setattr(session.requirements, "check", refuse)
    return calls


def test_the_allocator_is_set_before_anything_looks_for_a_gpu(calls, monkeypatch):
    """CUDA reads the setting once, when it starts."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="no further"):
        Session.start(None, "a recipe", None)
    assert calls == ["allocator", "device", "kernels", "requirements"]


@pytest.mark.parametrize(("rank", "checks"), [("0", 1), ("1", 0), ("7", 0)])
def test_one_process_tries_the_kernels_of_all_gpus(calls, monkeypatch, rank, checks):
    """Each try starts another Python."""
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(UserError, match="no further"):
        Session.start(None, "a recipe", None)
    assert calls.count("kernels") == checks


def test_a_gpu_without_kernels_is_refused_with_the_remedy(calls, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(session.kernels, "check_kernels", lambda: "install another torch")
    with pytest.raises(UserError, match="install another torch"):
        Session.start(None, "a recipe", None)
    assert calls == ["allocator", "device"]
