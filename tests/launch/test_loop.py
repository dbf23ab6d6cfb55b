"""The loop: what a run leaves, that a stopped run goes on bit for bit, and that bad states are never saved."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from poise.core import Algorithm, step_key
from poise.launch.checkpoint import CheckpointStore
from poise.launch.config import ConfigError
from poise.launch.data import InMemory, NoData
from poise.launch.devices import DeviceError
from poise.launch.lock import workdir_lock
from poise.launch.loop import NonFiniteError, fit
from poise.launch.manifest import CheckpointError
from poise.launch.phase import Phase
from poise.launch.signals import Interrupted

spec = importlib.util.spec_from_file_location("tiny_run", pathlib.Path(__file__).with_name("tiny_run.py"))
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """Runs that are repeated a dozen times are compiled once."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def rows(workdir):
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, tiny.run(workdir)


def assert_same_run(workdir, undisturbed):
    metrics, bits = tiny.final_bits(workdir)
    expected_metrics, expected_bits = tiny.final_bits(undisturbed[0])
    assert metrics == expected_metrics
    assert bits == expected_bits


def simple(step, init=lambda key, batch: jnp.zeros(()), data=None, num_steps=4, **options):
    return Phase("only", lambda previous: Algorithm(init, step), data or NoData(), num_steps, **options)


def quick(phase, workdir, **options):
    phases = phase if isinstance(phase, list) else [phase]
    return fit(phases, workdir=workdir, **dict(seed=0, save_every_seconds=0, devices=jax.devices()[:1]) | options)


def test_what_a_run_leaves(undisturbed):
    workdir, result = undisturbed
    expected = [(phase, s) for phase, steps in tiny.STEPS.items() for s in range(1, steps + 1)]
    assert [(row["phase"], row["step"]) for row in rows(workdir)] == expected  # each of them once
    assert set(rows(workdir)[0]) == {"phase", "step", "loss", "grad_norm", "improving"}
    evaluations = [row for row in rows(workdir) if "eval/gap" in row]
    assert [(row["phase"], row["step"]) for row in evaluations] == [("student", s) for s in (3, 6, 9, 12)]
    assert all({"loss_0", "loss_1"} <= row.keys() for row in evaluations)
    assert all(row["eval/nothing"] is None for row in evaluations)
    assert abs(evaluations[-1]["eval/gap"]) > abs(evaluations[0]["eval/gap"])
    assert result.steps_trained == 28
    assert result.restored is None
    assert list(result.seconds) == ["teacher", "warmup", "student"]
    assert all(seconds > 0 for seconds in result.seconds.values())
    assert int(result.state.count) == 2 * (4 + 12)
    folders = workdir / "checkpoints"
    assert sorted(path.name for path in folders.iterdir()) == ["00_teacher", "01_warmup", "02_student", "frozen"]
    assert sorted(path.name for path in (folders / "02_student").iterdir()) == ["10", "12"]
    assert len(list((folders / "frozen").iterdir())) == 1
    timing = [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in timing} == {"teacher", "warmup", "student"}


