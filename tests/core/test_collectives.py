"""Means, sums and places on a device axis: pmap, shard_map and vmap agree with plain numpy on the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from poise.core import axis_index, mean_over, sum_over

DEVICES = 8


def by_vmap(function, x):
    return jax.vmap(function, axis_name="data")(x)


def by_pmap(function, x):
    return jax.pmap(function, axis_name="data")(x)


def by_shard_map(function, x):
    """As the other two: the function sees one device's share, without the devices' axis."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(share):
        share = jax.tree.map(lambda leaf: leaf[0], share)
        return jax.tree.map(lambda leaf: leaf[None], function(share))

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(x)


maps = pytest.mark.parametrize("over", [by_vmap, by_pmap, by_shard_map])


def tree(seed=0, share=3):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(DEVICES, share, 2)).astype(np.float32), "b": [rng.normal(size=DEVICES)]}


def test_no_axis_is_the_identity():
    leaves = tree()
    assert mean_over(None, leaves) is leaves
    assert sum_over(None, leaves) is leaves
    assert sum_over(None, 1) == 1
    place = axis_index(None)
    assert (place.shape, place.dtype, int(place)) == ((), jnp.int32, 0)


@maps
def test_mean_and_sum_of_a_tree(over):
    x = jax.tree.map(jnp.asarray, tree())
    got = over(lambda share: (mean_over("data", share), sum_over("data", share)), x)
    for ours, reduce in zip(got, (np.mean, np.sum), strict=True):
        assert jax.tree.structure(ours) == jax.tree.structure(x)
        for leaf, whole in zip(jax.tree.leaves(ours), jax.tree.leaves(x), strict=True):
            expected = np.broadcast_to(reduce(np.asarray(whole, np.float64), axis=0), whole.shape)
            assert leaf.dtype == whole.dtype
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-6)


@maps
def test_places_count_the_devices(over):
    got = over(lambda share: (axis_index("data"), sum_over("data", jnp.ones_like(share))), jnp.zeros(DEVICES))
    assert got[0].tolist() == list(range(DEVICES))
    assert got[1].tolist() == [DEVICES] * DEVICES


@maps
def test_the_number_of_devices_is_a_sum_of_ones(over):
    got = over(lambda share: share * sum_over("data", 1), jnp.ones(DEVICES))
    assert got.tolist() == [DEVICES] * DEVICES


@maps
def test_the_mean_of_shares_means_is_the_mean_of_the_whole_batch(over):
    whole = tree(seed=2, share=5)["a"]
    got = over(lambda share: mean_over("data", share.mean()), jnp.asarray(whole))
    np.testing.assert_allclose(got, np.full(DEVICES, whole.mean(dtype=np.float64)), rtol=1e-5, atol=1e-7)
    assert abs(whole[0].mean() - whole.mean()) > 1e-2  # a share alone won't do


@maps
def test_the_mean_of_shares_gradients_is_the_gradient_of_the_whole_batch(over):
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(DEVICES, 2, 3)).astype(np.float32), rng.normal(size=(DEVICES, 2)).astype(np.float32)
    w = rng.normal(size=3).astype(np.float32)

    def gradient(share):
        weights = share["w"]  # each device's copy
        return mean_over("data", jax.grad(lambda w: ((share["x"] @ w - share["y"]) ** 2).mean())(weights))

    got = over(gradient, {"x": jnp.asarray(x), "y": jnp.asarray(y), "w": jnp.tile(w, (DEVICES, 1))})
    flat_x, flat_y = x.reshape(-1, 3).astype(np.float64), y.reshape(-1).astype(np.float64)
    expected = 2 * flat_x.T @ (flat_x @ w - flat_y) / len(flat_y)
    np.testing.assert_allclose(got, np.tile(expected, (DEVICES, 1)), rtol=2e-5, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(numbers=st.lists(st.integers(-1000, 1000), min_size=1, max_size=6))
def test_any_number_of_shares(numbers):
    x = jnp.array(numbers, jnp.float32)
    mean, total, place = by_vmap(lambda v: (mean_over("data", v), sum_over("data", v), axis_index("data") + 0 * v), x)
    np.testing.assert_allclose(mean, np.full(len(numbers), np.mean(numbers)), rtol=1e-6, atol=1e-6)
    assert total.tolist() == [sum(numbers)] * len(numbers)
    assert place.tolist() == list(range(len(numbers)))


def test_an_axis_that_is_not_there_is_an_error():
    for function in (lambda: mean_over("nowhere", jnp.ones(2)), lambda: axis_index("nowhere")):
        with pytest.raises(NameError, match="nowhere"):
            function()
