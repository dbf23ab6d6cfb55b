"""Random keys: one per example, whatever the devices, and one per training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from poise.core import fold_in_examples, step_key

DEVICES = 8
few = settings(max_examples=8, deadline=None)
small = st.integers(0, 2**31 - 1)


def words(key):
    return np.asarray(jax.random.key_data(key))


def one_by_one(key, size):
    return np.stack([words(jax.random.fold_in(key, i)) for i in range(size)])


@few
@given(seed=small, size=st.integers(1, 5))
def test_each_example_folds_in_its_place(seed, size):
    key = jax.random.key(seed)
    keys = fold_in_examples(key, size)
    assert keys.shape == (size,)
    assert jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(words(keys), one_by_one(key, size))


def test_a_longer_batch_begins_with_the_keys_of_a_shorter_one():
    key = jax.random.key(3)
    np.testing.assert_array_equal(words(fold_in_examples(key, 9))[:4], words(fold_in_examples(key, 4)))


def test_examples_and_steps_draw_different_keys():
    first, second = (words(fold_in_examples(jax.random.key(seed), 32)) for seed in (0, 1))
    assert len({tuple(row) for row in (*first, *second)}) == 64


@pytest.mark.parametrize("share", [1, 3])
def test_every_way_of_spreading_a_batch_draws_the_keys_of_one_device(share):
    key, size = jax.random.key(11), DEVICES * share
    expected = one_by_one(key, size)
    np.testing.assert_array_equal(words(jax.jit(fold_in_examples, static_argnums=1)(key, size)), expected)

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, P("data"))
    sharded = jax.jit(lambda k: jax.random.key_data(fold_in_examples(k, size)), out_shardings=spread)(key)
    assert len(sharded.sharding.device_set) == DEVICES
    np.testing.assert_array_equal(np.asarray(sharded), expected)

    def local(k):
        return jax.random.key_data(fold_in_examples(k, share, "data"))

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P("data"))
    np.testing.assert_array_equal(np.asarray(jax.jit(mapped)(key)), expected)

    everywhere = jax.pmap(lambda k, _: local(k), axis_name="data", in_axes=(None, 0))(key, jnp.zeros(DEVICES))
    assert everywhere.shape == (DEVICES, share, *expected.shape[1:])
    np.testing.assert_array_equal(np.asarray(everywhere).reshape(expected.shape), expected)


def test_a_batch_of_sharded_noise_is_the_noise_of_one_device():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def noise(key, x, axis_name=None):
        return x + jax.vmap(lambda k: jax.random.bits(k, (3,)))(fold_in_examples(key, len(x), axis_name))

    key, x = jax.random.key(5), jnp.arange(48, dtype=jnp.uint32).reshape(16, 3)
    expected = np.asarray(noise(key, x))
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    np.testing.assert_array_equal(np.asarray(jax.jit(noise)(key, spread)), expected)
    local = functools.partial(noise, axis_name="data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    np.testing.assert_array_equal(np.asarray(jax.jit(mapped)(key, spread)), expected)


@pytest.mark.parametrize("size", [0, -1])
def test_an_empty_batch_is_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        fold_in_examples(jax.random.key(0), size)


def test_steps_differ_in_seed_phase_and_step():
    keys = {tuple(words(step_key(a, b, c))) for a in range(4) for b in range(4) for c in range(4)}
    assert len(keys) == 64


@few
@given(seed=small, phase=st.integers(0, 20), step=small)
def test_a_step_folds_in_phase_then_step(seed, phase, step):
    key = step_key(seed, phase, step)
    by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), phase), step)
    np.testing.assert_array_equal(words(key), words(by_hand))
    if phase != step:
        assert (words(key) != words(step_key(seed, step, phase))).any()


def test_a_traced_step_gives_the_concrete_key():
    traced = jax.jit(lambda step: step_key(3, 1, step))
    for step in (0, 1, 1000, 2**31 - 1):
        np.testing.assert_array_equal(words(traced(jnp.int32(step))), words(step_key(3, 1, step)))
    _, scanned = jax.lax.scan(lambda step, _: (step + 1, step_key(3, 1, step)), jnp.int32(0), length=5)
    np.testing.assert_array_equal(words(scanned), np.stack([words(step_key(3, 1, i)) for i in range(5)]))