def test_the_loop_is_the_plain_loop(undisturbed):
    """Phase by phase the same numbers as calling init and step by hand, with the documented keys and batches."""
    state = None
    for index, phase in enumerate(tiny.phases()):
        algorithm = phase.make_algorithm(state)
        state = jax.jit(algorithm.init)(step_key(3, (1 << 16) + index, 0), phase.data.batch(0))
        step = jax.jit(algorithm.step)
        for s in range(phase.num_steps):
            state, metrics = step(state, phase.data.batch(s), step_key(3, index, s))
            row = next(r for r in rows(undisturbed[0]) if (r["phase"], r["step"]) == (phase.name, s + 1))
            for name, value in metrics.items():
                np.testing.assert_allclose(row[name], np.asarray(value, np.float64), rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(undisturbed[1].state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_a_finished_run_trains_nothing(undisturbed):
    workdir, first = undisturbed
    before = tiny.final_bits(workdir)
    again = tiny.run(workdir)
    assert (again.steps_trained, again.restored) == (0, ("student", 12))
    assert again.seconds == first.seconds
    for ours, theirs in zip(jax.tree.leaves(again.state), jax.tree.leaves(first.state), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert tiny.final_bits(workdir) == before


def test_a_longer_last_phase_goes_on_from_the_end(undisturbed, tmp_path):
    tiny.run(tmp_path, steps={"student": 7})
    longer = tiny.run(tmp_path)
    assert (longer.steps_trained, longer.restored) == (5, ("student", 7))
    assert_same_run(tmp_path, undisturbed)
    shorter = tiny.run(tmp_path, steps={"student": 7})
    assert shorter.steps_trained == 0
    assert int(shorter.state.count) == 32


def test_a_run_that_has_come_farther_says_so_and_stays_there(tmp_path, capsys):
    def step(state, batch, key):
        return state + 1, {}

    quick(simple(step, num_steps=4), tmp_path)
    result = quick(simple(step, num_steps=3), tmp_path)
    assert float(result.state) == 4
    assert "1 steps farther than asked for" in capsys.readouterr().err


def test_what_a_run_starts_from_reaches_the_first_phase_and_a_resumed_one(tmp_path):
    start = {"w": jnp.arange(3.0)}

    class Held(NamedTuple):
        total: Any
        frozen: Any

    def make(previous):
        return Algorithm(
            lambda key, batch: Held(jnp.zeros(3), previous),
            lambda state, batch, key: (state._replace(total=state.total + state.frozen["w"]), {}),
        )

    def phase(num_steps):
        return Phase("only", make, NoData(), num_steps)

    options = dict(seed=0, save_every_seconds=0, start=start)  # on all devices
    assert fit([phase(2)], workdir=tmp_path, **options).state.total.tolist() == [0.0, 2.0, 4.0]
    assert fit([phase(3)], workdir=tmp_path, **options).state.total.tolist() == [0.0, 3.0, 6.0]
    frozen = next((tmp_path / "checkpoints" / "frozen").iterdir())
    for file in sorted(frozen.rglob("*")):
        if file.is_file() and file.stat().st_size > 20:
            file.write_bytes(b"\0" * 10)
    assert fit([phase(4)], workdir=tmp_path, **options).state.total.tolist() == [0.0, 4.0, 8.0]


def test_a_longer_earlier_phase_is_refused(tmp_path):
    tiny.run(tmp_path, steps={"student": 2})
    with pytest.raises(CheckpointError, match="12 steps of phase 'teacher', this run has 13"):
        tiny.run(tmp_path, steps={"teacher": 13, "student": 2})


class Crash(Exception):
    pass


def crash():
    raise Crash


@pytest.mark.parametrize("row", [1, 6, 12, 21])
def test_a_run_that_crashed_after_any_row_ends_the_same(undisturbed, tmp_path, row):
    with pytest.raises(Crash):
        tiny.run(tmp_path, writers=[tiny.At(row, crash)])
    tiny.run(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_a_run_that_crashes_again_and_again_ends_the_same(undisturbed, tmp_path):
    crashes = 0
    while True:
        try:
            tiny.run(tmp_path, writers=[tiny.At(8, crash)])
            break
        except Crash:
            crashes += 1
    assert crashes == 4
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("row", "signum", "place"),
    [(3, signal.SIGTERM, ("teacher", 4)), (14, signal.SIGINT, ("warmup", 3)), (25, signal.SIGTERM, ("student", 9))],
)
def test_signals_save_and_leave(undisturbed, tmp_path, row, signum, place, capsys):
    with pytest.raises(Interrupted, match=f"after step {place[1]} of phase '{place[0]}'") as stopped:
        tiny.run(tmp_path, writers=[tiny.At(row, lambda: os.kill(os.getpid(), signum))])
    assert stopped.value.signum == signum
    result = tiny.run(tmp_path)
    assert result.restored == place
    assert_same_run(tmp_path, undisturbed)
    assert "finishing this step" in capsys.readouterr().err


def test_a_signal_while_the_last_step_is_saved_is_obeyed(undisturbed, tmp_path, monkeypatch):
    """Nothing is left to train then, but whoever called has things to do that must not begin."""
    close = CheckpointStore.close

    def stopped(store):
        if (tmp_path / "checkpoints" / "02_student").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        close(store)

    monkeypatch.setattr(CheckpointStore, "close", stopped)
    with pytest.raises(Interrupted, match="stopped after the last phase, with everything saved") as caught:
        tiny.run(tmp_path)
    assert caught.value.signum == signal.SIGTERM
    monkeypatch.undo()
    again = tiny.run(tmp_path)
    assert (again.steps_trained, again.restored) == (0, ("student", 12))
    assert_same_run(tmp_path, undisturbed)


def test_a_signal_while_a_phase_begins(undisturbed, tmp_path):
    def stopping(previous):
        if previous is not None and not stopping.sent:
            stopping.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return tiny.student(previous, False)

    stopping.sent = True
    phases = list(tiny.phases())
    phases[1] = phases[1]._replace(make_algorithm=stopping)
    options = dict(workdir=tmp_path, seed=3, save_every=5, save_every_seconds=0, devices=jax.devices()[:1])

    def arm():
        stopping.sent = False

    with pytest.raises(Interrupted, match="after step 0 of phase 'warmup'"):
        fit(phases, writers=[tiny.At(12, arm)], **options)
    assert fit(phases, **options).restored == ("teacher", 12)
    assert_same_run(tmp_path, undisturbed)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since(undisturbed, tmp_path, capsys):
    with pytest.raises(Crash):
        tiny.run(tmp_path, writers=[tiny.At(25, crash)])
    newest = tmp_path / "checkpoints" / "02_student" / "5"
    for file in newest.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    result = tiny.run(tmp_path)
    assert result.restored == ("warmup", 4)
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert_same_run(tmp_path, undisturbed)


def test_a_damaged_frozen_part_is_made_again(undisturbed, tmp_path, capsys):
    with pytest.raises(Crash):
        tiny.run(tmp_path, writers=[tiny.At(25, crash)])
    (frozen,) = (tmp_path / "checkpoints" / "frozen").iterdir()
    for file in frozen.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1])
    assert tiny.run(tmp_path).restored == ("student", 5)
    assert f"{frozen} is damaged; the same leaves were made again" in capsys.readouterr().err
    assert_same_run(tmp_path, undisturbed)


def test_all_checkpoints_damaged_takes_nothing_else_away(undisturbed, tmp_path):
    with pytest.raises(Crash):
        tiny.run(tmp_path, writers=[tiny.At(10, crash)])
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert len(rows(tmp_path)) >= 5
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"00_teacher/5, because .*move {tmp_path / 'checkpoints'} away"):
            tiny.run(tmp_path)
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
        assert after == before
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    assert tiny.run(tmp_path).restored is None
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("step", [1, 6])
def test_nan_stops_the_run_before_it_is_saved(tmp_path, step):
    with pytest.raises(NonFiniteError, match=rf"state params/w .*after step {step} of phase 'teacher'"):
        tiny.run(tmp_path, nan_at=step, check_every=1)
    assert all(row["step"] < step for row in rows(tmp_path))
    saved = [int(path.name) for path in (tmp_path / "checkpoints").glob("00_teacher/*")]
    assert saved == [s for s in (5, 10) if s < step]


