"""Runs in an object store by processes that see different folders: two on this machine, each with a scratch folder."""

import concurrent.futures
import errno
import fcntl
import importlib.util
import json
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from poise.launch import agreement, claim, follower, mirror
from poise.launch.checkpoint import CheckpointStore
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.claim import claimed_by_all
from poise.launch.commits import Saved, digest_of, saved_here, saved_there
from poise.launch.config import ConfigError
from poise.launch.follower import Follower
from poise.launch.gather import gathered
from poise.launch.leaves import Layout
from poise.launch.manifest import CheckpointError, Damaged, read_frozen_manifest, verify_by_itself
from poise.launch.mirror import claimed_workdir
from poise.launch.object_store import ObjectStore
from poise.launch.workdir import prepare_workdir, settle_data, workdir_path

HERE = pathlib.Path(__file__).parent
RUN = "gs://bucket/run"
LENGTH = 28


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fake, tiny, hosts = load("local_store"), load("tiny_run"), load("test_hosts")


def start_apart(environment, store, scratches, *flags, kill_after=(-1, -1), prefixes=((), ()), both=((), ())):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = (f"--coordinator_address=127.0.0.1:{free.getsockname()[1]}", "--num_processes=2")
    own = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"}
    return [
        subprocess.Popen(
            [*prefixes[number], sys.executable, str(HERE / "tiny_store.py"), str(store), str(scratch),
             str(kill_after[number]), f"--workdir={RUN}", *where, f"--process_id={number}", *flags, *both[number]],
            env=environment | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, scratch in enumerate(scratches)
    ]  # fmt: skip


def run_apart(*arguments, **options):
    codes, errors = hosts.finish(*start_apart(*arguments, **options))
    assert codes == [0, 0], errors
    return errors


def folder_in(scratch):
    (folder,) = (scratch / "run").iterdir()
    return folder


def stop_at(row, processes, scratch, signum, which):
    """Sends a signal to one of them after so many rows of process 0; gives exit codes and what was said."""
    while not (scratch / "run").is_dir() or not list((scratch / "run").iterdir()):
        time.sleep(0.01)
    hosts.wait_for_rows(folder_in(scratch), row, *processes)
    processes[which].send_signal(signum)
    return hosts.finish(*processes)


def look_at(tmp_path, monkeypatch, store):
    """Makes this process another machine that reads the store."""
    fake.use(store)
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "looking"))
    return ObjectStore(RUN)


@pytest.fixture(scope="module")
def apart(tmp_path_factory, environment):
    home = tmp_path_factory.mktemp("apart")
    run_apart(environment, home / "store", (home / "one", home / "two"))
    return home


@pytest.mark.slow
def test_two_machines_give_what_one_process_gives_and_all_of_it_is_in_the_store(tmp_path, monkeypatch, apart):
    alone = tmp_path / "alone"
    tiny.run(alone, devices=jax.devices()[:4])
    first, second = folder_in(apart / "one"), folder_in(apart / "two")
    hosts.assert_close(alone, first)
    assert [path.name for path in second.iterdir() if path.is_file()] == [".lock"]  # no row, no result
    assert saved_here(second) == []
    store = look_at(tmp_path, monkeypatch, apart / "store")
    assert store.read("metrics.jsonl") == (first / "metrics.jsonl").read_bytes()
    assert saved_there(store.names()) == saved_here(first)
    for place in (RUN, f"{RUN}/checkpoints/00_teacher"):
        tree = restore_tree(place)  # compares every checksum
        twin = restore_tree(alone / place.removeprefix(RUN).lstrip("/"))
        described = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
        assert described == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(twin)]
    assert not list(first.glob(".shared*"))


