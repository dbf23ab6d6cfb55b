"""Runs over several processes: two on this machine, with two simulated devices each, and what their flags say."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from jax.errors import JaxRuntimeError

from poise.launch import agreement, hosts
from poise.launch.agreement import Decisions, agree, exchange, is_main, main_says, only_main
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.config import ConfigError
from poise.launch.data import InMemory, NoData, Prefetched, for_host
from poise.launch.devices import DeviceError, Placement, block_of
from poise.launch.execution import HostsConfig
from poise.launch.signals import StopRequest

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("tiny_run", HERE / "tiny_run.py")
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)
SENTENCE = "another process of the run ended or can't be reached"


def start(workdir, environment, *flags, devices=4, script=(str(HERE / "tiny_hosts.py"),), prefix=()):
    own = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"}
    command = [*prefix, sys.executable, *script, f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, env=environment | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(workdir, environment, *flags, both=((), ()), prefixes=((), ()), **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    where = (f"--coordinator_address={address}", "--num_processes=2", "--initialization_timeout=60")
    return [
        start(
            workdir,
            environment,
            *where,
            f"--process_id={process}",
            *flags,
            *both[process],
            devices=2,
            prefix=prefixes[process],
            **options,
        )
        for process in (0, 1)
    ]


def finish(*processes):
    """Exit codes and what was written to stderr."""
    said = [process.communicate(timeout=120) for process in processes]
    return [process.returncode for process in processes], [errors for _, errors in said]


def wait_for_rows(workdir, number, *processes):
    path = workdir / "metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if path.exists() and path.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.01)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_close(one, two):
    """Sums over processes are taken in another order than those within one: the last digits differ."""
    assert len(rows(one)) == len(rows(two)) == sum(tiny.STEPS.values())
    for left, right in zip(rows(one), rows(two), strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            if isinstance(value, float):
                np.testing.assert_allclose(right[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
            else:
                assert right[name] == value
    for (name, left), (other, right) in zip(state_of(one), state_of(two), strict=True):
        assert name == other
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6, err_msg=name)


def state_of(workdir):
    tree = restore_tree(workdir)  # compares every checksum
    frozen = {f"frozen/{name}": leaf for name, leaf in tree["frozen"]["teacher"].items()}
    params = {name: leaf for name, leaf in tree["params"].items()}
    return sorted(
        {name: np.asarray(leaf) for name, leaf in {**frozen, **params, "count": tree["count"]}.items()}.items()
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("two")
    codes, errors = finish(*start_two(workdir, environment, "--watch=writes"))
    assert codes == [0, 0], errors
    return workdir, errors


@pytest.mark.slow
def test_two_processes_give_what_four_devices_of_one_give_and_the_second_writes_no_file(tmp_path, environment, two):
    codes, errors = finish(start(tmp_path, environment))
    assert codes == [0], errors
    workdir, (first, second) = two
    assert_close(tmp_path, workdir)
    assert "student: finished 12 steps" in first
    assert f"open {workdir}/metrics.jsonl" in first
    own_parts = re.compile(
        r"open \S+/checkpoints/\S+orbax-checkpoint-tmp/\S+/process_1"
    )  # what a checkpoint is made of
    assert second
    assert [line for line in second.splitlines() if not own_parts.fullmatch(line)] == []  # no progress either
    assert sorted(path.name for path in workdir.iterdir()) == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.slow
def test_sigterm_to_one_stops_both_after_the_same_step_and_one_process_goes_on(tmp_path, environment, two):
    processes = start_two(tmp_path, environment, "--slow=0.2")
    wait_for_rows(tmp_path, 18, *processes)  # of 12 + 4 + 12
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = finish(*processes)
    assert codes == [0, 0], errors
    stopped = [text.splitlines()[-1].removeprefix("tiny_hosts: ") for text in errors]
    assert stopped[0] == stopped[1]
    step = rows(tmp_path)[-1]["step"]
    assert stopped[0].startswith(f"stopped and saved after step {step} of phase 'student'")
    assert step < 12
    process = start(tmp_path, environment)
    output, said = process.communicate()
    assert process.returncode == 0, said
    assert f"restored ('student', {step}) trained {12 - step}" in output
    assert_close(two[0], tmp_path)


def test_what_is_another_somewhere_is_named_with_the_process(monkeypatch):
    monkeypatch.setattr(agreement, "several", lambda: True)
    monkeypatch.setattr(agreement, "exchange", lambda text: [text, text, "other" if text == "own" else text])
    agreement.alike(lambda: "the same", "it", "why")
    with pytest.raises(ConfigError, match=r"^it must be the same in all processes, but is another in process 2: why$"):
        agreement.alike(lambda: "own", "it", "why")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("differ", "sentence"),
    [
        ("data", "the first batch of phase 'teacher' must be the same in all processes, but is another in process 1"),
        ("start", "start must be the same in all processes, but is another in process 1"),
    ],
)
def test_what_processes_read_by_themselves_must_be_the_same(differ, sentence, tmp_path, environment):
    codes, errors = finish(*start_two(tmp_path, environment, f"--differ={differ}"))
    assert codes == [2, 2], errors
    assert all(sentence in text for text in errors)
    assert not (tmp_path / "metrics.jsonl").exists() or not rows(tmp_path)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_both_go_on_to_the_same_bits(tmp_path, environment, two):
    processes = start_two(tmp_path, environment, "--slow=0.2")
    wait_for_rows(tmp_path, 19, *processes)
    processes[1].kill()
    lost = time.monotonic()
    codes, errors = finish(*processes)
    assert time.monotonic() - lost < hosts.HEARTBEAT_SECONDS + 30
    assert codes == [1, -signal.SIGKILL], errors
    assert f"tiny_hosts: {SENTENCE}" in errors[0]
    assert "Traceback" not in errors[0]
    codes, errors = finish(*start_two(tmp_path, environment))
    assert codes == [0, 0], errors
    assert tiny.final_bits(tmp_path) == tiny.final_bits(two[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp:4", "model:2,data:2"])
def test_parts_of_weights_on_several_processes(tmp_path, environment, mesh):
    rules = ["--sharding=(params|average|mu|nu|teacher)/w$=model;.*="] if "model" in mesh else []
    flags = (f"--mesh={mesh}", "--width=1024", *rules)
    process = start(tmp_path, environment, *flags, "--slow=0.2")  # begun by one, gone on with by two
    wait_for_rows(tmp_path, 7, process)
    process.send_signal(signal.SIGTERM)
    codes, errors = finish(process)
    assert codes == [0], errors
    codes, errors = finish(*start_two(tmp_path, environment, *flags))
    assert codes == [0, 0], errors
    assert "going on from step" in errors[0]
    alone = tmp_path.with_name("alone")
    codes, errors = finish(start(alone, environment, *flags))
    assert codes == [0], errors
    for (name, left), (_, right) in zip(state_of(alone), state_of(tmp_path), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_full_disk_ends_both_at_once(tmp_path, environment):
    full = ("bash", "-c", 'ulimit -f 4; exec "$@"', "bash")  # no file of process 0 may have more than 4 KiB
    began = time.monotonic()
    codes, errors = finish(*start_two(tmp_path, environment, prefixes=(full, ())))
    assert time.monotonic() - began < hosts.HEARTBEAT_SECONDS
    assert codes[0] == 1
    assert codes[1] in (1, -signal.SIGABRT)  # told by us or by jax
    assert "can't be written: " in errors[0]
    assert "File too large" in errors[0]
    assert SENTENCE in errors[1] or "another task died" in errors[1]


@pytest.mark.slow
def test_a_launcher_with_many_weights(tmp_path, environment):
    flags = (
        "--recipe=smoke",
        "--float_steps=2",
        "--steps=2",
        "--cga_steps=2",
        "--eval_every=0",
        "--mesh=data:2,fsdp:2",
    )
    processes = start_two(tmp_path, environment, *flags, script=("-m", "poise.launch.qat"))
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [("ofq, integers" in output, "float: finished" in errors) for output, errors in said] == [
        (True, True),
        (False, False),
    ]
    assert (tmp_path / "report.json").is_file()


@pytest.mark.slow
def test_processes_with_other_flags_or_folders_are_refused_by_all(tmp_path, environment):
    told_by_all(
        finish(*start_two(tmp_path, environment, both=((), ("--batch_size=16",)))),
        2,
        "all processes must have the same flags: batch_size is 8 in process 0 and 16 in process 1",
    )
    assert not list(tmp_path.iterdir())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")  # of some run before
    told_by_all(
        finish(*start_two(tmp_path / "a", environment, both=((), (f"--workdir={tmp_path}/b",)))),
        2,
        f"the workdir {tmp_path}/b must be on a file system that all processes share",
    )
    told_by_all(
        finish(*start_two(tmp_path / "c", environment, "--batch_size=6")),
        1,
        "has 6 examples, which 4 devices can't share",
    )


def told_by_all(ended, code, sentence):
    """All say the same; jax may abort the one that is still speaking when process 0 has left."""
    codes, errors = ended
    assert code in codes, errors
    assert set(codes) <= {code, -signal.SIGABRT}, errors
    for own, text in zip(codes, errors, strict=True):
        assert own != code or sentence in text, text


@dataclasses.dataclass(frozen=True)
class Config(HostsConfig):
    """A launcher's settings."""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, "coordinator_address must be given, since num_processes is"),
        ({"process_id": 0}, "coordinator_address must be given, since process_id is"),
        ({"coordinator_address": "h:1", "process_id": 1}, "num_processes must be given, since coordinator_address and"),
        ({"coordinator_address": "h:1", "num_processes": 2}, "process_id must be given, since coordinator_address and"),
        (
            {"coordinator_address": "h", "num_processes": 2, "process_id": 0},
            "coordinator_address must be HOST:PORT, got 'h'",
        ),
        (
            {"coordinator_address": "h:99999", "num_processes": 2, "process_id": 0},
            "coordinator_address must be HOST:PORT, got 'h:99999'",
        ),
        (
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
            "process_id must be below num_processes=2, since it counts from 0, got 2",
        ),
        (
            {"coordinator_address": "h:1", "num_processes": 1, "process_id": 1},
            "process_id must be below num_processes=1, since it counts from 0, got 1",
        ),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message):
    with pytest.raises(ConfigError, match=message):
        hosts.join_hosts(Config(**flags))


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, ""),
        (SLURM, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, ""),  # the script itself, without srun
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "4"}, "ompi"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"}, ""),
        ({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "a,b"}, "gketpu"),
        ({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "gketpu"),
        ({"JAX_PLATFORMS": "tpu"}, "gcetpu"),
        ({"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}, ""),
    ],
)
def test_what_a_cluster_says(monkeypatch, variables, found):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JAX_PLATFORMS")):
            monkeypatch.delenv(name)
    for name, value in {"JAX_PLATFORMS": "cpu", **variables}.items():
        monkeypatch.setenv(name, value)
    assert hosts._cluster() == found


def test_one_process_is_one_process_whatever_the_cluster_says(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert hosts.join_hosts(Config(num_processes=1)) is False
    assert is_main()


def test_one_process_agrees_with_itself_at_once(tmp_path):
    assert exchange("word") == ["word"]
    assert main_says([1]) == [1]
    assert agree(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        only_main(lambda: 1 // 0)
    stop = StopRequest()
    decisions = Decisions(stop)
    assert decisions.after_step(True) == (False, True)
    stop.signum = signal.SIGTERM
    assert decisions.after_step(False) == (True, False)
    assert decisions.stopping()


class Counted:
    """A source that knows nothing of hosts."""

    batch_axis, batch_size = 1, 4

    def batch(self, step):
        return {"x": np.arange(8).reshape(2, 4) + step}


@pytest.mark.parametrize("prefetched", [False, True])
@pytest.mark.parametrize("source", [Counted(), InMemory({"x": np.arange(10)}, 4, 0, cycle=2)])
def test_every_source_gives_each_host_its_block(source, prefetched):
    whole = Prefetched(source, 4) if prefetched else source
    parts = [for_host(whole, host, 2) for host in range(2)]
    for step in range(3):
        both = np.concatenate([part.batch(step)["x"] for part in parts], axis=1)
        np.testing.assert_array_equal(both, source.batch(step)["x"])
    assert for_host(NoData(), 1, 2).batch(0) == ()


def test_blocks_of_a_batch():
    assert block_of({0: {0, 1}, 1: {2, 3}}, 0) == (0, 2)
    assert block_of({0: {0}, 1: {0}, 2: {1}, 3: {1}}, 3) == (1, 2)
    for parts in ({0: {0, 2}, 1: {1, 3}}, {0: {0, 1}, 1: {1, 2}}, {0: {0, 1}, 1: {2}}):
        with pytest.raises(ConfigError, match=r"mesh gives process \d the parts"):
            block_of(parts, 0)


def test_a_source_that_speaks_of_another_size_is_named():
    placement = Placement()
    placement.several = True
    with pytest.raises(DeviceError, match="has 8 examples, but its source speaks of 16"):
        placement.check_batch({"x": np.zeros(8)}, 0, "teacher", 16)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer [127.0.0.1]"), True),
        (JaxRuntimeError("UNAVAILABLE: the coordination service is gone"), True),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("the batch has 6 examples"), False),
    ],
)
def test_what_tells_of_a_lost_process(error, expected, monkeypatch):
    assert hosts.lost(error) is None  # a single process has none to lose
    monkeypatch.setattr(hosts, "several", lambda: True)
    assert (hosts.lost(error) is not None) is expected