def test_nan_shows_in_the_next_metrics_and_looking_closer_tells_where_it_began(tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"metric \w+ .*after step 8 of phase 'teacher'.*; with check_every=1 it goes"
    ):
        tiny.run(tmp_path, nan_at=7)
    assert [path.name for path in (tmp_path / "checkpoints").glob("00_teacher/*")] == ["5"]
    with pytest.raises(NonFiniteError, match=r"state params/w .*after step 7 of phase 'teacher'.* is from before$"):
        tiny.run(tmp_path, nan_at=7, check_every=1)


@pytest.mark.parametrize(("check_every", "save_every", "found"), [(4, 0, 4), (10, 5, 5), (10, 0, 9)])
def test_a_state_whose_metrics_are_fine_is_looked_at_in_time(tmp_path, check_every, save_every, found):
    def step(state, batch, key):
        return {"w": state["w"] + 1, "unseen": jnp.where(state["w"] >= 2, jnp.inf, 0.0)}, {"w": state["w"]}

    algorithm = Algorithm(lambda key, batch: {"w": jnp.zeros(()), "unseen": jnp.zeros(())}, step)
    phase = Phase("only", lambda previous: algorithm, NoData(), 9)
    with pytest.raises(NonFiniteError, match=f"state unseen is not finite after step {found} of phase 'only'"):
        fit([phase], workdir=tmp_path, seed=0, save_every=save_every, save_every_seconds=0, check_every=check_every)
    assert not list((tmp_path / "checkpoints").rglob("only/*"))


def test_infinite_metrics_are_named(tmp_path):
    def step(state, batch, key):
        return state + 1.0, {"fine": state, "loss": 1.0 / (state - 2.0), "count": jnp.int32(1)}

    with pytest.raises(NonFiniteError, match="metric loss is not finite after step 3 of phase 'only'"):
        quick(simple(step), tmp_path)
    assert [row["loss"] for row in rows(tmp_path)] == [-0.5, -1.0]


class Both(NamedTuple):
    params: Any
    copy: Any
    frozen: Any