@pytest.mark.slow
def test_sigterm_at_the_second_machine_and_on_with_the_roles_swapped_and_weights_split_over_both(tmp_path, environment):
    one, two, flags = tmp_path / "one", tmp_path / "two", ("--mesh=fsdp:4", "--width=1024")
    processes = start_apart(environment, tmp_path / "store", (one, two), "--slow=0.2", *flags)
    codes, errors = stop_at(18, processes, one, signal.SIGTERM, 1)
    assert codes == [0, 0], errors
    assert "stopped and saved after step" in errors[0]
    assert errors[0].splitlines()[-1] == errors[1].splitlines()[-1]
    assert len(hosts.rows(folder_in(one))) < LENGTH
    errors = run_apart(environment, tmp_path / "store", (two, one), *flags)
    assert "going on from step" in errors[0]
    tiny.run(tmp_path / "alone", devices=jax.devices()[:4], width=1024)
    states = hosts.state_of(tmp_path / "alone"), hosts.state_of(folder_in(two))
    for (name, left), (_, right) in zip(*states, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.effects
def test_two_machines_end_with_the_bits_of_two_processes_in_one_folder(tmp_path, environment, apart):
    codes, errors = hosts.finish(*hosts.start_two(tmp_path, environment))
    assert codes == [0, 0], errors
    assert tiny.final_bits(tmp_path) == tiny.final_bits(folder_in(apart / "one"))


@pytest.mark.effects
def test_a_stopped_run_goes_on_with_both_machines_or_with_one_process_anywhere(tmp_path, environment, apart):
    one, two = tmp_path / "one", tmp_path / "two"
    processes = start_apart(environment, tmp_path / "store", (one, two), "--slow=0.2")
    codes, errors = stop_at(18, processes, one, signal.SIGTERM, 0)
    assert codes == [0, 0], errors
    shutil.copytree(tmp_path / "store", tmp_path / "twin")
    shutil.copytree(tmp_path / "store", tmp_path / "third")
    for store, machines in {"store": (one, two), "third": (two, one)}.items():  # which had another's part before
        run_apart(environment, tmp_path / store, machines)
        assert tiny.final_bits(folder_in(machines[0])) == tiny.final_bits(folder_in(apart / "one"))
    command = [sys.executable, HERE / "tiny_store.py", tmp_path / "twin", tmp_path / "new", "-1", RUN]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["restored"][0] == "student"
    hosts.assert_close(folder_in(apart / "one"), folder_in(tmp_path / "new"))


@pytest.mark.effects
def test_a_shared_folder_and_machines_apart_take_turns(tmp_path, environment, apart):
    shared, one = tmp_path / "shared", tmp_path / "one"
    processes = hosts.start_two(shared, environment, "--slow=0.2")
    hosts.wait_for_rows(shared, 7, *processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = hosts.finish(*processes)
    assert codes == [0, 0], errors
    fake.use(tmp_path / "store")
    for path in (path for path in shared.rglob("*") if path.is_file()):  # as somebody who copies the folder there
        fake.LocalStore().put_file(str(path), f"{RUN}/{path.relative_to(shared).as_posix()}")
    processes = start_apart(environment, tmp_path / "store", (one, tmp_path / "two"), "--slow=0.2")
    codes, errors = stop_at(19, processes, one, signal.SIGTERM, 0)
    assert codes == [0, 0], errors
    assert "going on from step" in errors[0]
    shutil.copytree(folder_in(one), tmp_path / "back")
    codes, errors = hosts.finish(*hosts.start_two(tmp_path / "back", environment))
    assert codes == [0, 0], errors
    assert "going on from step" in errors[0]
    assert tiny.final_bits(tmp_path / "back") == tiny.final_bits(folder_in(apart / "one"))


@pytest.mark.effects
@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_machines_is_killed_and_two_new_ones_go_on_to_the_same_bits(tmp_path, environment, apart, which):
    one, two = tmp_path / "one", tmp_path / "two"
    processes = start_apart(environment, tmp_path / "store", (one, two), "--slow=0.2")
    began = time.monotonic()
    codes, errors = stop_at(19, processes, one, signal.SIGKILL, which)
    assert time.monotonic() - began < 120
    assert codes[which] == -signal.SIGKILL, errors
    assert codes[1 - which] in (1, -signal.SIGABRT), errors  # told by us or by jax
    if codes[1 - which] == 1:
        assert hosts.SENTENCE in errors[1 - which]
    errors = run_apart(environment, tmp_path / "store", (tmp_path / "three", tmp_path / "four"))
    assert "going on from step" in errors[0]
    assert tiny.final_bits(folder_in(tmp_path / "three")) == tiny.final_bits(folder_in(apart / "one"))


@pytest.mark.effects
def test_killed_at_random_writes_it_ends_bit_for_bit(tmp_path, environment, apart):
    kills = [random.randrange(90) for _ in range(3)]
    print("killed after writes", kills)
    for turn, kill in enumerate(kills):
        machines = (tmp_path / f"machine_{turn % 2}", tmp_path / f"machine_{1 - turn % 2}")
        codes, errors = hosts.finish(*start_apart(environment, tmp_path / "store", machines, kill_after=(kill, -1)))
        assert codes == [0, 0] or codes[0] == -signal.SIGKILL, errors
        assert "damaged" not in errors[0] + errors[1]
    run_apart(environment, tmp_path / "store", (tmp_path / "last", tmp_path / "other"))
    assert tiny.final_bits(folder_in(tmp_path / "last")) == tiny.final_bits(folder_in(apart / "one"))


@pytest.mark.effects
def test_what_one_machine_cannot_bring_down_is_passed_over_by_both(tmp_path, monkeypatch, environment, apart):
    """The first machine has the checkpoint whole; the second one's folder is of another run besides."""
    one, two = tmp_path / "one", tmp_path / "two"
    processes = start_apart(environment, tmp_path / "store", (one, two), "--slow=0.2")
    codes, errors = stop_at(18, processes, one, signal.SIGTERM, 0)
    assert codes == [0, 0], errors
    store = look_at(tmp_path, monkeypatch, tmp_path / "store")
    newest = saved_there(store.names())[-1]
    name = next(name for name in store.names(newest.folder) if "/d/" in name)
    store.write(name, bytes(byte ^ 1 for byte in store.read(name)))
    other = folder_in(two)
    shutil.copytree(folder_in(apart / "one"), other, dirs_exist_ok=True)
    (other / "checkpoints" / "03_more" / "99" / "meta").mkdir(parents=True)
    (other / "checkpoints" / "03_more" / "99" / "meta" / "metadata").write_text("{}")
    errors = run_apart(environment, tmp_path / "store", (one, two))
    assert f"warning: the checkpoint {RUN}/{newest.folder} is damaged and was passed over: its object" in errors[1]
    assert f"{newest.step} is damaged and was passed over: it is not there" in errors[0]
    assert tiny.final_bits(folder_in(one)) == tiny.final_bits(folder_in(apart / "one"))


@pytest.mark.effects
def test_an_upload_that_is_refused_and_an_address_that_is_lost_end_both(tmp_path, environment):
    one, two = tmp_path / "one", tmp_path / "two"
    refusing = environment | {"REFUSE": "00_teacher/10.json"}
    codes, errors = hosts.finish(*start_apart(refusing, tmp_path / "first", (one, two)))
    assert codes[0] == 1, errors
    assert codes[1] in (1, -signal.SIGABRT), errors
    assert f"the run can't be brought up to {RUN}: " in errors[0]
    refusing = environment | {"REFUSE": "02_student/12.json"}  # the last one, which both wait for
    ended = hosts.finish(*start_apart(refusing, tmp_path / "second", (tmp_path / "three", two)))
    hosts.told_by_all(ended, 1, f"the run can't be brought up to {RUN}: ")
    shutil.rmtree(one)
    (tmp_path / "store").mkdir()
    processes = start_apart(environment, tmp_path / "store", (one, two), "--slow=0.5")
    while not any("00_teacher%2F12.json" in path.name for path in (tmp_path / "store").iterdir()):
        time.sleep(0.01)
    lease = {"owner": "x", "host": "elsewhere", "pid": 7}
    (tmp_path / "store" / "bucket%2Frun%2F.lease%2F00000099.json").write_text(json.dumps(lease))
    codes, errors = hosts.finish(*processes)
    assert codes[0] == 1, errors
    assert codes[1] in (1, -signal.SIGABRT), errors
    assert "was taken over by another launcher (process 7 on elsewhere)" in errors[0]


@pytest.mark.effects
def test_a_full_disk_of_the_first_machine_ends_both_at_once(tmp_path, environment):
    full = ("bash", "-c", 'ulimit -f 4; exec "$@"', "bash")
    began = time.monotonic()
    processes = start_apart(environment, tmp_path / "store", (tmp_path / "one", tmp_path / "two"), prefixes=(full, ()))
    codes, errors = hosts.finish(*processes)
    assert time.monotonic() - began < 60
    assert codes[0] == 1, errors
    assert codes[1] in (1, -signal.SIGABRT), errors
    assert "can't be written: " in errors[0]
    assert "File too large" in errors[0]


@pytest.mark.effects
def test_other_addresses_are_refused_by_both(tmp_path, environment):
    processes = start_apart(
        environment,
        tmp_path / "store",
        (tmp_path / "one", tmp_path / "two"),
        both=((), ("--workdir=gs://bucket/other",)),
    )
    hosts.told_by_all(
        hosts.finish(*processes),
        2,
        f"the same address for their workdir: it is {RUN} in process 0 and gs://bucket/other in process 1",
    )
    assert not list((tmp_path / "store").iterdir())


# Without processes


class World:
    """Processes that are threads: what they say to each other, and a folder for each."""

    def __init__(self, folders, monkeypatch):
        self.folders, self.barrier = folders, threading.Barrier(len(folders), timeout=20)
        self.said, self.local = [""] * len(folders), threading.local()
        for module in (agreement, claim):
            monkeypatch.setattr(module, "several", lambda: True)
            monkeypatch.setattr(module, "exchange", self.exchange)
        monkeypatch.setattr(agreement, "is_main", lambda: self.local.index == 0)
        for module in (claim, mirror):
            monkeypatch.setattr(module, "workdir_path", lambda workdir: folders[self.local.index])
        monkeypatch.setattr(claim, "prepare_workdir", lambda workdir: None)

    def exchange(self, text):
        self.said[self.local.index] = text
        self.barrier.wait()
        said = list(self.said)
        self.barrier.wait()
        return said

    def run(self, action):
        """What the action gives in each process, or raises."""

        def one(index):
            self.local.index = index
            try:
                return action(index)
            except Exception as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(len(self.folders)) as pool:
            return list(pool.map(one, range(len(self.folders))))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two machines with two processes each: a folder has two names, as one of each process."""
    fake.use(tmp_path / "store")
    for machine in "ab":
        (tmp_path / machine).mkdir()
    folders = [tmp_path / name for name in ("a", "a_again", "b", "b_again")]
    for folder in folders[1::2]:
        folder.symlink_to(tmp_path / folder.name[0])
    processes = World(folders, monkeypatch)
    monkeypatch.setattr(jax, "process_index", lambda: processes.local.index)
    monkeypatch.setattr(jax, "process_count", lambda: len(folders))
    return processes


def write_checkpoint(folder, phase, step, words="numbers", frozen="frozen"):
    for name, text in {f"checkpoints/{phase}/{step}/state": f"{words} of {step}",
                       f"checkpoints/frozen/{'ab' * 16}/state": frozen}.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_one_process_of_each_other_machine_gets_the_checkpoints(world):
    first, second = world.folders[0], world.folders[2]
    (second / ".shared-of-a-killed-one-2").touch()
    inside, locked = threading.Barrier(4, timeout=20), []

    def action(index):
        with claimed_by_all(RUN, print, lambda: write_checkpoint(first, "00_a", 3)) as apart:
            found = apart, claim._held[world.folders[index]].follower is not None, saved_here(world.folders[index])
            inside.wait()
            if not index:
                write_checkpoint(first, "00_a", 5)
            with claimed_by_all(world.folders[index]) as again:
                assert again
                newest = saved_here(world.folders[index])[-1]
            locked.append((index, is_locked(world.folders[index])))
            inside.wait()
        return *found, newest

    there = [Saved("00_a", 3)]
    assert world.run(action) == [(True, follows, there, Saved("00_a", 5)) for follows in (False, False, True, False)]
    assert sorted(locked) == [(index, True) for index in range(4)]
    assert not is_locked(first)
    assert not is_locked(second)
    assert claim._held == {}
    assert [path.name for path in (*first.iterdir(), *second.iterdir()) if "shared" in path.name] == []
    assert (second / "checkpoints" / "00_a" / "5" / "state").read_text() == "numbers of 5"


def is_locked(folder):
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_place_that_differs_is_refused_by_all(world):
    def addresses(index):
        with claimed_by_all(RUN if index < 2 else world.folders[index]):
            raise AssertionError

    for error in world.run(addresses):
        assert isinstance(error, ConfigError)
        assert f"it is {RUN} in process 0 and a folder in process 2" in str(error)

    def folders(index):
        with claimed_by_all(world.folders[index]):
            raise AssertionError

    for error in world.run(folders):
        assert isinstance(error, ConfigError)
        assert re.match(rf"the workdir {world.folders[2]}(_again)? must be on a file system that all", str(error))
    assert not [path for path in world.folders[0].iterdir() if "shared" in path.name]


def test_what_a_follower_cannot_do_ends_all_and_leaves_the_address(world, monkeypatch):
    monkeypatch.setattr(follower, "saved_there", lambda names: 1 / 0)

    def action(index):
        with claimed_by_all(RUN):
            raise AssertionError

    errors = world.run(action)
    assert isinstance(errors[2], ZeroDivisionError)
    assert all("process 2 failed: division by zero" in str(error) for error in (errors[0], errors[1], errors[3]))
    assert b'"left": true' in ObjectStore(RUN).read(".lease/00000001.json")


def test_values_and_data_come_from_process_0(world, monkeypatch):
    assert world.run(lambda index: agreement.from_main(lambda: [index])) == [[0]] * 4
    errors = world.run(lambda index: agreement.from_main(lambda: 1 // index))
    assert [type(error).__name__ for error in errors] == ["ZeroDivisionError", *["HostError"] * 3]
    for facts in ({"digest": "x"}, {"digest": "x"}):
        assert world.run(lambda index: settle_data(facts, world.folders[index])) == [None] * 4
    assert not (world.folders[2] / "data.json").exists()
    errors = world.run(lambda index: settle_data({"digest": "y" if index == 3 else "x"}, world.folders[index]))
    assert all("the data has changed since the run in" in str(error) for error in errors)


def test_a_vocabulary_is_process_0_s(world):
    pytest.importorskip("tokenizers", reason="the extra text has them")
    from poise.launch.lm import LanguageModelConfig, byte_pairs

    config, text = LanguageModelConfig(workdir="x", vocab_size=280), b"the same words are the same words again " * 20
    (world.folders[2] / "vocabulary.json").write_text("of another run")
    first, *others = world.run(lambda index: byte_pairs(config, text, world.folders[index]).to_json())
    assert first == (world.folders[0] / "vocabulary.json").read_text()
    assert others == [first] * 3


def follow(tmp_path, said):
    folder = tmp_path / "follower"
    folder.mkdir(exist_ok=True)
    return Follower(ObjectStore(RUN), folder, said.append), folder


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A run of one machine in a store."""
    fake.use(tmp_path / "store")
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "main"))
    folder = prepare_workdir(RUN)
    with claimed_workdir(RUN):
        write_checkpoint(folder, "00_a", 3)
        write_checkpoint(folder, "01_b", 4)
        (folder / "metrics.jsonl").write_text("{}")
    return folder


