"""Faults proved with real processes: SIGKILL at any moment, signals, a full disk; the run always ends bit for bit."""

import importlib.util
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = pathlib.Path(__file__).with_name("tiny_run.py")
spec = importlib.util.spec_from_file_location("tiny_run", SCRIPT)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def launch(workdir, environment, *arguments):
    command = [sys.executable, str(SCRIPT), str(workdir), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = launch(workdir, environment)
    assert done.returncode == 0, done.stderr
    return tiny.final_bits(workdir)


def assert_ends_the_same(workdir, environment, undisturbed):
    done = launch(workdir, environment)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr  # what a kill leaves is never taken for a checkpoint
    assert tiny.final_bits(workdir) == undisturbed
    return json.loads(done.stdout)


@pytest.mark.slow
def test_killed_in_every_phase_and_stopped_by_both_signals(tmp_path, environment, undisturbed):
    # rows are counted in each process; 12 are the teacher's, 4 the warm-up's, 12 the student's
    assert launch(tmp_path, environment, "--kill=5,0.1").returncode == -signal.SIGKILL
    assert launch(tmp_path, environment, "--kill=14,0.05").returncode == -signal.SIGKILL
    stopped = launch(tmp_path, environment, f"--signal=2,{signal.SIGINT}")
    assert stopped.returncode == 130
    assert "saved after step" in stopped.stderr
    stopped = launch(tmp_path, environment, f"--signal=3,{signal.SIGTERM}")
    assert stopped.returncode == 0
    assert "saved after step" in stopped.stderr
    assert launch(tmp_path, environment, "--kill=6,0.05").returncode == -signal.SIGKILL
    assert assert_ends_the_same(tmp_path, environment, undisturbed)["restored"] is not None


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        pytest.param(1, ["metrics.jsonl", "can't be written: File too large"], marks=pytest.mark.slow),
        # the metrics still fit, the checkpoint of step 12 doesn't
        (8000, ["the checkpoint", "00_teacher", "File too large", "earlier checkpoints are intact"]),
    ],
)
@pytest.mark.slow
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, environment, undisturbed, limit, words):
    # from row 11 on no file may grow beyond the limit; step 5 was saved by then, step 10 perhaps
    full = launch(tmp_path, environment, f"--file-limit={limit}", "--at=11")
    assert full.returncode == 1
    for word in [str(tmp_path), *words]:
        assert word in full.stderr
    assert "Traceback" not in full.stderr
    assert assert_ends_the_same(tmp_path, environment, undisturbed)["restored"] in (["teacher", 5], ["teacher", 10])


@pytest.mark.slow
def test_killed_from_outside_at_random_moments(tmp_path, environment, undisturbed):
    """From the first import to the last write; the delays are drawn anew every time, and told when it fails."""
    began = time.monotonic()
    launch(tmp_path / "timed", environment)
    whole = time.monotonic() - began
    delays = [random.uniform(0.1, 1.1) * whole for _ in range(8)]
    print("killed after seconds", delays)
    for delay in delays:
        command = [sys.executable, str(SCRIPT), str(tmp_path / "run")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert_ends_the_same(tmp_path / "run", environment, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("row", [5, 10, 12, 13, 17, 25])
def test_killed_around_every_checkpoint(tmp_path, environment, undisturbed, row):
    for _ in range(2):
        launch(tmp_path, environment, f"--kill={row},0.15")
    assert_ends_the_same(tmp_path, environment, undisturbed)
