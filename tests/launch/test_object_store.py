"""Real runs in object stores: equal to those in folders, killed in the middle of uploads, and with a real library."""

import importlib.util
import json
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.core import Algorithm
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.data import NoData
from poise.launch.loop import fit
from poise.launch.manifest import CheckpointError
from poise.launch.mirror import claimed_workdir
from poise.launch.phase import Phase
from poise.launch.workdir import prepare_workdir, workdir_path

HERE = pathlib.Path(__file__).parent
RUN = "gs://bucket/run"


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake = load("local_store")


def newton(previous=None):
    def step(state, batch, key):
        return state - 0.5 * (state - 3.0), {"loss": (state - 3.0) ** 2}

    return Algorithm(lambda key, batch: jnp.zeros(()), step)


def small_run(workdir, steps=6, evaluate=None):
    phases = [Phase("newton", newton, NoData(), steps, evaluate=evaluate, evaluate_every=3)]
    return fit(phases, workdir=workdir, seed=0, save_every=2, save_every_seconds=0, tensorboard=False)


@pytest.fixture
def store(tmp_path, monkeypatch):
    fake.use(tmp_path / "store")
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "one"))
    return tmp_path / "store"


def test_a_run_in_a_store_is_the_run_in_a_folder(tmp_path, monkeypatch, store, capsys):
    plain = small_run(tmp_path / "plain")
    assert small_run(RUN, steps=3).steps_trained == 3
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "two"))
    went_on = small_run(RUN)
    assert went_on.restored == ("newton", 3)
    assert went_on.state == plain.state
    rows = fake.LocalStore().cat_file(f"{RUN}/metrics.jsonl")
    assert rows == (tmp_path / "plain" / "metrics.jsonl").read_bytes()
    np.testing.assert_array_equal(restore_tree(f"{RUN}/checkpoints/00_newton/6"), plain.state)
    np.testing.assert_array_equal(restore_tree(RUN), plain.state)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        restore_tree("gs://bucket/other")


def test_a_checkpoint_that_its_checksums_refuse_is_replaced_in_the_store(tmp_path, monkeypatch, store, capsys):
    """What was damaged before it went up has its damage listed; it is found when it is read, and made again."""
    small_run(RUN)
    whole = restore_tree(RUN)
    path = workdir_path(RUN) / "checkpoints" / "00_newton" / "6" / "meta" / "metadata"
    prepare_workdir(RUN)
    with claimed_workdir(RUN):  # a checkpoint that was bad from its first moment
        path.write_text(path.read_text().replace('"step"', '"stop"'))
        other = path.parent.parent.with_name("aside")
        path.parent.parent.rename(other)
        shutil.copytree(other, path.parent.parent)
        shutil.rmtree(other)
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "two"))
    assert small_run(RUN).steps_trained == 2
    assert "is damaged and was passed over: " in capsys.readouterr().err
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "three"))
    assert small_run(RUN).steps_trained == 0
    np.testing.assert_array_equal(restore_tree(RUN), whole)


def test_a_failed_upload_ends_the_run_at_the_next_step(tmp_path, store):
    fake.use(store, refuse="00_newton/4.json")
    with pytest.raises(CheckpointError, match=r"can't be brought up to gs://bucket/run: .*4\.json: PermissionError"):
        small_run(RUN)
    fake.use(store)
    assert small_run(RUN).restored[1] >= 4  # this machine has it
    assert fake.LocalStore().cat_file(f"{RUN}/metrics.jsonl").count(b"\n") == 6


# Processes that are killed


def launch(environment, *arguments, script="tiny_store.py"):
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = launch(environment, workdir, script="tiny_run.py")
    assert done.returncode == 0, done.stderr
    return load("tiny_run").final_bits(workdir)


def bits_in(scratch):
    (folder,) = (scratch / "run").iterdir()
    return load("tiny_run").final_bits(folder)


