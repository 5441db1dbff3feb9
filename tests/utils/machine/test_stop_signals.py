"""What a signal does to a run. Whole runs: tests/faults/test_signals.py."""

import os
import signal
import threading

import pytest

from utils.machine.stop_signals import STOP_SIGNALS, StopSignal, ignore_stop_signals, stop_signals_delayed


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