def test_a_follower_has_the_checkpoints_of_the_store_and_nothing_else(tmp_path, made):
    said = []
    own, folder = follow(tmp_path, said)
    write_checkpoint(folder, "01_b", 4, words="another run's words", frozen="another")
    write_checkpoint(folder, "02_c", 9)
    for name in ("metrics.jsonl", ".whole", ".owner", "data/set", "checkpoints/01_b/4/more"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("1")
    own.refresh()
    assert saved_here(folder) == [Saved("00_a", 3), Saved("01_b", 4)]
    kept = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    frozen = f"checkpoints/frozen/{'ab' * 16}/state"
    assert kept == [".owner", "checkpoints/00_a/3/state", "checkpoints/01_b/4/state", frozen, "data/set"]
    for name in kept[1:4]:
        assert (folder / name).read_bytes() == (made / name).read_bytes()
    assert said == []


def test_a_follower_reads_a_file_again_only_when_it_changed(tmp_path, made, monkeypatch):
    own, folder = follow(tmp_path, [])
    own.refresh()
    read = []
    monkeypatch.setattr(follower, "digest_of", lambda path: (read.append(path), digest_of(path))[1])
    own.refresh()
    assert read == []
    path = folder / "checkpoints" / "01_b" / "4" / "state"
    path.write_text(path.read_text().replace("4", "5"))
    own.refresh()
    assert set(read) == {path}
    assert path.read_text() == "numbers of 4"


def test_a_follower_tells_of_a_checkpoint_that_is_damaged_in_the_store(tmp_path, made):
    said = []
    own, folder = follow(tmp_path, said)
    own.refresh()
    store = ObjectStore(RUN)
    store.write("checkpoints/01_b/4/state", b"numbers of 5")
    (folder / "checkpoints" / "01_b" / "4" / "state").unlink()
    own.refresh()
    assert saved_here(folder) == [Saved("00_a", 3)]
    (sentence,) = said
    assert sentence.startswith(f"warning: the checkpoint {RUN}/checkpoints/01_b/4 is damaged and was passed over: its")


def test_frozen_parts_that_were_made_again_are_those_of_the_newest_checkpoint(tmp_path, made, monkeypatch):
    prepare_workdir(RUN)
    with claimed_workdir(RUN):
        write_checkpoint(made, "01_b", 6, frozen="the same, in another file")
    own, folder = follow(tmp_path, said := [])
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "another"))
    prepare_workdir(RUN)
    own.refresh()
    assert said == []  # of the ones before, which the older checkpoint lists
    with claimed_workdir(RUN):
        for place in (folder, workdir_path(RUN)):
            assert saved_here(place)[-1] == Saved("01_b", 6)
            assert (place / f"checkpoints/frozen/{'ab' * 16}/state").read_text() == "the same, in another file"


