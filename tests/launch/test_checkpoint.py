"""Checkpoints come back to the bit, damage is noticed and passed over, other runs' are refused."""

import errno
import json
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from poise.launch.checkpoint import CheckpointStore
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.leaves import Layout
from poise.launch.manifest import CheckpointError

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])
PHASES = [("teacher", 10), ("student", 20)]


class State(NamedTuple):
    params: Any
    optimizer: Any
    key: Any
    others: Any
    frozen: Any


def make(seed, frozen=True):
    key = jax.random.key(seed)
    params = {"linear/w": jax.random.normal(key, (4, 3)), "b": jnp.full(3, 0.1, jnp.bfloat16)}
    return State(
        params=params,
        optimizer=optax.adamw(1e-3).init(params),
        key=jax.random.split(key, 2),
        others=(jnp.array(seed % 2 == 0), jnp.zeros((0, 3)), jnp.int8(-seed), jnp.array(-0.0)),
        frozen={"teacher": {"w": jnp.arange(5.0)}} if frozen else (),
    )


LAYOUTS = [Layout(make(0, frozen=False)), Layout(make(0))]


def shardings(layouts, sharding=SHARDING):
    return [([sharding] * len(layout.live_names), [sharding] * len(layout.frozen_names)) for layout in layouts]


def store(path, log=None, phases=PHASES, seed=0, keep=2):
    return CheckpointStore(path / "checkpoints", phases, seed, keep, (lambda text: None) if log is None else log.append)


def save(path, steps, state=make, **options):
    """Saves (phase, step) pairs; the state tells them apart."""
    writer = store(path, **options)
    for phase, step in steps:
        layout = LAYOUTS[phase]
        live, frozen = layout.split(state(100 * phase + step, frozen=phase == 1))
        writer.save(phase, step, layout, live, frozen, {"teacher": 1.5, "student": step / 8})
    writer.close()


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def restore(path, **options):
    restored = store(path, **options).restore_newest(LAYOUTS, shardings(LAYOUTS))
    return restored and (restored.phase, restored.step)


ALL = [(0, 5), (0, 10), (1, 5), (1, 10), (1, 15)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    save(path, ALL)
    return path


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def test_the_newest_comes_back_to_the_bit(run):
    restored = store(run).restore_newest(LAYOUTS, shardings(LAYOUTS))
    assert (restored.phase, restored.step, restored.seconds) == (1, 15, {"teacher": 1.5, "student": 15 / 8})
    assert_same(LAYOUTS[1].merge(restored.live, restored.frozen), make(115))


def test_an_empty_folder_has_none(tmp_path):
    assert restore(tmp_path) is None
    assert not (tmp_path / "checkpoints").exists()


def test_only_the_newest_are_kept_and_frozen_parts_once(run):
    folder = run / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["00_teacher", "01_student", "frozen"]
    assert sorted(path.name for path in (folder / "00_teacher").iterdir()) == ["10", "5"]
    assert sorted(path.name for path in (folder / "01_student").iterdir()) == ["10", "15"]
    assert len(list((folder / "frozen").iterdir())) == 1
    # a restarted run finds the frozen part that is there
    save(run, [(1, 20)])
    assert len(list((folder / "frozen").iterdir())) == 1


def test_a_state_that_is_donated_after_the_save_is_saved_as_it_was(tmp_path):
    shape = (512, 1024)
    layout = Layout({"x": jnp.zeros(shape)})
    step = jax.jit(lambda x: (x + 1.0,), donate_argnums=0)
    writer = store(tmp_path, keep=6)
    live = (jnp.zeros(shape),)
    for count in range(1, 7):
        live = step(*live)
        writer.save(0, count, layout, live, (), {})
    writer.close()
    for count in range(6, 0, -1):
        restored = store(tmp_path).restore_newest([layout, layout], shardings([layout, layout]))
        assert restored.step == count
        assert (np.asarray(restored.live[0]) == count).all()
        shutil.rmtree(tmp_path / "checkpoints" / "00_teacher" / str(count))


def test_restored_on_eight_devices(run):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    restored = store(run).restore_newest(LAYOUTS, shardings(LAYOUTS, replicated))
    assert all(leaf.sharding.is_equivalent_to(replicated, leaf.ndim) for leaf in restored.live + restored.frozen)
    assert_same(LAYOUTS[1].merge(restored.live, restored.frozen), make(115))


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_empty(path):
    path.write_bytes(b"")


def damage_remove(path):
    path.unlink()


def damage_flip(path):
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(len(content)).integers(0, len(content), 3):
        content[place] ^= 1 << place % 8
    path.write_bytes(content)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_remove, damage_flip])