def test_phases_may_share_buffers(tmp_path):
    """The state before, a copy of it and a frozen copy of it: donating one must not take the others."""

    def second(previous):
        def init(key, batch):
            return Both(previous, previous, previous)

        def step(state, batch, key):
            gap = (state.params - state.frozen).sum() + (state.copy - state.frozen).sum()
            return Both(state.params + 1.0, state.copy + 2.0, state.frozen), {"gap": gap}

        return Algorithm(init, step)

    def step(state, batch, key):
        return state + 1.0, {}

    phases = [
        Phase("a", lambda _: Algorithm(lambda key, batch: jnp.zeros((64, 64)), step), NoData(), 3),
        Phase("b", second, NoData(), 3),
    ]
    state = quick(phases, tmp_path).state
    assert (np.asarray(state.params) == 6.0).all()
    assert (np.asarray(state.copy) == 9.0).all()
    assert (np.asarray(state.frozen) == 3.0).all()
    assert [row["gap"] for row in rows(tmp_path)[3:]] == [0.0, 3.0 * 4096, 6.0 * 4096]


def test_steps_are_compiled_once(tmp_path):
    """Weak types of the first state, which jax would trace a second time, and restored states change nothing."""
    traces = []

    def step(state, batch, key):
        traces.append(jax.tree.map(lambda leaf: leaf.aval.weak_type, state))
        return {"x": state["x"] * 2 + 1, "y": batch["x"].sum()}, {}

    data = InMemory({"x": np.ones((8, 2), np.float32)}, 4, 0)
    phase = simple(step, init=lambda key, batch: {"x": jnp.asarray(1.0), "y": 0.0}, data=data, num_steps=6)
    quick(phase, tmp_path)
    assert traces == [{"x": False, "y": False}]
    quick(phase._replace(num_steps=9), tmp_path)
    assert len(traces) == 2


def test_metrics_of_several_seeds(tmp_path):
    def step(state, batch, key):
        return state + 1.0, {"loss": state}

    algorithm = Algorithm(lambda key, batch: jnp.zeros(()), step)
    seeds = Algorithm(
        lambda key, batch: jax.vmap(lambda k: algorithm.init(k, batch))(jax.random.split(key, 3)),
        lambda state, batch, key: jax.vmap(lambda s, k: algorithm.step(s, batch, k))(state, jax.random.split(key, 3)),
    )
    quick(Phase("seeds", lambda _: seeds, NoData(), 2), tmp_path)
    assert [row["loss"] for row in rows(tmp_path)] == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]


def test_an_empty_phase_makes_its_state(tmp_path):
    def step(state, batch, key):
        return state + 1.0, {}

    phases = [
        Phase("a", lambda _: Algorithm(lambda key, batch: jnp.ones(()), step), NoData(), 0),
        Phase("b", lambda previous: Algorithm(lambda key, batch: previous * 10.0, step), NoData(), 2),
    ]
    assert float(quick(phases, tmp_path).state) == 12.0
    assert quick(phases, tmp_path).steps_trained == 0
    assert float(quick(phases[:1], tmp_path / "one").state) == 1.0
    assert quick(phases[:1], tmp_path / "one").restored == ("a", 0)


def test_evaluation_at_the_end_and_pictures(tmp_path):
    class Pictures(tiny.At):
        seen = []  # noqa: RUF012

        def images(self, phase, step, images):
            self.seen.append((phase, step, images["grid"].shape))

    def step(state, batch, key):
        return state + 1.0, {}

    phase = simple(
        step,
        evaluate=lambda state, key: {"value": state, "bad": jnp.nan, "draw": jax.random.uniform(key)},
        render=lambda state, key: {"grid": jnp.zeros((2, 4, 4, 1))},
    )
    quick(phase, tmp_path, writers=[Pictures(0, None)])
    assert Pictures.seen == [("only", 4, (2, 4, 4, 1))]
    (evaluation,) = [row for row in rows(tmp_path) if "eval/value" in row]
    assert evaluation["eval/value"] == 4.0
    assert evaluation["eval/bad"] is None
    draw = jax.random.uniform(step_key(0, 2 << 16, 4))
    assert np.float32(evaluation["eval/draw"]) == draw


def test_every_evaluation_and_picture_has_a_key_of_its_own(tmp_path):
    keys = []

    def figures(state, key):
        keys.append(key)
        return {"draw": jax.random.uniform(key)}

    def pictures(state, key):
        keys.append(key)
        return {}

    def phase(name):
        algorithm = Algorithm(lambda key, batch: jnp.zeros(()), lambda state, batch, key: (state + 1.0, {}))
        return Phase(name, lambda previous: algorithm, NoData(), 3, evaluate=figures, evaluate_every=1, render=pictures)

    quick([phase("a"), phase("b")], tmp_path)
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys) == 2 * 2 * 3
    assert len({row["eval/draw"] for row in rows(tmp_path)}) == len(rows(tmp_path)) == 6