# Leaves


def split_state(seed):
    """All types of leaves, some of them split over four devices."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    key = jax.random.key(seed)
    leaves = {
        "w": (jax.random.normal(key, (8, 3)), split),
        "half": (jnp.full(4, 0.1 * seed, jnp.bfloat16), split),
        "keys": (jax.random.split(key, 4), split),
        "flags": (jnp.array([True, False, True, True]), whole),
        "count": (jnp.int32(seed), whole),
        "empty": (jnp.zeros((0, 3)), whole),
    }
    frozen = {"teacher": jax.device_put(jnp.arange(8.0), split), "none": jnp.zeros((0,))}
    frozen["none"] = jax.device_put(frozen["none"], whole)
    return {name: jax.device_put(leaf, sharding) for name, (leaf, sharding) in leaves.items()} | {"frozen": frozen}


def plain(leaf):
    keys = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if keys else leaf)


def save(path, step, by_main, log=print):
    state = split_state(step)
    layout = Layout(state)
    store = CheckpointStore(path / "checkpoints", [("a", 9)], 0, 2, log, by_main)
    store.save(0, step, layout, *layout.split(state), {"a": 1.0})
    store.close()


def test_leaves_are_gathered_as_numbers():
    state = split_state(3)
    leaves = jax.tree.leaves(state)
    for leaf, found in zip(leaves, gathered(leaves), strict=True):
        assert type(found) is np.ndarray
        assert (found.dtype, found.tobytes()) == (plain(leaf).dtype, plain(leaf).tobytes())


@pytest.mark.parametrize("by_main", [True, False])
def test_checkpoints_of_both_ways_are_read_both_ways(tmp_path, by_main):
    save(tmp_path, 3, by_main)
    save(tmp_path, 4, not by_main)
    state = split_state(4)
    layout = Layout(state)
    live, frozen = layout.split(state)
    shardings = [([leaf.sharding for leaf in live], [leaf.sharding for leaf in frozen])]
    for way in (True, False):
        store = CheckpointStore(tmp_path / "checkpoints", [("a", 9)], 0, 2, print, way)
        found = store.restore_newest([layout], shardings)
        assert found.step == 4
        for leaf, other in zip((*live, *frozen), (*found.live, *found.frozen), strict=True):
            assert (leaf.dtype, leaf.sharding) == (other.dtype, other.sharding)
            assert plain(leaf).tobytes() == plain(other).tobytes()
    for name, leaf in restore_tree(tmp_path / "checkpoints" / "00_a" / "3").items():
        if name != "frozen":
            assert plain(leaf).tobytes() == plain(split_state(3)[name]).tobytes()


def test_damaged_frozen_parts_are_written_anew_by_process_0(tmp_path):
    said = []
    save(tmp_path, 3, True)
    save(tmp_path, 4, True, said.append)
    assert said == []
    (home,) = (tmp_path / "checkpoints" / "frozen").iterdir()
    verify_by_itself(home, read_frozen_manifest(home))
    entries = read_frozen_manifest(home)
    with pytest.raises(Damaged, match="its leaf frozen/teacher has checksum"):
        verify_by_itself(home, [entry | {"digest": "0" * 16} for entry in entries])
    for path in (home / "state").rglob("d/*"):
        path.write_bytes(b"")
    save(tmp_path, 5, True, said.append)
    assert len(said) == 1
    assert "is damaged and is written anew: " in said[0]
    verify_by_itself(home, read_frozen_manifest(home))


def test_a_checkpoint_that_process_0_cannot_write_is_told(tmp_path, monkeypatch):
    def refuse(self, *arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", refuse)
    world = World([tmp_path / "one", tmp_path / "two"], monkeypatch)
    state = {"w": jnp.zeros(3)}
    layout = Layout(state)

    def action(index):
        store = CheckpointStore(world.folders[index] / "checkpoints", [("a", 9)], 0, 2, print, True)
        store.save(0, 3, layout, *layout.split(state), {"a": 1.0})

    for error in world.run(action):
        assert type(error) is CheckpointError
        sentence = f"the checkpoint {tmp_path}/one/checkpoints/00_a/3 can't be written: No space left on device; "
        assert str(error).startswith(sentence)
    assert not (tmp_path / "two").exists()
