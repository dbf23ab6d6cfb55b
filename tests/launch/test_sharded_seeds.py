"""Seeds are split over devices: what one device gives comes of any number of them, and a run goes on on others."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.core import Algorithm
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.data import InMemory, NoData
from poise.launch.devices import Placement
from poise.launch.loop import NonFiniteError, fit
from poise.launch.phase import Phase, Program
from poise.launch.progress import Console
from poise.rl import over_seeds

DATA = InMemory({"x": np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)}, 8, 1)


def learner(burst=None):
    """A line that learns from the shared batch and its own noise; a seed may burst at its fourth step."""

    def init(key, batch):
        return {"w": jax.random.normal(key, (3,)), "key": jax.random.fold_in(key, 1), "steps": jnp.zeros((), jnp.int32)}

    def step(state, batch, key):
        error = batch["x"] @ state["w"] - jax.random.normal(key, (8,))
        w = state["w"] - 0.1 * error @ batch["x"] / 8
        if burst is not None:
            hit = (state["steps"] == 3) & (jax.random.key_data(state["key"]) == burst).all()
            w = jnp.where(hit, jnp.inf, w)
        return {**state, "w": w, "steps": state["steps"] + 1}, {"loss": jnp.mean(error**2)}

    return Algorithm(init, step)


def phase(num_seeds, steps=6, data=DATA, **options):
    def make(previous, axis_name=None):
        return over_seeds(learner(**options), num_seeds, axis_name)

    evaluate = lambda state, key: {"w": state["w"][:, 0]}  # noqa: E731
    return Phase("line", make, data, steps, evaluate=evaluate, evaluate_every=2, num_seeds=num_seeds)


def train(workdir, num_seeds=8, steps=6, count=8, console=None, **options):
    silent = dict(seed=0, save_every_seconds=0, tensorboard=False, console=console)
    return fit([phase(num_seeds, steps)], workdir=workdir, devices=jax.devices()[:count], **silent, **options)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same(workdir, state, other, other_state):
    for name in ("w", "steps"):
        np.testing.assert_allclose(state[name], other_state[name], rtol=1e-5, atol=1e-6)
    keys, other_keys = (np.asarray(jax.random.key_data(one["key"])) for one in (state, other_state))
    np.testing.assert_array_equal(keys, other_keys)
    for one, two in zip(rows(workdir), rows(other), strict=True):
        assert set(one) == set(two)
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    np.testing.assert_allclose(rows(workdir)[-1]["eval/w"], rows(other)[-1]["eval/w"], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of 8 and of 5 seeds on one device, by the number of seeds."""
    found = {}
    for number in (8, 5):
        workdir = tmp_path_factory.mktemp("alone")
        found[number] = workdir, train(workdir, number, count=1).state
    return found


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({}, "data"),
        ({"parallel": "pmap"}, "data"),
        ({"mesh": "data:2,fsdp:4"}, ("data", "fsdp")),
    ],
)
@pytest.mark.slow
def test_seeds_lie_apart_and_give_what_one_device_gives(tmp_path, alone, options, axes):
    state = train(tmp_path, **options).state
    for leaf in (state["w"], state["steps"]):
        assert leaf.sharding.spec == jax.sharding.PartitionSpec(axes)
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}
    assert_same(tmp_path, state, *alone[8])
    assert len(rows(tmp_path)[0]["loss"]) == 8


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_seeds_that_devices_cannot_share_are_trained_by_each(tmp_path, alone, parallel, capsys):
    state = train(tmp_path, 5, parallel=parallel, console=Console()).state
    assert "5 seeds can't be shared evenly by 8 devices: each trains all of them" in capsys.readouterr().err
    assert state["w"].sharding.is_fully_replicated
    assert_same(tmp_path, state, *alone[5])


def test_rules_for_leaves_come_first(tmp_path, alone, capsys):
    state = train(tmp_path, mesh="fsdp:8", sharding="w$=fsdp;.*=", console=Console()).state
    assert "seeds" not in capsys.readouterr().err
    assert state["steps"].sharding.is_fully_replicated
    assert_same(tmp_path, state, *alone[8])


def test_a_run_goes_on_on_other_devices(tmp_path, alone):
    train(tmp_path, steps=2, count=1)
    train(tmp_path, steps=4, parallel="pmap")
    result = train(tmp_path, count=2)
    assert result.restored == ("line", 4)
    assert_same(tmp_path, result.state, *alone[8])
    np.testing.assert_array_equal(restore_tree(tmp_path)["w"], result.state["w"])


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_devices_wait_for_nothing(parallel):
    program = Program(phase(8, data=NoData())._replace(make_algorithm=without_data), None, Placement(parallel=parallel))
    program.compile()
    for text in (program._step.as_text(), program._look.as_text()):
        assert "num_partitions=8" in text
        assert not [word for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute") if word in text]


def without_data(previous, axis_name=None):
    def step(state, batch, key):
        w = state["w"] + jax.random.normal(key, (3,))
        return {**state, "w": w}, {"norm": jnp.sum(w**2)}

    return over_seeds(learner()._replace(step=step), 8, axis_name)


def test_one_seed_that_bursts_ends_the_run(tmp_path):
    keys = train(tmp_path / "keys", steps=0).state["key"]
    bits = np.asarray(jax.random.key_data(keys))[5]
    options = dict(workdir=tmp_path / "run", seed=0, tensorboard=False, check_every=1)
    with pytest.raises(NonFiniteError, match=r"state w is not finite after step 4 of phase 'line'"):
        fit([phase(8, burst=bits)], **options)


def test_a_leaf_without_seeds_is_refused(tmp_path):
    wrong = phase(4)._replace(num_seeds=3)
    with pytest.raises(ValueError, match=r"every leaf of a state of 3 seeds must .* but (key|w|steps) has shape \(4,"):
        fit([wrong], workdir=tmp_path, seed=0)


def test_a_metric_without_seeds_is_refused(tmp_path):
    def make(previous):
        agents = over_seeds(learner(), 8)
        return agents._replace(step=lambda *arguments: (agents.step(*arguments)[0], {"mean": jnp.zeros(())}))

    with pytest.raises(ValueError, match=r"'mean' must be one number for each of 8 seeds, got shape \(\)"):
        fit([phase(8)._replace(make_algorithm=make)], workdir=tmp_path, seed=0)


def test_devices_of_an_axis_must_share_seeds_evenly():
    agents = over_seeds(learner(), 3, "data")
    with pytest.raises(ValueError, match="num_seeds must be a multiple of the 2 devices that share them, got 3"):
        jax.eval_shape(
            jax.vmap(agents.init, in_axes=(0, None), axis_name="data"), jax.random.split(jax.random.key(0)), ()
        )
