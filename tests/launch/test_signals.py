"""Signals become a request; the second Ctrl-C ends the process at once."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from poise.launch.signals import Interrupted, stop_on_signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_is_noted_and_handlers_come_back(signum, code, capsys):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signum)
        assert stop
        assert stop.signum == signum
    assert {number: signal.getsignal(number) for number in before} == before
    assert signum.name in capsys.readouterr().err
    assert Interrupted(signum).exit_code == code


def test_a_second_interrupt_ends_the_process():
    code = """
import os, signal
from poise.launch.signals import stop_on_signals
with stop_on_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print("first", stop.signum == signal.SIGTERM, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("second", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "first True\n"
    assert done.returncode == -signal.SIGINT


def test_code_that_catches_errors_does_not_catch_a_stop():
    with pytest.raises(Interrupted, match="stopped"), contextlib.suppress(Exception):
        raise Interrupted(signal.SIGTERM)


def test_other_threads_change_nothing():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with stop_on_signals() as stop:
            seen.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
