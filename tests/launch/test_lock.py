"""One launcher per folder: a second is refused, a crash leaves nothing behind."""

import os
import signal
import subprocess
import sys

import pytest

from poise.launch.config import ConfigError
from poise.launch.lock import WorkdirLocked, workdir_lock

HOLDER = """
import sys
from poise.launch.lock import workdir_lock
with workdir_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_launcher_is_refused_until_the_first_ends(tmp_path):
    first = hold(tmp_path)
    with pytest.raises(WorkdirLocked, match=rf"process {first.pid}\) works in {tmp_path}"), workdir_lock(tmp_path):
        raise AssertionError("held by two")
    first.communicate("\n")
    with workdir_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_killed_launcher_leaves_no_lock(tmp_path):
    first = hold(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = hold(tmp_path)
    with pytest.raises(ConfigError), workdir_lock(tmp_path):
        raise AssertionError("held by two")
    second.communicate("\n")


def test_one_process_may_hold_it_twice(tmp_path):
    with workdir_lock(tmp_path):
        with workdir_lock(tmp_path / "."):
            pass
        # the inner end must not have dropped it
        done = subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path)], capture_output=True, text=True, input="\n")
        assert "WorkdirLocked" in done.stderr
    hold(tmp_path).communicate("\n")


def test_an_error_inside_drops_it(tmp_path):
    with pytest.raises(KeyError), workdir_lock(tmp_path):
        raise KeyError
    hold(tmp_path).communicate("\n")