def test_whatever_file_is_damaged_the_state_is_right_or_the_one_before(original, tmp_path, damage):
    newest = original / "checkpoints" / "01_student" / "15"
    noticed = 0
    for index, file in enumerate(files(newest)):
        run = tmp_path / str(index)
        shutil.copytree(original, run)
        damage(run / file.relative_to(original))
        said = []
        restored = store(run, said).restore_newest(LAYOUTS, shardings(LAYOUTS))
        assert restored.phase == 1
        assert restored.step in (10, 15)
        assert_same(LAYOUTS[1].merge(restored.live, restored.frozen), make(100 + restored.step))
        if restored.step == 10:
            noticed += 1
            assert len(said) == 1
            assert str(run / "checkpoints" / "01_student" / "15") in said[0]
            assert (run / "checkpoints" / "damaged" / "01_student_15").is_dir()
            assert not (run / "checkpoints" / "01_student" / "15").exists()
        else:
            assert said == []
    assert noticed >= 2


def test_flipped_bits_in_the_arrays_are_noticed(tmp_path):
    """The file format gives most flipped bits back as if nothing had happened; the checksums don't."""
    rng = np.random.default_rng(0)
    layout = Layout({"x": jnp.zeros(20_000, jnp.uint32)})
    arrays = [jnp.asarray(rng.integers(0, 2**32, 20_000, dtype=np.uint32)) for _ in range(2)]
    writer = store(tmp_path)
    for step, array in enumerate(arrays, 1):
        writer.save(0, step, layout, (array,), (), {})
    writer.close()
    file = max(files(tmp_path / "checkpoints" / "00_teacher" / "2"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    assert len(content) > 80_000
    kept = tmp_path / "kept"
    (tmp_path / "checkpoints").rename(kept)
    for place in rng.integers(1000, 79_000, 12):
        shutil.copytree(kept, tmp_path / "checkpoints")
        changed = bytearray(content)
        changed[place] ^= 1 << int(place) % 8
        file.write_bytes(changed)
        restored = store(tmp_path).restore_newest([layout, layout], shardings([layout, layout]))
        assert restored.step == 1
        np.testing.assert_array_equal(restored.live[0], arrays[0])
        shutil.rmtree(tmp_path / "checkpoints")


def damage_step(run, phase, step):
    folder = run / "checkpoints" / ("00_teacher", "01_student")[phase] / str(step)
    for file in files(folder):
        damage_truncate(file)


def test_back_to_the_phase_before_but_not_to_a_fresh_start(run):
    said = []
    expected = [(1, 10), (0, 10), (0, 5)]
    for broken, place in zip([(1, 15), (1, 10), (0, 10)], expected, strict=True):
        damage_step(run, *broken)
        assert restore(run, log=said) == place
    assert [text.split(" is damaged")[0].split("/")[-2:] for text in said] == [
        ["01_student", "15"],
        ["01_student", "10"],
        ["00_teacher", "10"],
    ]
    damage_step(run, 0, 5)
    folder = run / "checkpoints"
    words = f"only checkpoint in {folder} is damaged, .*00_teacher/5, because .+; move {folder} away to start afresh"
    for _ in range(2):  # nothing changed by asking
        with pytest.raises(CheckpointError, match=words):
            restore(run, log=said)
    assert len(said) == 3
    # once one is there again the run goes on: what was put aside is in nobody's way
    shutil.rmtree(folder / "00_teacher" / "5")
    save(run, ALL)
    assert restore(run) == (1, 15)


def test_all_of_them_damaged_is_said_and_nothing_is_moved(run):
    (frozen,) = (run / "checkpoints" / "frozen").iterdir()
    for phase, step in [(0, 5), (0, 10), (1, 10), (1, 15)]:
        damage_step(run, phase, step)
    before = files(run)
    with pytest.raises(
        CheckpointError, match=r"all 4 checkpoints in .* are damaged, the newest, .*01_student/15, beca"
    ):
        restore(run)
    assert files(run) == before
    assert frozen.is_dir()


SYSTEM = [errno.EMFILE, errno.EIO, errno.EACCES, errno.ESTALE]


@pytest.mark.parametrize("code", SYSTEM, ids=errno.errorcode.get)
@pytest.mark.parametrize("handler", ["JsonCheckpointHandler", "StandardCheckpointHandler"])
def test_what_the_system_refuses_is_no_damage(run, monkeypatch, code, handler):
    """As Python says it and as the array format's library does; with a reason behind another error, too."""
    errors = [
        OSError(code, os.strerror(code)),
        ValueError(f"UNKNOWN: Failed to open: {os.strerror(code)} [os_error_code='{code}'] [tensorstore_spec='{{}}']"),
        RuntimeError("while reading"),
    ]
    errors[2].__cause__ = errors[0]
    before = files(run)
    newest = run / "checkpoints" / "01_student" / "15"
    for error in errors:

        def refuse(*arguments, error=error, **options):
            raise error

        monkeypatch.setattr(getattr(ocp, handler), "restore", refuse)
        for read in (restore, restore_tree):
            with pytest.raises(CheckpointError, match=f"{newest} can't be read: {os.strerror(code)}"):
                read(run)
        monkeypatch.undo()
    assert files(run) == before
    assert restore(run) == (1, 15)


def test_a_folder_that_can_not_be_listed_is_named(run, monkeypatch):
    folder = run / "checkpoints" / "01_student"
    iterdir = pathlib.Path.iterdir

    def refuse(path):
        if path == folder:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return iterdir(path)

    before = files(run)
    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=f"{folder} can't be read: Input/output error"):
        restore(run)
    monkeypatch.undo()
    assert files(run) == before


def test_a_damaged_frozen_part_leads_back_to_the_phase_before(run):
    (frozen,) = (run / "checkpoints" / "frozen").iterdir()
    for file in files(frozen):
        damage_truncate(file)
    said = []
    assert restore(run, log=said) == (0, 10)
    assert str(frozen) in said[0]
    save(run, [(1, 5)])
    assert restore(run) == (1, 5)


def test_a_damaged_frozen_part_is_not_built_upon(run):
    shutil.rmtree(run / "checkpoints" / "01_student")
    (frozen,) = (run / "checkpoints" / "frozen").iterdir()
    next(file for file in files(frozen) if file.name == "manifest.ocdbt").unlink()
    said = []
    save(run, [(1, 5)], log=said)
    assert "written anew" in said[0]
    assert restore(run, log=said) == (1, 5)
    assert len(said) == 1


def test_what_a_killed_process_left_is_removed(run):
    leftovers = [
        run / "checkpoints" / "01_student" / "20.orbax-checkpoint-tmp",
        run / "checkpoints" / "frozen" / "0123.orbax-checkpoint-tmp-7",
    ]
    for leftover in leftovers:
        leftover.mkdir()
        (leftover / "half").write_bytes(b"half")
    assert restore(run) == (1, 15)
    assert not any(leftover.exists() for leftover in leftovers)


def test_other_runs_checkpoints_are_refused_and_stay(run):
    before = files(run)
    with pytest.raises(CheckpointError, match="seed 0, this one has 1"):
        restore(run, seed=1)
    with pytest.raises(CheckpointError, match="follows 10 steps of phase 'teacher', this run has 11"):
        restore(run, phases=[("teacher", 11), ("student", 20)])
    with pytest.raises(CheckpointError, match=r"00_teacher holds a phase that this run has not .*professor, student"):
        restore(run, phases=[("professor", 10), ("student", 20)])
    other = make(0)._replace(params={"linear/w": jnp.zeros((4, 4)), "b": jnp.zeros(3, jnp.bfloat16)})
    changed = [LAYOUTS[0], Layout(other)]
    with pytest.raises(CheckpointError, match=r"params/linear/w is float32\[4, 3\] there and float32\[4, 4\] now"):
        store(run).restore_newest(changed, shardings(changed))
    changed = [LAYOUTS[0], Layout(make(0)._replace(key=()))]
    with pytest.raises(CheckpointError, match=r"key is key<fry>\[2\] there and not there now"):
        store(run).restore_newest(changed, shardings(changed))
    assert files(run) == before
    assert restore(run, phases=[("teacher", 10), ("student", 500)]) == (1, 15)


def test_a_description_that_was_edited_is_noticed(run):
    file = run / "checkpoints" / "01_student" / "15" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps(meta | {"seed": 9}))
    said = []
    assert restore(run, log=said) == (1, 10)
    assert "its own checksum" in said[0]


