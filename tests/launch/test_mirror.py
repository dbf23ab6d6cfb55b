"""Runs in object stores: what is in the store is whole after every single write, and belongs to one launcher."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import threading
import time

import pytest

from poise.launch import commits, lease, mirror, object_store
from poise.launch.commits import Saved, saved_here
from poise.launch.config import ConfigError, field
from poise.launch.execution import ExecutionConfig
from poise.launch.local_copy import local_copy
from poise.launch.lock import WorkdirLocked
from poise.launch.main import launch
from poise.launch.manifest import CheckpointError
from poise.launch.mirror import claimed_workdir, mirror_of
from poise.launch.object_store import (
    MissingObject,
    ObjectStore,
    StoreError,
    checked_address,
    delivered,
    is_safe,
    settled,
)
from poise.launch.workdir import prepare_workdir, workdir_path
from poise.launch.writers import truncate_jsonl

HERE = pathlib.Path(__file__).parent
spec = importlib.util.spec_from_file_location("local_store", HERE / "local_store.py")
fake = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fake)
RUN = "gs://bucket/run"
STEPS = 6


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    """A store, and a machine whose cache folder is there."""
    fake.use(tmp_path / "store")
    move_to(tmp_path, monkeypatch, "one")
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.01)
    return ObjectStore(RUN)


def move_to(tmp_path, monkeypatch, machine):
    monkeypatch.setenv("POISE_SCRATCH", str(tmp_path / machine))
    monkeypatch.setattr(lease.socket, "gethostname", lambda: machine)
    monkeypatch.setattr(mirror.socket, "gethostname", lambda: machine)


def content(step):
    return {"meta/metadata": f"about {step}", "state/d/0": f"numbers of step {step}" * 20, "state/empty": ""}


def write_checkpoint(folder, phase, step):
    """As orbax does: under another name, and then all at once."""
    target = folder / "checkpoints" / phase / str(step)
    temporary = target.with_name(f"{step}.orbax-checkpoint-tmp")
    for name, text in content(step).items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_text(text)
    temporary.rename(target)
    return target


def toy_run(steps=STEPS, keep=2, after_row=lambda step: None):
    """What the training loop does with files, without training: saved every second step, in two phases."""
    phases = {"00_a": steps // 2, "01_b": steps}  # steps at which they end
    prepare_workdir(RUN)
    folder = workdir_path(RUN)
    with claimed_workdir(RUN):
        here = saved_here(folder)
        for saved in here:
            assert {path.name for path in (folder / saved.folder).rglob("*") if path.is_file()} == {
                pathlib.PurePath(name).name for name in content(saved.step)
            }
        done = here[-1].step if here else 0
        frozen = folder / "checkpoints" / "frozen" / ("ab" * 16) / "state"
        frozen.parent.mkdir(parents=True, exist_ok=True)
        frozen.write_text("frozen")
        (folder / "config.json").write_text("{}")
        rows = folder / "metrics.jsonl"
        truncate_jsonl(rows, ["all"], ("all", done) if done else None)
        up = mirror_of(folder)
        for step in range(done + 1, steps + 1):
            with rows.open("a") as file:
                file.write(json.dumps({"phase": "all", "step": step, "loss": 1 / step}) + "\n")
            after_row(step)
            phase = next(name for name, end in phases.items() if step <= end)
            if step % 2 == 0 or step in phases.values():
                up.wait()
                up.saved(folder / "checkpoints" / phase / str(step))
                write_checkpoint(folder, phase, step)
                for old in [saved for saved in saved_here(folder) if saved.phase == phase][:-keep]:
                    shutil.rmtree(folder / old.folder)
            up.check()
        up.wait()
        (folder / "report.json").write_text('{"finished": true}')
    return done


def objects(store):
    return {name: store.read(name) for name in store.names() if not name.startswith(".lease/")}


def check_invariants(store):
    """What somebody who comes now finds: every checkpoint whole, and the rows of all steps up to it."""
    names = store.names()
    for saved in commits.saved_there(names):
        files, frozen = commits.read_commit(saved, store.read(saved.commit))
        for name, (size, digest) in {**files, **frozen}.items():
            raw = store.read(name)
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (size, digest)
        steps = [json.loads(line)["step"] for line in store.read("metrics.jsonl").splitlines()]
        assert steps[: saved.step] == list(range(1, saved.step + 1))


def test_a_run_in_a_store_is_there_whole_and_goes_on_from_any_machine(tmp_path, monkeypatch, store):
    assert toy_run() == 0
    check_invariants(store)
    names = store.names()
    assert {"config.json", "metrics.jsonl", "report.json"} <= set(names)
    assert commits.saved_there(names) == [Saved("00_a", 2), Saved("00_a", 3), Saved("01_b", 4), Saved("01_b", 6)]
    before = objects(store)
    assert toy_run() == STEPS  # the same machine
    move_to(tmp_path, monkeypatch, "two")
    assert toy_run() == STEPS
    assert objects(store) == before
    first, second = (next((tmp_path / machine / "run").iterdir()) for machine in ("one", "two"))
    for path in (path for path in first.rglob("*") if path.is_file() and not path.name.startswith(".")):
        assert (second / path.relative_to(first)).read_bytes() == path.read_bytes()
    assert toy_run(steps=8) == STEPS  # longer
    assert Saved("01_b", 8) in commits.saved_there(store.names())


def test_results_come_last_and_other_files_only_when_they_changed(store):
    toy_run()
    changes = [name.removeprefix("bucket/run/") for name in fake.LocalStore.changes]
    assert changes.count("config.json") == 1
    assert changes.index("report.json") > changes.index(".commits/01_b/6.json")
    for place, name in enumerate(changes):
        if name.startswith(".commits/0"):
            assert "metrics.jsonl" in changes[:place]


def assert_same(store, whole):
    """The very objects; a checkpoint that was to go next may be left, whole."""
    check_invariants(store)
    now = objects(store)
    assert {name: now.get(name) for name in whole} == whole
    left = [saved for saved in commits.saved_there(store.names()) if saved.commit not in whole]
    for name in now.keys() - whole.keys():
        assert name.startswith(tuple(f"{saved.folder}/" for saved in left)) or name in [saved.commit for saved in left]
    assert len(left) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("same_machine", [True, False])
def test_killed_after_every_single_write_it_ends_the_same(tmp_path, monkeypatch, same_machine):
    toy_run(keep=1)
    whole = objects(ObjectStore(RUN))
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 0.0)  # the killed one's
    for kill in range(1000):
        home = tmp_path / f"store_{kill}"
        fake.use(home, gone_after=kill)
        move_to(tmp_path, monkeypatch, f"a{kill}")
        try:
            toy_run(keep=1)
            break
        except fake.Gone:
            pass
        fake.use(home)
        store = ObjectStore(RUN)
        check_invariants(store)
        if not same_machine:
            move_to(tmp_path, monkeypatch, f"b{kill}")
        toy_run(keep=1)
        assert_same(store, whole)
        shutil.rmtree(home)
        for machine in ("a", "b"):
            shutil.rmtree(tmp_path / f"{machine}{kill}", ignore_errors=True)
    assert kill > 30


def test_killed_twice_on_two_machines(tmp_path, monkeypatch):
    toy_run(keep=1)
    whole = objects(ObjectStore(RUN))
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 0.0)
    for kill in range(3, 30, 4):
        home = tmp_path / f"store_{kill}"
        for turn, machine in enumerate("aba"):  # the first one's folder is of another time when it comes again
            move_to(tmp_path, monkeypatch, f"{machine}{kill}")
            fake.use(home, gone_after=kill if turn < 2 else -1)
            try:
                toy_run(keep=1)
            except fake.Gone:
                check_invariants(ObjectStore(RUN))
        assert_same(ObjectStore(RUN), whole)


def test_a_machine_whose_run_went_on_elsewhere_takes_what_the_store_has(tmp_path, monkeypatch, store):
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 0.0)
    fake.use(tmp_path / "store", refuse=".commits/01_b/6")  # it trains to the end, and can't say so
    with pytest.raises(CheckpointError, match=r"can't be brought up to gs://bucket/run: .*Permission denied"):
        toy_run()
    fake.use(tmp_path / "store")
    assert saved_here(workdir_path(RUN))[-1] == Saved("01_b", 6)
    move_to(tmp_path, monkeypatch, "two")
    assert toy_run() == 4
    move_to(tmp_path, monkeypatch, "one")
    (workdir_path(RUN) / "leftover.txt").write_text("of another time")
    assert toy_run() == STEPS
    assert not (workdir_path(RUN) / "leftover.txt").exists()
    assert "leftover.txt" not in store.names()


def test_a_refused_upload_costs_nothing_that_this_machine_has(tmp_path, store):
    fake.use(tmp_path / "store", refuse="checkpoints/01_b/4/state")
    with pytest.raises(CheckpointError) as raised:
        toy_run()
    sentence = str(raised.value)
    assert "the run can't be brought up to gs://bucket/run: gs://bucket/run/checkpoints/01_b/4/state" in sentence
    assert f"this machine has the rest in {workdir_path(RUN)}" in sentence
    assert "\n" not in sentence
    check_invariants(store)
    fake.use(tmp_path / "store")
    assert toy_run() >= 4  # from this machine's own folder
    check_invariants(store)
    assert commits.saved_there(store.names())[-1] == Saved("01_b", 6)


def test_a_swept_cache_folder_is_filled_again(store):
    toy_run()
    path = workdir_path(RUN) / "checkpoints" / "01_b" / "6" / "state" / "d" / "0"
    path.unlink()
    assert toy_run() == STEPS
    assert path.read_text() == content(6)["state/d/0"]
    shutil.rmtree(workdir_path(RUN) / "checkpoints")
    assert toy_run() == STEPS
    check_invariants(store)


def interrupted(store):
    """A run that keeps one checkpoint and ends, as by SIGKILL, when the last that it made is not in the store."""
    fake.use(fake.LocalStore.home, refuse="checkpoints/01_b/6/state")
    with pytest.raises(CheckpointError):
        toy_run(keep=1)
    fake.use(fake.LocalStore.home)
    assert saved_here(workdir_path(RUN)) == [Saved("00_a", 3), Saved("01_b", 6)]
    assert Saved("01_b", 4) in commits.saved_there(store.names())


def test_a_checkpoint_that_nobody_has_looked_at_takes_no_other_s_place(store):
    interrupted(store)
    folder = workdir_path(RUN)
    (folder / "checkpoints" / "01_b" / "6" / "state" / "d" / "0").unlink()  # a power cut, a swept cache
    with claimed_workdir(RUN):
        up = mirror_of(folder)
        up.wait()
        assert Saved("01_b", 6) not in commits.saved_there(store.names())
        assert saved_here(folder)[-2:] == [Saved("01_b", 4), Saved("01_b", 6)]
        for name, text in content(4).items():
            assert (folder / "checkpoints" / "01_b" / "4" / name).read_text() == text
        (folder / "checkpoints" / "01_b" / "6").rename(folder / "aside")  # as reading does with a damaged one
        shutil.rmtree(folder / "aside")
    check_invariants(store)
    assert commits.saved_there(store.names())[-1] == Saved("01_b", 4)


def test_the_one_that_a_claim_without_a_look_brings_up_leaves_the_one_before(store):
    interrupted(store)
    with pytest.raises(ConfigError), claimed_workdir(RUN):
        raise ConfigError("a flag")
    assert Saved("01_b", 4) in commits.saved_there(store.names())
    check_invariants(store)


def test_a_tool_s_picture_in_the_store_costs_no_checkpoint(store):
    interrupted(store)
    store.write("samples_nfe1.png", b"picture")
    assert toy_run(keep=1) == STEPS
    assert (workdir_path(RUN) / "samples_nfe1.png").read_bytes() == b"picture"
    check_invariants(store)


def test_an_older_checkpoint_that_was_swept_costs_no_later_one(store):
    interrupted(store)
    swept = workdir_path(RUN) / "checkpoints" / "00_a" / "3" / "state" / "d" / "0"
    swept.unlink()
    assert toy_run(keep=1) == STEPS
    assert swept.read_text() == content(3)["state/d/0"]


def test_without_its_rows_a_later_checkpoint_is_given_up(store):
    interrupted(store)
    (workdir_path(RUN) / "metrics.jsonl").unlink()
    assert toy_run(keep=1) == 4
    check_invariants(store)


def test_in_a_folder_that_goes_on_a_damaged_checkpoint_is_told(store, capsys):
    toy_run()
    for saved in commits.saved_there(store.names()):
        harm(store, saved, "commit cut")
    with pytest.raises(CheckpointError, match="all 4 checkpoints in gs://bucket/run are damaged"):
        toy_run()
    assert "01_b/6 is damaged and was passed over: its list of files is damaged" in capsys.readouterr().err


def test_a_checkpoint_is_the_same_by_its_files_whatever_numbers_the_file_system_gives(monkeypatch, store):
    plain, numbers = os.stat_result, iter(range(1, 10**9))

    def unstable(self, **options):
        facts = os.stat(self, **options)
        return plain((facts.st_mode, next(numbers), *facts[2:]), {"st_mtime_ns": facts.st_mtime_ns})

    toy_run()
    monkeypatch.setattr(pathlib.Path, "stat", unstable)
    before = objects(store)
    fake.LocalStore.changes.clear()
    assert toy_run() == STEPS
    assert objects(store) == before
    assert not [name for name in changed() if "/checkpoints/0" in name or "/.commits/0" in name]


def test_a_checkpoint_that_is_made_again_replaces_the_other_and_one_that_goes_does_not(store):
    toy_run()
    folder = workdir_path(RUN)
    with claimed_workdir(RUN):
        (folder / "checkpoints" / "01_b" / "4" / "state" / "d" / "0").unlink()  # being removed
        fake.LocalStore.changes.clear()
        up = mirror_of(folder)
        up._schedule(None)
        up.wait()
        assert not [name for name in changed() if "01_b/4" in name]
        shutil.rmtree(folder / "checkpoints" / "01_b" / "6")
        write_checkpoint(folder, "01_b", 6)
    assert [name for name in changed() if name.endswith("01_b/6.json")] == ["bucket/run/.commits/01_b/6.json"] * 2
    check_invariants(store)


@pytest.mark.parametrize(
    "damage", ["missing", "cut", "flipped", "commit cut", "commit of another format", "commit empty"]
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, monkeypatch, capsys, store, damage):
    toy_run()
    whole = objects(store)
    harm(store, Saved("01_b", 6), damage)
    move_to(tmp_path, monkeypatch, "two")
    assert toy_run() == 4
    said = capsys.readouterr().err
    assert "warning: the checkpoint gs://bucket/run/checkpoints/01_b/6 is damaged and was passed over: its " in said
    assert objects(store) == whole


def harm(store, saved, damage):
    name = f"{saved.folder}/state/d/0"
    raw = store.read(name)
    if damage == "missing":
        store.remove(name)
    elif damage == "cut":
        store.write(name, raw[:-1])
    elif damage == "flipped":
        store.write(name, bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "commit cut":
        store.write(saved.commit, store.read(saved.commit)[:-9])
    elif damage == "commit empty":
        store.write(saved.commit, commits.commit_content({}, {}))
    else:
        store.write(saved.commit, store.read(saved.commit).replace(b'"format": 1', b'"format": 2'))


def test_rows_of_an_abandoned_future_do_not_meet_its_checkpoint(tmp_path, monkeypatch, store):
    """Killed right after going on from an older checkpoint: a later one that is damaged has its rows, or is gone."""
    toy_run()
    whole = objects(store)
    harm(store, Saved("01_b", 6), "cut")
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 0.0)
    shutil.copytree(tmp_path / "store", tmp_path / "before")
    kill = 0
    while True:
        shutil.rmtree(tmp_path / "store")
        shutil.copytree(tmp_path / "before", tmp_path / "store")
        fake.use(tmp_path / "store", gone_after=kill)
        move_to(tmp_path, monkeypatch, f"two{kill}")
        try:
            toy_run()
            break
        except fake.Gone:
            pass
        fake.use(tmp_path / "store")
        steps = [json.loads(line)["step"] for line in store.read("metrics.jsonl").splitlines()]
        assert all(saved.step <= len(steps) for saved in commits.saved_there(store.names()))
        kill += 1
    assert kill > 5
    assert objects(store) == whole


def test_all_checkpoints_damaged_is_told_and_nothing_is_removed(tmp_path, monkeypatch, store):
    toy_run()
    for saved in commits.saved_there(store.names()):
        harm(store, saved, "cut")
    before = objects(store)
    move_to(tmp_path, monkeypatch, "two")
    with pytest.raises(CheckpointError, match=r"all 4 checkpoints in gs://bucket/run are damaged, the newest, checkp"):
        toy_run()
    assert objects(store) == before


def test_a_damaged_frozen_part_does_not_condemn_a_checkpoint(tmp_path, monkeypatch, store):
    toy_run()
    name = next(name for name in store.names() if "/frozen/" in name)
    store.write(name, b"other")
    move_to(tmp_path, monkeypatch, "two")
    prepare_workdir(RUN)
    with claimed_workdir(RUN):
        assert saved_here(workdir_path(RUN))[-1] == Saved("01_b", 6)
        assert not (workdir_path(RUN) / name).exists()


def test_a_folder_that_was_copied_there_goes_on(tmp_path, monkeypatch, store):
    toy_run()
    whole = objects(store)
    plain = {name: raw for name, raw in whole.items() if not name.startswith(".")}
    monkeypatch.setattr(lease, "EXPIRES_SECONDS", 0.0)
    for kill in (*range(12), -1):
        home = tmp_path / f"copied_{kill}"
        fake.use(home)
        for name, raw in plain.items():
            store = ObjectStore(RUN)
            store.write(name, raw)
        fake.use(home, gone_after=kill)
        move_to(tmp_path, monkeypatch, f"a{kill}")
        try:
            assert toy_run() == STEPS
        except fake.Gone:
            fake.use(home)
            move_to(tmp_path, monkeypatch, f"b{kill}")
            assert toy_run() == STEPS
        assert objects(store) == whole


HOSTILE = [
    "../escaped",
    "/tmp/escaped",
    "C:/escaped",
    ".lock",
    "config.json",
    "checkpoints\\..\\escaped",
    "checkpoints/01_b/6/../../../../escaped",
    "checkpoints/01_b/6",
    "checkpoints/01_b/6/",
    "checkpoints/01_b/6//x",
    "checkpoints/01_b/6/a\n",
    "checkpoints/01_b/66/x",
]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_list_of_files_cannot_lead_out_of_its_checkpoint(store, name, part):
    parts = [{"checkpoints/01_b/6/x": (1, "0" * 64)}, {}]
    parts[part] = {**parts[part], name: (3, hashlib.sha256(b"bad").hexdigest())}
    with pytest.raises(commits.BadCommit, match="which is none of its own"):
        commits.read_commit(Saved("01_b", 6), commits.commit_content(*parts))


@pytest.mark.parametrize("raw", [b"", b"[]", b"\xff", b"null", b'{"sha256": 1}', b"[" * 100_000, b'{"format": 1}'])
def test_a_list_of_files_that_is_none_is_damage(raw):
    with pytest.raises(commits.BadCommit, match="damaged"):
        commits.read_commit(Saved("01_b", 6), raw)


def test_objects_with_hostile_names_stay_where_they_are(tmp_path, monkeypatch, store):
    toy_run()
    for name in ("../../escaped", "a/../../../escaped", "a\\b", "x//y", ".owner", ".lock"):
        fake.LocalStore().pipe_file(f"gs://bucket/run/{name}", b"bad")
    hostile = commits.commit_content({"checkpoints/01_b/6/../../../../escaped": (3, "0" * 64)}, {})
    store.write(Saved("01_b", 6).commit, hostile)
    move_to(tmp_path, monkeypatch, "two")
    assert toy_run() == 4
    assert not list(tmp_path.rglob("escaped"))
    assert b"bad" not in {path.read_bytes() for path in workdir_path(RUN).rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "safe"), [("a/b.c", True), ("", False), ("a/", False), (".", False), ("a/./b", False),
                                            ("x" * 300, False), ("a\0", False), ("é", True)])  # fmt: skip
def test_names_that_are_files(name, safe):
    assert is_safe(name) is safe


# One launcher


def test_a_second_launcher_is_refused_once_the_first_shows_that_it_lives(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    prepare_workdir(RUN)
    with claimed_workdir(RUN):
        with claimed_workdir(RUN), claimed_workdir(workdir_path(RUN)):
            pass
        move_to(tmp_path, monkeypatch, "two")
        prepare_workdir(RUN)
        sentence = r"another launcher \(process \d+ on one\) works in gs://bucket/run"
        with pytest.raises(WorkdirLocked, match=sentence), claimed_workdir(RUN):
            pass
        assert "gs://bucket/run was held by process" in capsys.readouterr().err
        move_to(tmp_path, monkeypatch, "one")
    move_to(tmp_path, monkeypatch, "two")
    with claimed_workdir(RUN):  # the first has left: at once
        pass


class Time:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 0.0, []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


def silent(store, owner, said):
    """A lease whose holder gives no sign, as after SIGKILL."""
    own = lease.Lease(store, owner, said.append)
    own.take()
    own._ended.set()
    own._thread.join()
    return own


def test_a_silent_holder_is_waited_for_and_then_replaced(store, monkeypatch):
    monkeypatch.setattr(lease, "WATCH_SECONDS", 2.0)
    said, clock = [], Time()
    first = silent(store, "first", said)
    second = lease.Lease(store, "second", said.append, clock.clock, clock.sleep)
    assert second.take() == 0
    assert lease.EXPIRES_SECONDS - 1 <= clock.now <= lease.EXPIRES_SECONDS
    assert len(said) == 1
    with pytest.raises(lease.LeaseLost, match=r"gs://bucket/run was taken over by another launcher \(process"):
        first.check()
    second.check()
    second.end()
    third = lease.Lease(store, "third", said.append, clock.clock, clock.sleep)
    before = clock.now
    assert third.take() == 0  # nobody to wait for
    assert clock.now == before
    third.end()


def test_the_time_that_the_holder_was_silent_before_counts(store, monkeypatch):
    clock = Time()
    silent(store, "first", [])
    monkeypatch.setattr(lease, "WATCH_SECONDS", 2.0)
    monkeypatch.setattr(lease.Lease, "_age", lambda self, number: 100.0)
    second = lease.Lease(store, "second", lambda _: None, clock.clock, clock.sleep)
    second.take()
    assert clock.now == pytest.approx(lease.EXPIRES_SECONDS - 100.0)
    second.end()


def test_age_comes_from_the_store_s_clock(store):
    own = silent(store, "first", [])
    path = fake.LocalStore()._file("gs://bucket/run/.lease/00000001.json")
    written = time.time() - 50
    fake.os.utime(path, (written, written))
    assert own._age(1) == pytest.approx(50, abs=1)
    assert set(store.names(".lease")) == {".lease/00000001.json"}


def test_the_same_folder_s_owner_need_not_wait(store):
    clock = Time()
    first = silent(store, "same", [])
    again = lease.Lease(store, "same", lambda _: None, clock.clock, clock.sleep)
    assert again.take() == first.number == 1
    assert clock.now == 0
    again.end()


def test_of_two_that_replace_a_silent_holder_one_wins(store):
    clock, said, won = Time(), [], []
    silent(store, "first", said)
    both = [lease.Lease(store, name, said.append, Time().clock, Time().sleep) for name in ("second", "third")]
    barrier = threading.Barrier(2)
    for own in both:
        own._sleep = lambda seconds: None
        own._clock = iter([0.0, 1000.0, *[float(second) for second in range(1001, 1010)]]).__next__

    def take(own):
        barrier.wait()
        try:
            own.take()
            won.append(own)
        except (WorkdirLocked, StopIteration):
            pass

    threads = [threading.Thread(target=take, args=(own,)) for own in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.now == 0
    holders = []
    for own in won:
        try:
            own.check()
            holders.append(own)
        except lease.LeaseLost:
            pass
        own.end()
    assert len(holders) == 1


def test_a_garbled_lease_counts_as_somebody_s(store, monkeypatch):
    monkeypatch.setattr(lease, "WATCH_SECONDS", 2.0)
    clock = Time()
    store.write(".lease/00000007.json", b"\xff[")
    own = lease.Lease(store, "own", lambda _: None, clock.clock, clock.sleep)
    own.take()
    assert own.number == 8
    assert clock.now > lease.EXPIRES_SECONDS - 1
    own.end()


def test_a_run_that_lost_its_address_writes_nothing_more(tmp_path, monkeypatch, store):
    def takeover(step):
        if step == 5:
            mirror_of(workdir_path(RUN)).wait()
            store.write(".lease/00000002.json", json.dumps({"owner": "x", "host": "two", "pid": 7}).encode())
            seen.update(objects(store))

    seen = {}
    with pytest.raises(CheckpointError, match=r"was taken over by another launcher \(process 7 on two\)"):
        toy_run(after_row=takeover)
    later = objects(store)
    assert Saved("01_b", 6) not in commits.saved_there(later)
    assert later["metrics.jsonl"] == seen["metrics.jsonl"]
    assert store.read(".lease/00000002.json")


def take_over(store):
    store.write(".lease/00000002.json", json.dumps({"owner": "x", "host": "two", "pid": 7}).encode())
    fake.LocalStore.changes.clear()


def changed():
    return [name for name in fake.LocalStore.changes if "/.lease/" not in name]


@pytest.mark.parametrize("at", ["checkpoints/01_b/4/", ".commits/01_b/6.json", "checkpoints/00_a/2/"])
def test_a_holder_that_is_replaced_amid_its_writes_begins_no_other(monkeypatch, store, at):
    """Frozen right before one write, of eight that are under way at most: that ends, and nothing follows it."""
    plain, took, lock = fake.LocalStore._change, [], threading.RLock()

    def frozen(self, path):
        with lock:
            if not took and path.startswith(f"bucket/run/{at}"):
                took.append(path)
                monkeypatch.setattr(lease, "_LOOK_SECONDS", -1.0)
                take_over(store)
        plain(self, path)

    monkeypatch.setattr(mirror.concurrent.futures, "ThreadPoolExecutor", one_at_a_time)
    monkeypatch.setattr(fake.LocalStore, "_change", frozen)
    with pytest.raises(CheckpointError, match="was taken over by another launcher"):
        toy_run(keep=1)
    assert changed() == took


def one_at_a_time(*_):
    return concurrent.futures.thread.ThreadPoolExecutor(1)


@pytest.mark.parametrize("begun", [True, False])
def test_a_holder_that_is_replaced_while_it_brings_things_down_writes_nothing(tmp_path, monkeypatch, store, begun):
    toy_run()
    store.write("checkpoints/01_b/5/loose", b"")
    if not begun:
        for name in store.names(".commits"):
            store.remove(name)
    move_to(tmp_path, monkeypatch, "two")
    prepare_workdir(RUN)
    bring_down = mirror.Mirror._bring_down

    def long(self, names):
        bring_down(self, names)
        store.write(".lease/00000003.json", b"{}")
        fake.LocalStore.changes.clear()

    monkeypatch.setattr(mirror.Mirror, "_bring_down", long)
    with pytest.raises(lease.LeaseLost), claimed_workdir(RUN):
        pass
    assert changed() == []


def test_a_look_is_free_unless_the_last_is_long_ago(store):
    clock = Time()
    own = lease.Lease(store, "own", lambda _: None, clock.clock, clock.sleep)
    own.take()
    store.write(".lease/00000002.json", b"{}")
    own.hold()
    clock.now = 100.0
    with pytest.raises(lease.LeaseLost):
        own.hold()
    own.end()


@pytest.mark.parametrize(
    "name", ["3", "00000003x", "\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0663", "000000003", "x/00000003"]
)
def test_only_the_holders_own_names_are_numbers(store, name):
    store.write(f".lease/{name}.json", b"{}")
    own = lease.Lease(store, "own", lambda _: None)
    own.take()
    assert own.number == 1
    own.end()


@pytest.mark.parametrize("count", ['"x"', "null", "[1]", "1e400", "7"])
def test_any_count_of_the_same_owner_will_do(store, count):
    store.write(".lease/00000004.json", b'{"owner": "own", "count": %s}' % count.encode())
    own = lease.Lease(store, "own", lambda _: None)
    assert own.take() == 4
    own.end()


def test_a_lease_of_deep_brackets_is_somebody_s(store):
    store.write(".lease/00000004.json", b"[" * 100_000)
    assert lease.Lease(store, "own", lambda _: None)._last() == (4, {})


def test_a_renewal_that_ends_is_told_at_the_next_look(store, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.001)
    own = lease.Lease(store, "own", lambda _: None)
    own.take()
    with monkeypatch.context() as broken:
        broken.setattr(own, "_numbers", lambda: 1 / 0)
        own._thread.join(10)
    with pytest.raises(lease.LeaseLost, match="gs://bucket/run can't be held any more: ZeroDivisionError"):
        own.hold()


# Objects and folders


def test_a_folder_s_objects_are_not_those_of_one_whose_name_goes_on(store, monkeypatch):
    for name in ("c/3/x", "c/30/x", "c/3"):
        store.write(name, b"x")
    everything = fake.LocalStore.find
    monkeypatch.setattr(fake.LocalStore, "find", lambda self, path, **_: everything(self, "bucket", detail=True))
    assert set(store.names("c/3")) == {"c/3", "c/3/x"}


@pytest.mark.parametrize("first", ["a", "a/b"])
def test_objects_of_which_a_folder_holds_only_one_are_told(tmp_path, store, first):
    for name in ("a", "a/b"):
        store.write(name, b"x")
    store.get(first, tmp_path / "folder" / first)
    other = {"a": "a/b", "a/b": "a"}[first]
    with pytest.raises(StoreError, match=f"gs://bucket/run/{other} can't be brought to "):
        store.get(other, tmp_path / "folder" / other)


def test_a_name_that_is_safe_has_room_for_its_temporary_one(tmp_path):
    store = ObjectStore("gs://b/r")
    for letter in ("x", "\u00e9"):
        longest = max(length for length in range(1, 256) if is_safe(letter * length))
        assert longest * len(letter.encode()) >= 240
        store.write(letter * longest, b"x")
        store.get(letter * longest, tmp_path / (letter * longest))


def test_a_profile_is_not_needed_down_here():
    assert commits.others_in({"profile/plugins/x": 0, "tensorboard/x": 0, "report.json": 0}) == ["report.json"]


def test_a_scratch_folder_is_its_user_s_alone(monkeypatch):
    folder = workdir_path(RUN)
    folder.mkdir(parents=True, mode=0o755)
    assert start() == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)
    assert start() == 0
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(object_store.os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(ConfigError, match="is another user's; the variable POISE_SCRATCH names another place"):
        prepare_workdir(RUN)


@pytest.mark.parametrize("look", ["wait", "check"])
def test_processes_do_not_wait_for_each_other_once_an_upload_failed(tmp_path, monkeypatch, look):
    from poise.launch import checkpoint

    class Manager:
        def wait_until_finished(self):
            pass

        check_for_errors = wait_until_finished

        def close(self):
            raise AssertionError("others don't come")

    class Failing(mirror.Mirror):
        log = print

        def __init__(self):
            pass

        def wait(self):
            raise CheckpointError("refused")

        check = wait

    said = []
    own = checkpoint.CheckpointStore(tmp_path / "checkpoints", [("a", 1)], 0, 1, print)
    own._manager, own._manager_phase = Manager(), 0
    monkeypatch.setattr(checkpoint, "mirror_of", lambda folder: Failing())
    monkeypatch.setattr(checkpoint, "several", lambda: True)
    monkeypatch.setattr(checkpoint, "only_main", lambda action, *kinds: (said.append(kinds), action()))
    with pytest.raises(CheckpointError, match="refused"):
        getattr(own, look)()
    own.close()
    assert said == ([(CheckpointError,)] if look == "wait" else [])


# Through the frame of every launcher


@dataclasses.dataclass(frozen=True)
class Config(ExecutionConfig):
    workdir: str = field("", "the run's folder", role="execution")
    batch_size: int = field(4, "examples", minimum=1)

    def __post_init__(self):
        pass


def start(*flags, run=lambda config, workdir: (workdir / "report.json").write_text("{}")):
    return launch(Config, {}, [f"--workdir={RUN}", *flags], run, prog="poise.launch.toy", description="")


def test_launchers_take_addresses(tmp_path, monkeypatch, capsys, store):
    assert start() == 0
    assert json.loads(store.read("config.json"))["batch_size"] == 4
    assert store.read("report.json") == b"{}"
    move_to(tmp_path, monkeypatch, "two")
    before = objects(store)
    assert start("--batch_size=8") == 2
    assert "batch_size was 4 and is now 8" in capsys.readouterr().err
    assert objects(store) == before


def test_launchers_say_in_one_sentence_what_a_store_refuses(tmp_path, capsys):
    fake.use(tmp_path / "store", refuse="bucket")
    assert start() == 2
    said = capsys.readouterr().err
    assert "poise.launch.toy: the workdir cannot be used: gs://bucket/run/.lease/00000001.json: PermissionError" in said
    assert "Traceback" not in said
    fake.use(tmp_path / "store", refuse="report")
    assert start() == 1
    assert "the run can't be brought up to gs://bucket/run: gs://bucket/run/report.json" in capsys.readouterr().err


def test_a_library_that_is_missing_is_named(monkeypatch):
    import fsspec

    def missing(*arguments, **options):
        raise ImportError("no gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError, match=r"gs://bucket/run needs gcsfs: pip install 'poise\[gcs\]'"):
        ObjectStore(checked_address(RUN))


def test_waiting_for_more_than_a_second_is_told(tmp_path, capsys):
    fake.use(tmp_path / "store", slow=0.25)
    toy_run(steps=2)
    assert "bringing the checkpoint up to gs://bucket/run ..." in capsys.readouterr().err


# Runs that are looked at


def test_a_copy_has_the_results_and_the_newest_checkpoint_alone(store):
    toy_run()
    changes = len(fake.LocalStore.changes)
    assert sorted(path.name for path in local_copy(RUN).iterdir()) == ["config.json", "metrics.jsonl", "report.json"]
    folder = local_copy(RUN, "")
    assert saved_here(folder) == [Saved("01_b", 6)]
    assert folder != workdir_path(RUN)
    assert local_copy(f"{RUN}/checkpoints/00_a") == folder / "checkpoints" / "00_a"
    assert saved_here(folder) == [Saved("00_a", 3), Saved("01_b", 6)]
    assert (local_copy(f"{RUN}/checkpoints/00_a/2") / "state" / "d" / "0").read_text() == content(2)["state/d/0"]
    assert len(fake.LocalStore.changes) == changes  # a reader writes nothing
    store.remove("report.json")
    store.write("metrics.jsonl", b"{}\n")
    harm(store, Saved("01_b", 6), "cut")
    shutil.rmtree(folder / "checkpoints" / "01_b")
    folder = local_copy(RUN, "01_b")
    assert saved_here(folder)[-1] == Saved("01_b", 4)  # the newest that is whole
    assert (folder / "metrics.jsonl").read_text() == "{}\n"
    assert not (folder / "report.json").exists()
    harm(store, Saved("01_b", 4), "missing")
    shutil.rmtree(folder / "checkpoints" / "01_b")
    with pytest.raises(CheckpointError, match=r"the checkpoint gs://bucket/run/checkpoints is damaged: its object"):
        local_copy(RUN, "01_b")


def test_a_file_that_is_looked_at_leaves_the_others(store):
    toy_run()
    store.write("student.safetensors", b"weights")
    folder = local_copy(RUN)
    assert local_copy(f"{RUN}/student.safetensors").read_bytes() == b"weights"
    assert (folder / "report.json").is_file()
    store.remove("student.safetensors")
    assert not local_copy(f"{RUN}/student.safetensors").exists()
    assert (folder / "report.json").is_file()


def test_a_copy_is_changed_by_one_process_at_a_time(monkeypatch, store):
    import fcntl

    toy_run()
    locked, get = [], ObjectStore.get

    def looked(self, name, path):
        with path.parent.with_name(f"{path.parent.name}.lock").open("a") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked.append(name)
        get(self, name, path)

    monkeypatch.setattr(ObjectStore, "get", looked)
    local_copy(RUN)
    assert locked == []


def test_a_result_that_vanishes_is_no_damaged_checkpoint(monkeypatch, store):
    toy_run()

    def gone(self, name, path):
        raise MissingObject(f"there is no {name}")

    monkeypatch.setattr(ObjectStore, "get", gone)
    with pytest.raises(MissingObject, match="there is no "):
        local_copy(RUN)


def test_a_page_and_statistics_go_to_addresses(tmp_path, monkeypatch, store):
    import numpy as np

    from poise.launch import report
    from poise.launch.evaluate import EvaluateConfig, Summary, write_statistics

    monkeypatch.chdir(tmp_path)
    toy_run()
    report.run(report.ReportConfig(runs=(RUN,), output=f"{RUN}/page.html"))
    assert b"<html" in store.read("page.html")
    write_statistics(f"{RUN}/mu.npz", Summary(np.zeros(2), np.eye(2), np.zeros((0, 2)), 2))
    assert store.read("mu.npz")[:2] == b"PK"
    assert not (tmp_path / "gs:").exists()
    with pytest.raises(ConfigError, match="output must be a folder, or an address that begins with"):
        report.ReportConfig(runs=(RUN,), output="ftp://bucket/page.html")
    for name in ("data_dir", "reference"):
        with pytest.raises(ConfigError, match=f"{name} must be on this machine, got the address 'gs://b/c'"):
            EvaluateConfig(workdir=RUN, **{name: "gs://b/c"})
    with pytest.raises(ConfigError, match="write_generated must"):
        EvaluateConfig(workdir=RUN, write_generated="ftp://b/c")


def test_a_copy_of_a_run_that_is_open_here_is_its_own_folder():
    prepare_workdir(RUN)
    with claimed_workdir(RUN):
        assert local_copy(RUN) == workdir_path(RUN)


def test_a_copy_of_what_somebody_copied_there(store):
    for name, text in content(7).items():
        store.write(f"checkpoints/00_a/7/{name}", text.encode())
    assert saved_here(local_copy(RUN, "")) == [Saved("00_a", 7)]


def test_readers_say_that_an_address_has_no_run(store):
    from poise.launch.export import load_student
    from poise.launch.runs import read_config
    from poise.launch.teachers import TeacherError, read_description

    assert read_config(RUN) == {}
    store.write("config.json", b'{"seed": 3}')
    assert read_config(RUN) == {"seed": 3}
    with pytest.raises(FileNotFoundError, match="is the run finished"):
        load_student(RUN)
    with pytest.raises(TeacherError, match="there is no teacher in"):
        read_description(RUN)


def test_results_of_a_command_are_brought_to_an_address(tmp_path, store):
    with delivered(f"{RUN}/samples") as path:
        path.with_name("samples.png").write_bytes(b"picture")
        path.with_name("samples.npz").write_bytes(b"arrays")
    assert objects(store) == {"samples.png": b"picture", "samples.npz": b"arrays"}

    def fail():
        with delivered(f"{RUN}/other") as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "other" not in store.names()


def test_places_of_configurations():
    from poise.launch.distill import DistillConfig
    from poise.launch.ptq import PTQConfig
    from poise.launch.report import ReportConfig, run_names
    from poise.launch.sample import SampleConfig

    assert settled("gs://bucket/run/") == "gs://bucket/run"
    assert settled("~/x") == str(pathlib.Path.home() / "x")
    assert DistillConfig(teacher="gs://bucket/teacher").teacher == "gs://bucket/teacher"
    assert PTQConfig(checkpoint="gs://bucket/qat").checkpoint == "gs://bucket/qat"
    assert SampleConfig(workdir="gs://bucket/run").workdir == "gs://bucket/run"
    with pytest.raises(ConfigError, match="must be different folders"):
        ReportConfig(runs=("gs://bucket/run", "gs://bucket/run/"))
    assert run_names(["gs://bucket/a", "gs://bucket/b/"]) == ["a", "b"]
