"""Effects of a signal on a run. Whole runs: tests/faults/test_signals.py."""

import os
import signal
import threading
from contextlib import suppress

import pytest

from utils.machine import stop_signals
from utils.machine.stop_signals import (
    STOP_SIGNALS,
    Interrupted,
    StopSignal,
    ignore_stop_signals,
    interrupt_ends_process,
    stop_signals_delayed,
)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in stop_signals.SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_the_former_handler_returns(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.requested() is None
        os.kill(os.getpid(), number)
        assert stop.requested() == number.name
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopping" in capfd.readouterr().err


def test_under_nohup_a_closed_terminal_does_not_stop_the_run():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_counts_also_when_the_terminal_is_gone(monkeypatch):
    def write(*_):
        raise OSError(5, "Input/output error")

    with StopSignal() as stop, monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested() == "SIGHUP"


def test_a_signal_that_is_delayed_arrives_and_one_that_is_ignored_meanwhile_never_does():
    with StopSignal() as stop:
        with stop_signals_delayed():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # no other thread takes it
            assert stop.requested() is None
        assert stop.requested() == "SIGTERM"

    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with stop_signals_delayed():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # no other thread takes it
            ignore_stop_signals()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_where_nothing_is_lost_ctrl_c_raises_and_the_others_wait():
    with StopSignal() as stop, stop.raising():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() == "SIGTERM"
        stop.check()  # outside training

    with StopSignal() as stop:
        with pytest.raises(Interrupted, match="SIGINT"), stop.raising():
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() == "SIGINT"


def test_in_training_a_signal_waits_for_a_check():
    with StopSignal() as stop, stop.raising(), stop.deferring():
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted, match="SIGINT"):
            stop.check()


def test_ctrl_c_that_came_after_the_last_check_of_training_is_known_behind_it():
    with StopSignal() as stop, stop.raising():
        with stop.deferring():
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.pending() is None
        assert stop.pending() == "SIGINT"

    with StopSignal() as stop, stop.raising(), stop.deferring():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.pending() is None


def test_one_of_several_processes_ends_at_a_step_boundary_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with StopSignal() as stop, stop.raising():
        os.kill(os.getpid(), signal.SIGINT)
        stop.check()
        assert stop.requested() == "SIGINT"


@pytest.mark.parametrize("raising", [False, True])
def test_a_second_ctrl_c_ends_at_once_and_one_that_a_launcher_passes_on_is_none(monkeypatch, raising):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with StopSignal() as stop, stop.raising() if raising else stop.deferring():
        with suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ends == []
        monkeypatch.setattr(stop_signals, "REPEAT_SECONDS", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
        assert ends == [130]


def test_a_checkpoint_is_written_to_its_end_before_a_second_ctrl_c_ends_the_run(monkeypatch, capfd):
    events = []
    monkeypatch.setattr(stop_signals, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: events.append(code))
    with StopSignal() as stop, stop.writing():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        events.append("written")
    assert events == ["written", 130]
    assert "a checkpoint is being written" in capfd.readouterr().err


@pytest.mark.parametrize("raising", [True, False])
def test_in_a_notebook_a_second_interrupt_ends_the_cell_and_not_the_kernel(monkeypatch, capfd, raising):
    monkeypatch.setattr(stop_signals, "in_kernel", lambda: True)
    monkeypatch.setattr(stop_signals, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the kernel was ended"))
    with StopSignal() as stop, stop.raising() if raising else stop.deferring():
        with suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt, match="the same cell continues"):
            os.kill(os.getpid(), signal.SIGINT)
    assert raising or "the same cell continues" in capfd.readouterr().err


def test_ctrl_c_that_a_library_turns_into_an_error_of_its_own_stays_an_interruption():
    def load():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:
            raise ModuleNotFoundError("Could not import module") from error

    with pytest.raises(Interrupted, match="SIGINT"), StopSignal() as stop, stop.raising():
        load()


def test_a_failure_after_a_signal_that_waited_stays_a_failure():
    with pytest.raises(OSError, match="full"), StopSignal() as stop, stop.raising():
        with stop.deferring():
            os.kill(os.getpid(), signal.SIGINT)
        raise OSError("the disk is full")


def test_ctrl_c_while_libraries_are_loaded_ends_the_process_at_once(monkeypatch, capfd):
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    before = signal.getsignal(signal.SIGINT)
    with interrupt_ends_process(), suppress(Exception):
        os.kill(os.getpid(), signal.SIGINT)
    assert ends == [130]
    assert "before anything was begun" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