def test_a_moved_checkpoint_is_noticed(run):
    (run / "checkpoints" / "01_student" / "15").rename(run / "checkpoints" / "01_student" / "16")
    said = []
    assert restore(run, log=said) == (1, 10)
    assert "says that it is step 15" in said[0]


def test_a_disk_that_is_full_is_named_and_earlier_checkpoints_stay(run, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", full, raising=True)
    with pytest.raises(CheckpointError, match=r"01_student/20 can't be written: .*No space left.*intact"):
        save(run, [(1, 20)])
    monkeypatch.undo()
    assert restore(run) == (1, 15)


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/01_student", "checkpoints/01_student/15"])
def test_a_tree_is_restored_without_knowing_it(run, where):
    tree = restore_tree(run / where)
    state = make(115)
    np.testing.assert_array_equal(tree["params"]["linear/w"], state.params["linear/w"])
    np.testing.assert_array_equal(tree["optimizer"]["0"]["mu"]["b"], jnp.zeros(3, jnp.bfloat16))
    np.testing.assert_array_equal(tree["frozen"]["teacher"]["w"], np.arange(5.0))
    assert tree["others"]["1"].shape == (0, 3)
    assert tree["others"]["0"].dtype == bool
    np.testing.assert_array_equal(jax.random.key_data(tree["key"]), jax.random.key_data(state.key))


def test_a_run_whose_name_is_a_number_is_no_checkpoint(original, tmp_path):
    shutil.copytree(original, tmp_path / "0")
    np.testing.assert_array_equal(restore_tree(tmp_path / "0")["params"]["linear/w"], make(115).params["linear/w"])


def test_a_tree_that_is_damaged_or_not_there_is_named(run, tmp_path):
    damage_step(run, 1, 15)
    with pytest.raises(CheckpointError, match="15 is damaged"):
        restore_tree(run)
    with pytest.raises(CheckpointError, match=f"no checkpoint in {tmp_path}"):
        restore_tree(tmp_path / "elsewhere")


def test_states_without_any_arrays(tmp_path):
    layout = Layout(())
    writer = CheckpointStore(tmp_path, [("a", 1)], 0, 1, lambda text: None)
    writer.save(0, 1, layout, (), (), {})
    writer.close()
    restored = CheckpointStore(tmp_path, [("a", 1)], 0, 1, lambda text: None).restore_newest(
        [layout], shardings([layout])
    )
    assert (restored.step, restored.live) == (1, ())


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        store(tmp_path, keep=0)
    assert pathlib.Path(tmp_path).is_dir()
