"""What becomes of a run whose machines share no folder where the store or one machine lost a part of a checkpoint."""

import contextlib
import fcntl
import importlib.util
import pathlib
import re
import shutil
import socket
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.launch import checkpoint, claim
from poise.launch.checkpoint import CheckpointStore
from poise.launch.commits import saved_here
from poise.launch.follower import Follower
from poise.launch.leaves import Layout
from poise.launch.lock import WorkdirLocked
from poise.launch.manifest import CheckpointError
from poise.launch.mirror import claimed_workdir, mirror_of
from poise.launch.object_store import ObjectStore
from poise.launch.workdir import prepare_workdir

HERE = pathlib.Path(__file__).parent
RUN = "gs://bucket/run"
PHASES = [("teacher", 5), ("student", 9)]
TEACHER = np.arange(4.0, dtype=np.float32)


def load(name):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


apart = load("test_apart")


def state(step):
    return {"w": jnp.full(3, float(step)), "frozen": {"teacher": jnp.asarray(TEACHER)}}


LAYOUTS = [Layout({"w": jnp.zeros(3)}), Layout(state(0))]


class Machines:
    """Two machines, each a thread: process 0 writes a run to a store, the other has what it brings from there."""

    def __init__(self, tmp_path, monkeypatch):
        apart.fake.use(tmp_path / "store")
        monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / "main"))
        self.store, self.said = ObjectStore(RUN), []
        self.folders = [prepare_workdir(RUN), tmp_path / "other"]
        self.folders[1].mkdir()
        with claimed_workdir(RUN):
            own = CheckpointStore(self.folders[0] / "checkpoints", PHASES, 0, 2, print)
            own.save(0, 5, LAYOUTS[0], [jnp.ones(3)], [], {})
            for step in (3, 6):
                own.save(1, step, LAYOUTS[1], *LAYOUTS[1].split(state(step)), {})
            own.close()
        self.follower = Follower(self.store, self.folders[1], self.said.append)
        self.world = apart.World(self.folders, monkeypatch)
        self.world.local.index = 0  # of the thread that claims
        monkeypatch.setattr(checkpoint, "quiet_orbax", contextlib.nullcontext)  # which is a process's, not a thread's
        self.home = "/".join(next(name for name in self.objects() if "/frozen/" in name).split("/")[:3])

    def objects(self):
        return {name: self.store.read(name) for name in self.store.names("checkpoints")}

    def frozen(self):
        """The files of the frozen part that have a content, the longest first."""
        found = {name: raw for name, raw in self.objects().items() if name.startswith(f"{self.home}/") and raw}
        return sorted(found, key=lambda name: (-len(found[name]), name))

    def claim(self):
        """What is done when a run begins: process 0 brings up, the other brings down."""
        with claimed_workdir(RUN, self.said.append):
            mirror_of(self.folders[0]).bring_up()
            self.follower.refresh()

    def restore(self, teacher=TEACHER):
        """What each process reads, or raises."""
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = [([device], [device] * len(layout.frozen_names)) for layout in LAYOUTS]

        def one(process):
            log = self.said.append if not process else lambda sentence: None
            own = CheckpointStore(self.folders[process] / "checkpoints", PHASES, 0, 2, log, apart=True)
            found = own.restore_newest(LAYOUTS, shardings, lambda phase, previous: [jnp.asarray(teacher)])
            assert found.live[0].tolist() == [6.0] * 3
            assert found.frozen[0].tolist() == TEACHER.tolist()
            return found.phase, found.step

        return self.world.run(one)


@pytest.fixture
def machines(tmp_path, monkeypatch):
    return Machines(tmp_path, monkeypatch)


def test_what_the_store_lost_of_checkpoints_is_there_again_before_others_read_it(machines):
    before = machines.objects()
    missing, cut, *_ = machines.frozen()
    machines.store.remove(missing)
    machines.store.write(cut, before[cut][:-1])
    machines.store.remove(next(name for name in before if name.startswith("checkpoints/01_student/6/")))
    machines.claim()
    assert machines.objects() == before
    assert machines.said == [f"3 files of checkpoints were missing in {RUN} and are there again"]
    assert machines.restore() == [(1, 6)] * 2
    machines.said.clear()
    apart.fake.LocalStore.changes.clear()
    machines.claim()
    assert machines.said == []
    assert not [name for name in apart.fake.LocalStore.changes if "/checkpoints/" in name]


def test_a_file_that_is_another_than_what_was_listed_does_not_go_up(machines):
    name, *_ = machines.frozen()
    path = machines.folders[0] / name
    path.write_bytes(path.read_bytes()[::-1])
    machines.store.remove(name)
    machines.claim()
    assert name not in machines.objects()
    (sentence,) = machines.said
    assert sentence.startswith(f"warning: the frozen part {RUN}/{machines.home} can't be brought to this machine: its")
    assert sentence.endswith(f"object {name} is missing")
    assert not (machines.folders[1] / machines.home).exists()


def test_files_that_are_whole_here_need_no_object(machines):
    machines.follower.refresh()
    for name in (machines.frozen()[0], next(name for name in machines.objects() if "01_student/6/" in name)):
        machines.store.remove(name)
    machines.follower.refresh()
    assert machines.said == []
    assert saved_here(machines.folders[1]) == saved_here(machines.folders[0])
    assert machines.restore() == [(1, 6)] * 2


@pytest.mark.parametrize("made", [TEACHER, TEACHER + 1], ids=["the same", "another"])
def test_a_frozen_part_that_only_another_machine_lacks_costs_process_0_nothing(machines, made):
    name, *_ = machines.frozen()
    whole = machines.store.read(name)
    machines.store.write(name, whole[::-1])
    before = machines.objects()
    machines.claim()
    (sentence,) = machines.said
    assert sentence.endswith(f"object {name} is not what its digest says")
    for error in machines.restore(made):
        assert isinstance(error, CheckpointError)
        assert "is whole on process 0 and can't be read on another machine: it is not there" in str(error)
        assert f"remove {machines.home} there" in str(error)
    assert (machines.folders[0] / name).read_bytes() == whole
    assert not (machines.folders[0] / "checkpoints" / "damaged").exists()
    machines.claim()
    assert machines.objects() == before
    for name in machines.frozen():  # as the sentence says
        machines.store.remove(name)
    machines.claim()
    assert machines.restore(made) == [(1, 6)] * 2


def test_a_frozen_part_that_process_0_lacks_is_made_again(machines):
    machines.claim()
    shutil.rmtree(machines.folders[0] / machines.home / "meta")
    assert machines.restore() == [(1, 6)] * 2
    (sentence,) = machines.said
    assert "is damaged; the same leaves were made again: " in sentence
    assert (machines.folders[0] / "checkpoints" / "damaged").is_dir()
    machines.claim()
    assert machines.restore() == [(1, 6)] * 2


def test_a_follower_waits_for_its_folder_as_long_as_a_killed_run_may_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0)
    monkeypatch.setattr(claim, "_LEAVING_SECONDS", 0.1)
    with (tmp_path / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(WorkdirLocked, match=f"^on {re.escape(socket.gethostname())}: another launcher"),
            claim._lock_in_time(tmp_path),
        ):
            raise AssertionError
        monkeypatch.setattr(claim, "_LEAVING_SECONDS", 30)
        began = time.monotonic()
        threading.Timer(0.6, lambda: fcntl.flock(other, fcntl.LOCK_UN)).start()
        with claim._lock_in_time(tmp_path):
            assert time.monotonic() - began > 0.5