def test_saving_by_time(tmp_path):
    def step(state, batch, key):
        return state + 1.0, {}

    quick(simple(step, num_steps=5), tmp_path, save_every_seconds=1e-9, keep=9)
    assert len(list((tmp_path / "checkpoints" / "00_only").iterdir())) == 5
    quick(simple(step, num_steps=5), tmp_path / "never", save_every_seconds=1e9, keep=9)
    assert [path.name for path in (tmp_path / "never" / "checkpoints" / "00_only").iterdir()] == ["5"]


def test_eight_devices_give_what_one_gives(undisturbed, tmp_path):
    result = tiny.run(tmp_path, devices=jax.devices()[:8])
    assert len(result.state.params["w"].devices()) == 8
    for ours, theirs in zip(jax.tree.leaves(result.state), jax.tree.leaves(undisturbed[1].state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(rows(tmp_path), rows(undisturbed[0]), strict=True):
        for name in ("loss", "loss_0", "loss_1", "eval/gap"):
            np.testing.assert_allclose(ours.get(name, 0.0), theirs.get(name, 0.0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(undisturbed, tmp_path):
    with pytest.raises(Crash):
        tiny.run(tmp_path, writers=[tiny.At(25, crash)], devices=jax.devices()[:4])
    result = tiny.run(tmp_path, devices=jax.devices()[:2])
    assert result.restored == ("student", 5)
    for ours, theirs in zip(jax.tree.leaves(result.state), jax.tree.leaves(undisturbed[1].state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_batch_the_devices_can_not_share(tmp_path):
    with pytest.raises(DeviceError, match="has 12 examples, which 8 devices can't share"):
        tiny.run(tmp_path, batch_size=12, devices=jax.devices()[:8])


def test_a_folder_in_use_is_refused(tmp_path):
    code = f"from poise.launch.lock import *\nwith workdir_lock({str(tmp_path)!r}):\n print(flush=True)\n input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    with pytest.raises(ConfigError, match=f"another launcher .process {other.pid}. works in {tmp_path}"):
        tiny.run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    other.communicate("\n")
    with workdir_lock(tmp_path):  # a launcher that holds it may call the loop
        tiny.run(tmp_path, steps={"teacher": 1, "warmup": 0, "student": 0})


def test_a_folder_that_can_not_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=str(tmp_path / "file")):
        tiny.run(tmp_path / "file")


def test_steps_that_change_the_state_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"leaf state changed from float32\[\] to float32\[1\]"):
        quick(simple(lambda state, batch, key: (state[None], {})), tmp_path)
    with pytest.raises(TypeError, match="structure changed"):
        quick(simple(lambda state, batch, key: ({"x": state}, {})), tmp_path)
    with pytest.raises(ValueError, match=r"metric 'loss' must be a scalar or one number a seed, got shape \(2, 2\)"):
        quick(simple(lambda state, batch, key: (state, {"loss": jnp.zeros((2, 2))})), tmp_path)
    with pytest.raises(ValueError, match="a metric can't be called 'step'"):
        quick(simple(lambda state, batch, key: (state, {"step": state})), tmp_path)
    with pytest.raises(ValueError, match="metrics must be a dictionary of scalars, got tuple"):
        quick(simple(lambda state, batch, key: (state, ())), tmp_path)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (dict(name="a/b"), {}, "name must be letters, digits, - and _, got 'a/b'"),
        (dict(num_steps=-1), {}, "num_steps must be at least 0, got -1"),
        (dict(evaluate_every=-1), {}, "evaluate_every must be at least 0, got -1"),
        ({}, dict(seed=-1), "seed must be at least 0, got -1"),
        ({}, dict(seed=2**32), "seed must be less than"),
        ({}, dict(save_every=-1), "save_every must be at least 0, got -1"),
        ({}, dict(keep=0), "keep must be at least 1, got 0"),
        ({}, dict(parallel="xmap"), "parallel must be one of jit, pmap, got 'xmap'"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, options, words):
    phase = simple(lambda state, batch, key: (state, {}))._replace(**change)
    with pytest.raises(ValueError, match=words):
        quick(phase, tmp_path, **options)
    with pytest.raises(ValueError, match="at least one phase"):
        quick([], tmp_path)
    with pytest.raises(ValueError, match="different names"):
        quick([phase, phase], tmp_path)