@pytest.mark.slow
def test_killed_at_random_writes_on_several_machines_it_ends_bit_for_bit(tmp_path, environment, undisturbed):
    kills = [random.randrange(60) for _ in range(4)]
    print("killed after writes", kills)
    for turn, kill in enumerate(kills):
        done = launch(environment, tmp_path / "store", tmp_path / f"machine_{turn % 3}", kill, RUN)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        assert "damaged" not in done.stderr
    done = launch(environment, tmp_path / "store", tmp_path / "last", -1, RUN)
    assert done.returncode == 0, done.stderr
    assert bits_in(tmp_path / "last") == undisturbed


@pytest.mark.slow
def test_sigterm_brings_everything_up_before_it_leaves(tmp_path, environment, undisturbed):
    stopped = launch(environment, tmp_path / "store", tmp_path / "one", -1, RUN, f"--signal=18,{signal.SIGTERM}")
    assert stopped.returncode == 0
    assert "saved after step" in stopped.stderr
    step = int(stopped.stderr.rpartition("saved after step ")[2].split()[0])
    done = launch(environment, tmp_path / "store", tmp_path / "two", -1, RUN)
    assert json.loads(done.stdout) == {"steps_trained": 12 - step, "restored": ["student", step]}
    assert "was held by" not in done.stderr  # it left, nobody waits for it
    assert bits_in(tmp_path / "two") == undisturbed


def two_processes(environment, store, scratches, *flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = (f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2")
    own = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "tiny_store.py"), str(store), str(scratch), "-1", f"--workdir={RUN}", *where,
             f"--process_id={number}", *flags],
            env=environment | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, scratch in enumerate(scratches)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], errors


@pytest.mark.slow
def test_two_processes_of_one_machine(tmp_path, monkeypatch, environment):
    """They share its scratch folder; test_apart.py has those of several machines."""
    one = tmp_path / "one"
    codes, errors = two_processes(environment, tmp_path / "store", (one, one))
    assert codes == [0, 0], errors
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "two"))
    fake.use(tmp_path / "store")
    rows, bits = bits_in(one)
    assert fake.LocalStore().cat_file(f"{RUN}/metrics.jsonl") == rows
    assert len(bits) == len(jax.tree.leaves(restore_tree(RUN)))


@pytest.fixture
def emulator(environment):
    """Google's protocol, spoken by another program than the one that is tested."""
    pytest.importorskip("gcsfs", reason="the extra dev has gcsfs")
    pytest.importorskip("gcp_storage_emulator", reason="the extra dev has gcp-storage-emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "from gcp_storage_emulator.server import create_server;"
        f"create_server('127.0.0.1', {port}, in_memory=True, default_bucket='bucket').run()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    own = {"STORAGE_EMULATOR_HOST": address, "FSSPEC_GS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield environment | own
    process.kill()
    process.wait()


@pytest.mark.slow
def test_gcsfs_and_an_emulator_of_google_s_store(tmp_path, emulator, undisturbed):
    stopped = launch(emulator, "gcsfs", tmp_path / "one", -1, RUN, "--kill=18,0.3")
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    done = launch(emulator, "gcsfs", tmp_path / "two", -1, RUN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["restored"] is not None
    assert bits_in(tmp_path / "two") == undisturbed
    refused = launch(emulator, "gcsfs", tmp_path / "one", -1, "gs://nowhere/run")
    assert refused.returncode == 1
    assert "the workdir cannot be used: " in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.effects
def test_two_machines_and_an_emulator_of_google_s_store(tmp_path, emulator):
    codes, errors = two_processes(emulator, "gcsfs", (tmp_path / "one", tmp_path / "two"))
    assert codes == [0, 0], errors
    whole = bits_in(tmp_path / "one")
    codes, errors = two_processes(emulator, "gcsfs", (tmp_path / "three", tmp_path / "one"))
    assert codes == [0, 0], errors
    assert "this run is finished" in errors[0]
    assert bits_in(tmp_path / "three") == whole
